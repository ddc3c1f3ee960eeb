"""The study measures what it says. results.md and the README say what study.json has."""

import json
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent.parent / "study"))
import findings
import study
from model import GPT


@pytest.fixture(scope="module")
def record(root):
    return json.loads((root / "study/study.json").read_bytes())


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
    # Three rare tokens are written. The second 1 is one too many, and the 2 belongs to the other prompt.
    matches = study.rare_matches([[1, 1, 0], [2]], [[1, 2, 2], [0]], rare)
    assert matches == {"rare_precision": 1 / 3, "rare_recall": 1 / 3, "rare_f1": pytest.approx(1 / 3)}


def test_prompts_are_held_out_with_their_first_completion(tmp_path, tokenizer):
    # Every tenth prompt is held out. Each has two completions.
    rows = [{"prompt": f"Question {i}:", "completion": f" {word} {i}."}
            for i in range(30) for word in ("yes", "no")]
    path = tmp_path / "pairs.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    pairs = [[tokenizer.decode(tokens) for tokens in pair] for pair in study.openings(study.load(path))]
    assert pairs == [[f"Question {i}:", f" yes {i}."] for i in (9, 19, 29)]


def test_completions_at_temperature_0_are_those_of_generate(tiny, tokenizer, monkeypatch):
    monkeypatch.setattr(study, "LENGTH", 40)
    model = GPT.from_pretrained(tiny).eval()
    prompts = [tokenizer.encode_ordinary(text) for text in ("She said that", "The king is", "It was a")]
    eot, bias = tokenizer.eot_token, torch.zeros(tokenizer.n_vocab)
    bias[eot] = 14  # so that some end early
    written, ended = study.complete(model, prompts, 1, eot, bias)
    for prompt, tokens, end in zip(prompts, written[0], ended[0]):
        whole = model.generate(torch.tensor([prompt]), 40, temperature=0, logit_bias=bias)[0].tolist()
        expected = whole[len(prompt) :]
        assert end == (eot in expected)
        assert tokens == (expected[: expected.index(eot)] if end else expected)
    assert any(map(any, ended)) and len({tuple(of[0]) for of in written}) > 1


def test_equal_diversity_compares_where_both_curves_are():
    def run(*points):
        return {"text": {i: {"distinct_2": x, "bleu": y} for i, (x, y) in enumerate(points)}}

    base, other = run((0.2, 0.4), (0.6, 0.2)), run((0.4, 0.5), (0.9, 0.0))
    # From 0.4 to 0.6 the base falls from 0.3 to 0.2, the other from 0.5 to 0.3: 0.2 and 0.1 above.
    assert findings.at_equal_diversity("bleu")(other, base) == pytest.approx(0.15)


def test_an_interval_is_students():
    difference = findings.Difference.of([1, 2, 3])  # standard deviation 1; t(0.975; 2 degrees) = 4.302653
    assert (difference.mean, difference.half) == (2, pytest.approx(4.302653 / 3**0.5, rel=1e-4))
    assert difference.sign() == 0 and findings.Difference.of([1, 1.1, 1.2]).sign() == 1


def test_the_results_are_written_from_the_runs(root, record):
    rerun, llm = (json.loads(path.read_bytes()) if path.exists() else {}
                  for path in (study.RERUN, findings.LLM))
    page = (root / "study/results.md").read_text(encoding="utf-8")
    assert findings.results_page(record, rerun, llm) == page


def test_new_runs_have_a_section_of_their_own(record):
    rerun = {name: entry for name, entry in record.items() if "style" in name and "seed 5" not in name}
    page, without = findings.results_page(record, rerun, {}), findings.results_page(record, {}, {})
    head, section, rest = page.partition("## With today's code and defaults")
    new, claims, old = rest.partition("## The paper's claims")
    assert head + claims + old == without
    gain = findings.compare(rerun, "style", "PDL 0.25", findings.nats("rare"))
    assert gain.n == 4 and f"| PDL 0.25 | plain | nats of rare tokens | {gain:.2f} | +0.68 ± 0.02 |" in new


def test_a_real_language_model_has_a_section_too(record):
    texts = {"examples": {"0": ["a text", "another"]}}
    llm = {name: entry | texts for name, entry in record.items() if "style, " in name}
    llm |= {"style": record["style"] | {"steps": 9, "examples": [["in `quotes`"], ["an\nanswer"]]}}
    llm |= {"device": "a GPU", "dtype": "bfloat16"}
    page, without = findings.results_page(record, {}, llm), findings.results_page(record, {}, {})
    head, section, rest = page.partition("## On a real language model")
    new, claims, old = rest.partition("## The paper's claims")
    assert head + claims + old == without
    gain = findings.compare(llm, "style", "PDL 0.25", findings.nats("all"))
    assert f"| PDL 0.25 | plain | {gain.n} | {gain:.3f} |" in new and "(a GPU)" in new
    assert "1. `in 'quotes'`\n   - the author: `an answer`\n   - plain: `a text`\n" in new


def test_the_readme_says_what_was_measured(root):
    readme = (root / "README.md").read_text(encoding="utf-8")
    rerun, llm = (json.loads(path.read_bytes()) for path in (study.RERUN, findings.LLM))
    assert findings.table_in_short(rerun, llm).strip() in readme
