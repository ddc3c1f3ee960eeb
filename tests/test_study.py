"""What the README says of results is what the study measured."""


def test_the_tables_of_the_readme_are_those_of_the_study(run, root):
    printed = run("tests/study.py", "--tables", cwd=root).stdout.splitlines()
    results = (root / "README.md").read_text(encoding="utf-8").split("## Results")[1].split("\n## ")[0]
    rows = [line for line in results.splitlines() if line.startswith("|")]
    assert len(rows) > 20 and set(rows) <= set(printed)
