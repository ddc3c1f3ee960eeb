"""
Turn the recorded runs into tables and two figures.

    python study/findings.py             # writes study/results.md
    python study/findings.py --figure    # draws study/study.svg and alpha.svg; needs matplotlib

study.json has the runs of an earlier commit (see HEAD). rerun.json, which study.py writes, has runs of
today's code. The two are never mixed: results.md reports the second in a section of its own.
"""

import argparse
import functools
import itertools
import json
import math
import statistics
from pathlib import Path
from typing import NamedTuple

import numpy as np

from study import BANDS, RERUN, RISING, TASKS, TEMPERATURES, name_of, write_safely

FOLDER = Path(__file__).parent
LLM = FOLDER / "llm.json"  # which llm.py writes; llm_findings.py has its tables
FIFTH = {"dialogue": ("dialogue", 200)}  # a task of the record alone
T95 = {1: 12.7062, 2: 4.3027, 3: 3.1824, 4: 2.7764}  # Student's t by degrees of freedom, for 95% intervals

SHIFTED = "plain, shift 0.25"
# The methods of the record, in the order of its tables.
BASELINES = "focal, gamma 2", "label smoothing 0.1", "class-balanced, beta 0.9"
VARIANTS = (
    "PDL 0.25, general counts",
    "PDL 0.5, eps 1",
    "PDL 0.5, alpha falling",
    "PDL 0.5, end of text at the mean weight",
    "PDL 0.5, weights capped",
    "PDL 0.5, alpha rising",
    RISING,
)
METHODS = (
    *("plain", "PDL 0.25", "PDL 0.5", "PDL 1"),
    *("focal, gamma 1", *BASELINES, "class-balanced, beta 0.99"),
    *VARIANTS,
    "PDL 0.25, counts mixed",
    *(SHIFTED, "plain, shift 0.5"),
    *("PDL 0.25, shift -0.25", "PDL 0.5, shift -0.25", "PDL 0.5, shift -0.5", "PDL 1, shift -1"),
)


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
    """The Difference between two methods in measure(run, run of the base), or None without any run.

    tasks: one, or several to average over. Those that lack a method are left out.
    """
    of_task = []  # for each task the differences, by seed
    for task in [tasks] if isinstance(tasks, str) else tasks:
        of_method, of_base = runs_of(results, task, method), runs_of(results, task, base)
        seeds = of_method.keys() & of_base.keys()
        of_task += [{seed: measure(of_method[seed], of_base[seed]) for seed in seeds}] if seeds else []
    seeds = sorted(set.intersection(*map(set, of_task))) if of_task else []
    if seeds:
        return Difference.of([statistics.mean(of[seed] for of in of_task) for seed in seeds])


def nats(band):
    """How much lower the held-out cross-entropy of a band is."""
    i = ("all", *BANDS).index(band)
    return lambda run, base: base["ce"]["0"][i] - run["ce"]["0"][i]


def rare_nats_at_equal_cost(run, base):
    """How much lower that of rare tokens is than with a shift of the base that costs as much.

    The base is shifted until its cross-entropy of all tokens is that of the run.
    """
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
    """How much higher the held-out cross-entropy is at the end of a run than at its best."""
    return run["curve"][-1] - min(run["curve"])


def mean(results, task, method, of):
    return statistics.mean(map(of, runs_of(results, task, method).values()))


def table(header, rows):
    lines = [header, ["---"] * len(header), *rows]
    return "".join(f"| {' | '.join(map(str, line))} |\n" for line in lines) + "\n"


# --- today's code ---

HEADLINE = (  # method, what it is compared with
    ("PDL 0.25", "plain"),
    (RISING, "plain"),
    (SHIFTED, "plain"),
    (RISING, "PDL 0.25"),
    ("PDL 0.25", SHIFTED),
    (RISING, SHIFTED),
)
IN = (  # measure, its name, digits
    (nats("all"), "nats of all tokens", ".2f"),
    (nats("rare"), "nats of rare tokens", ".2f"),
    (at_equal_diversity("rare_f1"), "F1 of rare tokens", ".3f"),
    (at_equal_diversity("bleu"), "BLEU-4", ".3f"),
)


def table_of_headline(rerun, record):
    """The headline comparison with today's code, and the record's average beside it."""
    rows = []
    for (method, base), (measure, what, digits) in itertools.product(HEADLINE, IN):
        *of_task, on_average = (compare(rerun, of, method, measure, base) for of in (*TASKS, list(TASKS)))
        if on_average:
            recorded = compare(record, TASKS, method, measure, base)
            shown = [f"{one:{digits}}" if one else "" for one in (on_average, recorded, *of_task)]
            rows.append([method, base, what, *shown])
    titles = (title for title, _ in TASKS.values())
    return table(["", "against", "in", "on average", "in the record", *titles], rows)


# --- the paper's claims ---

# What the paper says and where. Then two methods and a measure: the difference is above 0 if the claim holds.
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
    ("... than by shifting the plain model's logits", "", "PDL 0.25", SHIFTED,
     at_equal_diversity("rare_f1"), "F1 of rare tokens"),
    ("...", "", "PDL 0.25", SHIFTED, at_equal_diversity("bleu"), "BLEU-4"),
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
    ("... than shifting the plain model's logits", "", RISING, SHIFTED,
     at_equal_diversity("bleu"), "BLEU-4"),
    ("...", "", RISING, SHIFTED, at_equal_diversity("rare_f1"), "F1 of rare tokens"),
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


def table_in_short(rerun, llm):
    """The five comparisons that matter most, on average over the tasks of a model. The README has it, too."""
    large, small = ("135M", llm, ("style", "webnlg")), ("4M", rerun, TASKS)
    rows = []
    for (model, results, tasks), method, base in (
            (large, RISING, "plain"), (large, SHIFTED, "plain"), (large, RISING, SHIFTED),
            (small, RISING, "plain"), (small, RISING, SHIFTED)):
        differences = [compare(results, tasks, method, measure, base) for measure, _, _ in IN]
        shown = [f"{one:{digits}}" for one, (_, _, digits) in zip(differences, IN)]
        at_equal_cost = compare(results, tasks, method, rare_nats_at_equal_cost)
        shown.insert(2, f"{at_equal_cost:.2f}" if (method, base) == (RISING, "plain") else "")
        names = {"plain": "plain", SHIFTED: "shift 0.25", RISING: "rising PDL"}
        rows.append([f"{model}: {names[method]} against {names[base]}", *shown])
    return table(["", "nats gained, all tokens", "rare tokens", "rare, at equal cost", "F1 of rare tokens",
                  "BLEU-4"], rows)


def table_of_claims(results, by_task=False):
    """A row for each claim: the average over the tasks that have the methods; by_task: and each of them."""
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


# --- the rule for alpha ---

F1_MARGIN = 0.005  # seeds differ by about as much
WAYS = {  # from the simplest
    "plain": "0",
    SHIFTED: "shift 0.25",
    "plain, shift 0.5": "shift 0.5",
    "PDL 0.25": "0.25",
    "PDL 0.5": "0.5",
}


def taken(results, task):
    """What the rule takes, for each seed: among the ways within F1_MARGIN of the best F1, the simplest."""
    runs = {name: runs_of(results, task, method) for method, name in WAYS.items()}
    names = []
    for seed in set.intersection(*map(set, runs.values())):
        f1 = {name: of[seed]["top-1"]["rare_f1"] for name, of in runs.items()}
        names.append(next(name for name in f1 if f1[name] >= max(f1.values()) - F1_MARGIN))
    return names


def table_of_rule(results):
    """What the rule takes, and how the text of two ways turned out."""
    rows = []
    for task in filter(functools.partial(taken, results), tasks_of(results)):
        f1 = (mean(results, task, method, lambda run: run["top-1"]["rare_f1"]) for method in WAYS)
        turned_out = (compare(results, task, method, at_equal_diversity(name))
                      for method in (SHIFTED, "PDL 0.25") for name in ("rare_f1", "bleu"))
        rows.append([task, *(f"{x:.3f}" for x in f1), ", ".join(taken(results, task)),
                     *(f"{difference:.3f}" for difference in turned_out)])
    turned_out = "shift 0.25: F1", "BLEU-4", "0.25: F1", "BLEU-4"
    return table(["", *(f"top-1 F1: {name}" for name in WAYS.values()), "taken, by seed", *turned_out], rows)


# --- each task ---

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


def tasks_of(results):
    return [task for task in TASKS | FIFTH if runs_of(results, task, "plain")]


def best_tau(results, task, method):
    """The tau at which the model's held-out cross-entropy is least; for each seed, if they differ."""
    runs = runs_of(results, task, method).values()
    best = [min(run["ce"], key=lambda tau: run["ce"][tau][0]) for run in runs]
    return best[0] if len(set(best)) == 1 else ", ".join(best)


def page_of_task(results, task):
    title, steps = (TASKS | FIFTH)[task]
    methods = [method for method in METHODS if runs_of(results, task, method)]
    page = f"## {title[0].upper() + title[1:]}\n\n{steps} training steps; {results[task]['n']} prompts.\n\n"

    page += "Held-out cross-entropy in nats, and how much lower it is than after plain training:\n\n"
    rows = []
    for method in methods:
        ce = [mean(results, task, method, lambda run: run["ce"]["0"][i]) for i in range(4)]
        lower = [f"{compare(results, task, method, nats(band)):.2f}" for band in ("all", "rare")]
        lower = lower if method != "plain" else ["", ""]
        ce = [len(runs_of(results, task, method)), *(f"{x:.2f}" for x in ce)]
        rows.append([method, *ce, *lower, best_tau(results, task, method)])
    page += table(["", "seeds", "all", *BANDS, "all: lower by", "rare: lower by", "best tau"], rows)

    page += "At equal diversity, how much better completions are than those of the plain model:\n\n"
    names, rows = ("bleu", "rare_f1", "rare_precision", "rare_recall"), []
    for method in methods[1:]:
        better = (f"{compare(results, task, method, at_equal_diversity(name)):.3f}" for name in names)
        rows.append([method, *better])
    page += table(["", *(MEASURES[name][0] for name in names)], rows)

    page += "The completions, by temperature:\n\n"
    rows = []
    for method, t in itertools.product(methods, TEMPERATURES):
        of = [mean(results, task, method, lambda run: run["text"][str(t)][name]) for name in MEASURES]
        rows.append([method, t, *(f"{x:{digits}}" for x, (_, digits) in zip(of, MEASURES.values()))])
    of = [results[task]["references"].get(name) for name in MEASURES]
    shown = ("" if x is None else f"{x:{digits}}" for x, (_, digits) in zip(of, MEASURES.values()))
    rows.append(["the references", "", *shown])
    return page + table(["", "temperature", *(title for title, _ in MEASURES.values())], rows)


# --- other experiments of the record ---


def table_of_pairs(results):
    """On style transfer: the effect of longer training, of other learning rates, of variants of PDL."""
    pairs = []
    for how in "", ", 600 steps", ", learning rate 0.001":
        methods = f"PDL 0.25{how}", f"{RISING}{how}", f"PDL 0.5{how}", f"plain{how}, shift 0.25"
        pairs += [(method, f"plain{how}") for method in methods]
    for method, rate in itertools.product(("plain", "PDL 0.25", RISING, *BASELINES), (0.001, 0.01)):
        pairs += [(f"{method}, learning rate {rate}", method)]
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


def table_of_small_data(results):
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
    return table(["", "", "best", "at the end", "rise, against plain", "all", *BANDS], rows)


# --- the page ---


def results_page(record, rerun, llm):
    """study/results.md. record: the content of study.json. rerun, llm: of rerun.json and llm.json, or {}."""
    page = HEAD
    if llm:
        from llm_findings import section  # which imports this file

        if rerun:
            page += SHORT + table_in_short(rerun, llm)
        page += section(llm)
    if rerun:
        n_entries = sum(", seed " in name for name in rerun)
        page += TODAY.format(n=n_entries) + table_of_headline(rerun, record)
    page += CLAIMED + table_of_claims(record, by_task=True)
    page += RULE + table_of_rule(record)
    page += PAIRS + table_of_pairs(record)
    page += "".join(page_of_task(record, task) for task in tasks_of(record))
    page += SMALL_DATA + table_of_small_data(record)
    earlier = [[name, *(f"{x:.2f}" for x in ce)] for name, ce in record["earlier"].items()]
    page += EARLIER + table(["", "all", *BANDS], earlier)
    return page.rstrip("\n") + "\n"


HEAD = """# What was measured

`python study/findings.py` writes this page from [llm.json](llm.json), [rerun.json](rerun.json) and
[study.json](study.json). [README.md](README.md) says how to run the study again.

**Which code.** Everything from "The paper's claims" on is the record of commit
505ee34b725a660fc9caa2b60e3bd5f2770e7a3b, with the code and the defaults of that commit. Its default `eps` was
1e-6, so "eps 1" is a variant there. Today 1 is the default, and 1e-6 would be the variant. The models of the
record have the last weights of each run, where `train.py` keeps the best. Today's `study.py` writes to
`rerun.json`. It never adds to the record.

**The runs.** Each method finetunes tiny/ with three or five seeds. Batches have 8 x 256 tokens and are the
same for all methods. The learning rate peaks at 0.003. Each model then completes the same held-out prompts at
six temperatures, without top-k or top-p, with at most 100 tokens.

**The numbers.** A number is the mean over the seeds of a method. A difference is paired: it is the mean over
the seeds that both methods have, with its 95% interval (Student's t).

- *BLEU-4* is that of the corpus, on tokens, with one reference each.
- *Precision*, *recall* and *F1* of rare tokens compare each completion with its reference, as multisets. Rare
  tokens are the rarest, a tenth of the training text.
- *Ended* is the share of completions that end before the limit. *Length* is relative to the references.
  *KL* compares the token frequencies of completions and of held-out text.
- *At equal diversity*: each method is a curve of the measure over distinct-2, through its temperatures. The
  difference is the mean distance of two curves where both exist.
- *Shift x*: -x * log(freq(t)) is added to the logits when sampling.
- *Best tau*: tau * log(freq(t)), added to the logits, gives the least held-out cross-entropy. Ten values from
  -0.5 to 1.25 were tried. If the seeds differ, there is one for each.

"""
SHORT = """## In short

SmolLM2-135M-Instruct (135M; two tasks, three seeds) and tiny/ (4M; four tasks, five seeds), on average over
the tasks. Positive is better. *Rising PDL*: alpha rises from 0 to 0.25. *At equal cost*: the logits of the
plain model are shifted until its cross-entropy of all tokens is as high.

"""
TODAY = """## With today's code and defaults

Here `eps` is 1, and each model has the best weights of its run by held-out PDL, as `train.py` keeps them.
`rerun.json` has {n} entries: four tasks, four methods and five seeds make 80. They are of commit 9c34f67, but
for the language reference of commit 601d4cb, since which a text is split as it is today. Each row is a
difference between two methods, above 0 if the first is better: in nats of held-out cross-entropy, or in F1
and BLEU-4 at equal diversity. *In the record* is the same difference in study.json, on average over the four
tasks.

"""
CLAIMED = """## The paper's claims

"""
RULE = """## Which alpha to take

`train.py --alpha 0 0.25 0.5` had a rule at that commit. Among settings whose top-1 F1 of rare tokens is
within 0.005 of the highest, it took the simplest: plain training, then a shift, then the smallest alpha. The
last columns compare completions with those of plain training, at equal diversity.

"""
PAIRS = """## Longer, at other learning rates, and variants

On style transfer, each method against the one in the second column: cross-entropies in nats, F1 of rare
tokens and BLEU-4 at equal diversity, and the share of completions that end, at temperature 0.5.

"""
SMALL_DATA = """## From a twentieth of the data

200 training steps, three seeds, held-out cross-entropy in nats. The first columns are that of all tokens, at
its best and at the end, on a tenth of the twentieth. The last columns are at the end, on the other pairs.

"""
EARLIER = """## Earlier runs

These are of an earlier version, with bfloat16 products and 200 steps of 16 x 256 tokens: held-out
cross-entropy in nats. First several alphas at a learning rate of 0.003, means of seeds 1, 2 and 3. Then
several learning rates, seed 1.

"""


# --- the figure ---

CURVES = {
    "plain": {"color": "black", "linewidth": 2.2},
    "PDL 0.25": {"color": "tab:red", "linewidth": 2.2},
    "PDL 0.5": {"color": "tab:orange", "linewidth": 1.2},
    SHIFTED: {"color": "black", "linestyle": "--", "linewidth": 1.2},
    RISING: {"color": "tab:red", "linestyle": "--", "linewidth": 1.2},
    "focal, gamma 2": {"color": "tab:blue", "linewidth": 0.8},
    "label smoothing 0.1": {"color": "tab:green", "linewidth": 0.8},
    "class-balanced, beta 0.9": {"color": "tab:purple", "linewidth": 0.8},
}


def figure_of_writing(results):
    """study/study.svg: quality over diversity, a curve through the temperatures for each method.

    The number above each panel is how far the curve of PDL 0.25 is above that of the plain model.
    """
    import matplotlib.pyplot as plt

    plt.rcParams.update({"svg.hashsalt": "", "svg.fonttype": "none", "font.size": 9,
                         "axes.spines.top": False, "axes.spines.right": False})
    figure, axes = plt.subplots(2, len(TASKS), figsize=(12.5, 6), sharex="col", squeeze=False)
    for column, task in zip(axes.T, TASKS):
        for ax, name in zip(column, ("rare_f1", "bleu")):
            for method in CURVES:
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
    return figure


def figure_of_alpha(results):
    """study/alpha.svg: what alpha does to held-out prediction, on average over the tasks."""
    import matplotlib.pyplot as plt

    plt.rcParams.update({"svg.hashsalt": "", "svg.fonttype": "none", "font.size": 11,
                         "axes.spines.top": False, "axes.spines.right": False})
    figure, ax = plt.subplots(figsize=(7, 3.6))
    for band, color in ("frequent", "tab:blue"), ("middle", "tab:gray"), ("rare", "tab:red"):
        gains = [compare(results, TASKS, method, nats(band)).mean for method in ("PDL 0.25", "PDL 0.5")]
        ax.plot([0, 0.25, 0.5], [0, -gains[0], -gains[1]], marker="o", color=color, linewidth=2.5)
        ax.annotate(f"{band} tokens {-gains[1]:+.2f}", (0.5, -gains[1]), (8, -4), color=color,
                    textcoords="offset points")
    ax.axhline(0, color="black", linewidth=0.6)
    ax.set_xticks([0, 0.25, 0.5], ["0\nplain cross-entropy", "0.25", "0.5"])
    ax.set_xlabel("alpha")
    ax.set_ylabel("change in cross-entropy, nats\n(lower is better)")
    ax.set_xlim(-0.05, 0.75)
    figure.tight_layout()
    return figure


if __name__ == "__main__":
    p = argparse.ArgumentParser(description="Turn the recorded runs into tables and a figure.")
    p.add_argument("--figure", action="store_true", help="draw study.svg and alpha.svg, not results.md")
    args = p.parse_args()
    record = json.loads((FOLDER / "study.json").read_bytes())
    rerun, llm = (json.loads(path.read_bytes()) if path.exists() else {} for path in (RERUN, LLM))
    if args.figure:
        for name, draw in ("study.svg", figure_of_writing), ("alpha.svg", figure_of_alpha):
            drawn = draw(record)
            write_safely(FOLDER / name, lambda p: drawn.savefig(p, format="svg", metadata={"Date": None}))
    else:
        page = results_page(record, rerun, llm)
        write_safely(FOLDER / "results.md", lambda path: path.write_text(page, encoding="utf-8"))
