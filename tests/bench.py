"""
What the project's speed and memory are against what people use today, measured side by side:

    python tests/bench.py [loss] [training] [sampling] [counting] [runs]

Every measurement is a process of its own, so that its peak memory is its own. On a CPU a pair is measured in
turn, three times, and the medians are shown. On a GPU once is enough, and so it is for whole runs. The models
have GPT-2's sizes and random weights, which are as fast as trained ones; nothing is downloaded. Peaks are of
the GPU's memory where there is one, else of the process (on Windows they are not known).
"""

import importlib.util
import itertools
import json
import os
import platform
import random
import runpy
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.nn.functional as F

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))  # a script sees the folder that it is in
from count import count_tokens, load_tokenizer
from model import GPT, GPTConfig, pick_dtype
from pdl import linear_pdl_loss, token_weights
from train import make_optimizer

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPE = pick_dtype("auto", torch.device(DEVICE))
SAMPLING_DTYPE = pick_dtype("auto", torch.device(DEVICE), sampling=True)
CHECKPOINTING = DEVICE == "cpu"  # train.py's default
SHAPE = (12, 1024) if DEVICE == "cuda" else (4, 512)  # of a batch; nanoGPT's own on a GPU
REPEATS = 1 if DEVICE == "cuda" else 3


def peak():
    """Bytes, or None where they are not known."""
    if DEVICE == "cuda":
        return torch.cuda.max_memory_allocated()
    if sys.platform == "win32":
        return None
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def seconds(step, n=3, warmup=1):
    times = []
    for _ in range(warmup + n):
        start = time.perf_counter()
        step()
        if DEVICE == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return statistics.median(times[warmup:])


# --- the measurements: each returns a time or a speed, and bytes ---


def loss(ours, dtype, frozen=False):
    """Forward and backward in seconds, and the memory beyond the inputs. frozen: lm_head is not trained."""
    torch.manual_seed(0)
    options = {"device": DEVICE, "dtype": getattr(torch, dtype)}
    hidden = torch.empty(4096, 768, **options).normal_().requires_grad_()
    lm_head = torch.empty(50257, 768, **options).normal_(std=0.02).requires_grad_(not frozen)
    targets, weights = torch.randint(50257, (4096,), device=DEVICE), torch.rand(50257, device=DEVICE)

    def step():
        hidden.grad = lm_head.grad = None
        if ours:
            linear_pdl_loss(hidden, lm_head, targets, weights).backward()
        else:
            F.cross_entropy((hidden @ lm_head.T).float(), targets, weights).backward()

    before = peak()
    return seconds(step), before and peak() - before


def training(ours):
    """Tokens a second of training steps, and the peak. On a GPU both are compiled, as nanoGPT by default."""
    torch.manual_seed(0)
    nanogpt_on_cpu = not ours and DEVICE == "cpu"
    if not nanogpt_on_cpu:
        torch.set_float32_matmul_precision("high")
    model = GPT(GPTConfig()).to(DEVICE)
    model.set_dropout(0.0)
    model.activation_checkpointing = ours and CHECKPOINTING
    x, y = torch.randint(50257, (2, *SHAPE), device=DEVICE)
    weights = torch.rand(50257, device=DEVICE)
    # nanoGPT's recipe: on a GPU compiled, in bfloat16, with the fused AdamW; on a CPU float32 and neither.
    dtype = torch.float32 if nanogpt_on_cpu else DTYPE
    maybe_compile = torch.compile if DEVICE == "cuda" else lambda function: function
    if ours:
        settings = SimpleNamespace(learning_rate=1e-4, weight_decay=0.1)
        optimizer, trained = make_optimizer(settings, model), maybe_compile(model)
    else:
        groups = [{"params": [p for p in model.parameters() if p.dim() >= 2], "weight_decay": 0.1},
                  {"params": [p for p in model.parameters() if p.dim() < 2], "weight_decay": 0.0}]
        optimizer = torch.optim.AdamW(groups, lr=1e-4, betas=(0.9, 0.95), fused=DEVICE == "cuda")
        nanogpt_loss = maybe_compile(lambda x, y: F.cross_entropy(model(x).view(-1, 50257), y.view(-1)))

    def step():
        with torch.autocast(DEVICE, dtype, enabled=dtype != torch.float32):
            if ours:
                loss = linear_pdl_loss(trained(x, return_hidden=True), model.lm_head, y, weights, "sum")
                loss = loss / token_weights(y, weights).sum()
            else:
                loss = nanogpt_loss(x, y)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return x.numel() / seconds(step), peak()


@torch.inference_mode()
def sampling(how, batch_size):
    """Tokens a second of 256 sampled tokens a sequence."""
    torch.manual_seed(0)
    idx = torch.zeros(batch_size, 1, dtype=torch.long, device=DEVICE)
    if how == "Transformers' generate":
        from transformers import GPT2Config, GPT2LMHeadModel

        model = GPT2LMHeadModel(GPT2Config()).to(DEVICE).eval()
        options = {"attention_mask": torch.ones_like(idx), "do_sample": True, "top_k": 0, "pad_token_id": 0}
        generate = lambda: model.generate(idx, min_new_tokens=256, max_new_tokens=256, **options)
    else:
        model = GPT(GPTConfig()).to(DEVICE).eval()
        if how == "sample.py":
            model.to(SAMPLING_DTYPE)
        generate = lambda: model.generate(idx, 256)
    return batch_size * 256 / seconds(generate, n=1), None


def counting(ours):
    """MB a second of the standard library's sources with tiny's tokenizer."""
    files = sorted(Path(os.__file__).parent.glob("*.py"))
    text = "\n".join(file.read_text(encoding="utf-8", errors="ignore") for file in files) * 4
    tokenizer = load_tokenizer(ROOT / "tiny")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "text.txt")
        path.write_text(text, encoding="utf-8")
        theirs, own = (lambda: tokenizer.encode_ordinary(text)), (lambda: count_tokens([path], tokenizer))
        return path.stat().st_size / 1e6 / seconds(own if ours else theirs), None


def prepare(folder):
    """Write a checkpoint with random weights, and a text of which more is held out than is evaluated."""
    GPT(GPTConfig()).save_pretrained(folder)
    # GPT-2's 256 bytes as the characters that its files write them as; each merge joins two of them.
    characters = [chr(c) for c in (*range(33, 127), *range(161, 173), *range(174, 256), *range(256, 324))]
    pairs = list(itertools.islice(itertools.product(characters, characters), 50_000))
    tokens = [*characters, *map("".join, pairs), "<|endoftext|>"]
    vocab = json.dumps({token: i for i, token in enumerate(tokens)})
    Path(folder, "vocab.json").write_text(vocab, encoding="utf-8")
    Path(folder, "merges.txt").write_text("\n".join(map(" ".join, pairs)), encoding="utf-8")
    rng = random.Random(0)
    words = ["".join(rng.choices("abcdefghijklmnopqrstuvwxyz", k=rng.randint(2, 9))) for _ in range(5000)]
    text = "\n".join(" ".join(rng.choices(words, k=12)) for _ in range(40_000))
    Path(folder, "text.txt").write_text(text, encoding="utf-8")


def whole_run(folder, flags):
    """The peak of all of train.py: evaluation before and after, a few steps, samples, saving."""
    with tempfile.TemporaryDirectory() as out:
        sys.argv = ["train.py", "--init_from", folder, "--data", f"{folder}/text.txt",
                    "--out_dir", f"{out}/out", "--max_iters", "4", *flags]
        runpy.run_path(str(ROOT / "train.py"), run_name="__main__")
        return peak()


# --- the tables ---

# Of a kind: row, function, and for what is there today and for ours a name and the function's arguments.
ROWS = {
    "loss": [
        (f"loss, {dtype} (s)", loss, "full logits", [False, dtype], "linear_pdl_loss", [True, dtype])
        for dtype in ("float32", "bfloat16")
    ] + [("loss, float32 (s)", loss, "lm_head trained", [True, "float32"], "lm_head frozen",
          [True, "float32", True])],
    "training": [("training (tokens/s)", training, "nanoGPT's recipe", [False], "train.py", [True])],
    "sampling": [
        (f"sampling, batch {n} (tokens/s)", sampling, theirs, [theirs, n], "sample.py", ["sample.py", n])
        for n, theirs in ((1, "Transformers' generate"), (1, "float32"), (16, "float32"))
        if theirs == "float32" or importlib.util.find_spec("transformers")
    ],
    "counting": [("counting (MB/s)", counting, "tiktoken, 1 thread", [False], "count.py", [True])],
}
RUNS = ["--batch_size 4 --block_size 512", ""]


def measure(function, *args):
    """What function(*args) returns in a process of its own."""
    command = [sys.executable, __file__, "--measure", function.__name__, json.dumps(args)]
    return json.loads(subprocess.run(command, stdout=subprocess.PIPE, check=True).stdout.splitlines()[-1])


def side_by_side(kinds):
    print("| | before | | ours | | ratio | memory |\n|---|---|---|---|---|---|---|")
    for row, function, theirs, their_args, ours, our_args in itertools.chain(*(ROWS[kind] for kind in kinds)):
        pairs = [(measure(function, *their_args), measure(function, *our_args)) for _ in range(REPEATS)]
        before, after = (statistics.median(pair[i][0] for pair in pairs) for i in (0, 1))
        ratio = statistics.median(b[0] / a[0] for a, b in pairs)
        memory = ""
        if pairs[0][0][1]:
            a, b = (statistics.median(pair[i][1] for pair in pairs) / 1e9 for i in (0, 1))
            memory = f"{a:.2f} to {b:.2f} GB, {b / a:.2f}x"
        cells = row, theirs, f"{before:,.2f}", ours, f"{after:,.2f}", f"{ratio:.2f}x", memory
        print("|", " | ".join(cells), "|", flush=True)


def whole_runs():
    _, nanogpt = measure(training, False)
    shape = "{} x {}".format(*SHAPE)
    against = f" (nanoGPT's step at {shape}: {nanogpt / 1e9:.1f} GB)" if nanogpt else ""
    print(f"| GPT-2 124M, flags of train.py | peak of the whole run{against} |\n|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        measure(prepare, folder)
        for flags in RUNS:
            used = measure(whole_run, folder, flags.split())
            memory = f"{used / 1e9:.2f} GB, {used / nanogpt:.2f}x" if used else ""
            print(f"| {f'`{flags}`' if flags else 'the defaults'} | {memory} |", flush=True)


def main():
    if sys.argv[1:2] == ["--measure"]:
        print("\n" + json.dumps(globals()[sys.argv[2]](*json.loads(sys.argv[3]))))
        return
    kinds = sys.argv[1:] or [*ROWS, "runs"]
    if unknown := set(kinds) - {*ROWS, "runs"}:
        sys.exit(f"bench.py: error: {', '.join(sorted(unknown))}: choose among {', '.join(ROWS)} and runs")
    name = platform.processor() or platform.machine()
    if DEVICE == "cuda":
        name = torch.cuda.get_device_name()
    elif sys.platform == "linux":
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        name = next((line.partition(": ")[2] for line in lines if line.startswith("model name")), name)
    bfloat16 = "with" if DTYPE == torch.bfloat16 else "without"
    threads = torch.get_num_threads()
    print(f"{name} {bfloat16} bfloat16, {threads} threads, torch {torch.__version__}\n", flush=True)
    if tabled := [kind for kind in kinds if kind != "runs"]:
        side_by_side(tabled)
    if "runs" in kinds:
        whole_runs()


if __name__ == "__main__":
    main()
