"""
Count how often each token of a tokenizer occurs in text: the freq(t) of Power-Law Decay Loss.

    python count.py TEXT [TEXT ...] [-o counts.npy] [--tokenizer gpt2|FOLDER]

Writes an int64 array of shape (n_vocab,). A text is UTF-8, or the same gzipped (.gz); - is standard input.
It owns the tokenizer: load_tokenizer and encode are what train.py and sample.py use, too. It builds none; the
vocab.json and merges.txt of a checkpoint folder say how text is split.
"""

import argparse
import codecs
import contextlib
import gzip
import hashlib
import os
import re
import sys
import time
import zlib
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import tiktoken
from tiktoken.load import data_gym_to_mergeable_bpe_ranks

# GPT-2's own splitting of text into the pieces that byte pairs are merged in (openai/gpt-2, encoder.py).
GPT2_PATTERN = r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"""
END_OF_TEXT = "<|endoftext|>"
CHUNK = 1 << 20  # bytes handed to a thread at a time


def load_tokenizer(name_or_folder):
    """The tiktoken.Encoding of a checkpoint folder or of a released model's name, such as "gpt2".

    Raises OSError if its files cannot be had, ValueError if they are not a GPT-2 tokenizer.
    """
    folder = Path(name_or_folder)
    if not (folder / "vocab.json").exists():
        from model import checkpoint_folder  # imports torch: slow, and a folder does not need it

        folder = checkpoint_folder(name_or_folder)
    files = [folder / "merges.txt", folder / "vocab.json"]
    # tiktoken caches by path, local files too; the hashes make it look again when another file is there.
    hashes = [hashlib.sha256(file.read_bytes()).hexdigest() for file in files]
    try:
        ranks = data_gym_to_mergeable_bpe_ranks(*map(str, files), *hashes)
    except (AssertionError, ValueError, KeyError) as error:
        raise ValueError(f"{folder}: vocab.json and merges.txt are not a GPT-2 tokenizer ({error})") from None
    name = "-".join(digest[:16] for digest in hashes)  # the same name only for the same tokenizer
    return tiktoken.Encoding(name, pat_str=GPT2_PATTERN, mergeable_ranks=ranks, special_tokens={END_OF_TEXT: len(ranks)})


def read_text(path):
    """Yield the text of a UTF-8 file ("-": standard input, .gz: gzipped) as it is read, line ends unchanged."""
    decoder = codecs.getincrementaldecoder("utf-8")()
    done = 0
    try:
        if path == "-":
            opened = contextlib.nullcontext(sys.stdin.buffer)
        else:
            opened = gzip.open(path) if str(path).endswith(".gz") else open(path, "rb")
        with opened as file:
            while data := file.read(CHUNK):
                yield decoder.decode(data)
                done += len(data)
            yield decoder.decode(b"", final=True)
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text (near byte {done + error.start:,}): convert it to UTF-8 first") from None
    except (OSError, EOFError, zlib.error) as error:
        raise ValueError(f"{path} cannot be read ({getattr(error, 'strerror', None) or error}): give a text file") from None


def encode(texts, tokenizer, jobs=None):
    """Tokenize a stream of strings: yields (bytes, uint32 array), exactly the tokens of the strings joined.

    Special tokens written in the text are the plain characters they are. jobs: threads; by default one a core.
    """
    jobs = jobs or len(os.sched_getaffinity(0))
    with ThreadPoolExecutor(jobs) as pool:  # tiktoken works without Python's lock
        pending = deque()  # no further ahead than the threads need, so that memory stays flat
        for piece in _cut(texts, tokenizer):
            pending.append((len(piece.encode()), pool.submit(tokenizer.encode_to_numpy, piece, disallowed_special=())))
            if len(pending) > 2 * jobs:
                size, tokens = pending.popleft()
                yield size, tokens.result()
        for size, tokens in pending:
            yield size, tokens.result()


# Where GPT2_PATTERN ends a match whatever comes before and after: it looks back at nothing, no alternative goes on from
# another character into white space, and a run of letters or of digits ends where the run ends. (An apostrophe may start
# a contraction, so nothing is cut behind one.) Python's \s is wider than the pattern's, hence the explicit set.
BOUNDARY = re.compile(r"(?<=\S)(?=[ \t\n\r])|(?<=[A-Za-z0-9])(?=[!-/:-@\[-`{-~])|(?<=[A-Za-z])(?=[0-9])|(?<=[0-9])(?=[A-Za-z])")


def _cut(texts, tokenizer):
    """Cut a stream of strings where no token can span, into pieces of about CHUNK characters."""
    rest = ""
    for text in texts:
        rest += text
        while len(rest) >= CHUNK and (
            cut := _last_boundary(rest, CHUNK - 4096) or _last_boundary(rest, 0) or _between_tokens(rest[:CHUNK], tokenizer)
        ):
            yield rest[:cut]
            rest = rest[cut:]
    if rest:
        yield rest


def _last_boundary(text, start):
    last = None
    for last in BOUNDARY.finditer(text, start + 1, CHUNK):
        pass
    return last and last.start()


def _between_tokens(text, tokenizer):
    """Where to cut text without a BOUNDARY: between two of its tokens.

    No merge crossed that place, so either side alone goes through the same merges. It is far enough from the end that what
    comes after the text changes nothing there, and no contraction is near, which could begin or end differently.
    """
    tokens = tokenizer.encode_ordinary(text)
    for k in range(len(tokens) * 3 // 4, 0, -1):
        with contextlib.suppress(UnicodeDecodeError):  # a token may end inside a character
            cut = len(tokenizer.decode_bytes(tokens[:k]).decode())
            if not re.search(r"'(?:[sdmt]|ll|ve|re)", text[cut - 2 : cut + 3]):
                return cut


def count_tokens(paths, tokenizer, jobs=None, progress=lambda n_bytes: None):
    """Count the tokens of text files: int64 (n_vocab,). progress is called with the bytes of each piece done."""
    counts = np.zeros(tokenizer.n_vocab, dtype=np.int64)
    for path in paths:
        for size, tokens in encode(read_text(path), tokenizer, jobs):
            counts += np.bincount(tokens, minlength=len(counts))
            progress(size)
    return counts


def describe(counts):
    """What a person learns from the counts, in two lines."""
    total, seen = counts.sum(), np.count_nonzero(counts)
    top = np.sort(counts)[::-1][:100].sum()
    return (
        f"{total:,} tokens, {seen:,} distinct; the 100 most frequent are {top / total:.1%} of the text\n"
        f"{len(counts) - seen:,} of the {len(counts):,} in the vocabulary were never seen"
    )


class ArgumentParser(argparse.ArgumentParser):
    """argparse, with a wrong flag answered in one line."""

    def error(self, message):
        self.exit(2, f"{self.prog}: error: {message}; --help lists the flags\n")


def run(main):
    """Run a script's main: what its user can cause ends in one line on stderr."""
    try:
        main()
    except (OSError, ValueError) as error:
        of_a_file = isinstance(error, OSError) and error.filename
        sys.exit(f"{Path(sys.argv[0]).name}: error: {f'{error.filename}: {error.strerror}' if of_a_file else error}")
    except KeyboardInterrupt:
        sys.exit(130)


def main():
    parser = ArgumentParser(description="Count the tokens of text files.")
    parser.add_argument("text", nargs="+", help="UTF-8 text, .gz or not; - is standard input")
    parser.add_argument("-o", "--out", default="counts.npy", help="where the counts go (default: %(default)s)")
    parser.add_argument("--tokenizer", default="gpt2", help="a checkpoint folder, or a released model's name (default: %(default)s)")
    parser.add_argument("--jobs", type=int, help="threads (default: one a core)")
    args = parser.parse_args()

    if args.jobs is not None and args.jobs < 1:
        parser.error("--jobs must be at least 1")
    tokenizer = load_tokenizer(args.tokenizer)
    # The size of a stream or of what is in a .gz is not known before its end.
    known = all(path != "-" and not path.endswith(".gz") for path in args.text)
    total = sum(os.path.getsize(path) for path in args.text if os.path.exists(path)) if known else None
    start, done = time.time(), 0

    def progress(size):
        nonlocal done
        done += size
        if sys.stderr.isatty():
            speed = done / (time.time() - start)
            left = f", {(total - done) / speed:,.0f} s left" if total else ""
            print(f"\r{done / 1e6:,.0f} MB, {speed / 1e6:.1f} MB/s{left} \033[K", end="" if done != total else "\n", file=sys.stderr)

    counts = count_tokens(args.text, tokenizer, args.jobs, progress)
    if counts.sum() == 0:
        raise ValueError(f"{', '.join(args.text)}: no text to count")
    part = Path(args.out + ".part")
    try:
        with open(part, "wb") as file:
            np.save(file, counts)
        os.replace(part, args.out)
    except OSError as error:
        raise ValueError(f"--out {args.out} cannot be written ({error.strerror})") from None
    finally:
        part.unlink(missing_ok=True)
    print(describe(counts))
    print(f"wrote {args.out}")


if __name__ == "__main__":
    run(main)
