"""train.py trains on Eq. 5, the same however the work is split, and says what it does."""

import json
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
    assert report(text / "out")["after"]["val_ce"] < report(text / "out")["before"]["val_ce"]
    entries = log(text / "out")
    assert [e["iter"] for e in entries if "loss" in e] == [1, 2, 3, 4, 5, 6]
    assert [e["iter"] for e in entries if "val_ce" in e] == [0, 3, 6]
    assert all("val_pdl" in e for e in entries if "val_ce" in e)
    assert all(e["lr"] > 0 and e["tok_per_s"] > 0 for e in entries if "loss" in e)
    assert out.rstrip().endswith("now: python sample.py --init_from out")
    flags = "--prompt", "the quick", "--max_new_tokens", 8, "--num_samples", 2
    assert run("sample.py", *flags, cwd=text).stdout.count("the quick") >= 2


def test_one_step_is_one_step_on_eq_5(train, text, tiny, tokenizer, log):
    """One step of train.py is one AdamW step on Eq. 5, written out here with full logits."""
    train("--max_iters", 1, "--batch_size", 8, "--alpha", 1, "--warmup_iters", 0, "--grad_clip", 0,
          "--weight_decay", 0, "--learning_rate", 1e-3)
    corpus = count.load_corpus([text / "text.txt"], tokenizer, 32)
    x, y = map(torch.from_numpy, corpus.batch(np.random.default_rng((1337, 0)), 8))
    w = pdl_weights(corpus.counts(4096), 1.0)[y]
    model = GPT.from_pretrained(tiny).train()
    model.set_dropout(0.0)
    loss = (w * -model(x).log_softmax(-1).gather(-1, y[..., None])[..., 0]).sum() / w.sum()
    torch.testing.assert_close(loss.item(), log(text / "out")[1]["loss"], rtol=1e-5, atol=0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, betas=(0.9, 0.95), weight_decay=0)
    loss.backward()
    optimizer.step()
    for a, b in zip(GPT.from_pretrained(text / "out").parameters(), model.parameters()):
        # Adam's first step is lr * sign(gradient). Where that is 0 (the keys' bias), it has a random sign.
        clear = b.grad.abs() > 1e-5
        torch.testing.assert_close(a[clear], b[clear], rtol=0, atol=1e-6)
    assert (model.wte.weight.grad.abs() > 1e-5).float().mean() > 0.2


def test_the_same_training_however_it_is_split(train, two_ranks, run, small, text, log, report):
    """One micro-step or three, one process or two: the same losses, evaluations and weights."""
    flags = "--max_iters", 3, "--alpha", 1, "--learning_rate", 1e-3, "--eval_iters", 1
    # Nine sequences, to train on and to evaluate on: five for one process and four for the other.
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
        for key in "accuracy", "ce_by_band", "share_of_text", "share_of_weight":
            assert after[key] == pytest.approx(before[key], rel=1e-5), (name, key)
        for key, w in GPT.from_pretrained(text / name).state_dict().items():
            torch.testing.assert_close(w, weights[key], rtol=0, atol=2e-4)


def test_evaluation_is_cross_entropy_by_token_and_by_band(train, text, tiny, tokenizer, report):
    """The evaluation before training, computed here from full logits."""
    train("--max_iters", 1, "--alpha", 0.5, "--eval_iters", 3)
    corpus, found = count.load_corpus([text / "text.txt"], tokenizer, 32), report(text / "out")["before"]
    rows = np.linspace(0, len(corpus.held_out) - 1, 6).astype(int)
    x, y = map(torch.from_numpy, corpus.held_out_batch(rows))
    with torch.no_grad():
        log_p = GPT.from_pretrained(tiny).eval()(x).log_softmax(-1)
    ce, right, y = -log_p.gather(-1, y[..., None]).flatten(), (log_p.argmax(-1) == y).flatten(), y.flatten()
    w, band = pdl_weights(corpus.freq, 0.5)[y], torch.from_numpy(corpus.bands)[y]
    assert found["val_ce"] == pytest.approx(ce.mean().item(), rel=1e-5)
    assert found["val_pdl"] == pytest.approx(((w * ce).sum() / w.sum()).item(), rel=1e-5)
    for i, name in enumerate(count.BANDS):
        assert found["ce_by_band"][name] == pytest.approx(ce[band == i].mean().item(), rel=1e-5)
        assert found["accuracy_by_band"][name] == pytest.approx(right[band == i].float().mean().item())
        share = (w[band == i].sum() / w.sum()).item()
        assert found["share_of_weight"][name] == pytest.approx(share, rel=1e-5)


# --- weights and data ---


def test_counts_are_scaled_and_added(train, text, losses):
    np.save(text / "a.npy", np.arange(1, 4097))
    np.save(text / "b.npy", np.full(4096, 10.0))
    np.save(text / "sum.npy", np.arange(1, 4097) / 2 + 10)
    train("--counts", "a.npy:0.5", "--counts", "b.npy", "--max_iters", 1, "--out_dir", "parts")
    train("--counts", "sum.npy", "--max_iters", 1, "--out_dir", "sum")
    assert losses(text / "parts") == losses(text / "sum")


def test_alpha_rises_from_zero(train, text, losses):
    fixed = ["--max_iters", 2, "--learning_rate", 0, "--batch_size", 4]
    runs = {"rising": ["--alpha", 1, "--rising"], "0": ["--alpha", 0], "0.5": ["--alpha", 0.5]}
    for name, flags in runs.items():
        train(*fixed, *flags, "--out_dir", name)
    expected = {1: losses(text / "0")[1], 2: losses(text / "0.5")[2]}
    assert losses(text / "rising") == pytest.approx(expected, rel=1e-6)


def test_pairs_are_learned_and_end(run_here, pairs, tiny, report):
    flags = ("--init_from", tiny, "--data", "pairs.jsonl", "--block_size", 32, "--max_iters", 50,
             "--learning_rate", 4e-3, "--alpha", 0, "--batch_size", 8, "--device", "cpu")
    out = run_here("train.py", *flags, cwd=pairs).stdout
    assert "90 pairs to train on, 10 held out" in out
    assert report(pairs / "out")["after"]["val_ce"] < 0.5 * report(pairs / "out")["before"]["val_ce"]
    sample = report(pairs / "out")["sample"]
    assert sample["prompt"] == "Question 9:" and sample["author"] == " the answer is 81. Yes. Yes. Yes. Yes."
    flags = "--prompt", "Question 12:", "--temperature", 0, "--num_samples", 1
    out = run_here("sample.py", *flags, cwd=pairs).stdout
    assert "the answer is" in out and "Question" not in out.replace("Question 12", "")  # it stopped


def test_several_files_and_standard_input(run, small, text):
    (text / "more.txt").write_text("some more text by the water. " * 200, encoding="utf-8")
    flags = "--max_iters", 1, "--data", "more.txt", "-"  # beside the --data of small
    out = run("train.py", *small, *flags, cwd=text, input="and this, too. " * 100).stdout
    assert "data:  text.txt, more.txt, -" in out


def test_a_padded_vocabulary_trains_and_is_never_sampled(run_here, small, text, tiny, tokenizer):
    """As resize_token_embeddings(pad_to_multiple_of=...) leaves it: 64 rows that stand for no token."""
    model = GPT.from_pretrained(tiny)
    model.config.vocab_size += 64
    padding = 10 * model.wte.weight.data.mean(0).expand(64, -1)
    model.wte = torch.nn.Embedding.from_pretrained(torch.cat((model.wte.weight.data, padding)))
    model.save_pretrained(text / "padded")
    for name in "vocab.json", "merges.txt":
        (text / "padded" / name).write_bytes((tiny / name).read_bytes())
    flags = "--init_from", "padded", "--max_iters", 1, "--eps", 0, "--alpha", 0
    run_here("train.py", *small, *flags, cwd=text)
    assert GPT.from_pretrained(text / "out").config.vocab_size == 4160
    run_here("sample.py", "--init_from", "padded", "--temperature", 5, "--max_new_tokens", 20, cwd=text)


# --- what a run says and leaves ---


def test_without_a_network_it_trains_tiny_and_says_so(run_here, text, tiny):
    flags = "--max_iters", 1, "--batch_size", 1, "--block_size", 32, "--eval_iters", 1, "--device", "cpu"
    lines = run_here("train.py", *flags, cwd=text).stdout.splitlines()
    notes = [line for line in lines if line.startswith("NOTE")]
    assert notes == [lines[0], lines[-1]] and "tiny/" in notes[0] and "gpt2" in notes[0]
    assert len(notes[0]) < 130 and "://" not in notes[0]
    assert any("Python language reference" in line for line in lines)
    args = json.loads((text / "out/args.json").read_text(encoding="utf-8"))
    assert args["init_from"] == str(tiny) and args["learning_rate"] == 3e-3 and args["dtype"] != "auto"


def test_the_report_is_json_even_where_a_band_has_no_targets(train, text):
    counts = np.ones(4096, np.int64)
    counts[4000] = 10**9  # half of the counted text is one token, which is not in this text
    np.save(text / "counts.npy", counts)
    train("--counts", "counts.npy", "--max_iters", 1)
    for file in "report.json", "args.json":
        json.loads((text / "out" / file).read_text(encoding="utf-8"), parse_constant=pytest.fail)


def test_the_folder_is_a_checkpoint_and_keeps_what_it_does_not_know(train, text, tiny):
    (text / "mine").mkdir()
    for path in tiny.iterdir():
        (text / "mine" / path.name).write_bytes(path.read_bytes())
    config = json.loads((tiny / "config.json").read_text(encoding="utf-8"))
    own = {"pad_token_id": 7, "bos_token_id": 3, "eos_token_id": 5, "task_specific_params": {"a": [1, None]}}
    (text / "mine/config.json").write_text(json.dumps(config | own), encoding="utf-8")
    (text / "mine/generation_config.json").write_text('{"eos_token_id": 5, "top_k": 9}', encoding="utf-8")
    train("--init_from", "mine", "--max_iters", 1)
    saved = json.loads((text / "out/config.json").read_text(encoding="utf-8"))
    # Completions end with the end-of-text token, and this is where Transformers' generate shall stop.
    assert {name: saved[name] for name in config | own} == config | own | {"eos_token_id": 4095}
    saved = json.loads((text / "out/generation_config.json").read_text(encoding="utf-8"))
    assert saved == {"eos_token_id": 4095, "top_k": 9}
    assert train("--init_from", "out", "--max_iters", 1, "--out_dir", "next").startswith("model: out,")


# --- several alphas ---


def table_rows(out):
    """The lines of the last table, by their first column."""
    lines = out[out.rindex("alpha  ") :].splitlines()[1:]
    lines = lines[: next(i for i, line in enumerate(lines) if line.startswith("now:"))]
    return {line[:13].strip(): line[13:].split() for line in lines}


def test_a_series_is_its_single_runs_and_a_table(train, text, losses, report):
    flags = "--max_iters", 2
    out = train(*flags, "--alpha", 0, 0.5)
    for alpha in "0", "0.5":
        train(*flags, "--alpha", alpha, "--out_dir", f"single-{alpha}")
        assert losses(text / f"out/alpha-{alpha}") == losses(text / f"single-{alpha}")
        after = report(text / f"single-{alpha}")["after"]
        assert report(text / f"out/alpha-{alpha}")["after"] == after
        shown = after["val_ce"], *after["ce_by_band"].values()
        assert table_rows(out)[alpha][:4] == [f"{x:.3f}" for x in shown]
    assert list(table_rows(out)) == ["before", "0", "0, shift 0.5", "0.5"]
    assert losses(text / "out/alpha-0") != losses(text / "out/alpha-0.5")


def test_a_series_goes_on_where_it_was_stopped(train, start, until, run_here, small, text, losses):
    flags = "--max_iters", 4, "--eval_interval", 2, "--alpha", 0.5, 0
    expected = table_rows(train(*flags, "--out_dir", "whole"))
    process = start("train.py", *small, *flags, "--out_dir", "cut", cwd=text)
    for _ in range(2):  # into the second run
        until(process, "step 3: loss")
    process.kill()
    process.communicate()
    finished = (text / "cut/alpha-0.5/model.safetensors").stat().st_mtime_ns
    out = run_here("train.py", "--resume", "--out_dir", "cut", cwd=text).stdout
    assert "cut/alpha-0.5 is finished" in out.replace("\\", "/") and "resuming at step 2" in out
    assert (text / "cut/alpha-0.5/model.safetensors").stat().st_mtime_ns == finished
    for alpha in "alpha-0", "alpha-0.5":
        assert losses(text / "cut" / alpha) == pytest.approx(losses(text / "whole" / alpha), rel=1e-5)
    assert list(table_rows(out)) == list(expected)
    # A run of the series that has not been started yet is started.
    for path in sorted((text / "cut/alpha-0").iterdir(), reverse=True):
        path.unlink()
    (text / "cut/alpha-0").rmdir()
    assert table_rows(run_here("train.py", "--resume", "--out_dir", "cut", cwd=text).stdout) == expected
