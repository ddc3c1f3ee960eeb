"""
Finetune GPT-2 with Power-Law Decay Loss.

    python train.py --alpha 0.5                           # on a GPU if there is one, else on the CPU
    python train.py --alpha 0 0.25 0.5 --data my.txt      # one run for each alpha, then one table
    torchrun --standalone --nproc_per_node=2 train.py     # the same batches, on two devices

The best model goes to out/, or with several alphas to out/alpha-0.5/ and so on: a checkpoint folder, for
sample.py and for Transformers. Start reading at finetune(), the story of a run. Its helpers follow.
The loss comes from pdl.py, the network from model.py, the batches from count.py.
"""

import argparse
import json
import math
import os
import shlex
import shutil
import time
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F

from count import BANDS, ArgumentParser, at_least, load_corpus, load_tokenizer, run_script
from model import GPT, RELEASED, TOKENIZER_FILES, checkpoint_folder, first_line, read_weights
from model import pick_device, pick_dtype, write_json, write_safely
from pdl import linear_pdl_loss, pdl_weights, token_weights
from sample import continue_prompt, shift

TINY = Path(__file__).parent / "tiny"  # a small pretrained model, so that all of this runs offline
# torchrun starts several processes. They share the work, and rank 0 alone prints and writes files.
RANK, LOCAL_RANK = int(os.environ.get("RANK", 0)), int(os.environ.get("LOCAL_RANK", 0))
WORLD_SIZE = int(os.environ.get("WORLD_SIZE", 1))


def main():
    args = parse_args()
    device = pick_device(args.device, LOCAL_RANK)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if WORLD_SIZE > 1:
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    torch.set_float32_matmul_precision("high")  # TF32 on a GPU
    note = choose_model(args, device)
    say(note)
    tokenizer = load_tokenizer(args.init_from)
    corpus = load_corpus(args.data, tokenizer, args.block_size, args.counts)
    for alpha in args.alpha:
        pdl_weights(corpus.freq, alpha, args.eps)  # an impossible alpha fails now, not hours later
    reports = []
    try:
        for alpha in args.alpha:
            folder = Path(args.out_dir, f"alpha-{alpha:g}" if len(args.alpha) > 1 else "")
            reports.append(finetune(args, alpha, folder, device, tokenizer, corpus))
            say(table_of_run(reports[-1]))
    except KeyboardInterrupt:
        if Path(args.out_dir, "args.json").exists():
            say(f"\nstopped. To go on: python train.py --resume --out_dir {shlex.quote(args.out_dir)}")
        raise
    if len(reports) > 1:
        say(table_of_series(reports))
    say(f"now: python sample.py --init_from {shlex.quote(str(folder))}")
    say(note)  # again, where it is seen
    if WORLD_SIZE > 1:
        dist.destroy_process_group()


def finetune(args, alpha, folder, device, tokenizer, corpus):
    """One run, from the pretrained model or its last save. Returns its report."""
    model = load_model(args, tokenizer, device)
    optimizer = make_optimizer(args, model)
    final_weights = step_weights(args.max_iters, alpha, args, corpus, model)  # (V,), at the full alpha
    start, before, best = 0, None, None  # before and best: evaluate()'s results at step 0 and the best step
    if args.resume and (folder / "resume.pt").exists():
        start, before, best = resume(folder, args, model, optimizer, corpus.digest)
    elif RANK == 0:
        claim(folder, args, alpha, corpus)
    introduce(args, alpha, folder, device, model, corpus, start)
    forward = torch.compile(model) if args.compile else model
    step = start

    while True:
        # Save first: a resumed run begins with this evaluation, so it finds the same best model.
        if step % args.eval_interval == 0 or step in (start, args.max_iters):
            save(folder, model, optimizer, step=step, before=before, best=best, digest=corpus.digest)
            result = {"iter": step} | evaluate(args, model, corpus, final_weights, device)
            say(f"step {step}: held-out cross-entropy {result['val_ce']:.4f}, PDL {result['val_pdl']:.4f}")
            log(folder, iter=step, val_ce=result["val_ce"], val_pdl=result["val_pdl"])  # raises if NaN
            before = before or result
            if best is None or result["val_pdl"] < best["val_pdl"]:
                best = result
                if RANK == 0:
                    model.save_pretrained(folder)
            last_log = time.time(), step  # log_step measures from here
        if step == args.max_iters:
            break

        # Every rank draws the same whole batch from the seed and the step, and trains on its share of it.
        n = args.batch_size * args.gradient_accumulation_steps
        drawn = np.random.default_rng((args.seed, step)).integers(len(corpus.training), size=n)
        batch = torch.from_numpy(corpus.training[drawn])  # (2, n, T): inputs and targets
        weights = step_weights(step, alpha, args, corpus, model)  # (V,)
        weight_sum = token_weights(batch[1], weights).sum().item()  # of the whole batch, not of its parts
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, args)
        torch.manual_seed(hash((args.seed, step, RANK)))  # for dropout: the same again after a resume
        loss = torch.zeros((), device=device)
        share = batch.tensor_split(WORLD_SIZE, dim=1)[RANK]  # (2, n / WORLD_SIZE, T)
        for micro_batch in share.split(args.batch_size, dim=1):
            x, y = micro_batch.to(device)  # (b, T) each
            with autocast(args, device):
                hidden = forward(x, return_hidden=True)  # (b, T, n_embd)
                # Eq. 5, divided by the sum of the weights.
                micro_loss = linear_pdl_loss(hidden, model.lm_head, y, weights, "sum") / weight_sum
            micro_loss.backward()
            loss += micro_loss.detach()
        for p in model.parameters():
            all_sum(p.grad)  # the loss is the sum of the parts' losses, and so is the gradient
        if args.grad_clip:
            torch.nn.utils.clip_grad_norm_(model.parameters(), args.grad_clip)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        step += 1
        if step % args.log_interval == 0 or step in (1, args.max_iters):
            last_log = log_step(args, folder, step, all_sum(loss).item(), last_log)

    # With the best model: write a sample. At alpha 0, also try each other alpha as a shift of the logits.
    if WORLD_SIZE > 1:
        dist.barrier()  # until rank 0 has saved it
    model.load_state_dict(read_weights(folder, model))
    shifted = {f"{a:g}": evaluate(args, model, corpus, final_weights, device, shift(corpus.freq, a))
               for a in args.alpha if alpha == 0 and a > 0}
    report = {"alpha": alpha, "args": flags_of(args), "before": before, "after": best, "shifted": shifted,
              "sample": sample_text(args, model, tokenizer, corpus)}
    if RANK == 0:
        write_json(folder / "report.json", report)
    return report


# --- setting up ---


def choose_model(args, device):
    """Settle --init_from and --dtype. Returns a note if tiny/ is taken. Rank 0 decides, so that all agree."""
    name, note, dtype = args.init_from or "gpt2", None, None
    if RANK == 0:
        dtype = str(pick_dtype(args.dtype, device)).removeprefix("torch.")
        try:
            checkpoint_folder(name)  # which may download it
        except OSError as error:
            if args.init_from:
                raise
            name = str(TINY)
            note = f"NOTE: {error}; tiny/ (4M parameters) takes its place"
    choice = [name, note, dtype]
    if WORLD_SIZE > 1:
        dist.broadcast_object_list(choice)
    args.init_from, note, args.dtype = choice
    return note


def load_model(args, tokenizer, device):
    model = GPT.from_pretrained(args.init_from)
    V, window = model.config.vocab_size, model.config.n_positions
    if V < tokenizer.n_vocab:
        raise ValueError(f"{args.init_from} has {V} tokens, but its tokenizer {tokenizer.n_vocab}")
    if args.block_size > window:
        raise ValueError(f"--block_size {args.block_size} is beyond the model's context window of {window}")
    model.config.eos_token_id = tokenizer.eot_token  # where generate of Transformers will stop
    if model.generation_config:
        model.generation_config["eos_token_id"] = tokenizer.eot_token
    model.set_dropout(args.dropout)
    recompute = args.activation_checkpointing
    model.activation_checkpointing = (device.type == "cpu") if recompute is None else recompute
    return model.to(device)


def make_optimizer(args, model):
    if args.learning_rate is None:
        args.learning_rate = 3e-3 if sum(p.numel() for p in model.parameters()) < 1e7 else 3e-4
    matrices = [p for p in model.parameters() if p.dim() >= 2]
    others = [p for p in model.parameters() if p.dim() < 2]  # biases and LayerNorms have no weight decay
    groups = [{"params": matrices, "weight_decay": args.weight_decay},
              {"params": others, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=args.learning_rate, betas=(0.9, 0.95), fused=True)


def step_weights(step, alpha, args, corpus, model):
    """The weight of each token at a step: (V,). To try another weighting, change this function."""
    if args.rising:
        alpha *= step / args.max_iters
    weights = pdl_weights(corpus.freq, alpha, args.eps)
    # The model may have more rows than the tokenizer has tokens. They are never targets.
    return F.pad(weights, (0, model.config.vocab_size - len(weights)))


def learning_rate(step, args):
    """Rises linearly over warmup_iters, then falls to a tenth along a cosine."""
    if step < args.warmup_iters:
        return args.learning_rate * (step + 1) / args.warmup_iters
    progress = (step - args.warmup_iters) / max(1, args.max_iters - args.warmup_iters)
    return args.learning_rate * (0.1 + 0.45 * (1 + math.cos(math.pi * progress)))


def autocast(args, device):
    return torch.autocast(device.type, getattr(torch, args.dtype), enabled=args.dtype != "float32")


def all_sum(tensor):
    """Sum a tensor over all ranks, in place."""
    if WORLD_SIZE > 1:
        dist.all_reduce(tensor)
    return tensor


# --- evaluation ---


@torch.no_grad()
def evaluate(args, model, corpus, weights, device, logit_bias=None):
    """How well held-out text is predicted, in all and by the frequency band of the target.

    val_ce is plain cross-entropy in nats. val_pdl is Eq. 5, divided by the sum of the weights. A band without
    targets is left out.
    """
    n_rows = args.eval_iters * args.batch_size * args.gradient_accumulation_steps
    rows = np.unique(np.linspace(0, len(corpus.held_out) - 1, n_rows).astype(int))
    parts = []
    model.eval()
    for i in range(0, len(rows), args.batch_size):
        x, y = torch.from_numpy(corpus.held_out[rows[i : i + args.batch_size]])  # (b, T) each
        keep = y != -100
        with autocast(args, device):
            hidden = model(x.to(device), return_hidden=True)[keep.to(device)]  # (targets, n_embd)
            for h, t in zip(hidden.split(512), y[keep].split(512)):  # all logits would be large
                logits = F.linear(h, model.lm_head).float()  # (512, V)
                if logit_bias is not None:
                    logits[:, : len(logit_bias)] += logit_bias.to(device)
                ce = F.cross_entropy(logits, t.to(device), reduction="none").cpu().double()
                parts.append((t, ce, (logits.argmax(-1).cpu() == t).double()))
    model.train()
    t, ce, right = map(torch.cat, zip(*parts))  # (N,) each, of all targets
    w, band = weights[t].double(), torch.from_numpy(corpus.bands)[t]  # (N,) each
    masks = {name: band == i for i, name in enumerate(BANDS) if i in band} | {"all": band >= 0}  # (N,) each

    def by_band(measure):
        return {name: measure(mask).item() for name, mask in masks.items()}

    return {"val_ce": ce.mean().item(), "val_pdl": ((w * ce).sum() / w.sum()).item(),
            "ce_by_band": by_band(lambda mask: ce[mask].mean()),
            "accuracy_by_band": by_band(lambda mask: right[mask].mean()),
            "share_of_text": by_band(lambda mask: mask.double().mean()),
            "share_of_weight": by_band(lambda mask: w[mask].sum() / w.sum())}


def sample_text(args, model, tokenizer, corpus):
    """A held-out prompt, what the model writes after it, and what the author wrote."""
    prompt, author = corpus.example
    length = min(100, model.config.n_positions - len(prompt))
    torch.manual_seed(args.seed)
    with autocast(args, model.lm_head.device):
        (written,) = continue_prompt(model, tokenizer, prompt, length, temperature=0.7)
    texts = {"prompt": prompt, "model": written, "author": author[:length]}
    return {name: tokenizer.decode(tokens) for name, tokens in texts.items()}


# --- what a run says ---


def say(text):
    if text and RANK == 0:
        print(text, flush=True)


def introduce(args, alpha, folder, device, model, corpus, start):
    size = sum(p.numel() for p in model.parameters()) / 1e6
    ranks = f", {WORLD_SIZE} processes" if WORLD_SIZE > 1 else ""
    n = args.batch_size * args.gradient_accumulation_steps
    say(f"model: {Path(args.init_from).name}, {size:.1f}M parameters, {device.type}, {args.dtype}{ranks}\n"
        f"data:  {corpus.description}\n"
        f"loss:  PDL, alpha {'rising from 0 to ' if args.rising else ''}{alpha:g}, eps {args.eps:g}\n"
        f"run:   {args.max_iters} steps of {n} x {args.block_size} tokens, learning rate "
        f"{args.learning_rate:g}, into {folder}/")
    if start > 0:
        say(f"resuming at step {start}")


def log_step(args, folder, step, loss, last_log):
    """Show and log the loss, and the speed since the last line."""
    last_time, last_step = last_log
    seconds = (time.time() - last_time) / (step - last_step)
    speed = args.batch_size * args.gradient_accumulation_steps * args.block_size / seconds
    left = int(seconds * (args.max_iters - step))
    say(f"step {step}: loss {loss:.4f}, {seconds * 1000:.0f} ms, {speed:,.0f} tok/s, "
        f"{left // 60}:{left % 60:02} left")
    log(folder, iter=step, loss=loss, lr=learning_rate(step - 1, args), tok_per_s=speed)
    return time.time(), step


def log(folder, **entry):
    """Add a line to log.jsonl. Raises ValueError if a number is NaN or infinite."""
    if not all(map(math.isfinite, entry.values())):
        raise ValueError(f"the loss became NaN at step {entry['iter']}; {folder} keeps the best model. "
                         "Start again with a lower --learning_rate and another --out_dir")
    if RANK == 0:
        with open(folder / "log.jsonl", "a", encoding="utf-8") as file:
            file.write(json.dumps(entry) + "\n")


def table_of_run(report):
    """What finetuning did to the prediction of held-out text, and a sample."""
    before, after = report["before"], report["after"]
    lines = ["", "held-out targets   share of  share of       cross-entropy, nats         top-1 accuracy",
             "                       text    weight     before    after    change      before    after"]
    for band, ce in before["ce_by_band"].items():
        text, weight = before["share_of_text"][band], before["share_of_weight"][band]
        ce_after = after["ce_by_band"][band]
        right, right_after = before["accuracy_by_band"][band], after["accuracy_by_band"][band]
        lines.append(f"{band:18}{text:9.1%}{weight:10.1%}   {ce:8.3f}{ce_after:9.3f}{ce_after - ce:+10.3f}"
                     f"   {right:9.1%}{right_after:9.1%}")
    lines.append(f"This is the model of step {after['iter']}, the best by held-out PDL.")
    sample = report["sample"]
    lines += ["", "--- a held-out prompt ---", sample["prompt"], "--- the model goes on ---", sample["model"],
              "--- the author went on ---", sample["author"], "---"]
    return "\n".join(lines)


def table_of_series(reports):
    """The runs side by side. "0, shift x" is the model of alpha 0 with -x * log(freq) added to its logits."""
    rows = {"before": reports[0]["before"]}
    for report in reports:
        rows[f"{report['alpha']:g}"] = report["after"]
        rows |= {f"0, shift {x}": result for x, result in report["shifted"].items()}
    lines = ["                    held-out cross-entropy, nats          top-1 accuracy",
             "alpha               all  frequent    middle      rare         all      rare"]
    for name, result in rows.items():
        ce = [result["ce_by_band"].get(band, math.nan) for band in ("all", *BANDS)]
        accuracy = [result["accuracy_by_band"].get(band, math.nan) for band in ("all", "rare")]
        lines.append(f"{name:13}" + "".join(f"{x:10.3f}" for x in ce) + "  "
                     + "".join(f"{x:10.1%}" for x in accuracy))
    return "\n".join(lines)


# --- saving and resuming ---

NOT_EMPTY = "{} is not an empty folder: --resume its run, or name another --out_dir"


def claim(folder, args, alpha, corpus):
    """Create the folder of a run. A new command creates args.json before all else."""
    flags = Path(args.out_dir, "args.json")
    flags.parent.mkdir(parents=True, exist_ok=True)
    if alpha == args.alpha[0] and not args.resume:
        try:
            flags.touch(exist_ok=False)  # of two commands at once, one fails
        except FileExistsError:
            raise ValueError(NOT_EMPTY.format(args.out_dir)) from None
    if (folder / "model.safetensors").exists():
        raise ValueError(f"{folder} has a model, but no resume.pt to go on from: name another --out_dir")
    write_json(flags, flags_of(args))
    folder.mkdir(exist_ok=True)
    (folder / "log.jsonl").write_bytes(b"")
    source = checkpoint_folder(args.init_from, weights=False)
    for name in TOKENIZER_FILES:
        if (source / name).exists():
            shutil.copyfile(source / name, folder / name)
    np.save(folder / "counts.npy", corpus.freq)


def save(folder, model, optimizer, **state):
    """Write resume.pt."""
    if RANK == 0:
        state |= {"model": model.state_dict(), "optimizer": optimizer.state_dict(),
                  "log_bytes": (folder / "log.jsonl").stat().st_size}
        write_safely(folder / "resume.pt", lambda path: torch.save(state, path))


def resume(folder, args, model, optimizer, digest):
    """Load resume.pt. Returns its step, and the evaluations before training and of the best model so far."""
    try:
        state = dict(torch.load(folder / "resume.pt", map_location="cpu", weights_only=True))
    except Exception as error:
        raise ValueError(f"{folder}/resume.pt is damaged: {first_line(error)}") from None
    if state["digest"] != digest:
        raise ValueError(f"--resume: the data or the counts are not those that the run in {folder} had")
    step, before, best = state["step"], state["before"], state["best"]
    if step > args.max_iters:
        raise ValueError(f"--max_iters {args.max_iters}: {folder} is at step {step} already")
    model.load_state_dict(state["model"])
    optimizer.load_state_dict(state["optimizer"])
    if RANK == 0:
        os.truncate(folder / "log.jsonl", state["log_bytes"])  # what came after the save is done again
        write_json(Path(args.out_dir, "args.json"), flags_of(args))
    return step, before, best


def flags_of(args):
    """The flags that args.json keeps: all but --out_dir and --resume."""
    return {name: value for name, value in vars(args).items() if name not in ("out_dir", "resume")}


# --- flags ---


def make_parser():
    p = ArgumentParser(description="Finetune GPT-2 with Power-Law Decay Loss (arXiv 2505.16900).")
    positive, not_negative = at_least(1), at_least(0, float)
    p.flag("alpha", [0.5], "strength of the decay; 0: cross-entropy; several: one run each", not_negative,
           nargs="+")
    p.add_argument("--rising", action="store_true", help="let alpha rise from 0 to its value over the run")
    p.flag("eps", 1.0, "added to every count (Eq. 3)", not_negative)
    p.flag("counts", None, "token counts from count.py, added up, each times its SCALE (default: of the "
           "training text)", os.path.abspath, nargs="+", action="extend", metavar="FILE.npy[:SCALE]")
    p.flag("data", None, "UTF-8 text, or JSON Lines with pairs or documents; - is standard input (default: "
           "Python's language reference)", absolute, nargs="+", action="extend", metavar="FILE")
    p.flag("init_from", None, "a released GPT-2, OWNER/NAME on the hub, or a checkpoint folder (default: "
           "gpt2, or tiny/ if that cannot be had)", absolute)
    p.flag("out_dir", "out", "a new folder for the run")
    p.add_argument("--resume", action="store_true", help="go on with the run in --out_dir, with its flags")
    p.flag("max_iters", 300, "optimizer steps; a --resume may raise it", positive)
    p.flag("batch_size", 16, "sequences per micro-step", positive)
    p.flag("block_size", 256, "tokens in a sequence", at_least(8))
    p.flag("gradient_accumulation_steps", 1, "a step has this many times --batch_size sequences", positive)
    p.flag("learning_rate", None, "at its peak (default: 3e-4, below 10M parameters 3e-3)", not_negative)
    p.flag("warmup_iters", 10, "steps over which the learning rate rises", at_least(0))
    p.flag("weight_decay", 0.1, "weight decay of matrices", not_negative)
    p.flag("grad_clip", 1.0, "limit of the gradient's norm; 0: none", not_negative)
    p.flag("dropout", 0.0, "dropout probability", at_least(0, float, below=1))
    p.flag("eval_interval", 50, "steps between evaluations; each saves the run", positive)
    p.flag("eval_iters", 20, "batches of held-out text in an evaluation", positive)
    p.flag("log_interval", 10, "steps between lines of the log", positive)
    p.flag("seed", 1337, "random seed of batches, dropout and the sample", at_least(0, below=2**63))
    p.flag("device", "auto", "cuda, mps or cpu")
    p.flag("dtype", "auto", "dtype of matrix products", choices=["auto", "float32", "bfloat16"])
    p.add_argument("--compile", action="store_true", help="torch.compile the model")
    p.add_argument("--activation_checkpointing", action=argparse.BooleanOptionalAction,
                   help="compute the MLPs again in the backward pass, to save memory (default: on a CPU)")
    return p


def absolute(path):
    """A path becomes absolute, since --resume may come from another directory. A model's name stays."""
    return os.path.abspath(path) if os.path.exists(path) and path not in RELEASED else path


def parse_args():
    p = make_parser()
    args = p.parse_args()
    out = Path(args.out_dir)
    if args.resume:
        try:
            saved = json.loads((out / "args.json").read_bytes())
        except (OSError, ValueError):
            p.error(f"--resume: {out} has no run, or its args.json is damaged")
        p.set_defaults(**dict.fromkeys(saved))  # parse again: now None means not given
        given = {name: value for name, value in vars(p.parse_args()).items() if value is not None}
        for name in (saved.keys() & given.keys()) - {"max_iters"}:
            if given[name] != saved[name]:
                p.error(f"--resume: --{name} was {saved[name]}, not {given[name]}: name another --out_dir")
        args = argparse.Namespace(**saved | given)
    elif out.exists() and any(out.iterdir()):
        raise ValueError(NOT_EMPTY.format(out))
    if len({f"{alpha:g}" for alpha in args.alpha}) < len(args.alpha):  # folders are named by alpha
        p.error("--alpha has a value twice")
    if args.batch_size * args.gradient_accumulation_steps < WORLD_SIZE:
        p.error("--batch_size is too small: each process needs a sequence of every batch")
    if WORLD_SIZE > 1 and "-" in (args.data or []):
        p.error("--data -: several processes cannot share standard input")
    return args


if __name__ == "__main__":
    run_script(main, "halve --batch_size and double --gradient_accumulation_steps, which is the same "
               "training, or lower --block_size")
