"""sample.py: what it writes from, and what it says of a model and of text."""

import json
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import count
import sample
from model import GPT
from pdl import pdl_weights

FLAGS = ["--max_new_tokens", 8, "--num_samples", 2, "--device", "cpu", "--dtype", "float32"]


@pytest.fixture
def write(run_here, tiny, tmp_path):
    """write(*flags): what sample.py prints with tiny/."""
    def write(*flags, ok=True):
        return run_here("sample.py", "--init_from", tiny, *FLAGS, *flags, cwd=tmp_path, ok=ok)

    return write


# --- writing ---


def test_the_same_seed_writes_the_same(write):
    first, again, other = (write("--prompt", "The", "--seed", seed).stdout for seed in (1, 1, 2))
    assert first == again != other and first.count("The") >= 2


def test_a_prompt_is_a_text_a_file_or_standard_input(run, write, tiny, tmp_path):
    (tmp_path / "prompt.txt").write_text("the quick", encoding="utf-8")
    expected = write("--prompt", "the quick").stdout
    assert write("--prompt", "FILE:prompt.txt").stdout == expected
    flags = "--init_from", tiny, *FLAGS, "--prompt", "-"
    assert run("sample.py", *flags, cwd=tmp_path, input="the quick").stdout == expected


def test_an_empty_prompt_is_the_beginning_of_a_text(write, tiny, tokenizer):
    out = write("--prompt", "", "--num_samples", 1, "--temperature", 0).stdout
    idx = torch.tensor([[tokenizer.eot_token]])
    expected = GPT.from_pretrained(tiny).generate(idx, 8, temperature=0)[0, 1:].tolist()
    assert out.startswith(tokenizer.decode(expected))


def test_what_is_written_ends_with_the_text(tiny, tokenizer):
    """An end of text is where a sample stops; prompts of several lengths come back in their order."""
    model = GPT.from_pretrained(tiny).eval()
    bias = torch.zeros(4096)
    bias[tokenizer.eot_token] = 1e4
    assert sample.write(model, [[1, 2], [3]], 5, tokenizer.eot_token, 0, logit_bias=bias) == [[], []]
    prompts = [[5, 6], [7], [8, 9]]
    rows = sample.write(model, prompts, 5, tokenizer.eot_token, 0, temperature=0)
    for prompt, row in zip(prompts, rows):
        assert row == model.generate(torch.tensor([prompt]), 5, temperature=0)[0, len(prompt) :].tolist()


def test_shift_adds_a_multiple_of_log_frequency_to_the_logits(write, tiny, tokenizer, tmp_path):
    counts = np.random.default_rng(0).integers(0, 10**6, 4096)
    counts[:5] = 0
    np.save(tmp_path / "counts.npy", counts)
    model, prompt = GPT.from_pretrained(tiny).eval(), tokenizer.encode_ordinary("The")
    expected = []
    with torch.no_grad():
        for _ in range(8):  # one greedy token after another; never counted is taken as counted once
            logits = model(torch.tensor([prompt + expected]))[0, -1]
            logits -= 0.5 * torch.from_numpy(np.maximum(counts, 1)).log()
            expected.append(logits.argmax().item())
    flags = "--prompt", "The", "--temperature", 0, "--num_samples", 1
    shifted = write(*flags, "--counts", "counts.npy", "--shift", 0.5).stdout
    assert shifted.startswith("The" + tokenizer.decode(expected)) and shifted != write(*flags).stdout


def test_shift_has_the_effect_of_the_weights():
    """For a given context Eq. 5 is least at q(t) ~ w(t) p(t): that is what the shift makes of p."""
    counts, logits = np.array([1, 10, 100, 1000]), torch.randn(4, generator=torch.manual_seed(0))
    q = pdl_weights(counts, 0.5, eps=0) * logits.softmax(0)
    torch.testing.assert_close((logits + sample.shift(counts, 0.5)).softmax(0), q / q.sum())


@pytest.mark.parametrize("flags, culprit", [
    (["--temperature", "nan"], "--temperature"), (["--temperature", "-1"], "--temperature"),
    (["--seed", "-1"], "--seed"),
    (["--top_p", "0"], "--top_p"), (["--top_k", "0"], "--top_k"), (["--num_samples", "0"], "--num_samples"),
    (["--shift", "1"], "--counts"), (["--counts", "a.npy"], "--shift"),
    (["--counts", "a.npy", "--shift", "inf"], "--shift"),
])
def test_a_wrong_flag_ends_in_one_line(write, one_line, flags, culprit):
    one_line(write(*flags, ok=False), culprit, status=2)


@pytest.mark.parametrize("flags, culprit", [
    (["--init_from", "none"], "none"), (["--init_from", "gpt2"], "gpt2"),
    (["--prompt", "FILE:none.txt"], "none.txt"),
    (["--counts", "none.npy", "--shift", "1"], "none.npy"), (["--device", "tpu"], "--device tpu"),
])
def test_what_is_not_there_is_named_in_one_line(write, one_line, flags, culprit):
    one_line(write(*flags, ok=False), culprit)


# --- on every machine ---


@pytest.mark.parametrize("script", ["count.py", "train.py", "sample.py"])
def test_what_is_printed_is_utf8_whatever_the_system_prefers(run, text, small, tiny, script):
    """As on Windows, where what is read and printed is cp1252 unless told otherwise."""
    name = "na\u00efve \u4e2d\u6587.txt"
    (text / name).write_bytes((text / "text.txt").read_bytes() + "caf\u00e9 \u4e2d\u6587 ".encode() * 99)
    flags = {
        "count.py": [name, "--tokenizer", tiny, "-o", "\u4e2d\u6587.npy"],
        "train.py": [*small, "--data", name, "--max_iters", 1],
        "sample.py": ["--init_from", tiny, *FLAGS, "--prompt", f"FILE:{name}"],
    }[script]
    cp1252 = {"PYTHONUTF8": "0", "PYTHONIOENCODING": "cp1252"}
    assert "\u4e2d\u6587" in run(script, *flags, cwd=text, env=cp1252).stdout  # read as UTF-8 here


@pytest.mark.parametrize("script", ["count.py", "train.py", "sample.py"])
def test_nothing_is_needed_that_linux_alone_has(run, root, text, small, tiny, script):
    flags = {
        "count.py": ["text.txt", "--tokenizer", tiny],
        "train.py": [*small, "--max_iters", 1],
        "sample.py": ["--init_from", tiny, *FLAGS],
    }[script]
    (text / "elsewhere.py").write_text(ELSEWHERE, encoding="utf-8")
    run(script, *flags, cwd=text, python=[text / "elsewhere.py"])


# Runs the script that it is given with what macOS and Windows lack taken away.
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


# --- how well a model predicts ---


def test_evaluation_is_cross_entropy_by_token_and_by_band(text, tiny, tokenizer):
    corpus = count.open_corpus(text / "text.txt", tokenizer, 32, text)
    model, windows = GPT.from_pretrained(tiny).eval(), corpus.held_out(7)
    counts = corpus.train_counts(4096)
    bands, weights = count.frequency_bands(counts), pdl_weights(counts, 0.5)
    scores = sample.evaluate(model, corpus, windows, 3, torch.autocast("cpu", enabled=False))
    result = sample.summarize(scores, weights, counts, bands, tokenizer)

    x, y = map(torch.from_numpy, corpus.sequences(windows))
    with torch.no_grad():
        logits = model(x)
    ce, y = F.cross_entropy(logits.transpose(1, 2), y, reduction="none").flatten(), y.flatten()
    assert result["val_ce"] == pytest.approx(ce.mean().item(), rel=1e-5)
    likeliest = logits.argmax(-1).flatten()
    assert result["accuracy"] == pytest.approx((likeliest == y).float().mean().item())
    for i, name in enumerate(count.BANDS):
        of_band = torch.from_numpy(bands)[y] == i
        assert result["ce_by_band"][name] == pytest.approx(ce[of_band].mean().item(), rel=1e-5)
        assert result["share_of_text"][name] == pytest.approx(of_band.float().mean().item())
        right, predicted = (likeliest == y)[of_band].sum(), (torch.from_numpy(bands)[likeliest] == i).sum()
        precision, recall = right / predicted.clamp(min=1), right / of_band.sum()
        f1 = 2 * precision * recall / (precision + recall).clamp(min=1e-9)
        assert result["f1_by_band"][name] == pytest.approx(f1.item(), rel=1e-5)
    counted = torch.from_numpy(counts)[y] > 0
    w = weights[y] * counted
    assert result["val_pdl"] == pytest.approx(((w * ce).sum() / w.sum()).item(), rel=1e-5)
    assert result["uncounted"] == (~counted).sum().item()
    n_bytes = len(tokenizer.decode_bytes(y.tolist()))
    assert result["bits_per_byte"] == pytest.approx(ce.sum().item() / n_bytes / math.log(2), rel=1e-5)


def scores_of(by_token):
    """Scores of targets, token: (how many, cross-entropy of each), in a vocabulary of tiny/'s size."""
    scores = sample.Scores(*torch.zeros(4, 4096, dtype=torch.float64))
    for token, (n, ce) in by_token.items():
        scores.n[token], scores.ce[token] = n, n * ce
    return scores


def test_held_out_pdl_leaves_out_what_was_never_counted(tokenizer):
    counts = np.zeros(4096, np.int64)
    counts[[7, 8]] = 100, 50
    weights, bands = pdl_weights(counts, 1), count.frequency_bands(counts)  # a million for all others
    result = sample.summarize(scores_of({7: (3, 2.0), 9: (1, 9.0)}), weights, counts, bands, tokenizer)
    assert result["val_pdl"] == pytest.approx(2.0) and result["uncounted"] == 1
    assert result["val_ce"] == pytest.approx((3 * 2 + 9) / 4)


def test_an_end_of_text_has_no_bytes(tokenizer):
    """In text it is nothing that anyone reads: of answers of a word each it would be most of the bytes."""
    counts, word = np.ones(4096, np.int64), tokenizer.encode_ordinary(" the")[0]
    bands = count.frequency_bands(counts)
    scores = scores_of({word: (10, 2.0), tokenizer.eot_token: (10, 1.0)})
    result = sample.summarize(scores, pdl_weights(counts, 0), counts, bands, tokenizer)
    assert result["bits_per_byte"] == pytest.approx(30 / (10 * len(" the")) / math.log(2))


# --- what is known of text ---


def test_measures_of_text():
    bands = np.array([0, 1, 2, 2])
    m = sample.measure_text([[0, 1, 0, 1, 0, 1, 0], [2, 2]], np.array([2, 1, 1, 0]), bands)
    assert m["distinct_1"] == pytest.approx(3 / 9) and m["distinct_2"] == pytest.approx(3 / 7)
    assert m["distinct_3"] == pytest.approx(2 / 5)
    assert m["repeated_4"] == pytest.approx(1 - 2 / 4)
    assert m["distinct_tokens"] == 3 and m["rare_share"] == pytest.approx(2 / 9)
    p, q = [4 / 9, 3 / 9, 2 / 9], [3 / 8, 2 / 8, 2 / 8]
    assert m["kl"] == pytest.approx(sum(a * math.log(a / b) for a, b in zip(p, q)))


def test_samples_of_nothing_have_measures_that_json_knows():
    """A model of pairs may end each answer where it begins."""
    m = sample.measure_text([[], []], np.array([2, 1, 1, 0]), np.array([0, 1, 2, 2]))
    json.loads(json.dumps(m), parse_constant=pytest.fail)


def test_what_to_take_is_the_cheapest_that_is_near_the_best():
    def taken(f1, **shifted):
        def result(x):
            return {"f1_by_band": {"rare": x}}

        reports = [{"alpha": alpha, "after": result(x), "shifted": {}} for alpha, x in f1.items()]
        reports[0]["shifted"] = {"0.25": result(x) for x in shifted.values()}
        return sample.what_to_take(reports)[:2]

    assert taken({0: 0.11, 0.25: 0.14, 0.5: 0.12}) == ("0.25", None)
    assert taken({0: 0.556, 0.25: 0.560, 0.5: 0.43}) == ("0", None)
    assert taken({0.5: 0.145, 0.25: 0.142, 0: 0.11}) == ("0.25", None)
    assert taken({0: 0.11, 0.25: 0.14}, shift=0.137) == ("0", "0.25")  # costs no training
    assert taken({0: 0.11, 0.25: 0.14}, shift=0.131) == ("0.25", None)


def test_the_sentence_below_the_table_reads_it_aloud():
    def measured(ce, *by_band):
        return {"val_ce": ce, "ce_by_band": dict(zip(count.BANDS, by_band))}

    said = sample.in_words({"before": measured(5.0, 4.0, 6.0, 8.0), "after": measured(4.5, 4.1, 5.5, 7.35)})
    for part in "rare tokens 0.65 nats better", "frequent tokens 0.10 nats worse", "all tokens 0.50 nats":
        assert part in said
