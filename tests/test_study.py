"""Prompts and completions, several counts, and what a run measures of its text: each against a few lines written out here."""

import json
import math
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
sys.path.insert(0, str(Path(__file__).parent))
from test_end_to_end import SMALL, log, run, text  # noqa: F401 (text is a fixture)

from count import load_tokenizer
from sample import measure_text
from train import Pairs, load_counts


@pytest.fixture
def pairs(tmp_path):
    rows = [{"prompt": f"Question {i}:", "completion": f" the answer is {i * i}." + " Yes." * (i % 5)} for i in range(100)]
    (tmp_path / "pairs.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n")
    return tmp_path


def test_pairs_carry_loss_on_completions_only(pairs):
    tokenizer = load_tokenizer(ROOT / "tiny")
    split = Pairs(pairs / "pairs.jsonl", tokenizer, 64)
    rows = [json.loads(line) for line in (pairs / "pairs.jsonl").read_text().splitlines()]
    tokens = lambda row: tokenizer.encode_ordinary(row["completion"]) + [tokenizer.eot_token]
    training, held_out = [r for i, r in enumerate(rows) if i % 10 != 9], rows[9::10]
    assert (split.train_counts(4096) == np.bincount(sum(map(tokens, training), []), minlength=4096)).all()
    assert split.n_train_starts == 90
    x, y = split.sequences(split.train_starts(np.arange(90)))
    assert x.shape == y.shape == (90, 64)
    for inputs, targets, row in zip(x.tolist(), y.tolist(), training):
        prompt = tokenizer.encode_ordinary(row["prompt"])
        assert inputs[: len(prompt)] == prompt  # each starts where a pair does
        assert targets[len(prompt) - 1 :][: len(tokens(row))] == tokens(row) and set(targets[: len(prompt) - 1]) <= {-100}
    # Every held-out completion once, in order.
    _, y = split.sequences(split.val_starts)
    assert y[y != -100].tolist() == sum(map(tokens, held_out), [])
    assert split.openings(3)[1] == tuple(tokenizer.encode_ordinary(held_out[1][key]) for key in ("prompt", "completion"))


def test_pairs_from_the_command_line(pairs):
    run("train.py", "--init_from", ROOT / "tiny", "--data", "pairs.jsonl", "--block_size", 64, "--max_iters", 150, "--learning_rate", 2e-3, "--alpha", 0,
        "--batch_size", 8, "--eval_interval", 75, "--log_interval", 75, cwd=pairs)
    report = json.loads((pairs / "out/report.json").read_text())
    assert report["after"]["val_ce"] < 0.5 * report["before"]["val_ce"]
    out = run("sample.py", "--prompt", "Question 12:", "--temperature", 0, "--num_samples", 1, cwd=pairs).stdout
    assert "the answer is" in out and "Question" not in out.replace("Question 12", "")  # it stopped at <|endoftext|>


@pytest.mark.parametrize("line", ["{", "[1]", '{"prompt": "a"}', '{"prompt": "a", "completion": 3}'])
def test_a_malformed_line_is_named(pairs, line):
    path = pairs / "pairs.jsonl"
    path.write_text(path.read_text() + line + "\n")
    with pytest.raises(ValueError, match="pairs.jsonl line 101 "):
        Pairs(path, load_tokenizer(ROOT / "tiny"), 64)


def test_counts_are_scaled_and_added(text):
    np.save(text / "a.npy", np.arange(1, 4097))
    np.save(text / "b.npy", np.full(4096, 10.0))
    assert (load_counts(f"{text}/a.npy:0.5", 4096) == np.arange(1, 4097) / 2).all()
    run("train.py", *SMALL, "--counts", "a.npy:0.5", "b.npy", "--max_iters", 1, "--batch_size", 2, "--out_dir", "parts", cwd=text)
    np.save(text / "sum.npy", np.arange(1, 4097) / 2 + 10)
    run("train.py", *SMALL, "--counts", "sum.npy", "--max_iters", 1, "--batch_size", 2, "--out_dir", "sum", cwd=text)
    assert log(text / "parts")[1]["loss"] == log(text / "sum")[1]["loss"]


def test_alpha_rises_from_zero(text):
    losses = {}
    for name, flags in {"rising": ["--alpha", 1, "--alpha_warmup_iters", 2], "0": ["--alpha", 0], "0.5": ["--alpha", 0.5]}.items():
        run("train.py", *SMALL, *flags, "--max_iters", 2, "--learning_rate", 0, "--batch_size", 4, "--out_dir", name, cwd=text)
        losses[name] = [e["loss"] for e in log(text / name) if "loss" in e]
    assert losses["rising"] == pytest.approx([losses["0"][0], losses["0.5"][1]], rel=1e-6)


def test_measures_of_text():
    bands = torch.tensor([0, 1, 2, 2])
    m = measure_text([[0, 1, 0, 1, 0, 1, 0], [2, 2]], torch.tensor([0, 0, 1, 2]), bands, 4)
    assert m["distinct_1"] == pytest.approx(3 / 9) and m["distinct_2"] == pytest.approx(3 / 7) and m["distinct_3"] == pytest.approx(2 / 5)
    assert m["repeated_4"] == pytest.approx(1 - 2 / 4)
    assert m["distinct_tokens"] == 3 and m["rare_share"] == pytest.approx(2 / 9)
    p, q = [4 / 9, 3 / 9, 2 / 9], [3 / 8, 2 / 8, 2 / 8]
    assert m["kl"] == pytest.approx(sum(a * math.log(a / b) for a, b in zip(p, q)))


def test_the_tables_of_the_readme_are_those_of_the_study():
    printed = run("tests/study.py", "--tables", cwd=ROOT).stdout.splitlines()
    results = (ROOT / "README.md").read_text(encoding="utf-8").split("## Results")[1].split("\n## ")[0]
    rows = [line for line in results.splitlines() if line.startswith("|")]
    assert len(rows) > 20 and set(rows) <= set(printed)
