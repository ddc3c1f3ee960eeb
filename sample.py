"""
Write text with a model: what train.py left in out/, a checkpoint folder, or a released GPT-2.

    python sample.py --prompt "A function is"           # or --prompt FILE:prompt.txt, or - for standard input
    python sample.py --counts counts.npy --shift 0.25   # the effect of PDL without training for it

Here is also how train.py judges a model: how well it predicts held-out text, and what it writes.
"""

import math
import sys
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F

from count import BANDS, ArgumentParser, at_least, load_counts, load_tokenizer, read_text, run
from model import GPT, pick_device, sampling_dtype


# --- writing ---


def write(model, prompts, length, eot, seed, **how):
    """Continue each prompt, a list of tokens, by length tokens or up to eot. how: as in GPT.generate."""
    torch.manual_seed(seed)
    samples = [None] * len(prompts)
    for n in sorted({len(prompt) for prompt in prompts}):  # those of one length in one batch
        which = [i for i, prompt in enumerate(prompts) if len(prompt) == n]
        idx = torch.tensor([prompts[i] for i in which], device=model.lm_head.device)
        for i, row in zip(which, model.generate(idx, length, **how)[:, n:].tolist()):
            samples[i] = row[: row.index(eot)] if eot in row else row
    return samples


def shift(counts, x):
    """-x * log(freq(t)), to be added to the logits: (V,) float32. Tokens never counted count as seen once.

    For a given context Eq. 5 is least at q(t) ~ w(t) p(t), which is what this makes of a model of p without
    training. With x = -alpha it takes a model that was trained at alpha back to p.
    """
    return -x * torch.from_numpy(np.maximum(counts, 1)).log().float()


# --- how well a model predicts ---


class Scores(NamedTuple):
    """Of each token of the vocabulary as a target, (V,) float64: how many there were, the sum of their
    cross-entropies in nats, and how many of them were the likeliest token; and how often it was that."""

    n: torch.Tensor
    ce: torch.Tensor
    correct: torch.Tensor
    predicted: torch.Tensor


@torch.no_grad()
def evaluate(model, corpus, windows, batch_size, autocast, progress=lambda part: None, logit_bias=None):
    """The Scores of a model on windows (W, 2) of a corpus, batch_size at a time; progress is told.

    logit_bias: (V,), added to the logits, as in GPT.generate.
    """
    device, was_training = model.lm_head.device, model.training
    scores = Scores(*torch.zeros(4, len(model.lm_head), dtype=torch.float64))
    model.eval()
    for i in range(0, len(windows), batch_size):
        progress(i / len(windows))
        x, y = map(torch.from_numpy, corpus.sequences(windows[i : i + batch_size]))
        with autocast:
            hidden = model(x.to(device), return_hidden=True)[y.to(device) != -100]
            for h, t in zip(hidden.split(512), y[y != -100].split(512)):  # all logits at once would not fit
                logits = F.linear(h, model.lm_head).float()
                if logit_bias is not None:
                    logits += logit_bias
                ce = F.cross_entropy(logits, t.to(device), reduction="none").cpu().double()
                likeliest, one = logits.argmax(-1).cpu(), torch.ones_like(ce)
                for total, of_target in zip(scores, (one, ce, (likeliest == t).double())):
                    total.index_add_(0, t, of_target)
                scores.predicted.index_add_(0, likeliest, one)
    model.train(was_training)
    return scores


def summarize(scores, weights, counts, bands, tokenizer):
    """Means over the targets of Scores, by name: of all, and by frequency band of the target.

    val_ce: plain cross-entropy, nats. val_pdl: Eq. 5 over the sum of the weights, without targets that were
    never counted (uncounted: their number), since a few of those can weigh more than all others. f1: of the
    likeliest tokens, as predictions of the targets in a band.
    """
    n, ce, correct, predicted = scores
    counted, band = torch.from_numpy(counts > 0), torch.from_numpy(bands)
    w = weights.double() * counted
    n_bytes = torch.zeros(tokenizer.n_vocab)  # a special token stands for no text
    for token in tokenizer.token_byte_values():
        n_bytes[tokenizer.encode_single_token(token)] = len(token)

    of_band = {name: band == i for i, name in enumerate(BANDS) if n[band == i].sum() > 0}

    def by_band(values):
        return {name: (values[among].sum() / n[among].sum()).item() for name, among in of_band.items()}

    return {
        "val_ce": (ce.sum() / n.sum()).item(),
        "val_pdl": ((w * ce).sum() / (w * n).sum().clamp(min=1e-30)).item(),
        "uncounted": int(n[~counted].sum()),
        "bits_per_byte": (ce.sum() / (n * n_bytes).sum().clamp(min=1) / math.log(2)).item(),
        "accuracy": (correct.sum() / n.sum()).item(),
        "ce_by_band": by_band(ce),
        "accuracy_by_band": by_band(correct),
        "f1_by_band": {name: (2 * correct[among].sum() / (n + predicted)[among].sum()).item()
                       for name, among in of_band.items()},
        "share_of_text": {name: (n[among].sum() / n.sum()).item() for name, among in of_band.items()},
    }


# --- what is known of text without a judge ---


def ngrams(tokens, n):
    return list(zip(*(tokens[i:] for i in range(n))))


def measure_text(samples, held_out, bands):
    """Measures of samples, lists of tokens, by name. held_out: (V,), the counts of held-out text."""
    tokens = np.concatenate(samples).astype(np.int64)
    pooled = {n: [gram for sample in samples for gram in ngrams(sample, n)] for n in (1, 2, 3)}
    fours = [ngrams(sample, 4) for sample in samples if len(sample) > 3]
    # Add-one on the held-out side, so that a token it lacks costs much rather than everything.
    p, q = np.bincount(tokens, minlength=len(held_out)), held_out + 1
    p, q = p[p > 0] / max(1, p.sum()), (q / q.sum())[p > 0]
    return {
        # distinct n-grams among all (Li et al. 2016)
        **{f"distinct_{n}": len(set(grams)) / max(1, len(grams)) for n, grams in pooled.items()},
        # n-grams that the same sample had before, n = 4 (seq-rep-4, Welleck et al. 2020)
        "repeated_4": float(np.mean([1 - len(set(grams)) / len(grams) for grams in fours])) if fours else 0.0,
        "distinct_tokens": len(set(tokens.tolist())),  # (Choi et al. 2020, "uniq")
        "rare_share": float((bands[tokens] == 2).sum() / max(1, len(tokens))),
        # KL(sampled || held-out) of single tokens, nats (Choi et al. 2020)
        "kl": float((p * np.log(p / q)).sum()),
    }


def judge_text(model, corpus, windows, bands, tokenizer, seed, say):
    """Let a model write on from held-out openings; measure that, and the real text, by name."""
    prompts, continuations = zip(*corpus.openings(32))
    length = min(128, corpus.block_size - max(map(len, prompts)))
    samples = {}
    for name, temperature in ("sampled", 1.0), ("greedy", 0.0):
        say(f"writing on from {len(prompts)} held-out openings, {name} ...")
        samples[name] = write(model, prompts, length, tokenizer.eot_token, seed, temperature=temperature)
    samples["the text"] = [tokens[:length] for tokens in continuations]
    _, y = corpus.sequences(windows)
    held_out = np.bincount(y[y != -100], minlength=len(bands))
    first = {"prompt": prompts[0]} | {name: rows[0] for name, rows in samples.items()}
    return {
        "n_samples": len(prompts),
        "text": {name: measure_text(rows, held_out, bands) for name, rows in samples.items()},
        "first_sample": {name: tokenizer.decode(tokens) for name, tokens in first.items()},
    }


# --- tables ---

F1_MARGIN = 0.005  # what a costlier way must gain to be taken: seeds differ by about as much


def table_of_run(report):
    """What a run did to held-out prediction, by band, and what the text it writes is like."""
    before, after, alpha = report["before"], report["after"], report["alpha"]
    lines = ["held-out targets   share of  share of       cross-entropy, nats         top-1 accuracy",
             "                       text   weight*     before    after    change      before    after"]
    for name in (*before["ce_by_band"], "all"):
        shares = before["share_of_text"].get(name, 1), report["share_of_weight"].get(name, 1)
        b, a = (result["ce_by_band"].get(name, result["val_ce"]) for result in (before, after))
        c, d = (result["accuracy_by_band"].get(name, result["accuracy"]) for result in (before, after))
        ce = f"{b:8.3f}{a:9.3f}{a - b:+10.3f}"
        lines.append(f"{name:<18}{shares[0]:9.1%}{shares[1]:10.1%}   {ce}   {c:9.1%}{d:9.1%}")
    lines.append(f"bits per byte {before['bits_per_byte']:.3f} before, {after['bits_per_byte']:.3f} after")
    lines.append(f"* of the weights w(t) in the training text at alpha {alpha:g} (at 0 they are all 1)")
    text = report["text"]
    title = f"{report['n_samples']} held-out openings, continued"
    lines.append(f"\n{title:<34}" + "".join(f"{name:>10}" for name in text))
    for key in text["sampled"]:
        lines.append(f"{key:<34}" + "".join(f"{measured[key]:10.4g}" for measured in text.values()))
    return "\n".join(lines)


def in_words(report):
    """The table of a run in a sentence."""
    before, after = report["before"], report["after"]
    change = {name: after["ce_by_band"][name] - before["ce_by_band"][name] for name in after["ce_by_band"]}
    change["all"] = after["val_ce"] - before["val_ce"]
    told = (f"{name} tokens {abs(d):.2f} nats {'better' if d < 0 else 'worse'}" for name, d in change.items())
    return f"Held-out text is predicted, compared with before training: {', '.join(told)}."


def which_weights(report, folder):
    """Which weights were kept, and by what criterion."""
    before, after = report["before"]["val_ce"], report["after"]["val_ce"]
    kept = f"{folder}/ has the weights of step {report['after']['iter']}, best by plain cross-entropy"
    if after < before:
        return kept
    return f"{kept}; but it was better before training ({before:.3f}): try a lower --learning_rate or --alpha"


def table_of_series(reports):
    """Runs at several alphas side by side; what they started from, and the real text's measures."""

    def of_text(measured):
        return f"{measured['rare_share']:12.1%}{measured['distinct_2']:12.3f}{measured['repeated_4']:12.3f}"

    lines = [
        "                    held-out cross-entropy, nats        rare tokens         the text it writes",
        "alpha               all  frequent    middle      rare  top-1 F1  rare share  distinct-2  repeated-4",
    ]
    results = [("before", reports[0]["before"], "")]
    for report in reports:
        text = report["text"]["sampled"] | {"repeated_4": report["text"]["greedy"]["repeated_4"]}
        results.append((f"{report['alpha']:g}", report["after"], of_text(text)))
        results += [(f"0, shift {x}", result, "") for x, result in report["shifted"].items()]
    for name, result, text in results:
        ce = [result["val_ce"], *(result["ce_by_band"].get(band, math.nan) for band in BANDS)]
        lines.append(f"{name:13}" + "".join(f"{x:10.3f}" for x in (*ce, f1_of_rare(result))) + text)
    lines.append(f"{'the text':63}" + of_text(reports[0]["text"]["the text"]))
    lines.append("\nTheir text is sampled at temperature 1, the last column greedy; best near the text.")
    return "\n".join(lines)


def f1_of_rare(result):
    return result["f1_by_band"].get("rare", 0.0)


def first_near_best(f1):
    """The first key whose F1 is within F1_MARGIN of the highest."""
    return next(key for key in f1 if f1[key] >= max(f1.values()) - F1_MARGIN)


def what_to_take(reports):
    """The alpha, and the shift when sampling, that predict rare tokens well; and why, in a sentence.

    Of those near the best the cheapest: plain training, that and a shift, training at the smallest alpha.
    """
    f1 = {}
    for report in sorted(reports, key=lambda report: report["alpha"]):
        f1[f"{report['alpha']:g}", None] = f1_of_rare(report["after"])
        f1 |= {("0", x): f1_of_rare(result) for x, result in report["shifted"].items()}
    names = {(alpha, x): f"alpha {alpha}" + f" and --shift {x}" * bool(x) for alpha, x in f1}
    best, chosen = max(f1, key=f1.get), first_near_best(f1)
    why = f"top-1 predictions of rare tokens have an F1 of {f1[chosen]:.3f}, the highest"
    if chosen != best:
        why += f" but {f1[best]:.3f} with {names[best]}, which is not {F1_MARGIN} more"
    return *chosen, f"Take {names[chosen]}: {why}."


# --- the command line ---


def main():
    p = ArgumentParser(description="Sample text from a GPT-2 checkpoint.")
    flag = p.flag
    flag("init_from", "out", "a checkpoint folder, or a released model's name")
    p.add_argument("--prompt", default="\n", help='text to go on from, FILE:path for that of a file, - for '
                   'standard input, "" for the beginning of a text (default: a line end)')
    flag("num_samples", 3, "drawn side by side", at_least(1))
    flag("max_new_tokens", 200, "in each; past the model's context window they take long", at_least(1))
    flag("temperature", 0.8, "below 1 safer, above 1 wilder, 0 always the likeliest", at_least(0, float))
    flag("top_k", None, "draw among the k likeliest tokens", at_least(1))
    flag("top_p", 0.95, "draw among the likeliest tokens with this probability together", at_least(0, float))
    flag("counts", None, "token counts from count.py, for --shift", nargs="+", metavar="FILE[:SCALE]")
    flag("shift", None, "add -SHIFT * log(max(freq, 1)) to the logits: like PDL; below 0: against it", float)
    flag("seed", 1337, "of what is drawn", at_least(0, below=2**63))
    flag("device", "auto", "cuda, mps, cpu; auto: the first of them that is there")
    flag("dtype", "auto", "of the weights; auto: bfloat16 where that is faster",
         choices=["auto", "float32", "bfloat16"])
    args = p.parse_args()
    if not 0 < args.top_p <= 1:
        p.error("--top_p must be above 0 and at most 1")
    if (args.counts is None) != (args.shift is None) or not abs(args.shift or 0) <= 100:
        p.error("--shift takes a number up to 100 and --counts the counts to shift by: both or neither")

    prompt = args.prompt
    if prompt == "-" or prompt.startswith("FILE:"):
        prompt = "".join(read_text(prompt.removeprefix("FILE:")))
    device = pick_device(args.device)
    tokenizer = load_tokenizer(args.init_from)
    bias = None
    if args.counts:
        bias = shift(load_counts(args.counts, tokenizer.n_vocab), args.shift).to(device)
    model = GPT.from_pretrained(args.init_from).eval()
    window = model.config.n_positions
    eot = tokenizer.eot_token
    tokens = tokenizer.encode_ordinary(prompt) or [eot]
    if len(tokens) > window:
        print(f"NOTE: of the prompt's {len(tokens):,} tokens the model sees the last {window:,}",
              file=sys.stderr)
    within = len(tokens) <= min(args.max_new_tokens, window - args.max_new_tokens)
    model.to(device, sampling_dtype(args.dtype, device, single_rows=args.num_samples == 1 and within))
    prompts = [tokens] * args.num_samples
    how = {name: getattr(args, name) for name in ("temperature", "top_k", "top_p")} | {"logit_bias": bias}
    for sample in write(model, prompts, args.max_new_tokens, eot, args.seed, **how):
        print(prompt + tokenizer.decode(sample))
        print("-" * 80)


if __name__ == "__main__":
    run(main)
