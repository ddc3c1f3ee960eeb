"""
Count how often each token of a tokenizer occurs in text: the freq(t) of Power-Law Decay Loss.

    python count.py TEXT [TEXT ...] [-o counts.npy] [--tokenizer gpt2|FOLDER]

Writes an int64 array of shape (n_vocab,). A text is UTF-8, gzipped (.gz) or not; - is standard input. Of
pairs (.jsonl) the completions count, with an end of text each: what carries loss in training.

Here is all that is known of text before a model sees it: tokenizer, reading, counts, frequency bands, and the
Corpus that train.py draws batches from. It trains no tokenizer, and knows neither model nor loss.
"""

import argparse
import codecs
import contextlib
import gzip
import hashlib
import json
import os
import re
import shutil
import signal
import sys
import time
import zlib
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tiktoken
from tiktoken_ext.openai_public import r50k_pat_str  # how GPT-2 splits text, before it merges bytes

END_OF_TEXT = "<|endoftext|>"
TOKENIZER_FILES = ("vocab.json", "merges.txt", "tokenizer.json", "tokenizer_config.json")
RELEASED = "distilgpt2|gpt2(-medium|-large|-xl)?"
READ = 1 << 20  # bytes read at a time
PIECE = 1 << 18  # characters tokenized at a time; 500,000 spaces in one overflow the pattern's stack


# --- the tokenizer ---


def tokenizer_folder(name_or_folder):
    """The folder of a tokenizer, as checkpoint_folder finds that of a model; it need not hold one."""
    released = isinstance(name_or_folder, str) and re.fullmatch(RELEASED, name_or_folder)
    if not released and any(Path(name_or_folder, file).exists() for file in ("vocab.json", "tokenizer.json")):
        return Path(name_or_folder)
    from model import checkpoint_folder  # imports torch: slow, and a folder does not need it

    return checkpoint_folder(name_or_folder)


def load_tokenizer(name_or_folder):
    """The tiktoken.Encoding of a checkpoint folder or of a released model's name, such as "gpt2".

    A folder has vocab.json and merges.txt, or tokenizer.json alone, which is what Transformers 5 writes.
    Raises OSError if they cannot be had, ValueError if they are no byte-level BPE that splits as GPT-2's.
    """
    folder = tokenizer_folder(name_or_folder)
    try:
        if (folder / "vocab.json").exists():
            vocab, special = json.loads((folder / "vocab.json").read_bytes()), {}
            lines = (folder / "merges.txt").read_text(encoding="utf-8").split("\n")
            merges = [line.split(" ") for line in lines if line and not line.startswith("#version")]
        elif (folder / "tokenizer.json").exists():
            vocab, merges, special = _read_tokenizer_json(folder / "tokenizer.json")
        else:
            raise ValueError("neither vocab.json with merges.txt is there nor tokenizer.json")
        # A byte is written as the character that it is, where that can be seen, else as one from 256 on.
        seen = [*range(33, 127), *range(161, 173), *range(174, 256)]
        byte_of = dict(zip(map(chr, seen), seen))
        byte_of |= {chr(256 + i): byte for i, byte in enumerate(sorted({*range(256)} - {*seen}))}
        merged = ["".join(pair) for pair in merges]
        if any(vocab[a] > vocab[b] for a, b in zip(merged, merged[1:])):
            raise ValueError("its ids are not in the order of its merges")  # in which tiktoken merges
        ranks = {bytes(byte_of[c] for c in token): vocab[token] for token in (*byte_of, *merged)}
        ordinary = set(ranks.values())
        rest = {token: i for token, i in vocab.items() if i not in ordinary and token not in special}
        if END_OF_TEXT in rest:
            special[END_OF_TEXT] = rest.pop(END_OF_TEXT)
        if END_OF_TEXT not in special:
            raise ValueError(f"it has no {END_OF_TEXT}")
        if rest:
            raise ValueError(f"its merges do not make {len(rest):,} of its tokens: {ascii(next(iter(rest)))}")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        reason = f"{error} is missing" if isinstance(error, KeyError) else error
        raise ValueError(f"{folder} holds no GPT-2 tokenizer, the only kind known here: {reason}") from None
    name = hashlib.sha256(repr((ranks, special)).encode()).hexdigest()  # the same only for the same tokenizer
    return tiktoken.Encoding(name, pat_str=r50k_pat_str, mergeable_ranks=ranks, special_tokens=special)


def _read_tokenizer_json(path):
    """vocab, merges and special tokens from the one file of Transformers' tokenizers."""
    content = json.loads(path.read_bytes())
    model, splitter = content["model"], content["pre_tokenizer"] or {}
    how = splitter.get("type"), splitter.get("add_prefix_space"), splitter.get("use_regex", True)
    if model.get("type", "BPE") != "BPE" or content.get("normalizer") or how != ("ByteLevel", False, True):
        raise ValueError(f"{path.name} has another model, normalizer or pre_tokenizer")
    merges = [pair.split(" ") if isinstance(pair, str) else pair for pair in model["merges"]]
    return model["vocab"], merges, {token["content"]: token["id"] for token in content["added_tokens"]}


# --- reading ---


def format_of(path):
    """"pairs" for JSON Lines, "text" for all else, gzipped or not. Another format has its place here."""
    name = str(path).lower().removesuffix(".gz")
    if name.endswith((".json", ".csv", ".tsv", ".parquet")):
        raise ValueError(f'{path}: pairs come as .jsonl, {{"prompt": "...", "completion": "..."}} a line')
    return "pairs" if name.endswith(".jsonl") else "text"


def read_text(path):
    """Yield the text of a UTF-8 file ("-": standard input, .gz: gzipped) as it is read, line ends kept."""
    decoder = codecs.getincrementaldecoder("utf-8-sig")()  # a byte order mark is no text
    done = 0
    try:
        if path == "-":
            opened = contextlib.nullcontext(sys.stdin.buffer)
        else:
            opened = gzip.open(path) if str(path).endswith(".gz") else open(path, "rb")
        with opened as file:
            while data := file.read(READ):
                yield decoder.decode(data)
                done += len(data)
            yield decoder.decode(b"", final=True)
    except UnicodeDecodeError as error:
        at = f"near byte {done + error.start:,}"
        raise ValueError(f"{path} is not UTF-8 text ({at}): convert it to UTF-8 first") from None
    except (OSError, EOFError, zlib.error) as error:
        reason = getattr(error, "strerror", None) or error
        raise ValueError(f"{path} cannot be read ({reason}): give a text file") from None


def encode(texts, tokenizer, jobs=None):
    """Tokenize a stream of strings: yields (bytes, uint32 array), exactly the tokens of the strings joined.

    Special tokens written in the text are the plain characters they are. jobs: threads; one a core if None.
    """
    jobs = jobs or os.cpu_count() or 1
    with ThreadPoolExecutor(jobs) as pool:  # tiktoken works without Python's lock
        pending = deque()  # no further ahead than the threads need, so that memory stays flat
        for piece in _cut(texts, tokenizer):
            tokens = pool.submit(tokenizer.encode_to_numpy, piece, disallowed_special=())
            pending.append((len(piece.encode()), tokens))
            if len(pending) > 2 * jobs:
                size, tokens = pending.popleft()
                yield size, tokens.result()
        for size, tokens in pending:
            yield size, tokens.result()


# Where GPT-2's pattern ends a match whatever comes before and after: it looks back at nothing; from a letter
# or digit it goes on into nothing but another of its kind, and into white space from nothing but white space.
BOUNDARY = re.compile(r"(?<=[^\W_])(?=[\W_])|(?<=\S)(?=[ \t\n\r])"
                      r"|(?<=[A-Za-z])(?=[0-9])|(?<=[0-9])(?=[A-Za-z])")


def _cut(texts, tokenizer):
    """Cut a stream of strings where no token can span, into pieces of at most PIECE characters."""
    rest = ""
    for text in texts:
        rest += text
        while len(rest) >= PIECE:
            cut = _last_boundary(rest, PIECE - 4096) or _last_boundary(rest, 0)
            cut = cut or _between_tokens(rest[:PIECE], tokenizer)
            yield rest[:cut]
            rest = rest[cut:]
    if rest:
        yield rest


def _last_boundary(text, start):
    last = None
    for last in BOUNDARY.finditer(text, start + 1, PIECE):
        pass
    return last and last.start()


# Where a match depends on what comes after: in a contraction, and at the end of white space, whose last
# character stands alone if a word follows. (Python's \s has four characters that the pattern's has not.)
CONTRACTION = re.compile(r"'(?:[sdmt]|ll|ve|re)")
END_OF_SPACE = re.compile(r"(?<=[^\S\x1c-\x1f])(?=\S|[\x1c-\x1f])")


def _between_tokens(text, tokenizer):
    """Where to cut text without a BOUNDARY: between two of its tokens.

    No merge crossed that place, so either side alone goes through the same merges. It is far enough from the
    end that what comes after changes nothing.
    """
    tokens = tokenizer.encode_ordinary(text)
    for k in range(len(tokens) * 3 // 4, 0, -1):
        with contextlib.suppress(UnicodeDecodeError):  # a token may end inside a character
            cut = len(tokenizer.decode_bytes(tokens[:k]).decode())
            if not CONTRACTION.search(text, cut - 2, cut + 3) and not END_OF_SPACE.match(text, cut):
                return cut


def encode_pairs(path, tokenizer):
    """Tokenize {"prompt": "...", "completion": "..."} a line: yields (characters, prompt, completion).

    The latter two are lists of tokens. An end of text ends each completion, and stands for an empty prompt,
    as a target needs something before it.
    """
    for number, line in enumerate(_lines(read_text(path)), 1):
        if line.strip():
            prompt, completion = map(tokenizer.encode_ordinary, _prompt_and_completion(path, number, line))
            yield len(line), prompt or [tokenizer.eot_token], completion + [tokenizer.eot_token]


def _lines(texts):
    rest = ""
    for text in texts:
        *lines, rest = (rest + text).split("\n")
        yield from lines
    yield rest


def _prompt_and_completion(path, number, line):
    try:
        pair = json.loads(line)
        texts = pair["prompt"], pair["completion"]
        if all(isinstance(text, str) for text in texts):
            return texts
        reason = "they are strings"
    except (ValueError, TypeError, KeyError) as error:
        reason = f"{type(error).__name__} {error}"
    raise ValueError(f'{path} line {number} is not {{"prompt": "...", "completion": "..."}}: {reason}')


# --- text and pairs to train on ---


def open_corpus(path, tokenizer, block_size, cache, progress=lambda size: None):
    """The Corpus of a text or of pairs, or, without a path, of the reference that Python's own help() shows.

    It is tokenized once, into a folder of its own in the folder cache, and found there as long as file and
    tokenizer are the same; progress is told, as by count_tokens. Raises ValueError for what cannot be read,
    or is too little to hold a tenth out.
    """
    if path is None:
        from pydoc_data.topics import topics

        name, kind, texts = "the Python language reference", "text", ["\n\n".join(topics.values())]
        identity = hashlib.sha256(texts[0].encode()).hexdigest()
    elif os.path.isfile(path):
        name, kind, texts, stat = str(path), format_of(path), read_text(path), os.stat(path)
        identity = os.path.realpath(path), stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino
    else:
        raise ValueError(f"--data {path} is not a file")
    dtype = np.uint16 if tokenizer.n_vocab <= 2**16 else np.uint32
    key = repr((identity, tokenizer.name, kind, kind == "pairs" and block_size))
    folder = cache / f"{kind}.{hashlib.sha256(key.encode()).hexdigest()[:16]}"
    if not folder.exists():
        with _written_whole(folder) as part:
            if kind == "text":
                with open(part / "tokens", "wb") as file:
                    for size, tokens in encode(texts, tokenizer):
                        file.write(tokens.astype(dtype).tobytes())
                        progress(size)
            else:
                _write_pairs(part, path, tokenizer, block_size, dtype, progress)

    def read(file, dtype):
        path = folder / file
        return np.memmap(path, dtype, mode="r") if path.stat().st_size else np.empty(0, dtype)

    if kind == "text":
        return Corpus.of_text(name, read("tokens", dtype), block_size)
    counted = json.loads((folder / "counted.json").read_bytes())
    return Corpus.of_pairs(name, read("tokens", dtype), read("carries_loss", bool), read("begins", np.int64),
                           block_size, **counted)


@contextlib.contextmanager
def _written_whole(folder):
    """A folder to write to, renamed to its place at the end, so that no process ever reads a part of it."""
    part = folder.with_name(f"{folder.name}.{os.getpid()}.part")
    try:
        part.mkdir(parents=True, exist_ok=True)
        yield part
        part.rename(folder)
    except OSError as error:
        if not folder.exists():  # else another process was faster, and wrote the same
            raise ValueError(f"{folder} cannot be written ({error.strerror or error})") from None
    finally:
        shutil.rmtree(part, ignore_errors=True)


def _write_pairs(folder, path, tokenizer, block_size, dtype, progress):
    """Tokens, which of them carry loss, where each pair begins: first the pairs to train on, then the rest.

    Every tenth prompt is held out with all its completions, so that none is known from training. A pair that
    is longer than a sequence loses the start of its prompt first, so that the completion keeps its targets.
    """
    counted = {"n_train": 0, "n_held_out": 0, "n_cut_prompts": 0, "n_cut_completions": 0}
    held_out, lengths, prompts = (bytearray(), bytearray()), ([], []), {}
    with open(folder / "tokens", "wb") as token_file, open(folder / "carries_loss", "wb") as loss_file:
        for size, prompt, completion in encode_pairs(path, tokenizer):
            progress(size)
            digest = hashlib.blake2b(repr(prompt).encode(), digest_size=16).digest()
            is_held_out = prompts.setdefault(digest, len(prompts)) % 10 == 9
            kept = prompt[-max(1, block_size + 1 - len(completion)) :]
            counted["n_cut_prompts"] += len(kept) < len(prompt)
            counted["n_cut_completions"] += len(kept) + len(completion) > block_size + 1
            completion = completion[: block_size + 1 - len(kept)]
            counted["n_held_out" if is_held_out else "n_train"] += 1
            lengths[is_held_out].append(len(kept) + len(completion))
            tokens = np.array(kept + completion, dtype).tobytes()
            carries_loss = b"\0" * len(kept) + b"\1" * len(completion)
            if is_held_out:  # a tenth of the file waits in memory
                held_out[0].extend(tokens), held_out[1].extend(carries_loss)
            else:
                token_file.write(tokens), loss_file.write(carries_loss)
        token_file.write(held_out[0]), loss_file.write(held_out[1])
    if len(prompts) < 10:
        raise ValueError(f"{path} has {len(prompts)} different prompts; it takes 10 to hold a tenth out")
    np.cumsum([0] + lengths[False] + lengths[True], dtype=np.int64).tofile(folder / "begins")
    (folder / "counted.json").write_text(json.dumps(counted), encoding="utf-8")


@dataclass
class Corpus:
    """Text or pairs, split: what train.py draws its batches from, and what it measures itself on.

    tokens: (N,), memory-mapped. carries_loss: (N,) bool, or None: all do, as in text. runs: (R, 2), the
    stretches [begin, end) to train on. A training sequence begins at one of spans[i] tokens from starts[i].
    windows: (W, 2), the stretches to be measured on; each held-out target is in one of them, once.
    """

    description: str
    block_size: int
    tokens: np.ndarray
    carries_loss: np.ndarray | None
    runs: np.ndarray
    starts: np.ndarray
    spans: np.ndarray
    windows: np.ndarray

    @classmethod
    def of_text(cls, name, tokens, block_size):
        """Every tenth stretch is held out, rather than the end: the parts of a text differ.

        A stretch is as long as four sequences (fewer in a short text), so that few are lost at its borders.
        """
        n, B = len(tokens), block_size
        if n < 10 * (B + 1):
            raise ValueError(f"{name} has {n:,} tokens; to hold a tenth out, --block_size {B} needs "
                             f"{10 * (B + 1):,}: lower it, or give more text")
        per_stretch = min(4, max(1, n // 80 // B))
        stretch = per_stretch * B + 1
        starts = np.arange(0, n, 10 * stretch)
        runs = np.stack((starts, np.minimum(starts + 9 * stretch, n)), axis=1)
        held_out = starts[starts + 10 * stretch <= n] + 9 * stretch
        windows = (held_out[:, None] + np.arange(per_stretch) * B).reshape(-1, 1) + [0, B + 1]
        lengths = runs[:, 1] - runs[:, 0]
        description = f"{name}: {n:,} tokens: {lengths.sum():,} to train on, {len(windows) * B:,} held out"
        return cls(description, B, tokens, None, runs, starts, np.maximum(lengths - B, 0), windows)

    @classmethod
    def of_pairs(cls, name, tokens, carries_loss, begins, block_size, n_train, n_held_out, n_cut_prompts,
                 n_cut_completions):
        """A training sequence begins with a pair and goes on into the next ones: no context is wasted."""
        windows = []
        for begin, end in zip(begins[n_train:-1].tolist(), begins[n_train + 1 :].tolist()):
            if not windows or end - windows[-1][0] > block_size + 1:  # as many whole pairs as fit
                windows.append([begin, end])
            windows[-1][1] = end
        targets = int(carries_loss[begins[n_train] :].sum())
        description = (f"{name}: {n_train + n_held_out:,} pairs: {n_train:,} to train on, {n_held_out:,} "
                       f"held out with {targets:,} tokens to predict")
        if n_cut_prompts:
            too_long = f"longer than --block_size {block_size}"
            description += f"; {n_cut_prompts:,} {too_long} lose the start of the prompt"
        if n_cut_completions:
            description += f", {n_cut_completions:,} of them the end of the completion, too"
        runs, starts, spans = np.array([[0, begins[n_train]]]), begins[:n_train], np.ones(n_train, np.int64)
        return cls(description, block_size, tokens, carries_loss, runs, starts, spans, np.array(windows))

    @property
    def n_train_starts(self):
        return int(self.spans.sum())

    def train_starts(self, u):
        """The first token of training sequence number u of n_train_starts."""
        before = np.cumsum(self.spans) - self.spans
        span = np.searchsorted(before, u, side="right") - 1
        return self.starts[span] + u - before[span]

    def batch(self, rng, n):
        """n training sequences drawn with rng, a numpy Generator: inputs and targets, as of sequences."""
        begins = self.train_starts(rng.integers(self.n_train_starts, size=n))
        ends = np.minimum(begins + self.block_size + 1, self.runs[-1, 1])
        return self.sequences(np.stack((begins, ends), axis=1))

    def sequences(self, windows):
        """Inputs and targets of windows (n, 2): (n, block_size) int64 each, -100 where there is no loss."""
        at = windows[:, :1] + np.arange(self.block_size + 1)
        is_target = at < windows[:, 1:]
        at = np.minimum(at, len(self.tokens) - 1)
        if self.carries_loss is not None:
            is_target &= self.carries_loss[at]
        rows = self.tokens[at].astype(np.int64)
        return rows[:, :-1], np.where(is_target, rows, -100)[:, 1:]

    def train_counts(self, n_vocab):
        """How often each token is a target in the training split: (n_vocab,) int64."""
        counts, step = np.zeros(n_vocab, np.int64), 1 << 24  # not all in memory at once
        for begin, end in self.runs.tolist():
            for part in (slice(at, min(at + step, end)) for at in range(begin, end, step)):
                carries_loss = ... if self.carries_loss is None else self.carries_loss[part]
                counts += np.bincount(self.tokens[part][carries_loss], minlength=n_vocab)
        return counts

    def held_out(self, n):
        """At most n windows of held-out tokens, evenly spread: (n, 2)."""
        return self.windows[np.linspace(0, len(self.windows) - 1, min(len(self.windows), n)).astype(int)]

    def openings(self, n):
        """Of up to n held-out places: what to write on from, and how it goes on; lists of tokens."""
        B = self.block_size
        if self.carries_loss is None:
            rows = [self.tokens[begin:end].tolist() for begin, end in self.held_out(n)]
            return [(row[: B // 8], row[B // 8 :]) for row in rows]
        completion_of = {}  # of several completions of a prompt, the first
        for begin, end in self.windows:
            tokens, carries_loss = self.tokens[begin:end].tolist(), self.carries_loss[begin:end].view(np.int8)
            changes = np.flatnonzero(np.diff(carries_loss, prepend=1, append=0)).tolist()
            for prompt, completion, after in zip(changes[::2], changes[1::2], changes[2::2]):
                key = tuple(tokens[prompt:completion][-B // 2 :])
                completion_of.setdefault(key, tokens[completion : after - 1])  # without its end of text
            if len(completion_of) >= n:
                break
        return [(list(prompt), completion) for prompt, completion in completion_of.items()][:n]

    def fingerprint(self):
        """SHA-256 of the tokens and of which carry loss: the same only for the same data."""
        digest = hashlib.sha256(self.tokens)
        digest.update(b"" if self.carries_loss is None else self.carries_loss)
        return digest.hexdigest()


# --- counts ---


def count_tokens(paths, tokenizer, jobs=None, progress=lambda size: None):
    """Count the tokens of texts, and those of the completions of pairs: int64 (n_vocab,).

    progress is called with the bytes of each piece done, or the characters of each pair. Raises ValueError
    for a file that cannot be read.
    """
    counts = np.zeros(tokenizer.n_vocab, dtype=np.int64)
    for path in paths:
        if format_of(path) == "pairs":
            for size, _, completion in encode_pairs(path, tokenizer):
                np.add.at(counts, completion, 1)
                progress(size)
        else:
            for size, tokens in encode(read_text(path), tokenizer, jobs):
                counts += np.bincount(tokens, minlength=len(counts))
                progress(size)
    return counts


def write_counts(path, counts):
    with open(path, "wb") as file:  # to a path, np.save would append .npy
        np.save(file, counts)


def load_counts(files, n_vocab):
    """The counts in .npy files, added up: (n_vocab,). A file may be scaled, as in "general.npy:0.1".

    Raises ValueError for what is not n_vocab finite numbers that are not negative; pickles are never loaded.
    """
    total = np.zeros(n_vocab, np.int64)
    for file in files:
        path, scale = file, 1
        if scaled := re.fullmatch(r"(.+):([0-9.eE+-]+)", file):
            with contextlib.suppress(ValueError):
                path, scale = scaled[1], float(scaled[2])
        try:
            counts = np.load(path, allow_pickle=False)
        except OSError as error:
            raise ValueError(f"--counts {path} cannot be read ({error.strerror}): see count.py") from None
        except (ValueError, EOFError):
            counts = None  # a pickle, or nothing of numpy's
        if not isinstance(counts, np.ndarray) or counts.ndim != 1 or counts.dtype.kind not in "iuf":
            raise ValueError(f"--counts {path} is not a 1-D array of numbers: count.py writes it")
        if len(counts) != n_vocab:
            whose = {50257: "GPT-2's", 4096: "tiny/'s"}.get(len(counts), "another")
            raise ValueError(f"--counts {path} has {len(counts):,} entries, as of {whose} tokenizer, but the "
                             f"model's has {n_vocab:,}: count again with count.py --tokenizer")
        counts = counts.astype(np.float64 if counts.dtype.kind == "f" else np.int64)
        valid = (np.isfinite(counts) & (counts >= 0)).all() and counts.any() and 0 < scale < float("inf")
        if not valid:
            raise ValueError(f"--counts {file} must give finite numbers, none of them negative and not all 0")
        total = total + scale * counts
    return total


BANDS = "frequent", "middle", "rare"


def frequency_bands(counts):
    """(V,) int64, indices of BANDS: frequent tokens make up half of the text, rare ones its last tenth."""
    order = np.argsort(-counts, kind="stable")
    before = np.cumsum(counts[order]) - counts[order]
    band = np.empty(len(counts), np.int64)
    band[order] = np.digitize(before / counts.sum(), [0.5, 0.9])
    band[counts == 0] = 2
    return band


def describe(counts):
    """What a person learns from the counts, in two lines."""
    total, seen, top = counts.sum(), np.count_nonzero(counts), np.sort(counts)[-100:].sum()
    return (f"{total:,} tokens, {seen:,} distinct; the 100 most frequent are {top / total:.1%} of the text\n"
            f"{len(counts) - seen:,} of the {len(counts):,} in the vocabulary were never seen")


# --- the command line ---


class ArgumentParser(argparse.ArgumentParser):
    """argparse, with defaults shown and a wrong flag answered in one line."""

    def flag(self, name, default, help, type=str, **options):
        help += "" if default is None else " (default: %(default)s)"
        self.add_argument(f"--{name}", default=default, help=help, type=type, **options)

    def error(self, message):
        self.exit(2, f"{self.prog}: error: {message}; --help lists the flags\n")


def at_least(minimum, kind=int, below=float("inf")):
    """For argparse: a number of a kind that is at least minimum, and finite."""

    def parse(text):
        value = kind(text) + 0  # -0 is 0
        if not minimum <= value < below:
            limit = "" if kind is int else " and finite" if below == float("inf") else f" and below {below}"
            raise argparse.ArgumentTypeError(f"must be at least {minimum}{limit}, not {text}")
        return value

    parse.__name__ = kind.__name__  # which argparse names for what is no number
    return parse


def show_speed():
    """A function to be told the bytes of each piece done: shows on a terminal how many, and how fast."""
    start, done = time.time(), 0

    def progress(size):
        nonlocal done
        done += size
        if done // 1e6 > (done - size) // 1e6 and sys.stderr.isatty():
            speed = done / 1e6 / (time.time() - start)
            print(f"{done / 1e6:,.0f} MB, {speed:.1f} MB/s\033[K", end="\r", file=sys.stderr, flush=True)

    return progress


def run(main):
    """Run a script's main: UTF-8 on every platform, and what a user can cause ends in one line on stderr."""
    for stream in sys.stdout, sys.stderr:
        stream.reconfigure(encoding="utf-8", errors="backslashreplace")
    try:
        main()
    except (OSError, ValueError) as error:
        if isinstance(error, OSError) and error.filename:
            error = f"{error.filename}: {error.strerror}"
        sys.exit(f"{Path(sys.argv[0]).name}: error: {error}")
    except KeyboardInterrupt:  # die of it: a status would end no loop of a shell
        sys.stdout.flush()
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        signal.raise_signal(signal.SIGINT)


def _is_npy(path):
    if not os.path.isfile(path):
        return False
    magic = np.lib.format.MAGIC_PREFIX
    with open(path, "rb") as file:
        return file.read(len(magic)) == magic


def main():
    parser = ArgumentParser(description="Count the tokens of texts, and of the completions of pairs.")
    add = parser.add_argument
    add("text", nargs="+", help="UTF-8 text or .jsonl pairs, .gz or not; - is standard input")
    add("-o", "--out", default="counts.npy", help="where the counts go (default: %(default)s)")
    add("--tokenizer", default="gpt2", help="a checkpoint folder, or a released model (default: %(default)s)")
    add("--jobs", type=at_least(1), help="threads (default: one a core)")
    args = parser.parse_args()
    if os.path.exists(args.out) and not _is_npy(args.out):
        parser.error(f"--out {args.out} is there, and no file of counts: name another")

    try:
        tokenizer = load_tokenizer(args.tokenizer)
    except OSError as error:
        raise ValueError(f"{error}; --tokenizer tiny counts for tiny/") from None
    counts = count_tokens(args.text, tokenizer, args.jobs, show_speed())
    if counts.sum() == 0:
        raise ValueError(f"{', '.join(args.text)}: no text to count")
    part = Path(f"{args.out}.{os.getpid()}.part")
    try:
        write_counts(part, counts)
        os.replace(part, args.out)
    except OSError as error:
        raise ValueError(f"--out {args.out} cannot be written ({error.strerror})") from None
    finally:
        part.unlink(missing_ok=True)
    print(f"{describe(counts)}\nwrote {args.out}")


if __name__ == "__main__":
    run(main)
