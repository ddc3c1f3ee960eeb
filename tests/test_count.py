"""count.py: the counts are those of encoding each text whole, by an independent tokenizer."""

import gzip
import json
import random
import signal
import string
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
import count
from count import count_tokens, encode, load_tokenizer

GOLDEN = json.loads((ROOT / "tests/golden/tokens.json").read_text())


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer(ROOT / "tiny")


def test_tokens_are_those_of_transformers(tokenizer):
    assert tokenizer.encode_ordinary(GOLDEN["text"]) == GOLDEN["tokens"]
    assert tokenizer.decode(GOLDEN["tokens"]) == GOLDEN["text"]


def test_a_tokenizer_is_never_a_stale_one(tokenizer, tmp_path):
    for name in "vocab.json", "merges.txt":
        (tmp_path / name).write_bytes((ROOT / "tiny" / name).read_bytes())
    assert load_tokenizer(tmp_path).n_vocab == 4096
    merges = (tmp_path / "merges.txt").read_text().splitlines()
    vocab = {t: i for t, i in json.loads((tmp_path / "vocab.json").read_text()).items() if i < 4000}
    (tmp_path / "merges.txt").write_text("\n".join(merges[: 1 + 4000 - 256]) + "\n")
    (tmp_path / "vocab.json").write_text(json.dumps(vocab))
    assert load_tokenizer(tmp_path).n_vocab == 4001


@pytest.mark.parametrize("seed", range(5))
def test_streamed_in_pieces_as_encoded_whole(tokenizer, tmp_path, monkeypatch, seed):
    rng = random.Random(seed)
    atoms = ["the", "I'll", "'s", "'", " ", " ", " ", "  ", "\n", "\n\n", "\r\n", "\t", "\u00a0", "\u3000", "\x1c", "\x85", "e\u0301",
             "\U0001f469\u200d\U0001f680", "12", "x1", ",", "...", "<|endoftext|>", "\ufeff", "\u4e2d\u6587"]
    texts = ["".join(rng.choices(atoms, k=3000)) for _ in range(3)]
    paths = [tmp_path / name for name in ("a.txt", "b.txt.gz", "c.txt")]
    for path, text in zip(paths, texts):
        path.write_bytes(gzip.compress(text.encode()) if path.suffix == ".gz" else text.encode())
    expected = sum(np.bincount(tokenizer.encode_ordinary(text), minlength=4096) for text in texts)
    monkeypatch.setattr(count, "CHUNK", 50)
    counts = count_tokens(paths, tokenizer, jobs=3)
    assert counts.dtype == np.int64 and (counts == expected).all()
    pieces = [tokens for _, tokens in encode([texts[0]], tokenizer, jobs=2)]
    assert np.concatenate(pieces).tolist() == tokenizer.encode_ordinary(texts[0])
    assert len(list(encode(count.read_text(paths[2]), tokenizer))) > 20


def test_text_without_a_place_to_cut(tokenizer, monkeypatch):
    rng = random.Random(0)
    atoms = ["a", "=", "0", "'", "\n", "\u00a0", "ab", "!'", "\u00e9", "\u4e2d\u6587", "\U0001f469\u200d", string.ascii_letters, string.digits, string.punctuation, " \t\n\r"]
    monkeypatch.setattr(count, "CHUNK", 2000)
    for text in ["".join(rng.choices(atom, k=20_000)) for atom in atoms]:
        pieces = [tokens for _, tokens in encode([text], tokenizer)]
        assert np.concatenate(pieces).tolist() == tokenizer.encode_ordinary(text) and len(pieces) > 5, text[:20]


def run(*args, **kwargs):
    return subprocess.run([sys.executable, ROOT / "count.py", *args], capture_output=True, **kwargs)


def test_from_the_command_line(tokenizer, tmp_path):
    (tmp_path / "a.txt").write_text("one two\r\n")
    result = run("a.txt", "-", "--tokenizer", ROOT / "tiny", "-o", "c.npy", cwd=tmp_path, input=b"two three")
    assert result.returncode == 0, result.stderr
    counts = np.load(tmp_path / "c.npy")
    expected = tokenizer.encode_ordinary("one two\r\n") + tokenizer.encode_ordinary("two three")
    assert (counts == np.bincount(expected, minlength=4096)).all()
    assert f"{len(expected)} tokens, {len(set(expected))} distinct".encode() in result.stdout
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.txt", "c.npy"]


def test_ctrl_c_leaves_no_half_written_counts(tmp_path):
    with subprocess.Popen(["yes", "word"], stdout=subprocess.PIPE) as endless:
        process = subprocess.Popen([sys.executable, ROOT / "count.py", "-", "--tokenizer", ROOT / "tiny"], cwd=tmp_path,
                                   stdin=endless.stdout, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        time.sleep(3)
        process.send_signal(signal.SIGINT)
        out = process.communicate(timeout=30)
        endless.kill()
    assert process.returncode == 130 and out == (b"", b"") and not list(tmp_path.iterdir())


@pytest.mark.parametrize("content, word", [(b"caf\xe9", b"UTF-8"), ("windows".encode("utf-16"), b"UTF-8"), (b"", b"no text"), (None, b"No such file")])
def test_a_mistake_ends_in_one_line(tmp_path, content, word):
    if content is not None:
        (tmp_path / "a.txt").write_bytes(content)
    result = run("a.txt", "--tokenizer", ROOT / "tiny", cwd=tmp_path)
    assert result.returncode == 1 and result.stderr.count(b"\n") == 1
    assert word in result.stderr and b"a.txt" in result.stderr and not (tmp_path / "counts.npy").exists()
