"""model.py against what Transformers computed and saved (tests/golden), bad files, and a hub on loopback."""

import io
import json
import os
import pickle
import shutil
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch

from model import GPT, checkpoint_folder, read_safetensors, sample_token

ROOT = Path(__file__).parent.parent
GOLDEN = ROOT / "tests/golden/transformers5"
PADDED = ROOT / "tests/golden/transformers4"  # with a padded vocabulary, n_inner, n_ctx alone, other fields
both = pytest.mark.parametrize("golden", [GOLDEN, PADDED], ids=["Transformers 5", "Transformers 4"])
SAFE, BIN = "model.safetensors", "pytorch_model.bin"


def checkpoint(folder, file=SAFE, content=(GOLDEN / SAFE).read_bytes()):
    """A copy of the golden checkpoint, with another file in it."""
    shutil.copytree(GOLDEN, folder)
    if file == BIN:
        (folder / SAFE).unlink()
    (folder / file).write_bytes(content)
    return folder


def pickled(state, zip_archive=True):
    """The bytes of a pytorch_model.bin. Those of 2019 are no zip archives."""
    buffer = io.BytesIO()
    torch.save(state, buffer, _use_new_zipfile_serialization=zip_archive)
    return buffer.getvalue()


def safetensors(state, pad=0):
    """The bytes of a model.safetensors, its header longer by pad spaces."""
    header, data, codes = {}, b"", {4: "F32", 2: "F16", 1: "BOOL"}
    for name, w in state.items():
        start, code = len(data), "BF16" if w.dtype == torch.bfloat16 else codes[w.itemsize]
        data += w.contiguous().flatten().view(torch.uint8).numpy().tobytes()
        header[name] = {"dtype": code, "shape": list(w.shape), "data_offsets": [start, len(data)]}
    text = json.dumps(header).encode() + b" " * pad
    return len(text).to_bytes(8, "little") + text + data


def assert_logits(name, golden=GOLDEN, atol=2e-5):
    """They are those of Transformers."""
    expected = torch.load(golden / "expected.pt", weights_only=True)
    model = GPT.from_pretrained(name).eval()
    torch.testing.assert_close(model(expected["idx"]), expected["logits"], rtol=0, atol=atol)
    return model, expected


def refused(folder, culprit, error=ValueError):
    """Opening it ends in one line that names the culprit."""
    with pytest.raises(error) as info:
        GPT.from_pretrained(folder)
    assert culprit in str(info.value) and "\n" not in str(info.value), info.value


# --- checkpoints as people have them ---

STATE = read_safetensors(GOLDEN / SAFE)
WTE = "transformer.wte.weight"
HALF, BHALF = ({name: w.to(dtype) for name, w in STATE.items()} for dtype in (torch.float16, torch.bfloat16))
TIED = STATE | {"lm_head.weight": STATE[WTE], "transformer.h.0.attn.bias": torch.ones(1, 1, 12, 12).bool()}
RELEASED = {name.removeprefix("transformer."): w for name, w in STATE.items()}  # no prefix, but masks
RELEASED |= {f"h.{i}.attn.bias": torch.ones(1, 1, 12, 12).tril() for i in range(2)}
RELEASED |= {f"h.{i}.attn.masked_bias": torch.tensor(-1e4) for i in range(2)}


@pytest.mark.parametrize("file, content, atol", [
    *((SAFE, safetensors(RELEASED, pad), 2e-5) for pad in range(4)),  # three of them have unaligned tensors
    (SAFE, safetensors(TIED), 2e-5), (SAFE, safetensors(HALF), 0.02), (SAFE, safetensors(BHALF), 0.2),
    *((BIN, pickled(state, zipped), 2e-5) for state in (RELEASED, TIED) for zipped in (True, False)),
    (BIN, pickled(HALF), 0.02), (BIN, pickled(BHALF), 0.2),
], ids=lambda value: value if isinstance(value, str) else "")
def test_logits_of_all_layouts_are_those_of_transformers(file, content, atol, tmp_path):
    model, _ = assert_logits(checkpoint(tmp_path / "a", file, content), atol=atol)
    assert model.lm_head.dtype == torch.float32


@both
def test_logits_and_greedy_tokens_are_those_of_transformers(golden):
    model, expected = assert_logits(golden, golden)
    assert torch.equal(model.generate(expected["idx"][:, :3], 9, temperature=0), expected["greedy"])


@both
def test_what_was_loaded_is_saved(golden, tmp_path):
    GPT.from_pretrained(golden).save_pretrained(tmp_path)
    assert {p.name for p in tmp_path.iterdir()} == {"config.json", "generation_config.json", SAFE}
    for name in "config.json", "generation_config.json":
        loaded, saved = (json.loads((folder / name).read_bytes()) for folder in (golden, tmp_path))
        assert saved | loaded == saved
    loaded, saved = (read_safetensors(folder / SAFE) for folder in (golden, tmp_path))
    assert loaded.keys() == saved.keys() and all(torch.equal(loaded[name], saved[name]) for name in saved)
    data = (tmp_path / SAFE).read_bytes()
    assert int.from_bytes(data[:8], "little") % 8 == 0  # aligned
    assert b'"__metadata__": {"format": "pt"}' in data


# --- generation and training ---


def test_generation_with_the_cache_is_generation_without_it():
    model = GPT.from_pretrained(GOLDEN).eval()
    expected = torch.tensor([[1, 2, 3], [4, 5, 6]])
    for _ in range(30):  # well past the context window of 12
        expected = torch.cat((expected, model(expected[:, -12:])[:, -1].argmax(-1, keepdim=True)), dim=1)
    model.train()  # generation drops out nothing, and leaves the model as it was
    assert torch.equal(model.generate(expected[:, :20], 13, temperature=0), expected)
    for how in {"temperature": 0}, {"temperature": 1e-38}, {"top_k": 1}, {"top_p": 1e-9}, {"top_p": 1e-300}:
        assert torch.equal(model.generate(expected[:, :3], 30, **how), expected)
    assert model.training


def test_tokens_are_drawn_as_often_as_transformers_would():
    """With temperature, then top_k, then top_p, renormalized."""
    golden = torch.load(ROOT / "tests/golden/warped.pt", weights_only=True)
    torch.manual_seed(0)
    for how, (p,) in golden["warped"]:
        tokens = sample_token(golden["logits"].expand(20_000, -1), **how)
        drawn = torch.bincount(tokens, minlength=40) / 20_000
        torch.testing.assert_close(drawn, p, rtol=0, atol=0.015, msg=str(how))
        assert not drawn[p == 0].any() and drawn[p > 0.001].all(), how


def test_top_p_of_a_large_vocabulary():
    """Rows that need different numbers of tokens."""
    logits = torch.tensor([[-0.002], [-0.2]]) * torch.arange(5000)
    p = logits.softmax(-1)
    for top_p in 0.5, 0.99:
        kept = (p.cumsum(-1) - p < top_p).sum(-1)  # how many of the first tokens, which are the likeliest
        for largest, n in zip(sample_token(logits.repeat(2000, 1), top_p=top_p).view(-1, 2).amax(0), kept):
            assert 0.95 * n - 2 < largest < n


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_writes_what_float32_writes(dtype):
    """On trained weights 95% of the greedy tokens are the same, and one row is as one of several."""
    exact, half = (GPT.from_pretrained(ROOT / "tiny").eval().to(to) for to in (torch.float32, dtype))
    torch.manual_seed(0)
    idx = exact.generate(torch.full((8, 1), 4095), 64)
    assert (exact(idx).argmax(-1) == half(idx).argmax(-1)).float().mean() >= 0.95
    rows = half.generate(idx[:2, :8], 8, temperature=0)
    assert torch.equal(half.generate(idx[:1, :8], 8, temperature=0), rows[:1])


def test_dropout():
    model, idx = GPT.from_pretrained(GOLDEN).train(), torch.arange(12)[None]
    for p, is_same in (0.5, False), (0.0, True):
        model.set_dropout(p)
        assert torch.equal(model(idx), model(idx)) == is_same
    model.h[0].attn.dropout.p = 0.5
    assert not torch.equal(model(idx), model(idx))  # attention drops out, too


# --- bad files ---


class Malicious:
    def __reduce__(self):
        return os.mkdir, ("code ran",)


def headers():
    """Of safetensors, all of them wrong."""
    tensor = {"dtype": "F32", "shape": [31, 12], "data_offsets": [0, 1488]}
    changes = [
        {"dtype": []}, {"dtype": "I8", "data_offsets": [0, 372]}, {"shape": [31, 13]}, {"shape": [-1, 12]},
        {"shape": [[31], [12]]}, {"shape": [2**70, 0], "data_offsets": [0, 0]}, {"data_offsets": [-1488, 0]},
        {"data_offsets": [0, 2**42]}, {"data_offsets": [1488, 0]}, {"data_offsets": [0.0, 1488.0]},
        {"data_offsets": ["0", [1488]]}]
    wrong = [tensor | change for change in changes]
    wrong += [{name: tensor[name] for name in tensor if name != left_out} for left_out in tensor]
    texts = [json.dumps(header).encode() for header in ([], [WTE], 3, {WTE: 3}, *({WTE: w} for w in wrong))]
    return [len(text).to_bytes(8, "little") + text for text in (b"{]}]", b"\xff", b"[" * 100_000, *texts)]


WPE = "transformer.wpe.weight"
UNFIT = [  # weights of another network
    {name: w for name, w in STATE.items() if name != WPE},
    *(STATE | {WPE: w} for w in (torch.ones(13, 12), torch.tensor(1.0))),
    *(STATE | {WPE: torch.full((12, 12), number)} for number in (torch.nan, torch.inf)),
    *(STATE | {name: torch.ones(12)} for name in ("transformer.h.2.ln_1.weight", "a\nb")),
]
NO_STATE = [
    Malicious(), STATE | {"a": Malicious()}, [], 3, STATE[WTE], {1: STATE[WTE]}, {"state_dict": STATE},
    STATE | {WTE: STATE[WTE].to_sparse()}, STATE | {WTE: STATE[WTE].to("meta")}]
OTHER_CONFIGS = {
    "model_type": "t5", "activation_function": "relu", "scale_attn_by_inverse_layer_idx": True,
    "tie_word_embeddings": False, "n_head": 5, "n_embd": None, "n_layer": -1, "n_inner": "wide",
    "vocab_size": 10**30, "layer_norm_epsilon": "x"}
CONFIG = json.loads((GOLDEN / "config.json").read_bytes())


@pytest.mark.parametrize("file, content", [
    *((SAFE, start + bytes(1488)) for start in headers()),
    *((SAFE, content) for content in (b"", b"\2\0\0\0\0", b"\xff" * 8 + b"{}", bytes(7) + b"\x40")),
    *((BIN, content) for content in (b"", b"PK\3\4", b"\x80\2}q\0.", pickle.dumps(Malicious(), protocol=2))),
    *((SAFE, safetensors(STATE)[:-n]) for n in (1, 999)), *((BIN, pickled(STATE)[:-n]) for n in (1, 999)),
    *((SAFE, safetensors(state)) for state in UNFIT), *((BIN, pickled(state)) for state in UNFIT),
    *((BIN, pickled(state, zipped)) for zipped in (True, False) for state in NO_STATE),
    *((name, content) for name in ("config.json", "generation_config.json")
      for content in (b"", b"[]", b"3", b"[" * 100_000)),
    *(("config.json", json.dumps(CONFIG | {name: value}).encode()) for name, value in OTHER_CONFIGS.items()),
], ids=lambda value: value if isinstance(value, str) else str(value[8:60]))
def test_a_bad_file_is_one_line_and_runs_no_code(file, content, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    refused(checkpoint(tmp_path / "a", file, content), file)
    assert not (tmp_path / "code ran").exists()


@pytest.mark.parametrize("files", [
    [], ["config.json"], ["adapter_config.json", "adapter_model.safetensors"],
    ["config.json", "model.safetensors.index.json"], ["checkpoint-500/config.json", "checkpoint-500/" + SAFE],
], ids=str)
def test_a_folder_that_is_no_checkpoint_is_one_line(files, tmp_path):
    for name in files:
        (tmp_path / "a" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "a" / name).write_text("{}", encoding="utf-8")
    refused(tmp_path / "a", str(tmp_path / "a"), OSError)


# --- downloads ---


class Answer(BaseHTTPRequestHandler):
    """As the hub: small files by a redirect to a relative address, weights by one to a signed address."""

    def do_GET(self):
        hub, (path, _, signature) = self.server, self.path.partition("?")
        name = path[1:].removeprefix("cache/").replace("/resolve/main/", "/")
        hub.asked.append(path)
        if name not in hub.files:
            return self.send_error(404)
        data, weights = hub.files[name], name.endswith((SAFE, BIN))
        if "/resolve/main/" in path:
            self.send_response(302)
            self.send_header("Location", weights * hub.address + f"/cache/{name}" + weights * "?signed")
            data = b"Found. Redirecting"
        else:
            self.send_response(403 if weights and not signature else 200)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data[: len(data) - hub.missing * bool(signature)])


class Hub(ThreadingHTTPServer):
    """files: {"OWNER/NAME/FILE": content}. asked: the paths asked for. missing: bytes cut off weights."""

    missing = 0

    def serve(self, repo, *names):
        """The golden checkpoint's files. Nothing here reads those of the tokenizer, so they are empty."""
        for name in names:
            golden = (GOLDEN / name).read_bytes() if (GOLDEN / name).exists() else b"{}"
            self.files[f"{repo}/{name}"] = pickled(STATE) if name == BIN else golden


@pytest.fixture
def hub(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    monkeypatch.setenv("HF_HOME", str(tmp_path / "huggingface"))
    monkeypatch.delenv("HF_HUB_CACHE", raising=False)
    with Hub(("127.0.0.1", 0), Answer) as hub:
        hub.files, hub.asked, hub.address = {}, [], f"http://127.0.0.1:{hub.server_port}"
        monkeypatch.setenv("HF_ENDPOINT", hub.address)
        threading.Thread(target=hub.serve_forever, args=(0.01,), daemon=True).start()
        yield hub
        hub.shutdown()


def downloaded(tmp_path):
    return sorted(p.name for p in (tmp_path / "torch").rglob("*") if p.is_file())


TEXTS = ["config.json", "generation_config.json", "merges.txt", "vocab.json"]
WHOLE = sorted([*TEXTS, SAFE])


@pytest.mark.parametrize("name, repo, files", [
    ("gpt2", "openai-community/gpt2", WHOLE), ("distilgpt2", "distilbert/distilgpt2", WHOLE),
    ("a/b", "a/b", WHOLE), ("a/b", "a/b", ["config.json", BIN, "tokenizer.json"])], ids=str)
def test_a_model_is_downloaded_once(name, repo, files, hub, tmp_path):
    """The other files that a model may have are not there. A tokenizer alone needs no weights."""
    hub.serve(repo, *files)
    checkpoint_folder(name, weights=False)
    assert downloaded(tmp_path) == [file for file in files if file not in (SAFE, BIN)]
    assert_logits(name)
    assert downloaded(tmp_path) == files
    hub.asked.clear()
    assert_logits(name)
    assert not hub.asked


def test_a_download_cut_short_leaves_nothing_that_looks_whole(hub, tmp_path):
    hub.serve("a/b", *WHOLE)
    hub.missing = 1000
    refused("a/b", SAFE, OSError)
    assert downloaded(tmp_path) == TEXTS
    hub.missing = 0
    assert_logits("a/b")


def test_what_is_no_gpt2_is_refused_before_its_weights_are_downloaded(hub, tmp_path):
    page, t5 = b"<html>Please log in.</html>", b'{"model_type": "t5"}'
    for repo, name, content, error in [
        ("a/b", "config.json", page, OSError), ("a/c", "config.json", b"[" * 100_000, OSError),
        ("a/d", "merges.txt", page, OSError), ("a/t5", "config.json", t5, ValueError)]:
        hub.serve(repo, *WHOLE)
        hub.files[f"{repo}/{name}"] = content
        refused(repo, repo.partition("/")[2], error)
    hub.serve("a/sharded", *TEXTS)
    refused("a/sharded", "a/sharded", OSError)
    refused("a/missing", "a/missing", OSError)
    assert SAFE not in downloaded(tmp_path)


@pytest.mark.parametrize("endpoint", ["http://127.0.0.1:1", "http://no.invalid", "hub", "http://127.0.0.1:x"])
def test_without_a_network_one_line_says_so(endpoint, hub, monkeypatch):
    monkeypatch.setenv("HF_ENDPOINT", endpoint)
    refused("gpt2", "gpt2", OSError)
    monkeypatch.setenv("TORCH_HOME", str(GOLDEN / SAFE))  # a file, in which no folder can be made
    refused("gpt2", "gpt2", OSError)


def snapshot(cache, repo):
    """The golden checkpoint in Hugging Face's cache."""
    folder = cache / f"models--{repo}/snapshots/607a30d7"
    shutil.copytree(GOLDEN, folder)
    (cache / f"models--{repo}/refs").mkdir()
    (cache / f"models--{repo}/refs/main").write_text("607a30d7", encoding="utf-8")
    return folder


@pytest.mark.parametrize("variable, below", [("HF_HOME", "hub"), ("HF_HUB_CACHE", "")])
@pytest.mark.parametrize("name, repo", [
    ("gpt2", "gpt2"), ("gpt2", "openai-community--gpt2"), ("a/b", "a--b")])
def test_hugging_faces_cache_is_used_offline(name, repo, variable, below, hub, tmp_path, monkeypatch):
    monkeypatch.setenv(variable, str(tmp_path / "other"))
    folder = snapshot(tmp_path / "other" / below, repo)
    assert_logits(name)
    assert checkpoint_folder(name) == folder and not hub.asked


@pytest.mark.parametrize("lacks", [SAFE, "config.json", "../../refs/main"])
def test_an_incomplete_snapshot_is_not_used(lacks, hub, tmp_path):
    hub.serve("a/b", *WHOLE)
    (snapshot(tmp_path / "huggingface/hub", "a--b") / lacks).unlink()
    assert_logits("a/b")
    assert downloaded(tmp_path) == WHOLE
