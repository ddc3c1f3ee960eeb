"""sample.py: what it generates, from what prompt, and the shift. All scripts, on macOS and Windows."""

import numpy as np
import pytest
import torch

import sample
from model import GPT
from pdl import pdl_weights

FLAGS = ["--max_new_tokens", 8, "--num_samples", 2, "--device", "cpu", "--dtype", "float32"]
SCRIPTS = ["count.py", "train.py", "sample.py"]


@pytest.fixture
def write(run_here, tiny, tmp_path):
    """write(*flags): what sample.py prints with tiny/."""
    def write(*flags, ok=True):
        return run_here("sample.py", "--init_from", tiny, *FLAGS, *flags, cwd=tmp_path, ok=ok)

    return write


def test_the_same_seed_writes_the_same(write):
    first, again, other = (write("--prompt", "The", "--seed", seed).stdout for seed in (1, 1, 2))
    assert first == again != other and first.count("The") >= 2


def test_a_prompt_is_a_text_a_file_or_standard_input(run, write, tiny, tmp_path):
    (tmp_path / "prompt.txt").write_text("the quick", encoding="utf-8")
    expected = write("--prompt", "the quick").stdout
    assert write("--prompt", "FILE:prompt.txt").stdout == expected
    flags = "--init_from", tiny, *FLAGS, "--prompt", "-"
    assert run("sample.py", *flags, cwd=tmp_path, input="the quick").stdout == expected


@pytest.mark.parametrize("prompt", ["", "<|endoftext|>"])
def test_an_empty_prompt_or_an_end_of_text_starts_a_new_text(write, tiny, tokenizer, prompt):
    out = write("--prompt", prompt, "--num_samples", 1, "--temperature", 0).stdout
    idx = torch.tensor([[tokenizer.eot_token]])
    expected = GPT.from_pretrained(tiny).generate(idx, 8, temperature=0)[0, 1:].tolist()
    assert out.startswith(prompt + tokenizer.decode(expected))


def test_a_sample_stops_at_an_end_of_text(tiny, tokenizer):
    model, eot = GPT.from_pretrained(tiny).eval(), tokenizer.eot_token
    bias = torch.zeros(4096)
    bias[eot] = 1e4
    assert sample.write(model, tokenizer, [1, 2], 5, bias, n=2) == [[], []]
    (tokens,) = sample.write(model, tokenizer, [5, 6], 5, temperature=0)
    assert tokens == model.generate(torch.tensor([[5, 6]]), 5, temperature=0)[0, 2:].tolist()


def test_shift_adds_a_multiple_of_log_frequency_to_the_logits(write, tiny, tokenizer, tmp_path):
    counts = np.random.default_rng(0).integers(0, 10**6, 4096)
    counts[:5] = 0
    np.save(tmp_path / "counts.npy", counts)
    model, prompt = GPT.from_pretrained(tiny).eval(), tokenizer.encode_ordinary("The")
    expected = []
    with torch.no_grad():
        for _ in range(8):  # one greedy token after another
            logits = model(torch.tensor([prompt + expected]))[0, -1]
            logits -= 0.5 * torch.from_numpy(np.maximum(counts, 1)).log()
            expected.append(logits.argmax().item())
    flags = "--prompt", "The", "--temperature", 0, "--num_samples", 1
    shifted = write(*flags, "--counts", "counts.npy", "--shift", 0.5).stdout
    assert shifted.startswith("The" + tokenizer.decode(expected)) and shifted != write(*flags).stdout


def test_shift_has_the_effect_of_the_weights():
    """Eq. 5 is minimized by q(t) ~ w(t) p(t), and the shift makes this q of p."""
    counts, logits = np.array([1, 10, 100, 1000]), torch.randn(4, generator=torch.manual_seed(0))
    q = pdl_weights(counts, 0.5, eps=0) * logits.softmax(0)
    torch.testing.assert_close((logits + sample.shift(counts, 0.5)).softmax(0), q / q.sum())


MISTAKES = [  # flags, what the line names, status
    (["--temperature", "nan"], "--temperature", 2), (["--temperature", "-1"], "--temperature", 2),
    (["--seed", "-1"], "--seed", 2), (["--top_p", "0"], "--top_p", 2), (["--top_k", "0"], "--top_k", 2),
    (["--shift", "1"], "--counts", 2), (["--counts", "a.npy"], "--shift", 2),
    (["--counts", "a.npy", "--shift", "inf"], "--shift", 2), (["--init_from", "none"], "none", 1),
    (["--init_from", "gpt2"], "gpt2", 1), (["--prompt", "FILE:none.txt"], "none.txt", 1),
    (["--counts", "none.npy", "--shift", "1"], "none.npy", 1), (["--device", "tpu"], "--device tpu", 1),
    (["--counts", "probabilities.npy", "--shift", "1"], "counts", 1),
]


@pytest.mark.parametrize("flags, culprit, status", MISTAKES, ids=[" ".join(flags) for flags, *_ in MISTAKES])
def test_a_mistake_ends_in_one_line(write, one_line, tmp_path, flags, culprit, status):
    np.save(tmp_path / "probabilities.npy", np.full(4096, 1 / 4096))
    one_line(write(*flags, ok=False), culprit, status=status)


# --- on every machine ---


def flags_of(script, small, tiny, name):
    return {"count.py": [name, "--tokenizer", tiny],
            "train.py": [*small[:2], "--data", name, *small[4:], "--max_iters", 1],
            "sample.py": ["--init_from", tiny, *FLAGS, "--prompt", f"FILE:{name}"]}[script]


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_script_runs_on_macos_and_windows(run, text, small, tiny, script):
    """Nothing is needed that Linux alone has. Files and the console are cp1252 unless told otherwise."""
    name = "na\u00efve \u4e2d\u6587.txt"
    (text / name).write_bytes((text / "text.txt").read_bytes() + "caf\u00e9 \u4e2d\u6587 ".encode() * 99)
    (text / "elsewhere.py").write_text(ELSEWHERE, encoding="utf-8")
    env = {"PYTHONUTF8": "0", "PYTHONIOENCODING": "cp1252"}
    flags = flags_of(script, small, tiny, name)
    out = run(script, *flags, cwd=text, env=env, python=[text / "elsewhere.py"]).stdout
    assert script == "count.py" or "\u4e2d\u6587" in out


# Runs a script with what macOS and Windows lack taken away.
ELSEWHERE = """
import os, runpy, sys
for name in "sched_getaffinity", "sched_setaffinity", "posix_fadvise", "memfd_create", "process_cpu_count":
    if hasattr(os, name):
        delattr(os, name)
sys.modules["resource"] = None
sys.argv = sys.argv[1:]
sys.path.insert(0, os.path.dirname(sys.argv[0]))
runpy.run_path(sys.argv[0], run_name="__main__")
"""
