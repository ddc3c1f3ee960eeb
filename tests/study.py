"""
What PDL does to a model, measured: finetunes tiny/ over alpha, seeds, texts and settings, and prints the tables of the README.

    python tests/study.py             # the runs that are not in assets/study.json yet, one process a core; then the tables
    python tests/study.py --tables    # only prints
    python tests/study.py --figure    # draws assets/study.svg; needs matplotlib

Each run is a train.py of its own, 200 steps, and what its report.json says is one entry. Both texts come with Python, so
that everybody has them, in the version of their Python: its language reference, and, for conditional generation,
the standard library's functions, the body to be written from the signature and the docstring.
"""

import argparse
import ast
import json
import os
import statistics
import subprocess
import sys
import tempfile
import textwrap
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path

import numpy as np
import torch

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
from count import load_tokenizer
from model import GPT, replace
from pdl import pdl_weights
from train import BANDS, Split, evaluate, frequency_bands, load_tokens

RESULTS = ROOT / "assets" / "study.json"
ALPHAS = 0, 0.25, 0.5, 0.75, 1, 1.5
SEEDS = 1, 2, 3
TEXTS = {"reference": "the Python language reference", "functions": "docstring to code"}
LEARNING_RATE = 3e-3  # the best of four for alpha 0, on both texts: the runs named "learning rate"
SETTINGS = {"eps 1": ["--eps", 1], "probabilities": ["--normalize"], "probabilities, eps 1": ["--normalize", "--eps", 1]}


def runs():
    """Every run of the study: its name, its text, its flags."""
    for text in TEXTS:
        for alpha in 0, 1:
            for lr in 3e-4, 1e-3, 1e-2:
                yield f"{text}, alpha {alpha}, learning rate {lr:g}", text, ["--alpha", alpha, "--seed", 1, "--learning_rate", lr]
    for seed in SEEDS:
        for text in TEXTS:
            for alpha in ALPHAS:
                yield f"{text}, alpha {alpha}, seed {seed}", text, ["--alpha", alpha, "--seed", seed, "--learning_rate", LEARNING_RATE]
    for alpha in 0.5, 1:
        for setting, flags in SETTINGS.items():
            yield f"reference, alpha {alpha}, {setting}", "reference", ["--alpha", alpha, "--seed", 1, "--learning_rate", LEARNING_RATE, *flags]


def functions():
    """The standard library's functions as pairs: signature and docstring, body. Not the long ones: a context has 256 tokens."""
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
                lines = textwrap.dedent("\n".join(source.splitlines()[node.lineno - 1 : node.end_lineno])).splitlines(keepends=True)
                n = node.body[0].end_lineno - node.lineno + 1
                prompt, completion = "".join(lines[:n]), "".join(lines[n:])
                if len(prompt) <= 400 and len(completion) <= 600:
                    yield {"prompt": prompt, "completion": completion}


def measure(jobs):
    results = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    RESULTS.parent.mkdir(exist_ok=True)
    env = os.environ | {"OMP_NUM_THREADS": str(max(1, os.cpu_count() // jobs))}
    with tempfile.TemporaryDirectory() as work, ThreadPoolExecutor(jobs) as pool:
        pairs = Path(work, "functions.jsonl")
        pairs.write_text("".join(json.dumps(pair) + "\n" for pair in functions()))

        def one(name, text, flags):
            out = Path(work, name)
            flags = ["--init_from", ROOT / "tiny", "--max_iters", 200, "--eval_interval", 100, "--out_dir", out, *flags]
            if text == "functions":
                flags += ["--data", pairs]
            subprocess.run([sys.executable, ROOT / "train.py", *map(str, flags)], env=env, check=True, stdout=subprocess.DEVNULL)
            report = json.loads((out / "report.json").read_text())
            return name, {key: report[key] for key in ("before", "after", "text", "share_of_weight", "first_sample")}

        for job in as_completed([pool.submit(one, *run) for run in runs() if run[0] not in results]):
            name, result = job.result()
            results[name] = result
            replace(RESULTS, lambda path: path.write_text(json.dumps(results, indent=1) + "\n"))
            print(f"{name}: held-out cross-entropy {results[name]['after']['val_ce']:.3f}", flush=True)


if __name__ == "__main__":
    p = argparse.ArgumentParser(description="Measure what PDL does.")
    p.add_argument("--jobs", type=int, default=os.cpu_count(), help="runs side by side (default: one a core)")
    args = p.parse_args()
    measure(args.jobs)
