"""count.py's Corpus: what is trained on, what is held out, what carries loss, and the cache of tokens."""

import gzip
import json

import numpy as np
import pytest

import count
from count import Corpus, count_tokens, open_corpus

EOT = "<|endoftext|>"


def rows_of(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def write_rows(path, rows):
    lines = (json.dumps({"prompt": prompt, "completion": completion}) + "\n" for prompt, completion in rows)
    path.write_text("".join(lines), encoding="utf-8")


def held_out_targets(corpus):
    _, y = corpus.sequences(corpus.windows)
    return y[y != -100]


# --- text ---


@pytest.mark.parametrize("n", [500, 1234, 20_000])
def test_held_out_text_is_never_trained_on(n):
    corpus = Corpus.of_text("text", np.arange(n), 16)
    trained = np.unique(corpus.train_starts(np.arange(corpus.n_train_starts))[:, None] + np.arange(17))
    x, y = corpus.sequences(corpus.windows)
    held_out = np.unique((x, y))
    assert not np.intersect1d(trained, held_out).size
    assert 0.06 < len(held_out) / n < 0.11 and len(trained) > 0.8 * n
    assert 0 <= corpus.train_counts(n).sum() - len(trained) <= 16  # a last piece shorter than a sequence
    assert len(np.unique(y)) == y.size  # each held-out target once


def test_a_batch_is_drawn_from_the_training_split_alone():
    corpus = Corpus.of_text("text", np.arange(2000), 16)
    x, y = corpus.batch(np.random.default_rng(0), 20_000)
    assert x.shape == y.shape == (20_000, 16) and (y == x + 1).all()
    assert set(x[:, 0].tolist()) == set(corpus.train_starts(np.arange(corpus.n_train_starts)).tolist())
    assert not np.intersect1d(np.unique(x), np.unique(corpus.sequences(corpus.windows)[1])).size


def test_a_text_too_short_for_its_blocks_is_refused(text, tokenizer):
    (text / "short.txt").write_text("too short", encoding="utf-8")
    with pytest.raises(ValueError, match="short.txt.*--block_size"):
        open_corpus(text / "short.txt", tokenizer, 32, text / "cache")


def test_without_a_file_it_is_the_reference_that_comes_with_python(tokenizer, tmp_path):
    corpus = open_corpus(None, tokenizer, 32, tmp_path)
    assert "Python" in corpus.description and len(corpus.tokens) > 50_000


# --- pairs ---


def test_pairs_carry_loss_on_completions_only(pairs, tokenizer):
    corpus = open_corpus(pairs / "pairs.jsonl", tokenizer, 64, pairs / "cache")
    rows = rows_of(pairs / "pairs.jsonl")

    def targets(row):
        return tokenizer.encode_ordinary(row["completion"]) + [tokenizer.eot_token]

    training, held_out = [row for i, row in enumerate(rows) if i % 10 != 9], rows[9::10]
    assert (corpus.train_counts(4096) == np.bincount(sum(map(targets, training), []), minlength=4096)).all()
    assert corpus.n_train_starts == 90
    begins = corpus.train_starts(np.arange(90))
    x, y = corpus.sequences(np.stack((begins, begins + 65), axis=1))
    assert x.shape == y.shape == (90, 64)
    for inputs, found, row in zip(x.tolist(), y.tolist(), training):
        prompt = tokenizer.encode_ordinary(row["prompt"])
        assert inputs[: len(prompt)] == prompt  # each starts where a pair does
        assert found[len(prompt) - 1 :][: len(targets(row))] == targets(row)
        assert set(found[: len(prompt) - 1]) <= {-100}
    # Every held-out completion once, in order.
    assert held_out_targets(corpus).tolist() == sum(map(targets, held_out), [])
    opening = tuple(tokenizer.encode_ordinary(held_out[1][key]) for key in ("prompt", "completion"))
    assert tuple(corpus.openings(3)[1]) == opening
    assert "100 pairs: 90 to train on, 10 held out" in corpus.description
    assert f"{len(held_out_targets(corpus)):,} tokens" in corpus.description


def test_no_batch_of_pairs_reaches_into_the_held_out_ones(pairs, tokenizer):
    corpus = open_corpus(pairs / "pairs.jsonl", tokenizer, 64, pairs / "cache")
    _, y = corpus.batch(np.random.default_rng(0), 500)
    known = {str(i * i) for i in range(100) if i % 10 != 9}
    for row in y.tolist():
        for answer in tokenizer.decode([t for t in row if t != -100]).split(" the answer is ")[1:]:
            number = answer.split(".")[0]
            assert number in known or any(k.startswith(number) for k in known)  # the last may be cut


def test_count_py_counts_what_carries_loss(pairs, tokenizer):
    corpus = open_corpus(pairs / "pairs.jsonl", tokenizer, 64, pairs / "cache")
    all_targets = corpus.train_counts(4096) + np.bincount(held_out_targets(corpus), minlength=4096)
    assert (count_tokens([pairs / "pairs.jsonl"], tokenizer) == all_targets).all()


def test_all_completions_of_a_prompt_are_held_out_together(tmp_path, tokenizer):
    rows = [(f"Say {i % 40}.", f" Number {i}.") for i in range(120)]  # three for each, far apart
    write_rows(tmp_path / "a.jsonl", rows)
    corpus = open_corpus(tmp_path / "a.jsonl", tokenizer, 32, tmp_path)
    expected = "".join(c + EOT for i, (_, c) in enumerate(rows) if i % 40 % 10 == 9)
    assert tokenizer.decode(held_out_targets(corpus)) == expected
    assert "108 to train on, 12 held out" in corpus.description
    # One opening for a prompt, with one of its completions.
    openings = [(tokenizer.decode(prompt), tokenizer.decode(text)) for prompt, text in corpus.openings(32)]
    assert openings == [(f"Say {i}.", f" Number {i}.") for i in (9, 19, 29, 39)]


def test_a_prompt_longer_than_the_block_loses_its_beginning(tmp_path, tokenizer):
    long, short = "one two three four " * 20, "Say it:"
    prompts = [(long if i % 2 else short) + f" {i}:" for i in range(20)]
    write_rows(tmp_path / "a.jsonl", [(prompt, " yes, that is it.") for prompt in prompts])
    corpus = open_corpus(tmp_path / "a.jsonl", tokenizer, 16, tmp_path)
    completion = tokenizer.encode_ordinary(" yes, that is it.") + [tokenizer.eot_token]
    begins = corpus.train_starts(np.arange(18))
    x, y = corpus.sequences(np.stack((begins, begins + 17), axis=1))
    for i, (inputs, targets) in enumerate(zip(x.tolist(), y.tolist())):
        assert [t for t in targets if t != -100][: len(completion)] == completion
        prompt = tokenizer.encode_ordinary(prompts[i if i < 9 else i + 1])
        kept = prompt[-(17 - len(completion)) :]
        assert inputs[: len(kept)] == kept
    assert corpus.train_counts(4096).sum() == 18 * len(completion)
    assert "10 longer than --block_size 16 lose the start" in corpus.description


def test_what_no_sequence_can_contain_is_not_counted(tmp_path, tokenizer):
    write_rows(tmp_path / "a.jsonl", [(f"Say {i}:", " word" * 50) for i in range(20)])
    corpus = open_corpus(tmp_path / "a.jsonl", tokenizer, 16, tmp_path)
    assert corpus.train_counts(4096).sum() == 18 * 16 and len(held_out_targets(corpus)) == 2 * 16
    assert corpus.train_counts(4096)[tokenizer.eot_token] == 0  # none of them ends
    assert "20 of them the end of the completion" in corpus.description


def test_an_empty_prompt_and_an_empty_completion_have_a_target(tmp_path, tokenizer):
    write_rows(tmp_path / "a.jsonl", [("", " text"), *((f"Say {i}:", "") for i in range(19))])
    corpus = open_corpus(tmp_path / "a.jsonl", tokenizer, 16, tmp_path)
    assert corpus.train_counts(4096)[tokenizer.eot_token] == 18
    assert tokenizer.decode(corpus.tokens[:4]) == f"{EOT} text{EOT}"


def test_gzipped_pairs_are_pairs(pairs, tokenizer):
    (pairs / "b.jsonl.gz").write_bytes(gzip.compress((pairs / "pairs.jsonl").read_bytes()))
    plain = open_corpus(pairs / "pairs.jsonl", tokenizer, 64, pairs / "cache")
    zipped = open_corpus(pairs / "b.jsonl.gz", tokenizer, 64, pairs / "cache")
    assert plain.fingerprint() == zipped.fingerprint() and zipped.carries_loss is not None


def test_json_is_refused_with_a_word_about_jsonl(pairs, tokenizer):
    (pairs / "a.json").write_text(json.dumps(rows_of(pairs / "pairs.jsonl")), encoding="utf-8")
    with pytest.raises(ValueError, match=r"a\.json.*\.jsonl"):
        open_corpus(pairs / "a.json", tokenizer, 64, pairs / "cache")


def test_fewer_prompts_than_it_takes_to_hold_one_out_are_refused(tmp_path, tokenizer):
    write_rows(tmp_path / "a.jsonl", [(f"Say {i % 9}:", f" {i}") for i in range(100)])
    with pytest.raises(ValueError, match="a.jsonl has 9 different prompts"):
        open_corpus(tmp_path / "a.jsonl", tokenizer, 64, tmp_path / "cache")
    assert not any((tmp_path / "cache").iterdir())


@pytest.mark.parametrize("line", ["{", "[1]", '{"prompt": "a"}', '{"prompt": "a", "completion": 3}', "3"])
def test_a_malformed_line_is_named(pairs, tokenizer, line):
    with open(pairs / "pairs.jsonl", "a", encoding="utf-8") as file:
        file.write(line + "\n")
    with pytest.raises(ValueError, match="pairs.jsonl line 101 "):
        open_corpus(pairs / "pairs.jsonl", tokenizer, 64, pairs / "cache")


def test_the_fingerprint_is_of_what_is_trained_on(tmp_path, tokenizer):
    rows = [(f"Say {i}:", f" number {i}") for i in range(20)]
    write_rows(tmp_path / "a.jsonl", rows)
    write_rows(tmp_path / "same.jsonl", rows)
    write_rows(tmp_path / "content.jsonl", [*rows[:-1], ("Say 19:", " number 18")])
    # The same tokens, other targets.
    write_rows(tmp_path / "border.jsonl", [(prompt + text[:7], text[7:]) for prompt, text in rows])
    digests = [open_corpus(tmp_path / f"{name}.jsonl", tokenizer, 32, tmp_path / "cache").fingerprint()
               for name in ("a", "same", "content", "border")]
    assert digests[0] == digests[1] and len(set(digests)) == 3


# --- the token cache ---


def test_tokenized_once_and_never_stale(text, tokenizer, monkeypatch):
    path, cache = text / "text.txt", text / "cache"
    first = open_corpus(path, tokenizer, 32, cache)
    assert np.array_equal(first.tokens, tokenizer.encode_ordinary(path.read_text(encoding="utf-8")))
    with monkeypatch.context() as patch:
        patch.setattr(count, "encode", None)
        assert open_corpus(path, tokenizer, 16, cache).tokens.tolist() == first.tokens.tolist()
    with open(path, "a", encoding="utf-8") as file:
        file.write("more. ")
    assert len(open_corpus(path, tokenizer, 32, cache).tokens) > len(first.tokens)


def test_pairs_are_cut_anew_for_another_block_size(pairs, tokenizer):
    corpora = [open_corpus(pairs / "pairs.jsonl", tokenizer, size, pairs / "cache") for size in (8, 64)]
    assert corpora[0].train_counts(4096).sum() < corpora[1].train_counts(4096).sum()


@pytest.mark.parametrize("name", ["text.txt", "pairs.jsonl"])
def test_two_that_tokenize_the_same_at_once_get_the_same(text, pairs, tokenizer, monkeypatch, name):
    read_text, others = count.read_text, []

    def read_meanwhile(path):
        """The file's text, all of which is tokenized by another in the middle of this."""
        whole = "".join(read_text(path))
        yield whole[: len(whole) // 2]
        with monkeypatch.context() as patch:
            patch.setattr(count, "read_text", read_text)
            others.append(open_corpus(text / name, tokenizer, 32, text / "cache"))
        yield whole[len(whole) // 2 :]

    monkeypatch.setattr(count, "read_text", read_meanwhile)
    mine = open_corpus(text / name, tokenizer, 32, text / "cache")
    monkeypatch.undo()
    alone = open_corpus(text / name, tokenizer, 32, text / "alone")
    assert mine.fingerprint() == others[0].fingerprint() == alone.fingerprint()
    assert len(list((text / "cache").iterdir())) == 1


def test_a_text_that_breaks_off_leaves_no_cache(text, tokenizer):
    (text / "text.txt").write_bytes((text / "text.txt").read_bytes() + b"caf\xe9")
    with pytest.raises(ValueError, match="UTF-8"):
        open_corpus(text / "text.txt", tokenizer, 32, text / "cache")
    assert not any((text / "cache").iterdir())
