"""train.py trains on Eq. 5, the same however the work is split, and says what it does."""

import json

import numpy as np
import pytest
import torch

import count
from model import GPT
from pdl import pdl_weights

def test_count_train_sample(run, text, small, tiny, log, report):
    """The three scripts in a row, on several files and standard input."""
    (text / "more.txt").write_text("some more text by the water. " * 200, encoding="utf-8")
    data = "text.txt", "more.txt", "-"
    run("count.py", *data, "--tokenizer", tiny, "-o", "counts.npy", cwd=text, input="and this, too. " * 100)
    flags = "--counts", "counts.npy", "--max_iters", 6, "--batch_size", 4, "--eval_interval", 3
    flags = *flags, "--data", *data[1:]  # small has text.txt
    out = run("train.py", *small, *flags, cwd=text, input="and this, too. " * 100).stdout
    assert "data:  text.txt, more.txt, -: " in out and "now: python sample.py --init_from out" in out
    entries = log(text / "out")
    assert [e["iter"] for e in entries if "loss" in e] == [1, 2, 3, 4, 5, 6]
    assert [e["iter"] for e in entries if "val_ce" in e and "val_pdl" in e] == [0, 3, 6]
    assert all(e["lr"] > 0 and e["tok_per_s"] > 0 for e in entries if "loss" in e)
    assert report(text / "out")["after"]["val_ce"] < report(text / "out")["before"]["val_ce"]
    flags = "--prompt", "the quick", "--max_new_tokens", 8, "--num_samples", 2
    assert run("sample.py", *flags, cwd=text).stdout.count("the quick") >= 2


def test_one_step_is_one_step_on_eq_5(train, text, tiny, tokenizer, losses, report):
    """One step of train.py is one AdamW step on Eq. 5, written out here with full logits in float64."""
    a, b = np.arange(4096), np.full(4096, 10.0)
    b[4000] = 10**9  # more than half of what was counted is a token that is not in this text
    np.save(text / "a.npy", a)
    np.save(text / "b.npy", b)
    train("--max_iters", 1, "--batch_size", 8, "--alpha", 1, "--counts", "a.npy:0.5", "b.npy",
          "--warmup_iters", 0, "--grad_clip", 0, "--weight_decay", 0, "--learning_rate", 1e-3)
    corpus = count.load_corpus([text / "text.txt"], tokenizer, 32)
    drawn = np.random.default_rng((1337, 0)).integers(len(corpus.training), size=8)
    x, y = map(torch.from_numpy, corpus.training[drawn])
    w = 1 / (torch.from_numpy(0.5 * a + b)[y] + 1)
    model = GPT.from_pretrained(tiny).double().train()
    model.set_dropout(0.0)
    loss = (w * -model(x).log_softmax(-1).gather(-1, y[..., None])[..., 0]).sum() / w.sum()
    assert losses(text / "out")[1] == pytest.approx(loss.item(), rel=1e-5)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, betas=(0.9, 0.95), weight_decay=0)
    loss.backward()
    optimizer.step()
    for ours, theirs in zip(GPT.from_pretrained(text / "out").parameters(), model.parameters()):
        # Adam's first step is lr * sign(gradient). Where that is 0 (the keys' bias), it has a random sign.
        clear = theirs.grad.abs() > 1e-5
        torch.testing.assert_close(ours[clear].double(), theirs[clear], rtol=0, atol=1e-6)
    assert (model.wte.weight.grad.abs() > 1e-5).float().mean() > 0.2
    assert "frequent" not in report(text / "out")["after"]["ce_by_band"]  # a band without targets is left out


def test_the_same_training_however_it_is_split(train, start, small, text, log, report):
    """One micro-step or three, one process or two: the same gradients, losses and evaluations."""
    flags = "--max_iters", 3, "--alpha", 1, "--learning_rate", 1e-3, "--grad_clip", 0, "--eval_iters", 1
    # Nine sequences, to train on and to evaluate on: five for one process and four for the other.
    micro_steps = "--batch_size", 3, "--gradient_accumulation_steps", 3
    train(*flags, "--batch_size", 9, "--out_dir", "whole")
    train(*flags, *micro_steps, "--out_dir", "micro-steps")
    process = start("train.py", *small, *flags, *micro_steps, "--out_dir", "torchrun", cwd=text,
                    python=["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"])
    _, stderr = process.communicate()
    assert process.returncode == 0, stderr

    def moments(folder):  # Adam's means of the gradients
        state = torch.load(text / folder / "resume.pt", weights_only=True)["optimizer"]["state"]
        return [state[i]["exp_avg"] for i in state]

    for name in "micro-steps", "torchrun":
        parts, whole = log(text / name), log(text / "whole")
        assert len(parts) == len(whole) == 5
        for key in "iter", "loss", "lr", "val_ce", "val_pdl":
            found, expected = ([e[key] for e in entries if key in e] for entries in (parts, whole))
            assert found == pytest.approx(expected, rel=2e-5), (name, key)
        before, expected = (report(text / folder)["before"] for folder in (name, "whole"))
        for key in "accuracy_by_band", "ce_by_band", "share_of_text", "share_of_weight":
            assert before[key] == pytest.approx(expected[key], rel=1e-5), (name, key)
        for found, expected in zip(moments(name), moments("whole"), strict=True):
            assert (found - expected).norm() < 0.01 * expected.norm()


def test_evaluation_is_cross_entropy_by_token_and_by_band(train, text, tiny, tokenizer, report):
    """The evaluation before training, computed here from full logits."""
    train("--max_iters", 1, "--alpha", 0.5, "--eval_iters", 3)
    corpus, found = count.load_corpus([text / "text.txt"], tokenizer, 32), report(text / "out")["before"]
    rows = np.linspace(0, len(corpus.held_out) - 1, 6).astype(int)
    x, y = map(torch.from_numpy, corpus.held_out[rows])
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


def test_alpha_rises_from_zero(train, text, losses):
    fixed = ["--max_iters", 2, "--learning_rate", 0, "--batch_size", 4]
    runs = {"rising": ["--alpha", 1, "--rising"], "0": ["--alpha", 0], "0.5": ["--alpha", 0.5]}
    for name, flags in runs.items():
        train(*fixed, *flags, "--out_dir", name)
    expected = {1: losses(text / "0")[1], 2: losses(text / "0.5")[2]}
    assert losses(text / "rising") == pytest.approx(expected, rel=1e-6)


def test_pairs_are_learned_and_end(run, pairs, tiny, report):
    flags = ("--init_from", tiny, "--data", "pairs.jsonl", "--block_size", 32, "--max_iters", 40,
             "--learning_rate", 4e-3, "--alpha", 0, "--batch_size", 8, "--device", "cpu")
    out = run("train.py", *flags, cwd=pairs).stdout
    assert "90 pairs to train on, 10 held out" in out
    assert report(pairs / "out")["after"]["val_ce"] < 0.5 * report(pairs / "out")["before"]["val_ce"]
    sample = report(pairs / "out")["sample"]
    assert sample["prompt"] == "Question 9:" and sample["author"] == " the answer is 81. Yes. Yes. Yes. Yes."
    flags = "--prompt", "Question 12:", "--temperature", 0, "--num_samples", 1
    out = run("sample.py", *flags, cwd=pairs).stdout
    assert "the answer is" in out and len(out) < 250 and "<|endoftext|>" not in out  # it stopped


# --- what a run says and leaves ---


def test_without_a_network_it_trains_tiny_and_says_so(run, text, tiny):
    flags = "--max_iters", 1, "--batch_size", 1, "--block_size", 32, "--eval_iters", 1, "--device", "cpu"
    lines = run("train.py", *flags, cwd=text).stdout.splitlines()
    assert lines[0] == lines[-1] and "gpt2" in lines[0] and "tiny/" in lines[0]
    assert any("Python language reference" in line for line in lines)
    args = json.loads((text / "out/args.json").read_text(encoding="utf-8"))
    assert args["init_from"] == str(tiny) and args["learning_rate"] == 3e-3 and args["dtype"] != "auto"


def test_the_folder_is_a_checkpoint_and_keeps_what_it_does_not_know(train, run, text, tiny):
    """Also a padded vocabulary, as resize_token_embeddings(pad_to_multiple_of=...) leaves it."""
    model = GPT.from_pretrained(tiny)
    padding = 10 * model.wte.weight.data.mean(0).expand(64, -1)  # rows that stand for no token
    model.wte = torch.nn.Embedding.from_pretrained(torch.cat((model.wte.weight.data, padding)))
    own = {"pad_token_id": 7, "task_specific_params": {"a": [1, None]}}
    model.config.vocab_size, model.config.eos_token_id = 4160, 5
    model.config.other |= own
    model.generation_config = {"eos_token_id": 5, "top_k": 9}
    model.save_pretrained(text / "mine")
    for name in "vocab.json", "merges.txt":
        (text / "mine" / name).write_bytes((tiny / name).read_bytes())
    train("--init_from", "mine", "--max_iters", 1)
    saved = json.loads((text / "out/config.json").read_text(encoding="utf-8"))
    # Completions end with the end-of-text token, and this is where Transformers' generate shall stop.
    assert saved | own | {"vocab_size": 4160, "eos_token_id": 4095} == saved
    saved = json.loads((text / "out/generation_config.json").read_text(encoding="utf-8"))
    assert saved == {"eos_token_id": 4095, "top_k": 9}
    run("sample.py", "--temperature", 5, "--max_new_tokens", 20, cwd=text)  # no padding is drawn
    out = train("--init_from", "out", "--max_iters", 1, "--out_dir", "next").stdout
    assert out.startswith("model: out,")


# --- several alphas ---


def test_a_series_is_its_single_runs_and_a_table(train, text, losses, report):
    flags = "--max_iters", 2
    out = train(*flags, "--alpha", 0, 0.5).stdout
    for alpha in "0", "0.5":
        train(*flags, "--alpha", alpha, "--out_dir", f"single-{alpha}")
        assert losses(text / f"out/alpha-{alpha}") == losses(text / f"single-{alpha}")
        after = report(text / f"single-{alpha}")["after"]
        assert report(text / f"out/alpha-{alpha}")["after"] == after
        shown = [after["ce_by_band"][band] for band in ("all", *count.BANDS)]
        assert f"\n{alpha:13}" + "".join(f"{x:10.3f}" for x in shown) in out
    assert "\nbefore " in out and "\n0, shift 0.5 " in out
    assert losses(text / "out/alpha-0") != losses(text / "out/alpha-0.5")
