"""What several test files use: the scripts as a user runs them, and a text and pairs to run them on."""

import io
import json
import os
import random
import runpy
import signal
import socket
import subprocess
import sys
import threading
from pathlib import Path

import pytest

import count

os.environ["OMP_NUM_THREADS"] = "1"  # before torch is there: models this small are no faster on several cores
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

    def start(script, *args, cwd, env={}, before=lambda: None, python=(), **options):
        def prepare():
            # What runs in the background ignores Ctrl-C, and its children with it.
            signal.signal(signal.SIGINT, signal.SIG_DFL)
            before()

        if sys.platform != "win32":
            options["preexec_fn"] = prepare
        pipes = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE} | options
        command = [sys.executable, *python, str(ROOT / script), *map(str, args)]
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


def finished(process, stdout, stderr, ok):
    assert process.returncode == 0 or not ok, stderr
    return subprocess.CompletedProcess(process.args, process.returncode, stdout, stderr)


@pytest.fixture
def run(start):
    """run(script, *args, cwd=...): its returncode, stdout and stderr."""
    def run(script, *args, cwd, ok=True, input=None, **options):
        process = start(script, *args, cwd=cwd, stdin=subprocess.PIPE, **options)
        return finished(process, *process.communicate(input), ok)

    return run


@pytest.fixture
def run_here(monkeypatch, environment):
    """The same as run, in this process: in a fraction of the time, since torch is there already."""
    def run_here(script, *args, cwd, ok=True):
        streams = [io.TextIOWrapper(io.BytesIO(), encoding="utf-8") for _ in range(2)]
        with monkeypatch.context() as patch:
            patch.chdir(cwd)
            for name, value in environment.items():
                patch.setenv(name, value)
            patch.setattr(sys, "argv", [str(ROOT / script), *map(str, args)])
            patch.setattr(sys, "stdout", streams[0])
            patch.setattr(sys, "stderr", streams[1])
            try:
                status = runpy.run_path(str(ROOT / script), run_name="__main__") and 0
            except SystemExit as end:
                status = end.code or 0
                if isinstance(status, str):
                    print(status, file=sys.stderr)
                    status = 1
        stdout, stderr = (stream.flush() or stream.buffer.getvalue().decode() for stream in streams)
        assert status == 0 or not ok, stderr
        return subprocess.CompletedProcess([script, *args], status, stdout, stderr)

    return run_here


@pytest.fixture
def two_ranks(start):
    """Start a script as torchrun does, as two processes that work together: a list of both."""
    def two_ranks(script, *args, cwd):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = str(free.getsockname()[1])
        both = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": "2"}
        return [start(script, *args, cwd=cwd, env=both | {"RANK": rank, "LOCAL_RANK": rank}) for rank in "01"]

    return two_ranks


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
    """A run's report.json."""
    def report(folder):
        return json.loads((folder / "report.json").read_text(encoding="utf-8"))

    return report
