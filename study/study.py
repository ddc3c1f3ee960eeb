"""
What PDL is good for, measured: finetunes tiny/ on four tasks, by PDL and by what it competes with.

    python tests/study.py --tasks FOLDER      # the runs that assets/study.json has not yet
    python tests/findings.py                  # what they come to, as assets/results.md

Two tasks come with Python: its language reference, to be continued, and the functions of its standard
library, to be written from signature and docstring. tests/make_tasks.py makes the others, style.jsonl and
webnlg.jsonl, and a fifth, dialogue.jsonl, for FOLDER; english.txt in there is any general text. What FOLDER
lacks is left out, and said.

A run is train.py's own, with the loss or the weights replaced where a method needs that. Then the model
completes held-out prompts at six temperatures, and that is compared with what the prompts' authors wrote.
Weights and completions stay in --out_dir, from which a study that was stopped goes on.
"""

import argparse
import ast
import contextlib
import functools
import io
import itertools
import json
import math
import multiprocessing
import os
import statistics
import sys
import textwrap
from collections import Counter
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from unittest import mock

import numpy as np
import torch
import torch.nn.functional as F

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
import train
from count import BANDS, count_tokens, frequency_bands, load_tokenizer, open_corpus
from model import GPT, _draw, load_state, replace
from pdl import pdl_weights
from sample import measure_text, ngrams, shift

RESULTS = ROOT / "assets" / "study.json"
TASKS = {  # name: title, training steps of 8 x 256 tokens
    "style": ("style transfer", 300),
    "webnlg": ("data to text", 300),
    "functions": ("docstring to code", 200),
    "reference": ("language reference", 200),
}
FIFTH = {"dialogue": ("dialogue", 200)}  # for the rule that takes an alpha, which was chosen on the others
TEMPERATURES = 0, 0.3, 0.5, 0.7, 0.85, 1
LEARNING_RATE = 3e-3
SEEDS, MORE_SEEDS = (1, 2, 3), (4, 5)  # the latter for what is compared first
LENGTH = 100  # tokens that a model may write; what is longer of the references, is cut there
N_WINDOWS = 160


# --- the tasks ---


@functools.cache
def tokenizer():
    return load_tokenizer(ROOT / "tiny")


def functions():
    """The standard library's functions as pairs: signature and docstring, body. Without the long ones."""
    library = Path(os.__file__).parent
    for path in sorted(library.rglob("*.py")):
        if {"test", "tests", "idlelib", "site-packages"} & set(path.relative_to(library).parts):
            continue
        try:
            source = path.read_text(encoding="utf-8")
            tree = ast.parse(source)
        except (ValueError, SyntaxError):  # a few are there to be wrong
            continue
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef) and ast.get_docstring(node) and len(node.body) > 1:
                lines = textwrap.dedent(
                    "\n".join(source.splitlines()[node.lineno - 1 : node.end_lineno])
                ).splitlines(keepends=True)
                n = node.body[0].end_lineno - node.lineno + 1
                prompt, completion = "".join(lines[:n]), "".join(lines[n:])
                if len(prompt) <= 400 and len(completion) <= 600:
                    yield {"prompt": prompt, "completion": completion}


def prepare(folder, out):
    """Put what the runs read into out/data; the names of the tasks that can be run, and whether "general"."""
    data = out / "data"
    data.mkdir(parents=True, exist_ok=True)
    lines = {"functions": [json.dumps(pair) for pair in functions()]}
    for task in "style", "webnlg", "dialogue":
        path = Path(folder, f"{task}.jsonl")
        if path.exists():
            lines[task] = path.read_text(encoding="utf-8").splitlines()
        else:
            print(f"{path} is not there: the runs on {(TASKS | FIFTH)[task][0]} are left out")
    for task, pairs in lines.items():
        # Also a twentieth to train on, by distinct prompts, and the others, to judge that on.
        number = {}
        for pair in pairs:
            number.setdefault(json.loads(pair)["prompt"], len(number))
        small = [number[json.loads(pair)["prompt"]] % 20 == 0 for pair in pairs]
        for name, which in (task, None), (f"{task}-5%", True), (f"{task}-95%", False):
            chosen = [pair for pair, of in zip(pairs, small) if which is None or of == which]
            (data / f"{name}.jsonl").write_text("\n".join(chosen) + "\n", encoding="utf-8")
        np.save(data / f"{task}-5%.npy", count_tokens([data / f"{task}-5%.jsonl"], tokenizer()))
    general = Path(folder, "english.txt")
    if not general.exists():
        print(f"{general} is not there: the runs with counts of a general text are left out")
        return {"reference", *lines}
    np.save(data / "general.npy", count_tokens([general], tokenizer()))
    return {"reference", "general", *lines}


@functools.cache
def load(task, data):
    """A task's corpus, the counts of its training split, their bands."""
    path = data / f"{task}.jsonl"
    corpus = open_corpus(path if path.exists() else None, tokenizer(), 256, data / "token_cache")
    counts = corpus.train_counts(tokenizer().n_vocab)
    return corpus, counts, frequency_bands(counts)


# --- the methods: flags of train.py, and what is replaced in it ---


def focal(gamma):
    """(1 - p)^gamma times the cross-entropy (Lin et al. 2017)."""

    def loss(hidden, lm_head, targets, weights, reduction):
        keep = targets != -100
        ce = F.cross_entropy(hidden[keep] @ lm_head.T, targets[keep], reduction="none")
        return ((1 - (-ce).exp()) ** gamma * ce).sum()

    return {"linear_pdl_loss": loss}


def label_smoothing(epsilon):
    """A share epsilon of each target spread over the vocabulary (Szegedy et al. 2016)."""

    def loss(hidden, lm_head, targets, weights, reduction):
        keep = targets != -100
        return F.cross_entropy(
            hidden[keep] @ lm_head.T, targets[keep], reduction="sum", label_smoothing=epsilon
        )

    return {"linear_pdl_loss": loss}


def class_balanced(beta):
    """One over the effective number of samples, (1 - beta^n) / (1 - beta) (Cui et al. 2019, Eq. 2)."""

    def weights(step, alpha, counts, args):
        n = torch.from_numpy(counts).double().clamp(min=1)
        return ((1 - beta) / (1 - beta**n)).float()

    return {"step_weights": weights}


def mean_weight(counts, weights):
    """Of a target in the training split."""
    return (torch.from_numpy(counts) * weights.double()).sum().item() / counts.sum()


def eot_at_mean(step, alpha, counts, args):
    """The weight of the end of text, which every completion has, is that of the mean target."""
    weights = pdl_weights(counts, alpha, args.eps)
    weights[tokenizer().eot_token] = mean_weight(counts, weights)
    return weights


def capped(step, alpha, counts, args):
    """No weight is more than 5 times that of the mean target."""
    weights = pdl_weights(counts, alpha, args.eps)
    return weights.clamp(max=5 * mean_weight(counts, weights))


def falling(step, alpha, counts, args):
    """Alpha falls linearly to 0, so that the model ends calibrated."""
    return pdl_weights(counts, alpha * (1 - step / args.max_iters), args.eps)


RISING = "PDL 0.25, alpha rising"
VARIANTS = {  # name: flags of train.py, what is replaced in it
    "PDL 0.25, general counts": (["--alpha", 0.25, "--counts", "data/general.npy"], {}),
    "PDL 0.5, eps 1": (["--alpha", 0.5, "--eps", 1], {}),
    "PDL 0.5, alpha falling": (["--alpha", 0.5], {"step_weights": falling}),
    "PDL 0.5, end of text at the mean weight": (["--alpha", 0.5], {"step_weights": eot_at_mean}),
    "PDL 0.5, weights capped": (["--alpha", 0.5], {"step_weights": capped}),
    "PDL 0.5, alpha rising": (["--alpha", 0.5, "--alpha_warmup_iters", "{steps}"], {}),
    RISING: (["--alpha", 0.25, "--alpha_warmup_iters", "{steps}"], {}),
}
METHODS = {
    "plain": (["--alpha", 0], {}),
    "PDL 0.25": (["--alpha", 0.25], {}),
    "PDL 0.5": (["--alpha", 0.5], {}),
    "PDL 1": (["--alpha", 1], {}),
    "focal, gamma 1": (["--alpha", 0], focal(1)),
    "focal, gamma 2": (["--alpha", 0], focal(2)),
    "label smoothing 0.1": (["--alpha", 0], label_smoothing(0.1)),
    "class-balanced, beta 0.9": (["--alpha", 0], class_balanced(0.9)),
    "class-balanced, beta 0.99": (["--alpha", 0], class_balanced(0.99)),
    **VARIANTS,
    "PDL 0.25, counts mixed": (
        ["--alpha", 0.25, "--counts", "data/{task}.npy", "data/general.npy:0.01"], {}),
}
BASELINES = "focal, gamma 2", "label smoothing 0.1", "class-balanced, beta 0.9"
STRONGER = "class-balanced, beta 0.99", "PDL 1"
LONGER = {  # twice the training, of style transfer
    f"{method}, 600 steps": ([*METHODS[method][0], "--max_iters", 600], {})
    for method in ("plain", "PDL 0.25", "PDL 0.5")
}
RATES = {
    f"{method}, learning rate {rate}": ([*METHODS[method][0], "--learning_rate", rate], METHODS[method][1])
    for method in ("plain", "PDL 0.25", RISING, *BASELINES)
    for rate in (0.001, 0.01)
}
METHODS |= LONGER | RATES
SHIFTED = {  # sampled with sample.py's shift: PDL without training for it, and PDL calibrated again
    "plain, shift 0.25": ("plain", 0.25),
    "plain, shift 0.5": ("plain", 0.5),
    "PDL 0.25, shift -0.25": ("PDL 0.25", -0.25),
    "PDL 0.5, shift -0.25": ("PDL 0.5", -0.25),
    "PDL 0.5, shift -0.5": ("PDL 0.5", -0.5),
    "PDL 1, shift -1": ("PDL 1", -1),
}
SHIFTED_TOO = {
    f"plain, {how}, shift 0.25": (f"plain, {how}", 0.25) for how in ("600 steps", "learning rate 0.001")
}


def runs():
    """Every run of the study, what matters most first: its task, its method, its seed."""
    alphas = "plain", "PDL 0.25", "PDL 0.5"
    small = "plain", "PDL 0.25", "PDL 0.25, counts mixed"
    for tasks in ("style", "webnlg"), ("functions", "reference"):
        yield from itertools.product(tasks, alphas, SEEDS)
    yield from itertools.product(TASKS, ["plain, shift 0.25", "plain, shift 0.5"], SEEDS)
    yield from itertools.product(["style"], (*SHIFTED, *BASELINES, *STRONGER), SEEDS)
    yield from itertools.product(["style-5%"], small, SEEDS)
    yield from itertools.product(["style"], (*LONGER, *SHIFTED_TOO, *VARIANTS), SEEDS)
    yield from itertools.product(TASKS, (*alphas, "plain, shift 0.25"), MORE_SEEDS)
    yield from itertools.product(FIFTH, (*alphas, "plain, shift 0.25", "plain, shift 0.5"), SEEDS)
    yield from itertools.product(TASKS, [RISING], SEEDS + MORE_SEEDS)
    yield from itertools.product(FIFTH, [RISING], SEEDS)
    matters_more = "PDL 0.5, alpha rising", "PDL 0.5, end of text at the mean weight"
    yield from itertools.product(["webnlg"], (*matters_more, *BASELINES), SEEDS)
    yield from itertools.product(["style"], RATES, [1])
    lower = (f"{method}, learning rate 0.001" for method in ("plain", "PDL 0.25", RISING))
    yield from itertools.product(["style"], lower, SEEDS)
    yield from itertools.product(["style"], ["focal, gamma 1"], SEEDS)
    yield from itertools.product(["functions", "reference"], BASELINES, SEEDS)
    yield from itertools.product(["webnlg-5%", "functions-5%"], small, SEEDS)
    yield from itertools.product(["style"], (*LONGER, "plain, 600 steps, shift 0.25"), MORE_SEEDS)


def name_of(task, method, seed):
    return f"{task}, {method}, seed {seed}"


def finetune(task, method, seed, out):
    """Train as train.py does; the folder with the weights. If they are there, they are taken."""
    folder = out / name_of(task, method, seed)
    if (folder / "done").exists():
        return folder
    flags, replaced = METHODS[method]
    small = task.endswith("-5%")
    steps = 200 if small else (TASKS | FIFTH)[task][1]
    flags = [str(flag).format(task=task, steps=steps) for flag in flags]
    argv = [
        "train.py",
        *("--init_from", ROOT / "tiny", "--out_dir", folder, "--seed", seed, "--max_iters", steps),
        *("--learning_rate", LEARNING_RATE, "--batch_size", 8, "--no-activation_checkpointing"),
        *(("--eval_interval", 20) if small else ("--eval_interval", steps, "--eval_iters", 1)),
        *(["--data", out / "data" / f"{task}.jsonl"] if task != "reference" else []),
        *(out / flag if flag.startswith("data/") else flag for flag in flags),
    ]
    with contextlib.ExitStack() as stack:
        stack.enter_context(mock.patch.object(sys, "argv", list(map(str, argv))))
        stack.enter_context(contextlib.redirect_stdout(io.StringIO()))
        stack.enter_context(mock.patch.object(train.Run, "report", lambda run: {}))  # here is a better one
        for name, value in replaced.items():
            stack.enter_context(mock.patch.object(train, name, value))
        args = train.parse_args()
        if train.finetune(args, args.alpha[0], folder, ROOT / "tiny", train.Machine(args)) is None:
            raise KeyboardInterrupt  # a signal came; the next study goes on from here
    model = GPT.from_pretrained(folder)
    model.load_state_dict(load_state(folder / "resume.pt")["model"])  # the last weights, not the best
    model.save_pretrained(folder)
    (folder / "resume.pt").unlink()
    (folder / "done").touch()
    return folder


# --- measures ---


@torch.no_grad()
def complete(model, prompts, seed, eot, bias):
    """What the model writes after each prompt at each temperature, up to its end of text or LENGTH tokens.

    [temperature][prompt] -> tokens; and the same of whether it ended.
    """
    torch.manual_seed(seed)
    written = [[[] for _ in prompts] for _ in TEMPERATURES]
    ended = [[False for _ in prompts] for _ in TEMPERATURES]
    for n in sorted({len(prompt) for prompt in prompts}):  # those of one length side by side, at all of them
        of_n = [i for i, prompt in enumerate(prompts) if len(prompt) == n]
        rows = [(k, i) for i in of_n for k in range(len(TEMPERATURES))]
        temperature = torch.tensor([[max(TEMPERATURES[k], 1e-6)] for k, _ in rows])  # 1e-6: the likeliest
        unseen, pos = torch.tensor([prompts[i] for _, i in rows]), 0
        cache = model._empty_cache(len(rows), n + LENGTH)
        for _ in range(LENGTH):
            hidden = model(unseen, True, cache, pos)[:, -1]
            pos += unseen.shape[1]
            logits = F.linear(hidden, model.lm_head) + bias
            logits -= logits.max(-1, keepdim=True).values
            drawn = _draw((logits / temperature).softmax(-1))
            for (k, i), token in zip(rows, drawn.tolist()):
                ended[k][i] |= token == eot
                if not ended[k][i]:
                    written[k][i].append(token)
            unseen, going = drawn[:, None], torch.tensor([not ended[k][i] for k, i in rows])
            if going.sum() < 0.7 * len(rows):  # moving the cache takes longer than a few rows more
                rows = [row for row, goes in zip(rows, going.tolist()) if goes]
                unseen, temperature, cache = unseen[going], temperature[going], cache[:, :, going]
            if not rows:
                break
    return written, ended


def bleu(written, references):
    """Corpus BLEU-4 on tokens, one reference each (Papineni et al. 2002)."""
    log_precision = 0
    for n in 1, 2, 3, 4:
        grams = [(Counter(ngrams(w, n)), Counter(ngrams(r, n))) for w, r in zip(written, references)]
        matched, total = sum((w & r).total() for w, r in grams), sum(w.total() for w, _ in grams)
        if not matched:
            return 0.0
        log_precision += math.log(matched / total) / 4
    n_written, n_references = (sum(map(len, texts)) for texts in (written, references))
    return math.exp(log_precision + min(0, 1 - n_references / n_written))


def rare_matches(written, references, rare):
    """Precision, recall and F1 of the rare tokens of each completion as a multiset, over all prompts."""
    of = [[Counter(t for t in text if rare[t]) for text in texts] for texts in (written, references)]
    matched = sum((w & r).total() for w, r in zip(*of))
    n_written, n_references = (sum(counter.total() for counter in texts) for texts in of)
    return {
        "rare_precision": matched / max(1, n_written),
        "rare_recall": matched / max(1, n_references),
        "rare_f1": 2 * matched / max(1, n_written + n_references),
    }


def judge(written, ended, references, held_out, bands):
    """All measures of completions, by name."""
    return {
        "bleu": bleu(written, references),
        **rare_matches(written, references, bands == 2),
        "ended": statistics.mean(ended),  # the share of the completions that do
        "length_ratio": sum(map(len, written)) / sum(map(len, references)),
        **measure_text(written, held_out, bands),
    }


TAUS = -0.5, -0.25, 0, 0.125, 0.25, 0.375, 0.5, 0.75, 1, 1.25


@torch.no_grad()
def predict(model, corpus, counts, bands, bias):
    """How well the model with bias (V,) on its logits predicts held-out text.

    Cross-entropies of all, frequent, middle and rare targets with tau * log(max(freq, 1)) added to the
    logits, by tau; precision, recall and F1 of the likeliest tokens as predictions of rare targets.
    """
    x, y = map(torch.from_numpy, corpus.sequences(corpus.held_out(N_WINDOWS)))
    ce, likeliest, log_freq = {tau: [] for tau in TAUS}, [], shift(counts, -1)
    for inputs, targets in zip(x.split(8), y.split(8)):
        hidden = model(inputs, return_hidden=True)[targets != -100]
        for h, t in zip(hidden.split(512), targets[targets != -100].split(512)):
            logits = F.linear(h, model.lm_head) + bias
            likeliest.append(logits.argmax(-1))
            for tau in TAUS:
                ce[tau].append(F.cross_entropy(logits + tau * log_freq, t, reduction="none"))
    targets, bands, of_tau = y[y != -100], torch.from_numpy(bands), {}
    for tau, parts in ce.items():
        parts = torch.cat(parts).double()
        of_band = (parts[bands[targets] == i].mean().item() for i in range(len(BANDS)))
        of_tau[tau] = [parts.mean().item(), *of_band]
    rows = ([[token] for token in tokens.tolist()] for tokens in (torch.cat(likeliest), targets))
    return {"ce": of_tau, "top-1": rare_matches(*rows, bands == 2)}


@functools.cache
def prompts_of(task, data):
    """Held-out prompts, their references, and the counts of held-out tokens."""
    corpus, counts, bands = load(task, data)
    of_length = {}
    for prompt, reference in corpus.openings(10**9):
        of_length.setdefault(len(prompt), []).append((prompt, reference[:LENGTH]))
    # Of 25 lengths, spread as those of all, so that 24 each can be completed side by side.
    lengths, chosen = sorted(n for n, pairs in of_length.items() for _ in pairs), []
    for part in range(25):
        of_one = of_length[lengths[(2 * part + 1) * len(lengths) // 50]]
        chosen += of_one[:24]
        del of_one[:24]
    prompts, references = zip(*chosen)
    _, y = corpus.sequences(corpus.windows)
    return prompts, references, np.bincount(y[y != -100], minlength=len(counts))


def one(task, method, seed, out):
    """Train, if that is not done; measure. The entry of the run."""
    trained, x = (SHIFTED | SHIFTED_TOO).get(method, (method, 0))
    folder = finetune(task, trained, seed, out)
    model, judged_on = GPT.from_pretrained(folder).eval(), task.replace("-5%", "-95%")
    corpus, counts, bands = load(judged_on, out / "data")
    prompts, references, held_out = prompts_of(judged_on, out / "data")
    path = folder / f"completions{x}.json"
    bias = shift(counts, x)
    if not path.exists():
        path.write_text(json.dumps(complete(model, prompts, seed, tokenizer().eot_token, bias)))
    texts = zip(TEMPERATURES, *json.loads(path.read_text()))
    result = {"text": {t: judge(written, ended, references, held_out, bands) for t, written, ended in texts}}
    result |= predict(model, corpus, counts, bands, bias)
    if task != judged_on:
        log = map(json.loads, (folder / "log.jsonl").read_text().splitlines())
        result["curve"] = [entry["val_ce"] for entry in log if "val_ce" in entry]
    return name_of(task, method, seed), result


def rounded(value):
    if isinstance(value, dict):
        return {str(key): rounded(of) for key, of in value.items()}
    if isinstance(value, list):
        return [rounded(of) for of in value]
    return float(f"{value:.5g}") if isinstance(value, float) else value


def save(results):
    """A line a run."""
    lines = [f" {json.dumps(name)}: {json.dumps(rounded(results[name]))}" for name in sorted(results)]
    text = "{\n" + ",\n".join(lines) + "\n}\n"
    replace(RESULTS, lambda part: part.write_text(text, encoding="utf-8"))


def measure(jobs, out, folder):
    results = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    tasks = prepare(folder, out)
    for task in tasks - {"general"}:
        corpus, counts, bands = load(task, out / "data")
        _, references, held_out = prompts_of(task, out / "data")
        results[task] = {"references": measure_text(references, held_out, bands), "n": len(references)}
    # Each run has one thread: its results are then the same on however many cores.
    with ProcessPoolExecutor(jobs, multiprocessing.get_context("spawn"), torch.set_num_threads, (1,)) as pool:
        there = [run for run in dict.fromkeys(runs()) if run[0].removesuffix("-5%") in tasks]
        if "general" not in tasks:
            there = [run for run in there if "counts" not in run[1]]
        todo = [run for run in there if name_of(*run) not in results]
        for number, job in enumerate(as_completed([pool.submit(one, *run, out) for run in todo]), 1):
            name, result = job.result()
            results[name] = result
            save(results)
            print(f"{number} of {len(todo)}: {name}", flush=True)


if __name__ == "__main__":
    p = argparse.ArgumentParser(description="Measure what PDL is good for.")
    p.add_argument("--tasks", default="tasks", help="folder with style.jsonl, webnlg.jsonl, english.txt")
    p.add_argument("--out_dir", type=Path, default="out-study", help="where weights and completions stay")
    p.add_argument("--jobs", type=int, default=os.cpu_count(), help="runs side by side (default: one a core)")
    args = p.parse_args()
    measure(args.jobs, args.out_dir.absolute(), args.tasks)
