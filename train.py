"""
Finetune GPT-2 with Power-Law Decay Loss.

    python train.py --alpha 0.5                           # on a GPU if there is one, else on the CPU
    python train.py --alpha 0.5 --data my.txt --init_from gpt2-medium --gradient_accumulation_steps 4
    torchrun --standalone --nproc_per_node=2 train.py     # the same on two devices

The best weights by held-out cross-entropy go to out/ as a Hugging Face GPT-2 folder, beside log.jsonl and report.json.
"""

import contextlib
import hashlib
import json
import math
import os
import shutil
import signal
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

TINY = Path(__file__).parent / "tiny"  # a small pretrained checkpoint, so that all of this runs offline


def parse_args():
    p = ArgumentParser(description="Finetune GPT-2 with Power-Law Decay Loss (arXiv 2505.16900).")
    add = p.add_argument
    # the loss
    add("--alpha", type=float, default=0.5, help="strength of the decay; 0 is plain cross-entropy (default: %(default)s)")
    add("--eps", type=float, default=1e-6, help="added to every count, Eq. 3 (default: %(default)s)")
    add("--normalize", action="store_true", help="probabilities instead of raw counts in Eq. 3")
    add("--counts", help="token counts from count.py (default: counted from the training split)")
    # text and model
    add("--data", help="UTF-8 text, .gz or not (default: the Python language reference that comes with Python)")
    add("--init_from", help="gpt2, gpt2-medium, gpt2-large, gpt2-xl, distilgpt2, a folder, or scratch (default: gpt2, or tiny/ if that cannot be had)")
    add("--tokenizer", help="with --init_from scratch: the folder whose vocab.json and merges.txt to use")
    add("--n_layer", type=int, default=4, help="with --init_from scratch (default: %(default)s)")
    add("--n_head", type=int, default=4, help="with --init_from scratch (default: %(default)s)")
    add("--n_embd", type=int, default=256, help="with --init_from scratch (default: %(default)s)")
    add("--dropout", type=float, default=0.0, help="(default: %(default)s)")
    # the loop
    add("--max_iters", type=int, default=200, help="optimizer steps (default: %(default)s)")
    add("--batch_size", type=int, default=16, help="sequences in a micro-step (default: %(default)s)")
    add("--block_size", type=int, default=256, help="tokens in a sequence (default: %(default)s)")
    add("--gradient_accumulation_steps", type=int, default=1, help="micro-steps in a step, of all devices together (default: %(default)s)")
    add("--learning_rate", type=float, default=3e-4, help="its peak, reached after --warmup_iters; a cosine takes it to a tenth (default: %(default)s)")
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
    add("--activation_checkpointing", action="store_true", help="recompute activations in the backward pass: less memory, a third more time")
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
    for name in "alpha", "eps", "learning_rate", "weight_decay", "grad_clip", "warmup_iters":
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
            raise ValueError(f"{name} has {n:,} tokens; --block_size {B} needs at least {10 * (B + 1):,} to hold a tenth out: lower it")
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


def load_counts(path, n_vocab):
    try:
        counts = np.load(path, allow_pickle=False)
    except (ValueError, EOFError) as error:
        raise ValueError(f"--counts {path} is not an array that count.py wrote: {error}") from None
    if not isinstance(counts, np.ndarray) or counts.ndim != 1 or counts.dtype.kind not in "iuf":
        raise ValueError(f"--counts {path} is not a 1-D array of numbers, as count.py writes")
    if len(counts) != n_vocab:
        whose = {50257: "GPT-2's tokenizer", 4096: "tiny/'s tokenizer"}.get(len(counts), "another tokenizer")
        raise ValueError(f"--counts {path} has {len(counts):,} entries, as of {whose}, but the model's has {n_vocab:,}: count again with count.py --tokenizer")
    if not (np.isfinite(counts) & (counts >= 0)).all() or not counts.any():
        raise ValueError(f"--counts {path} must hold finite numbers that are not negative, and not only zeros")
    return counts


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
def evaluate(model, split, batch_size, n_batches, device, autocast):
    """Plain cross-entropy of held-out targets, in nats: (N,), and the targets themselves, (N,)."""
    model.eval()
    starts = split.val_starts
    starts = starts[np.linspace(0, len(starts) - 1, min(len(starts), batch_size * n_batches)).astype(int)]
    losses, targets = [], []
    for i in range(0, len(starts), batch_size):
        x, y = (t.to(device) for t in split.sequences(starts[i : i + batch_size]))
        with autocast:
            hidden = model(x, return_hidden=True).flatten(0, 1)
            losses += [F.cross_entropy(F.linear(h, model.lm_head).float(), t, reduction="none").cpu()
                       for h, t in zip(hidden.split(512), y.flatten().split(512))]
        targets.append(y.flatten().cpu())
    model.train()
    return torch.cat(losses), torch.cat(targets)


def summarize(ce, targets, bands, weights, token_bytes):
    """Means of held-out cross-entropy: over all targets, by frequency band, PDL-weighted, and in bits per byte."""
    w = weights[targets]
    of = {name: bands[targets] == i for i, name in enumerate(BANDS)}
    return {
        "val_ce": ce.mean().item(),
        "val_pdl": ((w * ce).sum() / w.sum()).item(),
        "bits_per_byte": (ce.sum() / token_bytes[targets].sum() / math.log(2)).item(),
        "ce_by_band": {name: ce[m].mean().item() for name, m in of.items()},
        "share_of_text": {name: m.double().mean().item() for name, m in of.items()},
        "share_of_weight": {name: (w[m].sum() / w.sum()).item() for name, m in of.items()},
    }


def table(before, after, alpha):
    lines = ["held-out cross-entropy, nats per token", f"{'target tokens':<16}{'of the text':>12}{'of the loss*':>14}{'before':>10}{'after':>10}{'change':>10}"]
    for name in BANDS:
        b, a = before["ce_by_band"][name], after["ce_by_band"][name]
        lines.append(f"{name:<16}{before['share_of_text'][name]:12.1%}{before['share_of_weight'][name]:14.1%}{b:10.3f}{a:10.3f}{a - b:+10.3f}")
    b, a = before["val_ce"], after["val_ce"]
    lines.append(f"{'all':<16}{1:12.1%}{1:14.1%}{b:10.3f}{a:10.3f}{a - b:+10.3f}")
    lines.append(f"{'bits per byte':<42}{before['bits_per_byte']:10.3f}{after['bits_per_byte']:10.3f}{after['bits_per_byte'] - before['bits_per_byte']:+10.3f}")
    lines.append(f"* the share of the weights w(t) at alpha {alpha:g}; at alpha 0 it is the share of the text")
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
    rank, local_rank, world_size = (int(os.environ.get(name, default)) for name, default in (("RANK", 0), ("LOCAL_RANK", 0), ("WORLD_SIZE", 1)))
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
            fallback = f"NOTE: this is tiny/, a 4-million-parameter stand-in, not GPT-2: {error}"
            say(fallback)
    tokenizer = load_tokenizer(source)
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
    say(f"{init_from if not fallback else 'tiny/'}: {sum(p.numel() for p in model.parameters()) / 1e6:.1f}M parameters on {device}, {str(dtype).removeprefix('torch.')}"
        + (f", {world_size} processes" if world_size > 1 else ""))

    # Text, counts, weights.
    name = args.data or "the Python language reference"
    out = Path(args.out_dir)
    if not master:
        dist.barrier()  # the first process fills the cache
    tokens = load_tokens(args.data, tokenizer, out.parent / "token_cache")
    if master and world_size > 1:
        dist.barrier()
    split = Split(tokens, args.block_size, name)
    text_counts = split.train_counts(tokenizer.n_vocab)
    counts = load_counts(args.counts, tokenizer.n_vocab) if args.counts else text_counts
    weights = pdl_weights(counts, args.alpha, args.eps, args.normalize)
    bands = frequency_bands(counts)
    token_bytes = torch.tensor([len(tokenizer.decode_single_token_bytes(i)) for i in range(tokenizer.n_vocab)])
    say(f"{name}: {len(split.tokens):,} tokens, {len(split.val_starts) * args.block_size:,} of them held out; alpha {args.alpha:g}, eps {args.eps:g}")
    share = text_counts * weights.numpy()
    share = share[counts == 0].sum() / share.sum()
    if share > 0:
        say(f"WARNING: {share:.1%} of the loss weight is on tokens that --counts never counted (each weighs eps^-alpha = {args.eps ** -args.alpha:,.0f}). "
            "Count the training text too, or use --eps 1.")
    device_weights = weights.to(device)

    # AdamW; nothing that is a bias or a gain decays.
    groups = [{"params": [p for p in model.parameters() if p.dim() >= 2], "weight_decay": args.weight_decay},
              {"params": [p for p in model.parameters() if p.dim() < 2], "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=args.learning_rate, betas=(0.9, 0.95), fused=True)
    trained = torch.compile(model) if args.compile else model
    if world_size > 1:
        trained = DistributedDataParallel(trained)

    start_iter, best, before, after = 0, float("inf"), None, None
    if args.resume:
        state = load_state(out / "resume.pt")
        if {k: w.shape for k, w in state["model"].items()} != {k: w.shape for k, w in model.state_dict().items()}:
            raise ValueError(f"--resume: {out} holds a run of another model than {init_from}")
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        start_iter, best, before, after = state["iter"], state["best"], state["before"], state["after"]
        say(f"resuming at step {start_iter}")
    elif master:
        out.mkdir(parents=True, exist_ok=True)
        for file in "resume.pt", "pytorch_model.bin":  # of an earlier run; a folder without weights is no checkpoint
            (out / file).unlink(missing_ok=True)
        for file in "vocab.json", "merges.txt":
            replace(out / file, lambda path: shutil.copyfile(source / file, path))
    if master:
        path = out / "log.jsonl"
        kept = [line for line in path.open() if json.loads(line)["iter"] <= start_iter] if args.resume else []
        log_file = path.open("w")
        log_file.writelines(kept)

    def log(**entry):
        if master:
            print(json.dumps(entry), file=log_file, flush=True)

    def save_resume(it):
        state = {"args": vars(args) | {"resume": False}, "model": model.state_dict(), "optimizer": optimizer.state_dict(),
                 "iter": it, "best": best, "before": before, "after": after}
        replace(out / "resume.pt", lambda path: torch.save(state, path))

    # Ctrl-C and SIGTERM are noted, and end the run where it can be continued: between two steps.
    signals = []
    for signum in signal.SIGINT, signal.SIGTERM:
        signal.signal(signum, lambda signum, frame: signals.append(signum))

    def stop_requested():
        if world_size == 1:
            return bool(signals)
        stop = torch.tensor(len(signals), device=device)
        dist.all_reduce(stop)  # all processes stop at the same step, also if only one was told to
        return stop.item() > 0

    def check_finite(loss, it):
        if not math.isfinite(loss):
            raise ValueError(f"the loss is {loss} at step {it}; {out} keeps the last good checkpoint. Try a lower --learning_rate, or a larger --eps")

    global_batch = args.batch_size * args.gradient_accumulation_steps
    t0, t0_iter = time.time(), start_iter
    for it in range(start_iter, args.max_iters + 1):
        due = it % args.eval_interval == 0 or it == args.max_iters
        if due and (it > start_iter or not args.resume):
            t_eval = time.time()
            result = summarize(*evaluate(model, split, args.batch_size, args.eval_iters, device, autocast), bands, weights, token_bytes)
            say(f"step {it}: held-out cross-entropy {result['val_ce']:.4f}, PDL {result['val_pdl']:.4f}")
            log(iter=it, val_ce=result["val_ce"], val_pdl=result["val_pdl"])
            check_finite(result["val_ce"], it)
            before = before or result
            if result["val_ce"] < best:
                # What it starts from is saved, so that there is a checkpoint from the first moment, but is no result.
                best, after = result["val_ce"] if it else float("inf"), result | {"iter": it}
                if master:
                    model.save_pretrained(out)
            if master:
                save_resume(it)
            t0 += time.time() - t_eval  # the log shows the speed of training
        if it == args.max_iters:
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
        denominator = token_weights(targets, weights).sum().item()
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
                loss = linear_pdl_loss(hidden, model.lm_head, y, device_weights, reduction="sum") / denominator
            (loss * world_size).backward()  # DDP takes the mean over the processes; the sum is wanted
            total += loss.detach()
        if args.grad_clip:
            torch.nn.utils.clip_grad_norm_(model.parameters(), args.grad_clip)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

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

    if master and it == args.max_iters:
        report = {"args": vars(args), "init_from": str(source), "before": before, "after": after}
        replace(out / "report.json", lambda path: path.write_text(json.dumps(report, indent=2) + "\n"))
        print(f"\n{table(before, after, args.alpha)}")
        print(f"\nbest step {after['iter']}, saved in {out}/; now: python sample.py" + (f" --init_from {out}" if args.out_dir != "out" else ""))
        if fallback:
            print(fallback)
    if world_size > 1:
        dist.destroy_process_group()


def main_in_memory():
    """main, with the flags named that make a run smaller when memory runs out."""
    try:
        main()
    except RuntimeError as error:  # torch.OutOfMemoryError, or what CPU and mps raise in its place
        if "memory" not in str(error):
            raise
        raise ValueError("out of memory: halve --batch_size and double --gradient_accumulation_steps (the same training), "
                         "add --activation_checkpointing, or lower --block_size") from None


if __name__ == "__main__":
    run(main_in_memory)
