"""
Makes tests/golden/tokenizers/: small tokenizers as Transformers 4 and 5 save them, each with the token ids
that Transformers itself gives for a nasty text. Not run by the tests; needs `pip install transformers`,
and was run once with transformers 4.57.6 and once with 5.24.0, by

    python tests/make_golden_tokenizers.py
"""

import json
import shutil
from pathlib import Path

import transformers

TINY = Path(__file__).parent.parent / "tiny"
GOLDEN = Path(__file__).parent / "golden/tokenizers"

# White space of all kinds, contractions, marks, digits, an emoji, and the added tokens in and between words.
TEXT = ("It's we'll I'VE  two  spaces\t\ttabs\r\nCRLF\r\n\r\n\n\nblank lines   \n   indented\u00a0no-break"
        "\u3000ideographic e\u0301 na\u00efve caf\u00e9 \U0001f469\u200d\U0001f680 1234 x1y2 a,b;c... ??!  "
        "<|endoftext|>zebra zebras  zebrazebra<|user|> hi [PAD][PAD]\n nothing ingot of offing two words."
        "two words <|endoftext|> 'quoted' \x1c\x85 <|end \n")
# "ing" is an ordinary token, too. GPT-2's files write their " of" otherwise, so this one gets a new id. They
# write the byte E9 as "\u00e9", so this gets the id of that byte.
ADDED = ["zebra", "zebras", "two words", "ing", " of", "\u00e9"]
SPECIAL = {"pad_token": "[PAD]", "additional_special_tokens": ["<|user|>"]}


def save_ids(folder, tokenizer):
    ids = tokenizer.encode(TEXT, add_special_tokens=False)
    (folder / "ids.json").write_text(json.dumps({"text": TEXT, "ids": ids}), encoding="utf-8")


def save(name, tokenizer, added=ADDED):
    """Save a tokenizer with added tokens, and what the saved one makes of the text."""
    folder = GOLDEN / name
    shutil.rmtree(folder, ignore_errors=True)
    if added:
        tokenizer.add_special_tokens(SPECIAL)
        tokenizer.add_tokens(added)
    tokenizer.save_pretrained(folder)
    save_ids(folder, type(tokenizer).from_pretrained(folder))
    return folder


GOLDEN.mkdir(parents=True, exist_ok=True)
merges = (TINY / "merges.txt").read_text(encoding="utf-8").splitlines()[:101]  # the first line is a header
vocab = list(json.loads((TINY / "vocab.json").read_text(encoding="utf-8")))[:356]
vocab = {token: i for i, token in enumerate([*vocab, "<|endoftext|>"])}

if transformers.__version__ < "5":
    plain = GOLDEN / "plain"  # vocab.json and merges.txt alone
    plain.mkdir(exist_ok=True)
    (plain / "vocab.json").write_text(json.dumps(vocab, ensure_ascii=False), encoding="utf-8")
    (plain / "merges.txt").write_text("\n".join(merges) + "\n", encoding="utf-8")
    files = str(plain / "vocab.json"), str(plain / "merges.txt")
    save_ids(plain, transformers.GPT2Tokenizer(*files))
    fast = save("transformers4", transformers.GPT2TokenizerFast(*files))
    for name in "added_tokens.json", "tokenizer_config.json":
        (fast / name).unlink()  # so that tokenizer.json alone has the added tokens
    save_ids(fast, transformers.GPT2TokenizerFast.from_pretrained(fast))
    save("transformers4_slow", transformers.GPT2Tokenizer(*files))
    # Long ago there was no added_tokens_decoder in tokenizer_config.json.
    old = save("transformers4_old", transformers.GPT2Tokenizer(*files), [a for a in ADDED if a not in vocab])
    (old / "tokenizer_config.json").unlink()
    save_ids(old, transformers.GPT2Tokenizer.from_pretrained(old))
else:
    merges = [tuple(merge.split()) for merge in merges[1:]]
    save("transformers5", transformers.GPT2Tokenizer(vocab=vocab, merges=merges))
