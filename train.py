"""
Finetune GPT-2 with Power-Law Decay Loss.

    python train.py --alpha 0.5                           # on a GPU if there is one, else on the CPU
    python train.py --alpha 0 0.25 0.5 --data my.txt      # a run each, and a table that says which to take
    torchrun --standalone --nproc_per_node=2 train.py     # the same batches, on two devices

The best weights by held-out cross-entropy go to out/, a Hugging Face folder, with log.jsonl and report.json.
Batches and counts come from count.py, the loss from pdl.py, the model from model.py; sample.py judges it.
"""

import argparse
import contextlib
import hashlib
import json
import math
import os
import re
import sys
import time
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

import count
import sample
from count import at_least
from model import GPT, GPTConfig, Machine, checkpoint_folder, load_state, replace
from pdl import linear_pdl_loss, pdl_weights, token_weights

TINY = Path(__file__).parent / "tiny"  # a small pretrained checkpoint, so that all of this runs offline


# --- a run in outline ---


def main():
    args = parse_args()
    machine = Machine(args)
    out, series = Path(args.out_dir), len(args.alpha) > 1
    folders = [out / f"alpha-{alpha:g}" if series else out for alpha in args.alpha]
    locked = []  # for as long as this process lives
    machine.once(lambda: locked.append(claim(out, args.resume)))
    source, note = None, None
    if not all(is_run(folder) for folder in folders):
        source, note = machine.once(lambda: find_model(args))
        machine.say(note)
        # For --resume: what is left of a series starts from the same.
        args.init_from = args.init_from or (str(TINY) if note else "gpt2")
    reports, flags = [], "" if out == Path("out") else f" --init_from {out}"
    for alpha, folder in zip(args.alpha, folders):
        report = finetune(args, alpha, folder, source, machine)
        if report is None:
            break
        reports.append(report)
        if machine.rank == 0:
            print("", sample.table_of_run(report), "", sample.in_words(report), sep="\n")
            print(sample.which_weights(report, folder) + "\n")
    else:
        if series and machine.rank == 0:
            alpha, shift, why = sample.what_to_take(reports)
            print(sample.table_of_series(reports), why + "\n", sep="\n")
            folder = out / f"alpha-{alpha}"
            flags = f" --init_from {folder}"
            flags += f" --counts {folder / 'counts.npy'} --shift {shift}" if shift else ""
        machine.say(f"now: python sample.py{flags}")
        machine.say(note and "NOTE: this was tiny/, not gpt2")
    if machine.world_size > 1:
        dist.destroy_process_group()
    if report is None:
        raise KeyboardInterrupt  # so that nothing that waits for the run takes it for finished


def finetune(args, alpha, folder, source, machine):
    """One run, from the weights in source, or from where it was stopped, to its report, or None."""
    resuming = is_run(folder)
    torch.manual_seed(args.seed)
    model, tokenizer = load_model(args, folder if resuming else source, machine)
    cache = Path(args.out_dir).parent / "token_cache"
    corpus = machine.first(lambda: count.open_corpus(args.data, tokenizer, args.block_size, cache,
                                                     count.show_speed()))
    own = corpus.train_counts(tokenizer.n_vocab)
    counts = find_counts(args, own, tokenizer, machine)
    if args.learning_rate is None:
        args.learning_rate = 3e-3 if sum(p.numel() for p in model.parameters()) < 1e7 else 3e-4
    optimizer = make_optimizer(args, model)
    run = Run(args, alpha, folder, machine, model, optimizer, tokenizer, corpus, counts, own)
    if resuming:
        run.resume()
        if run.step >= args.max_iters and (folder / "report.json").exists():
            machine.say(f"nothing left to do in {folder}/ after step {run.step}; for more: --max_iters N")
            return json.loads((folder / "report.json").read_bytes())
        if run.step > args.max_iters:
            raise ValueError(f"--max_iters {args.max_iters}: {folder}/ is at step {run.step} already")
    else:
        run.start(source)
    with machine.noting_signals():
        if run.evaluated < run.step and run.step in (0, args.max_iters):
            run.evaluate()
        train(args, alpha, machine, model, optimizer, corpus, counts, run)
    if run.step < args.max_iters:
        run.save()
    else:
        with contextlib.suppress(KeyboardInterrupt):
            return run.report()
    processes = f"torchrun --standalone --nproc_per_node={machine.world_size}"
    command = f"{processes if machine.world_size > 1 else 'python'} train.py --resume"
    machine.say(f"stopped at step {run.step}; {folder}/ has the weights of step {run.after['iter']}; "
                f"to go on: {command}" + ("" if args.out_dir == "out" else f" --out_dir {args.out_dir}"))


# --- setting up ---


def find_model(args):
    """The folder to start from, and a note if it is not the one that was meant."""
    if args.init_from == "scratch":
        return count.tokenizer_folder(args.tokenizer), None
    try:
        return checkpoint_folder(args.init_from or "gpt2"), None
    except OSError as error:
        if args.init_from:
            raise
        why = str(error).partition(": connect")[0]
        return TINY, f"NOTE: {why}; tiny/, 4 million parameters, takes its place"


def load_model(args, folder, machine):
    """The model, on its device, and its tokenizer."""
    tokenizer = count.load_tokenizer(folder)
    if args.init_from == "scratch" and not is_run(folder):
        model = GPT(GPTConfig(tokenizer.n_vocab, args.block_size, args.n_embd, args.n_layer, args.n_head,
                              eos_token_id=tokenizer.eot_token))
    else:
        model = GPT.from_pretrained(folder)
    vocab_size, window = model.config.vocab_size, model.config.n_positions
    if vocab_size != tokenizer.n_vocab:
        raise ValueError(f"{folder}: config.json says {vocab_size:,} tokens, its tokenizer has "
                         f"{tokenizer.n_vocab:,}: they must be of one model")
    if args.block_size > window:
        raise ValueError(f"--block_size {args.block_size} is beyond the model's context window of {window}")
    model.set_dropout(args.dropout)
    recompute = args.activation_checkpointing
    model.activation_checkpointing = machine.device.type == "cpu" if recompute is None else recompute
    return model.to(machine.device), tokenizer


def find_counts(args, own, tokenizer, machine):
    """freq(t) of Eq. 3, (V,): of --counts, else own, those of the training split."""
    if not args.counts:
        return own
    counts, eot = count.load_counts(args.counts, tokenizer.n_vocab), tokenizer.eot_token
    if counts[eot] == 0 < own[eot]:  # plain text has none, but every completion ends with one
        counts[eot] = own[eot]
        machine.say(f"--counts has no {count.END_OF_TEXT}: taken as often as in the data, {own[eot]:,} times")
    return counts


def make_optimizer(args, model):
    matrices = [p for p in model.parameters() if p.dim() >= 2]
    biases_and_gains = [p for p in model.parameters() if p.dim() < 2]
    groups = [{"params": matrices, "weight_decay": args.weight_decay},
              {"params": biases_and_gains, "weight_decay": 0.0}]
    if args.optimizer == "adafactor":
        return torch.optim.Adafactor(groups, lr=args.learning_rate)
    return torch.optim.AdamW(groups, lr=args.learning_rate, betas=(0.9, 0.95), fused=True)


# --- the loop ---


def train(args, alpha, machine, model, optimizer, corpus, counts, run):
    """Train from run.step to args.max_iters, or until a signal comes."""
    trained = torch.compile(model) if args.compile else model
    if machine.world_size > 1:
        trained = DistributedDataParallel(trained)
    model.train()
    while run.step < args.max_iters and not machine.stop_requested():
        # A global batch, drawn from seed and step alone: the same however it is split, and after a resume.
        rng = np.random.default_rng((args.seed, run.step))
        x, y = map(torch.from_numpy, corpus.batch(rng, args.batch_size * args.gradient_accumulation_steps))
        weights = step_weights(run.step, alpha, counts, args)
        # Each part of the batch is divided by the weight of the whole: a mean of means is another loss.
        denominator = token_weights(y, weights).sum().item() or 1.0  # no target at all: no loss

        for group in optimizer.param_groups:
            group["lr"] = learning_rate(run.step, args)
        torch.manual_seed(hash((args.seed, run.step, machine.rank)))  # dropout's
        loss = torch.zeros((), device=machine.device)
        micro_x, micro_y = (machine.share(rows).split(args.batch_size) for rows in (x, y))
        for i, (x, y) in enumerate(zip(micro_x, micro_y), 1):
            if machine.world_size > 1:
                trained.require_backward_grad_sync = i == len(micro_x)
            x, y = x.to(machine.device, non_blocking=True), y.to(machine.device, non_blocking=True)
            with machine.autocast():
                hidden = trained(x, return_hidden=True)
                part = linear_pdl_loss(hidden, model.lm_head, y, weights, reduction="sum")  # Eq. 5
            # DistributedDataParallel takes the mean over the processes; the sum is wanted.
            (part / denominator * machine.world_size).backward()
            loss += part.detach() / denominator
        if args.grad_clip:
            torch.nn.utils.clip_grad_norm_(model.parameters(), args.grad_clip)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

        run.step += 1
        run.log(loss)
        if run.step % args.eval_interval == 0 or run.step == args.max_iters:
            run.evaluate()


def step_weights(step, alpha, counts, args):
    """w(t) of Eq. 3 at a step, (V,): the place for another weighting."""
    if step < args.alpha_warmup_iters:
        alpha *= step / args.alpha_warmup_iters
    return pdl_weights(counts, alpha, args.eps, args.normalize)


def learning_rate(step, args):
    if step < args.warmup_iters:
        return args.learning_rate * (step + 1) / args.warmup_iters
    progress = (step - args.warmup_iters) / max(1, args.max_iters - args.warmup_iters)
    return args.learning_rate * (0.1 + 0.45 * (1 + math.cos(math.pi * progress)))


# --- what a run says and leaves in its folder ---


def is_run(folder):
    return (folder / "resume.pt").exists()


def claim(folder, resume):
    """Keep a second process out of the folder for as long as this one lives, however it ends: an open file.

    Raises ValueError for a folder that is in use or, unless a run is to be resumed, holds a run or a model.
    """
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"--out_dir {folder} is a file: name a folder")
    folder.mkdir(parents=True, exist_ok=True)
    for path in (folder, *folder.glob("alpha-*")):
        model = (path / "config.json").exists() and not (path / "args.json").exists()
        if (is_run(path) or model) and not resume:
            raise ValueError(f"{path}/ holds a run or a model: --resume it, or name another --out_dir")
    file = open(folder / ".lock", "w", encoding="utf-8")
    try:
        if sys.platform == "win32":
            import msvcrt

            msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
        else:
            import fcntl

            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        raise ValueError(f"{folder}/ is in use by another train.py: name another --out_dir") from None
    return file


def write_json(path, content):
    replace(path, lambda part: part.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8"))


class Run:
    """A run and its folder: what it logs, its best weights, and resume.pt, from which it goes on."""

    def __init__(self, args, alpha, folder, machine, model, optimizer, tokenizer, corpus, counts, own):
        self.args, self.alpha, self.folder, self.machine = args, alpha, folder, machine
        self.model, self.optimizer, self.tokenizer = model, optimizer, tokenizer
        self.corpus, self.counts, self.own = corpus, counts, own  # own: counts of the training split
        self.bands = count.frequency_bands(counts)
        self.weights = pdl_weights(counts, alpha, args.eps, args.normalize)
        self.global_batch = args.batch_size * args.gradient_accumulation_steps
        self.windows = corpus.held_out(self.global_batch * args.eval_iters)
        self.step, self.evaluated, self.best, self.before, self.after = 0, -1, float("inf"), None, None
        self.since, self.logged, self.evaluation_seconds = time.time(), 0, 0.0
        self.same = {"data": corpus.fingerprint(), "counts": hashlib.sha256(counts.tobytes()).hexdigest()}

    def start(self, source):
        """Tell what will be done, and put into the folder what does not change."""
        self.introduce(source)
        if self.machine.rank == 0:
            self.folder.mkdir(parents=True, exist_ok=True)
            for name in "report.json", "log.jsonl":  # of a run that ended before its first evaluation
                (self.folder / name).unlink(missing_ok=True)
            for name in count.TOKENIZER_FILES:
                if (source / name).exists():
                    content = (source / name).read_bytes()
                    replace(self.folder / name, lambda part: part.write_bytes(content))
            replace(self.folder / "counts.npy", lambda part: count.write_counts(part, self.counts))
            write_json(self.folder / "args.json", vars(self.args))
            self.model.save_pretrained(self.folder)  # a checkpoint from the first moment

    def resume(self):
        """Go on from resume.pt. Raises ValueError if text or counts are not what they were."""
        state = load_state(self.folder / "resume.pt")
        for name, digest in self.same.items():
            if state["same"][name] != digest:
                raise ValueError(f"--resume: the {name} are not those of the run in {self.folder}/: give "
                                 "what it had, or start a run in another --out_dir")
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        for name in "step", "evaluated", "best", "before", "after":
            setattr(self, name, state.get(name, getattr(self, name)))
        self.logged = self.step
        self.introduce(self.folder)
        self.machine.say(f"resuming at step {self.step}")
        if self.machine.rank == 0 and self.step < self.args.max_iters:
            (self.folder / "report.json").unlink(missing_ok=True)
            kept, log = [], self.folder / "log.jsonl"
            for line in log.read_text(encoding="utf-8").splitlines(keepends=True):
                with contextlib.suppress(ValueError):  # a process that was killed may leave half a line
                    if json.loads(line)["iter"] <= self.step:
                        kept.append(line)
            replace(log, lambda part: part.write_text("".join(kept), encoding="utf-8"))
            write_json(self.folder / "args.json", vars(self.args))
        reported = (self.folder / "report.json").exists()
        if self.machine.rank == 0 and self.after["iter"] == self.step and not reported:
            self.model.save_pretrained(self.folder)  # it may have been killed just before it did that

    def introduce(self, source):
        """The first screen: the model, the data, the loss, the length of the run."""
        args, machine, say = self.args, self.machine, self.machine.say
        size = sum(p.numel() for p in self.model.parameters()) / 1e6
        mass = self.own * self.weights.double().numpy()
        of_text, self.share_of_weight = (
            {name: share[self.bands == i].sum() / share.sum() for i, name in enumerate(count.BANDS)}
            for share in (self.own, mass)
        )
        dtype = str(machine.dtype).removeprefix("torch.")
        processes = f", {machine.world_size} processes" if machine.world_size > 1 else ""
        say(f"model: {Path(source).name}, {size:.1f}M parameters, {machine.device.type}, {dtype}{processes}")
        of, n = len(self.corpus.windows), len(self.windows)
        evaluated = f", {n:,} of {of:,} sequences of that evaluated (--eval_iters)" if n < of else ""
        say(f"data:  {self.corpus.description}{evaluated}")
        frequent, rare = (f"{of_text[name]:.0%} of the text, {self.share_of_weight[name]:.0%} of the weight"
                          for name in ("frequent", "rare"))
        over = f" (rising, over {args.alpha_warmup_iters} steps)" * (args.alpha_warmup_iters > 0)
        say(f"loss:  PDL, alpha {self.alpha:g}{over}, eps {args.eps:g}; frequent tokens: {frequent}; rare: "
            f"{rare}")
        size = f"{self.global_batch} x {args.block_size}"
        say(f"run:   {args.max_iters} steps of {size} tokens, learning rate {args.learning_rate:g}, into "
            f"{self.folder}/")
        if returns := self.own[self.tokenizer.encode_single_token(b"\r")]:
            say(f"NOTE: the text has \\r, as in line ends of Windows, {returns:,} times: convert it, or the "
                "model learns to write it")
        uncounted = np.flatnonzero((self.counts == 0) & (mass > 0))
        if len(uncounted) and self.alpha:
            heaviest = uncounted[np.argsort(-mass[uncounted])][:3]
            names = ", ".join(repr(self.tokenizer.decode([i])) for i in heaviest)
            say(f"WARNING: {mass[uncounted].sum() / mass.sum():.1%} of the weight is on {len(uncounted):,} "
                f"tokens of the data that --counts lacks, most on {names} (each weighs eps^-alpha = "
                f"{args.eps ** -self.alpha:,.0f}): add counts of the data to --counts"
                + ("" if args.normalize or args.eps >= 1 else ", or use --eps 1"))

    def log(self, loss):
        """After a step: its loss, summed over the processes, the speed, the time left."""
        args = self.args
        if self.step % args.log_interval and self.step not in (1, args.max_iters):
            return
        loss = self.machine.sum(loss).item()
        self.check_finite(loss)
        seconds = (time.time() - self.since) / (self.step - self.logged)
        speed = self.global_batch * args.block_size / seconds
        evaluations = math.ceil(args.max_iters / args.eval_interval) - self.step // args.eval_interval
        left = int(seconds * (args.max_iters - self.step) + self.evaluation_seconds * evaluations)
        self.machine.say(f"step {self.step}: loss {loss:.4f}, {seconds * 1000:.0f} ms, {speed:,.0f} tok/s, "
                         f"{left // 60}:{left % 60:02} left")
        self.write_log(iter=self.step, loss=loss, lr=learning_rate(self.step - 1, args), tok_per_s=speed)
        self.since, self.logged = time.time(), self.step

    def predict(self, logit_bias=None):
        """How well held-out text is predicted, as summarize has it; each process takes its share."""
        machine = self.machine
        windows = self.windows[machine.rank :: machine.world_size]
        scores = sample.evaluate(self.model, self.corpus, windows, self.args.batch_size, machine.autocast(),
                                 machine.progress("evaluating"), logit_bias)
        for total in scores:
            machine.sum(total)
        return sample.summarize(scores, self.weights, self.counts, self.bands, self.tokenizer)

    def evaluate(self):
        """Predict held-out text; keep the weights if they are the best; save."""
        machine, start = self.machine, time.time()
        result, self.evaluated = self.predict() | {"iter": self.step}, self.step
        left_out = f" (without {result['uncounted']:,} targets that were never counted)"
        ce, pdl = result["val_ce"], result["val_pdl"]
        machine.say(f"step {self.step}: held-out cross-entropy {ce:.4f}, PDL {pdl:.4f}"
                    + left_out * (self.before is None and result["uncounted"] > 0))
        self.write_log(iter=self.step, val_ce=ce, val_pdl=pdl)
        self.check_finite(ce)
        self.before = self.before or result
        if ce < self.best:
            self.best, self.after = ce if self.step else float("inf"), result  # what it starts from is none
        self.save()
        if self.after is result and self.step and machine.rank == 0:
            self.model.save_pretrained(self.folder)  # after resume.pt, from which it can be made again
        self.evaluation_seconds = time.time() - start
        self.since += self.evaluation_seconds  # the log shows the speed of training

    def save(self):
        """Write resume.pt, unless a weight is no number: what is there is better then."""
        if self.machine.rank == 0:
            self.check_finite(sum(p.detach().sum().item() for p in self.model.parameters()))
            state = {"model": self.model.state_dict(), "optimizer": self.optimizer.state_dict(),
                     "step": self.step, "evaluated": self.evaluated, "best": self.best,
                     "before": self.before, "after": self.after, "same": self.same}
            replace(self.folder / "resume.pt", lambda part: torch.save(state, part))

    def check_finite(self, number):
        if not math.isfinite(number):
            raise ValueError(f"the loss is no number any more at step {self.step}; {self.folder}/ keeps what "
                             "was good. Try a lower --learning_rate, or a larger --eps")

    def write_log(self, **entry):
        if self.machine.rank == 0:
            with open(self.folder / "log.jsonl", "a", encoding="utf-8") as file:
                print(json.dumps(entry), file=file)

    def report(self):
        """Judge the best weights, and write report.json; in other processes than the first, {}."""
        self.optimizer.state.clear()  # makes room
        self.machine.first(lambda: self.model.load_weights(self.folder))  # once the first has written them
        shifted = {}
        if self.alpha == 0:
            for alpha in sorted(self.args.alpha)[1:]:  # what the others do, without training for it
                self.machine.say(f"evaluating with a shift of {alpha:g} ...")
                shifted[f"{alpha:g}"] = self.predict(sample.shift(self.counts, alpha).to(self.machine.device))
        if self.machine.rank > 0:
            return {}
        with self.machine.autocast():
            written = sample.judge_text(self.model, self.corpus, self.windows, self.bands, self.tokenizer,
                                        self.args.seed, self.machine.say)
        report = {"alpha": self.alpha, "args": vars(self.args), "share_of_weight": self.share_of_weight,
                  "before": self.before, "after": self.after, "shifted": shifted} | written
        write_json(self.folder / "report.json", report)
        return report


# --- flags ---


def parse_args():
    p = count.ArgumentParser(description="Finetune GPT-2 with Power-Law Decay Loss (arXiv 2505.16900).")
    flag, not_negative, positive = p.flag, at_least(0, float), at_least(1)
    flag("alpha", [0.5], "strength of the decay; 0: plain cross-entropy; several: a run each", not_negative,
         nargs="+")
    flag("eps", 1e-6, "added to every count, Eq. 3", not_negative)
    p.add_argument("--normalize", action="store_true", help="probabilities instead of raw counts in Eq. 3")
    flag("alpha_warmup_iters", 0, "raise alpha linearly from 0 over this many steps; best over all of them",
         at_least(0))
    flag("counts", None, "token counts from count.py, added up, each scaled if so asked (default: those of "
         "the training split)", nargs="+", metavar="FILE[:SCALE]")

    flag("data", None, "UTF-8 text, or .jsonl with a prompt and a completion a line, .gz or not (default: "
         "the Python language reference that comes with Python)")
    flag("init_from", None, "gpt2, gpt2-medium, gpt2-large, gpt2-xl, distilgpt2, a folder, or scratch "
         "(default: gpt2, or tiny/ if that cannot be had)")
    flag("tokenizer", None, "with --init_from scratch: the folder whose tokenizer to use")
    flag("n_layer", 4, "with --init_from scratch", positive)
    flag("n_head", 4, "with --init_from scratch", positive)
    flag("n_embd", 256, "with --init_from scratch", positive)
    flag("dropout", 0.0, "in training", at_least(0, float, below=1))

    flag("max_iters", 300, "optimizer steps", positive)
    flag("batch_size", 16, "sequences in a micro-step", positive)
    flag("block_size", 256, "tokens in a sequence", at_least(8))
    flag("gradient_accumulation_steps", 1, "micro-steps in a step, of all processes together", positive)
    flag("learning_rate", None, "its peak, after --warmup_iters; a cosine takes it to a tenth (default: "
         "3e-4, or 3e-3 for a model of less than ten million parameters, such as tiny/)", not_negative)
    flag("optimizer", "adamw", "adafactor: half the memory, and a --learning_rate ten times as large, as it "
         "is relative to the weights", choices=["adamw", "adafactor"])
    flag("warmup_iters", 10, "steps over which the learning rate rises", at_least(0))
    flag("weight_decay", 0.1, "of matrices; biases and gains do not decay", not_negative)
    flag("grad_clip", 1.0, "largest norm of the gradient; 0 for none", not_negative)
    flag("eval_interval", 50, "steps between evaluations and saves", positive)
    flag("eval_iters", 20, "batches of held-out text in an evaluation", positive)
    flag("log_interval", 10, "steps between log lines", positive)
    flag("seed", 1337, "of batches, dropout and samples", at_least(0, below=2**63))

    flag("out_dir", "out", "where the run goes; of several alphas, a folder each in there")
    p.add_argument("--resume", action="store_true", help="go on with the run in --out_dir, with its flags")
    flag("device", "auto", "cuda, mps, cpu; auto: the first of them that is there")
    flag("dtype", "auto", "of the matrix products; auto: bfloat16 where the hardware has it",
         choices=["auto", "float32", "bfloat16"])
    p.add_argument("--compile", action="store_true", help="torch.compile the model")
    p.add_argument("--activation_checkpointing", action=argparse.BooleanOptionalAction,
                   help="recompute activations in backward: less memory, more time (default: on a CPU)")

    args = p.parse_args()
    if args.resume:
        args = resumed_args(p, args.out_dir)
    if args.init_from == "scratch" and args.tokenizer is None:
        p.error("--init_from scratch needs --tokenizer FOLDER")
    if args.n_embd % args.n_head:
        p.error(f"--n_embd {args.n_embd} must be a multiple of --n_head {args.n_head}")
    if args.alpha_warmup_iters > args.max_iters:
        p.error(f"--alpha_warmup_iters {args.alpha_warmup_iters}: alpha would not get there in --max_iters "
                f"{args.max_iters}")
    if len({f"{alpha:g}" for alpha in args.alpha}) < len(args.alpha):  # which names a run's folder
        p.error("--alpha has a value twice")
    if args.batch_size * args.gradient_accumulation_steps < int(os.environ.get("WORLD_SIZE", 1)):
        p.error("--batch_size times --gradient_accumulation_steps must be at least the number of processes")
    return args


# What --resume may change: the result means the same. (Whether data and counts do, their content tells.)
MAY_CHANGE = {"resume", "out_dir", "data", "counts", "max_iters", "eval_interval", "log_interval", "device",
              "dtype", "compile", "activation_checkpointing", "batch_size", "gradient_accumulation_steps"}


def resumed_args(p, out_dir):
    """The flags of the run in a folder, with those that are given now and may change."""
    runs = [folder for folder in (Path(out_dir), *sorted(Path(out_dir).glob("alpha-*"))) if is_run(folder)]
    if not runs:
        p.error(f"--resume: there is no run to continue in {out_dir}")
    try:
        last = max((folder / "args.json" for folder in runs), key=os.path.getmtime)  # of the run in progress
        had = json.loads(last.read_bytes())
        p.set_defaults(**{name: had[name] for name in vars(p.parse_args([])).keys() - {"resume", "out_dir"}})
    except (OSError, ValueError, KeyError, TypeError):
        p.error(f"--resume: {out_dir} has no args.json with the flags of the run")
    args = p.parse_args()
    changed = [name for name, value in vars(args).items() if value != had[name] and name not in MAY_CHANGE]
    sequences = lambda flags: flags["batch_size"] * flags["gradient_accumulation_steps"]
    if sequences(vars(args)) != sequences(had):
        changed.append("batch_size")
    for name in changed:
        p.error(f"--resume: --{name} was {had[name]}, not {getattr(args, name)}, in {out_dir}: for another "
                "run, name another --out_dir")
    if len(args.alpha) > 1 and runs[0] == Path(out_dir):
        p.error(f"--resume: {out_dir} is one run of several: --out_dir {runs[0].parent} goes on with them")
    return args


def main_in_memory():
    """main, with the flags named that make a run smaller when memory runs out."""
    try:
        main()
    except (RuntimeError, MemoryError) as error:  # a CPU's allocator raises no torch.OutOfMemoryError
        told = re.search("out of memory|can't allocate memory|not enough memory", str(error))
        if not told and not isinstance(error, MemoryError):
            raise
        raise ValueError("out of memory: halve --batch_size and double --gradient_accumulation_steps (the "
                         "same training), add --activation_checkpointing, or start with a lower --block_size"
                         ) from None


if __name__ == "__main__":
    count.run(main_in_memory)
