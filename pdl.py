"""
Power-Law Decay Loss (PDL, arXiv 2505.16900): cross-entropy in which rare target tokens weigh more.

    w(t) = 1 / (freq(t) + eps)^alpha                      (Eq. 3)
    L    = - sum_k w(y_k) log P(y_k | y_<k, X)            (Eq. 5)

This file is the whole method. It needs torch (2.4 or later) and nothing else, so copy it into your project:

    weights = pdl_weights(counts, alpha=0.5)              # once; counts[t] = how often token t occurs
    loss = pdl_loss(logits, targets, weights)             # in place of F.cross_entropy(logits, targets)

It does not count tokens (count.py does) and does not shift targets: logits[k] must predict targets[k].
reference() in tests/test_pdl.py is the clearest explanation: the same loss in plain Python, token by token.

MIT License. Paper: "Power-Law Decay Loss for Large Language Model Finetuning", Jintian Shao et al., 2025.
"""

import math

import torch
import torch.nn.functional as F


def pdl_weights(counts, alpha=0.5, eps=1.0):
    """The weight of every token of the vocabulary (Eq. 3): (V,) float32, on the device of counts.

    counts: (V,) tensor, array or list, how often each token occurs in a corpus.
    alpha: strength of the decay. 0 makes every weight exactly 1, which is plain cross-entropy.
    eps: added to every count. With eps=1 an unseen token weighs 1, and no token weighs more. If counts are
        probabilities, take a much smaller eps (the paper: 1e-6).

    Raises ValueError if an argument is out of range.
    """
    counts = torch.as_tensor(counts)
    freq = counts.cpu().double()  # on the CPU, since not every GPU has float64
    if freq.dim() != 1 or not (freq.isfinite() & (freq >= 0)).all():
        raise ValueError("counts must be one finite number per token, none of them negative")
    if not (0 <= alpha < math.inf and 0 <= eps < math.inf):
        raise ValueError(f"alpha and eps must be finite and not negative, not alpha={alpha}, eps={eps}")
    weights = (freq + eps).pow(-alpha).float()
    if not (weights.isfinite() & (weights >= torch.finfo(torch.float32).tiny)).all():
        raise ValueError(f"alpha={alpha} with eps={eps} gives weights that float32 cannot hold")
    return weights.to(counts.device)


def token_weights(targets, weights, ignore_index=-100):
    """w(y_k) of every target, 0 where it is ignored: (...) int64 -> (...).

    To split a batch over micro-steps or devices, divide the reduction="sum" loss of each part by the sum of
    token_weights over the whole batch. Averaging the parts' means gives another loss.
    Raises IndexError for a target outside the vocabulary.
    """
    keep = targets != ignore_index
    # weights[-1] would be the last token's weight, without an error. index_select raises.
    w = weights.to(targets.device).index_select(0, torch.where(keep, targets, 0).flatten())
    return w.view(targets.shape) * keep


def pdl_loss(logits, targets, weights, reduction="mean", ignore_index=-100):
    """Cross-entropy with a weight on each target (Eq. 5).

    logits: (..., V) of any floating dtype. Half precision is raised to float32.
    targets: (...) int64, the token that each position should predict, or ignore_index where there is no
        loss, as in the context X.
    weights: (V,) from pdl_weights.
    reduction: "mean" is sum(w * ce) / sum(w), whose scale does not change with alpha. "sum" is Eq. 5 to the
        letter. "none" is w * ce of every target.

    Returns a scalar, or (...) for "none". If all targets are ignored, loss and gradient are 0. Raises
    ValueError if shapes, weights or reduction do not fit, IndexError for a target outside the vocabulary.
    """
    _check(logits.shape, targets, weights, reduction, ("mean", "sum", "none"))
    if logits.dtype in (torch.float16, torch.bfloat16):
        logits = logits.float()
    weights = weights.to(logits)
    loss = F.cross_entropy(logits.reshape(-1, logits.shape[-1]), targets.flatten(), weights,
                           ignore_index=ignore_index, reduction="sum" if reduction == "mean" else reduction)
    if reduction == "mean":
        loss = _mean(loss, token_weights(targets, weights, ignore_index))
    return loss.view(targets.shape) if reduction == "none" else loss


def _mean(loss_sum, w):
    total = w.sum()
    return loss_sum / torch.where(total > 0, total, 1)  # F.cross_entropy's mean can be 0 / 0


def _check(logits_shape, targets, weights, reduction, allowed):
    *shape, vocab_size = logits_shape
    if [*targets.shape] != shape:
        raise ValueError(f"targets have shape {[*targets.shape]}, not {shape} like the input")
    if weights.shape != (vocab_size,):
        raise ValueError(f"weights have shape {[*weights.shape]}, the vocabulary has {vocab_size} tokens")
    if not weights.is_floating_point():
        raise ValueError("weights must be floating point: pass pdl_weights(counts), not counts")
    if reduction not in allowed:
        raise ValueError(f"reduction must be one of {', '.join(allowed)}, not {reduction!r}")


# ---------------------------------------------------------------------------------------------------------
# That was the method. The rest computes the same loss in a fraction of the memory. train.py uses it.

CHUNK = 512  # rows whose logits are held at a time: fewer are slower, more are no faster


@torch.compiler.disable
def linear_pdl_loss(hidden, lm_head, targets, weights, reduction="mean", ignore_index=-100):
    """pdl_loss(hidden @ lm_head.T, ...) without ever holding all logits, the largest tensor of a step.

    hidden: (..., D), the last hidden states. lm_head: (V, D). reduction: "mean" or "sum". The rest is as in
    pdl_loss. Products run in hidden's dtype, or in autocast's. The gradient of lm_head is summed in float32.
    A frozen lm_head gets no gradient, and costs no time or memory for it. There are no second derivatives.
    bfloat16 rounds a probability above 0.998 to 1: such a target has loss 0.
    """
    _check((*hidden.shape[:-1], len(lm_head)), targets, weights, reduction, ("mean", "sum"))
    device = hidden.device.type
    if torch.is_autocast_enabled(device) and hidden.dtype != torch.float64:  # autocast leaves float64 alone
        hidden = hidden.to(torch.get_autocast_dtype(device))
    w = token_weights(targets, weights, ignore_index).to(torch.promote_types(hidden.dtype, torch.float32))
    # Below, weights are relative to the largest, so that hidden * w fits into float16.
    largest = w.max().clamp(min=torch.finfo(w.dtype).tiny) if w.numel() else 1  # not 0
    keep = targets != ignore_index  # a position without loss costs nothing
    if not torch.is_grad_enabled():
        hidden, lm_head = hidden.detach(), lm_head.detach()  # so that forward() computes no gradients
    with torch.autocast(device, enabled=False):
        loss = largest * _ChunkedLoss.apply(hidden[keep], lm_head, targets[keep], w[keep] / largest)
    return _mean(loss, w) if reduction == "mean" else loss


class _ChunkedLoss(torch.autograd.Function):
    """sum_k w_k * cross_entropy(hidden_k @ lm_head.T, target_k), in chunks of rows.

    The loss and its gradient need the same logits. So the forward pass computes both, chunk by chunk, and the
    backward pass only scales the gradients. With p = softmax(logits), the gradient of a row's cross-entropy
    with respect to its logits is p - onehot(target). The weights multiply hidden (for d_head) and d_hidden
    (in backward), which have D numbers a row, rather than p, which has V.
    """

    @staticmethod
    def forward(ctx, hidden, lm_head, targets, w):
        N, V = len(hidden), len(lm_head)
        head = lm_head.to(hidden.dtype)  # (V, D)
        loss = w.new_zeros(())
        d_hidden = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        d_head = torch.zeros_like(lm_head, dtype=w.dtype) if ctx.needs_input_grad[1] else None
        logits_buffer, p_buffer = hidden.new_empty(2, min(CHUNK, N), V)  # for all chunks: allocating is slow
        for start in range(0, N, CHUNK):
            chunk = slice(start, start + CHUNK)
            h, t, row_weights = hidden[chunk], targets[chunk], w[chunk]  # (n, D), (n,), (n,)
            i = torch.arange(len(t), device=t.device)
            logits = torch.mm(h, head.T, out=logits_buffer[: len(t)])  # (n, V)
            p = torch.softmax(logits, dim=-1, out=p_buffer[: len(t)])  # (n, V)
            # logsumexp = logit - log p, for any token. Take the likeliest, whose p is the most accurate.
            top, at = logits.max(dim=-1)  # (n,) each
            logsumexp = top.to(w.dtype) - p[i, at].to(w.dtype).log()  # (n,), of the logits
            loss += row_weights @ (logsumexp - logits[i, t].to(w.dtype))
            p[i, t] -= 1  # now p is the gradient with respect to the logits, without the weights
            if d_hidden is not None:
                torch.mm(p, head, out=d_hidden[chunk])
            if d_head is not None:
                weighted = (h * row_weights[:, None]).to(h.dtype)  # (n, D)
                # d_head += p.T @ weighted, 2,048 rows of d_head at a time: that product is (V, D), too.
                for total, part in zip(d_head.split(2048), p.T.split(2048)):
                    total += part @ weighted
        ctx.save_for_backward(d_hidden, d_head, w)
        ctx.head_dtype = lm_head.dtype
        return loss

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        d_hidden, d_head, w = ctx.saved_tensors
        if d_hidden is not None:
            d_hidden.mul_((w * grad)[:, None])
        if d_head is not None:  # in place: a copy would be as large as lm_head
            d_head = d_head.mul_(grad).to(ctx.head_dtype)
        return d_hidden, d_head, None, None


if __name__ == "__main__":
    # Words follow a power law themselves (Zipf's law): the r-th occurs 1/r as often as the first.
    counts = (1_000_000 / torch.arange(1, 50_001)).long()
    print("        weight w(t) of a token counted          share of all weight in the text")
    print("alpha   1,000,000 x    10,000 x     100 x       top 100 tokens   next 9,900   other 40,000")
    for alpha in 0, 0.25, 0.5, 0.75, 1, 1.5:
        weights = pdl_weights(counts, alpha)
        share = counts * weights / (counts * weights).sum()
        print(f"{alpha:5}", *(f"{weights[rank - 1]:11.2e}" for rank in (1, 100, 10_000)),
              *(f"{part.sum():14.1%}" for part in share.tensor_split((100, 10_000))))
    print("At alpha 0 this is cross-entropy. At alpha 1 every token has the same share, rare or not.")
