"""What goes wrong on the first day: a signal, a kill, a full disk, a stranger's file, a text that changed.

Really injected: nothing is lost, and one line says what to do.
"""

import json
import os
import pickle
import random
import runpy
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
    """What a run left in its folder: content and time of every file."""
    return {path.name: (path.read_bytes(), path.stat().st_mtime_ns)
            for path in folder.iterdir() if path.is_file() and path.name != ".lock"}


@pytest.fixture
def train(run_here, small, text):
    """train(*flags, ok=True): a run on text.txt that takes a moment."""
    def train(*flags, ok=True):
        return run_here("train.py", *small, *flags, cwd=text, ok=ok)

    return train


@pytest.fixture
def resume(run_here, text):
    """resume(*flags, ok=True): train.py --resume in the same folder."""
    def resume(*flags, ok=True):
        return run_here("train.py", "--resume", *flags, cwd=text, ok=ok)

    return resume


# --- signals ---


@pytest.mark.usefixtures("posix")
@pytest.mark.parametrize("signum, moment", [(signal.SIGINT, "step 3: loss"), (signal.SIGTERM, "step 3: loss"),
                                            (signal.SIGINT, "writing on")], ids=str)
def test_a_signal_ends_the_run_where_it_can_go_on(start, until, train, resume, small, text, log, losses,
                                                  signum, moment):
    flags = "--max_iters", 8, "--dropout", 0.1
    train(*flags, "--out_dir", "whole")
    process = start("train.py", *small, *flags, "--out_dir", "cut", cwd=text)
    until(process, moment)
    process.send_signal(signum)
    rest, stderr = process.communicate()
    assert process.returncode == -signal.SIGINT  # it dies of it, or a shell's loop would go on
    assert ("stopping after this step" in stderr) == (moment != "writing on")
    assert "to go on: python train.py --resume --out_dir cut" in rest
    resume("--out_dir", "cut")
    assert losses(text / "cut") == pytest.approx(losses(text / "whole"), rel=1e-5)
    assert len(log(text / "cut")) == len(log(text / "whole"))
    assert (text / "cut/report.json").exists()


@pytest.mark.usefixtures("posix")
@pytest.mark.parametrize("moment, rank, status", [("step 1: loss", 0, -2), ("step 4: loss", 1, 0)],
                         ids=["training", "the last evaluation"])
def test_a_signal_to_one_of_two_processes_ends_both(two_ranks, until, resume, small, text, losses, moment,
                                                    rank, status):
    (text / "text.txt").write_bytes((text / "text.txt").read_bytes() * 4)  # enough to evaluate on for a while
    flags = "--max_iters", 4, "--eval_iters", 40
    both = two_ranks("train.py", *small, *flags, cwd=text)
    until(both[0], moment)
    both[rank].send_signal(signal.SIGTERM)
    for process in both:
        _, stderr = process.communicate()
        assert process.returncode == status, stderr
    assert all(w.isfinite().all() for w in GPT.from_pretrained(text / "out").state_dict().values())
    stopped_at = torch.load(text / "out/resume.pt", weights_only=True)["step"]
    assert stopped_at == max(losses(text / "out"))  # no step is lost
    resume("--max_iters", 4)
    assert list(losses(text / "out")) == [1, 2, 3, 4] and (text / "out/report.json").exists()


# --- killed ---


def test_resumed_as_if_never_stopped(start, until, train, resume, small, text, losses):
    flags = "--max_iters", 6, "--batch_size", 4, "--eval_interval", 2, "--dropout", 0.1
    train(*flags, "--out_dir", "whole")
    process = start("train.py", *small, *flags, "--out_dir", "cut", cwd=text)
    until(process, "step 5")
    process.kill()
    process.communicate()
    resume("--out_dir", "cut")
    assert losses(text / "cut") == pytest.approx(losses(text / "whole"), rel=1e-5)


def test_killed_at_any_moment_the_folder_loads_and_resumes(start, until, resume, small, text):
    for seed in range(3):
        shutil.rmtree(text / "out", ignore_errors=True)
        process = start("train.py", *small, "--max_iters", 1000, "--eval_interval", 1, cwd=text)
        until(process, "step 1: loss")
        time.sleep(random.Random(seed).uniform(0, 0.8))  # most of the time is spent saving
        process.kill()
        process.communicate()
        GPT.from_pretrained(text / "out")
        saved = torch.load(text / "out/resume.pt", weights_only=True)["step"]
        assert f"resuming at step {saved}" in resume("--max_iters", saved + 1).stdout


def test_ended_before_the_first_evaluation_it_starts_again(train, text, monkeypatch):
    """There is a model then, but nothing to resume."""
    replace, ended = os.replace, []

    def end_at_resume_pt(part, path):
        if Path(path).name == "resume.pt" and not ended:
            ended.append(path)
            raise SystemExit(137)
        replace(part, path)

    monkeypatch.setattr(os, "replace", end_at_resume_pt)
    assert train("--max_iters", 1, ok=False).returncode == 137
    advice = train("--max_iters", 1, ok=False)
    if advice.returncode:  # what it says to do can be done
        assert train("--max_iters", 1, *(["--resume"] if "--resume" in advice.stderr else [])).returncode == 0


def test_a_torn_last_line_of_the_log_does_not_keep_from_resuming(train, resume, text, losses):
    train("--max_iters", 2)
    with open(text / "out/log.jsonl", "a", encoding="utf-8") as file:
        file.write('{"iter": 3, "loss": 5.\n{"iter": 3, "lo')
    resume("--max_iters", 3)
    assert list(losses(text / "out")) == [1, 2, 3]


def test_killed_between_its_state_and_its_weights_it_has_both(train, resume, text, monkeypatch):
    replace, written = os.replace, []

    def end_at_the_second_weights(part, path):
        written.append(Path(path).name)
        if written.count("model.safetensors") == 2:
            raise SystemExit(137)
        replace(part, path)

    monkeypatch.setattr(os, "replace", end_at_the_second_weights)
    assert train("--max_iters", 4, "--eval_interval", 2, ok=False).returncode == 137
    monkeypatch.setattr(os, "replace", replace)
    state = torch.load(text / "out/resume.pt", weights_only=True)
    assert state["after"]["iter"] == state["step"] == 2
    resume("--max_iters", 2)
    weights = GPT.from_pretrained(text / "out").state_dict()
    assert all(torch.equal(weights[name], w) for name, w in state["model"].items())


def test_killed_while_the_log_is_rewritten_nothing_of_it_is_lost(train, resume, text, monkeypatch):
    train("--max_iters", 2)
    before = (text / "out/log.jsonl").read_bytes()
    replace = os.replace

    def end_at_the_log(part, path):
        if Path(path).name == "log.jsonl":
            raise SystemExit(137)
        replace(part, path)

    monkeypatch.setattr(os, "replace", end_at_the_log)
    assert resume("--max_iters", 3, ok=False).returncode == 137
    assert (text / "out/log.jsonl").read_bytes() == before


# --- no room, no number ---


@pytest.mark.usefixtures("posix")
def test_a_full_disk_leaves_the_checkpoint_whole(run, train, one_line, text):
    train("--max_iters", 2, "--eval_interval", 1)
    names = "model.safetensors", "config.json", "resume.pt", "vocab.json", "merges.txt"
    before = [(text / "out" / name).read_bytes() for name in names]
    full = limit("RLIMIT_FSIZE", 2_000_000)
    result = run("train.py", "--resume", "--max_iters", 4, cwd=text, ok=False, before=full)
    one_line(result, "could not be written")
    assert before == [(text / "out" / name).read_bytes() for name in names]
    assert not list((text / "out").glob("*.part"))


def test_a_loss_that_is_no_number_ends_the_run(train, one_line, text):
    result = train("--max_iters", 20, "--learning_rate", 1e30, "--warmup_iters", 0, ok=False)
    one_line(result, "--learning_rate")
    assert all(w.isfinite().all() for w in GPT.from_pretrained(text / "out").state_dict().values())


def test_weights_that_are_no_number_never_replace_good_ones(train, resume, one_line, text, monkeypatch):
    train("--max_iters", 2)
    names = "resume.pt", "model.safetensors"
    before = [(text / "out" / name).read_bytes() for name in names]
    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", ruin)
    one_line(resume("--max_iters", 3, "--log_interval", 5, ok=False), "no number")
    assert before == [(text / "out" / name).read_bytes() for name in names]


def ruin(parameters, max_norm):
    """In place of clipping: gradients that are no numbers, after a loss that was one."""
    for p in parameters:
        p.grad.fill_(float("nan"))


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere a process cannot be kept from memory")
@pytest.mark.parametrize("size", [400_000, 10**9], ids=["torch's memory", "numpy's"])
def test_out_of_memory_names_the_flags(run, one_line, small, text, size):
    little = limit("RLIMIT_AS", 8 << 30)
    result = run("train.py", *small, "--batch_size", size, cwd=text, ok=False, before=little)
    one_line(result, "out of memory: halve --batch_size")


@pytest.mark.parametrize("error, is_memory", [
    (MemoryError(), True),
    (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"), True),
    (RuntimeError("[enforce fail at alloc_cpu.cpp:121] DefaultCPUAllocator: can't allocate memory"), True),
    (RuntimeError("CUDA error: an illegal memory access was encountered"), False),
    (RuntimeError("Expected all tensors to be on the same device"), False),
])
def test_only_memory_that_ran_out_is_called_that(root, error, is_memory):
    def fail():
        raise error

    main_in_memory = runpy.run_path(str(root / "train.py"))["main_in_memory"]
    main_in_memory.__globals__["main"] = fail
    with pytest.raises((ValueError, RuntimeError)) as raised:
        main_in_memory()
    assert "--batch_size" in str(raised.value) if is_memory else raised.value is error


# --- a folder that holds a run ---


def test_a_second_run_in_the_same_folder_is_refused(train, one_line, text):
    train("--max_iters", 1)
    before = files(text / "out")
    result = train("--max_iters", 2, ok=False)
    one_line(result, "--resume")
    assert "--out_dir" in result.stderr and files(text / "out") == before


def test_a_series_is_not_trained_over_a_series_nor_a_run_over_it(train, one_line, text):
    train("--max_iters", 1, "--alpha", 0, 1)
    before = files(text / "out/alpha-1")
    one_line(train("--alpha", 1, 2, ok=False), "--out_dir")
    one_line(train("--alpha", 1, ok=False), "--out_dir")
    assert files(text / "out/alpha-1") == before


def test_two_runs_at_once_in_one_folder_are_refused(start, until, train, resume, one_line, small, text):
    first = start("train.py", *small, "--max_iters", 1000, cwd=text)
    until(first, "run:")  # before there is anything to resume
    one_line(train("--max_iters", 1, ok=False), "--out_dir")
    until(first, "step 1: loss")
    one_line(resume(ok=False), "in use")
    assert first.poll() is None
    first.kill()
    first.communicate()
    resume("--max_iters", 1)  # it went with its process


def test_line_ends_of_windows_are_told(train, text):
    content = (text / "text.txt").read_bytes()
    assert "NOTE: the text has \\r" not in train("--max_iters", 1, "--out_dir", "unix").stdout
    (text / "text.txt").write_bytes(content.replace(b"\n", b"\r\n"))
    assert "NOTE: the text has \\r" in train("--max_iters", 1, "--out_dir", "windows").stdout


# --- --resume ---


CHANGED = {"--alpha": 1, "--learning_rate": 1e-4, "--weight_decay": 0, "--optimizer": "adafactor",
           "--seed": 1, "--block_size": 16, "--batch_size": 4, "--gradient_accumulation_steps": 2, "--eps": 1,
           "--dropout": 0.1, "--grad_clip": 0, "--init_from": "gpt2", "--eval_iters": 3}


def test_resume_refuses_what_would_make_the_result_another(train, resume, one_line, text):
    train("--max_iters", 2)
    before = files(text / "out")
    for flag, value in CHANGED.items():
        named = flag.replace("gradient_accumulation_steps", "batch_size")  # together a step's sequences
        one_line(resume(flag, value, "--max_iters", 3, ok=False), named, status=2)
    with open(text / "text.txt", "a", encoding="utf-8") as file:
        file.write("more. ")
    one_line(resume("--max_iters", 3, ok=False), "data")
    assert files(text / "out") == before


def test_resume_refuses_to_end_before_it_goes_on(train, resume, one_line, text):
    train("--max_iters", 2)
    (text / "out/report.json").unlink()  # as if stopped
    one_line(resume("--max_iters", 1, ok=False), "step 2")
    resume()
    assert (text / "out/report.json").exists()


def test_resume_refuses_counts_whose_content_changed(train, resume, one_line, text, tokenizer):
    np.save(text / "counts.npy", np.arange(1, 4097))
    train("--max_iters", 2, "--counts", "counts.npy")
    np.save(text / "counts.npy", np.arange(2, 4098))
    one_line(resume("--max_iters", 3, ok=False), "counts")
    (text / "counts.npy").unlink()
    one_line(resume("--max_iters", 3, ok=False), "counts.npy")


def test_resume_allows_what_leaves_the_result_the_same(start, until, train, resume, small, text, losses):
    flags = "--max_iters", 4, "--batch_size", 4, "--eval_interval", 2
    train(*flags, "--out_dir", "whole")
    process = start("train.py", *small, *flags, "--out_dir", "first", cwd=text)
    until(process, "step 3: loss")
    process.kill()
    process.communicate()
    (text / "first").rename(text / "renamed")
    shutil.copy(text / "text.txt", text / "same.txt")
    out = resume("--out_dir", "renamed", "--batch_size", 2, "--gradient_accumulation_steps", 2,
                 "--eval_interval", 3, "--data", "same.txt").stdout
    assert "resuming at step 2" in out and not (text / "first").exists()
    assert losses(text / "renamed") == pytest.approx(losses(text / "whole"), rel=2e-5)
    assert max(losses(text / "renamed")) == 4
    resume("--out_dir", "renamed", "--max_iters", 5)
    assert max(losses(text / "renamed")) == 5


def test_a_finished_run_says_that_nothing_is_left_to_do(train, resume, text):
    train("--max_iters", 1)
    before = files(text / "out")
    out = resume().stdout
    assert "nothing left to do" in out and "--max_iters" in out and files(text / "out") == before


# --- files of others ---


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
    one_line(resume("--out_dir", "run", ok=False), "resume.pt")
    for name in "evil.npy", "object.npy":
        one_line(train("--counts", name, ok=False), name)
    assert not (text / "pwned").exists()


def no_config(folder):
    (folder / "config.json").unlink()


def another_model(folder):
    (folder / "config.json").write_text('{"model_type": "llama"}', encoding="utf-8")


def half_a_config(folder):
    (folder / "config.json").write_text("{", encoding="utf-8")


def no_weights(folder):
    (folder / "model.safetensors").unlink()


def half_the_weights(folder):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:100_000])


def no_vocabulary(folder):
    (folder / "vocab.json").unlink()


def other_merges(folder):
    (folder / "merges.txt").write_text("#version\na b\n", encoding="utf-8")


def another_vocabulary_size(folder):
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    (folder / "config.json").write_text(json.dumps(config | {"vocab_size": 4000}), encoding="utf-8")


BREAKS = {no_config: "config.json", another_model: "model_type", half_a_config: "config.json",
          no_weights: "model.safetensors", half_the_weights: "model.safetensors", no_vocabulary: "vocab.json",
          other_merges: "merges", another_vocabulary_size: "wte.weight"}


@pytest.mark.parametrize("break_it, culprit", BREAKS.items(), ids=[break_it.__name__ for break_it in BREAKS])
def test_a_broken_checkpoint_folder_is_named(run_here, one_line, text, tiny, break_it, culprit):
    shutil.copytree(tiny, text / "broken")
    break_it(text / "broken")
    one_line(run_here("sample.py", "--init_from", "broken", cwd=text, ok=False), culprit)


# --- flags ---


SCRATCH = ["--init_from", "scratch", "--tokenizer", "tiny"]
MISTAKES = [  # flags, what the line names
    (["--alpha", "-1"], "--alpha"), (["--alpha", "nan"], "--alpha"), (["--alpha", "1", "1"], "--alpha"),
    (["--eps", "-1"], "--eps"), (["--batch_size", "0"], "--batch_size"), (["--alhpa", "1"], "--alhpa"),
    (["--resume", "--out_dir", "none"], "none"), (["--block_size", "4"], "--block_size"),
    (["--seed", "-1"], "--seed"), (["--learning_rate", "inf"], "--learning_rate"),
    (["--dropout", "1"], "--dropout"), ([*SCRATCH, "--n_head", "3", "--n_embd", "32"], "--n_head"),
    (["--alpha_warmup_iters", "301"], "--alpha_warmup_iters"),
    (SCRATCH[:2], "--tokenizer"),
]
NOT_THERE = [
    (["--device", "tpu"], "--device tpu"), (["--data", "missing.txt"], "missing.txt"),
    (["--data", "."], "--data ."), (["--block_size", "4000"], "--block_size"),
    (["--init_from", "gpt5"], "gpt5"), (["--init_from", "gpt2"], "gpt2"),
    (["--init_from", "./gpt2"], "./gpt2"),
    (["--counts", "text.txt"], "text.txt"), (["--counts", "short.npy"], "short.npy"),
    (["--counts", "negative.npy"], "negative.npy"), (["--out_dir", "text.txt"], "text.txt"),
    (["--eps", "0", "--counts", "half.npy"], "eps"),
]


@pytest.mark.parametrize("flags, culprit", MISTAKES, ids=[" ".join(flags) for flags, _ in MISTAKES])
def test_a_mistake_ends_in_one_line(train, one_line, text, flags, culprit):
    one_line(train("--max_iters", 1, *flags, ok=False), culprit, status=2)
    assert not (text / "out").exists()


@pytest.mark.parametrize("flags, culprit", NOT_THERE, ids=[" ".join(flags) for flags, _ in NOT_THERE])
def test_what_cannot_be_used_is_named_in_one_line(train, one_line, text, flags, culprit):
    np.save(text / "short.npy", np.ones(50257, int))
    np.save(text / "negative.npy", -np.ones(4096))
    np.save(text / "half.npy", np.arange(4096) % 2)
    one_line(train("--max_iters", 1, *flags, ok=False), culprit)
    assert not (text / "out/resume.pt").exists()
