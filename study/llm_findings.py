"""
What the runs of llm.py come to, as Markdown: a section of results.md, which findings.py writes.

It makes do with the runs that there are. Differences, intervals and tables are those of findings.py.
"""

import itertools

from findings import MEASURES, SHIFTED, at_equal_diversity, at_temperature, compare, mean, nats
from findings import rare_nats_at_equal_cost, runs_of, table
from study import BANDS, RISING, TASKS

METHODS = "plain", SHIFTED, "PDL 0.25", RISING, "PDL 0.5", "DFT"  # in the order of the tables
TEMPERATURES = "0", "0.3", "0.5", "0.7", "1"
PAIRS = (  # a method, and what it is compared with
    *((method, "plain") for method in METHODS[1:]),
    *((method, SHIFTED) for method in ("PDL 0.25", RISING)),
    (RISING, "PDL 0.25"),
)

HEAD = """## On a real language model

`llm.py` finetunes SmolLM2-135M-Instruct in batches of 8 x 256 tokens. All runs used one device ({device}),
with {dtype} products in training. The learning rate falls from 0.0001 to 0 along a cosine. Tokens are the
model's own, and the counts are those of the training completions. Each run is judged by its last weights.
*DFT* is Dynamic Fine-Tuning (arXiv 2508.05629): the weight of a target is the model's own probability of it.

*Seeds* is the number of runs behind a number. A difference is paired by seed and comes with its 95% interval.
Above 0, the first method is better (or, for diversity, higher). The interval of two seeds is very wide, and
one seed has none.

"""


def show(difference):
    return f"{difference:.3f}" if difference else ""


def titled(title, header, rows):
    return f"{title}:\n\n{table(header, rows)}" if rows else ""


def table_of_prediction(results, task, methods):
    """Held-out cross-entropy."""
    rows = []
    for method in methods:
        ce = [mean(results, task, method, lambda run: run["ce"]["0"][i]) for i in range(4)]
        rows.append([method, len(runs_of(results, task, method)), *(f"{x:.3f}" for x in ce)])
    page = titled("Held-out cross-entropy in nats", ["", "seeds", "all", *BANDS], rows)
    rows = []
    for method, base in PAIRS:
        lower = [compare(results, task, method, nats(band), base) for band in ("all", *BANDS)]
        if lower[0]:
            level = base == "plain" and method.startswith("PDL")
            lower += [compare(results, task, method, rare_nats_at_equal_cost, base) if level else None]
            rows.append([method, base, lower[0].n, *(show(difference) for difference in lower)])
    title = "How much lower it is. In the last column the logits of the plain model are shifted until its\n" \
            "cross-entropy of all tokens is as high"
    return page + titled(title, ["", "than", "seeds", "all", *BANDS, "rare, at equal cost"], rows)


def tables_of_writing(results, task, methods):
    """Completions at equal diversity, and at each temperature."""
    names, rows = ("bleu", "rare_precision", "rare_recall", "rare_f1"), []
    for method, base in PAIRS:
        better = [compare(results, task, method, at_equal_diversity(name), base) for name in names]
        if better[0]:
            rows.append([method, base, better[0].n, *(show(difference) for difference in better)])
    header = ["", "than", "seeds", *(MEASURES[name][0] for name in names)]
    page = titled("How much better completions are at equal diversity", header, rows)

    names, rows = ("bleu", "rare_f1", "distinct_2", "ended"), []
    for (method, base), t in itertools.product(PAIRS, TEMPERATURES):
        higher = [compare(results, task, method, at_temperature(t, name), base) for name in names]
        if base == "plain" and higher[0]:
            rows.append([method, t, higher[0].n, *(show(difference) for difference in higher)])
    header = ["", "temperature", "seeds", "BLEU-4", "F1 of rare tokens", "distinct-2", "ended"]
    page += titled("How much higher than for the plain model at the same temperature", header, rows)

    rows = []
    for method, t in itertools.product(methods, TEMPERATURES):
        of = [mean(results, task, method, lambda run: run["text"][t][name]) for name in MEASURES]
        shown = (f"{x:{digits}}" for x, (_, digits) in zip(of, MEASURES.values()))
        rows.append([method, t, len(runs_of(results, task, method)), *shown])
    references = results[task]["references"]
    shown = (f"{references[name]:{MEASURES[name][1]}}" if name in references else "" for name in MEASURES)
    rows.append(["the references", "", "", *shown])
    header = ["", "temperature", "seeds", *(title for title, _ in MEASURES.values())]
    return page + titled("The completions, by temperature", header, rows)


def examples(results, task, methods, seed=1, t="0"):
    """What each method wrote after the first held-out prompts."""
    page = f"What seed {seed} wrote at temperature {t} after the first three held-out prompts:\n\n"
    for i, (prompt, reference) in enumerate(zip(*results[task]["examples"])):
        texts = {method: of[seed]["examples"][t][i] for method in methods
                 if seed in (of := runs_of(results, task, method))}
        page += f"{i + 1}. `{in_line(prompt)}`\n"
        page += "".join(f"   - {who}: `{in_line(text)}`\n"
                        for who, text in {"the author": reference, **texts}.items())
    return page + "\n"


def in_line(text):
    """Text that fits between backticks."""
    return " ".join(text.replace("`", "'").split())


def section(results):
    """The section of results.md. results: the content of llm.json."""
    page = HEAD.format(device=results["device"], dtype=results["dtype"])
    for task, (title, _) in TASKS.items():
        methods = [method for method in METHODS if runs_of(results, task, method)]
        if methods:
            page += f"### {title[0].upper() + title[1:]}, SmolLM2\n\n"
            page += f"{results[task]['steps']} training steps; {results[task]['n']} prompts.\n\n"
            page += table_of_prediction(results, task, methods) + tables_of_writing(results, task, methods)
            page += examples(results, task, methods)
    return page
