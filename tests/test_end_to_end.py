"""count, train, sample as a user runs them, on tiny/ and a text written here."""

import json
import os
import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
from model import GPT
from pdl import pdl_weights

# A network that is never reached, and a cache with nothing in it.
OFFLINE = os.environ | {"HF_ENDPOINT": "http://127.0.0.1:9", "TORCH_HOME": "/nonexistent"}
SMALL = ["--init_from", ROOT / "tiny", "--data", "text.txt", "--dtype", "float32", "--block_size", "32", "--eval_iters", "2", "--log_interval", "1", "--device", "cpu"]


def run(script, *args, cwd, ok=True, **kwargs):
    result = subprocess.run([sys.executable, ROOT / script, *map(str, args)], cwd=cwd, capture_output=True, text=True, env=OFFLINE, **kwargs)
    assert not ok or result.returncode == 0, result.stderr
    return result


def log(folder):
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


@pytest.fixture
def text(tmp_path):
    rng = random.Random(0)
    words = "the a of quick brown fox jumps over lazy dog and then sleeps under some old tree by water".split()
    (tmp_path / "text.txt").write_text("\n".join(" ".join(rng.choices(words, k=8)) + "." for _ in range(500)))
    return tmp_path


def test_count_train_sample(text):
    run("count.py", "text.txt", "--tokenizer", ROOT / "tiny", "-o", "counts.npy", cwd=text)
    out = run("train.py", *SMALL, "--counts", "counts.npy", "--max_iters", 6, "--batch_size", 4, "--eval_interval", 3, "--alpha", 0.5, cwd=text).stdout
    assert "cross-entropy, nats" in out and "distinct_1" in out
    report = json.loads((text / "out/report.json").read_text())
    assert report["after"]["val_ce"] < report["before"]["val_ce"]
    entries = log(text / "out")
    assert [e["iter"] for e in entries if "loss" in e] == [1, 2, 3, 4, 5, 6]
    assert [e["iter"] for e in entries if "val_ce" in e] == [0, 3, 6] and all("val_pdl" in e for e in entries if "val_ce" in e)
    again = [run("sample.py", "--prompt", "the quick", "--max_new_tokens", 8, "--num_samples", 2, cwd=text).stdout for _ in range(2)]
    assert again[0] == again[1] and again[0].count("the quick") >= 2
    (text / "prompt.txt").write_text("the quick")
    assert run("sample.py", "--prompt", "FILE:prompt.txt", "--max_new_tokens", 8, "--num_samples", 2, cwd=text).stdout == again[0]
    assert run("sample.py", "--prompt", "-", "--max_new_tokens", 8, "--num_samples", 2, cwd=text, input="the quick").stdout == again[0]


def test_training_follows_the_loss(text):
    """One step of train.py is one AdamW step on Eq. 5, written out here with full logits."""
    run("train.py", *SMALL, "--max_iters", 1, "--batch_size", 8, "--alpha", 1, "--warmup_iters", 0, "--grad_clip", 0, "--weight_decay", 0, cwd=text)
    from train import Split, load_tokens
    from count import load_tokenizer

    split = Split(load_tokens(text / "text.txt", load_tokenizer(ROOT / "tiny"), text / "token_cache"), 32, "text")
    x, y = split.sequences(split.train_starts(np.random.default_rng((1337, 0)).integers(split.n_train_starts, size=8)))
    w = pdl_weights(split.train_counts(4096), 1.0)[y]
    model = GPT.from_pretrained(ROOT / "tiny").train()
    model.set_dropout(0.0)
    loss = (w * -model(x).log_softmax(-1).gather(-1, y[..., None])[..., 0]).sum() / w.sum()
    torch.testing.assert_close(loss.item(), log(text / "out")[1]["loss"], rtol=1e-5, atol=0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-4, betas=(0.9, 0.95), weight_decay=0)
    loss.backward()
    optimizer.step()
    for a, b in zip(GPT.from_pretrained(text / "out").parameters(), model.parameters()):
        # Adam's first step is lr * sign(gradient): of a gradient that is nothing (the keys' bias), the sign of its rounding.
        clear = b.grad.abs() > 1e-5
        torch.testing.assert_close(a[clear], b[clear], rtol=0, atol=1e-6)
    assert (model.wte.weight.grad.abs() > 1e-5).float().mean() > 0.2


def test_held_out_text_is_never_trained_on(text):
    from train import Split

    for n in 500, 1234, 20_000:
        split = Split(np.arange(n), 16, "text")
        trained = np.unique(split.train_starts(np.arange(split.n_train_starts))[:, None] + np.arange(17))
        held_out = np.unique(split.val_starts[:, None] + np.arange(17))
        assert not np.intersect1d(trained, held_out).size
        assert 0.06 < len(held_out) / n < 0.11 and len(trained) > 0.8 * n
        assert 0 <= split.train_counts(n).sum() - len(trained) <= 16  # a last piece shorter than a sequence


SPLITS = [("1x1", 1, 8, 1), ("1x4", 1, 2, 4), ("2x2", 2, 2, 4)]


def test_the_same_batch_however_it_is_split(text):
    """One process or two, one micro-step or four: the same batches, losses and weights."""
    weights = {}
    for name, processes, batch_size, accumulation in SPLITS:
        launch = [] if processes == 1 else ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
        subprocess.run([sys.executable, *launch, ROOT / "train.py", *SMALL, "--max_iters", "3", "--alpha", "1", "--batch_size", str(batch_size),
                        "--gradient_accumulation_steps", str(accumulation), "--out_dir", name, "--learning_rate", "1e-3"],
                       cwd=text, env=OFFLINE | {"OMP_NUM_THREADS": "1"}, check=True, capture_output=True)
        weights[name] = GPT.from_pretrained(text / name).state_dict()
    for name in "1x4", "2x2":
        whole, parts = ([e["loss"] for e in log(text / n) if "loss" in e] for n in ("1x1", name))
        assert len(whole) == 3 and parts == pytest.approx(whole, rel=2e-5)
        for key, w in weights["1x1"].items():
            torch.testing.assert_close(weights[name][key], w, rtol=0, atol=2e-4)


def test_resumed_as_if_never_stopped(text):
    args = [*SMALL, "--batch_size", 4, "--eval_interval", 2, "--dropout", 0.1]
    run("train.py", *args, "--max_iters", 6, "--out_dir", "whole", cwd=text)
    process = subprocess.Popen([sys.executable, ROOT / "train.py", *map(str, args), "--max_iters", "6", "--out_dir", "cut"],
                               cwd=text, env=OFFLINE, stdout=subprocess.PIPE, text=True)
    for line in process.stdout:
        if line.startswith("step 5"):
            process.kill()
    process.wait()
    run("train.py", "--resume", "--out_dir", "cut", cwd=text)
    losses = [{e["iter"]: e["loss"] for e in log(text / name) if "loss" in e} for name in ("whole", "cut")]
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)


def test_uncounted_tokens_are_weighted_in_no_silence(text):
    np.save(text / "counts.npy", np.arange(4096) % 2)
    out = run("train.py", *SMALL, "--counts", "counts.npy", "--max_iters", 1, "--batch_size", 1, "--alpha", 1, cwd=text).stdout
    assert "WARNING" in out and "--eps 1" in out


@pytest.mark.parametrize("args, status, culprit", [
    (["--alpha", "-1"], 2, "--alpha"), (["--alpha", "nan"], 2, "--alpha"), (["--eps", "-1"], 2, "--eps"), (["--batch_size", "0"], 2, "--batch_size"),
    (["--resume", "--out_dir", "none"], 2, "none"), (["--alhpa", "1"], 2, "--alhpa"),
    (["--device", "tpu"], 1, "--device tpu"), (["--data", "missing.txt"], 1, "missing.txt"), (["--data", "."], 1, "."),
    (["--block_size", "4000"], 1, "--block_size"), (["--init_from", "gpt5"], 1, "gpt5"), (["--init_from", "gpt2"], 1, "gpt2"), (["--init_from", "scratch"], 1, "--tokenizer"),
    (["--counts", "text.txt"], 1, "text.txt"), (["--counts", "short.npy"], 1, "short.npy"), (["--counts", "negative.npy"], 1, "negative.npy"),
])
def test_a_mistake_ends_in_one_line(text, args, status, culprit):
    np.save(text / "short.npy", np.ones(50257, int))
    np.save(text / "negative.npy", -np.ones(4096))
    result = run("train.py", *SMALL, *args, cwd=text, ok=False)
    assert result.returncode == status and result.stderr.count("\n") == 1 and culprit in result.stderr, result.stderr
