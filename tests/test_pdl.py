"""pdl.py against float64 mathematics written from the paper, Eq. 3 and Eq. 5, token by token in Python."""

import math
import shutil
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

import pdl
from pdl import linear_pdl_loss, pdl_loss, pdl_weights, token_weights

V, D = 23, 8
COUNTS = torch.tensor([0, 1, 5] + [10 * i for i in range(1, 21)])


def reference(hidden, lm_head, targets, alpha, eps, reduction, normalize=False):
    """Eq. 3 and Eq. 5 in plain Python and float64; gradients by autograd."""
    total = sum(COUNTS.tolist()) if normalize else 1
    losses, weights = [], []
    for h, y in zip(hidden.reshape(-1, D), targets.flatten().tolist()):
        if y == -100:
            losses.append(h.sum() * 0)
            continue
        logits = lm_head @ h
        w = 1 / (COUNTS[y].item() / total + eps) ** alpha
        weights.append(w)
        losses.append(-w * (logits[y] - (logits - logits.max()).exp().sum().log() - logits.max()))
    if reduction == "none":
        return torch.stack(losses).view(targets.shape)
    return sum(losses) / (math.fsum(weights) if reduction == "mean" else 1)


def example(shape=(3, 11), dtype=torch.float64, ignored=7):
    g = torch.Generator().manual_seed(0)
    hidden = torch.randn(*shape, D, generator=g, dtype=torch.float64).to(dtype).requires_grad_()
    lm_head = torch.randn(V, D, generator=g, dtype=torch.float64).to(dtype).requires_grad_()
    targets = torch.randint(V, shape, generator=g)
    targets.view(-1)[:ignored] = -100
    return hidden, lm_head, targets


def gradients_in_float64(hidden, lm_head, targets, weights):
    """Of the "mean", for any weights: the sum over k of w_k (softmax - onehot), in closed form."""
    shape, hidden, lm_head = hidden.shape, hidden.detach().double().view(-1, D), lm_head.detach().double()
    keep, targets = targets.view(-1) != -100, targets.view(-1).clamp(min=0)
    w = weights.double()[targets] * keep
    by_logits = ((hidden @ lm_head.T).softmax(-1) - F.one_hot(targets, V)) * (w / w.sum())[:, None]
    return (by_logits @ lm_head).view(shape), by_logits.T @ hidden


def full(hidden, lm_head, *args):
    return pdl_loss(hidden @ lm_head.T, *args)


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    monkeypatch.setattr(pdl, "CHUNK_LOGITS", 5 * V)  # several chunks, the last of them shorter


@pytest.mark.parametrize("loss", [full, linear_pdl_loss])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("alpha, eps, normalize", [(0.5, 1e-6, False), (1.0, 1.0, False), (1.5, 1e-3, True)])
def test_values_and_gradients(loss, reduction, alpha, eps, normalize):
    hidden, lm_head, targets = example()
    weights = pdl_weights(COUNTS, alpha, eps, normalize)
    ours = loss(hidden, lm_head, targets, weights, reduction)
    expected = reference(hidden, lm_head, targets, alpha, eps, reduction, normalize)
    assert ours.shape == expected.shape
    torch.testing.assert_close(ours, expected, rtol=1e-6, atol=0)  # the weights are float32
    upstream = torch.randn_like(ours)
    gradients = (torch.autograd.grad(loss, (hidden, lm_head), upstream) for loss in (ours, expected))
    for a, b in zip(*gradients):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6 * b.abs().max().item())


@pytest.mark.parametrize("loss", [full, linear_pdl_loss])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_bfloat16_is_as_exact_as_its_inputs(loss, reduction):
    hidden, lm_head, targets = example((40, 11), torch.bfloat16)
    ours = loss(hidden, lm_head, targets, pdl_weights(COUNTS, 0.5), reduction)
    exact = [x.detach().double().requires_grad_() for x in (hidden, lm_head)]
    expected = reference(*exact, targets, 0.5, 1e-6, reduction)
    assert ours.dtype == torch.float32
    torch.testing.assert_close(ours.double(), expected, rtol=3e-3, atol=0)
    for a, b in zip(torch.autograd.grad(ours, (hidden, lm_head)), torch.autograd.grad(expected, exact)):
        assert (a.double() - b).norm() < 0.01 * b.norm()


@pytest.mark.parametrize("rows", [250, 20, 5, 1])
@pytest.mark.parametrize("autocast", [False, True])
def test_bfloat16_stays_exact_in_any_number_of_chunks(monkeypatch, rows, autocast):
    monkeypatch.setattr(pdl, "CHUNK_LOGITS", rows * V)
    hidden, lm_head, targets = example((500,), torch.bfloat16)
    expected = gradients_in_float64(hidden, lm_head, targets, pdl_weights(COUNTS, 0.5))
    if autocast:
        hidden, lm_head = (x.detach().float().requires_grad_() for x in (hidden, lm_head))
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        ours = linear_pdl_loss(hidden, lm_head, targets, pdl_weights(COUNTS, 0.5))
    for a, b in zip(torch.autograd.grad(ours, (hidden, lm_head)), expected):
        assert (a.double() - b).norm() < 0.005 * b.norm()


@pytest.mark.parametrize("loss", [full, linear_pdl_loss])
@pytest.mark.parametrize("weight", [1e6, 1, 1e-4])
def test_float16_neither_overflows_nor_vanishes(loss, weight):
    hidden, lm_head, targets = example((40, 11), torch.float16)
    weights = weight * pdl_weights(COUNTS, 0.5, eps=1.0)
    expected = gradients_in_float64(hidden, lm_head, targets, weights)
    ours = torch.autograd.grad(loss(hidden, lm_head, targets, weights), (hidden, lm_head))
    for a, b in zip(ours, expected):
        assert (a.double() - b).norm() < 0.002 * b.norm()
        assert ((a == 0) & (b.abs() > 2**-24)).sum() == 0  # float16 holds nothing smaller


def test_autocast_computes_in_its_dtype_and_returns_float32_gradients():
    hidden, lm_head, targets = example((40, 11), torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        ours = linear_pdl_loss(hidden, lm_head, targets, pdl_weights(COUNTS))
    ours.backward()
    exact = reference(hidden, lm_head, targets, 0.5, 1e-6, "mean")
    assert 0 < (ours - exact).abs() < 0.01 * exact
    assert hidden.grad.dtype == lm_head.grad.dtype == torch.float32
    with torch.autocast("cpu", torch.bfloat16):  # it leaves float64 as it is
        ours = linear_pdl_loss(hidden.double(), lm_head.double(), targets, pdl_weights(COUNTS))
    torch.testing.assert_close(ours.float(), exact)


@pytest.mark.parametrize("shape", [(V,), (64, V), (4, 33, V), (2, 3, 5, V)])
def test_alpha_0_is_cross_entropy_bit_for_bit(shape):
    g = torch.Generator().manual_seed(1)
    logits = torch.randn(shape, generator=g, requires_grad=True)
    targets = torch.randint(V, shape[:-1], generator=g)
    weights = pdl_weights(COUNTS, alpha=0)
    assert (weights == 1).all()
    for reduction in "mean", "sum", "none":
        a = pdl_loss(logits, targets, weights, reduction)
        b = F.cross_entropy(logits.view(-1, V), targets.view(-1), reduction=reduction).view(a.shape)
        assert torch.equal(a, b)
        assert torch.equal(*(torch.autograd.grad(x.sum(), logits)[0] for x in (a, b)))


@pytest.mark.parametrize("loss", [full, linear_pdl_loss])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_all_ignored_is_zero(loss, reduction):
    hidden, lm_head, targets = example(ignored=33)
    ours = loss(hidden, lm_head, targets, pdl_weights(COUNTS), reduction)
    grads = torch.autograd.grad(ours.sum(), (hidden, lm_head))
    assert all((x == 0).all() for x in (ours, *grads))


def test_a_batch_in_parts_over_one_denominator_is_the_whole_batch():
    hidden, lm_head, targets = example()
    weights = pdl_weights(COUNTS, 1.0)
    whole = torch.autograd.grad(linear_pdl_loss(hidden, lm_head, targets, weights), lm_head)[0]
    denominator = token_weights(targets, weights).sum()
    losses = [linear_pdl_loss(h, lm_head, t, weights, "sum") / denominator for h, t in zip(hidden, targets)]
    parts = sum(torch.autograd.grad(loss, lm_head)[0] for loss in losses)
    losses = [linear_pdl_loss(h, lm_head, t, weights) / 3 for h, t in zip(hidden, targets)]
    means = sum(torch.autograd.grad(loss, lm_head)[0] for loss in losses)
    torch.testing.assert_close(parts, whole)
    assert (means - whole).norm() > 0.05 * whole.norm()  # what a mean of means would get wrong


def test_extreme_logits_stay_exact():
    # The target's probability is below the smallest half- or single-precision number.
    logits = torch.tensor([[0.0, 300.0, 299.0]])
    for dtype in torch.float32, torch.bfloat16:
        loss = linear_pdl_loss(logits.to(dtype), torch.eye(3, dtype=dtype), torch.tensor([0]), torch.ones(3))
        assert abs(loss.item() - (300 + math.log1p(math.exp(-1)))) < 2


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_linear_never_holds_the_logits(reduction):
    class Largest(TorchDispatchMode):
        numel = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            if isinstance(out, torch.Tensor):
                self.numel = max(self.numel, out.numel())
            return out

    hidden, lm_head, targets = example((100,))
    with Largest() as largest:
        linear_pdl_loss(hidden, lm_head, targets, pdl_weights(COUNTS), reduction).sum().backward()
    assert largest.numel <= max(5 * V, 100 * D, V * D)


@pytest.mark.parametrize("arguments, culprit", [
    (dict(counts=[[1, 2]]), "counts"), (dict(counts=[1, -1]), "counts"),
    (dict(counts=[1.0, math.nan]), "counts"),
    (dict(counts=[1, 2], alpha=-1), "alpha"), (dict(counts=[1, 2], alpha=math.inf), "alpha"),
    (dict(counts=[1, 2], alpha=math.nan), "alpha"), (dict(counts=[1, 2], eps=-1), "eps"),
    (dict(counts=[1, 2], eps=math.nan), "eps"), (dict(counts=[0, 2], eps=0), "eps"),
    (dict(counts=[0, 0], normalize=True), "counts"), (dict(counts=[1, 1e9], alpha=5), "alpha"),
])
def test_weights_refuse_nonsense(arguments, culprit):
    with pytest.raises(ValueError, match=culprit):
        pdl_weights(**arguments)


@pytest.mark.parametrize("loss", [full, linear_pdl_loss])
def test_loss_refuses_what_does_not_fit(loss):
    hidden, lm_head, targets = example()
    weights = pdl_weights(COUNTS)
    with pytest.raises(ValueError, match="weights"):
        loss(hidden, lm_head, targets, weights[1:])
    with pytest.raises(ValueError, match="counts"):
        loss(hidden, lm_head, targets, torch.as_tensor(COUNTS))
    with pytest.raises(ValueError, match="targets"):
        loss(hidden, lm_head, targets[1:], weights)
    with pytest.raises(ValueError, match="reduction"):
        loss(hidden, lm_head, targets, weights, "average")


@pytest.mark.parametrize("loss", [full, linear_pdl_loss])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("target", [-1, V])
def test_a_target_outside_the_vocabulary_is_an_error(loss, reduction, target):
    hidden, lm_head, targets = example()
    targets[1, 2] = target
    with pytest.raises(IndexError):
        loss(hidden, lm_head, targets, pdl_weights(COUNTS), reduction)
    with pytest.raises(IndexError):
        token_weights(targets, pdl_weights(COUNTS))


def test_copied_alone_it_runs_and_shows_the_method(tmp_path):
    shutil.copy(pdl.__file__, tmp_path)
    command = [sys.executable, "-I", tmp_path / "pdl.py"]
    out = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert len(out.splitlines()) <= 10
