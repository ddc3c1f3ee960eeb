"""
What PDL does to a model, measured: finetunes over alpha, seeds, texts and settings, and prints the tables of the README.

    python tests/study.py             # does what is not done yet, results in assets/study.json
    python tests/study.py --tables    # only prints

Each run is a train.py of its own and its report.json one entry. --figure draws assets/study.svg and needs matplotlib.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "assets" / "study.json"
ALPHAS = 0, 0.25, 0.5, 0.75, 1, 1.5
SEEDS = 1, 2, 3
TEXTS = {"Python reference": None, "Python source": "stdlib.txt"}


def runs():
    """Every run of the study: a name and its flags."""
    for text in TEXTS:
        for alpha in ALPHAS:
            for seed in SEEDS:
                yield f"{text}, alpha {alpha}, seed {seed}", text, ["--alpha", alpha, "--seed", seed]
    text = "Python reference"
    for lr in 3e-4, 3e-3:  # below and above the default, which suits alpha 0
        for alpha in 0, 1:
            yield f"{text}, alpha {alpha}, learning rate {lr:g}", text, ["--alpha", alpha, "--learning_rate", lr, "--seed", 1]
    for eps in 1e-6, 1:
        for normalize in ["--normalize"], []:
            yield f"{text}, alpha 1, eps {eps:g}{', probabilities' * len(normalize)}", text, ["--alpha", 1, "--eps", eps, *normalize, "--seed", 1]


def measure(init_from, work):
    results = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    stdlib = sorted(Path(os.__file__).parent.glob("*.py"))
    (work / "stdlib.txt").write_text("\n".join(f.read_text(encoding="utf-8") for f in stdlib)[:2_000_000], encoding="utf-8")
    for name, text, flags in runs():
        if name in results:
            continue
        data = ["--data", TEXTS[text]] if TEXTS[text] else []
        command = [sys.executable, ROOT / "train.py", "--init_from", init_from, *data, *map(str, flags)]
        subprocess.run(command, cwd=work, check=True, stdout=subprocess.DEVNULL)
        report = json.loads((work / "out/report.json").read_text())
        results[name] = {key: report[key] for key in ("before", "after", "text", "share_of_weight")}
        RESULTS.parent.mkdir(exist_ok=True)
        part = RESULTS.with_suffix(".part")
        part.write_text(json.dumps(results, indent=1) + "\n")
        os.replace(part, RESULTS)
        print(f"{name}: {results[name]['after']['val_ce']:.3f}", flush=True)


COLUMNS = {
    "cross-entropy": lambda r: r["after"]["val_ce"],
    "frequent": lambda r: r["after"]["ce_by_band"]["frequent"],
    "middle": lambda r: r["after"]["ce_by_band"]["middle"],
    "rare": lambda r: r["after"]["ce_by_band"]["rare"],
    "accuracy": lambda r: r["after"]["accuracy"],
    "distinct-2": lambda r: r["text"]["sampled"]["distinct_2"],
    "rare share": lambda r: r["text"]["sampled"]["rare_share"],
    "KL": lambda r: r["text"]["sampled"]["kl"],
    "repeated-4, greedy": lambda r: r["text"]["greedy"]["repeated_4"],
}


def tables(results):
    for text in TEXTS:
        print(f"\n**{text}**\n\n| alpha | {' | '.join(COLUMNS)} |\n|{'---|' * (len(COLUMNS) + 1)}")
        for alpha in ALPHAS:
            group = [results[name] for s in SEEDS if (name := f"{text}, alpha {alpha}, seed {s}") in results]
            if group:
                cells = [[column(r) for r in group] for column in COLUMNS.values()]
                print(f"| {alpha} | " + " | ".join(f"{statistics.mean(c):.3f} ± {statistics.stdev(c) if len(c) > 1 else 0:.3f}" for c in cells) + " |")
    print(f"\n| one run each | {' | '.join(COLUMNS)} |\n|{'---|' * (len(COLUMNS) + 1)}")
    for name, r in results.items():
        if "seed" not in name:
            print(f"| {name} | " + " | ".join(f"{column(r):.3f}" for column in COLUMNS.values()) + " |")


def figure(results):
    import matplotlib.pyplot as plt

    fig, axes = plt.subplots(1, 2, figsize=(10, 4))
    text = "Python reference"
    for ax, names, label in ((axes[0], ("frequent", "middle", "rare", "cross-entropy"), "held-out cross-entropy, change against alpha 0 (nats)"),
                             (axes[1], ("distinct-2", "rare share", "repeated-4, greedy"), "of the text it writes")):
        for name in names:
            points = {a: [COLUMNS[name](results[f"{text}, alpha {a}, seed {s}"]) for s in SEEDS] for a in ALPHAS}
            base = statistics.mean(points[0]) if ax is axes[0] else 0
            ax.errorbar(ALPHAS, [statistics.mean(p) - base for p in points.values()], [statistics.stdev(p) for p in points.values()], marker="o", label=name)
        ax.set_xlabel("alpha")
        ax.set_title(label, fontsize=10)
        ax.legend(frameon=False)
    fig.tight_layout()
    fig.savefig(RESULTS.with_name("study.svg"))


if __name__ == "__main__":
    p = argparse.ArgumentParser(description="Measure what PDL does.")
    p.add_argument("--init_from", default=ROOT / "tiny")
    p.add_argument("--tables", action="store_true", help="print, run nothing")
    p.add_argument("--figure", action="store_true", help="draw assets/study.svg")
    args = p.parse_args()
    if not args.tables and not args.figure:
        with tempfile.TemporaryDirectory() as work:
            measure(args.init_from, Path(work))
    results = json.loads(RESULTS.read_text())
    figure(results) if args.figure else tables(results)
