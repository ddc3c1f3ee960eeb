"""
Make the two tasks of study.py that do not come with Python, as pairs for train.py. First clone their sources:

    git clone https://github.com/harsh19/Shakespearizing-Modern-English   # Jhamtani et al. 2017
    git clone https://github.com/ThiagoCF05/webnlg                        # Castro Ferreira et al. 2018
    python study/make_tasks.py Shakespearizing-Modern-English webnlg tasks

This writes tasks/style.jsonl (modern English to Shakespeare's) and tasks/webnlg.jsonl (triples to text).
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


if __name__ == "__main__":
    if len(sys.argv) != 4:
        sys.exit(__doc__.strip())
    folder = Path(sys.argv[3])
    folder.mkdir(parents=True, exist_ok=True)
    for make, clone in zip((style, webnlg), sys.argv[1:]):
        pairs = [json.dumps({"prompt": p, "completion": c}, ensure_ascii=False) for p, c in make(clone)]
        (folder / f"{make.__name__}.jsonl").write_text("\n".join(pairs) + "\n", encoding="utf-8")
        print(f"{folder}/{make.__name__}.jsonl: {len(pairs):,} pairs")
