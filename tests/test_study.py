"""The numbers of the README are those that were measured: the README and results.md follow study.json."""

import json
import shutil
import statistics
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
TEXTS, SEEDS = ("reference", "functions"), (1, 2, 3)


def test_the_results_are_written_from_the_runs(tmp_path):
    for name in "count.py", "model.py", "pdl.py", "sample.py", "tests/study.py", "assets/study.json":
        (tmp_path / name).parent.mkdir(exist_ok=True)
        shutil.copy(ROOT / name, tmp_path / name)
    subprocess.run([sys.executable, tmp_path / "tests/study.py", "--tables"], check=True, timeout=60)
    assert (tmp_path / "assets/results.md").read_bytes() == (ROOT / "assets/results.md").read_bytes()


def test_the_readme_says_what_was_measured():
    runs = json.loads((ROOT / "assets/study.json").read_bytes())
    readme = " ".join((ROOT / "README.md").read_text(encoding="utf-8").split())

    def changes(band, word, alpha, shifted):
        """How much better or worse a band is predicted than by plain finetuning, on each of the texts."""
        for text in TEXTS:
            differences = []
            for seed in SEEDS:
                plain = runs[f"{text}, alpha 0, seed {seed}"]
                other = plain["shifted"][str(alpha)] if shifted else None
                after = runs[f"{text}, alpha {alpha}, seed {seed}"]["after"]
                other = other or after["ce_by_band"] | {"all": after["val_ce"]}
                before = plain["after"]["ce_by_band"] | {"all": plain["after"]["val_ce"]}
                differences.append(before[band] - other[band])
            yield f"{statistics.mean(differences) * (1 if word == 'better' else -1):.2f}"

    for alpha, shifted in (0.25, False), (0.5, False), (0.25, True):
        for band, word in ("rare", "better"), ("all", "worse"):
            first, second = changes(band, word, alpha, shifted)
            said = f"{first} and {second} {word}", f"{first} and {second} nats {word}"
            assert any(phrase in readme for phrase in said), (alpha, band, said)
