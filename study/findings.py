"""
What the study comes to: tables and a figure, from assets/study.json alone.

    python tests/findings.py             # writes assets/results.md
    python tests/findings.py --figure    # draws assets/study.svg; needs matplotlib
"""

import argparse
import functools
import itertools
import json
import math
import statistics
from typing import NamedTuple

import numpy as np

from study import BANDS, FIFTH, LONGER, METHODS, RATES, RESULTS, RISING, SHIFTED, TASKS, TEMPERATURES
from study import VARIANTS, name_of, replace
from sample import first_near_best  # which study made importable

T95 = {1: 12.7062, 2: 4.3027, 3: 3.1824, 4: 2.7764}  # Student's t by degrees of freedom, for 95% intervals


# --- comparing two methods ---


class Difference(NamedTuple):
    """The mean of differences that are paired by seed, and half the width of its 95% interval."""

    mean: float
    half: float
    n: int

    @classmethod
    def of(cls, values):
        n = len(values)
        half = T95[n - 1] * statistics.stdev(values) / math.sqrt(n) if n > 1 else math.inf
        return cls(statistics.mean(values), half, n)

    def sign(self):
        """+1 or -1 if the interval excludes 0, else 0."""
        return 0 if abs(self.mean) <= self.half else int(math.copysign(1, self.mean))

    def __format__(self, digits):
        return f"{self.mean:+{digits}}" + (f" ± {self.half:{digits}}" if self.n > 1 else " (one seed)")


def runs_of(results, task, method):
    """The entries of a method, by seed."""
    return {s: results[name] for s in range(1, 6) if (name := name_of(task, method, s)) in results}


def compare(results, tasks, method, measure, base="plain"):
    """The Difference between two methods in measure(run, run of the base); None without any run.

    Of several tasks that of their mean, over those that have both methods.
    """
    of_task = []
    for task in [tasks] if isinstance(tasks, str) else tasks:
        of_method, of_base = runs_of(results, task, method), runs_of(results, task, base)
        seeds = of_method.keys() & of_base.keys()
        of_task += [{seed: measure(of_method[seed], of_base[seed]) for seed in seeds}] if seeds else []
    if of_task:
        seeds = set.intersection(*map(set, of_task))
        return Difference.of([statistics.mean(of[seed] for of in of_task) for seed in sorted(seeds)])


def nats(band):
    """How much lower the held-out cross-entropy of a band is."""
    i = ("all", *BANDS).index(band)
    return lambda run, base: base["ce"]["0"][i] - run["ce"]["0"][i]


def rare_nats_at_equal_cost(run, base):
    """How much lower that of rare tokens is than the base's, shifted so far that those of all are level."""
    taus = -0.5, -0.25, 0, 0.25  # cubics through these
    of_all, rare = (np.polyfit(taus, [base["ce"][str(tau)][i] for tau in taus], 3) for i in (0, 3))
    tau, reached = np.linspace(0, -0.5, 501), run["ce"]["0"]
    return float(np.interp(reached[0], np.polyval(of_all, tau), np.polyval(rare, tau)) - reached[3])


def at_temperature(t, name):
    return lambda run, base: run["text"][str(t)][name] - base["text"][str(t)][name]


def at_equal_diversity(name):
    """How much higher a measure is, as the mean over the values of distinct-2 that both methods reach.

    Each method is a curve through its temperatures, straight between them.
    """

    def measure(run, base):
        curves = [sorted((at["distinct_2"], at[name]) for at in of["text"].values()) for of in (run, base)]
        low, high = max(curve[0][0] for curve in curves), min(curve[-1][0] for curve in curves)
        of_run, of_base = (np.interp(np.linspace(low, high, 1001), *zip(*curve)) for curve in curves)
        return float((of_run - of_base).mean())

    return measure


def rise(run):
    """By how much held-out cross-entropy is higher at the end of a run than at its best."""
    return run["curve"][-1] - min(run["curve"])


# --- the paper's claims ---

# What the paper says, where, and a difference that is above 0 if that is so: between which methods, in what.
EPSILON = "epsilon hardly matters"  # a claim of no difference: how large it may be
CLAIMS = (
    ("rare tokens are learned better", "abstract", "PDL 0.25", "plain",
     nats("rare"), "nats of rare tokens"),
    ("... than by shifting the plain model's logits", "", "PDL 0.25", "plain",
     rare_nats_at_equal_cost, "nats of rare tokens, when both lose as many of all"),
    ("text becomes more diverse", "abstract", "PDL 0.25", "plain",
     at_temperature(0.5, "distinct_2"), "distinct-2 at temperature 0.5"),
    ("... and is better at equal diversity", "abstract", "PDL 0.25", "plain",
     at_equal_diversity("bleu"), "BLEU-4"),
    ("... and more specific and informative", "abstract", "PDL 0.25", "plain",
     at_equal_diversity("rare_f1"), "F1 of rare tokens"),
    ("... than by shifting the plain model's logits", "", "PDL 0.25", "plain, shift 0.25",
     at_equal_diversity("rare_f1"), "F1 of rare tokens"),
    ("...", "", "PDL 0.25", "plain, shift 0.25", at_equal_diversity("bleu"), "BLEU-4"),
    ("too large an alpha costs fluency", "4.2", "plain", "PDL 0.5",
     at_equal_diversity("bleu"), "BLEU-4 lost at alpha 0.5"),
    (EPSILON, "4.2", "PDL 0.5, eps 1", "PDL 0.5",
     nats("all"), "nats of all tokens, 1 instead of 1e-6"),
    ("counts of the task beat general ones", "3.1", "PDL 0.25", "PDL 0.25, general counts",
     at_equal_diversity("rare_f1"), "F1 of rare tokens"),
    ("mixing in general ones helps small data", "4.3", "PDL 0.25, counts mixed", "PDL 0.25",
     nats("all"), "nats of all tokens at the end, 5% of the data"),
    ("overfitting on small data is mitigated", "3.4", "PDL 0.25", "plain",
     lambda run, base: rise(base) - rise(run), "nats less that all rise after their best, 5% of the data"),
    ("a rising alpha costs less", "5", RISING, "PDL 0.25",
     nats("all"), "nats of all tokens, 0 to 0.25 against 0.25"),
    ("... and keeps the gain", "", RISING, "PDL 0.25", nats("rare"), "nats of rare tokens, the same"),
    ("... and writes better", "", RISING, "PDL 0.25", at_equal_diversity("bleu"), "BLEU-4, the same"),
    ("... than plain finetuning", "", RISING, "plain", at_equal_diversity("bleu"), "BLEU-4"),
    ("...", "", RISING, "plain", at_equal_diversity("rare_f1"), "F1 of rare tokens"),
    ("... than shifting the plain model's logits", "", RISING, "plain, shift 0.25",
     at_equal_diversity("bleu"), "BLEU-4"),
    ("...", "", RISING, "plain, shift 0.25", at_equal_diversity("rare_f1"), "F1 of rare tokens"),
    ("a falling alpha helps", "5", "PDL 0.5, alpha falling", "PDL 0.25",
     at_equal_diversity("rare_f1"), "F1 of rare tokens, 0.5 to 0 against 0.25"),
)
ON_SMALL_DATA = "4.3", "3.4"


def verdict(of_task, on_average, claim):
    if claim == EPSILON:
        bound = abs(on_average.mean) + on_average.half
        return f"at most {math.ceil(100 * bound) / 100:.2f}"  # a bound is rounded up
    if {1, -1} <= {difference.sign() for difference in of_task}:
        return "depends on the task"
    return {1: "yes", 0: "not shown", -1: "no, the opposite"}[on_average.sign()]


def table_of_claims(results, by_task=False):
    """A row a claim: the average over the tasks that it was measured on; by_task: and each of them."""
    rows = []
    for claim, where, method, base, measure, what in CLAIMS:
        tasks = [f"{task}-5%" for task in TASKS] if where in ON_SMALL_DATA else TASKS
        *of_task, on_average = (compare(results, of, method, measure, base) for of in (*tasks, tasks))
        if on_average:
            digits = ".2f" if "nats" in what else ".3f"
            measured = list(filter(None, of_task))
            found = verdict(measured, on_average, claim)
            row = [claim, where, f"**{found}**", f"{on_average:{digits}}", what, len(measured)]
            rows.append(row + [f"{one:{digits}}" if one else "" for one in of_task] * by_task)
    titles = [title for title, _ in TASKS.values()] * by_task
    return table(["claim", "section", "we found", "on average", "in", "tasks", *titles], rows)


# --- tables ---


def tasks_of(results):
    return [task for task in TASKS | FIFTH if runs_of(results, task, "plain")]


def mean(results, task, method, of):
    return statistics.mean(map(of, runs_of(results, task, method).values()))


def best_tau(results, task, method):
    """For each seed the tau at which the model's held-out cross-entropy is least."""
    runs = runs_of(results, task, method).values()
    best = [min(run["ce"], key=lambda tau: run["ce"][tau][0]) for run in runs]
    return best[0] if len(set(best)) == 1 else ", ".join(best)


def table(header, rows):
    lines = [header, ["---"] * len(header), *rows]
    return "".join(f"| {' | '.join(map(str, line))} |\n" for line in lines) + "\n"


WAYS = {  # what train.py --alpha 0 0.25 0.5 chooses from, the cheapest first
    "plain": "0",
    "plain, shift 0.25": "shift 0.25",
    "plain, shift 0.5": "shift 0.5",
    "PDL 0.25": "0.25",
    "PDL 0.5": "0.5",
}


def taken(results, task):
    """What train.py's rule takes, for each seed."""
    runs = {name: runs_of(results, task, method) for method, name in WAYS.items()}
    return [first_near_best({name: of[seed]["top-1"]["rare_f1"] for name, of in runs.items()})
            for seed in set.intersection(*map(set, runs.values()))]


def table_of_rule(results):
    """What that rule takes, and how what it chooses from turned out."""
    rows = []
    for task in filter(functools.partial(taken, results), tasks_of(results)):
        f1 = (mean(results, task, method, lambda run: run["top-1"]["rare_f1"]) for method in WAYS)
        turned_out = (compare(results, task, method, at_equal_diversity(name))
                      for method in ("plain, shift 0.25", "PDL 0.25") for name in ("rare_f1", "bleu"))
        rows.append([task, *(f"{x:.3f}" for x in f1), ", ".join(taken(results, task)),
                     *(f"{difference:.3f}" for difference in turned_out)])
    turned_out = "shift 0.25: F1", "BLEU-4", "0.25: F1", "BLEU-4"
    return table(["", *(f"top-1 F1: {name}" for name in WAYS.values()), "taken, by seed", *turned_out], rows)


MEASURES = {  # of completions: title, format
    "bleu": ("BLEU-4", ".3f"),
    "rare_precision": ("rare tokens: precision", ".3f"),
    "rare_recall": ("recall", ".3f"),
    "rare_f1": ("F1", ".3f"),
    "distinct_2": ("distinct-2", ".3f"),
    "rare_share": ("rare share", ".1%"),
    "kl": ("KL", ".2f"),
    "repeated_4": ("repeated-4", ".3f"),
    "ended": ("ended", ".0%"),
    "length_ratio": ("length", ".2f"),
}


def page_of_task(results, task):
    title, steps = (TASKS | FIFTH)[task]
    methods = [method for method in (*METHODS, *SHIFTED)
               if runs_of(results, task, method) and method not in LONGER | RATES]
    page = f"## {title[0].upper() + title[1:]}\n\n{steps} training steps; {results[task]['n']} prompts.\n\n"

    page += "Held-out cross-entropy in nats, and by how much it is lower than after plain training:\n\n"
    rows = []
    for method in methods:
        ce = [mean(results, task, method, lambda run: run["ce"]["0"][i]) for i in range(4)]
        lower = [f"{compare(results, task, method, nats(band)):.2f}" for band in ("all", "rare")]
        lower = lower if method != "plain" else ["", ""]
        ce = [len(runs_of(results, task, method)), *(f"{x:.2f}" for x in ce)]
        rows.append([method, *ce, *lower, best_tau(results, task, method)])
    page += table(["", "seeds", "all", *BANDS, "all: lower by", "rare: lower by", "best tau"], rows)

    page += "At equal diversity, by how much completions are better than those of the plain model:\n\n"
    names, rows = ("bleu", "rare_f1", "rare_precision", "rare_recall"), []
    for method in methods:
        if method != "plain":
            better = (f"{compare(results, task, method, at_equal_diversity(name)):.3f}" for name in names)
            rows.append([method, *better])
    page += table(["", *(MEASURES[name][0] for name in names)], rows)

    page += "The completions, by temperature:\n\n"
    rows = []
    for method in methods:
        for t in TEMPERATURES:
            of = [mean(results, task, method, lambda run: run["text"][str(t)][name]) for name in MEASURES]
            rows.append([method, t, *(f"{x:{digits}}" for x, (_, digits) in zip(of, MEASURES.values()))])
    of = [results[task]["references"].get(name) for name in MEASURES]
    shown = ("" if x is None else f"{x:{digits}}" for x, (_, digits) in zip(of, MEASURES.values()))
    rows.append(["the references", "", *shown])
    return page + table(["", "temperature", *(title for title, _ in MEASURES.values())], rows)


def table_of_pairs(results):
    """On style transfer: what twice the training, another learning rate, a variant of PDL 0.5 changes."""
    pairs = []
    for how in "", ", 600 steps", ", learning rate 0.001":
        methods = f"PDL 0.25{how}", f"{RISING}{how}", f"PDL 0.5{how}", f"plain{how}, shift 0.25"
        pairs += [(method, f"plain{how}") for method in methods]
    pairs += [(method, method.split(", learning rate")[0]) for method in RATES]
    pairs += [(method, method.split(",")[0]) for method in VARIANTS]
    pairs += [("PDL 0.5, alpha rising", "PDL 0.25")]
    of_text = at_equal_diversity("rare_f1"), at_equal_diversity("bleu"), at_temperature(0.5, "ended")
    rows = []
    for method, base in pairs:
        by = functools.partial(compare, results, "style", method, base=base)
        if by(of_text[0]):
            ce = (f"{by(nats(band)):.2f}" for band in ("all", "rare"))
            rows.append([method, base, *ce, *(f"{by(measure):.3f}" for measure in of_text)])
    return table(["", "against", "all: lower by", "rare: lower by", "F1", "BLEU-4", "ended"], rows)


def page_of_small_data(results):
    rows = []
    for task, method in itertools.product(TASKS, METHODS):
        small = f"{task}-5%"
        if runs_of(results, small, method):
            best, end = (mean(results, small, method, lambda run: of(run["curve"]))
                         for of in (min, lambda curve: curve[-1]))
            ce = [mean(results, small, method, lambda run: run["ce"]["0"][i]) for i in range(4)]
            rises = compare(results, small, method, lambda run, base: rise(run) - rise(base))
            against = f"{rises:.2f}" if method != "plain" else ""
            rows.append([task, method, f"{best:.2f}", f"{end:.2f}", against, *(f"{x:.2f}" for x in ce)])
    header = ["", "", "best", "at the end", "rise, against plain", "all", *BANDS]
    return SMALL_DATA + table(header, rows) if rows else ""


def results_page(results):
    """assets/results.md."""
    page = HEAD + "## The paper's claims\n\n" + table_of_claims(results, by_task=True)
    page += RULE + table_of_rule(results) + PAIRS + table_of_pairs(results)
    page += "".join(page_of_task(results, task) for task in tasks_of(results)) + page_of_small_data(results)
    if "earlier" in results:
        rows = [[name, *(f"{x:.2f}" for x in ce)] for name, ce in results["earlier"].items()]
        page += EARLIER + table(["", "all", *BANDS], rows)
    return page.rstrip("\n") + "\n"


HEAD = """# What was measured

Written by `python tests/findings.py` from [study.json](study.json); README.md says what it means.

tiny/ is finetuned by each method with three seeds, or with five: batches of 8 x 256 tokens, the same for all
methods, a learning rate that peaks at 0.003. It then completes held-out prompts, the same for all, at six
temperatures, without top-k or top-p, with at most 100 tokens. Numbers are means over the seeds that a method
has; a difference is over those that both have, paired, and comes with its 95% interval (Student's t).

- BLEU-4 is of the corpus, on tokens, with one reference each.
- Precision, recall and F1 of rare tokens (those of the last tenth of the training text) take each completion
  and its reference as multisets.
- *Ended*: the share of the completions that end before the limit. *Length*: in lengths of the references.
  KL: of single tokens to those of held-out text.
- *At equal diversity*: a method is a curve of the measure over distinct-2, through its temperatures; the mean
  distance between two of them where both are.
- *Shift x*: -x * log(freq(t)) is added to the logits when sampling. *Best tau*: tau * log(freq(t)), added to
  the logits, gives the least held-out cross-entropy, of ten values from -0.5 to 1.25, by seed if they differ.

"""
RULE = """## Which alpha to take

The rule of `train.py --alpha 0 0.25 0.5`: of what predicts rare tokens with a top-1 F1 within 0.005 of the
highest, the cheapest: plain training, a shift, the smallest alpha. Then how completions with a shift of 0.25
and at alpha 0.25 turned out against plain ones, at equal diversity.

"""
PAIRS = """## Longer, at other learning rates, and variants

Style transfer: cross-entropies in nats; F1 of rare tokens and BLEU-4 at equal diversity; the share of the
completions that end, at temperature 0.5. Each against what the second column names.

"""
SMALL_DATA = """## From a twentieth of the data

200 training steps, three seeds. Held-out cross-entropy in nats: of all tokens at its best and at the
end, on a tenth of the twentieth; then at the end, on the pairs outside of it.

"""
EARLIER = """## Earlier runs

Of an earlier version, with bfloat16 products, 200 steps of 16 x 256 tokens: held-out cross-entropy in nats.
Over alpha with a learning rate of 0.003, means of seeds 1, 2, 3; then learning rates, seed 1.

"""


# --- the figure ---

CURVES = {
    "plain": {"color": "black", "linewidth": 2.2},
    "PDL 0.25": {"color": "tab:red", "linewidth": 2.2},
    "PDL 0.5": {"color": "tab:orange", "linewidth": 1.2},
    "plain, shift 0.25": {"color": "black", "linestyle": "--", "linewidth": 1.2},
    RISING: {"color": "tab:red", "linestyle": "--", "linewidth": 1.2},
    "focal, gamma 2": {"color": "tab:blue", "linewidth": 0.8},
    "label smoothing 0.1": {"color": "tab:green", "linewidth": 0.8},
    "class-balanced, beta 0.9": {"color": "tab:purple", "linewidth": 0.8},
}


def figure(results):
    """assets/study.svg: quality against diversity, a curve through the temperatures for each method.

    Above each panel: how far the curve of PDL 0.25 is above that of the plain model.
    """
    import matplotlib.pyplot as plt

    plt.rcParams.update({"svg.hashsalt": "", "svg.fonttype": "none", "font.size": 9,
                         "axes.spines.top": False, "axes.spines.right": False})
    tasks = [task for task in tasks_of(results) if task in TASKS]
    figure, axes = plt.subplots(2, len(tasks), figsize=(12.5, 6), sharex="col", squeeze=False)
    for column, task in zip(axes.T, tasks):
        for ax, name in zip(column, ("rare_f1", "bleu")):
            for method in CURVES:
                if runs_of(results, task, method):
                    points = [[mean(results, task, method, lambda run: run["text"][str(t)][key])
                               for t in TEMPERATURES] for key in ("distinct_2", name)]
                    ax.plot(*points, marker="o", markersize=2.5, label=method, **CURVES[method])
            ax.axvline(results[task]["references"]["distinct_2"], color="gray", linewidth=0.6, linestyle=":")
            ax.set_ylim(bottom=0)
            beyond = compare(results, task, "PDL 0.25", at_equal_diversity(name))
            ax.set_title(f"{beyond:.3f}", fontsize=9, loc="right", color=CURVES["PDL 0.25"]["color"])
        column[0].set_title(TASKS[task][0], fontsize=10, loc="left")
        column[1].set_xlabel("diversity: distinct-2")
    axes[0, 0].set_ylabel("right rare tokens: F1")
    axes[1, 0].set_ylabel("quality: BLEU-4")
    figure.legend(*axes[0, 0].get_legend_handles_labels(), frameon=False, ncols=8, loc="lower center")
    figure.tight_layout(rect=(0, 0.04, 1, 1))
    replace(RESULTS.with_name("study.svg"),
            lambda path: figure.savefig(path, format="svg", metadata={"Date": None}))


if __name__ == "__main__":
    p = argparse.ArgumentParser(description="Write what the study comes to.")
    p.add_argument("--figure", action="store_true", help="draw assets/study.svg, not the tables")
    args = p.parse_args()
    results = json.loads(RESULTS.read_bytes())
    if args.figure:
        figure(results)
    else:
        page = results_page(results)
        replace(RESULTS.with_name("results.md"), lambda path: path.write_text(page, encoding="utf-8"))
