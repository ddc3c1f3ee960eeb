"""count.py: Transformers' token ids, text and pairs from any file, what is held out, and counts."""

import gzip
import io
import json
import random
import shutil
import string
import sys

import numpy as np
import pytest
import tiktoken

import count
from count import count_tokens, encode, load_corpus, load_counts, load_tokenizer

EOT = "<|endoftext|>"


def tokens_of(tokenizer, *texts):
    """The tokens of texts, by tiktoken alone. Not for added tokens that begin alike."""
    return sum((tokenizer.encode(text, allowed_special="all") for text in texts), [])


def counts_of(tokenizer, *texts):
    return np.bincount(tokens_of(tokenizer, *texts), minlength=tokenizer.n_vocab)


def json_lines(*entries):
    return "".join(json.dumps(entry) + "\n" for entry in entries).encode()


def write_pairs(path, pairs):
    path.write_bytes(json_lines(*({"prompt": p, "completion": c} for p, c in pairs)))
    return [path]


# --- the tokenizer ---


@pytest.fixture(scope="session")
def golden(root):
    """A folder for each tokenizer that Transformers saved, with the ids that it gives for a nasty text."""
    return root / "tests/golden/tokenizers"


@pytest.fixture
def content(golden):
    """A tokenizer.json without added tokens but the end of text, as Python."""
    whole = json.loads((golden / "transformers5/tokenizer.json").read_bytes())
    return whole | {"added_tokens": [token for token in whole["added_tokens"] if token["content"] == EOT]}


@pytest.mark.parametrize("name", ["plain", *(f"transformers{v}" for v in ("4", "4_slow", "4_old", "5"))])
def test_ids_are_those_of_transformers(golden, name):
    """Also with added tokens: one begins like another, one has a space, some look like ordinary tokens."""
    expected = json.loads((golden / name / "ids.json").read_bytes())
    assert encode(expected["text"], load_tokenizer(golden / name)).tolist() == expected["ids"]


def test_merges_may_be_strings(content, golden, tmp_path):
    """As in the tokenizer.json of the released gpt2."""
    content["model"]["merges"] = [" ".join(merge) for merge in content["model"]["merges"]]
    (tmp_path / "tokenizer.json").write_text(json.dumps(content), encoding="utf-8")
    expected = json.loads((golden / "plain/ids.json").read_bytes())
    assert encode(expected["text"], load_tokenizer(tmp_path)).tolist() == expected["ids"]


CHANGES = {
    "prefix space": lambda t: t["pre_tokenizer"].update(add_prefix_space=True),
    "prefix space by default": lambda t: t["pre_tokenizer"].pop("add_prefix_space"),
    "normalizer": lambda t: t.update(normalizer={"type": "NFC"}),
    "word pieces": lambda t: t["model"].update(type="WordPiece"),
    "no regex": lambda t: t["pre_tokenizer"].update(use_regex=False),
    "several splitters": lambda t: t.update(pre_tokenizer={"type": "Sequence", "pretokenizers": []}),
    "no end of text": lambda t: (t["added_tokens"].clear(), t["model"]["vocab"].pop(EOT)),
    "merges out of order": lambda t: t["model"]["merges"].reverse(),
    "unknown merge": lambda t: t["model"]["merges"].append(["the", "zyx"]),
    "a gap": lambda t: t["added_tokens"].append({"id": 999, "content": "far away"}),
    "an id twice": lambda t: (t["model"]["vocab"].update({EOT: 355}), t["added_tokens"][0].update(id=355)),
    "a token that no merge makes": lambda t: t["model"]["vocab"].update({"zyx": 357}),
    **{flag: lambda t, flag=flag: t["added_tokens"].append({"id": 357, "content": "[PAD]", flag: True})
       for flag in ("lstrip", "rstrip", "single_word")},
}


@pytest.mark.parametrize("name, change", [
    *(("tokenizer.json", change) for change in CHANGES),
    *(("tokenizer.json", damaged) for damaged in ("", "{", "3", '{"model": 3}', "\0", "[" * 100_000)),
    *(("vocab.json", damaged) for damaged in ("", "[]", "null", '{"a": "b"}')),
    ("merges.txt", "#version: 0.2\na b c\n"), ("added_tokens.json", "["),
    ("tokenizer_config.json", '{"add_prefix_space": true}'),
    ("tokenizer_config.json", '{"added_tokens_decoder": {"357": {"content": "[PAD]", "lstrip": true}}}'),
])
def test_a_tokenizer_with_other_ids_or_damage_is_refused_in_one_line(content, golden, tmp_path, name, change):
    if change in CHANGES:
        CHANGES[change](content)
    else:
        shutil.copytree(golden / "plain", tmp_path, dirs_exist_ok=True)
    (tmp_path / name).write_text(json.dumps(content) if change in CHANGES else change, encoding="utf-8")
    with pytest.raises(ValueError) as refusal:
        load_tokenizer(tmp_path)
    assert str(tmp_path) in str(refusal.value) and "\n" not in str(refusal.value)


# --- reading ---

ATOMS = ["the", "I'll", "'s", "'", " ", " ", " ", "  ", "\n", "\n\n", "\r\n", "\t", "\u00a0", "\u3000",
         "\x1c", "\x85", "e\u0301", "\U0001f469\u200d\U0001f680", "12", "x1", ",", "...", EOT, "<|user|>",
         "[PAD]", "<|", "ze bra", "\ufeff", "\u4e2d\u6587"]


@pytest.mark.parametrize("added", [[], ["[PAD]", "<|user|>"], ["[PAD]", "ze bra", "\r\n"]], ids=len)
@pytest.mark.parametrize("piece", [1, 2, 50])
def test_read_in_pieces_it_has_the_tokens_of_the_whole(golden, tmp_path, monkeypatch, added, piece):
    shutil.copytree(golden / "plain", tmp_path, dirs_exist_ok=True)
    (tmp_path / "added_tokens.json").write_bytes(json_lines({token: i for i, token in enumerate(added, 357)}))
    tokenizer, rng = load_tokenizer(tmp_path), random.Random(piece)
    texts = ["".join(rng.choices(ATOMS, k=2000)).lstrip("\ufeff") + "." for _ in range(3)]
    paths = [tmp_path / name for name in ("a.txt", "b.txt.gz", "c.txt")]
    for path, text in zip(paths, texts):
        path.write_bytes(gzip.compress(text.encode()) if path.suffix == ".gz" else text.encode())
    monkeypatch.setattr(count, "PIECE", piece)
    assert (count_tokens(paths, tokenizer) == counts_of(tokenizer, EOT.join(texts))).all()


@pytest.mark.parametrize("alphabet", [
    "a", "\x1c", "=", "0", "'", "\n", "\u00a0", "ab", "!'", "'s\u00e9", "\u4e2d\u6587", "\U0001f469\u200d",
    string.ascii_letters, string.digits, string.punctuation, " \t\n\r",
], ids=ascii)
def test_text_without_a_place_to_cut(tokenizer, tmp_path, monkeypatch, alphabet):
    """Megabytes of it, if it is one character."""
    monkeypatch.setattr(count, "PIECE", 1000)
    k = 2_000_000 if alphabet in ("a", "=") else 10_000
    text = "x" + "".join(random.Random(0).choices(alphabet, k=k)) + " word"
    (tmp_path / "a.txt").write_bytes(text.encode())
    assert (count_tokens([tmp_path / "a.txt"], tokenizer) == counts_of(tokenizer, text)).all()


@pytest.mark.parametrize("character", " \t\n")
def test_megabytes_of_white_space_end_in_one_line(run, one_line, tiny, tmp_path, character):
    (tmp_path / "a.txt").write_bytes(("word" + character * 2_000_000 + "word").encode())
    one_line(run("count.py", "a.txt", "--tokenizer", tiny, cwd=tmp_path, ok=False), "white space")


COMPLETIONS = [" yes", " nada\r\n", f" a{EOT}b"]
PAIRS = json_lines(*({"id": 3, "completion": c, "prompt": "\u00bfQu\u00e9?"} for c in COMPLETIONS))


@pytest.mark.parametrize("name, content", [
    *((f"a.{suffix}", PAIRS) for suffix in ("jsonl", "ndjson", "jl", "jsonl.txt", "JSONL", "txt")),
    ("a.jsonl", b"\xef\xbb\xbf" + PAIRS), ("a", b"\r\n\n " + PAIRS.replace(b"\n", b"\r\n\r\n")),
    *((name, gzip.compress(PAIRS)) for name in ("a.jsonl.gz", "a.jsonl", "a", "-")), ("-", PAIRS),
])
def test_pairs_are_known_by_name_or_content(tokenizer, tmp_path, monkeypatch, name, content):
    (tmp_path / name).write_bytes(content)
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BufferedReader(io.BytesIO(content))))
    counts = count_tokens(["-" if name == "-" else tmp_path / name], tokenizer)
    assert (counts == counts_of(tokenizer, *(completion + EOT for completion in COMPLETIONS))).all()


@pytest.mark.parametrize("contents, text", [
    (["a\r\nb\r\n"], "a\r\nb\r\n"), (["\ufeffone"], "one"), (["{a}"], "{a}"), (['"a": 1'], '"a": 1'),
    ([f"one{EOT}{EOT} two"], f"one{EOT}{EOT} two"), (["one", " two"], f"one{EOT} two"),
    ([f"one{EOT}", " two"], f"one{EOT} two"),
    (["one", '{"text": " two"}\n{"text": " three"}', " four"], f"one{EOT} two{EOT} three{EOT} four"),
])
def test_text_is_read_as_it_is_and_files_are_kept_apart(tmp_path, monkeypatch, contents, text):
    """Line ends stay, a byte order mark goes. An end of text is between files and after each document."""
    paths = [tmp_path / str(i) for i in range(len(contents))]
    for path, content in zip(paths, contents):
        path.write_bytes(content.encode())
    monkeypatch.setattr(count, "PIECE", 5)  # an end of text is read in several pieces
    is_pairs, items = count.read_files(paths)
    assert not is_pairs and "".join(items) == text


@pytest.mark.parametrize("name, content", {
    "latin1": b"caf\xe9", "bom": "windows".encode("utf-16"), "utf16": "windows".encode("utf-16-le"),
    "utf16.jsonl": PAIRS.decode().encode("utf-16-be"), "nul": b"one\0two", "empty": b"",
    "white": b" \n\t\xc2\xa0", "only_bom": b"\xef\xbb\xbf", "empty.gz": gzip.compress(b""),
    "empty.jsonl": b"\n\n", "no_text.jsonl": b'{"text": " "}', "mixed.jsonl": PAIRS + b'{"text": "a"}',
    "shorter.gz": gzip.compress(b"one")[:5], "cut.gz": gzip.compress(b"one" * 9)[:-9],
    "damaged.gz": gzip.compress(b"two", 0).replace(b"two", b"too"),
    "bad.gz": gzip.compress(b"")[:10] + b"\xff" * 9, "array": b'[{"text": "a"}]', "pretty": b'{\n"text": ""}',
    "a.json": b'{"text": "a"}', "a.csv": b"a,b", "a.tsv": b"a", "a.json.gz": b"{}", "a.parquet": b"PAR1",
    "missing": None, ".": None,
}.items(), ids=lambda value: value if isinstance(value, str) else "")
def test_a_bad_file_is_named_and_nothing_written(run, one_line, tiny, tmp_path, name, content):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    before = [*tmp_path.iterdir()]
    one_line(run("count.py", name, "--tokenizer", tiny, cwd=tmp_path, ok=False), f" {name}")
    assert [*tmp_path.iterdir()] == before


@pytest.mark.parametrize("line", [
    "{", "[1]", "3", '"text"', "plain text", '{"prompt": "a"}', '{"prompt": "a", "completion": 3}',
    '{"text": null}', '{"instruction": "a", "output": "b"}', '{"messages": [{"role": "user"}]}',
    '{"prompt": "a", "completion": "\\ud800"}', '{"text": "\\udc00"}', "[" * 100_000,
])
def test_a_malformed_line_is_named_by_its_number(tmp_path, tokenizer, line):
    for before in b"", 99 * PAIRS:
        (tmp_path / "a.jsonl").write_bytes(before + line.encode() + b"\n" + PAIRS)
        with pytest.raises(ValueError, match=rf"a.jsonl line {before.count(10) + 1} .{{,500}}\Z"):
            count_tokens([tmp_path / "a.jsonl"], tokenizer)


# --- what to train on, and what is held out ---


@pytest.fixture(scope="session")
def characters():
    """A tokenizer with a token, 256 + i, for each of 20,000 characters: a text of them has none twice."""
    ranks = {bytes([i]): i for i in range(256)} | {chr(0x4E00 + i).encode(): 256 + i for i in range(20_000)}
    return tiktoken.Encoding("characters", pat_str=".", mergeable_ranks=ranks, special_tokens={EOT: 20256})


def all_of(sequences):
    """x and y of each sequence once, in order."""
    return sequences[range(len(sequences))]


def targets(sequences):
    _, y = all_of(sequences)
    return y[y != -100]


@pytest.mark.parametrize("n", [500, 1234, 20_000])
def test_held_out_text_is_never_trained_on(characters, tmp_path, n):
    (tmp_path / "a.txt").write_text("".join(chr(0x4E00 + i) for i in range(n)), encoding="utf-8")
    corpus = load_corpus([tmp_path / "a.txt"], characters, 16)
    trained = np.unique(all_of(corpus.training))
    x, y = all_of(corpus.held_out)
    assert x.shape == y.shape == (len(x), 16) and (y == x + 1).all()
    assert len(np.unique(y)) == y.size > 0.06 * n  # each held-out target once
    assert sorted([*trained, *np.unique((x, y))]) == list(range(256, 256 + n))  # nothing is lost or in both
    assert np.nonzero(corpus.freq)[0].tolist() == trained.tolist() and corpus.freq.max() == 1
    assert count_tokens([tmp_path / "a.txt"], characters).sum() == n
    assert not np.isin(trained, (x, y)).any()
    # The example is a piece of the held-out text, in two parts.
    assert np.isin(sum(corpus.example, []), (x, y)).all() and (np.diff(sum(corpus.example, [])) == 1).all()


def test_nine_pairs_are_too_few_to_hold_out_a_tenth(tmp_path, tokenizer):
    with pytest.raises(ValueError, match="nine"):
        load_corpus(write_pairs(tmp_path / "nine", [(f"Say {i}:", f" {i}") for i in range(9)]), tokenizer, 32)


def test_pairs_carry_loss_on_completions_only(characters, tmp_path):
    """Every tenth is held out. The characters of each pair are in no other."""
    texts = ["".join(chr(0x4E00 + 5 * i + j) for j in range(5)) for i in range(200)]
    rows = [(text[:2], text[2:]) for text in texts]
    corpus = load_corpus(write_pairs(tmp_path / "a.jsonl", rows), characters, 16)
    tokens = np.column_stack((256 + np.arange(1000).reshape(200, 5), [20256] * 200))  # ends with end of text
    loss = np.where(np.arange(6) < 2, -100, tokens)
    held_out = np.arange(200) % 10 == 9
    for part, sequences in (~held_out, corpus.training), (held_out, corpus.held_out):
        # Two pairs of 6 tokens fit into 17.
        expected = tokens[part].reshape(-1, 12), loss[part].reshape(-1, 12)[:, 1:]
        for found, wanted, end in zip(all_of(sequences), expected, (0, -100)):
            assert (found == np.pad(wanted, ((0, 0), (0, 16 - wanted.shape[1])), constant_values=end)).all()
    assert [*map(characters.decode, corpus.example)] == [*rows[9]]
    assert (corpus.freq == np.bincount(tokens[~held_out, 2:].flatten(), minlength=20257)).all()
    counts = count_tokens([tmp_path / "a.jsonl"], characters)
    assert (counts == np.bincount(tokens[:, 2:].flatten(), minlength=20257)).all()


@pytest.mark.parametrize("n", [1, 9, 43])
@pytest.mark.parametrize("prompt", ["", "Question {}:"])
def test_every_tenth_prompt_is_held_out_or_of_fewer_than_ten_every_tenth_pair(tmp_path, tokenizer, n, prompt):
    rows = [(prompt.format(i % n), f" Number {i}." if i % 3 else "") for i in range(120)]
    corpus = load_corpus(write_pairs(tmp_path / "a.jsonl", rows), tokenizer, 32)
    held_out = [c + EOT for i, (_, c) in enumerate(rows) if (i % n if prompt and n > 9 else i) % 10 == 9]
    assert tokenizer.decode(targets(corpus.held_out)) == "".join(held_out)
    assert tokenizer.decode(all_of(corpus.training)[0][0]).startswith((rows[0][0] or EOT) + EOT)


@pytest.mark.parametrize("prompt, completion", [("one " * 80, " yes."), ("", " a" * 50), ("A", " a" * 50)])
def test_a_long_pair_loses_its_start_and_then_its_end(tmp_path, tokenizer, prompt, completion):
    corpus = load_corpus(write_pairs(tmp_path / "a.jsonl", [(prompt, completion)] * 20), tokenizer, 16)
    completion = tokens_of(tokenizer, completion + EOT)[:16]
    prompt = tokens_of(tokenizer, prompt or EOT)[-(17 - len(completion)) :]
    for x, y in zip(*(rows.tolist() for rows in all_of(corpus.training))):
        assert x[: len(prompt)] == prompt and y[len(prompt) - 1 :][: len(completion)] == completion
    assert targets(corpus.held_out).tolist() == 2 * completion and corpus.freq.sum() == 18 * len(completion)
    assert "--block_size 16" in corpus.description


# --- counts, and the command line ---


def test_counts_are_scaled_and_added(tmp_path):
    np.save(tmp_path / "a.npy", np.array([65_535, 1], np.uint16))  # 16 bits cannot hold the sum
    np.save(tmp_path / "b.npy", np.full(2, 10, np.float16))
    a, b = f"{tmp_path}/a.npy", f"{tmp_path}/b.npy"
    assert load_counts([a, a], 2).tolist() == [131_070, 2]
    assert load_counts([f"{a}:0.5", b, f"{b}:1e6"], 2).tolist() == [10_032_777.5, 10_000_010.5]


@pytest.mark.parametrize("counts, scale", [
    *((np.array(counts), "") for counts in ([1] * 5, [[1, 1]] * 2, 4, [1, 1, 1, np.nan], [1, 1, 1, np.inf])),
    *((np.array(counts), "") for counts in ([1, -1, 1, 1], [0] * 4, ["a"] * 4, [1j] * 4)),
    *((damaged, "") for damaged in (b"", b"text", b"PK\x03\x04")),
    *((np.arange(4), scale) for scale in (":-1", ":0", ":1e400", ":nan", ":1.2.3", ":x")),
])
def test_a_file_or_scale_that_makes_no_counts_is_refused_by_name(tmp_path, counts, scale):
    path = tmp_path / "a.npy"
    path.write_bytes(counts) if isinstance(counts, bytes) else np.save(path, counts)
    with pytest.raises((ValueError, OSError), match="a.npy"):
        load_counts([f"{path}{scale}"], 4)


def test_bands_are_half_of_the_text_its_last_tenth_and_the_rest():
    counts = np.array([5, 0, 60, 4, 25, 1, 5])
    #                  r  r   f  r   m  r  m    of 100: 60 | 25 5 | 5 4 1, and what was never counted
    assert "".join(count.BANDS[i][0] for i in count.frequency_bands(counts)) == "mrfrmrr"


def test_from_the_command_line(run, tokenizer, tiny, tmp_path):
    (tmp_path / "a.txt").write_bytes(b"one two\r\n")
    run("count.py", "a.txt", "-", "--tokenizer", tiny, "-o", "c.npy", cwd=tmp_path, input="two three")
    assert (np.load(tmp_path / "c.npy") == counts_of(tokenizer, f"one two\r\n{EOT}two three")).all()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.txt", "c.npy"]
