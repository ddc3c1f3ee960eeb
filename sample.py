"""
Write text with a model: what train.py left in out/, a checkpoint folder, or a released GPT-2.

    python sample.py --prompt "A function is"             # or --prompt FILE:prompt.txt, or --prompt - for stdin
"""

import sys
from pathlib import Path

import torch

from count import ArgumentParser, load_tokenizer, run
from model import GPT, pick_device


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
    if prompt == "-":
        prompt = sys.stdin.read()
    elif prompt.startswith("FILE:"):
        prompt = Path(prompt.removeprefix("FILE:")).read_text(encoding="utf-8")
    if not prompt:
        raise ValueError("the prompt is empty: give at least one character")

    device = pick_device(args.device)
    tokenizer = load_tokenizer(args.init_from)
    model = GPT.from_pretrained(args.init_from).to(device).eval()
    torch.manual_seed(args.seed)
    idx = torch.tensor(tokenizer.encode_ordinary(prompt), device=device).repeat(args.num_samples, 1)
    for tokens in model.generate(idx, args.max_new_tokens, args.temperature, args.top_k, args.top_p).tolist():
        if tokenizer.eot_token in tokens:
            tokens = tokens[: tokens.index(tokenizer.eot_token)]
        print(tokenizer.decode(tokens))
        print("-" * 80)


if __name__ == "__main__":
    run(main)
