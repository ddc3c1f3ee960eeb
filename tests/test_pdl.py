"""pdl.py against reference(), which is Eq. 3 and Eq. 5 of the paper in plain Python and float64."""

import math
import runpy
import shutil
import sys

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

import pdl
from pdl import linear_pdl_loss, pdl_loss, pdl_weights, token_weights


def reference(logits, targets, counts, alpha, eps, reduction):
    """Power-Law Decay Loss (arXiv 2505.16900), one token at a time.

    logits: (N, V) float64, of moderate size. Row k scores every token as the next one at position k.
    targets: N token ids, the tokens that did come next, or -100 at a position of the context X.
    counts: V numbers. counts[t] is how often token t occurs in a corpus.
    """
    losses, weights = [], []
    for scores, y in zip(logits, targets):
        if y == -100:
            losses.append(0 * scores.sum())  # the context carries no loss
            continue
        P = scores.exp() / scores.exp().sum()  # softmax: P[t] is the probability of token t
        w = 1 / (counts[y] + eps) ** alpha  # Eq. 3: the more often y was counted, the less it weighs
        losses.append(-w * P[y].log())  # one term of Eq. 5
        weights.append(w)
    if reduction == "none":
        return torch.stack(losses)
    if reduction == "sum":
        return sum(losses)  # Eq. 5
    return sum(losses) / sum(weights)  # "mean": Eq. 5 as a weighted average


V, D = 23, 8
COUNTS = [0, 1, 5] + [10 * i for i in range(1, 21)]


def example(shape=(3, 11), dtype=torch.float64, ignored=7):
    g = torch.Generator().manual_seed(0)
    hidden = torch.randn(*shape, D, generator=g, dtype=torch.float64).to(dtype).requires_grad_()
    lm_head = torch.randn(V, D, generator=g, dtype=torch.float64).to(dtype).requires_grad_()
    targets = torch.randint(V, shape, generator=g)
    targets.view(-1)[:ignored] = -100
    return hidden, lm_head, targets


def expected(hidden, lm_head, targets, alpha=0.5, eps=1.0, reduction="mean"):
    """The reference's loss, and its gradients by hidden and lm_head, for the same inputs in float64."""
    hidden, lm_head = (x.detach().double().requires_grad_() for x in (hidden, lm_head))
    logits = (hidden @ lm_head.T).view(-1, V)
    loss = reference(logits, targets.flatten().tolist(), COUNTS, alpha, eps, reduction)
    return loss, *torch.autograd.grad(loss.sum(), (hidden, lm_head))


def full(hidden, lm_head, *args):
    return pdl_loss(hidden @ lm_head.T, *args)


all_losses = pytest.mark.parametrize("loss, reduction", [
    (full, "mean"), (full, "sum"), (full, "none"), (linear_pdl_loss, "mean"), (linear_pdl_loss, "sum")])


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    monkeypatch.setattr(pdl, "CHUNK", 5)  # several chunks, the last of them shorter


@all_losses
@pytest.mark.parametrize("autocast", [False, True])  # it leaves float64 as it is
@pytest.mark.parametrize("alpha, eps", [(0, 1), (0.5, 1), (0.5, 1e-6), (1.5, 1e-3)])
def test_values_and_gradients_are_the_papers(loss, reduction, alpha, eps, autocast):
    hidden, lm_head, targets = example()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        ours = loss(hidden, lm_head, targets, pdl_weights(COUNTS, alpha, eps), reduction)
    value, *gradients = expected(hidden, lm_head, targets, alpha, eps, reduction)
    torch.testing.assert_close(ours, value.view_as(ours), rtol=1e-6, atol=0)  # the weights are float32
    for a, b in zip(torch.autograd.grad(7 * ours.sum(), (hidden, lm_head)), gradients):
        torch.testing.assert_close(a, 7 * b, rtol=1e-6, atol=1e-5 * b.abs().max().item())


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("shape", [(V,), (64, V), (2, 3, 5, V)])
def test_alpha_0_is_cross_entropy_bit_for_bit(shape, reduction):
    logits = torch.randn(shape, generator=torch.Generator().manual_seed(1), requires_grad=True)
    targets = torch.arange(logits.numel() // V).view(shape[:-1]) % V
    targets[targets % 5 == 3] = -100
    ours = pdl_loss(logits, targets, pdl_weights(COUNTS, alpha=0), reduction)
    theirs = F.cross_entropy(logits.view(-1, V), targets.view(-1), reduction=reduction).view(ours.shape)
    assert torch.equal(ours, theirs)
    assert torch.equal(*(torch.autograd.grad(x.sum(), logits)[0] for x in (ours, theirs)))


@pytest.mark.parametrize("loss, rows", [(full, 0), (linear_pdl_loss, 200), (linear_pdl_loss, 3)])
@pytest.mark.parametrize("scale", [1e6, 1, 1e-4])
@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("dtype, error", [(torch.bfloat16, 0.005), (torch.float16, 0.001)], ids=str)
def test_half_precision_is_accurate(dtype, error, autocast, scale, loss, rows, monkeypatch):
    """In any number of chunks, and at any scale of the weights, which does not change the mean."""
    monkeypatch.setattr(pdl, "CHUNK", rows)
    hidden, lm_head, targets = example((200,), dtype)
    value, *gradients = expected(hidden, lm_head, targets)
    if autocast:
        hidden, lm_head = (x.detach().float().requires_grad_() for x in (hidden, lm_head))
    with torch.autocast("cpu", dtype, enabled=autocast):
        ours = loss(hidden, lm_head, targets, scale * pdl_weights(COUNTS))
    assert ours.dtype == torch.float32
    torch.testing.assert_close(ours.double(), value, rtol=error, atol=0)
    for a, b in zip(torch.autograd.grad(ours, (hidden, lm_head)), gradients):
        assert a.dtype == hidden.dtype and (a.double() - b).norm() < error * b.norm()
        assert not ((a == 0) & (b.abs() > 2**-24)).any()  # 2^-24 is the smallest number of float16


@all_losses
def test_all_ignored_is_zero(loss, reduction):
    hidden, lm_head, targets = example(ignored=33)
    ours = loss(hidden, lm_head, targets, pdl_weights(COUNTS), reduction)
    grads = torch.autograd.grad(65536 * ours.sum(), (hidden, lm_head))  # as with GradScaler
    assert all((x == 0).all() for x in (ours, *grads))


def test_a_batch_in_parts_over_one_denominator_is_the_whole_batch():
    """The sum of its weights, or with weights of average 1 on the text that was counted, its targets."""
    counts = torch.tensor(COUNTS)
    targets = torch.arange(V).repeat_interleave(counts)[torch.randperm(sum(COUNTS))].view(6, -1)
    hidden, lm_head, _ = example(targets.shape)
    _, _, whole = expected(hidden, lm_head, targets)
    weights = pdl_weights(counts)
    average_1 = weights * counts.sum() / (counts * weights).sum()
    for w, denominator in (weights, token_weights(targets, weights).sum()), (average_1, targets.numel()):
        parts = sum(linear_pdl_loss(h, lm_head, t, w, "sum") / denominator for h, t in zip(hidden, targets))
        torch.testing.assert_close(torch.autograd.grad(parts, lm_head)[0], whole, rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_extreme_logits_stay_exact(dtype):
    """The target's probability is below the smallest half- or single-precision number."""
    logits = torch.tensor([[0.75, 200.0, 199.0]], dtype=dtype)
    loss = linear_pdl_loss(logits, torch.eye(3, dtype=dtype), torch.tensor([0]), torch.ones(3))
    assert loss.item() == pytest.approx(199.25 + math.log1p(math.exp(-1)), abs=0.01)


def test_a_large_vocabulary_in_half_precision():
    """The gradient of lm_head is summed in slices."""
    hidden, lm_head = torch.randn(9, D), torch.randn(5000, D, requires_grad=True)
    args = torch.arange(9) * 500, torch.rand(5000)
    exact = torch.autograd.grad(full(hidden, lm_head, *args), lm_head)[0]
    with torch.autocast("cpu", torch.bfloat16):
        ours = torch.autograd.grad(linear_pdl_loss(hidden, lm_head, *args), lm_head)[0]
    assert (ours - exact).norm() < 0.01 * exact.norm()


class Operations(TorchDispatchMode):
    """In a with block: the names of torch's operations, and how many numbers each of them gives."""

    def __init__(self):
        super().__init__()
        self.names, self.sizes = [], []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.names.append(func.overloadpacket.__name__)
        self.sizes.append(out.numel() if isinstance(out, torch.Tensor) else 0)
        return out


@pytest.mark.parametrize("trained, products", [("", 1), ("hidden", 2), ("lm_head", 2), ("hidden lm_head", 3)])
def test_linear_never_holds_the_logits_and_computes_only_the_gradients_that_are_needed(trained, products):
    """A chunk takes a matrix product for its logits, and one for each gradient (none: torch.no_grad)."""
    hidden, lm_head, targets = example((100,), ignored=0)
    if trained:
        hidden.requires_grad_("hidden" in trained)
        lm_head.requires_grad_("lm_head" in trained)
    with Operations() as operations, torch.set_grad_enabled(trained != ""):
        loss = linear_pdl_loss(hidden, lm_head, targets, pdl_weights(COUNTS))
        if trained:
            loss.backward(retain_graph=True)
    assert sum(name in ("mm", "addmm_") for name in operations.names) == 20 * products
    assert max(operations.sizes) <= 100 * D  # the logits are 100 * V
    assert (hidden.grad is not None, lm_head.grad is not None) == ("hidden" in trained, "lm_head" in trained)
    with pytest.raises(RuntimeError):
        loss.backward()  # the gradients were scaled in place, so a second time is an error


@pytest.mark.parametrize("arguments", [
    dict(counts=[[1, 2]]), dict(counts=3), dict(counts=[1, -1]), dict(counts=[1.0, math.nan]),
    dict(counts=[1, 2], alpha=-1), dict(counts=[1, 2], alpha=math.inf), dict(counts=[1, 2], alpha=math.nan),
    dict(counts=[1, 2], eps=-1), dict(counts=[1, 2], eps=math.nan), dict(counts=[0, 2], eps=0),
    dict(counts=[1, 1e9], alpha=5), dict(counts=[0, 2], eps=1e-30, alpha=2),
], ids=str)
def test_weights_refuse_nonsense(arguments):
    with pytest.raises(ValueError):
        pdl_weights(**arguments)


@all_losses
def test_the_loss_refuses_what_does_not_fit(loss, reduction):
    hidden, lm_head, targets = example()
    weights = pdl_weights(COUNTS)
    for *wrong, how in ((targets, weights[1:], reduction), (targets, torch.tensor(COUNTS), reduction),
                        (targets[1:], weights, reduction), (targets, weights, "average")):
        with pytest.raises(ValueError):
            loss(hidden, lm_head, *wrong, how)
    for target in -1, V:  # outside the vocabulary
        targets[1, 2] = target
        with pytest.raises(IndexError):
            loss(hidden, lm_head, targets, weights, reduction)
        with pytest.raises(IndexError):
            token_weights(targets, weights)


def test_copied_alone_it_runs_and_shows_the_method(tmp_path, monkeypatch, capsys):
    shutil.copy(pdl.__file__, tmp_path / "copy.py")
    for name in "model", "count", "train", "sample", "numpy", "tiktoken":
        monkeypatch.setitem(sys.modules, name, None)  # to import it would fail
    runpy.run_path(str(tmp_path / "copy.py"), run_name="__main__")
    assert 1 <= len(capsys.readouterr().out.splitlines()) <= 10
