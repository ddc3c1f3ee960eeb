"""The numbers of the README are those that were measured: the README and results.md follow study.json."""

import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent


def test_the_results_are_written_from_the_runs(tmp_path):
    for name in "count.py", "model.py", "pdl.py", "sample.py", "tests/study.py", "assets/study.json":
        (tmp_path / name).parent.mkdir(exist_ok=True)
        shutil.copy(ROOT / name, tmp_path / name)
    subprocess.run([sys.executable, tmp_path / "tests/study.py", "--tables"], check=True, timeout=60)
    assert (tmp_path / "assets/results.md").read_bytes() == (ROOT / "assets/results.md").read_bytes()


def test_the_table_of_the_readme_is_that_of_the_results():
    section = (ROOT / "README.md").read_text(encoding="utf-8").split("## Which alpha")[1].split("\n## ")[0]
    rows = [line for line in section.splitlines() if line.startswith("|")]
    measured = (ROOT / "assets/results.md").read_text(encoding="utf-8").splitlines()
    assert len(rows) > 5 and set(rows) <= set(measured)
