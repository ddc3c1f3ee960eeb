"""train.py: it trains on Eq. 5, the same however the work is split, and says what it does."""

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

import count
from model import GPT
from pdl import pdl_weights

TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]


@pytest.fixture
def train(run_here, small, text):
    """train(*flags): a run on text.txt that takes a moment; what it printed."""
    def train(*flags):
        return run_here("train.py", *small, *flags, cwd=text).stdout

    return train


def test_count_train_sample(run, small, text, log, report, tiny):
    run("count.py", "text.txt", "--tokenizer", tiny, "-o", "counts.npy", cwd=text)
    flags = "--counts", "counts.npy", "--max_iters", 6, "--batch_size", 4, "--eval_interval", 3
    out = run("train.py", *small, *flags, cwd=text).stdout
    assert "cross-entropy, nats" in out and "distinct_1" in out
    assert report(text / "out")["after"]["val_ce"] < report(text / "out")["before"]["val_ce"]
    entries = log(text / "out")
    assert [e["iter"] for e in entries if "loss" in e] == [1, 2, 3, 4, 5, 6]
    assert [e["iter"] for e in entries if "val_ce" in e] == [0, 3, 6]
    assert all("val_pdl" in e for e in entries if "val_ce" in e)
    assert all(e["lr"] > 0 and e["tok_per_s"] > 0 for e in entries if "loss" in e)
    assert out.rstrip().endswith("now: python sample.py")
    flags = "--prompt", "the quick", "--max_new_tokens", 8, "--num_samples", 2
    again = [run("sample.py", *flags, cwd=text).stdout for _ in range(2)]
    assert again[0] == again[1] and again[0].count("the quick") >= 2


def test_one_step_is_one_step_on_eq_5(train, text, tiny, tokenizer, log):
    """One step of train.py is one AdamW step on Eq. 5, written out here with full logits."""
    train("--max_iters", 1, "--batch_size", 8, "--alpha", 1, "--warmup_iters", 0, "--grad_clip", 0,
          "--weight_decay", 0, "--learning_rate", 1e-3)
    corpus = count.open_corpus(text / "text.txt", tokenizer, 32, text / "cache")
    x, y = map(torch.from_numpy, corpus.batch(np.random.default_rng((1337, 0)), 8))
    w = pdl_weights(corpus.train_counts(4096), 1.0)[y]
    model = GPT.from_pretrained(tiny).train()
    model.set_dropout(0.0)
    loss = (w * -model(x).log_softmax(-1).gather(-1, y[..., None])[..., 0]).sum() / w.sum()
    torch.testing.assert_close(loss.item(), log(text / "out")[1]["loss"], rtol=1e-5, atol=0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, betas=(0.9, 0.95), weight_decay=0)
    loss.backward()
    optimizer.step()
    for a, b in zip(GPT.from_pretrained(text / "out").parameters(), model.parameters()):
        # Adam's first step is lr * sign(gradient): where that is nothing (the keys' bias), of its rounding.
        clear = b.grad.abs() > 1e-5
        torch.testing.assert_close(a[clear], b[clear], rtol=0, atol=1e-6)
    assert (model.wte.weight.grad.abs() > 1e-5).float().mean() > 0.2


# --- however the work is split ---


def test_the_same_training_however_it_is_split(train, two_ranks, run, small, text, log, report):
    """One micro-step or three, one process or two, torchrun with no other flag: losses, figures, weights."""
    flags = "--max_iters", 3, "--alpha", 1, "--learning_rate", 1e-3, "--eval_iters", 1
    # Nine sequences, to train on and to measure on: five for one process and four for the other.
    one_step, micro_steps = ["--batch_size", 9], ["--batch_size", 3, "--gradient_accumulation_steps", 3]
    train(*flags, *one_step, "--out_dir", "whole")
    train(*flags, *micro_steps, "--out_dir", "micro-steps")
    run("train.py", *small, *flags, *one_step, "--out_dir", "torchrun", cwd=text, python=TORCHRUN)
    for process in two_ranks("train.py", *small, *flags, *micro_steps, "--out_dir", "both", cwd=text):
        _, stderr = process.communicate()
        assert process.returncode == 0, stderr
    whole, weights = log(text / "whole"), GPT.from_pretrained(text / "whole").state_dict()
    for name in "micro-steps", "torchrun", "both":
        parts = log(text / name)
        assert len(parts) == len(whole) == 5
        for key in "iter", "loss", "lr", "val_ce", "val_pdl":
            found, expected = ([e[key] for e in entries if key in e] for entries in (parts, whole))
            assert found == pytest.approx(expected, rel=2e-5), (name, key)
        before, after = (report(text / folder)["before"] for folder in ("whole", name))
        for key in "accuracy", "bits_per_byte", "ce_by_band", "share_of_text", "uncounted":
            assert after[key] == pytest.approx(before[key], rel=1e-5), (name, key)
        for key, w in GPT.from_pretrained(text / name).state_dict().items():
            torch.testing.assert_close(w, weights[key], rtol=0, atol=2e-4)


# --- weights ---


def test_counts_are_scaled_and_added(train, text, losses):
    np.save(text / "a.npy", np.arange(1, 4097))
    np.save(text / "b.npy", np.full(4096, 10.0))
    np.save(text / "sum.npy", np.arange(1, 4097) / 2 + 10)
    train("--counts", "a.npy:0.5", "b.npy", "--max_iters", 1, "--out_dir", "parts")
    train("--counts", "sum.npy", "--max_iters", 1, "--out_dir", "sum")
    assert losses(text / "parts") == losses(text / "sum")


def test_alpha_rises_from_zero(train, text, losses):
    fixed = ["--max_iters", 2, "--learning_rate", 0, "--batch_size", 4]
    for name, flags in {"rising": ["--alpha", 1, "--alpha_warmup_iters", 2], "0": ["--alpha", 0],
                        "0.5": ["--alpha", 0.5]}.items():
        train(*fixed, *flags, "--out_dir", name)
    expected = {1: losses(text / "0")[1], 2: losses(text / "0.5")[2]}
    assert losses(text / "rising") == pytest.approx(expected, rel=1e-6)


def test_uncounted_tokens_are_weighted_in_no_silence(train, text):
    np.save(text / "counts.npy", np.arange(4096) % 2)
    flags = "--counts", "counts.npy", "--max_iters", 1, "--alpha", 1
    warning = [line for line in train(*flags).splitlines() if line.startswith("WARNING")]
    assert len(warning) == 1 and "--eps 1" in warning[0] and "--counts" in warning[0]
    # With probabilities, an eps of 1 makes all weights the same: no advice.
    out = train(*flags, "--normalize", "--out_dir", "normalized")
    assert "WARNING" in out and "--eps 1" not in out


def test_the_warning_names_the_tokens_with_the_most_weight(train, text, tokenizer):
    counts = np.ones(4096, np.int64)
    counts[tokenizer.encode_ordinary(" the")] = 0
    np.save(text / "counts.npy", counts)
    lines = train("--counts", "counts.npy", "--max_iters", 1).splitlines()
    assert [("' the'" in line) for line in lines if line.startswith("WARNING")] == [True]


# --- pairs ---


def test_pairs_are_learned_and_end(run_here, pairs, tiny, report):
    run_here("train.py", "--init_from", tiny, "--data", "pairs.jsonl", "--block_size", 32, "--max_iters", 50,
             "--learning_rate", 4e-3, "--alpha", 0, "--batch_size", 8, "--device", "cpu", cwd=pairs)
    assert report(pairs / "out")["after"]["val_ce"] < 0.5 * report(pairs / "out")["before"]["val_ce"]
    flags = "--prompt", "Question 12:", "--temperature", 0, "--num_samples", 1
    out = run_here("sample.py", *flags, cwd=pairs).stdout
    # It stopped at <|endoftext|>.
    assert "the answer is" in out and "Question" not in out.replace("Question 12", "")


def test_an_end_of_text_is_never_uncounted(train, pairs, text, tokenizer):
    """Every completion ends with one, but no plain text that counts are made of has any."""
    counts = np.ones(4096, np.int64)
    counts[tokenizer.eot_token] = 0
    np.save(text / "counts.npy", counts)
    out = train("--data", "pairs.jsonl", "--counts", "counts.npy", "--max_iters", 1, "--alpha", 1)
    assert "WARNING" not in out and "<|endoftext|>" in out


def test_the_first_lines_say_how_pairs_were_understood(train, pairs):
    out = train("--data", "pairs.jsonl", "--block_size", 8, "--max_iters", 1)
    data = next(line for line in out.splitlines() if line.startswith("data:"))
    assert "100 pairs: 90 to train on, 10 held out" in data and "longer than --block_size 8" in data


# --- what a run says and leaves ---


def test_without_a_network_it_trains_tiny_and_says_so(run_here, text):
    out = run_here("train.py", "--max_iters", 1, "--batch_size", 1, "--block_size", 32, "--eval_iters", 1,
                   "--device", "cpu", cwd=text).stdout
    lines = out.splitlines()
    notes = [line for line in lines if line.startswith("NOTE")]
    assert notes == [lines[0], lines[-1]] and all("tiny/" in line and "gpt2" in line for line in notes)
    assert len(notes[0]) < 120 and "http" not in notes[0] and len(notes[1]) < len(notes[0])
    assert "Python language reference" in out and "learning rate 0.003" in out


def test_the_last_lines_name_the_criterion(train):
    lines = train("--max_iters", 4, "--eval_interval", 4).splitlines()
    verdict = next(line for line in lines if "weights of step" in line)
    assert "step 4" in verdict and "cross-entropy" in verdict and "before training" not in verdict


def test_it_is_said_when_no_step_was_better_than_the_start(train):
    lines = train("--max_iters", 1, "--learning_rate", 0).splitlines()
    verdict = next(line for line in lines if "weights of step" in line)
    assert "cross-entropy" in verdict and "before training" in verdict and "--learning_rate" in verdict


def test_the_report_is_json_even_where_a_band_has_no_targets(train, text):
    counts = np.ones(4096, np.int64)
    counts[4000] = 10**9  # half of the counted text is one token, which is not in this text
    np.save(text / "counts.npy", counts)
    train("--counts", "counts.npy", "--max_iters", 1)
    for file in "report.json", "args.json":
        json.loads((text / "out" / file).read_text(encoding="utf-8"), parse_constant=pytest.fail)


def test_the_folder_is_a_checkpoint_to_start_from(train, text):
    train("--max_iters", 1)
    assert train("--init_from", "out", "--max_iters", 1, "--out_dir", "next").startswith("model: out,")


# --- several alphas ---


def table_rows(out):
    """The lines of the last table, by their first word."""
    lines = out[out.rindex("alpha  ") :].splitlines()[1:]
    return {line.split()[0]: line.split() for line in lines[: lines.index("")] if line}


def test_a_series_is_its_single_runs_and_a_table(train, text, losses, report):
    flags = "--max_iters", 2
    out = train(*flags, "--alpha", 0, 0.5)
    for alpha in "0", "0.5":
        train(*flags, "--alpha", alpha, "--out_dir", f"single-{alpha}")
        assert losses(text / f"out/alpha-{alpha}") == losses(text / f"single-{alpha}")
        after = report(text / f"single-{alpha}")["after"]
        assert report(text / f"out/alpha-{alpha}")["after"] == after
        cells = table_rows(out)[alpha]
        shown = after["val_ce"], *after["ce_by_band"].values(), after["f1_by_band"]["rare"]
        assert cells[1:6] == [f"{x:.3f}" for x in shown]
    assert list(table_rows(out)) == ["before", "0", "0,", "0.5", "the"]  # 0 with a shift, the text itself
    assert out.count("distinct-2") == 1
    ((alpha, shift),) = re.findall(r"Take alpha (.*?)(?: and --shift (.*?))?:", out)
    command = f"now: python sample.py --init_from {Path('out', f'alpha-{alpha}')}"
    command += f" --counts {Path('out/alpha-0/counts.npy')} --shift {shift}" if shift else ""
    assert out.endswith(command + "\n")
    assert losses(text / "out/alpha-0") != losses(text / "out/alpha-0.5")


def test_an_interrupted_series_goes_on_where_it_was(train, start, until, run_here, small, text, losses, log):
    flags = "--max_iters", 4, "--eval_interval", 2, "--alpha", 0, 0.5
    expected = table_rows(train(*flags, "--out_dir", "whole"))
    process = start("train.py", *small, *flags, "--out_dir", "cut", cwd=text)
    for _ in range(2):  # into the second run
        until(process, "step 3: loss")
    process.kill()
    process.communicate()
    finished = (text / "cut/alpha-0/model.safetensors").stat().st_mtime_ns
    out = run_here("train.py", "--resume", "--out_dir", "cut", cwd=text).stdout
    assert "nothing left to do in cut/alpha-0" in out and "resuming at step 2" in out
    assert (text / "cut/alpha-0/model.safetensors").stat().st_mtime_ns == finished
    for alpha in "alpha-0", "alpha-0.5":
        assert losses(text / "cut" / alpha) == pytest.approx(losses(text / "whole" / alpha), rel=1e-5)
    rows = table_rows(out)
    assert list(rows) == list(expected)
    for name in "0", "0.5":
        found, of_the_whole = ([float(cell) for cell in table[name][1:5]] for table in (rows, expected))
        assert found == pytest.approx(of_the_whole, abs=2e-3)


def test_a_series_that_lacks_its_last_run_makes_it(train, run_here, text):
    whole = train("--max_iters", 1, "--alpha", 0, 0.5)
    shutil.rmtree(text / "out/alpha-0.5")  # as if ended between the two
    assert table_rows(run_here("train.py", "--resume", cwd=text).stdout) == table_rows(whole)


def test_a_resumed_series_starts_from_the_model_that_it_began_with(run_here, small, text, tiny):
    run_here("train.py", *small[2:], "--max_iters", 1, "--alpha", 0.5, 0, cwd=text)  # instead of gpt2, tiny/
    had = json.loads((text / "out/alpha-0.5/args.json").read_bytes())
    assert had["init_from"] == str(tiny)
    shutil.rmtree(text / "out/alpha-0")
    out = run_here("train.py", "--resume", "--max_iters", 2, cwd=text).stdout
    assert out.count("model: tiny") == 1 and out.count("run:   2 steps") == 2
