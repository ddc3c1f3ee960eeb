"""
What PDL does to a model, measured: finetunes tiny/ over alpha, seeds, texts; writes assets/results.md.

    python tests/study.py             # the runs that assets/study.json has not yet; then the tables
    python tests/study.py --tables    # only the tables
    python tests/study.py --figure    # draws assets/study.svg; needs matplotlib

Each run is a train.py of its own, 200 steps, and what its report.json says is one entry. Both texts come
with Python, so that everybody has them, in their version of it: its language reference, and, for conditional
generation, the standard library's functions, the body to be written from signature and docstring.
"""

import argparse
import ast
import contextlib
import json
import os
import shutil
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
from count import BANDS, frequency_bands, load_tokenizer, open_corpus
from model import GPT, replace
from pdl import pdl_weights
from sample import evaluate, measure_text, shift

RESULTS = ROOT / "assets" / "study.json"
ALPHAS = 0, 0.25, 0.5, 0.75, 1, 1.5
SEEDS = 1, 2, 3
TEXTS = {"reference": "the Python language reference", "functions": "docstring to code"}
LEARNING_RATE = 3e-3  # the best of four for alpha 0, on both texts: the runs named "learning rate"
AGAIN = ("reference", 0.5, 2), ("functions", 0.25, 1)
SETTINGS = {
    "eps 1": ["--eps", 1],
    "probabilities": ["--normalize"],
    "probabilities, eps 1": ["--normalize", "--eps", 1],
}


def runs():
    """Every run of the study: its name, its text, its flags."""
    for text in TEXTS:
        for alpha in 0, 1:
            for lr in 3e-4, 1e-3, 1e-2:
                flags = ["--alpha", alpha, "--seed", 1, "--learning_rate", lr]
                yield f"{text}, alpha {alpha}, learning rate {lr:g}", text, flags
    for seed in SEEDS:
        for text in TEXTS:
            for alpha in ALPHAS:
                yield (
                    f"{text}, alpha {alpha}, seed {seed}",
                    text,
                    ["--alpha", alpha, "--seed", seed, "--learning_rate", LEARNING_RATE],
                )
    for text, alpha, seed in AGAIN:
        flags = ["--alpha", alpha, "--seed", seed, "--learning_rate", LEARNING_RATE]
        yield f"{text}, alpha {alpha}, seed {seed}, again", text, flags
    for alpha in 0.5, 1:
        for setting, flags in SETTINGS.items():
            yield (
                f"reference, alpha {alpha}, {setting}",
                "reference",
                ["--alpha", alpha, "--seed", 1, "--learning_rate", LEARNING_RATE, *flags],
            )


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


def measure(jobs):
    results = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    RESULTS.parent.mkdir(exist_ok=True)
    env = os.environ | {"OMP_NUM_THREADS": str(max(1, os.cpu_count() // jobs))}
    with tempfile.TemporaryDirectory() as work, ThreadPoolExecutor(jobs) as pool:
        pairs = Path(work, "functions.jsonl")
        pairs.write_text("".join(json.dumps(pair) + "\n" for pair in functions()), encoding="utf-8")

        def one(name, text, flags):
            out = Path(work, name)
            flags = [
                "--init_from",
                ROOT / "tiny",
                "--max_iters",
                200,
                "--eval_interval",
                100,
                "--out_dir",
                out,
                *flags,
            ]
            if text == "functions":
                flags += ["--data", pairs]
            subprocess.run(
                [sys.executable, ROOT / "train.py", *map(str, flags)],
                env=env,
                check=True,
                stdout=subprocess.DEVNULL,
            )
            report = json.loads((out / "report.json").read_bytes())
            result = {
                key: report[key] for key in ("before", "after", "text", "share_of_weight", "first_sample")
            }
            if ", alpha 0, seed" in name:
                result["shifted"] = shifted(out, text, pairs)
            shutil.rmtree(out)
            return name, result

        for text in TEXTS.keys() - results.keys():
            results[text] = without_training(text, pairs)
        for job in as_completed([pool.submit(one, *run) for run in runs() if run[0] not in results]):
            name, result = job.result()
            results[name] = result
            replace(
                RESULTS, lambda path: path.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
            )
            print(f"{name}: held-out cross-entropy {result['after']['val_ce']:.3f}", flush=True)


def load(text, pairs):
    tokenizer = load_tokenizer(ROOT / "tiny")
    path = pairs if text == "functions" else None
    corpus = open_corpus(path, tokenizer, 256, pairs.parent / "token_cache")
    counts = corpus.train_counts(tokenizer.n_vocab)
    return corpus, counts, frequency_bands(counts)


@torch.no_grad()
def shifted(folder, text, pairs):
    """Cross-entropies of a plain model that gets log w(t) added to its logits: where Eq. 5 is least."""
    model, (corpus, counts, bands) = GPT.from_pretrained(folder).eval(), load(text, pairs)
    x, y = map(torch.from_numpy, corpus.sequences(corpus.held_out(320)))
    ce = {alpha: [] for alpha in ALPHAS}
    for inputs, targets in zip(x.split(16), y.split(16)):
        logits = model(inputs)[targets != -100]
        for alpha in ALPHAS:
            shifted_logits = logits + shift(counts, alpha)
            ce[alpha].append(F.cross_entropy(shifted_logits, targets[targets != -100], reduction="none"))
    ce, band = {alpha: torch.cat(parts) for alpha, parts in ce.items()}, torch.from_numpy(bands)[y[y != -100]]
    return {
        alpha: {"all": v.mean().item()} | {name: v[band == i].mean().item() for i, name in enumerate(BANDS)}
        for alpha, v in ce.items()
    }


def without_training(text, pairs):
    """Each band's share of the loss before the first step, and the measures of the real text."""
    model, (corpus, counts, bands) = GPT.from_pretrained(ROOT / "tiny"), load(text, pairs)
    begins = corpus.train_starts(np.linspace(0, corpus.n_train_starts - 1, 200).astype(int))
    windows = np.stack((begins, np.minimum(begins + 257, corpus.runs[-1, 1])), axis=1)
    ce = evaluate(model, corpus, windows, 16, contextlib.nullcontext()).ce
    losses = {alpha: pdl_weights(counts, alpha) * ce for alpha in ALPHAS}
    of_band = lambda loss: {
        name: (loss[bands == i].sum() / loss.sum()).item() for i, name in enumerate(BANDS)
    }
    _, held_out = corpus.sequences(corpus.windows)
    held_out = np.bincount(held_out[held_out != -100], minlength=len(counts))
    real = measure_text([tokens[:128] for _, tokens in corpus.openings(32)], held_out, bands)
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
    lines = [header, ["---"] * len(header), *rows]
    return "".join(f"| {' | '.join(map(str, line))} |\n" for line in lines) + "\n"


def results_page(results):
    """assets/results.md: every table, from assets/study.json alone."""
    page = (
        "# What was measured\n\nWritten by `python tests/study.py --tables` from [study.json](study.json); "
        "README.md says what it means.\n"
    )
    for text, title in TEXTS.items():
        page += (
            f"\n## {title[0].upper() + title[1:]}\n\nMean ± standard deviation of {len(SEEDS)} seeds. "
            "The first four columns: held-out cross-entropy, nats.\n\n"
        )
        rows = []
        for alpha in ALPHAS:
            row = [alpha]
            for name, (_, digits) in COLUMNS.items():
                values = of_seeds(results, text, alpha, name)
                row.append(f"{statistics.mean(values):.{digits}f} ± {statistics.stdev(values):.{digits}f}")
            rows.append(row)
        real = (
            f"{of_text(results, text, name):.{COLUMNS[name][1]}f}" if name in MEASURES else ""
            for name in COLUMNS
        )
        page += table(["alpha", *COLUMNS], [*rows, ["the text itself", *real]])
        page += "PDL, and the plain model (alpha 0) with log w(t) added to its logits:\n\n"
        rows = []
        for alpha in ALPHAS:
            values = [
                of(results, text, alpha, name) for name in ("all", "rare") for of in (of_seeds, of_shifted)
            ]
            rows.append([alpha, *(f"{statistics.mean(of_one):.2f}" for of_one in values)])
        page += table(["alpha", "all: PDL", "plain + log w", "rare: PDL", "plain + log w"], rows)
        page += "The share of the loss before the first step:\n\n"
        shares = results[text]["share_of_loss"].items()
        page += table(
            ["alpha", *BANDS], [[alpha, *(f"{x:.1%}" for x in share.values())] for alpha, share in shares]
        )

    def rows(names):
        return [[n, *(f"{of(results[n]):.{digits}f}" for of, digits in COLUMNS.values())] for n in names]

    page += (
        "## Two runs again\n\nAll other runs on this page are of an earlier version, with bfloat16 products. "
        "Two of them again, with this one, in float32.\nIt draws samples differently, and of pairs that are "
        "longer than a sequence it cuts the prompt.\n\n"
    )
    again = [f"{text}, alpha {alpha}, seed {seed}" for text, alpha, seed in AGAIN]
    page += table(["run", *COLUMNS], rows(name + which for name in again for which in ("", ", again")))
    page += "## One run each, seed 1\n\n"
    names = [
        name
        for name in results
        if "learning rate" in name or name.endswith(tuple(f", {s}" for s in SETTINGS))
    ]
    return page + table(["run", *COLUMNS], rows(names)).rstrip("\n") + "\n"


def figure(results):
    """assets/study.svg: what alpha does to the prediction of each band, and at what price."""
    import matplotlib.pyplot as plt

    plt.rcParams.update(
        {
            "svg.hashsalt": "",
            "svg.fonttype": "none",
            "font.size": 9,
            "axes.spines.top": False,
            "axes.spines.right": False,
        }
    )
    figure, axes = plt.subplots(1, len(TEXTS), figsize=(9, 3.4), sharex=True)
    for ax, (text, title) in zip(axes, TEXTS.items()):
        ax.set_title(title, fontsize=9, loc="left")
        for name, color in zip(
            ("frequent", "middle", "rare", "all"), ("tab:blue", "tab:orange", "tab:green", "black")
        ):
            values = [of_seeds(results, text, alpha, name) for alpha in ALPHAS]
            ax.errorbar(
                ALPHAS,
                list(map(statistics.mean, values)),
                list(map(statistics.stdev, values)),
                marker="o",
                markersize=3,
                capsize=2,
                label=f"{name} tokens",
                color=color,
            )
        ax.set_xlabel("alpha")
    axes[0].set_ylabel("held-out cross-entropy, nats")
    axes[0].legend(frameon=False, fontsize=8, loc="upper left")
    figure.tight_layout()
    replace(
        RESULTS.with_name("study.svg"),
        lambda path: figure.savefig(path, format="svg", metadata={"Date": None}),
    )


if __name__ == "__main__":
    p = argparse.ArgumentParser(description="Measure what PDL does.")
    p.add_argument("--jobs", type=int, default=os.cpu_count(), help="runs side by side (default: one a core)")
    p.add_argument("--tables", action="store_true", help="run nothing, write assets/results.md")
    p.add_argument("--figure", action="store_true", help="run nothing, draw assets/study.svg")
    args = p.parse_args()
    if not args.tables and not args.figure:
        measure(args.jobs)
    results = json.loads(RESULTS.read_bytes())
    if args.figure:
        figure(results)
    else:
        page = results_page(results)
        replace(RESULTS.with_name("results.md"), lambda path: path.write_text(page, encoding="utf-8"))
