"""
Power-Law Decay Loss (PDL, arXiv 2505.16900): cross-entropy in which every target token is weighted
by a power of its inverse frequency.

    w(t) = 1 / (freq(t) + eps)^alpha                      (Eq. 3)
    L    = - sum_k w(y_k) log P(y_k | y_<k, X)            (Eq. 5)

This file is the whole method. It needs torch alone (2.4 or later), so copy it into your own project:

    weights = pdl_weights(counts, alpha=0.5)              # once; counts[t] = how often token t was seen
    loss = pdl_loss(logits, targets, weights)             # in place of F.cross_entropy(logits, targets)

It does not count tokens (count.py) and does not shift them: targets[k] is the token that logits[k]
predicts. linear_pdl_loss, at the end, is the same loss where the logits do not fit into memory.
"""

import math

import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint


def pdl_weights(counts, alpha=0.5, eps=1e-6, normalize=False):
    """The weight of every token of the vocabulary, Eq. 3.

    counts: (V,) tensor, array or list, how often each token occurs; finite and not negative.
    alpha: strength of the decay. 0 gives weights of exactly 1, which is plain cross-entropy.
    eps: keeps the weight of a token that was never counted finite: it gets eps^-alpha.
    normalize: turn counts into probabilities first. Under reduction="mean" the factor cancels, but for eps.

    Returns (V,) float32, on the device of counts. Raises ValueError for arguments that make no sense.
    """
    counts = torch.as_tensor(counts)
    if counts.dim() != 1:
        raise ValueError(f"counts must be 1-D, one number per token, not of shape {tuple(counts.shape)}")
    freq = counts.cpu().double()
    if not (torch.isfinite(freq) & (freq >= 0)).all():
        raise ValueError("counts must be finite and not negative")
    for name, value in ("alpha", alpha), ("eps", eps):
        if not 0 <= value < float("inf"):
            raise ValueError(f"{name} must be finite and not negative, not {value}")
    if normalize:
        if freq.sum() == 0:
            raise ValueError("counts are all zero: they cannot be normalized")
        freq = freq / freq.sum()
    weights = (freq + eps).pow(-alpha).float()
    if not torch.isfinite(weights).all():
        raise ValueError(f"eps={eps} is too small for alpha={alpha}: the weight eps^-alpha overflows")
    if (weights < torch.finfo(torch.float32).tiny).any():
        raise ValueError(f"alpha={alpha} is too large for counts up to {freq.max():g}: a weight underflows, "
                         "as those of probabilities do not (normalize)")
    return weights.to(counts.device)


def token_weights(targets, weights, ignore_index=-100):
    """w(y_k) of every target, 0 where it is ignored: (...) int64 -> (...). IndexError for what is no token.

    Its sum is the denominator of reduction="mean". When a batch is split over micro-steps or devices, divide
    reduction="sum" by the sum over all of them: a mean of means is another loss, since the weights differ.
    """
    keep = targets != ignore_index
    # Unlike weights[targets], index_select does not take -1 for the last token.
    w = weights.to(targets.device).index_select(0, torch.where(keep, targets, 0).reshape(-1))
    return w.view(targets.shape) * keep


def pdl_loss(logits, targets, weights, reduction="mean", ignore_index=-100):
    """Cross-entropy with each target weighted, Eq. 5.

    logits: (..., V), any floating dtype; half precision is raised to float32 first.
    targets: (...) int64, the token each position should predict; ignore_index carries no loss (context X).
    weights: (V,) from pdl_weights.
    reduction: "mean": sum(w * ce) / sum(w), whose scale does not change with alpha. "sum": Eq. 5 to the
        letter. "none": w * ce of every target, shape (...).

    Returns a scalar, or (...) for "none". If all targets are ignored, the loss and its gradient are 0.
    Raises ValueError if the shapes or the reduction do not fit, IndexError for a target that is no token.
    """
    _check(logits.shape[:-1], logits.shape[-1], targets, weights, reduction)
    if logits.dtype in (torch.float16, torch.bfloat16):
        logits = logits.float()
    weights = weights.to(logits)
    loss = F.cross_entropy(logits.reshape(-1, logits.shape[-1]), targets.reshape(-1), weights,
                           ignore_index=ignore_index, reduction="none" if reduction == "none" else "sum")
    if reduction == "none":
        return loss.view(targets.shape)
    return _divide(loss, token_weights(targets, weights, ignore_index)) if reduction == "mean" else loss


def _divide(loss, w):
    # No target at all: 0 / tiny = 0, where 0 / 0 would be NaN and end the training.
    return loss / w.sum().clamp(min=torch.finfo(w.dtype).tiny)


def _check(shape, vocab_size, targets, weights, reduction):
    if shape != targets.shape:
        raise ValueError(f"targets have shape {tuple(targets.shape)}, the input has {tuple(shape)} positions")
    if weights.shape != (vocab_size,):
        raise ValueError(f"weights have shape {tuple(weights.shape)}, the vocabulary has {vocab_size} tokens")
    if not weights.is_floating_point():
        raise ValueError(f"weights are {weights.dtype}, as counts are: pdl_weights makes weights of those")
    if reduction not in ("mean", "sum", "none"):
        raise ValueError(f'reduction must be "mean", "sum" or "none", not {reduction!r}')


# ---------------------------------------------------------------------------------------------------------
# That was the method. What follows computes the same in less memory.

# linear_pdl_loss holds at most this many logits at a time: 667 rows of GPT-2's 50,257. Fewer starve the
# matrix product, and each chunk costs a pass over lm_head's gradient; more take memory and gain little.
# Seconds at 4096 x 768 -> 50257, forward and backward, on two CPU cores, of 128, 667 and 2048 rows: 7.5, 6.5
# and 6.4 in float32; with AMX 3.8, 3.5 and 3.4, in bfloat16 1.6, 0.9 and 1.0. (Not measured on a GPU.)
CHUNK_LOGITS = 2**25


def linear_pdl_loss(hidden, lm_head, targets, weights, reduction="mean", ignore_index=-100):
    """pdl_loss(hidden @ lm_head.T, ...) without ever holding the (N, V) logits, the largest tensor there is.

    hidden: (..., D), the last hidden states. lm_head: (V, D). The rest, the result and the errors as in
    pdl_loss. The products run in hidden's dtype, or in autocast's, as F.linear's would; from half precision,
    lm_head's gradient is summed in float32. Not twice differentiable.
    """
    _check(hidden.shape[:-1], lm_head.shape[0], targets, weights, reduction)
    device = hidden.device.type
    if torch.is_autocast_enabled(device) and hidden.dtype != torch.float64:
        hidden = hidden.to(torch.get_autocast_dtype(device))
    weights = weights.to(hidden.device, torch.promote_types(hidden.dtype, torch.float32))
    hidden, shape, targets = hidden.reshape(-1, hidden.shape[-1]), targets.shape, targets.reshape(-1)

    chunks = math.ceil(len(hidden) * lm_head.shape[0] / CHUNK_LOGITS)  # as few as possible, all of one size
    rows = max(1, math.ceil(len(hidden) / max(1, chunks)))
    with torch.autocast(device, enabled=False):
        if reduction == "none":
            # Each row will get a gradient of its own, so nothing can be summed yet: the logits are computed
            # again in backward.
            lm_head = lm_head.to(hidden.dtype)
            return torch.cat([
                checkpoint(lambda h, t: pdl_loss(h @ lm_head.T, t, weights, "none", ignore_index), h, t,
                           use_reentrant=False)
                for h, t in zip(hidden.split(rows), targets.split(rows))
            ]).view(shape)
        keep = targets != ignore_index  # a row that carries no loss costs nothing
        w = token_weights(targets, weights, ignore_index)
        with_grad = torch.is_grad_enabled()
        loss = _ChunkedLoss.apply(hidden[keep], lm_head, targets[keep], w[keep], rows, with_grad)
    return _divide(loss, w) if reduction == "mean" else loss


class _ChunkedLoss(torch.autograd.Function):
    """sum_k w_k * cross_entropy(hidden_k @ lm_head.T, target_k), its gradients taken chunkwise, in forward.

    With p = softmax(logits), the gradient of one row's cross-entropy by its logits is p - onehot(target). Its
    weight is a number per row, so it is applied to the rows of width D rather than to those of width V.
    """

    @staticmethod
    def forward(ctx, hidden, lm_head, targets, w, rows, with_grad):
        head = lm_head.to(hidden.dtype)
        loss = w.new_zeros(())
        # float16 overflows with weights of 1e6 and underflows with those of 1e-4, so they are taken relative
        # to the largest here; backward multiplies by that one, in float32.
        largest = w.max().clamp(min=torch.finfo(w.dtype).tiny) if len(w) else loss
        grad_hidden = torch.empty_like(hidden) if with_grad else None
        grad_lm_head = torch.zeros_like(lm_head, dtype=w.dtype) if with_grad else None
        # Allocated once: on a CPU, fresh memory of this size is paged in anew each time.
        logits_buffer, p_buffer = hidden.new_empty(2, min(rows, len(hidden)), len(head))
        for start in range(0, len(hidden), rows):
            chunk = slice(start, start + rows)
            h, t, wt = hidden[chunk], targets[chunk], w[chunk]
            row = torch.arange(len(t), device=t.device)
            logits = torch.mm(h, head.T, out=logits_buffer[: len(t)])
            p = torch.softmax(logits, dim=-1, out=p_buffer[: len(t)])
            # logsumexp by way of the largest p: that is at least 1/V, so half precision neither makes it 0
            # nor, unlike a sum of V terms, loses digits.
            top, at = logits.max(dim=-1)
            logsumexp = top.to(w.dtype) - p[row, at].to(w.dtype).log()
            loss += wt @ (logsumexp - logits[row, t].to(w.dtype))
            if with_grad:
                p[row, t] -= 1
                torch.mm(p, head, out=grad_hidden[chunk])
                weighted = (h * (wt / largest)[:, None]).to(h.dtype)
                if h.dtype == w.dtype:
                    grad_lm_head.addmm_(p.T, weighted)
                else:
                    # Summed in half precision, the error would grow with the number of chunks. In slices of
                    # the vocabulary, so that the product is never there whole beside its sum.
                    for total, part in zip(grad_lm_head.split(2048), p.T.split(2048)):
                        total += part @ weighted
        ctx.gradients = grad_hidden, grad_lm_head, w, largest
        ctx.dtype = lm_head.dtype
        return loss

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        if ctx.gradients is None:
            raise RuntimeError("linear_pdl_loss: a second backward pass needs a second forward pass")
        (grad_hidden, grad_lm_head, w, largest), ctx.gradients = ctx.gradients, None
        # In place: a copy is as large as lm_head. Under "mean", grad is small where the weights are large.
        grad_hidden.mul_((w * grad)[:, None])
        return grad_hidden, grad_lm_head.mul_(largest * grad).to(ctx.dtype), None, None, None, None


if __name__ == "__main__":
    # Word frequencies follow a power law themselves (Zipf): the r-th token occurs 1/r as often as the first.
    counts = (1_000_000 / torch.arange(1, 50_001)).long()
    print("        weight w(t) of a token counted          share of the loss, were all equally hard")
    print("alpha   1,000,000 x    10,000 x     100 x       top 100 tokens   next 9,900   other 40,000")
    for alpha in 0, 0.25, 0.5, 0.75, 1, 1.5:
        weights = pdl_weights(counts, alpha)
        share = counts * weights / (counts * weights).sum()
        print(f"{alpha:5}", *(f"{weights[rank - 1]:11.2e}" for rank in (1, 100, 10_000)),
              *(f"{part.sum():14.1%}" for part in share.tensor_split((100, 10_000))))
    print("At alpha = 0 this is cross-entropy; at alpha = 1 every token has the same share, rare or not.")
