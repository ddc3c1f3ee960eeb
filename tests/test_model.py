"""model.py against what Transformers' GPT-2 computed and saved (tests/golden, by tests/make_golden.py)."""

import http.server
import json
import os
import shutil
import threading
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

import model as model_module
from model import GPT, GPTConfig, pick_device, pick_dtype, read_config, sampling_dtype

ROOT = Path(__file__).parent.parent
GOLDEN = ROOT / "tests/golden"
WEIGHTS = "model.safetensors"


def read(folder):
    """The tensors of a model.safetensors, by the letter of the format: not as model.py reads them."""
    data = (Path(folder) / WEIGHTS).read_bytes()
    start = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:start])
    assert header.pop("__metadata__") == {"format": "pt"}
    assert all((start + t["data_offsets"][0]) % 4 == 0 for t in header.values())  # aligned
    dtypes = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
    raw = {name: bytearray(data[start:][slice(*t["data_offsets"])]) for name, t in header.items()}
    return {name: torch.frombuffer(raw[name], dtype=dtypes[t["dtype"]]).view(t["shape"])
            for name, t in header.items()}


def safetensors(state, pad=0):
    """The bytes of a file that holds the state, its header longer by pad spaces."""
    header, data = {}, b""
    for name, w in state.items():
        code = {"float32": "F32", "float16": "F16", "bfloat16": "BF16", "bool": "BOOL"}[str(w.dtype)[6:]]
        raw = w.contiguous().flatten().view(torch.uint8).numpy().tobytes()
        offsets = [len(data), len(data) + len(raw)]
        header[name] = {"dtype": code, "shape": list(w.shape), "data_offsets": offsets}
        data += raw
    text = json.dumps(header).encode() + b" " * pad
    return len(text).to_bytes(8, "little") + text + data


def copy_golden(folder, write=None):
    """A copy of the golden checkpoint; with write, its weights written by write(state, folder)."""
    shutil.copytree(GOLDEN, folder)
    if write:
        (folder / WEIGHTS).unlink()
        write(read(GOLDEN), folder)
    return folder


def released(state):
    """The names of openai-community/gpt2: no prefix, the causal masks, no lm_head."""
    state = {name.removeprefix("transformer."): w for name, w in state.items()}
    for i in range(2):
        state[f"h.{i}.attn.bias"] = torch.ones(1, 1, 12, 12).tril()
        state[f"h.{i}.attn.masked_bias"] = torch.tensor(-1e4)
    return state


def as_released(state, folder):
    data = next(data for data in (safetensors(released(state), pad) for pad in range(8)) if data[0] % 8 == 3)
    (folder / WEIGHTS).write_bytes(data)


def with_bool_masks_and_lm_head(state, folder):
    masks = {f"transformer.h.{i}.attn.bias": torch.ones(1, 1, 12, 12).tril().bool() for i in range(2)}
    state = masks | state | {"lm_head.weight": state["transformer.wte.weight"]}
    (folder / WEIGHTS).write_bytes(safetensors(state))


def as_zip(state, folder):
    torch.save(state | {"lm_head.weight": state["transformer.wte.weight"]}, folder / "pytorch_model.bin")


def as_in_2019(state, folder):
    torch.save(released(state), folder / "pytorch_model.bin", _use_new_zipfile_serialization=False)


def logits_of(folder):
    golden = torch.load(GOLDEN / "logits.pt", weights_only=True)
    return GPT.from_pretrained(folder).eval()(golden["idx"]), golden["logits"]


@pytest.mark.parametrize("write", [None, as_released, with_bool_masks_and_lm_head, as_zip, as_in_2019])
def test_logits_are_those_of_transformers(write, tmp_path):
    torch.testing.assert_close(*logits_of(copy_golden(tmp_path / "a", write)), rtol=0, atol=2e-5)


@pytest.mark.parametrize("dtype, atol", [(torch.float16, 0.02), (torch.bfloat16, 0.2)], ids=str)
def test_half_precision_is_opened_as_float32(dtype, atol, tmp_path):
    half = {name: w.to(dtype) for name, w in read(GOLDEN).items()}
    folder = copy_golden(tmp_path / "a")
    (folder / WEIGHTS).write_bytes(safetensors(half))
    torch.testing.assert_close(*logits_of(folder), rtol=0, atol=atol)
    GPT.from_pretrained(folder).save_pretrained(tmp_path / "b", dtype=dtype)
    assert all(torch.equal(w, half[name]) for name, w in read(tmp_path / "b").items())


def test_saved_as_transformers_saves_it(tmp_path):
    GPT.from_pretrained(GOLDEN).save_pretrained(tmp_path)
    theirs, ours = read(GOLDEN), read(tmp_path)
    assert theirs.keys() == ours.keys()  # without lm_head, which is wte
    assert all(torch.equal(theirs[name], w) for name, w in ours.items())
    assert read_config(tmp_path) == read_config(GOLDEN)
    assert {p.name for p in tmp_path.iterdir()} == {"config.json", WEIGHTS}  # no part is left


def test_generation_with_the_cache_is_generation_without_it():
    model = GPT.from_pretrained(GOLDEN).eval()
    idx = torch.tensor([[1, 2, 3], [4, 5, 6]])
    expected = idx
    for _ in range(30):  # well past the context window of 12
        expected = torch.cat((expected, model(expected[:, -12:])[:, -1].argmax(-1, keepdim=True)), dim=1)
    assert torch.equal(model.generate(idx, 30, temperature=0), expected)
    assert torch.equal(model.generate(idx, 30, top_k=1), expected)
    assert torch.equal(model.generate(idx, 30, top_p=1e-9), expected)


def test_top_k_and_top_p_keep_what_they_say():
    logits = torch.tensor([[0.1, 0.4, 0.2, 0.3]]).log()

    def kept(top_k=None, top_p=None, logits=logits):
        return (model_module._truncate(logits, top_k, top_p) > -torch.inf).nonzero()[:, 1].tolist()

    assert kept(top_k=2) == [1, 3]
    assert len(kept(top_k=2, logits=torch.zeros(1, 4))) == 2  # half precision makes many equal
    assert kept(top_p=0.65) == [1, 3]
    assert kept(top_p=0.75) == [1, 2, 3]
    assert kept(top_k=9, top_p=1.0) == [0, 1, 2, 3]
    # More tokens than are looked at first.
    steep = -0.002 * torch.arange(5000.0)[None]
    p = steep.softmax(-1)
    assert len(kept(top_p=0.5, logits=steep)) == (p.cumsum(-1) - p < 0.5).sum() < 1000
    assert len(kept(top_p=0.99, logits=steep)) == (p.cumsum(-1) - p < 0.99).sum() > 1000


def test_tokens_are_drawn_as_often_as_they_are_likely():
    p = torch.tensor([0.0, 0.5, 0.25, 0.0, 0.25, 0.0])
    torch.manual_seed(0)
    drawn = torch.bincount(model_module._draw(p.expand(20_000, -1)), minlength=6) / 20_000
    torch.testing.assert_close(drawn, p, rtol=0, atol=0.02)
    assert (drawn > 0).tolist() == (p > 0).tolist()


def test_the_lower_the_temperature_the_likelier_the_token():
    model, idx = GPT.from_pretrained(GOLDEN).eval(), torch.tensor([[1, 2, 3]])
    for how in {"temperature": 1e-4}, {"temperature": 1e-38}, {"temperature": 1e-46}, {"top_p": 1e-300}:
        assert torch.equal(model.generate(idx, 5, **how), model.generate(idx, 5, temperature=0))


def test_logit_bias_is_added_before_temperature():
    model = GPT.from_pretrained(GOLDEN).eval()
    idx = torch.tensor([[1, 2, 3]])
    logits = model(idx)[0, -1]
    second = logits.topk(2).indices[1]
    bias = F.one_hot(second, 31) * (logits.max() - logits[second] + 0.1)
    assert model.generate(idx, 1, temperature=0, logit_bias=bias)[0, -1] == second
    assert model.generate(idx, 1, temperature=1e-3, logit_bias=bias)[0, -1] == second


def test_what_generate_returns_can_be_trained_on():
    model = GPT.from_pretrained(GOLDEN).train()
    idx = model.generate(torch.tensor([[1, 2]]), 8)
    assert model.training
    F.cross_entropy(model(idx[:, :-1]).flatten(0, 1), idx[:, 1:].flatten()).backward()
    assert all(p.grad is not None for p in model.parameters())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_writes_what_float32_writes(dtype):
    """On trained weights: 95% of the greedy tokens, cross-entropy to 0.3%; one row is as one of several."""
    exact = GPT.from_pretrained(ROOT / "tiny").eval()
    torch.manual_seed(0)
    idx = exact.generate(torch.full((8, 1), exact.config.vocab_size - 1), 64)
    half = GPT.from_pretrained(ROOT / "tiny").eval().to(dtype)
    with torch.no_grad():
        logits, half_logits = (m(idx[:, :-1]).float().flatten(0, 1) for m in (exact, half))
    assert (logits.argmax(-1) == half_logits.argmax(-1)).float().mean() >= 0.95
    ce, half_ce = (F.cross_entropy(x, idx[:, 1:].flatten()).item() for x in (logits, half_logits))
    assert half_ce == pytest.approx(ce, rel=0.003)
    rows = half.generate(idx[:2, :8], 8, temperature=0)
    assert torch.equal(half.generate(idx[:1, :8], 8, temperature=0), rows[:1])
    assert torch.backends.mkldnn.enabled


def test_the_dtype_to_sample_in():
    cpu = torch.device("cpu")
    assert sampling_dtype("float32", cpu, True) == torch.float32  # every bit
    assert sampling_dtype("auto", cpu, True) != torch.float32
    assert sampling_dtype("auto", cpu, False) == pick_dtype("auto", cpu)


def test_dropout_and_checkpointing():
    model = GPT.from_pretrained(GOLDEN).train()
    idx = torch.arange(12)[None]
    model.set_dropout(0.5)
    assert not torch.equal(model(idx), model(idx))
    model.set_dropout(0.0)
    calls = []
    for block in model.h:
        block.mlp.register_forward_pre_hook(lambda *args: calls.append(1))
    plain = torch.autograd.grad(model(idx).square().sum(), model.wpe.weight)[0]
    assert len(calls) == 2  # nothing is computed twice unless asked for
    model.activation_checkpointing = True
    assert torch.equal(torch.autograd.grad(model(idx).square().sum(), model.wpe.weight)[0], plain)
    assert len(calls) == 6


def test_any_optimizer_takes_any_loss():
    model = GPT.from_pretrained(GOLDEN).train()
    before = model.wte.weight.clone()
    model(torch.tensor([[1, 2, 3]]), return_hidden=True).square().sum().backward()  # lm_head is not in it
    for optimizer in torch.optim.AdamW, torch.optim.RMSprop:
        optimizer(model.parameters()).step()
    assert not torch.equal(before, model.wte.weight)


def test_init_is_gpt2s():
    model = GPT(GPTConfig(vocab_size=500, n_positions=64, n_embd=64, n_layer=8, n_head=4))
    assert model.wte.weight.std().item() == pytest.approx(0.02, rel=0.05)
    assert model.h[0].mlp.c_proj.weight.std().item() == pytest.approx(0.02 / 4, rel=0.05)
    assert model.h[3].ln_1.weight.unique().tolist() == [1]
    assert model.h[3].attn.c_attn.bias.unique().tolist() == [0]


def refused(folder, culprit, error=ValueError):
    with pytest.raises(error, match=culprit) as info:
        GPT.from_pretrained(folder)
    assert "\n" not in str(info.value)
    return str(info.value)


@pytest.mark.parametrize("change, culprit", [
    (lambda s: {k: w for k, w in s.items() if "ln_f" not in k}, "lacks weight ln_f"),
    (lambda s: s | {"transformer.h.2.ln_1.weight": torch.ones(12)}, "unknown weight h.2.ln_1.weight"),
    (lambda s: s | {"transformer.wpe.weight": torch.ones(13, 12)}, "wpe.weight has shape"),
    (lambda s: s | {"lm_head.weight": torch.ones(31, 12)}, "lm_head.weight is not wte.weight"),
    (lambda s: s | {"a\nb": torch.ones(1)}, "unknown weight a"),
], ids=["lacking", "unknown", "shape", "untied", "line end"])
@pytest.mark.parametrize("file", [WEIGHTS, "pytorch_model.bin"])
def test_a_checkpoint_that_does_not_fit_is_refused(change, culprit, file, tmp_path):
    def write(state, folder):
        if file == WEIGHTS:
            (folder / file).write_bytes(safetensors(change(state)))
        else:
            torch.save(change(state), folder / file)

    assert file in refused(copy_golden(tmp_path / "a", write), culprit)


def entry(**changes):
    """A header of one entry, changed."""
    fields = {"dtype": "F32", "shape": [31, 12], "data_offsets": [0, 1488]} | changes
    return {"transformer.wte.weight": {name: value for name, value in fields.items() if value is not None}}


HOSTILE = {
    "empty": b"",
    "five bytes": b"\x02\0\0\0\0",
    "a length beyond the file": b"\xff" * 8 + b"{}",
    "2^62 bytes of header": (2**62).to_bytes(8, "little"),
    "no JSON": b"\x04\0\0\0\0\0\0\0{]}]",
    "no UTF-8": b"\x04\0\0\0\0\0\0\0\xff\xfe\xfd\xfc",
    "nesting": (100_000).to_bytes(8, "little") + b"[" * 100_000,
    "a list": [],
    "a number for a tensor": {"transformer.wte.weight": 3},
    "no dtype": entry(dtype=None),
    "no shape": entry(shape=None),
    "no offsets": entry(data_offsets=None),
    "another dtype": entry(dtype="I8", data_offsets=[0, 372]),
    "a dtype that is no name": entry(dtype=[]),
    "offsets beyond the end": entry(shape=[2**40, 12], data_offsets=[0, 2**40 * 48]),
    "offsets before the start": entry(data_offsets=[-1488, 0]),
    "offsets the wrong way": entry(data_offsets=[1488, 0]),
    "offsets that overlap": entry() | {"a": {"dtype": "F32", "shape": [1], "data_offsets": [4, 8]}},
    "a gap": entry(data_offsets=[8, 1496]),
    "fractions": entry(data_offsets=[0.0, 1488.0]),
    "three offsets": entry(data_offsets=[0, 4, 1488]),
    "a length that is not the shape's": entry(shape=[31, 13]),
    "a negative shape": entry(shape=[-31, -12]),
    "a shape that is no list": entry(shape="31"),
}


@pytest.mark.parametrize("content", HOSTILE.values(), ids=HOSTILE)
def test_a_hostile_safetensors_file_is_one_line(content, tmp_path):
    if not isinstance(content, bytes):
        text = json.dumps(content).encode()
        content = len(text).to_bytes(8, "little") + text + bytes(1488)
    folder = copy_golden(tmp_path / "a", lambda state, folder: (folder / WEIGHTS).write_bytes(content))
    assert WEIGHTS in refused(folder, "is damaged, or no safetensors file")


@pytest.mark.parametrize("n", [1, 1000, 17_000], ids=lambda n: f"{n} bytes short")
def test_a_file_cut_short_is_one_line(n, tmp_path):
    def cut(state, folder):
        (folder / WEIGHTS).write_bytes((GOLDEN / WEIGHTS).read_bytes()[:-n])

    refused(copy_golden(tmp_path / "a", cut), "bytes")


def test_other_folders_are_refused(tmp_path):
    folder = copy_golden(tmp_path / "a", lambda state, folder: None)
    assert "model.safetensors nor pytorch_model.bin" in refused(folder, "has neither", OSError)
    for content in b"", b"[]", b"\x80\x02}q\0.", b"PK\x03\x04":
        (folder / "pytorch_model.bin").write_bytes(content)
        refused(folder, "pytorch_model.bin")
    for content in "", "[]", '{"model_type": "t5"}', '{"n_head": 5}', '{"n_embd": null}', '{"n_head": 1e999}':
        (folder / "config.json").write_text(content, encoding="utf-8")
        refused(folder, "config.json")
    refused(tmp_path / "nowhere", "nowhere is neither", OSError)
    for name in "nonsense", "", "meta", "cuda:99":
        with pytest.raises(ValueError, match="--device"):
            pick_device(name)


def test_what_cannot_be_written_leaves_what_was_there(tmp_path):
    def write(path):
        path.write_bytes(b"half")
        raise OSError("disk full")

    (tmp_path / "a").write_bytes(b"old")
    with pytest.raises(OSError, match="could not be written"):
        model_module.replace(tmp_path / "a", write)
    assert [(p.name, p.read_bytes()) for p in tmp_path.iterdir()] == [("a", b"old")]


class Hub:
    """The golden folder served on loopback as the hub does it: weights are redirected to another address.

    cut: the end of every weights file is dropped.
    """

    def __init__(self, root):
        self.requests, self.cut, self.servers = [], False, []
        folder = root / "openai-community/gpt2/resolve/main"
        folder.mkdir(parents=True)
        shutil.copy(GOLDEN / "config.json", folder)
        for name in "vocab.json", "merges.txt":
            (folder / name).write_text("{}", encoding="utf-8")
        shutil.copy(GOLDEN / WEIGHTS, root / "signed")
        hub = self

        class Handler(http.server.SimpleHTTPRequestHandler):
            def log_message(self, *args):
                hub.requests.append(self.path)

            def do_GET(self):
                if not self.path.endswith(WEIGHTS):
                    return super().do_GET()
                self.send_response(302)
                self.send_header("Location", hub.addresses[1] + "/signed?expires=1")
                self.send_header("Content-Length", "0")
                self.end_headers()

            def copyfile(self, source, output):
                try:
                    output.write(source.read()[: -1000 if hub.cut and "signed" in self.path else None])
                except OSError:
                    pass  # whoever asked for the size hangs up

        for _ in range(2):
            server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), partial(Handler, directory=root))
            threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
            self.servers.append(server)
        self.addresses = [f"http://127.0.0.1:{server.server_port}" for server in self.servers]


@pytest.fixture
def hub(tmp_path, monkeypatch):
    hub = Hub(tmp_path / "served")
    monkeypatch.setenv("HF_ENDPOINT", hub.addresses[0])
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "cache"))
    yield hub
    for server in hub.servers:
        server.shutdown()
        server.server_close()


def cached(tmp_path):
    return sorted(p.name for p in (tmp_path / "cache").rglob("*") if p.is_file())


def test_download_once_through_a_redirect(hub, tmp_path, capfd):
    torch.testing.assert_close(*logits_of("gpt2"), rtol=0, atol=2e-5)
    n = len(hub.requests)
    assert n == 10  # four files, each asked for its size and fetched, the weights by way of a redirect
    GPT.from_pretrained("gpt2")
    assert len(hub.requests) == n
    assert cached(tmp_path) == sorted(model_module.FILES)


def test_a_download_cut_short_leaves_nothing(hub, tmp_path, capfd):
    hub.cut = True
    refused("gpt2", "gpt2 is not cached and cannot be downloaded .*18,784 of 19,784 bytes", OSError)
    assert WEIGHTS not in cached(tmp_path) and not any("part" in name for name in cached(tmp_path))
    hub.cut = False
    GPT.from_pretrained("gpt2")


def test_several_downloads_at_once(hub, tmp_path, capfd):
    results = []
    threads = [threading.Thread(target=lambda: results.append(logits_of("gpt2"))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
    assert len(results) == 4 and all(torch.equal(ours, results[0][0]) for ours, _ in results)
    assert cached(tmp_path) == sorted(model_module.FILES)


def test_what_cannot_be_downloaded_says_why(hub, tmp_path, monkeypatch, capfd):
    folder = tmp_path / "served/openai-community/gpt2/resolve/main"
    (tmp_path / "served/signed").write_bytes(b"<html>please log in</html>")
    refused("gpt2", r"damaged, or no safetensors file; try again", OSError)
    monkeypatch.setattr(model_module, "HUB", hub.addresses[0])
    refused("gpt2", r"\(model.safetensors.*SHA-256", OSError)
    (tmp_path / "served/signed").unlink()
    refused("gpt2", r"\(model.safetensors: HTTP Error 404", OSError)
    shutil.rmtree(tmp_path / "cache")
    (folder / "config.json").unlink()
    message = refused("gpt2", r"\(config.json: HTTP Error 404", OSError)
    assert message.endswith("): connect, or name a checkpoint folder such as tiny") and "://" not in message
    reasons = {"http://127.0.0.1:1": ".*refused", "http://no.invalid": r"\D+", "hub": ".*url type"}
    for endpoint, reason in reasons.items():
        monkeypatch.setenv("HF_ENDPOINT", endpoint)
        refused("gpt2", rf"downloaded \({reason}.*\): connect", OSError)
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(GOLDEN / "config.json"))  # no folder fits there
    refused("gpt2", "gpt2 is not cached and cannot be downloaded", OSError)


def gpt2_is_at_hand():
    return Path(torch.hub.get_dir(), "pdl/gpt2", WEIGHTS).exists() or os.environ.get("PDL_TEST_GPT2") == "1"


@pytest.mark.skipif(not gpt2_is_at_hand(), reason="gpt2 is not cached; PDL_TEST_GPT2=1 downloads its 0.5 GB")
def test_the_real_gpt2_writes_what_it_is_known_to_write():
    model = GPT.from_pretrained("gpt2")
    expected = [464, 3290, 373, 1043, 287, 257, 2214, 1474, 262, 16246,
                286, 2688, 290, 2688, 27262, 13, 198, 198, 464, 3290]
    assert model.generate(torch.tensor([expected[:2]]), 18, temperature=0)[0].tolist() == expected
