"""What goes wrong on the first day: a kill, a full disk, a stranger's file, a text that changed.

Nothing is lost, and one line says what to do.
"""

import contextlib
import os
import pickle
import shutil
import signal
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import count
from model import GPT


@contextlib.contextmanager
def limited(name, size):
    """In a with block: this process has a limit of its resources."""
    import resource

    kind = getattr(resource, name)
    before = resource.getrlimit(kind)
    resource.setrlimit(kind, (size, before[1]))
    yield
    resource.setrlimit(kind, before)


def files(folder):
    """What is in a folder: content and time of every file."""
    return {path.name: (path.read_bytes(), path.stat().st_mtime_ns)
            for path in folder.iterdir() if path.is_file()}


@pytest.fixture
def killed_at(monkeypatch):
    """killed_at(path, n): end the run when it is about to write such a file for the n-th time."""
    def killed_at(path, n):
        replace, times = os.replace, []

        def end_there(part, to):
            times.extend([to] * Path(to).match(path))
            if len(times) == n:
                monkeypatch.setattr(os, "replace", replace)
                raise SystemExit(137)
            replace(part, to)

        monkeypatch.setattr(os, "replace", end_there)

    return killed_at


# --- killed, and resumed ---


def test_killed_and_resumed_as_if_never_stopped(start, until, train, resume, small, text, losses, report):
    """Also in another folder, with dropout and a rising alpha."""
    flags = "--max_iters", 6, "--batch_size", 4, "--eval_interval", 2, "--dropout", 0.1, "--rising"
    train(*flags, "--out_dir", "whole")
    process = start("train.py", *small, *flags, "--out_dir", "cut", cwd=text)
    until(process, "step 5")
    process.kill()
    process.communicate()
    with open(text / "cut/log.jsonl", "a", encoding="utf-8") as file:
        file.write('{"iter": 6, "lo')  # half a line
    moved = text / "elsewhere/moved"
    shutil.move(text / "cut", moved)
    assert "resuming at step 4" in resume("--out_dir", moved).stdout
    assert losses(moved) == pytest.approx(losses(text / "whole"), rel=1e-5)
    resumed, whole = (report(folder)["after"] for folder in (moved, text / "whole"))
    assert resumed["val_pdl"] == pytest.approx(whole["val_pdl"], rel=1e-6)
    assert resumed["iter"] == whole["iter"]


MOMENTS = [("resume.pt", 1), ("model.safetensors", 1), ("model.safetensors", 3),
           ("resume.pt", 3), ("report.json", 1)]


def test_killed_at_any_moment_the_folder_resumes(train, resume, text, log, report, killed_at):
    """Before the first save, between the state and the weights, and after the last step."""
    flags = "--max_iters", 2, "--eval_interval", 1
    train(*flags, "--out_dir", "whole")
    for moment in MOMENTS:
        shutil.rmtree(text / "out", ignore_errors=True)
        killed_at(*moment)
        assert train(*flags, ok=False).returncode == 137
        resume()
        for entry, expected in zip(log(text / "out"), log(text / "whole"), strict=True):
            assert entry | {"tok_per_s": 0} == expected | {"tok_per_s": 0}, moment
        assert report(text / "out")["after"] == report(text / "whole")["after"]
        weights, expected = (GPT.from_pretrained(text / name).state_dict() for name in ("out", "whole"))
        assert all(torch.equal(weights[name], w) for name, w in expected.items()), moment


@pytest.mark.parametrize("moment", ["alpha-0.5/report.json", "alpha-0/resume.pt", "alpha-0/report.json"])
def test_a_series_goes_on_where_it_was_stopped(train, resume, text, killed_at, moment):
    """Killed at the end of its first run, early in its second one, and at the end of that."""
    flags = "--max_iters", 1, "--alpha", 0.5, 0
    whole = train(*flags, "--out_dir", "whole").stdout
    killed_at(moment, 1)
    train(*flags, ok=False)
    first = text / "out/alpha-0.5"
    before = (first / "model.safetensors").read_bytes() if (first / "report.json").exists() else None
    out = resume().stdout
    assert before in (None, (first / "model.safetensors").read_bytes())  # what is finished stays
    table = whole[whole.rindex("alpha   ") : whole.index("now:")]
    assert table.count("\n") == 5 and table in out


@pytest.mark.usefixtures("posix")
def test_ctrl_c_ends_without_a_traceback_and_stops_a_shell_loop(start, until, small, text):
    process = start("train.py", *small, "--max_iters", 1000, "--out_dir", "my out", cwd=text)
    until(process, "step 3: loss")
    process.send_signal(signal.SIGINT)
    stdout, stderr = process.communicate()
    assert process.returncode == -signal.SIGINT and stderr == ""
    assert "python train.py --resume --out_dir 'my out'" in stdout


def test_a_finished_run_stays_as_it_is_and_can_be_trained_on(train, resume, text, losses, report):
    train("--max_iters", 2)
    names = "report.json", "log.jsonl", "args.json", "model.safetensors"
    before = [(text / "out" / name).read_bytes() for name in names]
    resume()
    assert [(text / "out" / name).read_bytes() for name in names] == before
    resume("--max_iters", 3)
    assert list(losses(text / "out")) == [1, 2, 3] and report(text / "out")["after"]["iter"] == 3


CHANGED = {"--alpha": 1, "--learning_rate": 1e-4, "--weight_decay": 0, "--seed": 1, "--block_size": 16,
           "--batch_size": 4, "--eps": 2, "--dropout": 0.1, "--init_from": "gpt2", "--data": "other.txt"}


def test_resume_refuses_another_run(train, resume, one_line, text):
    np.save(text / "counts.npy", np.arange(1, 4097))
    train("--max_iters", 2, "--counts", "counts.npy")
    before = files(text / "out")
    for flag, value in CHANGED.items():
        one_line(resume(flag, value, "--max_iters", 3, ok=False), flag, status=2)
    one_line(resume("--max_iters", 1, ok=False), "--max_iters 1")
    one_line(resume("--out_dir", "none", ok=False), "none", status=2)
    np.save(text / "counts.npy", np.arange(2, 4098))
    one_line(resume("--max_iters", 3, ok=False), "counts")
    with open(text / "text.txt", "a", encoding="utf-8") as file:
        file.write("more. ")
    one_line(resume("--max_iters", 3, ok=False), "data")
    assert files(text / "out") == before


# --- nothing of the user's is touched ---


def test_a_folder_that_is_not_empty_is_refused(train, resume, one_line, text):
    train("--max_iters", 1, "--alpha", 0, 1, "--out_dir", "series")
    (text / "series/alpha-0/resume.pt").unlink()  # people do, as it is the largest file
    (text / "mine").mkdir()
    (text / "mine/log.jsonl").write_bytes((text / "text.txt").read_bytes())
    for folder, flags in ("series", []), ("series/alpha-0", []), ("mine", ["--data", "mine/log.jsonl"]):
        before = files(text / folder)
        one_line(train("--max_iters", 1, "--out_dir", folder, *flags, ok=False), Path(folder).name)
        assert files(text / folder) == before
    before = files(text / "series/alpha-0")
    one_line(resume("--max_iters", 2, "--out_dir", "series", ok=False), "resume.pt")
    assert files(text / "series/alpha-0") == before


def test_of_two_runs_at_once_in_one_folder_one_is_refused(train, one_line, text, losses, monkeypatch):
    load = count.load_corpus

    def meanwhile(*args):
        monkeypatch.undo()
        train("--max_iters", 1)
        return load(*args)

    monkeypatch.setattr(count, "load_corpus", meanwhile)
    one_line(train("--max_iters", 2, ok=False), "--out_dir")
    assert list(losses(text / "out")) == [1]


@pytest.mark.usefixtures("posix")
def test_a_full_disk_leaves_what_was_there(run, train, resume, one_line, text, tiny):
    train("--max_iters", 2, "--eval_interval", 1)
    (text / "counts.npy").write_bytes(b"old")
    names = "model.safetensors", "config.json", "resume.pt", "vocab.json", "merges.txt", "../counts.npy"
    before = [(text / "out" / name).read_bytes() for name in names]
    with limited("RLIMIT_FSIZE", 10_000):
        one_line(run("count.py", "text.txt", "--tokenizer", tiny, cwd=text, ok=False), "counts.npy")
    with limited("RLIMIT_FSIZE", 2_000_000):
        one_line(resume("--max_iters", 4, ok=False), "out")
    assert before == [(text / "out" / name).read_bytes() for name in names]
    assert not list(text.rglob("*.part"))


def test_a_loss_that_became_nan_ends_the_run_with_good_weights(train, one_line, text):
    flags = "--max_iters", 20, "--learning_rate", 1e30, "--warmup_iters", 0, "--log_interval", 50
    one_line(train(*flags, "--eval_interval", 5, ok=False), "--learning_rate")
    assert all(w.isfinite().all() for w in GPT.from_pretrained(text / "out").state_dict().values())


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere a process cannot be kept from memory")
def test_out_of_memory_names_the_flags(train, one_line):
    pages = int(Path("/proc/self/statm").read_text(encoding="utf-8").split()[0])
    with limited("RLIMIT_AS", pages * os.sysconf("SC_PAGE_SIZE") + 2**30):
        one_line(train("--batch_size", 40_000, ok=False), "--batch_size")


# --- other people's files ---


class Malice:
    def __reduce__(self):
        return Path.touch, (Path("pwned"),)


def test_a_strangers_files_run_no_code(train, resume, one_line, text):
    """For weights see test_model.py."""
    train("--max_iters", 1, "--out_dir", "run")
    torch.save({"x": Malice()}, text / "run/resume.pt")
    (text / "evil.npy").write_bytes(pickle.dumps(Malice()))
    np.save(text / "object.npy", np.array([Malice()]), allow_pickle=True)
    one_line(resume("--out_dir", "run", "--max_iters", 2, ok=False), "resume.pt")
    for name in "evil.npy", "object.npy":
        one_line(train("--counts", name, ok=False), name)
    assert not (text / "pwned").exists()


SHIFT = ["--shift", "1", "--counts"]
MISTAKES = [  # script, status, what the line names, flags
    *(("train.py", 2, flag, [flag, value]) for flag, value in [
        ("--alpha", "-1"), ("--alpha", "nan"), ("--eps", "-1"), ("--batch_size", "0"), ("--alhpa", "1"),
        ("--block_size", "4"), ("--seed", "-1"), ("--dropout", "1"), ("--learning_rate", "inf")]),
    ("train.py", 2, "--alpha", ["--alpha", "1", "1"]),
    *(("train.py", 1, value, [flag, value]) for flag, value in [
        ("--device", "tpu"), ("--data", "missing.txt"), ("--data", "pairs.jsonl"), ("--init_from", "gpt5"),
        ("--init_from", "gpt2"), ("--init_from", "./gpt2"), ("--init_from", "a/b"), ("--counts", "text.txt"),
        ("--counts", "short.npy"), ("--counts", "negative.npy"), ("--out_dir", "text.txt")]),
    ("train.py", 1, "--out_dir", ["--out_dir", ""]),
    *(("train.py", 1, "--block_size", ["--block_size", size]) for size in ("300", "4000")),
    ("train.py", 1, "eps", ["--eps", "0", "--counts", "half.npy"]),
    ("train.py", 1, "alpha", ["--alpha", "0.5", "30"]),
    ("sample.py", 1, "--num_samples", ["--num_samples", f"{10**15}"]),  # out of memory
    *(("sample.py", 2, flag, [flag, value]) for flag, value in [
        ("--temperature", "nan"), ("--temperature", "-1"), ("--seed", "-1"), ("--top_p", "0"), ("--top_p", "95"),
        ("--top_k", "0"), ("--shift", "1")]),
    ("sample.py", 2, "--shift", ["--counts", "a.npy"]),
    ("sample.py", 2, "--shift", ["--counts", "a.npy", "--shift", "inf"]),
    *(("sample.py", 1, value, [flag, value]) for flag, value in [
        ("--init_from", "none"), ("--init_from", "gpt2"), ("--device", "cuda:99")]),
    ("sample.py", 1, "none.npy", [*SHIFT, "none.npy"]),
    ("count.py", 2, "text.txt", ["-o", "text.txt"]),
]


@pytest.mark.parametrize("script, status, culprit, flags", MISTAKES, ids=str)
def test_a_mistake_ends_in_one_line(run, one_line, small, text, pairs, tiny, script, status, culprit, flags):
    """It writes nothing."""
    np.save(text / "short.npy", np.ones(50257, int))
    np.save(text / "negative.npy", -np.ones(4096))
    np.save(text / "half.npy", np.arange(4096) % 2)
    before = files(text)
    begin = {"train.py": small, "sample.py": ["--init_from", tiny], "count.py": ["text.txt"]}[script]
    one_line(run(script, *begin, *flags, cwd=text, ok=False), culprit, status=status)
    assert files(text) == before and not (text / "out").exists()
