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
import contextlib
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
import torch.nn.functional as F

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
from count import load_tokenizer
from model import GPT, replace
from pdl import pdl_weights
from sample import measure_text
from train import BANDS, Pairs, Split, evaluate, frequency_bands, load_tokens

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
            result = {key: report[key] for key in ("before", "after", "text", "share_of_weight", "first_sample")}
            return name, result | ({"shifted": shifted(out, text, pairs)} if ", alpha 0, seed" in name else {})

        for text in TEXTS.keys() - results.keys():
            results[text] = without_training(text, pairs)
        for job in as_completed([pool.submit(one, *run) for run in runs() if run[0] not in results]):
            name, result = job.result()
            results[name] = result
            replace(RESULTS, lambda path: path.write_text(json.dumps(results, indent=1) + "\n"))
            print(f"{name}: held-out cross-entropy {result['after']['val_ce']:.3f}", flush=True)


def load(text, pairs):
    tokenizer = load_tokenizer(ROOT / "tiny")
    split = Pairs(pairs, tokenizer, 256) if text == "functions" else Split(load_tokens(None, tokenizer, None), 256, text)
    counts = split.train_counts(tokenizer.n_vocab)
    return split, counts, frequency_bands(counts)


@torch.no_grad()
def shifted(folder, text, pairs):
    """Cross-entropies of a plain model that gets log w(t) added to its logits: where Eq. 5 has its minimum, without training for it.

    For a given context, sum_t p(t) w(t) log q(t) is largest at q ~ w p. Never-counted tokens are taken as counted once.
    """
    model, (split, counts, bands) = GPT.from_pretrained(folder).eval(), load(text, pairs)
    x, y = split.sequences(split.val_sample(320))
    log_w = -torch.from_numpy(np.maximum(counts, 1)).log().float()
    ce = {alpha: [] for alpha in ALPHAS}
    for inputs, targets in zip(x.split(16), y.split(16)):
        logits = model(inputs)[targets != -100]
        for alpha in ALPHAS:
            ce[alpha].append(F.cross_entropy(logits + alpha * log_w, targets[targets != -100], reduction="none"))
    ce, band = {alpha: torch.cat(parts) for alpha, parts in ce.items()}, bands[y[y != -100]]
    return {alpha: {"all": v.mean().item()} | {name: v[band == i].mean().item() for i, name in enumerate(BANDS)} for alpha, v in ce.items()}


def without_training(text, pairs):
    """What tiny/ and the text itself say: each band's share of the loss before the first step, and the measures of the real text."""
    model, (split, counts, bands) = GPT.from_pretrained(ROOT / "tiny"), load(text, pairs)
    starts = split.train_starts(np.linspace(0, split.n_train_starts - 1, 200).astype(int))
    ce, _, targets = evaluate(model, split, starts, 16, torch.device("cpu"), contextlib.nullcontext())
    losses = {alpha: pdl_weights(counts, alpha)[targets] * ce for alpha in ALPHAS}
    of_band = lambda loss: {name: (loss[bands[targets] == i].sum() / loss.sum()).item() for i, name in enumerate(BANDS)}
    _, held_out = split.sequences(split.val_starts)
    real = measure_text([tokens[:128] for _, tokens in split.openings(32)], held_out[held_out != -100], bands, len(counts))
    return {"share_of_loss": {alpha: of_band(loss) for alpha, loss in losses.items()}, "text": real}


COLUMNS = {  # name, where a run's result has it, digits
    "all": (lambda r: r["after"]["val_ce"], 2),
    "frequent": (lambda r: r["after"]["ce_by_band"]["frequent"], 2),
    "middle": (lambda r: r["after"]["ce_by_band"]["middle"], 2),
    "rare": (lambda r: r["after"]["ce_by_band"]["rare"], 2),
    "accuracy": (lambda r: 100 * r["after"]["accuracy"], 1),
    "distinct-2": (lambda r: r["text"]["sampled"]["distinct_2"], 3),
    "rare tokens": (lambda r: 100 * r["text"]["sampled"]["rare_share"], 1),
    "KL": (lambda r: r["text"]["sampled"]["kl"], 2),
    "repeated-4, greedy": (lambda r: r["text"]["greedy"]["repeated_4"], 2),
}
MEASURES = tuple(COLUMNS)[5:]  # those of text, which the real text has, too


def of_seeds(results, text, alpha, column):
    return [COLUMNS[column][0](results[f"{text}, alpha {alpha}, seed {seed}"]) for seed in SEEDS]


def of_shifted(results, text, alpha, name):
    return [results[f"{text}, alpha 0, seed {seed}"]["shifted"][str(alpha)][name] for seed in SEEDS]


def of_text(results, text, column):
    real = results[text]["text"]
    return COLUMNS[column][0]({"text": {"sampled": real, "greedy": real}})


def table(header, rows):
    print(f"\n| {' | '.join(header)} |\n|{'---|' * len(header)}", *(f"| {' | '.join(map(str, row))} |" for row in rows), sep="\n")


def tables(results):
    for text, title in TEXTS.items():
        print(f"\n**{title}**, mean ± standard deviation of {len(SEEDS)} seeds")
        rows = []
        for alpha in ALPHAS:
            cells = ((of_seeds(results, text, alpha, name), digits) for name, (_, digits) in COLUMNS.items())
            rows.append([alpha] + [f"{statistics.mean(values):.{digits}f} ± {statistics.stdev(values):.{digits}f}" for values, digits in cells])
        real = (f"{of_text(results, text, name):.{COLUMNS[name][1]}f}" if name in MEASURES else "" for name in COLUMNS)
        rows.append(["the text itself", *real])
        table(["alpha", *COLUMNS], rows)
    for text, title in TEXTS.items():
        print(f"\n**{title}**, PDL and the plain model (alpha 0) with log w(t) added to its logits")
        pairs = lambda alpha, name: (of_seeds(results, text, alpha, name), of_shifted(results, text, alpha, name))
        rows = [[alpha] + [f"{statistics.mean(values):.2f}" for name in ("all", "rare") for values in pairs(alpha, name)] for alpha in ALPHAS]
        table(["alpha", "all: PDL", "plain + log w", "rare: PDL", "plain + log w"], rows)
    for text, title in TEXTS.items():
        print(f"\n**{title}**, share of the loss before the first step")
        table(["alpha", *BANDS], [[alpha, *(f"{share:.1%}" for share in shares.values())] for alpha, shares in results[text]["share_of_loss"].items()])
    for alpha in 0, 0.5, 1:
        first = results[f"reference, alpha {alpha}, seed {SEEDS[0]}"]["first_sample"]
        print(f"\nalpha {alpha}:\n\n```\n[{first['prompt']}]{first['sampled']}\n```")
    print("\n**One run each**, seed 1")
    names = [name for name in results if "learning rate" in name or any(name.endswith(", " + setting) for setting in SETTINGS)]
    table(["", *COLUMNS], [[name] + [f"{column(results[name]):.{digits}f}" for column, digits in COLUMNS.values()] for name in names])


def figure(results):
    import matplotlib.pyplot as plt

    plt.rcParams.update({"svg.hashsalt": "", "svg.fonttype": "none", "font.size": 9, "axes.spines.top": False, "axes.spines.right": False})
    figure, axes = plt.subplots(len(TEXTS), 2, figsize=(9, 6.4), sharex=True)
    panels = {"held-out cross-entropy, nats": ("frequent", "middle", "rare", "all"), "the text it writes": ("distinct-2", "rare tokens", "repeated-4, greedy")}
    for row, (text, title) in zip(axes, TEXTS.items()):
        for ax, (what, columns) in zip(row, panels.items()):
            ax.set_title(f"{title}: {what}", fontsize=9, loc="left")
            for name in columns:
                scale = 0.01 if name == "rare tokens" else 1
                values = [[scale * value for value in of_seeds(results, text, alpha, name)] for alpha in ALPHAS]
                line = ax.errorbar(ALPHAS, list(map(statistics.mean, values)), list(map(statistics.stdev, values)), marker="o", markersize=3, capsize=2,
                                   label=name + ", share" * (name == "rare tokens"), color="black" if name == "all" else None)
                if name in ("all", "rare"):
                    ax.plot(ALPHAS, [statistics.mean(of_shifted(results, text, alpha, name)) for alpha in ALPHAS], "--", color=line[0].get_color(), linewidth=1)
                if name in MEASURES:
                    ax.axhline(scale * of_text(results, text, name), color=line[0].get_color(), linestyle=":", linewidth=1)
            ax.legend(frameon=False, fontsize=8, loc="upper left", ncols=1 if "all" in columns else 3)
            if "all" not in columns:
                ax.set_ylim(0, 1.15)
    axes[-1][0].set_xlabel("alpha; dashed: plain finetuning, log w(t) added to the logits")
    axes[-1][1].set_xlabel("alpha; dotted: the same measure of the real text")
    figure.tight_layout()
    replace(RESULTS.with_name("study.svg"), lambda path: figure.savefig(path, format="svg", metadata={"Date": None}))


if __name__ == "__main__":
    p = argparse.ArgumentParser(description="Measure what PDL does.")
    p.add_argument("--jobs", type=int, default=os.cpu_count(), help="runs side by side (default: one a core)")
    p.add_argument("--tables", action="store_true", help="run nothing, print the tables")
    p.add_argument("--figure", action="store_true", help="run nothing, draw assets/study.svg")
    args = p.parse_args()
    if not args.tables and not args.figure:
        measure(args.jobs)
    results = json.loads(RESULTS.read_text())
    figure(results) if args.figure else tables(results)
