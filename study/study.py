"""
Measure what PDL is good for: finetune tiny/ on four tasks, with PDL and without, and compare.

    python study/study.py --tasks FOLDER    # trains, samples and measures; writes study/rerun.json
    python study/findings.py                # turns the numbers into tables; writes study/results.md

Two tasks come with Python. One is to continue its language reference. The other is to write the functions of
its standard library from their signature and docstring. FOLDER has the other two, style.jsonl and
webnlg.jsonl, which make_tasks.py makes. A task whose file is missing is left out.

train.py itself finetunes each model. The model then completes held-out prompts at six temperatures, and each
completion is compared with what the author of the prompt wrote. The models stay in --out_dir. A study that
was stopped goes on when it is started again.
"""

import argparse
import ast
import functools
import itertools
import json
import math
import multiprocessing
import os
import statistics
import subprocess
import sys
import textwrap
from collections import Counter
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
from count import BANDS, load_corpus, load_tokenizer
from model import GPT, write_safely
from sample import shift

RERUN = Path(__file__).with_name("rerun.json")
TASKS = {  # name: title, training steps
    "style": ("style transfer", 300),
    "webnlg": ("data to text", 300),
    "functions": ("docstring to code", 200),
    "reference": ("language reference", 200),
}
RISING = "PDL 0.25, alpha rising"
METHODS = {  # name: flags of train.py, shifts to sample with
    "plain": (["--alpha", 0], (0, 0.25)),
    RISING: (["--alpha", 0.25, "--rising"], (0,)),
    "PDL 0.25": (["--alpha", 0.25], (0,)),
}
SEEDS = 1, 2, 3, 4, 5
FLAGS = [  # of every run; float32 on a CPU gives the same numbers on more machines
    *("--init_from", ROOT / "tiny", "--batch_size", 8, "--learning_rate", 3e-3),
    *("--device", "cpu", "--dtype", "float32", "--no-activation_checkpointing"),
]
TEMPERATURES = 0, 0.3, 0.5, 0.7, 0.85, 1
LENGTH = 100  # tokens in a completion at most; references are cut there, too


def runs():
    """Every run of the study: its task, its method, its seed. The most valuable come first."""
    return itertools.product(TASKS, METHODS, SEEDS)


def name_of(task, method, seed):
    return f"{task}, {method}, seed {seed}"


# --- the tasks ---


def library_functions():
    """The functions of Python's standard library as pairs, without the long ones."""
    library = Path(os.__file__).parent
    for path in sorted(library.rglob("*.py")):
        if {"test", "tests", "idlelib", "site-packages"} & set(path.relative_to(library).parts):
            continue
        try:
            source = path.read_text(encoding="utf-8")
            tree = ast.parse(source)
        except (ValueError, SyntaxError):  # some files of the library are broken on purpose
            continue
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef) and ast.get_docstring(node) and len(node.body) > 1:
                lines = "\n".join(source.splitlines()[node.lineno - 1 : node.end_lineno])
                lines = textwrap.dedent(lines).splitlines(keepends=True)
                n = node.body[0].end_lineno - node.lineno + 1  # lines of signature and docstring
                prompt, completion = "".join(lines[:n]), "".join(lines[n:])
                if len(prompt) <= 400 and len(completion) <= 600:
                    yield {"prompt": prompt, "completion": completion}


def prepare(folder, out):
    """The file of each task. The language reference needs none, since it is train.py's default."""
    out.mkdir(parents=True, exist_ok=True)
    files = {"reference": None, "functions": out / "functions.jsonl"}
    pairs = map(json.dumps, library_functions())
    files["functions"].write_text("\n".join(pairs) + "\n", encoding="utf-8")
    for task in "style", "webnlg":
        path = Path(folder, f"{task}.jsonl").absolute()
        if path.exists():
            files[task] = path
        else:
            print(f"{path} does not exist, so {TASKS[task][0]} is left out")
    return files


@functools.cache
def load(file):
    """The corpus of a task, as train.py has it."""
    return load_corpus([file] if file else [], load_tokenizer(ROOT / "tiny"), 256)


def openings(corpus):
    """Held-out prompts, each with what its author wrote after it: lists of tokens."""
    T = corpus.held_out.T
    rows = corpus.held_out.tokens.reshape(-1, T + 1)
    losses = corpus.held_out.carries_loss.view(np.int8).reshape(-1, T + 1)  # 1 where a token carries loss
    if losses[0, 0]:  # text: a row starts with loss, where pairs start with a prompt
        return [(row[: T // 8], row[T // 8 :]) for row in rows.tolist()]
    first = {}  # some prompts have several completions: take the first
    for tokens, carries_loss in zip(rows.tolist(), losses):
        # Where a prompt starts, its completion starts, the next prompt starts, and so on.
        starts = np.flatnonzero(np.diff(carries_loss, prepend=1, append=0)).tolist()
        for prompt, completion, end in zip(starts[::2], starts[1::2], starts[2::2]):
            key = tuple(tokens[prompt:completion][-T // 2 :])
            first.setdefault(key, tokens[completion : end - 1])  # without the end of text
    return [(list(prompt), completion) for prompt, completion in first.items()]


def choose(pairs):
    """Choose prompts so that many can be completed in one batch: at most 24 of each of 25 lengths.

    The lengths are spread as those of all prompts. Returns prompts and references, lists of tokens.
    """
    of_length = {}
    for prompt, reference in pairs:
        of_length.setdefault(len(prompt), []).append((prompt, reference[:LENGTH]))
    lengths, chosen = sorted(len(prompt) for prompt, _ in pairs), []
    for i in range(25):
        of_one = of_length[lengths[(2 * i + 1) * len(lengths) // 50]]
        chosen += of_one[:24]
        del of_one[:24]
    return [list(column) for column in zip(*chosen)]


def held_out_counts(corpus):
    """How often each token is a held-out target: (V,)."""
    _, y = corpus.held_out[range(len(corpus.held_out))]
    return np.bincount(y[y != -100], minlength=len(corpus.freq))


# --- training and sampling ---


def finetune(task, method, seed, file, out):
    """Run train.py, or go on with a run that was stopped. Returns the folder with the best weights."""
    folder = out / name_of(task, method, seed)
    command = [sys.executable, ROOT / "train.py", *FLAGS, *METHODS[method][0], "--out_dir", folder]
    command += ["--seed", seed, "--max_iters", TASKS[task][1]]
    command += ["--data", file] if file else []
    command += ["--resume"] if (folder / "args.json").exists() else []
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    if not (folder / "report.json").exists():  # else it is finished
        subprocess.run(list(map(str, command)), env=env, stdout=subprocess.DEVNULL, check=True)
    (folder / "resume.pt").unlink(missing_ok=True)  # only an unfinished run needs it, and it is large
    return folder


def complete(model, prompts, seed, eot, bias):
    """Complete each prompt at each temperature, by at most LENGTH tokens or up to the end of text.

    bias: (V,), added to the logits. Returns two lists, [temperature][prompt]: the tokens, and whether the
    text ended.
    """
    torch.manual_seed(seed)
    written = [[None] * len(prompts) for _ in TEMPERATURES]
    ended = [[None] * len(prompts) for _ in TEMPERATURES]
    for n in sorted({len(prompt) for prompt in prompts}):  # a batch has prompts of one length
        which = [i for i, prompt in enumerate(prompts) if len(prompt) == n]
        idx = torch.tensor([prompts[i] for i in which])  # (B, n)
        for k, temperature in enumerate(TEMPERATURES):
            rows = model.generate(idx, LENGTH, temperature, logit_bias=bias)[:, n:].tolist()
            for i, row in zip(which, rows):
                ended[k][i] = eot in row
                written[k][i] = row[: row.index(eot)] if eot in row else row
    return written, ended


# --- measures of completions ---


def ngrams(tokens, n):
    return list(zip(*(tokens[i:] for i in range(n))))


def bleu(written, references):
    """Corpus BLEU-4 on tokens, with one reference for each completion (Papineni et al. 2002)."""
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
    """Precision, recall and F1 of rare tokens, each completion and its reference as multisets.

    rare: (V,), whether a token is rare.
    """
    of = [[Counter(t for t in text if rare[t]) for text in texts] for texts in (written, references)]
    matched = sum((w & r).total() for w, r in zip(*of))
    n_written, n_references = (sum(counter.total() for counter in texts) for texts in of)
    return {
        "rare_precision": matched / max(1, n_written),
        "rare_recall": matched / max(1, n_references),
        "rare_f1": 2 * matched / max(1, n_written + n_references),
    }


def measure_text(texts, held_out, bands):
    """Measures that need no reference. texts: lists of tokens. held_out: (V,), counts of held-out text."""
    tokens = np.concatenate(texts).astype(np.int64)
    pooled = {n: [gram for text in texts for gram in ngrams(text, n)] for n in (1, 2, 3)}
    fours = [ngrams(text, 4) for text in texts if len(text) > 3]
    # 1 is added to the held-out counts, so that a token they lack has a finite cost.
    p, q = np.bincount(tokens, minlength=len(held_out)), held_out + 1
    p, q = p[p > 0] / max(1, p.sum()), (q / q.sum())[p > 0]
    return {
        # The share of n-grams that are distinct (Li et al. 2016).
        **{f"distinct_{n}": len(set(grams)) / max(1, len(grams)) for n, grams in pooled.items()},
        # The share of 4-grams that the same text had before (seq-rep-4, Welleck et al. 2020).
        "repeated_4": float(np.mean([1 - len(set(grams)) / len(grams) for grams in fours])) if fours else 0.0,
        "distinct_tokens": len(set(tokens.tolist())),  # (uniq, Choi et al. 2020)
        "rare_share": float((bands[tokens] == 2).sum() / max(1, len(tokens))),
        "kl": float((p * np.log(p / q)).sum()),  # KL(written || held-out) of single tokens, in nats
    }


def judge(written, ended, references, held_out, bands):
    """All measures of completions, by name."""
    return {
        "bleu": bleu(written, references),
        **rare_matches(written, references, bands == 2),
        "ended": statistics.mean(ended),  # the share of completions that end before LENGTH tokens
        "length_ratio": sum(map(len, written)) / sum(map(len, references)),
        **measure_text(written, held_out, bands),
    }


# --- measures of prediction ---

TAUS = -0.5, -0.25, 0, 0.125, 0.25, 0.375, 0.5, 0.75, 1, 1.25


@torch.no_grad()
def predict(model, corpus, bias, n_rows=160):
    """How well a model predicts up to n_rows held-out rows, with bias (V,) added to its logits.

    "ce" is the mean cross-entropy of all, frequent, middle and rare targets, for each tau. There,
    tau * log(freq) is added to the logits as well. "top-1" takes the likeliest tokens as predictions of the
    rare targets. The model is on the device of bias.
    """
    W, device = len(corpus.held_out), bias.device
    x, y = map(torch.from_numpy, corpus.held_out[np.linspace(0, W - 1, min(W, n_rows)).astype(int)])
    log_freq, bands = shift(corpus.freq, -1).to(device), torch.from_numpy(corpus.bands)  # (V,) each
    ce, likeliest = {tau: [] for tau in TAUS}, []
    for inputs, targets in zip(x.split(2), y.split(2)):  # two rows at a time, to save memory
        inputs, targets = inputs.to(device), targets.to(device)  # (2, T) each
        t = targets[targets != -100]  # (n,)
        logits = model(inputs)[targets != -100] + bias  # (n, V)
        likeliest.append(logits.argmax(-1))
        for tau in TAUS:
            ce[tau].append(F.cross_entropy(logits + tau * log_freq, t, reduction="none"))
    targets, of_tau = y[y != -100], {}
    for tau, parts in ce.items():
        losses = torch.cat(parts).cpu().double()
        of_band = [losses[bands[targets] == band].mean().item() for band in range(len(BANDS))]
        of_tau[tau] = [losses.mean().item(), *of_band]
    guesses, targets = ([[token] for token in tokens.tolist()] for tokens in (torch.cat(likeliest), targets))
    return {"ce": of_tau, "top-1": rare_matches(guesses, targets, corpus.bands == 2)}


# --- the study ---


def one(task, method, seed, file, out):
    """Train and measure: an entry of the results for each shift, by name."""
    folder, corpus = finetune(task, method, seed, file, out), load(file)
    prompts, references = choose(openings(corpus))
    held_out, bands = held_out_counts(corpus), corpus.bands
    model, eot = GPT.from_pretrained(folder).eval(), load_tokenizer(folder).eot_token
    entries = {}
    for x in METHODS[method][1]:
        bias = shift(corpus.freq, x)
        texts = zip(TEMPERATURES, *complete(model, prompts, seed, eot, bias))
        judged = {t: judge(written, ended, references, held_out, bands) for t, written, ended in texts}
        name = name_of(task, f"{method}, shift {x}" if x else method, seed)
        entries[name] = {"text": judged} | predict(model, corpus, bias)
    return entries


def rounded(value):
    if isinstance(value, dict):
        return {str(key): rounded(of) for key, of in value.items()}
    if isinstance(value, list):
        return [rounded(of) for of in value]
    return float(f"{value:.5g}") if isinstance(value, float) else value


def save(results):
    """Write the results, an entry on each line."""
    lines = [f" {json.dumps(name)}: {json.dumps(rounded(results[name]))}" for name in sorted(results)]
    text = "{\n" + ",\n".join(lines) + "\n}\n"
    write_safely(RERUN, lambda path: path.write_text(text, encoding="utf-8"))


def measure(jobs, folder, out):
    """Do the runs that the results lack, several side by side."""
    results = json.loads(RERUN.read_bytes()) if RERUN.exists() else {}
    files = prepare(folder, out)
    for task, file in files.items():
        corpus = load(file)
        _, references = choose(openings(corpus))
        measures = measure_text(references, held_out_counts(corpus), corpus.bands)
        results[task] = {"references": measures, "n": len(references)}
    todo = [run for run in runs() if run[0] in files and name_of(*run) not in results]
    # Each process has one thread, so that the numbers do not depend on how many cores there are.
    with ProcessPoolExecutor(jobs, multiprocessing.get_context("spawn"), torch.set_num_threads, (1,)) as pool:
        pending = [pool.submit(one, *run, files[run[0]], out) for run in todo]
        for number, job in enumerate(as_completed(pending), 1):
            results |= job.result()
            save(results)
            print(f"{number} of {len(todo)}: {', '.join(job.result())}", flush=True)


if __name__ == "__main__":
    p = argparse.ArgumentParser(description="Measure what PDL is good for.")
    p.add_argument("--tasks", default="tasks", help="folder of style.jsonl and webnlg.jsonl (default: tasks)")
    p.add_argument("--out_dir", type=Path, default="out-study", help="for the models (default: out-study)")
    p.add_argument("--jobs", type=int, default=os.cpu_count(), help="runs side by side (default: one a core)")
    args = p.parse_args()
    measure(args.jobs, args.tasks, args.out_dir.absolute())
