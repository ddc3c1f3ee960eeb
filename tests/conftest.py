"""What several test files use: the scripts as a user runs them, and a text and pairs to run them on."""

import io
import json
import os
import random
import runpy
import signal
import subprocess
import sys
import threading
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import count

torch.set_num_threads(1)  # models this small are no faster on several cores
ROOT = Path(__file__).parent.parent
SECONDS = 150  # until what hangs is ended


@pytest.fixture(scope="session")
def root():
    return ROOT


@pytest.fixture(scope="session")
def tiny():
    return ROOT / "tiny"


@pytest.fixture(scope="session")
def environment(tmp_path_factory):
    """A network that nothing answers on, a cache with nothing in it, and one thread: enough here."""
    nowhere = str(tmp_path_factory.mktemp("torch_home"))
    return {"HF_ENDPOINT": "http://127.0.0.1:9", "TORCH_HOME": nowhere, "OMP_NUM_THREADS": "1"}


@pytest.fixture(scope="session")
def tokenizer():
    return count.load_tokenizer(ROOT / "tiny")


@pytest.fixture(scope="session")
def small():
    """Flags of train.py with which a step takes a moment."""
    return ["--init_from", ROOT / "tiny", "--data", "text.txt", "--dtype", "float32", "--block_size", 32,
            "--batch_size", 2, "--eval_iters", 2, "--log_interval", 1, "--device", "cpu"]


@pytest.fixture
def text(tmp_path):
    """A folder with text.txt, 500 lines of a few words."""
    rng = random.Random(0)
    words = "the a of quick brown fox jumps over lazy dog and then sleeps under some old tree by water"
    lines = (" ".join(rng.choices(words.split(), k=8)) + "." for _ in range(500))
    (tmp_path / "text.txt").write_text("\n".join(lines), encoding="utf-8")
    return tmp_path


@pytest.fixture
def pairs(tmp_path):
    """A folder with pairs.jsonl, 100 questions with an answer each."""
    rows = ({"prompt": f"Question {i}:", "completion": f" the answer is {i * i}." + " Yes." * (i % 5)}
            for i in range(100))
    (tmp_path / "pairs.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n", encoding="utf-8")
    return tmp_path


@pytest.fixture
def posix():
    if sys.platform == "win32":
        pytest.skip("needs POSIX signals and limits")


@pytest.fixture
def start(environment):
    """start(script, *args, cwd=...) starts a process, which ends with the test at the latest."""
    processes, timers = [], []

    def start(script, *args, cwd, env={}, python=(), **options):
        if sys.platform != "win32":
            # What runs in the background ignores Ctrl-C, and its children with it.
            options["preexec_fn"] = lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)
        pipes = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE} | options
        command = [sys.executable, *map(str, (*python, ROOT / script, *args))]
        env = os.environ | environment | env
        process = subprocess.Popen(command, cwd=cwd, env=env, encoding="utf-8", **pipes)
        processes.append(process)
        timers.append(threading.Timer(SECONDS, process.kill))
        timers[-1].start()
        return process

    yield start
    for process, timer in zip(processes, timers):
        timer.cancel()
        if process.poll() is None:
            process.terminate()  # torchrun ends its workers then
            try:
                process.communicate(timeout=20)
            except subprocess.TimeoutExpired:
                process.kill()
        process.communicate()


@pytest.fixture
def run(monkeypatch, environment):
    """run(script, *args, cwd=...): its returncode, stdout and stderr.

    It runs in this process: in a fraction of the time, since torch is there already.
    """
    def run(script, *args, cwd, ok=True, input=""):
        streams = {name: io.TextIOWrapper(io.BytesIO(), encoding="utf-8") for name in ("stdout", "stderr")}
        streams["stdin"] = io.TextIOWrapper(io.BufferedReader(io.BytesIO(input.encode())))
        with monkeypatch.context() as patch:
            patch.chdir(cwd)
            for name, value in environment.items():
                patch.setenv(name, value)
            patch.setattr(sys, "argv", [str(ROOT / script), *map(str, args)])
            for name, stream in streams.items():
                patch.setattr(sys, name, stream)
            try:
                status = runpy.run_path(str(ROOT / script), run_name="__main__") and 0
            except SystemExit as end:
                status = end.code or 0
                if isinstance(status, str):
                    print(status, file=sys.stderr)
                    status = 1
        for name in "stdout", "stderr":
            streams[name].flush()
            streams[name] = streams[name].buffer.getvalue().decode()
        assert status == 0 or not ok, streams["stderr"]
        return SimpleNamespace(returncode=status, stdout=streams["stdout"], stderr=streams["stderr"])

    return run


@pytest.fixture
def train(run, small, text):
    """train(*flags): a run of train.py on text.txt that takes a moment."""
    def train(*flags, **options):
        return run("train.py", *small, *flags, cwd=text, **options)

    return train


@pytest.fixture
def resume(run, text):
    """resume(*flags): train.py --resume."""
    def resume(*flags, ok=True):
        return run("train.py", "--resume", *flags, cwd=text, ok=ok)

    return resume


@pytest.fixture(scope="session")
def until():
    """Read what a process prints up to a line with that beginning."""
    def until(process, beginning):
        lines = []
        for line in process.stdout:
            lines.append(line)
            if line.startswith(beginning):
                return lines
        pytest.fail(f"ended without {beginning!r}: {''.join(lines)}{process.stderr.read()}")

    return until


@pytest.fixture(scope="session")
def one_line():
    """A run ended with that status and a single line on stderr that names the culprit."""
    def one_line(result, culprit, status=1):
        assert result.returncode == status, result.stderr
        assert result.stderr.count("\n") == 1 and culprit in result.stderr, result.stderr

    return one_line


@pytest.fixture(scope="session")
def log():
    """The entries of a run's log.jsonl."""
    def log(folder):
        return [json.loads(line) for line in (folder / "log.jsonl").read_text(encoding="utf-8").splitlines()]

    return log


@pytest.fixture(scope="session")
def losses(log):
    """The training losses of a run, by step."""
    def losses(folder):
        return {entry["iter"]: entry["loss"] for entry in log(folder) if "loss" in entry}

    return losses


@pytest.fixture(scope="session")
def report():
    """A run's report.json, which has no NaN."""
    def report(folder):
        content = (folder / "report.json").read_text(encoding="utf-8")
        return json.loads(content, parse_constant=pytest.fail)

    return report
