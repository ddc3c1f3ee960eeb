"""What goes wrong on the first day: a full disk, a killed process, a stranger's file, a text that changed. Really injected."""

import pickle
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))
from test_end_to_end import OFFLINE, ROOT, SMALL, log, run, text  # noqa: F401 (text is a fixture)

from model import GPT

ARGS = [*SMALL, "--batch_size", 2]


def one_line(result, culprit, status=1):
    assert result.returncode == status and result.stderr.count("\n") == 1 and culprit in result.stderr, result.stderr


def start(*args, cwd):
    return subprocess.Popen([sys.executable, ROOT / "train.py", *map(str, ARGS), *map(str, args)], cwd=cwd, env=OFFLINE,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_the_run_where_it_can_go_on(text, signum):
    run("train.py", *ARGS, "--max_iters", 8, "--dropout", 0.1, "--out_dir", "whole", cwd=text)
    process = start("--max_iters", 8, "--dropout", 0.1, "--out_dir", "cut", cwd=text)
    for line in process.stdout:
        if line.startswith("step 3: loss"):
            process.send_signal(signum)
            break
    rest = process.stdout.read()
    assert process.wait(timeout=30) == 0 and "to go on: python train.py --resume --out_dir cut" in rest
    run("train.py", "--resume", "--out_dir", "cut", cwd=text)
    whole, cut = ({e["iter"]: e["loss"] for e in log(text / name) if "loss" in e} for name in ("whole", "cut"))
    assert cut == pytest.approx(whole, rel=1e-5)
    assert len(log(text / "cut")) == len(log(text / "whole"))


def test_killed_at_any_moment_the_folder_loads_and_resumes(text):
    for seed in range(3):
        shutil.rmtree(text / "out", ignore_errors=True)
        process = start("--max_iters", 1000, "--eval_interval", 1, cwd=text)
        process.stdout.readline()
        while not (text / "out/resume.pt").exists():
            time.sleep(0.01)
        time.sleep(random.Random(seed).uniform(0.2, 1.0))  # most of the time is spent saving
        process.kill()
        process.communicate()
        GPT.from_pretrained(text / "out")
        saved = torch.load(text / "out/resume.pt", weights_only=True)["iter"]
        assert f"resuming at step {saved}" in run("train.py", "--resume", "--max_iters", saved + 1, cwd=text).stdout


def test_a_full_disk_leaves_the_checkpoint_whole(text):
    run("train.py", *ARGS, "--max_iters", 2, "--eval_interval", 1, cwd=text)
    before = {p.name: p.read_bytes() for p in (text / "out").iterdir() if p.name != "log.jsonl"}
    limit = lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (2_000_000, 2_000_000))
    one_line(run("train.py", "--resume", "--max_iters", 4, cwd=text, ok=False, preexec_fn=limit), "could not be written")
    assert before == {p.name: p.read_bytes() for p in (text / "out").iterdir() if p.name != "log.jsonl"}


def test_a_loss_that_is_no_number_ends_the_run(text):
    result = run("train.py", *ARGS, "--max_iters", 20, "--learning_rate", 1e30, "--warmup_iters", 0, cwd=text, ok=False)
    one_line(result, "--learning_rate")
    assert all(w.isfinite().all() for w in GPT.from_pretrained(text / "out").state_dict().values())


def test_out_of_memory_names_the_flags(text):
    limit = lambda: resource.setrlimit(resource.RLIMIT_AS, (8 << 30, 8 << 30))
    for size in 20_000, 10**9:  # torch's memory, numpy's
        one_line(run("train.py", *ARGS, "--batch_size", size, "--max_iters", 1, cwd=text, ok=False, preexec_fn=limit), "out of memory: halve --batch_size")


class Malice:
    def __reduce__(self):
        return Path.touch, (Path("pwned"),)


def test_a_strangers_files_run_no_code(text):
    for name in "config.json", "vocab.json", "merges.txt":
        (text / "evil").mkdir(exist_ok=True)
        shutil.copy(ROOT / "tiny" / name, text / "evil" / name)
    for path in text / "evil/pytorch_model.bin", text / "evil/resume.pt", text / "evil.npy":
        torch.save({"x": Malice()}, path) if path.suffix != ".npy" else path.write_bytes(pickle.dumps(Malice()))
    np.save(text / "object.npy", np.array([Malice()]), allow_pickle=True)
    one_line(run("sample.py", "--init_from", "evil", cwd=text, ok=False), "pytorch_model.bin")
    one_line(run("train.py", "--resume", "--out_dir", "evil", cwd=text, ok=False), "resume.pt")
    for name in "evil.npy", "object.npy":
        one_line(run("train.py", *ARGS, "--counts", name, cwd=text, ok=False), name)
    assert not (text / "pwned").exists()


def test_the_token_cache_is_reused_and_never_stale(text):
    tokens = lambda: int(run("train.py", *ARGS, "--max_iters", 1, cwd=text).stdout.split("text.txt: ")[1].split()[0].replace(",", ""))
    first = tokens()
    cached = list((text / "token_cache").iterdir())
    assert len(cached) == 1 and cached[0].stat().st_size == 2 * first
    modified = cached[0].stat().st_mtime_ns
    assert tokens() == first and cached[0].stat().st_mtime_ns == modified
    (text / "text.txt").write_text((text / "text.txt").read_text() + "more. ")
    assert tokens() > first


@pytest.mark.parametrize("break_it, culprit", [
    (lambda f: (f / "config.json").unlink(), "config.json"),
    (lambda f: (f / "config.json").write_text('{"model_type": "llama"}'), "model_type"),
    (lambda f: (f / "config.json").write_text("{"), "config.json"),
    (lambda f: (f / "pytorch_model.bin").unlink(), "pytorch_model.bin"),
    (lambda f: (f / "pytorch_model.bin").write_bytes((ROOT / "tiny/pytorch_model.bin").read_bytes()[:100_000]), "pytorch_model.bin"),
    (lambda f: (f / "vocab.json").unlink(), "vocab.json"),
    (lambda f: (f / "merges.txt").write_text("#version\na b\n"), "merges.txt"),
    (lambda f: (f / "config.json").write_text((f / "config.json").read_text().replace("4096", "4000")), "wte.weight"),
])
def test_a_broken_checkpoint_folder_is_named(text, break_it, culprit):
    shutil.copytree(ROOT / "tiny", text / "broken")
    break_it(text / "broken")
    one_line(run("sample.py", "--init_from", "broken", cwd=text, ok=False), culprit)
