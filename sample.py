"""
Write text with a model: what train.py left in out/, a checkpoint folder, or a released GPT-2.

    python sample.py --prompt "A function is"             # or --prompt FILE:prompt.txt, or --prompt - for stdin
"""

import numpy as np
import torch

from count import ArgumentParser, load_tokenizer, read_text, run
from model import GPT, pick_device


def write(model, prompts, length, eot, seed, **how):
    """Continue every prompt, lists of tokens, by length tokens or up to the token eot. how: as in GPT.generate."""
    torch.manual_seed(seed)
    samples = [None] * len(prompts)
    for n in sorted({len(prompt) for prompt in prompts}):  # those of one length in one batch
        which = [i for i, prompt in enumerate(prompts) if len(prompt) == n]
        idx = torch.tensor([prompts[i] for i in which], device=model.lm_head.device)
        for i, row in zip(which, model.generate(idx, length, **how)[:, n:].tolist()):
            samples[i] = row[: row.index(eot)] if eot in row else row
    return samples


def measure_text(samples, held_out, bands, n_vocab):
    """What is known of text without a judge: samples, lists of tokens, against the held-out targets (N,)."""
    tokens = np.concatenate(samples).astype(np.int64)
    ngrams = lambda sample, n: list(zip(*(sample[i:] for i in range(n))))
    pooled = {n: [g for sample in samples for g in ngrams(sample, n)] for n in (1, 2, 3)}
    # Add-one on the held-out side, so that a token it lacks costs much rather than everything.
    p, q = np.bincount(tokens, minlength=n_vocab), np.bincount(held_out, minlength=n_vocab) + 1
    p, q = p[p > 0] / p.sum(), (q / q.sum())[p > 0]
    fours = [ngrams(sample, 4) for sample in samples if len(sample) > 3]
    return {
        # distinct n-grams among all (Li et al. 2016)
        **{f"distinct_{n}": len(set(grams)) / max(1, len(grams)) for n, grams in pooled.items()},
        # n-grams that the same sample had before, n = 4 (seq-rep-4, Welleck et al. 2020)
        "repeated_4": float(np.mean([1 - len(set(grams)) / len(grams) for grams in fours])) if fours else 0.0,
        "distinct_tokens": len(set(tokens.tolist())),  # (Choi et al. 2020, "uniq")
        "rare_share": (bands[tokens] == 2).double().mean().item(),
        "kl": float((p * np.log(p / q)).sum()),  # KL(sampled || held-out) of single tokens, nats (Choi et al. 2020)
    }


def main():
    p = ArgumentParser(description="Sample text from a GPT-2 checkpoint.")
    add = p.add_argument
    add("--init_from", default="out", help="a checkpoint folder, or a released model's name (default: %(default)s)")
    add("--prompt", default="\n", help="text to go on from, FILE:path for a file's text, - for standard input (default: a line end)")
    add("--num_samples", type=int, default=3, help="drawn side by side (default: %(default)s)")
    add("--max_new_tokens", type=int, default=200, help="in each (default: %(default)s)")
    add("--temperature", type=float, default=0.8, help="below 1 safer, above 1 wilder, 0 always the likeliest (default: %(default)s)")
    add("--top_k", type=int, help="draw among the k likeliest tokens")
    add("--top_p", type=float, default=0.95, help="draw among the likeliest with this probability together (default: %(default)s)")
    add("--seed", type=int, default=1337, help="(default: %(default)s)")
    add("--device", default="auto", help="cuda, mps, cpu (default: the first of them that is there)")
    args = p.parse_args()
    if args.num_samples < 1 or args.max_new_tokens < 1 or args.temperature < 0:
        p.error("--num_samples and --max_new_tokens must be at least 1, --temperature not negative")
    if (args.top_k is not None and args.top_k < 1) or not 0 < args.top_p <= 1:
        p.error("--top_k must be at least 1, --top_p above 0 and at most 1")

    prompt = args.prompt
    if prompt == "-" or prompt.startswith("FILE:"):
        prompt = "".join(read_text(prompt.removeprefix("FILE:")))
    if not prompt:
        raise ValueError("the prompt is empty: give at least one character")

    device = pick_device(args.device)
    tokenizer = load_tokenizer(args.init_from)
    model = GPT.from_pretrained(args.init_from).to(device).eval()
    prompts = [tokenizer.encode_ordinary(prompt)] * args.num_samples
    how = {name: getattr(args, name) for name in ("temperature", "top_k", "top_p")}
    for sample in write(model, prompts, args.max_new_tokens, tokenizer.eot_token, args.seed, **how):
        print(tokenizer.decode(prompts[0] + sample))
        print("-" * 80)


if __name__ == "__main__":
    run(main)
