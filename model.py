"""
GPT-2 in one file: the network, and reading and writing a checkpoint folder in Hugging Face's layout
(config.json, pytorch_model.bin), so that the released sizes open here and what is saved here opens in Transformers.

    model = GPT.from_pretrained("gpt2")                   # or "gpt2-medium", ..., "distilgpt2", or a folder
    logits = model(idx)                                   # (B, T) int64 -> (B, T, vocab_size)

The architecture is that of Radford et al. 2019, with the module names of the released checkpoints.
It does not know the loss (pdl.py) nor the text (count.py).
"""

import json
import os
import urllib.request
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

REPOS = {name: f"openai-community/{name}" for name in ("gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl")}
REPOS["distilgpt2"] = "distilbert/distilgpt2"
HUB = "https://huggingface.co"
# The weights' SHA-256 where it is known for certain; a mirror may serve what it likes.
SHA256 = {"gpt2": "7c5d3f4b8b76583b422fcb9189ad6c89d5d97a094541ce8932dce3ecabde1421"}
# What a checkpoint folder holds. The weights come last: where they are, all the rest is.
FILES = ("config.json", "vocab.json", "merges.txt", "pytorch_model.bin")


# What config.json says of every GPT-2; a model with other values computes something else.
GPT2 = {"model_type": "gpt2", "activation_function": "gelu_new", "scale_attn_weights": True, "scale_attn_by_inverse_layer_idx": False,
        "add_cross_attention": False, "tie_word_embeddings": True}


@dataclass
class GPTConfig:
    """The fields of config.json that shape the network, under their names there; the values are GPT-2's."""

    vocab_size: int = 50257
    n_positions: int = 1024  # the context window
    n_embd: int = 768
    n_layer: int = 12
    n_head: int = 12
    layer_norm_epsilon: float = 1e-5
    embd_pdrop: float = 0.1
    attn_pdrop: float = 0.1
    resid_pdrop: float = 0.1


class Attention(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.n_head, self.dropout = config.n_head, config.attn_pdrop
        self.c_attn = nn.Linear(config.n_embd, 3 * config.n_embd)
        self.c_proj = nn.Linear(config.n_embd, config.n_embd)
        self.resid_dropout = nn.Dropout(config.resid_pdrop)

    def forward(self, x, cache=None, pos=0):
        B, T, C = x.shape
        q, k, v = (y.view(B, T, self.n_head, -1).transpose(1, 2) for y in self.c_attn(x).split(C, dim=2))
        if cache is not None:  # (2, B, n_head, n_positions, head size): keys and values of the tokens before pos
            cache[:, :, :, pos : pos + T] = torch.stack((k, v))
            k, v = cache[:, :, :, : pos + T]
        # A single new token sees all that came before it; several see each other causally.
        y = F.scaled_dot_product_attention(q, k, v, dropout_p=self.dropout * self.training, is_causal=T > 1)
        return self.resid_dropout(self.c_proj(y.transpose(1, 2).reshape(B, T, C)))


class MLP(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.c_fc = nn.Linear(config.n_embd, 4 * config.n_embd)
        self.c_proj = nn.Linear(4 * config.n_embd, config.n_embd)
        self.dropout = nn.Dropout(config.resid_pdrop)

    def forward(self, x):
        return self.dropout(self.c_proj(F.gelu(self.c_fc(x), approximate="tanh")))


class Block(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.n_embd, config.layer_norm_epsilon)
        self.attn = Attention(config)
        self.ln_2 = nn.LayerNorm(config.n_embd, config.layer_norm_epsilon)
        self.mlp = MLP(config)

    def forward(self, x, cache=None, pos=0):
        x = x + self.attn(self.ln_1(x), cache, pos)
        if self.training:
            # Half of what a block keeps for its backward pass is inside the MLP, and cheap to compute again: GPT-2 124M
            # at 4 x 512 tokens takes 3.0 instead of 3.4 GB, and 6% more time.
            return x + checkpoint(lambda x: self.mlp(self.ln_2(x)), x, use_reentrant=False)
        return x + self.mlp(self.ln_2(x))


class GPT(nn.Module):
    """GPT-2. The output layer is the token embedding, transposed (tied weights)."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.activation_checkpointing = False  # recompute each block in backward instead of keeping its activations
        self.wte = nn.Embedding(config.vocab_size, config.n_embd)
        self.wpe = nn.Embedding(config.n_positions, config.n_embd)
        self.drop = nn.Dropout(config.embd_pdrop)
        self.h = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        self.ln_f = nn.LayerNorm(config.n_embd, config.layer_norm_epsilon)
        for name, p in self.named_parameters():
            if p.dim() > 1:
                # GPT-2 (section 2.3): the layers that write to the residual stream start smaller, by 1/sqrt of their
                # number, two in a block.
                nn.init.normal_(p, std=0.02 * ((2 * config.n_layer) ** -0.5 if "c_proj" in name else 1))
            elif name.endswith("bias"):
                nn.init.zeros_(p)

    def set_dropout(self, p):
        for module in self.modules():
            if isinstance(module, nn.Dropout):
                module.p = p
            elif isinstance(module, Attention):
                module.dropout = p

    @property
    def lm_head(self):
        """(vocab_size, n_embd): logits = hidden @ lm_head.T."""
        return self.wte.weight

    def forward(self, idx, return_hidden=False, cache=None, pos=0):
        """idx (B, T) int64 -> logits (B, T, vocab_size), or the hidden states (B, T, n_embd) that they come from."""
        T = idx.shape[1]
        if pos + T > self.config.n_positions:
            raise ValueError(f"{pos + T} tokens do not fit into the model's context window of {self.config.n_positions}")
        # The gradient of the rows in use adds to lm_head's, which is dense: a second dense one costs 5% of a step on a CPU.
        tokens = F.embedding(idx, self.wte.weight, sparse=idx.device.type == "cpu")
        x = self.drop(tokens + self.wpe(torch.arange(pos, pos + T, device=idx.device)))
        for i, block in enumerate(self.h):
            if self.activation_checkpointing and self.training:
                x = checkpoint(block, x, use_reentrant=False)
            else:
                x = block(x, None if cache is None else cache[i], pos)
        x = self.ln_f(x)
        return x if return_hidden else F.linear(x, self.lm_head)

    @torch.inference_mode()
    def generate(self, idx, max_new_tokens, temperature=1.0, top_k=None, top_p=None):
        """Append max_new_tokens sampled tokens to idx: (B, T) -> (B, T + max_new_tokens).

        temperature: 0 takes the likeliest token. top_k: sample among the k likeliest. top_p: among the fewest likeliest
        that together have at least this probability (Holtzman et al. 2020). Past the context window, only the last
        n_positions tokens are seen. Raises ValueError for an empty idx.
        """
        if idx.shape[1] == 0:
            raise ValueError("generate needs at least one token to start from")
        was_training, window = self.training, self.config.n_positions
        self.eval()
        # Keys and values of the tokens seen so far, so that each step computes one token instead of all. When the
        # window slides every position changes, and with it every key: from there on all is computed anew.
        cache, pos = self._empty_cache(idx.shape[0], min(window, idx.shape[1] + max_new_tokens)), 0
        for _ in range(max_new_tokens):
            if idx.shape[1] > window:
                hidden = self(idx[:, -window:], return_hidden=True)
            else:
                hidden, pos = self(idx[:, pos:], True, cache, pos), idx.shape[1]
            logits = F.linear(hidden[:, -1], self.lm_head).float()
            if temperature == 0:
                token = logits.argmax(-1, keepdim=True)
            else:
                token = torch.multinomial(_truncate(logits / temperature, top_k, top_p).softmax(-1), 1)
            idx = torch.cat((idx, token), dim=1)
        self.train(was_training)
        return idx

    def _empty_cache(self, batch_size, length):
        c = self.config
        return self.wte.weight.new_empty(c.n_layer, 2, batch_size, c.n_head, length, c.n_embd // c.n_head)

    @classmethod
    def from_pretrained(cls, name_or_folder):
        """A released model by its name, downloaded on first use, or a folder in the same layout.

        Raises OSError if it cannot be had, ValueError if it is not a GPT-2.
        """
        folder = checkpoint_folder(name_or_folder)
        model = cls(read_config(folder))
        model.load_weights(folder)
        return model

    def load_weights(self, folder):
        """Take the weights of a checkpoint folder of the same shape. Errors as in from_pretrained."""
        path = Path(folder) / "pytorch_model.bin"
        if not path.exists():
            raise FileNotFoundError(f"{folder} has no pytorch_model.bin; in Transformers, save_pretrained(..., safe_serialization=False) writes it")
        state = load_state(path)
        state = {name.removeprefix("transformer."): w for name, w in state.items()}
        if "lm_head.weight" in state and not torch.equal(state["lm_head.weight"], state.get("wte.weight")):
            raise ValueError(f"{path}: lm_head.weight is not wte.weight, as it is in GPT-2")
        own = self.state_dict()
        # Beside the weights, some checkpoints hold the causal mask and the output layer, which is the embedding again.
        state = {name: w for name, w in state.items() if name in own or not name.endswith((".attn.bias", "masked_bias", "lm_head.weight"))}
        state = {name: w.t() if _is_conv1d(name) else w for name, w in state.items()}
        for name in own.keys() ^ state.keys():
            raise ValueError(f"{path} {'lacks' if name in own else 'has an unknown'} weight {name}: not this GPT-2")
        for name, w in state.items():
            if w.shape != own[name].shape:
                raise ValueError(f"{path}: {name} has shape {tuple(w.shape)}, but config.json asks for {tuple(own[name].shape)}")
        self.load_state_dict(state)

    def save_pretrained(self, folder, dtype=torch.float32):
        """Write config.json and pytorch_model.bin in the layout of the released checkpoints, weights as dtype."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        config = GPT2 | {"architectures": ["GPT2LMHeadModel"], "dtype": "float32", "bos_token_id": self.config.vocab_size - 1, "eos_token_id": self.config.vocab_size - 1}
        state = {f"transformer.{name}": (w.t() if _is_conv1d(name) else w).to("cpu", dtype)
                 for name, w in self.state_dict().items()}
        replace(folder / "config.json", lambda path: path.write_text(json.dumps(config | asdict(self.config), indent=2) + "\n"))
        replace(folder / "pytorch_model.bin", lambda path: torch.save(state, path))


def _is_conv1d(name):
    # The released checkpoints keep the four linear layers of a block as Conv1D: (in, out) where nn.Linear has (out, in).
    return name.endswith(("c_attn.weight", "c_proj.weight", "c_fc.weight"))


def _truncate(logits, top_k, top_p):
    """Logits with all but the likeliest tokens at -inf."""
    if top_k is not None:
        kth = logits.topk(min(top_k, logits.shape[-1])).values[:, -1:]
        logits = logits.masked_fill(logits < kth, -float("inf"))
    if top_p is not None:
        ordered, index = logits.sort(descending=True)
        p = ordered.softmax(-1)
        # Drop a token if those before it already have the probability: the first always stays.
        ordered[p.cumsum(-1) - p >= top_p] = -float("inf")
        logits = logits.scatter(1, index, ordered)
    return logits


def read_config(folder):
    """The GPTConfig of a checkpoint folder. Raises ValueError for what is not GPT-2."""
    path = Path(folder) / "config.json"
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}") from None
    for name, value in GPT2.items():
        if config.get(name, value) != value:
            raise ValueError(f"{path} describes another architecture than GPT-2: {name} is {config[name]!r}, not {value!r}")
    return GPTConfig(**{name: config[name] for name in asdict(GPTConfig()) if name in config})


def load_state(path):
    """What torch.save wrote: tensors and plain values only, so that a stranger's file runs no code. Raises ValueError."""
    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:
        raise ValueError(f"{path} is damaged or not a PyTorch checkpoint: {str(error).splitlines()[0]}") from None


def pick_device(name="auto", local_rank=0):
    """The torch.device of a --device flag. Raises ValueError if this machine lacks it."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        device = torch.device(f"cuda:{local_rank}" if name == "cuda" else name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"--device {name} cannot be used here ({str(error).splitlines()[0]}): without the flag, the best that is there is") from None
    return device


def replace(path, write):
    """Write a file beside its place and rename it there, so that a reader finds the old one or the new, never a part."""
    part = path.with_name(path.name + ".part")
    try:
        write(part)
        os.replace(part, path)
    except (OSError, RuntimeError) as error:  # torch.save raises the latter when the disk is full
        raise OSError(f"{path} could not be written ({str(error).splitlines()[0]}); what was there before is untouched") from None
    finally:
        part.unlink(missing_ok=True)


def checkpoint_folder(name_or_folder):
    """The local folder of a checkpoint. The released names are downloaded into torch.hub's directory, once.

    Raises OSError if there is no such folder or it cannot be downloaded. HF_ENDPOINT names a mirror.
    """
    name = str(name_or_folder)
    if name not in REPOS:
        if not Path(name, "config.json").exists():
            raise FileNotFoundError(f"{name} is neither a checkpoint folder (no config.json there; train.py makes one) nor one of {', '.join(REPOS)}")
        return Path(name)
    folder = Path(torch.hub.get_dir(), "pdl", name)
    folder.mkdir(parents=True, exist_ok=True)
    endpoint = os.environ.get("HF_ENDPOINT", HUB).rstrip("/")
    for file in FILES:
        if not (folder / file).exists():
            url = f"{endpoint}/{REPOS[name]}/resolve/main/{file}"
            part = folder / f"{file}.part"
            try:
                _download(url, part, SHA256.get(name) if file == FILES[-1] and endpoint == HUB else None)
                os.replace(part, folder / file)
            except (OSError, RuntimeError) as error:  # torch.hub raises the latter for a wrong hash
                raise OSError(f"{name} is not cached, and {url} cannot be downloaded ({getattr(error, 'reason', error)}): connect, or name a checkpoint folder") from None
            finally:
                part.unlink(missing_ok=True)
    return folder


def _download(url, path, sha256):
    # The size is asked for first, with a time limit: torch.hub sets none, and takes a connection cut short for the end.
    with urllib.request.urlopen(urllib.request.Request(url, method="HEAD"), timeout=10) as reply:
        size = reply.headers["Content-Length"]
    torch.hub.download_url_to_file(url, path, hash_prefix=sha256)
    if size is not None and path.stat().st_size != int(size):
        raise OSError(f"got {path.stat().st_size:,} of {int(size):,} bytes; try again")
