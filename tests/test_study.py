"""The study measures what it says; results.md and the README say what study.json has."""

import json
import shutil
import subprocess
import sys
from collections import Counter

import pytest
import torch
import torch.nn.functional as F

import findings
import make_tasks
import study
from model import GPT


def test_bleu_is_that_of_sacrebleu():
    # sacrebleu 2.6.0: corpus_bleu of the tokens joined by spaces, tokenize="none", smooth_method="none"
    written = [
        [1, 4, 0, 1, 0, 1, 3],
        [3, 1, 0, 3, 3, 3, 0, 4, 0, 5, 3, 2],
        [5, 5, 4, 0, 2, 0, 0, 0, 5, 4, 0, 3, 5, 1, 4, 3],
        [5, 0, 4, 1],
    ]
    references = [
        [1, 4, 0, 2, 0, 3, 3, 3, 5],
        [3, 1, 0, 3, 0, 3, 3, 4, 0, 5, 3, 2],
        [5, 1, 4, 0, 2, 0, 0, 0, 5, 4, 0, 3, 5, 1, 3],
        [5, 0, 4, 1, 3, 3, 4],
    ]
    assert study.bleu(written, references) == pytest.approx(0.60883012598055416)


def test_rare_tokens_count_as_multisets_of_each_prompt():
    rare = [False, True, True]
    # Of three rare tokens written, the second 1 is one too many, and the 2 belongs to the other prompt.
    matches = study.rare_matches([[1, 1, 0], [2]], [[1, 2, 2], [0]], rare)
    assert matches == {"rare_precision": 1 / 3, "rare_recall": 1 / 3, "rare_f1": pytest.approx(1 / 3)}


def test_equal_diversity_compares_where_both_curves_are():
    def run(*points):
        return {"text": {i: {"distinct_2": x, "bleu": y} for i, (x, y) in enumerate(points)}}

    base, other = run((0.2, 0.4), (0.6, 0.2)), run((0.4, 0.5), (0.9, 0.0))
    # From 0.4 to 0.6 the base falls from 0.3 to 0.2, the other from 0.5 to 0.3: 0.2 and 0.1 above.
    assert findings.at_equal_diversity("bleu")(other, base) == pytest.approx(0.15)


def test_equal_cost_compares_with_the_shift_that_loses_as_much():
    base = {"ce": {str(tau): [1 + tau**2, 0, 0, 3 + tau] for tau in (-0.5, -0.25, 0, 0.25)}}
    run = {"ce": {"0": [1.09, 0, 0, 2.6]}}  # at tau -0.3 the base loses 0.09 of all, and has 2.7 of rare
    assert findings.rare_nats_at_equal_cost(run, base) == pytest.approx(0.1, abs=1e-5)


def test_an_interval_is_students():
    difference = findings.Difference.of([1, 2, 3])  # standard deviation 1; t(0.975; 2 degrees) = 4.302653
    assert (difference.mean, difference.half) == (2, pytest.approx(4.302653 / 3**0.5, rel=1e-4))
    assert difference.sign() == 0 and findings.Difference.of([1, 1.1, 1.2]).sign() == 1


def test_completions_at_temperature_0_are_those_of_generate(tiny, tokenizer):
    model = GPT.from_pretrained(tiny).eval()
    prompts = [tokenizer.encode_ordinary(text) for text in ("She said that", "The king is", "It was a")]
    eot, bias = tokenizer.eot_token, torch.zeros(tokenizer.n_vocab)
    bias[eot] = 12  # so that some end early
    written, ended = study.complete(model, prompts, 1, eot, bias)
    for prompt, tokens, end in zip(prompts, written[0], ended[0]):
        whole = model.generate(torch.tensor([prompt]), study.LENGTH, temperature=0, logit_bias=bias)[
            0
        ].tolist()
        expected = whole[len(prompt) :]
        assert end == (eot in expected)
        assert tokens == (expected[: expected.index(eot)] if end else expected)
    assert any(map(any, ended)) and len({tuple(of[0]) for of in written}) > 1


def test_the_losses_it_compares_with():
    torch.manual_seed(0)
    hidden, lm_head, targets = torch.randn(4, 3, 8), torch.randn(20, 8), torch.randint(20, (4, 3))
    targets[0] = -100
    p = (hidden[1:] @ lm_head.T).double().softmax(-1)
    of_target = p.gather(-1, targets[1:, :, None])
    plain = F.cross_entropy((hidden @ lm_head.T).flatten(0, 1), targets.flatten(), reduction="sum")
    for gamma in 1, 2:
        loss = study.focal(gamma)["linear_pdl_loss"](hidden, lm_head, targets, None, "sum")
        torch.testing.assert_close(loss.double(), -((1 - of_target) ** gamma * of_target.log()).sum())
    torch.testing.assert_close(
        study.focal(0)["linear_pdl_loss"](hidden, lm_head, targets, None, "sum"), plain
    )
    smooth = study.label_smoothing(0.1)["linear_pdl_loss"](hidden, lm_head, targets, None, "sum")
    expected = -(0.9 * of_target.log().sum() + 0.1 / 20 * p.log().sum())
    torch.testing.assert_close(smooth.double(), expected)
    weights = study.class_balanced(0.99)["step_weights"](0, 0, torch.tensor([1, 2, 1000]).numpy(), None)
    torch.testing.assert_close(weights, torch.tensor([1, 1 / 1.99, 0.01 / (1 - 0.99**1000)]))


def test_tasks_are_made_from_clones(tmp_path):
    data = tmp_path / "a" / "data"
    data.mkdir(parents=True)
    for split in "train", "valid", "test":
        (data / f"{split}.modern.nltktok").write_text(f"You {split} .\n", encoding="utf-8")
        (data / f"{split}.original.nltktok").write_text(f"Thou {split} .\n", encoding="utf-8")
    entry = """<benchmark><entries><entry><originaltripleset><otriple>no</otriple></originaltripleset>
        <modifiedtripleset><mtriple>Aarhus_Airport | runwayLength | 2702.0</mtriple>
        <mtriple>A | b | C_d</mtriple></modifiedtripleset>
        <lex><text> Its runway  is long. </text><template>no</template></lex><lex><text/></lex>
        </entry></entries></benchmark>"""
    folder = tmp_path / "b" / "data" / "v1.6" / "en" / "train" / "1triples"
    folder.mkdir(parents=True)
    (folder / "Airport.xml").write_text(entry, encoding="utf-8")
    folder = tmp_path / "c" / "data" / "tinyshakespeare"
    folder.mkdir(parents=True)
    play = "All:\nSpeak,\nspeak.\n\nFirst Citizen:\nYou are\nall.\n"
    (folder / "input.txt").write_text(play, encoding="utf-8")
    subprocess.run(
        [sys.executable, make_tasks.__file__, "a", "b", "c", "tasks"], cwd=tmp_path, check=True, timeout=60
    )
    style, webnlg, dialogue = (
        [json.loads(line) for line in (tmp_path / "tasks" / name).read_text(encoding="utf-8").splitlines()]
        for name in ("style.jsonl", "webnlg.jsonl", "dialogue.jsonl")
    )
    assert dialogue == [
        {"prompt": "All:\nSpeak,\nspeak.\n\nFirst Citizen:", "completion": "\nYou are\nall."}
    ]
    assert [pair["completion"] for pair in style] == [" Thou train .", " Thou valid .", " Thou test ."]
    assert style[0]["prompt"] == "Modern: You train .\nShakespeare:"
    assert webnlg == [
        {
            "prompt": "Aarhus Airport | runwayLength | 2702.0; A | b | C d\nText:",
            "completion": " Its runway is long.",
        }
    ]


def test_the_results_are_written_from_the_runs(root, tmp_path):
    for path in [*root.glob("*.py"), *root.glob("tests/*.py"), root / "assets/study.json"]:
        copy = tmp_path / path.relative_to(root)
        copy.parent.mkdir(exist_ok=True)
        shutil.copy(path, copy)
    subprocess.run([sys.executable, tmp_path / "tests/findings.py"], check=True, timeout=60)
    assert (tmp_path / "assets/results.md").read_bytes() == (root / "assets/results.md").read_bytes()


def test_the_readme_says_what_was_measured(root):
    results = json.loads((root / "assets/study.json").read_bytes())
    readme = (root / "README.md").read_text(encoding="utf-8")
    assert findings.table_of_claims(results).strip() in readme
    readme = " ".join(readme.split())
    f1, bleu = map(findings.at_equal_diversity, ("rare_f1", "bleu"))
    compare, nats, rising, shifted = findings.compare, findings.nats, findings.RISING, "plain, shift 0.25"
    slower = ", learning rate 0.001"

    def span(method, measure, base="plain"):
        means = [compare(results, task, method, measure, base).mean for task in study.TASKS]
        return f"{min(means):.2f} to {max(means):.2f}"

    def text(tasks, method, base="plain"):
        differences = (compare(results, tasks, method, measure, base) for measure in (f1, bleu))
        return "{:.3f} and BLEU-4 {:.3f}".format(*differences)

    def again(how):
        """At another learning rate, or with more training."""
        shift = text("style", f"plain{how}, shift 0.25", f"plain{how}").replace(" BLEU-4", "")
        return f"F1 is {text('style', f'PDL 0.25{how}', f'plain{how}')} (with the shift {shift})"

    def taken(tasks):
        names = Counter(name for task in tasks for name in findings.taken(results, task))
        return [f" {name.replace('shift', 'shift of')} with {n}" for name, n in names.items()]

    of_slower = (f"{difference:.2f}".lstrip("+") for method in ("PDL 0.25", rising) for difference in (
        compare(results, "style", method + slower, nats("rare"), f"plain{slower}"),
        compare(results, "style", f"plain{slower}", nats("all"), method + slower)))
    best = lambda run: min(run["curve"])
    lower = lambda run, base: best(base) - best(run)
    small = [f"{task}-5%" for task in study.TASKS]
    mixing = compare(results, small, "PDL 0.25, counts mixed", lower, "PDL 0.25")
    plain = compare(results, small, "plain", lower, "PDL 0.25")
    costs = (-compare(results, "style", f"PDL 0.25{how}", nats("all"), f"plain{how}").mean
             for how in (slower, ""))
    ended = (findings.mean(results, "webnlg", method, lambda run: run["text"]["0.5"]["ended"])
             for method in ("plain", "PDL 0.25", "PDL 0.5"))
    for phrase in (
        f"rare tokens gain {span('PDL 0.25', nats('rare'))} nats",
        f"all tokens lose {span('plain', nats('all'), 'PDL 0.25')}.",
        f"F1 is {text(study.TASKS, 'PDL 0.25')} on average",
        f"all tokens lose {span('plain', nats('all'), rising)} nats, and rare ones still gain "
        f"{span(rising, nats('rare'))}. F1 is {text(study.TASKS, rising)}.",
        f"PDL with a rising alpha has F1 {text(study.TASKS, rising, shifted)}.",
        f"BLEU-4 is {span('plain', bleu, 'PDL 0.5')} lower",
        f"mixing gains {mixing:.2f} nats and plain training {plain:.2f}",
        "gain {} nats and all lose {} (a rising alpha: {} and {})".format(*of_slower),
        again(slower),
        again(", 600 steps"),
        *taken(study.TASKS),
        *taken(study.FIFTH),
        f"rare tokens {span(shifted, nats('rare'))} nats better and all "
        f"{span('plain', nats('all'), shifted)} worse",
        "data to text {:.0%}, {:.0%} and {:.0%} at alpha 0, 0.25 and 0.5".format(*ended),
        "it loses {:.2f} nats at 0.001, {:.2f} at 0.003".format(*costs),
    ):
        assert phrase in readme, phrase

    def signs(tasks, method):
        return {compare(results, tasks, method, measure).sign() for measure in (f1, bleu)}

    assert "no difference is shown in what PDL 0.25 and plain finetuning write" in readme
    assert signs("dialogue", "PDL 0.25") == {0}
    assert "On average that writes better than either" in readme
    assert compare(results, study.TASKS, rising, f1, shifted).sign() == 1
    assert compare(results, study.TASKS, rising, bleu, "PDL 0.25").sign() == 1
    assert "or a shift of -0.5 when sampling it writes no better than plain finetuning" in readme
    variants = "weights capped", "eps 1", "end of text at the mean weight", "alpha falling", "shift -0.5"
    assert all(1 not in signs("style", f"PDL 0.5, {variant}") for variant in variants)
    assert "class-balanced weights are not shown to write better on average over the four tasks" in readme
    assert all(1 not in signs(study.TASKS, method) for method in study.BASELINES)
    assert {sum(compare(results, task, method, f1) is not None for task in study.TASKS)
            for method in study.BASELINES} == {4}
