"""
Count how often each token occurs in text: the freq(t) of Power-Law Decay Loss.

    python count.py TEXT [TEXT ...] [-o counts.npy] [--tokenizer gpt2|FOLDER]

This file is all that happens to text before a model sees it: the tokenizer, reading, the sequences to train
on and to evaluate on, counts. At its end is what the scripts share on the command line. Start reading at
Sequences: all before it turns files into tokens.
"""

import argparse
import gzip
import hashlib
import io
import itertools
import json
import re
import sys
import zlib
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import tiktoken
from tiktoken_ext.openai_public import r50k_pat_str  # how GPT-2 splits text before it merges bytes

from model import checkpoint_folder, first_line, write_safely

END_OF_TEXT = "<|endoftext|>"
PIECE = 1 << 18  # characters to read and tokenize at a time


# --- the tokenizer ---


def load_tokenizer(name_or_folder):
    """The tiktoken.Encoding of a checkpoint folder, of a released model ("gpt2") or of OWNER/NAME on the hub.

    Reads tokenizer.json, or else vocab.json with merges.txt. Added tokens become tiktoken's special tokens.
    Raises OSError if the files cannot be had, ValueError if they are not a tokenizer like GPT-2's.
    """
    folder = checkpoint_folder(name_or_folder, weights=False)
    try:
        vocab, merges, added = _read_tokenizer(folder)
        if END_OF_TEXT in vocab:  # vocab.json lists it among the ordinary tokens
            added.setdefault(END_OF_TEXT, vocab[END_OF_TEXT])
        # GPT-2's files store printable bytes as themselves and the others as chr(256 + i).
        printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
        others = [byte for byte in range(256) if byte not in printable]
        byte_of = {chr(b): b for b in printable} | {chr(256 + i): b for i, b in enumerate(others)}
        merged = [left + right for left, right in merges]
        ranks = {bytes(byte_of[c] for c in token): vocab[token] for token in (*byte_of, *merged)}
        if merged != sorted(merged, key=vocab.get):
            raise ValueError("its ids are not in the order of its merges")  # tiktoken merges by id
        used = {*ranks.values(), *added.values()}
        if END_OF_TEXT not in added or used != {*range(len(vocab | added))}:
            raise ValueError(f"it lacks {END_OF_TEXT}, or its ids are not 0, 1, 2, ... with a token each")
        return tiktoken.Encoding(str(folder), pat_str=r50k_pat_str, mergeable_ranks=ranks,
                                 special_tokens=added)
    except Exception as error:  # a stranger's file can hold anything
        reason = f"{error} is missing" if isinstance(error, KeyError) else first_line(error)
        raise ValueError(f"{folder}: only tokenizers like GPT-2's can be used: {reason}") from None


def _read_tokenizer(folder):
    """The vocabulary, the merges and the added tokens in a checkpoint folder's files."""
    def read_json(name):
        return json.loads((folder / name).read_bytes()) if (folder / name).exists() else {}

    settings, content = read_json("tokenizer_config.json"), read_json("tokenizer.json")
    adds_space = settings.get("add_prefix_space", False)
    if content:
        bpe, splitter = content["model"], content["pre_tokenizer"] or {}
        vocab, entries = bpe["vocab"], content["added_tokens"]
        merges = [merge.split(" ") if isinstance(merge, str) else merge for merge in bpe["merges"]]
        adds_space = adds_space or splitter.get("add_prefix_space", True)
        if (content.get("normalizer") or bpe.get("type", "BPE") != "BPE"
                or splitter.get("type") != "ByteLevel" or not splitter.get("use_regex", True)):
            raise ValueError("its model, normalizer or pre_tokenizer is not GPT-2's")
    else:
        vocab = json.loads((folder / "vocab.json").read_bytes())
        lines = (folder / "merges.txt").read_text(encoding="utf-8").split("\n")
        merges = [line.split(" ") for line in lines if line and not line.startswith("#version")]
        entries = [{"content": token, "id": i} for token, i in read_json("added_tokens.json").items()]
        entries += [{"id": int(i)} | entry for i, entry in settings.get("added_tokens_decoder", {}).items()]
    if adds_space:
        raise ValueError("it puts a space before each text (add_prefix_space)")
    if any(entry.get(flag) for entry in entries for flag in ("lstrip", "rstrip", "single_word")):
        raise ValueError("it has added tokens with lstrip, rstrip or single_word")
    return vocab, merges, {entry["content"]: entry["id"] for entry in entries}


def encode(text, tokenizer):
    """The tokens of a string: (N,) uint32. An added token stands for itself wherever it is written."""
    added = tokenizer._special_tokens  # {token: id}
    longest_first = sorted(added, key=len, reverse=True)  # as Hugging Face
    parts = re.split(f"({'|'.join(map(re.escape, longest_first))})", text)
    try:
        return np.concatenate([np.array([added[part]], np.uint32) if part in added
                               else tokenizer.encode_to_numpy(part, disallowed_special=()) for part in parts])
    except ValueError:  # from its regular expression, or UnicodeEncodeError
        raise ValueError("tiktoken cannot split this text: it has too much white space in a row, or lone "
                         "surrogates") from None


def encode_stream(texts, tokenizer):
    """Tokenize a stream of strings. Yields arrays; together they are the tokens of the whole text."""
    pieces = _pieces(texts, tokenizer)
    with ThreadPoolExecutor() as pool:  # tiktoken releases the GIL
        while some := list(itertools.islice(pieces, 64)):  # not all at once, to save memory
            yield from pool.map(lambda piece: encode(piece, tokenizer), some)


# A token may begin with a single space or line end, but never reaches across one: cut text before the last.
UP_TO_CUT = re.compile(r"(?s).*\S(?=[ \n]\S)")


def _pieces(texts, tokenizer):
    """Regroup a stream of strings so that no token spans two of them."""
    can_cut = not any(re.search(r"\s", token) for token in tokenizer.special_tokens_set)
    uncut = []
    for text in texts:
        if can_cut and (cut := UP_TO_CUT.match(text)):
            yield "".join(uncut) + cut[0]
            uncut, text = [], text[cut.end() :]
        uncut.append(text)
    yield "".join(uncut)


# --- reading ---

JSON_LINES = re.compile(r"\.(jsonl|ndjson|jl)\b", re.IGNORECASE)
BEGINS_LIKE_JSON = re.compile(rb'(\xef\xbb\xbf)?\s*\[?\s*\{\s*"')
OTHER_FORMATS = re.compile(r"\.(json|csv|tsv|parquet|arrow)(\.gz)?$", re.IGNORECASE)
FORMAT = '{"prompt": "...", "completion": "..."} or {"text": "..."}'


def read_files(paths):
    """Read text or pairs. Returns (is_pairs, items). Items are strings of text, or (prompt, completion).

    paths: UTF-8 text or JSON Lines, gzipped or not; "-" is standard input. There is an end of text between
    two files and after each JSON document. Raises OSError or ValueError if something cannot be read.
    """
    items = _items_of_files(paths)
    first = next(items)
    return isinstance(first, tuple), itertools.chain([first], items)


def _items_of_files(paths):
    kind, tail = None, END_OF_TEXT  # the type of all items; the last characters of the text so far
    for path in paths:
        if tail != END_OF_TEXT:  # between two files it must be
            yield (tail := END_OF_TEXT)
        has_text = False
        try:
            for item in _items_of_file(path):
                kind = kind or type(item)
                if type(item) is not kind:
                    raise ValueError(f"{path}: give either pairs or text, not both")
                if kind is str:
                    tail = (tail + item)[-len(END_OF_TEXT) :]
                has_text |= kind is tuple or item.removesuffix(END_OF_TEXT).strip() != ""
                yield item
        except UnicodeDecodeError:
            raise ValueError(f"{path} is not UTF-8 text: convert it to UTF-8") from None
        except (EOFError, zlib.error, gzip.BadGzipFile) as error:
            raise ValueError(f"{path} is damaged: {error}") from None
        if not has_text:
            raise ValueError(f"{path} has no text in it")


def _items_of_file(path):
    if OTHER_FORMATS.search(str(path)):
        raise ValueError(f"{path}: convert it to .jsonl, with {FORMAT} on each line")
    file = sys.stdin.buffer if path == "-" else open(path, "rb")
    if file.peek(2)[:2] == b"\x1f\x8b":
        file = gzip.open(file)
    is_json = JSON_LINES.search(Path(path).name) or BEGINS_LIKE_JSON.match(file.peek(1000))
    with io.TextIOWrapper(file, encoding="utf-8-sig", newline="\n") as text:
        if is_json:
            yield from (_item_of_line(path, i, line) for i, line in enumerate(text, 1) if line.strip())
        else:
            while piece := text.read(PIECE):
                if "\0" in piece:
                    raise ValueError(f"{path} has NUL characters, as UTF-16 has: convert it to UTF-8")
                yield piece


def _item_of_line(path, number, line):
    """A line of JSON Lines: (prompt, completion), or a document. It ends with an end of text."""
    try:
        entry = json.loads(line)
        is_pair = "prompt" in entry
        prompt, text = (entry["prompt"], entry["completion"]) if is_pair else ("", entry["text"])
        "".join((prompt, text)).encode()  # fails unless both are strings of Unicode
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        reason = f"{type(error).__name__}: {error} in {line.strip()[:60]!r}"
        raise ValueError(f"{path} line {number} must be {FORMAT}; {reason}") from None
    text = text.removesuffix(END_OF_TEXT) + END_OF_TEXT
    return (prompt, text) if is_pair else text


# --- what to train on, and what to evaluate on ---


@dataclass
class Sequences:
    """Sequences of T + 1 tokens in one array of tokens. Each starts stride tokens after the one before."""

    tokens: np.ndarray  # (N,)
    carries_loss: np.ndarray  # (N,) bool: all of a text, only the completions of pairs
    T: int
    stride: int

    def __len__(self):
        return (len(self.tokens) - self.T - 1) // self.stride + 1

    def __getitem__(self, indices):
        """Inputs and targets of n sequences: (2, n, T) int64. Targets are -100 where there is no loss."""
        at = np.asarray(indices)[:, None] * self.stride + np.arange(self.T + 1)  # (n, T + 1)
        tokens = self.tokens[at].astype(np.int64)
        return np.stack((tokens[:, :-1], np.where(self.carries_loss[at], tokens, -100)[:, 1:]))


@dataclass
class Corpus:
    """Text or pairs as tokens, split into a training part and a held-out tenth."""

    description: str
    training: Sequences
    held_out: Sequences  # its sequences do not overlap, so that each target is there once
    example: tuple  # the tokens of a held-out prompt, and of what its author wrote after it
    freq: np.ndarray = None  # (n_vocab,), freq(t) of Eq. 3: --counts, or how often t carries loss in training

    @cached_property
    def bands(self):
        """(V,) int64, the frequency band of each token."""
        return frequency_bands(self.freq)

    @cached_property
    def digest(self):
        """The SHA-256 of the data and the counts."""
        sha256 = hashlib.sha256()
        for part in self.training, self.held_out:
            sha256.update(part.tokens)
            sha256.update(np.ascontiguousarray(part.carries_loss))
        sha256.update(self.freq)
        return sha256.hexdigest()


def load_corpus(paths, tokenizer, block_size, counts=None):
    """The Corpus of files (see read_files), or without any, of the language reference inside every Python.

    counts: files for load_counts, in place of the counts of the training part. Raises OSError or ValueError
    for files that cannot be read, or are too short to hold out a tenth.
    """
    if paths:
        name = ", ".join(Path(path).name for path in paths)
        is_pairs, items = read_files(paths)
    else:
        from pydoc_data.topics import topics

        name, is_pairs, items = "the Python language reference", False, ["\n\n".join(topics.values())]
    make = _corpus_of_pairs if is_pairs else _corpus_of_text
    corpus = make(name, items, tokenizer, block_size)
    if counts:
        corpus.freq = load_counts(counts, tokenizer.n_vocab)
    else:
        counted = corpus.training.tokens[corpus.training.carries_loss]
        corpus.freq = np.bincount(counted, minlength=tokenizer.n_vocab)
    return corpus


def _corpus_of_text(name, texts, tokenizer, T):
    """Hold out every tenth stretch of T + 1 tokens. The last tenth might be unlike the rest."""
    dtype = np.min_scalar_type(tokenizer.n_vocab)  # uint16 for GPT-2's
    tokens = np.concatenate([piece.astype(dtype) for piece in encode_stream(texts, tokenizer)])
    n = len(tokens) // (10 * (T + 1))
    if n == 0:
        raise ValueError(f"{name} has {len(tokens):,} tokens, but to hold out a tenth --block_size {T} needs "
                         f"{10 * (T + 1):,}: lower it, or give more text")
    tens, rest = np.split(tokens, [n * 10 * (T + 1)])
    tens = tens.reshape(n, 10, T + 1)
    held_out = tens[:, 9].flatten()
    training = np.concatenate((tens[:, :9].flatten(), rest))  # with gaps, which a sequence may cross
    description = f"{name}: {len(training):,} tokens to train on, {n * T:,} held out"
    return Corpus(description,
                  Sequences(training, np.broadcast_to(True, len(training)), T, 1),  # one starts at each token
                  Sequences(held_out, np.broadcast_to(True, len(held_out)), T, T + 1),
                  example=(held_out[: T // 4].tolist(), held_out[T // 4 : T + 1].tolist()))


def _corpus_of_pairs(name, pairs, tokenizer, T):
    """Hold out every tenth distinct prompt with all its completions. With fewer than ten, every tenth pair.

    A pair that is too long loses the start of its prompt, then the end of its completion.
    """
    dtype = np.min_scalar_type(tokenizer.n_vocab)
    pairs_cut, n_too_long = [], 0
    numbers, number_of = [], {}  # numbers[i] is number_of[the prompt of pair i]: 0, 1, 2, ...
    for prompt, completion in pairs:
        prompt = prompt or END_OF_TEXT  # the first token of a completion needs one before it
        numbers.append(number_of.setdefault(prompt, len(number_of)))
        prompt, completion = encode(prompt, tokenizer), encode(completion, tokenizer)
        n_too_long += len(prompt) + len(completion) > T + 1
        prompt = prompt[-max(1, T + 1 - len(completion)) :]  # its end; at least one token
        pairs_cut.append((prompt.astype(dtype), completion[: T + 1 - len(prompt)].astype(dtype)))
    if len(number_of) < 10:
        numbers = range(len(pairs_cut))
    training = [pair for number, pair in zip(numbers, pairs_cut) if number % 10 < 9]
    held_out = [pair for number, pair in zip(numbers, pairs_cut) if number % 10 == 9]
    if not held_out:
        raise ValueError(f"{name} has {len(pairs_cut)} pairs: give at least ten, since a tenth is held out")

    description = f"{name}: {len(training):,} pairs to train on, {len(held_out):,} held out"
    if n_too_long:
        description += (f"; {n_too_long:,} are longer than --block_size {T}: they lose the start of the "
                        "prompt, then the end of the completion")
    prompt, completion = held_out[0]
    example = prompt.tolist(), [t for t in completion.tolist() if t != tokenizer.eot_token]
    return Corpus(description, _sequences_of_pairs(training, T), _sequences_of_pairs(held_out, T), example)


def _sequences_of_pairs(pairs, T):
    """Each sequence has as many whole pairs as fit, then zeros. So a pair sees those before it."""
    zeros = np.zeros(T + 1, pairs[0][0].dtype)
    parts, room = [], 0  # padding, prompt, completion, padding, ...; room is left in the last sequence
    for prompt, completion in pairs:
        length = len(prompt) + len(completion)
        padding, room = (room, T + 1) if length > room else (0, room)
        parts += zeros[:padding], prompt, completion
        room -= length
    parts.append(zeros[:room])
    carries_loss = np.repeat([False, False, True] * len(pairs) + [False], [len(part) for part in parts])
    return Sequences(np.concatenate(parts), carries_loss, T, T + 1)


# --- counts ---


def count_tokens(paths, tokenizer):
    """How often each token occurs in texts, or in the completions of pairs: (n_vocab,) int64.

    Raises OSError or ValueError for a file that cannot be read.
    """
    counts = np.zeros(tokenizer.n_vocab, np.int64)
    is_pairs, items = read_files(paths)
    if is_pairs:
        stream = (encode(completion, tokenizer) for _, completion in items)
    else:
        stream = encode_stream(items, tokenizer)
    for tokens in stream:
        np.add.at(counts, tokens, 1)
    return counts


def load_counts(files, n_vocab):
    """The sum of the counts in .npy files, each scaled if written as "general.npy:0.1": (n_vocab,).

    Raises OSError or ValueError for anything but n_vocab numbers that are finite and not negative.
    """
    total = np.zeros(n_vocab)
    for name in files:
        scaled = re.fullmatch(r"(.+):([\d.eE+-]+)", name)
        path, scale = scaled.groups() if scaled else (name, 1)
        try:
            with open(path, "rb") as file:
                counts = np.lib.format.read_array(file, allow_pickle=False).astype(float, casting="safe")
            scale = float(scale)
            valid = counts.ndim == 1 and np.isfinite(counts).all() and counts.min() >= 0 and counts.any()
            if not valid or not 0 < scale < float("inf"):
                raise ValueError
        except (ValueError, TypeError):  # it may be another kind of file
            raise ValueError(f"--counts {name} is not an array of counts: count.py writes one") from None
        if len(counts) != n_vocab:
            raise ValueError(f"--counts {path} has {len(counts):,} entries, but the model's tokenizer has "
                             f"{n_vocab:,} tokens: count again with count.py --tokenizer")
        total += scale * counts
    return total


BANDS = "frequent", "middle", "rare"


def frequency_bands(counts):
    """The band of each token, (V,) int64: frequent tokens make up half of the text, rare ones a tenth."""
    order = np.argsort(-counts, kind="stable")
    above = np.cumsum(counts[order]) - counts[order]  # (V,), the occurrences of all more frequent tokens
    band = np.empty(len(counts), np.int64)
    band[order] = np.digitize(above / counts.sum(), [0.5, 0.9])
    return band


# --- the command line ---


class ArgumentParser(argparse.ArgumentParser):
    """argparse that shows defaults and answers a wrong flag in one line."""

    def flag(self, name, default, help, type=str, **options):
        help += "" if default is None else " (default: %(default)s)"
        self.add_argument(f"--{name}", default=default, help=help, type=type, **options)

    def error(self, message):
        self.exit(2, f"{self.prog}: error: {message}; --help lists the flags\n")


def at_least(minimum, kind=int, below=float("inf")):
    """A type for argparse: a number in [minimum, below)."""

    def parse(text):
        value = kind(text)
        if not minimum <= value < below:
            limit = "finite" if below == float("inf") else f"below {below}"
            raise argparse.ArgumentTypeError(f"must be at least {minimum} and {limit}, not {text}")
        return value

    parse.__name__ = kind.__name__  # argparse shows it
    return parse


def run_script(main, to_save_memory):
    """Run a script's main. A user's mistake ends in one line on stderr, with exit status 1."""
    for stream in sys.stdout, sys.stderr:
        stream.reconfigure(encoding="utf-8", errors="backslashreplace")  # on Windows, too
    try:
        main()
    except (OSError, ValueError) as error:
        if isinstance(error, OSError) and error.filename:
            error = f"{error.filename}: {error.strerror}"
        sys.exit(f"{Path(sys.argv[0]).name}: error: {error}")
    except (RuntimeError, MemoryError) as error:
        if isinstance(error, RuntimeError) and "tried to allocate" not in str(error).lower():
            raise
        sys.exit(f"{Path(sys.argv[0]).name}: error: out of memory: {to_save_memory}")
    except KeyboardInterrupt:
        sys.excepthook = lambda *error: None  # no traceback
        raise  # so that a shell loop stops, too


def main():
    parser = ArgumentParser(description="Count the tokens of texts, or of the completions of pairs.")
    parser.add_argument("text", nargs="+", help="UTF-8 text or JSON Lines, .gz or not; - is standard input")
    parser.add_argument("-o", "--out", default="counts.npy", help="a .npy file (default: %(default)s)")
    parser.flag("tokenizer", "gpt2", "a checkpoint folder, a released GPT-2, or OWNER/NAME on the hub")
    args = parser.parse_args()
    if not args.out.endswith(".npy"):
        parser.error(f"--out {args.out} must end in .npy")
    counts = count_tokens(args.text, load_tokenizer(args.tokenizer))
    array = io.BytesIO()  # np.save to a file does not always notice that the disk is full
    np.save(array, counts)
    write_safely(Path(args.out), lambda path: path.write_bytes(array.getvalue()))
    total, seen, top = counts.sum(), np.count_nonzero(counts), np.sort(counts)[-100:].sum()
    print(f"{total:,} tokens, {seen:,} distinct; the 100 most frequent are {top / total:.1%} of the text\n"
          f"{len(counts) - seen:,} of the {len(counts):,} in the vocabulary never occur\nwrote {args.out}")


if __name__ == "__main__":
    run_script(main, "split the text into several files")
