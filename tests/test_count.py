"""count.py: tokens and counts are those of encoding each text whole; files of counts are what they say."""

import gzip
import json
import os
import random
import signal
import string
import sys
from itertools import islice

import numpy as np
import pytest

import count
from count import count_tokens, encode, load_counts, load_tokenizer

# --- the tokenizer ---


@pytest.fixture
def as_tokenizer_json(tiny):
    """tiny/'s tokenizer as the content of a tokenizer.json."""
    vocab = json.loads((tiny / "vocab.json").read_text(encoding="utf-8"))
    lines = (tiny / "merges.txt").read_text(encoding="utf-8").splitlines()
    return {
        "normalizer": None,
        "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True},
        "added_tokens": [{"id": vocab["<|endoftext|>"], "content": "<|endoftext|>", "special": True}],
        "model": {"type": "BPE", "vocab": vocab, "merges": [line.split() for line in lines[1:]]},
    }


def test_tokens_are_those_of_transformers(tokenizer, root):
    golden = json.loads((root / "tests/golden/tokens.json").read_text(encoding="utf-8"))
    assert tokenizer.encode_ordinary(golden["text"]) == golden["tokens"]
    assert tokenizer.decode(golden["tokens"]) == golden["text"]


def test_a_tokenizer_is_never_a_stale_one(tiny, tmp_path):
    for name in "vocab.json", "merges.txt":
        (tmp_path / name).write_bytes((tiny / name).read_bytes())
    assert load_tokenizer(tmp_path).n_vocab == 4096
    merges = (tmp_path / "merges.txt").read_text(encoding="utf-8").splitlines()
    vocab = json.loads((tmp_path / "vocab.json").read_text(encoding="utf-8"))
    (tmp_path / "merges.txt").write_text("\n".join(merges[: 1 + 4000 - 256]) + "\n", encoding="utf-8")
    vocab = {token: i for token, i in vocab.items() if i < 4000} | {"<|endoftext|>": 4000}
    (tmp_path / "vocab.json").write_text(json.dumps(vocab), encoding="utf-8")
    assert load_tokenizer(tmp_path).n_vocab == 4001


@pytest.mark.parametrize("merges", ["pairs", "strings"])
def test_tokenizer_json_alone_is_enough(as_tokenizer_json, tokenizer, tmp_path, root, merges):
    """It is all that Transformers 5 saves; merges are lists of two there, and were strings before."""
    if merges == "strings":
        model = as_tokenizer_json["model"]
        model["merges"] = [" ".join(pair) for pair in model["merges"]]
    (tmp_path / "tokenizer.json").write_text(json.dumps(as_tokenizer_json), encoding="utf-8")
    read = load_tokenizer(tmp_path)
    text = (root / "README.md").read_text(encoding="utf-8")
    assert read.encode_ordinary(text) == tokenizer.encode_ordinary(text)
    assert (read.n_vocab, read.eot_token) == (tokenizer.n_vocab, tokenizer.eot_token)


def test_a_tokenizer_saved_by_transformers_5_opens(root):
    folder = root / "tests/golden/tokenizer"
    golden = json.loads((folder / "tokens.json").read_text(encoding="utf-8"))
    assert load_tokenizer(folder).encode_ordinary(golden["text"]) == golden["tokens"]


def test_an_end_of_text_may_be_the_first_token(tmp_path, tiny):
    vocab = json.loads((tiny / "vocab.json").read_bytes())
    first = {"<|endoftext|>": 0} | {token: i + 1 for token, i in vocab.items() if token != "<|endoftext|>"}
    (tmp_path / "vocab.json").write_text(json.dumps(first), encoding="utf-8")
    (tmp_path / "merges.txt").write_bytes((tiny / "merges.txt").read_bytes())
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.eot_token == 0 and tokenizer.decode(tokenizer.encode_ordinary("one two")) == "one two"


def prefix_space(content):
    content["pre_tokenizer"]["add_prefix_space"] = True


def word_pieces(content):
    content["model"]["type"] = "WordPiece"


def normalized(content):
    content["normalizer"] = {"type": "NFC"}


def split_otherwise(content):
    splitters = [{"type": "Split"}, {"type": "ByteLevel"}]
    content["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": splitters}


def no_end_of_text(content):
    content["added_tokens"] = []
    del content["model"]["vocab"]["<|endoftext|>"]


def other_order(content):
    content["model"]["merges"].reverse()


def no_merges(content):
    del content["model"]["merges"]


def unknown_merge(content):
    content["model"]["merges"].append(["the", "zyx"])


OTHER = [prefix_space, word_pieces, normalized, split_otherwise, no_end_of_text, other_order, no_merges,
         unknown_merge]


@pytest.mark.parametrize("change", OTHER, ids=[change.__name__ for change in OTHER])
def test_another_tokenizer_is_refused_in_one_line(as_tokenizer_json, tmp_path, change):
    change(as_tokenizer_json)
    (tmp_path / "tokenizer.json").write_text(json.dumps(as_tokenizer_json), encoding="utf-8")
    with pytest.raises(ValueError) as refusal:
        load_tokenizer(tmp_path)
    assert str(tmp_path) in str(refusal.value) and "\n" not in str(refusal.value)


@pytest.mark.parametrize("content", ["", "{", "[]", "null", '{"model": 3}'])
def test_a_damaged_tokenizer_is_refused_in_one_line(tmp_path, content):
    (tmp_path / "tokenizer.json").write_text(content, encoding="utf-8")
    with pytest.raises(ValueError) as refusal:
        load_tokenizer(tmp_path)
    assert str(tmp_path) in str(refusal.value) and "\n" not in str(refusal.value)


# --- reading and counting ---


@pytest.mark.parametrize("seed", range(5))
def test_streamed_in_pieces_as_encoded_whole(tokenizer, tmp_path, monkeypatch, seed):
    rng = random.Random(seed)
    atoms = ["the", "I'll", "'s", "'", " ", " ", " ", "  ", "\n", "\n\n", "\r\n", "\t", "\u00a0", "\u3000",
             "\x1c", "\x85", "e\u0301", "\U0001f469\u200d\U0001f680", "12", "x1", ",", "...", "<|endoftext|>",
             "\ufeff", "\u4e2d\u6587"]
    texts = ["".join(rng.choices(atoms, k=3000)).lstrip("\ufeff") for _ in range(3)]
    paths = [tmp_path / name for name in ("a.txt", "b.txt.gz", "c.txt")]
    for path, text in zip(paths, texts):
        path.write_bytes(gzip.compress(text.encode()) if path.suffix == ".gz" else text.encode())
    expected = sum(np.bincount(tokenizer.encode_ordinary(text), minlength=4096) for text in texts)
    monkeypatch.setattr(count, "PIECE", 50)
    monkeypatch.setattr(count, "READ", 70)
    counts = count_tokens(paths, tokenizer, jobs=3)
    assert counts.dtype == np.int64 and (counts == expected).all()
    pieces = [tokens for _, tokens in encode([texts[0]], tokenizer, jobs=2)]
    assert np.concatenate(pieces).tolist() == tokenizer.encode_ordinary(texts[0])
    assert len(list(encode(count.read_text(paths[2]), tokenizer))) > 20


ATOMS = ["a", "\x1c", "=", "0", "'", "\n", "\u00a0", "ab", "!'", "\u00e9", "\u4e2d\u6587", "\U0001f469\u200d",
         string.ascii_letters, string.digits, string.punctuation, " \t\n\r"]


def test_text_without_a_place_to_cut(tokenizer, monkeypatch):
    rng = random.Random(0)
    monkeypatch.setattr(count, "PIECE", 2000)
    for text in ["".join(rng.choices(atom, k=20_000)) for atom in ATOMS]:
        pieces = [tokens for _, tokens in encode([text], tokenizer)]
        assert np.concatenate(pieces).tolist() == tokenizer.encode_ordinary(text), text[:20]
        assert len(pieces) > 5


def test_contractions_wherever_it_could_be_cut(tokenizer, monkeypatch):
    """Nothing is cut near a contraction; a text of nothing else is still each character once."""
    text = "'s\u00e9" * 2000
    monkeypatch.setattr(count, "PIECE", 900)
    pieces = [tokens for _, tokens in islice(encode([text], tokenizer), 100)]
    assert np.concatenate(pieces).tolist() == tokenizer.encode_ordinary(text)


@pytest.mark.parametrize("character, rest", [
    (" ", [" word"]), ("\t", ["\t", "word"]), ("\n", ["\n", "word"]), ("a", [" word"]),
], ids=["spaces", "tabs", "line ends", "one letter"])
def test_megabytes_of_one_character_and_then_a_word(tokenizer, tmp_path, character, rest):
    """No regular expression knows the answer here: GPT-2 splits such a text into the run and the rest."""
    n = 3_000_000
    # The last space belongs to the word; the last of other white space stands alone.
    pieces = [character * n, *rest]
    (tmp_path / "a.txt").write_text("".join(pieces), encoding="utf-8", newline="")
    tokens = sum((tokenizer._encode_single_piece(piece) for piece in pieces), [])
    assert (count_tokens([tmp_path / "a.txt"], tokenizer) == np.bincount(tokens, minlength=4096)).all()


def test_of_pairs_the_completions_count_and_an_end_of_text_each(pairs, tokenizer):
    rows = [json.loads(line) for line in (pairs / "pairs.jsonl").read_text(encoding="utf-8").splitlines()]
    tokens = sum((tokenizer.encode_ordinary(row["completion"]) + [tokenizer.eot_token] for row in rows), [])
    (pairs / "b.jsonl.gz").write_bytes(gzip.compress((pairs / "pairs.jsonl").read_bytes()))
    for name in "pairs.jsonl", "b.jsonl.gz":
        assert (count_tokens([pairs / name], tokenizer) == np.bincount(tokens, minlength=4096)).all()


# --- the command line ---


def test_from_the_command_line(run, tokenizer, tiny, tmp_path):
    (tmp_path / "a.txt").write_bytes(b"one two\r\n")
    flags = "a.txt", "-", "--tokenizer", tiny, "-o", "c.npy"
    out = run("count.py", *flags, cwd=tmp_path, input="two three").stdout
    counts = np.load(tmp_path / "c.npy")
    expected = tokenizer.encode_ordinary("one two\r\n") + tokenizer.encode_ordinary("two three")
    assert (counts == np.bincount(expected, minlength=4096)).all()
    assert f"{len(expected)} tokens, {len(set(expected))} distinct" in out
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.txt", "c.npy"]


@pytest.mark.usefixtures("posix")
def test_ctrl_c_leaves_no_half_written_counts(start, tiny, tmp_path):
    process = start("count.py", "-", "--tokenizer", tiny, cwd=tmp_path, stdin=-1)
    process.stdin.write("word " * 1_000_000)  # more than fits into a pipe: after this it is counting
    process.stdin.flush()
    process.send_signal(signal.SIGINT)
    assert process.communicate(timeout=60) == ("", "")
    assert process.returncode == -signal.SIGINT and not list(tmp_path.iterdir())


@pytest.mark.parametrize("name, content, word", [
    ("a.txt", b"caf\xe9", "UTF-8"),
    ("a.txt", "windows".encode("utf-16"), "UTF-8"),
    ("a.txt", b"", "no text"),
    ("a.txt", None, "No such file"),
    ("a.txt.gz", gzip.compress(b"one two " * 99)[:-9], "cannot be read"),
    ("a.json", b'[{"prompt": "a", "completion": "b"}]', ".jsonl"),
    ("a.jsonl", b'{"prompt": "a", "completion": "b"}\n{"prompt": "c"}\n', "line 2"),
])
def test_a_text_that_cannot_be_counted_is_named(run_here, one_line, tiny, tmp_path, name, content, word):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    result = run_here("count.py", name, "--tokenizer", tiny, cwd=tmp_path, ok=False)
    one_line(result, word)
    assert name in result.stderr and not (tmp_path / "counts.npy").exists()


@pytest.mark.usefixtures("posix")
def test_counts_replace_nothing_but_counts(run_here, one_line, text, tiny):
    before = (text / "text.txt").read_bytes()
    if sys.platform != "win32":
        os.mkfifo(text / "device")
    for name in "device", "text.txt":
        result = run_here("count.py", "text.txt", "--tokenizer", tiny, "-o", name, cwd=text, ok=False)
        one_line(result, name, status=2)
    assert (text / "device").is_fifo() and (text / "text.txt").read_bytes() == before
    for _ in range(2):
        run_here("count.py", "text.txt", "--tokenizer", tiny, "-o", "counts.npy", cwd=text)


def test_without_a_network_it_names_the_tokenizer_that_is_there(run_here, one_line, text):
    one_line(run_here("count.py", "text.txt", cwd=text, ok=False), "--tokenizer tiny")


# --- files of counts, and bands ---


def test_counts_are_scaled_and_added(text):
    np.save(text / "a.npy", np.arange(1, 4097))
    np.save(text / "b.npy", np.full(4096, 10.0))
    assert (load_counts([f"{text}/a.npy:0.5"], 4096) == np.arange(1, 4097) / 2).all()
    assert (load_counts([f"{text}/a.npy:0.5", f"{text}/b.npy"], 4096) == np.arange(1, 4097) / 2 + 10).all()


def test_counts_of_few_bits_do_not_overflow(tmp_path):
    np.save(tmp_path / "a.npy", np.array([65_535, 1], np.uint16))
    assert load_counts([str(tmp_path / "a.npy")] * 2, 2).tolist() == [131_070, 2]


@pytest.mark.parametrize("scale", ["-1", "0", "1e400", "nan"])
def test_a_scale_that_makes_no_counts_is_refused(tmp_path, scale):
    np.save(tmp_path / "a.npy", np.arange(4))
    with pytest.raises(ValueError, match="a.npy"):
        load_counts([f"{tmp_path}/a.npy:{scale}"], 4)


@pytest.mark.parametrize("counts", [
    np.ones(5), np.ones((2, 2)), np.array([1, 2, 3, np.nan]), np.array([1, 2, 3, np.inf]),
    np.array([1, -1, 1, 1]), np.zeros(4), np.array(["a"] * 4), np.array([1j] * 4),
], ids=["length", "2-D", "nan", "inf", "negative", "zeros", "strings", "complex"])
def test_what_are_no_counts_is_refused_by_name(tmp_path, counts):
    np.save(tmp_path / "a.npy", counts)
    with pytest.raises(ValueError, match="a.npy"):
        load_counts([str(tmp_path / "a.npy")], 4)


def test_bands_are_half_of_the_text_its_last_tenth_and_the_rest():
    counts = np.array([5, 0, 60, 4, 25, 1, 5])
    #                  r  r   f  r   m  r  m    of 100: 60 | 25 5 | 5 4 1, and what was never counted
    assert [count.BANDS[i] for i in count.frequency_bands(counts)] == [
        "middle", "rare", "frequent", "rare", "middle", "rare", "rare"]
