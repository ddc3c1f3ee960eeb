"""
Generate text: with what train.py left in out/, with a checkpoint folder, or with a released GPT-2.

    python sample.py --prompt "A function is"
    python sample.py --init_from out/alpha-0 --counts out/alpha-0/counts.npy --shift 0.25
"""

import numpy as np
import torch

from count import ArgumentParser, at_least, encode, load_counts, load_tokenizer, run_script
from model import GPT, pick_device, pick_dtype


def shift(counts, strength):
    """-strength * log(freq(t)), to be added to the logits: (V,) float32. Unseen tokens count as the rarest.

    A plain model predicts the text's distribution p. Eq. 5 is minimal for q(t), proportional to w(t) p(t). As
    log w(t) is about -alpha * log(freq(t)), a shift of alpha turns p into q. A shift of -alpha undoes it.
    """
    freq = np.maximum(counts, counts[counts > 0].min())
    return -strength * torch.from_numpy(freq).log().float()


def continue_prompt(model, tokenizer, prompt, length, n=1, logit_bias=None, **how):
    """Continue a prompt n times, by at most length tokens. Returns n lists of tokens, cut at an end of text.

    prompt: list of tokens. logit_bias: (n_vocab,). how: temperature, top_k and top_p of GPT.generate.
    """
    V, device = model.config.vocab_size, model.lm_head.device
    if max(prompt) >= V:
        raise ValueError(f"the prompt has token {max(prompt)}, but the model has only {V} tokens")
    bias = torch.full((V,), -torch.inf)  # never sample rows of a padded vocabulary
    bias[: tokenizer.n_vocab] = 0 if logit_bias is None else logit_bias
    idx = torch.tensor([prompt] * n, device=device)  # (n, T)
    idx = model.generate(idx, length, logit_bias=bias.to(device), **how)  # (n, T + length)
    rows, eot = idx[:, len(prompt) :].tolist(), tokenizer.eot_token
    return [row[: row.index(eot)] if eot in row else row for row in rows]


def main():
    p = ArgumentParser(description="Generate text with a GPT-2 checkpoint.")
    p.flag("init_from", "out", "a checkpoint folder, a released GPT-2, or OWNER/NAME on the hub")
    p.add_argument("--prompt", default="\n", help='text to continue; "" starts a text (default: a line end)')
    p.flag("num_samples", 3, "samples, generated side by side", at_least(1))
    p.flag("max_new_tokens", 200, "tokens in each; slow beyond the model's context window", at_least(1))
    p.flag("temperature", 0.8, "lower is more predictable; 0 takes the likeliest token", at_least(0, float))
    p.flag("top_k", 1000, "sample among the k likeliest tokens", at_least(1))
    p.flag("top_p", 0.95, "sample among the likeliest tokens that together reach this probability", float)
    p.flag("seed", 1337, "random seed", at_least(0, below=2**63))
    p.flag("counts", None, "token counts for --shift", nargs="+", metavar="FILE.npy[:SCALE]")
    p.flag("shift", None, "add -SHIFT * log(freq) to the logits: much like PDL, without training",
           at_least(-100, float, below=100))
    p.flag("device", "auto", "cuda, mps or cpu")
    p.flag("dtype", "auto", "dtype of the model", choices=["auto", "float32", "bfloat16", "float16"])
    args = p.parse_args()
    if not 0 < args.top_p <= 1:
        p.error("--top_p must be above 0 and at most 1")
    if (args.counts is None) != (args.shift is None):
        p.error("--shift and --counts go together")

    device, tokenizer = pick_device(args.device), load_tokenizer(args.init_from)
    bias = shift(load_counts(args.counts, tokenizer.n_vocab), args.shift) if args.counts else None
    model = GPT.from_pretrained(args.init_from)
    model.to(device, pick_dtype(args.dtype, device, sampling=True))
    tokens = encode(args.prompt, tokenizer).tolist() or [tokenizer.eot_token]
    torch.manual_seed(args.seed)
    samples = continue_prompt(model, tokenizer, tokens, args.max_new_tokens, args.num_samples, bias,
                              temperature=args.temperature, top_k=args.top_k, top_p=args.top_p)
    for sample in samples:
        print(args.prompt + tokenizer.decode(sample) + "\n" + "-" * 80)


if __name__ == "__main__":
    run_script(main, "lower --num_samples or --max_new_tokens")
