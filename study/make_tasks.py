"""
The tasks of study.py that do not come with Python, as pairs for train.py, from clones of where they are:

    git clone https://github.com/harsh19/Shakespearizing-Modern-English   # Jhamtani et al. 2017
    git clone https://github.com/ThiagoCF05/webnlg                        # Castro Ferreira et al. 2018
    git clone https://github.com/karpathy/char-rnn                        # tinyshakespeare
    python tests/make_tasks.py Shakespearizing-Modern-English webnlg char-rnn tasks

writes tasks/style.jsonl, modern English to Shakespeare's, tasks/webnlg.jsonl, triples to text, and
tasks/dialogue.jsonl, what is said in a play to what was said before.
"""

import json
import sys
import xml.etree.ElementTree as ET
from pathlib import Path


def style(clone):
    for split in "train", "valid", "test":
        modern, original = (
            Path(clone, "data", f"{split}.{side}.nltktok").read_text(encoding="utf-8").splitlines()
            for side in ("modern", "original")
        )
        for m, o in zip(modern, original, strict=True):
            yield f"Modern: {m.strip()}\nShakespeare:", f" {o.strip()}"


def webnlg(clone):
    for path in sorted(Path(clone, "data", "v1.6", "en").rglob("*.xml")):
        for entry in ET.parse(path).iter("entry"):
            triples = "; ".join(triple.text.replace("_", " ") for triple in entry.iter("mtriple"))
            for text in entry.iterfind("lex/text"):
                words = (text.text or "").split()
                if words:
                    yield f"{triples}\nText:", f" {' '.join(words)}"


def dialogue(clone):
    text = Path(clone, "data", "tinyshakespeare", "input.txt").read_text(encoding="utf-8")
    speeches = text.strip().split("\n\n")
    for before, speech in zip(speeches, speeches[1:]):
        speaker, _, words = speech.partition("\n")
        yield f"{before}\n\n{speaker}", f"\n{words}"


if __name__ == "__main__":
    if len(sys.argv) != 5:
        sys.exit(__doc__.strip())
    folder = Path(sys.argv[4])
    folder.mkdir(parents=True, exist_ok=True)
    for make, clone in zip((style, webnlg, dialogue), sys.argv[1:]):
        pairs = [json.dumps({"prompt": p, "completion": c}, ensure_ascii=False) for p, c in make(clone)]
        (folder / f"{make.__name__}.jsonl").write_text("\n".join(pairs) + "\n", encoding="utf-8")
        print(f"{folder}/{make.__name__}.jsonl: {len(pairs):,} pairs")
