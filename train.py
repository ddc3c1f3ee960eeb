"""
Finetune GPT-2 with Power-Law Decay Loss.

    python train.py --alpha 0.5                           # on a GPU if there is one, else on the CPU
    python train.py --alpha 0.5 --data my.txt --init_from gpt2-medium --gradient_accumulation_steps 4
    torchrun --standalone --nproc_per_node=2 train.py     # the same on two devices

The best weights by held-out cross-entropy go to out/ as a Hugging Face GPT-2 folder, beside log.jsonl and report.json.
"""

import contextlib
import ctypes
import hashlib
import json
import math
import os
import signal
import sys
import time
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.nn.parallel import DistributedDataParallel

from count import ArgumentParser, encode, load_tokenizer, read_text, run
from model import GPT, GPTConfig, checkpoint_folder, load_state, pick_device, replace
from pdl import linear_pdl_loss, pdl_weights, token_weights
from sample import measure_text, write

TINY = Path(__file__).parent / "tiny"  # a small pretrained checkpoint, so that all of this runs offline


def parse_args():
    p = ArgumentParser(description="Finetune GPT-2 with Power-Law Decay Loss (arXiv 2505.16900).")
    add = p.add_argument
    # the loss
    add("--alpha", type=float, default=0.5, help="strength of the decay; 0 is plain cross-entropy (default: %(default)s)")
    add("--eps", type=float, default=1e-6, help="added to every count, Eq. 3 (default: %(default)s)")
    add("--normalize", action="store_true", help="probabilities instead of raw counts in Eq. 3")
    add("--alpha_warmup_iters", type=int, default=0, help="raise alpha linearly from 0 over this many steps (default: %(default)s)")
    add("--counts", nargs="+", metavar="FILE[:SCALE]", help="token counts from count.py, added up, each scaled if so asked (default: counted from the training split)")
    # text and model
    add("--data", help="UTF-8 text, .gz or not, or .jsonl with a prompt and a completion a line (default: the Python language reference that comes with Python)")
    add("--init_from", help="gpt2, gpt2-medium, gpt2-large, gpt2-xl, distilgpt2, a folder, or scratch (default: gpt2, or tiny/ if that cannot be had)")
    add("--tokenizer", help="with --init_from scratch: the folder whose vocab.json and merges.txt to use")
    add("--n_layer", type=int, default=4, help="with --init_from scratch (default: %(default)s)")
    add("--n_head", type=int, default=4, help="with --init_from scratch (default: %(default)s)")
    add("--n_embd", type=int, default=256, help="with --init_from scratch (default: %(default)s)")
    add("--dropout", type=float, default=0.0, help="(default: %(default)s)")
    # the loop
    add("--max_iters", type=int, default=300, help="optimizer steps (default: %(default)s)")
    add("--batch_size", type=int, default=16, help="sequences in a micro-step (default: %(default)s)")
    add("--block_size", type=int, default=256, help="tokens in a sequence (default: %(default)s)")
    add("--gradient_accumulation_steps", type=int, default=1, help="micro-steps in a step, of all devices together (default: %(default)s)")
    add("--learning_rate", type=float, default=3e-4, help="its peak, reached after --warmup_iters; a cosine takes it to a tenth (default: %(default)s)")
    add("--optimizer", default="adamw", choices=["adamw", "adafactor"],
        help="adafactor: half the memory, and a --learning_rate ten times as large, as it is relative to the weights (default: %(default)s)")
    add("--warmup_iters", type=int, default=10, help="(default: %(default)s)")
    add("--weight_decay", type=float, default=0.1, help="(default: %(default)s)")
    add("--grad_clip", type=float, default=1.0, help="largest norm of the gradient; 0 for none (default: %(default)s)")
    add("--eval_interval", type=int, default=50, help="steps between evaluations and saves (default: %(default)s)")
    add("--eval_iters", type=int, default=20, help="batches of held-out text in an evaluation (default: %(default)s)")
    add("--log_interval", type=int, default=10, help="steps between log lines (default: %(default)s)")
    add("--seed", type=int, default=1337, help="(default: %(default)s)")
    # the machine
    add("--out_dir", default="out", help="(default: %(default)s)")
    add("--resume", action="store_true", help="continue the run in --out_dir, with the flags that it had")
    add("--device", default="auto", help="cuda, mps, cpu (default: the first of them that is there)")
    add("--dtype", default="auto", choices=["auto", "float32", "bfloat16"], help="of the matrix products; the weights stay float32 (default: bfloat16 where the hardware has it)")
    add("--compile", action="store_true", help="torch.compile the model")
    add("--activation_checkpointing", action="store_true", help="recompute activations in the backward pass: less memory, a tenth more time")
    args = p.parse_args()
    if args.resume:
        path = Path(args.out_dir, "resume.pt")
        if not path.exists():
            p.error(f"--resume: there is no run to continue in {args.out_dir} (no resume.pt there)")
        p.set_defaults(**load_state(path)["args"])
        args = p.parse_args()
    for name in "max_iters", "batch_size", "block_size", "gradient_accumulation_steps", "eval_interval", "eval_iters", "log_interval":
        if getattr(args, name) < 1:
            p.error(f"--{name} must be at least 1")
    for name in "alpha", "eps", "learning_rate", "weight_decay", "grad_clip", "warmup_iters", "alpha_warmup_iters":
        if not 0 <= getattr(args, name) < float("inf"):
            p.error(f"--{name} must be finite and not negative")
    if not 0 <= args.dropout < 1:
        p.error("--dropout must be at least 0 and less than 1")
    return args


def pick_dtype(name, device):
    """bfloat16 where the hardware multiplies in it; elsewhere it would only be emulated, slowly."""
    if name != "auto":
        return getattr(torch, name)
    if device.type == "cuda":
        fast = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        fast = device.type == "cpu" and (torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported())
    return torch.bfloat16 if fast else torch.float32


def allocate(lasting):
    """Tell glibc's malloc whether what is allocated from here on lasts, as weights do, or comes and goes with each step.

    What comes and goes is reused; by default large blocks go back to the system, and each step pages them in anew. What
    lasts gets a mapping of its own, so that it does not lie scattered among the rest, and the rest is given back. GPT-2
    124M, 4 x 512, on two CPU cores: 2.2 instead of 2.5 seconds a step, and 3.0 GB (3.1 if all is reused).
    """
    libc = ctypes.CDLL(None) if sys.platform == "linux" else None
    if hasattr(libc, "mallopt"):
        M_TRIM_THRESHOLD, M_MMAP_THRESHOLD, M_MMAP_MAX = -1, -3, -4
        libc.mallopt(M_TRIM_THRESHOLD, 2**31 - 1)
        libc.mallopt(M_MMAP_THRESHOLD, 2**17)
        libc.mallopt(M_MMAP_MAX, 2**16 if lasting else 0)
        if lasting:
            libc.malloc_trim(0)


# --- text ---


def load_tokens(path, tokenizer, cache):
    """The text as a flat array of tokens, memory-mapped, so that it may be larger than memory.

    It is tokenized once, into the folder cache, and found there again as long as the text file and the tokenizer are the
    same. Without a path: the reference that Python's own help() shows.
    """
    if path is None:
        from pydoc_data.topics import topics

        return np.concatenate([tokens for _, tokens in encode(["\n\n".join(topics.values())], tokenizer)])
    dtype = np.uint16 if tokenizer.n_vocab <= 2**16 else np.uint32
    stat = os.stat(path)
    identity = (os.path.realpath(path), stat.st_size, stat.st_mtime_ns, stat.st_ino, tokenizer.name, np.dtype(dtype).name)
    cached = cache / f"{Path(path).name}.{hashlib.sha256(repr(identity).encode()).hexdigest()[:16]}.bin"

    def write(part):
        with open(part, "wb") as file:
            for _, tokens in encode(read_text(path), tokenizer):
                file.write(tokens.astype(dtype).tobytes())

    if not cached.exists():
        cache.mkdir(parents=True, exist_ok=True)
        replace(cached, write)
    return np.memmap(cached, dtype, mode="r") if cached.stat().st_size else np.empty(0, dtype)


class Split:
    """Every tenth stretch of the text is held out, rather than its end: the parts of a text differ.

    A stretch is as long as four sequences (fewer in a short text), so that few sequences are lost at its borders.
    """

    def __init__(self, tokens, block_size, name):
        n, B = len(tokens), block_size
        per_stretch = min(4, max(1, n // 80 // B))
        if n < 10 * (B + 1):
            raise ValueError(f"{name} has {n:,} tokens; --block_size {B} needs at least {10 * (B + 1):,} to hold a tenth out: lower it, or give more text")
        self.tokens, self.B = tokens, B
        stretch = per_stretch * B + 1
        self.period, self.train_run = 10 * stretch, 9 * stretch
        periods, rest = divmod(n, self.period)
        self.n_train_starts = periods * (self.train_run - B) + max(0, min(rest, self.train_run) - B)
        held_out = np.arange(periods)[:, None] * self.period + self.train_run
        self.val_starts = (held_out + np.arange(per_stretch) * B).ravel()

    def train_starts(self, u):
        """The first token of training sequence number u of n_train_starts."""
        period, offset = np.divmod(u, self.train_run - self.B)
        return period * self.period + offset

    def train_counts(self, n_vocab):
        counts = np.zeros(n_vocab, np.int64)
        for start in range(0, len(self.tokens), self.period):
            counts += np.bincount(self.tokens[start : start + self.train_run], minlength=n_vocab)
        return counts

    def sequences(self, starts):
        """Inputs and targets, each (len(starts), block_size) int64."""
        rows = torch.from_numpy(self.tokens[starts[:, None] + np.arange(self.B + 1)].astype(np.int64))
        return rows[:, :-1], rows[:, 1:]

    def val_sample(self, n):
        """The first tokens of at most n held-out sequences, evenly spread."""
        return self.val_starts[np.linspace(0, len(self.val_starts) - 1, min(len(self.val_starts), n)).astype(int)]

    def openings(self, n):
        """Of up to n held-out sequences: an opening to write on from, and how the text goes on; lists of tokens."""
        rows = self.tokens[self.val_sample(n)[:, None] + np.arange(self.B + 1)].tolist()
        return [(row[: self.B // 8], row[self.B // 8 :]) for row in rows]


class Pairs(Split):
    """Prompts and completions: the prompt is the context X of Eq. 5 and carries no loss; every tenth pair is held out.

    path: a JSON object a line, {"prompt": ..., "completion": ...}. A training sequence starts where a pair does and goes
    on into the next ones, so that no context is wasted; held-out pairs are laid out so that each is scored once.
    """

    def __init__(self, path, tokenizer, block_size):
        self.B, self.eot = block_size, tokenizer.eot_token
        pairs = []
        for number, line in enumerate("".join(read_text(path)).split("\n"), 1):
            if not line.strip():
                continue
            try:
                pair = json.loads(line)
                prompt, completion = (tokenizer.encode_ordinary(pair[key]) for key in ("prompt", "completion"))
            except (ValueError, TypeError, KeyError) as error:
                error = f"{type(error).__name__} {error}"
                raise ValueError(f'{path} line {number} is not {{"prompt": "...", "completion": "..."}}: {error}') from None
            pairs.append((prompt, completion + [self.eot]))
        if len(pairs) < 10:
            raise ValueError(f"{path} has {len(pairs)} pairs; at least 10 are needed to hold a tenth out")
        training, self.held_out = [pair for i, pair in enumerate(pairs) if i % 10 != 9], pairs[9::10]
        rows, room = [], 0
        for pair in self.held_out:
            length = len(pair[0] + pair[1])
            if length > room:
                rows.append([])
                room = block_size + 1
            rows[-1].append(pair)
            room -= length

        join = lambda pairs: [token for prompt, completion in pairs for token in prompt + completion]
        mark = lambda pairs: [part for prompt, completion in pairs for part in [False] * len(prompt) + [True] * len(completion)]
        # After the training pairs, room for a sequence that starts at the last one; after a held-out row, for the rest of it.
        pad = lambda row, value: (row + [value] * (block_size + 1))[: block_size + 1]
        parts = lambda flat, value: (flat(training), pad([], value), *(pad(flat(row), value) for row in rows))
        lay = lambda flat, value: [entry for part in parts(flat, value) for entry in part]
        self.tokens, self.carries_loss = np.array(lay(join, self.eot), np.uint32), np.array(lay(mark, False))
        self.starts = np.cumsum([0] + [len(prompt + completion) for prompt, completion in training])
        self.n_train_tokens, self.n_train_starts = self.starts[-1], len(training)
        self.val_starts = self.n_train_tokens + (1 + np.arange(len(rows))) * (block_size + 1)

    def train_starts(self, u):
        return self.starts[u]

    def train_counts(self, n_vocab):
        n = self.n_train_tokens
        return np.bincount(self.tokens[:n][self.carries_loss[:n]], minlength=n_vocab)

    def sequences(self, starts):
        x, y = super().sequences(starts)
        carries = torch.from_numpy(self.carries_loss[starts[:, None] + np.arange(1, self.B + 1)])
        return x, torch.where(carries, y, -100)

    def openings(self, n):
        return [(prompt[-self.B // 2 :] or [self.eot], completion[:-1]) for prompt, completion in self.held_out[:n]]


def load_counts(path, n_vocab):
    path, scale = split_scale(path)
    try:
        counts = np.load(path, allow_pickle=False)
    except OSError as error:
        raise ValueError(f"--counts {path} cannot be read ({error.strerror}): write it with count.py") from None
    except (ValueError, EOFError):
        raise ValueError(f"--counts {path} is not an array of numbers (pickles are never loaded): write it with count.py") from None
    if not isinstance(counts, np.ndarray) or counts.ndim != 1 or counts.dtype.kind not in "iuf":
        raise ValueError(f"--counts {path} is not a 1-D array of numbers: write it with count.py")
    if len(counts) != n_vocab:
        whose = {50257: "GPT-2's tokenizer", 4096: "tiny/'s tokenizer"}.get(len(counts), "another tokenizer")
        raise ValueError(f"--counts {path} has {len(counts):,} entries, as of {whose}, but the model's has {n_vocab:,}: count again with count.py --tokenizer")
    if not (np.isfinite(counts) & (counts >= 0)).all() or not counts.any():
        raise ValueError(f"--counts {path} must hold finite numbers that are not negative, and not only zeros")
    return counts * scale


def split_scale(path):
    """"general.npy:0.1" -> ("general.npy", 0.1)"""
    name, _, scale = path.rpartition(":")
    try:
        return (path, 1) if os.path.exists(path) or not name else (name, float(scale))
    except ValueError:
        return path, 1


def frequency_bands(counts):
    """(V,) int64: 0 for the most frequent tokens, which make up half of the text; 2 for the rarest, its last tenth; 1 between."""
    order = np.argsort(-counts, kind="stable")
    before = np.cumsum(counts[order]) - counts[order]
    band = np.empty(len(counts), np.int64)
    band[order] = np.digitize(before / counts.sum(), [0.5, 0.9])
    band[counts == 0] = 2
    return torch.from_numpy(band)


BANDS = "frequent", "middle", "rare"


# --- evaluation ---


@torch.no_grad()
def evaluate(model, split, starts, batch_size, device, autocast, signals=()):
    """Of every target in the sequences at starts: its plain cross-entropy in nats, whether it was the likeliest token, itself; (N,) each.

    None if one of the signals came meanwhile.
    """
    model.eval()
    results = []
    for i in range(0, len(starts), batch_size):
        if signals:
            break
        x, y = (t.to(device) for t in split.sequences(starts[i : i + batch_size]))
        with autocast:
            hidden = model(x, return_hidden=True)[y != -100]
            for h, t in zip(hidden.split(512), y[y != -100].split(512)):  # all logits at once would not fit
                logits = F.linear(h, model.lm_head).float()
                results.append((F.cross_entropy(logits, t, reduction="none").cpu(), (logits.argmax(-1) == t).cpu(), t.cpu()))
    model.train()
    return None if signals else tuple(map(torch.cat, zip(*results)))


def summarize(ce, correct, targets, bands, weights, token_bytes, never_counted):
    """Means over held-out targets, of all and by frequency band."""
    w, uncounted = weights[targets], never_counted[targets]
    of = {name: bands[targets] == i for i, name in enumerate(BANDS)}
    mean = lambda x: {name: x[m].double().mean().item() for name, m in of.items()}
    return {
        "val_ce": ce.mean().item(),
        "val_pdl": ((w * ce).sum() / w.sum()).item(),
        "uncounted": uncounted.sum().item(),
        "uncounted_weight": (w[uncounted].sum() / w.sum()).item(),
        "bits_per_byte": (ce.sum() / token_bytes[targets].sum() / math.log(2)).item(),
        "accuracy": correct.double().mean().item(),
        "ce_by_band": mean(ce),
        "accuracy_by_band": mean(correct),
        "share_of_text": {name: m.double().mean().item() for name, m in of.items()},
    }


def table(before, after, weight_share, alpha):
    lines = [f"{'held-out targets':<18}{'share of':>9}{'share of':>10}   {'cross-entropy, nats':^27}   {'top-1 accuracy':^18}",
             f"{'':<18}{'text':>9}{'weight*':>10}   {'before':>8}{'after':>9}{'change':>10}   {'before':>9}{'after':>9}"]
    for name in (*BANDS, "all"):
        if name == "all":
            shares, (b, a), (c, d) = (1, 1), (before["val_ce"], after["val_ce"]), (before["accuracy"], after["accuracy"])
        else:
            shares = before["share_of_text"][name], weight_share[name]
            (b, a), (c, d) = ([r[key][name] for r in (before, after)] for key in ("ce_by_band", "accuracy_by_band"))
        lines.append(f"{name:<18}{shares[0]:9.1%}{shares[1]:10.1%}   {b:8.3f}{a:9.3f}{a - b:+10.3f}   {c:9.1%}{d:9.1%}")
    lines.append(f"bits per byte {before['bits_per_byte']:.3f} before, {after['bits_per_byte']:.3f} after")
    lines.append(f"* share of the loss's weights w(t) in the training text at alpha {alpha:g}; at alpha 0 it is the share of text")
    return "\n".join(lines)


# --- training ---


def learning_rate(it, args):
    if it < args.warmup_iters:
        return args.learning_rate * (it + 1) / args.warmup_iters
    progress = (it - args.warmup_iters) / max(1, args.max_iters - args.warmup_iters)
    return args.learning_rate * (0.1 + 0.45 * (1 + math.cos(math.pi * progress)))


def main():
    args = parse_args()

    # Devices. torchrun sets these; without it there is one process.
    rank, local_rank = int(os.environ.get("RANK", 0)), int(os.environ.get("LOCAL_RANK", 0))
    world_size = int(os.environ.get("WORLD_SIZE", 1))
    master = rank == 0
    say = print if master else lambda *a, **k: None
    if args.gradient_accumulation_steps % world_size:
        raise ValueError(f"--gradient_accumulation_steps {args.gradient_accumulation_steps} cannot be shared by {world_size} processes: make it a multiple")
    launcher = "python train.py" if world_size == 1 else f"torchrun --standalone --nproc_per_node={world_size} train.py"
    micro_steps = args.gradient_accumulation_steps // world_size
    device = pick_device(args.device, local_rank)
    dtype = pick_dtype(args.dtype, device)
    if world_size > 1:
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    elif device.type == "cpu":
        allocate(lasting=True)
    torch.set_float32_matmul_precision("high")
    torch.manual_seed(args.seed)
    autocast = torch.autocast(device.type, dtype) if dtype != torch.float32 else contextlib.nullcontext()

    # The model and its tokenizer.
    fallback = None
    init_from = args.init_from or "gpt2"
    if init_from == "scratch":
        if args.tokenizer is None:
            raise ValueError("--init_from scratch needs --tokenizer FOLDER (one with vocab.json and merges.txt)")
        source = Path(args.tokenizer)
    else:
        try:
            source = checkpoint_folder(init_from)
        except OSError as error:
            if args.init_from:
                raise
            source = TINY
            fallback = f"NOTE: {error}. In its place: tiny/, 4 million parameters"
            say(fallback)
    tokenizer = load_tokenizer(source)
    tokenizer_files = {file: (source / file).read_bytes() for file in ("vocab.json", "merges.txt")}
    if init_from == "scratch":
        model = GPT(GPTConfig(tokenizer.n_vocab, args.block_size, args.n_embd, args.n_layer, args.n_head))
    else:
        model = GPT.from_pretrained(source)
    if model.config.vocab_size != tokenizer.n_vocab:
        raise ValueError(f"{source}: config.json has {model.config.vocab_size:,} tokens, its tokenizer {tokenizer.n_vocab:,}")
    if args.block_size > model.config.n_positions:
        raise ValueError(f"--block_size {args.block_size} is longer than the model's context window: at most {model.config.n_positions}")
    model.set_dropout(args.dropout)
    model.activation_checkpointing = args.activation_checkpointing
    model.to(device)
    size = sum(p.numel() for p in model.parameters()) / 1e6
    say(f"{'tiny/' if fallback else init_from}: {size:.1f}M parameters on {device}, {str(dtype).removeprefix('torch.')}"
        + (f", {world_size} processes" if world_size > 1 else ""))

    # Text, counts, weights.
    name = args.data or "the Python language reference"
    out = Path(args.out_dir)
    if args.data and args.data.endswith(".jsonl"):
        split = Pairs(args.data, tokenizer, args.block_size)
    else:
        if not master:
            dist.barrier()  # the first process fills the cache
        tokens = load_tokens(args.data, tokenizer, out.parent / "token_cache")
        if master and world_size > 1:
            dist.barrier()
        split = Split(tokens, args.block_size, name)
    text_counts = split.train_counts(tokenizer.n_vocab)
    counts = sum(load_counts(path, tokenizer.n_vocab) for path in args.counts) if args.counts else text_counts
    weights = pdl_weights(counts, args.alpha, args.eps, args.normalize)
    bands = frequency_bands(counts)
    token_bytes = torch.tensor([len(tokenizer.decode_single_token_bytes(i)) for i in range(tokenizer.n_vocab)])
    say(f"{name}: {len(split.tokens):,} tokens, {len(split.val_starts) * args.block_size:,} of them held out; alpha {args.alpha:g}, eps {args.eps:g}")
    mass = text_counts * weights.double().numpy()
    weight_share = {name: mass[bands == i].sum() / mass.sum() for i, name in enumerate(BANDS)}
    share = mass[counts == 0].sum() / mass.sum()
    if share > 0:
        say(f"WARNING: {share:.1%} of the loss weight is on tokens that --counts never counted (each weighs eps^-alpha = {args.eps ** -args.alpha:,.0f}). "
            "Count the training text too, or use --eps 1.")

    # AdamW; nothing that is a bias or a gain decays.
    groups = [{"params": [p for p in model.parameters() if p.dim() >= 2], "weight_decay": args.weight_decay},
              {"params": [p for p in model.parameters() if p.dim() < 2], "weight_decay": 0.0}]
    if args.optimizer == "adamw":
        optimizer = torch.optim.AdamW(groups, lr=args.learning_rate, betas=(0.9, 0.95), fused=True)
    else:
        optimizer = torch.optim.Adafactor(groups, lr=args.learning_rate)
    trained = torch.compile(model) if args.compile else model
    if world_size > 1:
        trained = DistributedDataParallel(trained)

    start_iter, evaluated, best, before, after = 0, None, float("inf"), None, None
    if args.resume:
        state = load_state(out / "resume.pt")
        if {k: w.shape for k, w in state["model"].items()} != {k: w.shape for k, w in model.state_dict().items()}:
            raise ValueError(f"--resume: {out} holds a run of another model than {init_from}")
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        start_iter, evaluated, best, before, after = (state[name] for name in ("iter", "evaluated", "best", "before", "after"))
        say(f"resuming at step {start_iter}")
    elif master:
        if out.exists() and not out.is_dir():
            raise ValueError(f"--out_dir {out} is a file: name a folder")
        out.mkdir(parents=True, exist_ok=True)
    if master:
        path = out / "log.jsonl"
        kept = [line for line in path.open() if json.loads(line)["iter"] <= start_iter] if args.resume else []
        log_file = path.open("w")
        log_file.writelines(kept)

    def log(**entry):
        if master:
            print(json.dumps(entry), file=log_file, flush=True)

    def save_checkpoint():
        for file in "vocab.json", "merges.txt":
            replace(out / file, lambda path: path.write_bytes(tokenizer_files[file]))
        model.save_pretrained(out)

    def save_resume(it):
        state = {"args": vars(args) | {"resume": False}, "model": model.state_dict(), "optimizer": optimizer.state_dict(),
                 "iter": it, "evaluated": evaluated, "best": best, "before": before, "after": after}
        replace(out / "resume.pt", lambda path: torch.save(state, path))

    # Ctrl-C and SIGTERM are noted, and end the run where it can be continued: between two steps.
    signals = []
    handlers = {signum: signal.signal(signum, lambda signum, frame: signals.append(signum)) for signum in (signal.SIGINT, signal.SIGTERM)}

    def stop_requested():
        if world_size == 1:
            return bool(signals)
        stop = torch.tensor(len(signals), device=device)
        dist.all_reduce(stop)  # all processes stop at the same step, also if only one was told to
        return stop.item() > 0

    def check_finite(loss, it):
        if not math.isfinite(loss):
            raise ValueError(f"the loss is {loss} at step {it}; {out} keeps the last good checkpoint. Try a lower --learning_rate, or a larger --eps")

    held_out = split.val_sample(args.batch_size * args.eval_iters)
    global_batch = args.batch_size * args.gradient_accumulation_steps
    t0, t0_iter = time.time(), start_iter
    for it in range(start_iter, args.max_iters + 1):
        t_eval, result = time.time(), None
        if (it % args.eval_interval == 0 or it == args.max_iters) and it != evaluated:
            result = evaluate(model, split, held_out, args.batch_size, device, autocast, signals)
        if result:
            result, evaluated = summarize(*result, bands, weights, token_bytes, torch.from_numpy(counts == 0)), it
            say(f"step {it}: held-out cross-entropy {result['val_ce']:.4f}, PDL {result['val_pdl']:.4f}")
            if it == start_iter and result["uncounted_weight"] > 0.1:
                say(f"        ({result['uncounted_weight']:.0%} of that PDL's weight is on {result['uncounted']} held-out targets that were never counted)")
            log(iter=it, val_ce=result["val_ce"], val_pdl=result["val_pdl"])
            check_finite(result["val_ce"], it)
            before = before or result
            if result["val_ce"] < best:
                # What it starts from is saved, so that there is a checkpoint from the first moment, but is no result.
                best, after = result["val_ce"] if it else float("inf"), result | {"iter": it}
                if master:
                    save_checkpoint()
            if master:
                save_resume(it)
            t0 += time.time() - t_eval  # the log shows the speed of training
        if it == args.max_iters and evaluated == it:
            break
        if stop_requested():
            if master:
                save_resume(it)
            say(f"stopped at step {it}; to go on: {launcher} --resume" + (f" --out_dir {out}" if args.out_dir != "out" else ""))
            break

        # One global batch, drawn from the seed and the step alone: the same however it is split, and after a resume.
        draw = np.random.default_rng((args.seed, it)).integers(split.n_train_starts, size=global_batch)
        inputs, targets = split.sequences(split.train_starts(draw))
        # The denominator is that of the whole batch, so that the gradient is, too.
        if it < args.alpha_warmup_iters:
            step_weights = pdl_weights(counts, args.alpha * it / args.alpha_warmup_iters, args.eps, args.normalize)
        else:
            step_weights = weights
        denominator = token_weights(targets, step_weights).sum().item() or 1.0  # no target at all: no loss
        mine = slice(rank * micro_steps * args.batch_size, (rank + 1) * micro_steps * args.batch_size)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(it, args)
        torch.manual_seed(hash((args.seed, it, rank)))  # dropout's; it, too, follows from the step alone
        total = torch.zeros((), device=device)
        for micro_step, (x, y) in enumerate(zip(inputs[mine].split(args.batch_size), targets[mine].split(args.batch_size))):
            x, y = x.to(device, non_blocking=True), y.to(device, non_blocking=True)
            if world_size > 1:
                trained.require_backward_grad_sync = micro_step == micro_steps - 1
            with autocast:
                hidden = trained(x, return_hidden=True)
                loss = linear_pdl_loss(hidden, model.lm_head, y, step_weights, reduction="sum") / denominator
            (loss * world_size).backward()  # DDP takes the mean over the processes; the sum is wanted
            total += loss.detach()
        if args.grad_clip:
            torch.nn.utils.clip_grad_norm_(model.parameters(), args.grad_clip)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if device.type == "cpu" and it == start_iter:
            allocate(lasting=False)  # the optimizer has made its state

        if (it + 1) % args.log_interval == 0 or it + 1 == args.max_iters:
            if world_size > 1:
                dist.all_reduce(total)
            loss = total.item()
            check_finite(loss, it + 1)
            seconds = (time.time() - t0) / (it + 1 - t0_iter)
            tok_per_s = global_batch * args.block_size / seconds
            left = seconds * (args.max_iters - it - 1)
            say(f"step {it + 1}: loss {loss:.4f}, {seconds * 1000:.0f} ms, {tok_per_s:,.0f} tok/s, {int(left) // 60}:{int(left) % 60:02} left")
            log(iter=it + 1, loss=loss, lr=learning_rate(it, args), tok_per_s=tok_per_s)
            t0, t0_iter = time.time(), it + 1

    for signum, handler in handlers.items():  # all is saved: from here on, a signal just ends the process
        signal.signal(signum, handler)
    if master and evaluated == args.max_iters:
        optimizer.state.clear()  # makes room
        if device.type == "cpu":
            allocate(lasting=True)
        model.load_weights(out)
        prompts, continuations = zip(*split.openings(32))
        length = min(128, args.block_size - max(map(len, prompts)))
        with autocast:
            samples = {name: write(model, prompts, length, tokenizer.eot_token, args.seed, temperature=temperature)
                       for name, temperature in (("sampled", 1.0), ("greedy", 0.0))}
        samples["the text"] = [tokens[:length] for tokens in continuations]
        _, targets = split.sequences(held_out)
        text = {name: measure_text(rows, targets[targets != -100], bands, tokenizer.n_vocab) for name, rows in samples.items()}
        first = {"prompt": tokenizer.decode(prompts[0])} | {name: tokenizer.decode(rows[0]) for name, rows in samples.items()}
        report = {"args": vars(args), "init_from": str(source), "share_of_weight": weight_share, "before": before, "after": after,
                  "text": text, "first_sample": first}
        replace(out / "report.json", lambda path: path.write_text(json.dumps(report, indent=2) + "\n"))
        print(f"\n{table(before, after, weight_share, args.alpha)}")
        print(f"\n{f'{len(prompts)} held-out openings, continued':<34}" + "".join(f"{name:>10}" for name in text))
        for key in text["sampled"]:
            print(f"{key:<34}" + "".join(f"{measured[key]:10.4g}" for measured in text.values()))
        print(f"\nbest step {after['iter']}, saved in {out}/; now: python sample.py" + (f" --init_from {out}" if args.out_dir != "out" else ""))
        if fallback:
            print(fallback)
    if world_size > 1:
        dist.destroy_process_group()


def main_in_memory():
    """main, with the flags named that make a run smaller when memory runs out."""
    try:
        main()
    except (RuntimeError, MemoryError) as error:  # torch.OutOfMemoryError, or what CPU and mps raise in its place
        if "memory" not in str(error) and not isinstance(error, MemoryError):
            raise
        raise ValueError("out of memory: halve --batch_size and double --gradient_accumulation_steps (the same training), "
                         "add --activation_checkpointing, or lower --block_size") from None


if __name__ == "__main__":
    run(main_in_memory)
