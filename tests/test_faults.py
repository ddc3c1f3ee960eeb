"""What goes wrong on the first day: a kill, a full disk, a stranger's file, a text that changed.

Nothing is lost, and one line says what to do.
"""

import json
import pickle
import os
import random
import shutil
import signal
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from model import GPT


def limit(name, size):
    """What a process does before it starts: take a limit of its resources."""
    def take():
        if sys.platform != "win32":
            import resource

            resource.setrlimit(getattr(resource, name), (size, size))

    return take


def files(folder):
    """What is in a folder: content and time of every file."""
    return {path.name: (path.read_bytes(), path.stat().st_mtime_ns)
            for path in folder.iterdir() if path.is_file()}


@pytest.fixture
def train(run_here, small, text):
    """train(*flags, ok=True): a run on text.txt that takes a moment."""
    def train(*flags, ok=True):
        return run_here("train.py", *small, *flags, cwd=text, ok=ok)

    return train


@pytest.fixture
def resume(run_here, text):
    """resume(*flags, ok=True): train.py --resume."""
    def resume(*flags, ok=True):
        return run_here("train.py", "--resume", *flags, cwd=text, ok=ok)

    return resume


@pytest.fixture
def killed_at(monkeypatch):
    """killed_at(name, n): end the process when it is about to rename the n-th file of this name."""
    def killed_at(name, n):
        replace, names = os.replace, []

        def end_there(part, path):
            names.append(Path(path).name)
            if names.count(name) == n:
                monkeypatch.setattr(os, "replace", replace)
                raise SystemExit(137)
            replace(part, path)

        monkeypatch.setattr(os, "replace", end_there)

    return killed_at


# --- killed, and resumed ---


def test_killed_and_resumed_as_if_never_stopped(start, until, train, resume, small, text, losses, log,
                                                report):
    flags = "--max_iters", 6, "--batch_size", 4, "--eval_interval", 2, "--dropout", 0.1, "--rising"
    train(*flags, "--out_dir", "whole")
    process = start("train.py", *small, *flags, "--out_dir", "cut", cwd=text)
    until(process, "step 5")
    process.kill()
    process.communicate()
    with open(text / "cut/log.jsonl", "a", encoding="utf-8") as file:
        file.write('{"iter": 6, "lo')  # half a line
    elsewhere = text / "elsewhere"
    elsewhere.mkdir()
    (text / "cut").rename(elsewhere / "moved")
    resume("--out_dir", elsewhere / "moved")
    assert losses(elsewhere / "moved") == pytest.approx(losses(text / "whole"), rel=1e-5)
    assert len(log(elsewhere / "moved")) == len(log(text / "whole"))
    resumed, whole = (report(folder)["after"] for folder in (elsewhere / "moved", text / "whole"))
    assert resumed["val_pdl"] == pytest.approx(whole["val_pdl"], rel=1e-6)
    assert resumed["iter"] == whole["iter"]


def test_killed_at_any_moment_the_folder_loads_and_resumes(start, until, resume, small, text):
    for seed in range(2):
        shutil.rmtree(text / "out", ignore_errors=True)
        process = start("train.py", *small, "--max_iters", 1000, "--eval_interval", 1, cwd=text)
        until(process, "step 1: loss")
        time.sleep(random.Random(seed).uniform(0, 0.8))  # most of the time is spent saving
        process.kill()
        process.communicate()
        GPT.from_pretrained(text / "out")
        saved = torch.load(text / "out/resume.pt", weights_only=True)["step"]
        assert f"resuming at step {saved}" in resume("--max_iters", saved + 1).stdout


@pytest.mark.parametrize("name, n", [("counts.npy", 1), ("resume.pt", 1), ("model.safetensors", 1)])
def test_killed_before_the_first_save_it_starts_over(train, resume, text, losses, killed_at, name, n):
    killed_at(name, n)
    assert train("--max_iters", 2, ok=False).returncode == 137
    resume()
    assert list(losses(text / "out")) == [1, 2] and (text / "out/report.json").exists()


def test_killed_between_its_state_and_its_weights_it_has_both(train, resume, text, killed_at):
    killed_at("model.safetensors", 2)
    assert train("--max_iters", 4, "--eval_interval", 2, ok=False).returncode == 137
    state = torch.load(text / "out/resume.pt", weights_only=True)
    assert state["best"]["iter"] == state["step"] == 2
    resume("--max_iters", 2)
    weights = GPT.from_pretrained(text / "out").state_dict()
    assert all(torch.equal(weights[name], w) for name, w in state["model"].items())


@pytest.mark.usefixtures("posix")
@pytest.mark.parametrize("script", ["train.py", "count.py"])
def test_ctrl_c_ends_without_a_traceback_and_stops_a_shell_loop(start, until, small, text, tiny, script):
    if script == "train.py":
        process = start("train.py", *small, "--max_iters", 1000, "--out_dir", "my out", cwd=text)
        until(process, "step 3: loss")
    else:
        process = start("count.py", "-", "--tokenizer", tiny, cwd=text, stdin=-1)
        process.stdin.write("word " * 1_000_000)  # more than a pipe holds: it is counting
        process.stdin.flush()
    process.send_signal(signal.SIGINT)
    stdout, stderr = process.communicate()
    assert process.returncode == -signal.SIGINT and stderr == ""
    assert not (text / "counts.npy").exists()
    if script == "train.py":
        assert 'python train.py --resume --out_dir "my out"' in stdout


def test_a_finished_run_says_so_and_can_be_trained_on(train, resume, text, losses, report):
    train("--max_iters", 2)
    before = files(text / "out")
    assert "is finished" in resume().stdout and files(text / "out") == before
    resume("--max_iters", 3)
    assert list(losses(text / "out")) == [1, 2, 3] and report(text / "out")["after"]["iter"] == 3


CHANGED = {"--alpha": 1, "--learning_rate": 1e-4, "--weight_decay": 0, "--seed": 1, "--block_size": 16,
           "--batch_size": 4, "--eps": 2, "--dropout": 0.1, "--init_from": "gpt2", "--data": "other.txt"}


def test_resume_refuses_another_run(train, resume, one_line, text):
    train("--max_iters", 2)
    before = files(text / "out")
    for flag, value in CHANGED.items():
        one_line(resume(flag, value, "--max_iters", 3, ok=False), flag, status=2)
    one_line(resume("--max_iters", 1, ok=False), "step 2")
    with open(text / "text.txt", "a", encoding="utf-8") as file:
        file.write("more. ")
    one_line(resume("--max_iters", 3, ok=False), "data")
    one_line(resume("--out_dir", "none", ok=False), "none", status=2)
    assert files(text / "out") == before


def test_resume_refuses_counts_that_changed(train, resume, one_line, text):
    np.save(text / "counts.npy", np.arange(1, 4097))
    train("--max_iters", 2, "--counts", "counts.npy")
    np.save(text / "counts.npy", np.arange(2, 4098))
    one_line(resume("--max_iters", 3, ok=False), "counts")


# --- nothing of the user's is touched ---


def test_a_folder_that_is_not_empty_is_refused(train, one_line, text):
    train("--max_iters", 1)
    train("--max_iters", 1, "--alpha", 0, 1, "--out_dir", "series")
    (text / "out/resume.pt").unlink()  # people do, as it is the largest file
    (text / "mine").mkdir()
    (text / "mine/log.jsonl").write_bytes((text / "text.txt").read_bytes())
    for flags in [], ["--out_dir", "series"], ["--out_dir", "mine", "--data", "mine/log.jsonl"]:
        folder = text / (flags[1] if flags else "out")
        before = files(folder)
        one_line(train("--max_iters", 1, *flags, ok=False), str(folder.name))
        assert files(folder) == before


def test_of_two_runs_at_once_in_one_folder_one_is_refused(two_ranks, start, small, text):
    both = [start("train.py", *small, "--max_iters", 2, cwd=text) for _ in range(2)]
    ends = [(process.communicate(), process.returncode) for process in both]
    assert sorted(status for _, status in ends) == [0, 1]
    (refused,) = (stderr for (_, stderr), status in ends if status == 1)
    assert refused.count("\n") == 1 and "--out_dir" in refused
    assert (text / "out/report.json").exists()


@pytest.mark.usefixtures("posix")
def test_a_full_disk_leaves_the_checkpoint_whole(run, train, one_line, text):
    train("--max_iters", 2, "--eval_interval", 1)
    names = "model.safetensors", "config.json", "resume.pt", "vocab.json", "merges.txt"
    before = [(text / "out" / name).read_bytes() for name in names]
    full = limit("RLIMIT_FSIZE", 2_000_000)
    one_line(run("train.py", "--resume", "--max_iters", 4, cwd=text, ok=False, before=full), "out")
    assert before == [(text / "out" / name).read_bytes() for name in names]
    assert not list((text / "out").glob("*.part"))


def test_a_loss_that_became_nan_ends_the_run_with_good_weights(train, one_line, text):
    flags = "--max_iters", 20, "--learning_rate", 1e30, "--warmup_iters", 0, "--log_interval", 50
    one_line(train(*flags, "--eval_interval", 5, ok=False), "--learning_rate")
    assert all(w.isfinite().all() for w in GPT.from_pretrained(text / "out").state_dict().values())
    assert torch.load(text / "out/resume.pt", weights_only=True)["step"] == 0


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere a process cannot be kept from memory")
def test_out_of_memory_names_the_flags(run, one_line, small, text):
    little = limit("RLIMIT_AS", 8 << 30)
    result = run("train.py", *small, "--batch_size", 400_000, cwd=text, ok=False, before=little)
    one_line(result, "--batch_size")


# --- other people's files ---


class Malice:
    def __reduce__(self):
        return Path.touch, (Path("pwned"),)


def test_a_strangers_files_run_no_code(run_here, train, resume, one_line, text, tiny):
    (text / "evil").mkdir()
    for name in "config.json", "vocab.json", "merges.txt":
        shutil.copy(tiny / name, text / "evil" / name)
    train("--max_iters", 1, "--out_dir", "run")
    for path in text / "evil/pytorch_model.bin", text / "run/resume.pt":
        torch.save({"x": Malice()}, path)
    (text / "evil.npy").write_bytes(pickle.dumps(Malice()))
    np.save(text / "object.npy", np.array([Malice()]), allow_pickle=True)
    one_line(run_here("sample.py", "--init_from", "evil", cwd=text, ok=False), "pytorch_model.bin")
    one_line(resume("--out_dir", "run", "--max_iters", 2, ok=False), "resume.pt")
    for name in "evil.npy", "object.npy":
        one_line(train("--counts", name, ok=False), name)
    assert not (text / "pwned").exists()


def no_config(folder):
    (folder / "config.json").unlink()


def another_model(folder):
    (folder / "config.json").write_text('{"model_type": "llama"}', encoding="utf-8")


def half_the_weights(folder):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:100_000])


def no_vocabulary(folder):
    (folder / "vocab.json").unlink()


def a_vocabulary_too_large(folder):
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    (folder / "config.json").write_text(json.dumps(config | {"vocab_size": 4000}), encoding="utf-8")


def a_run_as_it_begins(folder):
    for path in folder.iterdir():
        path.unlink()
    (folder / "args.json").write_text("{", encoding="utf-8")


BREAKS = [no_config, another_model, half_the_weights, no_vocabulary, a_vocabulary_too_large,
          a_run_as_it_begins]


@pytest.mark.parametrize("break_it", BREAKS, ids=lambda break_it: break_it.__name__)
def test_a_broken_checkpoint_folder_is_named(run_here, train, one_line, text, tiny, break_it):
    shutil.copytree(tiny, text / "broken")
    break_it(text / "broken")
    one_line(run_here("sample.py", "--init_from", "broken", cwd=text, ok=False), "broken")
    one_line(train("--init_from", "broken", ok=False), "broken")
    assert not (text / "out").exists()


MISTAKES = [  # flags, what the line names, status
    (["--alpha", "-1"], "--alpha", 2), (["--alpha", "nan"], "--alpha", 2),
    (["--alpha", "1", "1"], "--alpha", 2),
    (["--eps", "-1"], "--eps", 2), (["--batch_size", "0"], "--batch_size", 2),
    (["--alhpa", "1"], "--alhpa", 2),
    (["--block_size", "4"], "--block_size", 2), (["--seed", "-1"], "--seed", 2),
    (["--dropout", "1"], "--dropout", 2),
    (["--learning_rate", "inf"], "--learning_rate", 2), (["--out_dir", ""], "--out_dir", 2),
    (["--device", "tpu"], "--device tpu", 1), (["--data", "missing.txt"], "missing.txt", 1),
    (["--data", "."], "", 1), (["--block_size", "4000"], "--block_size", 1),
    (["--init_from", "gpt5"], "gpt5", 1),
    (["--init_from", "gpt2"], "gpt2", 1), (["--init_from", "./gpt2"], "gpt2", 1),
    (["--init_from", "a/b"], "a/b", 1),
    (["--counts", "text.txt"], "text.txt", 1), (["--counts", "short.npy"], "short.npy", 1),
    (["--counts", "negative.npy"], "negative.npy", 1), (["--out_dir", "text.txt"], "text.txt", 1),
    (["--eps", "0", "--counts", "half.npy"], "eps", 1), (["--alpha", "30"], "alpha", 1),
    (["--alpha", "0", "0.5", "--counts", "probabilities.npy"], "counts", 1),
]


@pytest.mark.parametrize("flags, culprit, status", MISTAKES, ids=[" ".join(flags) for flags, *_ in MISTAKES])
def test_a_mistake_ends_in_one_line_and_makes_no_folder(train, one_line, text, flags, culprit, status):
    np.save(text / "short.npy", np.ones(50257, int))
    np.save(text / "negative.npy", -np.ones(4096))
    np.save(text / "half.npy", np.arange(4096) % 2)
    np.save(text / "probabilities.npy", np.full(4096, 1 / 4096))
    one_line(train("--max_iters", 1, *flags, ok=False), culprit, status=status)
    assert not (text / "out").exists()
