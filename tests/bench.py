"""
What the project's speed and memory are against what people use today, measured side by side: python tests/bench.py

Every measurement is a process of its own, so that its peak memory is its own; a pair runs in turn, three times, and the
median is shown. The model is GPT-2 124M with random weights, which are as fast as trained ones.
"""

import importlib.util
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
import torch.nn.functional as F

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
from count import count_tokens, load_tokenizer
from model import GPT, Block, GPTConfig
from pdl import linear_pdl_loss, token_weights
from train import allocate, pick_dtype

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def peak():
    if DEVICE == "cuda":
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def seconds(step, n=3, warmup=1):
    times = []
    for i in range(warmup + n):
        start = time.perf_counter()
        step()
        if DEVICE == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return statistics.median(times[warmup:])


# Each returns (speed or time, bytes).


def loss(ours, dtype):
    torch.manual_seed(0)
    hidden = torch.randn(4096, 768, device=DEVICE, dtype=dtype, requires_grad=True)
    lm_head = (0.02 * torch.randn(50257, 768, device=DEVICE, dtype=dtype)).requires_grad_()
    targets, weights = torch.randint(50257, (4096,), device=DEVICE), torch.rand(50257, device=DEVICE)

    def step():
        hidden.grad = lm_head.grad = None
        if ours:
            linear_pdl_loss(hidden, lm_head, targets, weights).backward()
        else:
            F.cross_entropy((hidden @ lm_head.T).float(), targets, weights).backward()

    before = peak()
    return seconds(step), peak() - before


def training(ours):
    torch.manual_seed(0)
    if ours or DEVICE == "cuda":
        torch.set_float32_matmul_precision("high")
    if ours and DEVICE == "cpu":
        allocate(lasting=True)
    if not ours:  # nanoGPT recomputes nothing
        Block.forward = lambda self, x, cache=None, pos=0: (lambda x: x + self.mlp(self.ln_2(x)))(x + self.attn(self.ln_1(x)))
    model = GPT(GPTConfig()).to(DEVICE)
    model.set_dropout(0.0)
    batch, block = 4, 512
    x, y = torch.randint(50257, (2, batch, block), device=DEVICE)
    weights = torch.rand(50257, device=DEVICE)
    dtype = pick_dtype("auto", torch.device(DEVICE)) if ours or DEVICE == "cuda" else torch.float32
    # nanoGPT's recipe: on a GPU compiled, in bfloat16, with the fused AdamW; on a CPU in float32 with neither.
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, betas=(0.9, 0.95), fused=ours or DEVICE == "cuda")
    forward = torch.compile(model) if DEVICE == "cuda" and not ours else model

    def step():
        with torch.autocast(DEVICE, dtype, enabled=dtype != torch.float32):
            if ours:
                loss = linear_pdl_loss(forward(x, return_hidden=True), model.lm_head, y, weights, "sum") / token_weights(y, weights).sum()
            else:
                loss = F.cross_entropy(forward(x).view(-1, 50257), y.view(-1), weights)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if ours and DEVICE == "cpu":
            allocate(lasting=False)

    return batch * block / seconds(step), peak()


@torch.inference_mode()
def sampling(ours, other):
    idx = torch.zeros(1, 1, dtype=torch.long, device=DEVICE)
    if other == "Transformers' generate" and not ours:
        from transformers import GPT2Config, GPT2LMHeadModel

        model = GPT2LMHeadModel(GPT2Config()).to(DEVICE).eval()
        generate = lambda: model.generate(idx, attention_mask=torch.ones_like(idx), do_sample=True, min_new_tokens=256, max_new_tokens=256, pad_token_id=0)
    else:
        model = GPT(GPTConfig()).to(DEVICE).eval()

        def without_cache():
            seen = idx
            for _ in range(256):
                seen = torch.cat((seen, torch.multinomial(model(seen)[:, -1].softmax(-1), 1)), dim=1)

        generate = (lambda: model.generate(idx, 256)) if ours else without_cache
    return 256 / seconds(generate, n=1), peak()


def counting(ours):
    files = sorted(Path(os.__file__).parent.glob("*.py"))
    text = "\n".join(file.read_text(encoding="utf-8", errors="ignore") for file in files) * 4
    tokenizer = load_tokenizer(ROOT / "tiny")
    with tempfile.NamedTemporaryFile("w", encoding="utf-8", suffix=".txt") as file:
        file.write(text)
        file.flush()
        step = (lambda: count_tokens([file.name], tokenizer)) if ours else (lambda: tokenizer.encode_ordinary(text))
        return len(text.encode()) / 1e6 / seconds(step), peak()


ROWS = {
    "loss, float32 (s)": (loss, "full logits", "linear_pdl_loss", (torch.float32,)),
    "loss, bfloat16 (s)": (loss, "full logits", "linear_pdl_loss", (torch.bfloat16,)),
    "training (tokens/s)": (training, "nanoGPT's recipe", "train.py", ()),
    "sampling (tokens/s)": (sampling, "no KV cache", "sample.py", ("no KV cache",)),
    "sampling, too (tokens/s)": (sampling, "Transformers' generate", "sample.py", ("Transformers' generate",)),  # if it is installed
    "counting (MB/s)": (counting, "tiktoken, 1 thread", "count.py", ()),
}


def main():
    if len(sys.argv) > 1:  # one measurement, in a process of its own
        function, _, _, args = ROWS[sys.argv[1]]
        print(json.dumps(function(sys.argv[2] == "True", *args)))
        return
    cpu = next((line.split(": ")[1].strip() for line in open("/proc/cpuinfo") if "model name" in line), "") if sys.platform == "linux" else platform.processor()
    name = torch.cuda.get_device_name() if DEVICE == "cuda" else f"{cpu}, {torch.get_num_threads()} threads"
    print(f"{name}; torch {torch.__version__}\n")
    print("| | before | | ours | | ratio | memory |\n|---|---|---|---|---|---|---|")
    for row, (_, theirs_name, ours_name, _) in ROWS.items():
        if "Transformers" in theirs_name and not importlib.util.find_spec("transformers"):
            continue
        runs = [[json.loads(subprocess.check_output([sys.executable, __file__, row, str(ours)])) for ours in (False, True)] for _ in range(3)]
        (theirs, theirs_peak), (ours, ours_peak) = (map(statistics.median, zip(*(r[i] for r in runs))) for i in (0, 1))
        ratio = statistics.median(r[1][0] / r[0][0] for r in runs)
        memory = f"{theirs_peak / 1e9:.2f} to {ours_peak / 1e9:.2f} GB, {ours_peak / theirs_peak:.2f}x" if row[:4] in ("loss", "trai") else ""
        print(f"| {row} | {theirs_name} | {theirs:,.2f} | {ours_name} | {ours:,.2f} | {ratio:.2f}x | {memory} |", flush=True)


if __name__ == "__main__":
    main()
