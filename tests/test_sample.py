"""sample.py: what it generates, from what prompt, and the shift. Unicode everywhere."""

import numpy as np
import pytest
import torch

from model import GPT
from pdl import pdl_weights

FLAGS = ["--max_new_tokens", 8, "--num_samples", 2, "--device", "cpu", "--dtype", "float32"]


@pytest.fixture
def write(run, tiny, tmp_path):
    """write(*flags): what sample.py prints with tiny/."""
    def write(*flags, **options):
        return run("sample.py", "--init_from", tiny, *FLAGS, *flags, cwd=tmp_path, **options).stdout

    return write


def test_the_same_seed_writes_the_same(write):
    first, again, other = (write("--prompt", "The", "--seed", seed) for seed in (1, 1, 2))
    assert first == again != other and first.count("The") >= 2


@pytest.mark.parametrize("prompt", ["", "<|endoftext|>"])
def test_an_empty_prompt_or_an_end_of_text_starts_a_new_text(write, tiny, tokenizer, prompt):
    out = write("--prompt", prompt, "--num_samples", 1, "--temperature", 0)
    idx = torch.tensor([[tokenizer.eot_token]])
    expected = GPT.from_pretrained(tiny).generate(idx, 8, temperature=0)[0, 1:].tolist()
    assert out.startswith(prompt + tokenizer.decode(expected))


def test_shift_has_the_effect_of_the_weights(write, tiny, tokenizer, tmp_path):
    """Eq. 5 is minimized by q(t) ~ w(t) p(t), and the shift makes this q of p. Unseen is the rarest."""
    counts = np.random.default_rng(0).integers(0, 10**6, 4096)
    counts[:5] = 0
    counts[5] = 30
    np.save(tmp_path / "counts.npy", counts)
    w = pdl_weights(np.maximum(counts, 30), 0.5, eps=0)
    model, tokens = GPT.from_pretrained(tiny).eval(), tokenizer.encode_ordinary("The")
    with torch.no_grad():
        for _ in range(8):  # one greedy token after another
            q = w * model(torch.tensor([tokens]))[0, -1].softmax(-1)
            tokens.append(q.argmax().item())
    flags = "--prompt", "The", "--temperature", 0, "--num_samples", 1
    shifted = write(*flags, "--counts", "counts.npy", "--shift", 0.5)
    assert shifted.startswith(tokenizer.decode(tokens)) and shifted != write(*flags)


# --- on every machine ---


def test_names_and_texts_may_be_unicode_where_the_console_is_not(start, text, small):
    """As on Windows, where it is cp1252 unless told otherwise."""
    name = "na\u00efve \u4e2d\u6587.txt"
    (text / name).write_bytes((text / "text.txt").read_bytes() + "caf\u00e9 \u4e2d\u6587 ".encode() * 99)
    train = "train.py", *small, "--data", name, "--max_iters", 1, "--out_dir", "\u4e2d"
    write = "sample.py", "--init_from", "\u4e2d", *FLAGS, "--prompt", name
    for command in train, write:
        process = start(*command, cwd=text, env={"PYTHONUTF8": "0", "PYTHONIOENCODING": "cp1252"})
        stdout, stderr = process.communicate()
        assert process.returncode == 0 and "\u4e2d\u6587" in stdout, stderr
