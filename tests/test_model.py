"""model.py against what Transformers' GPT-2 computed (tests/golden, made by tests/make_golden.py)."""

import http.server
import shutil
import sys
import threading
from functools import partial
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent.parent))
import model as model_module
from model import GPT, GPTConfig

GOLDEN = Path(__file__).parent / "golden"


def rewrite(folder, change):
    """A copy of the golden checkpoint with its weights changed."""
    shutil.copytree(GOLDEN, folder)
    state = torch.load(folder / "pytorch_model.bin", weights_only=True)
    torch.save(change(state), folder / "pytorch_model.bin")
    return folder


def released_layout(state):
    state = {name.removeprefix("transformer."): w for name, w in state.items() if name != "lm_head.weight"}
    for i in range(2):
        state[f"h.{i}.attn.bias"] = torch.ones(1, 1, 12, 12).tril()
        state[f"h.{i}.attn.masked_bias"] = torch.tensor(-1e4)
    return state


@pytest.mark.parametrize("change", [dict, released_layout])
def test_logits_are_those_of_transformers(change, tmp_path):
    golden = torch.load(GOLDEN / "logits.pt", weights_only=True)
    model = GPT.from_pretrained(rewrite(tmp_path / "a", change)).eval()
    torch.testing.assert_close(model(golden["idx"]), golden["logits"], rtol=0, atol=2e-5)


def test_saved_as_transformers_saves_it(tmp_path):
    GPT.from_pretrained(GOLDEN).save_pretrained(tmp_path)
    theirs, ours = (torch.load(f / "pytorch_model.bin", weights_only=True) for f in (GOLDEN, tmp_path))
    assert theirs.keys() - ours.keys() == {"lm_head.weight"}  # tied to wte
    assert all(torch.equal(theirs[name], w) for name, w in ours.items())
    assert GPT.from_pretrained(tmp_path).config == GPT.from_pretrained(GOLDEN).config


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
    kept = lambda **k: (model_module._truncate(logits, **({"top_k": None, "top_p": None} | k)) > -torch.inf).nonzero()[:, 1].tolist()
    assert kept(top_k=2) == [1, 3]
    assert kept(top_p=0.65) == [1, 3]
    assert kept(top_p=0.75) == [1, 2, 3]
    assert kept(top_k=9, top_p=1.0) == [0, 1, 2, 3]


def test_dropout_and_checkpointing():
    model = GPT.from_pretrained(GOLDEN).train()
    idx = torch.arange(12)[None]
    model.set_dropout(0.5)
    assert not torch.equal(model(idx), model(idx))
    model.set_dropout(0.0)
    plain = torch.autograd.grad(model(idx).square().sum(), model.wpe.weight)[0]
    model.activation_checkpointing = True
    assert torch.equal(torch.autograd.grad(model(idx).square().sum(), model.wpe.weight)[0], plain)


def test_init_is_gpt2s():
    model = GPT(GPTConfig(vocab_size=500, n_positions=64, n_embd=64, n_layer=8, n_head=4))
    assert model.wte.weight.std().item() == pytest.approx(0.02, rel=0.05)
    assert model.h[0].mlp.c_proj.weight.std().item() == pytest.approx(0.02 / 4, rel=0.05)
    assert model.h[3].ln_1.weight.unique().tolist() == [1] and model.h[3].attn.c_attn.bias.unique().tolist() == [0]


@pytest.mark.parametrize("change, culprit", [
    (lambda s: {k: w for k, w in s.items() if "ln_f" not in k}, "lacks weight ln_f"),
    (lambda s: s | {"transformer.h.2.ln_1.weight": torch.ones(12)}, "unknown weight h.2.ln_1.weight"),
    (lambda s: s | {"transformer.wpe.weight": torch.ones(13, 12)}, "wpe.weight has shape"),
])
def test_a_checkpoint_that_does_not_fit_is_refused(change, culprit, tmp_path):
    with pytest.raises(ValueError, match=culprit):
        GPT.from_pretrained(rewrite(tmp_path / "a", change))


class Hub:
    """The golden folder served on loopback as the hub would serve it; `cut` drops the end of every weights file."""

    def __init__(self, root):
        self.requests, self.cut = [], False
        hub = self

        class Handler(http.server.SimpleHTTPRequestHandler):
            def log_message(self, *args):
                hub.requests.append(self.command + " " + self.path)

            def copyfile(self, source, output):
                output.write(source.read()[: -1000 if hub.cut else None])

        shutil.copytree(GOLDEN, root / "openai-community/gpt2/resolve/main")
        for name in "vocab.json", "merges.txt":
            (root / "openai-community/gpt2/resolve/main" / name).write_text("{}")
        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), partial(Handler, directory=root))
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        self.url = f"http://127.0.0.1:{self.server.server_port}"


@pytest.fixture
def hub(tmp_path, monkeypatch):
    hub = Hub(tmp_path / "served")
    monkeypatch.setenv("HF_ENDPOINT", hub.url)
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "cache"))
    yield hub
    hub.server.shutdown()


def test_download_once_through_a_mirror(hub, capfd):
    GPT.from_pretrained("gpt2")
    n = len(hub.requests)
    assert n == 8  # four files, each asked for its size and fetched
    GPT.from_pretrained("gpt2")
    assert len(hub.requests) == n


def test_a_download_cut_short_leaves_nothing(hub, tmp_path, capfd):
    hub.cut = True
    with pytest.raises(OSError, match="try again"):
        GPT.from_pretrained("gpt2")
    assert not [p for p in (tmp_path / "cache").rglob("*") if p.is_file()]
    hub.cut = False
    GPT.from_pretrained("gpt2")
