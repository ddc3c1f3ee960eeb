"""
GPT-2 in one file: the network and how it writes; then checkpoint folders in Hugging Face's layout
(config.json, model.safetensors), so that the released sizes open here and what is saved here in Transformers;
then what it runs on: devices, dtypes, processes.

    model = GPT.from_pretrained("gpt2")                   # or "gpt2-medium", ..., "distilgpt2", or a folder
    logits = model(idx)                                   # (B, T) int64 -> (B, T, vocab_size)

The architecture is that of Radford et al. 2019, with the module names of the released checkpoints.
It does not know the loss (pdl.py) nor the text (count.py).
"""

import contextlib
import http.client
import json
import math
import os
import secrets
import signal
import sys
import urllib.error
import urllib.request
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint


@dataclass
class GPTConfig:
    """The fields of config.json that matter here, under their names there; the values are GPT-2's."""

    vocab_size: int = 50257
    n_positions: int = 1024  # the context window
    n_embd: int = 768
    n_layer: int = 12
    n_head: int = 12
    layer_norm_epsilon: float = 1e-5
    embd_pdrop: float = 0.1
    attn_pdrop: float = 0.1
    resid_pdrop: float = 0.1
    eos_token_id: int = 50256  # <|endoftext|>


class Attention(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.n_head, self.dropout = config.n_head, config.attn_pdrop
        self.c_attn = nn.Linear(config.n_embd, 3 * config.n_embd)
        self.c_proj = nn.Linear(config.n_embd, config.n_embd)
        self.resid_dropout = nn.Dropout(config.resid_pdrop)

    def forward(self, x, cache=None, pos=0):
        B, T, C = x.shape
        # each (B, n_head, T, head size)
        q, k, v = self.c_attn(x).view(B, T, 3, self.n_head, -1).permute(2, 0, 3, 1, 4)
        if cache is not None:  # (2, B, n_head, length, head size): keys and values of the tokens before pos
            cache[0, :, :, pos : pos + T], cache[1, :, :, pos : pos + T] = k, v
            k, v = cache[:, :, :, : pos + T]
        # A single new token sees all that came before it; several see each other causally.
        dropout = self.dropout * self.training
        y = F.scaled_dot_product_attention(q.to(k.dtype), k, v, dropout_p=dropout, is_causal=T > 1)
        return self.resid_dropout(self.c_proj(y.to(q.dtype).transpose(1, 2).reshape(B, T, C)))


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

    def forward(self, x, cache=None, pos=0, recompute=False):
        x = x + self.attn(self.ln_1(x), cache, pos)
        if recompute:
            return x + checkpoint(lambda x: self.mlp(self.ln_2(x)), x, use_reentrant=False)
        return x + self.mlp(self.ln_2(x))


class GPT(nn.Module):
    """GPT-2. The output layer is the token embedding, transposed (tied weights)."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        # True: recompute in the backward pass what is inside the MLPs, half of what a block keeps for it, and
        # cheap to have again. GPT-2 124M, 4 x 512, float32 on a CPU: 3.30 instead of 3.66 GB for 6% more time
        # (recomputing whole blocks: 3.26 GB, 15%).
        self.activation_checkpointing = False
        self.wte = nn.Embedding(config.vocab_size, config.n_embd)
        self.wpe = nn.Embedding(config.n_positions, config.n_embd)
        self.drop = nn.Dropout(config.embd_pdrop)
        self.h = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        self.ln_f = nn.LayerNorm(config.n_embd, config.layer_norm_epsilon)
        for name, p in self.named_parameters():
            if p.dim() > 1:
                # GPT-2 (section 2.3): the layers that write to the residual stream start smaller, by 1/sqrt
                # of their number, two in a block.
                nn.init.normal_(p, std=0.02 * ((2 * config.n_layer) ** -0.5 if "c_proj" in name else 1))
            elif name.endswith("bias"):
                nn.init.zeros_(p)

    def set_dropout(self, p):
        """Drop out with probability p in training, everywhere."""
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
        """idx (B, T) int64 -> logits (B, T, vocab_size), or the hidden states (B, T, n_embd) they come from.

        cache, pos: keys and values of the pos tokens before idx, as generate keeps them.
        Raises ValueError for more tokens than the context window holds.
        """
        T, window = idx.shape[1], self.config.n_positions
        if pos + T > window:
            raise ValueError(f"{pos + T} tokens do not fit into the model's context window of {window}")
        x = self.drop(self.wte(idx) + self.wpe.weight[pos : pos + T])
        recompute = self.activation_checkpointing and self.training
        for i, block in enumerate(self.h):
            x = block(x, None if cache is None else cache[i], pos, recompute)
        x = self.ln_f(x)
        return x if return_hidden else F.linear(x, self.lm_head)

    @torch.no_grad()
    def generate(self, idx, max_new_tokens, temperature=1.0, top_k=None, top_p=None, logit_bias=None):
        """Append max_new_tokens sampled tokens to idx: (B, T) -> (B, T + max_new_tokens).

        temperature: 0 takes the likeliest token. top_k: sample among the k likeliest. top_p: among the fewest
        likeliest that together have at least this probability (Holtzman et al. 2020). logit_bias: (V,), added
        to the logits before all that. Past the context window, the last n_positions tokens are seen.
        Raises ValueError for an empty idx.
        """
        B, T = idx.shape
        if T == 0:
            raise ValueError("generate needs at least one token to start from")
        window, pos = self.config.n_positions, 0
        idx = torch.cat((idx, idx.new_empty(B, max_new_tokens)), dim=1)
        cache = self._empty_cache(B, min(window, T + max_new_tokens))
        was_training, onednn = self.training, torch.backends.mkldnn.enabled
        self.eval()
        try:
            for end in range(T, T + max_new_tokens):
                # Keys and values of what was seen are kept: each step computes one token instead of all. When
                # the window slides every position changes, and with it every key: all is computed anew.
                unseen = idx[:, pos if end <= window else end - window : end]
                # In half precision oneDNN is slower than PyTorch's own product for a single row, only there:
                # GPT-2 124M writes 63 tokens/s with it, 116 without, on two cores with AVX512-BF16.
                single = unseen.numel() == 1 and self.lm_head.dtype != torch.float32
                torch.backends.mkldnn.enabled = onednn and not single
                if end <= window:
                    hidden, pos = self(unseen, True, cache, pos), end
                else:
                    hidden = self(unseen, return_hidden=True)
                logits = F.linear(hidden[:, -1], self.lm_head).float()
                if logit_bias is not None:
                    logits += logit_bias
                if temperature < 1e-37:  # which is none in float32
                    idx[:, end] = logits.argmax(-1)
                else:
                    logits -= logits.max(-1, keepdim=True).values  # a tiny temperature makes none infinite
                    idx[:, end] = _draw(_truncate(logits / temperature, top_k, top_p).softmax(-1))
        finally:
            torch.backends.mkldnn.enabled = onednn
            self.train(was_training)
        return idx

    def _empty_cache(self, batch_size, length):
        # In float32 on a CPU: attention to 256 tokens in bfloat16 takes 4 times as long there.
        c, w = self.config, self.lm_head
        dtype = torch.float32 if w.device.type == "cpu" else w.dtype
        return w.new_empty(c.n_layer, 2, batch_size, c.n_head, length, c.n_embd // c.n_head, dtype=dtype)

    @classmethod
    def from_pretrained(cls, name_or_folder):
        """A released model by its name, downloaded on first use, or a folder in the same layout; in float32.

        Raises OSError if it cannot be had, ValueError if it is not a GPT-2.
        """
        folder = checkpoint_folder(name_or_folder)
        model = cls(read_config(folder))
        model.load_weights(folder)
        return model

    def load_weights(self, folder):
        """Take the weights of a checkpoint folder of the same shape. Errors as in from_pretrained."""
        path = Path(folder, "model.safetensors")
        if path.exists():
            shapes, read = _open_safetensors(path)
        elif (path := Path(folder, "pytorch_model.bin")).exists():
            state = load_state(path)
            shapes, read = {name: getattr(w, "shape", None) for name, w in state.items()}, state.get
        else:
            raise FileNotFoundError(f"{folder} has neither model.safetensors nor pytorch_model.bin: "
                                    "name a folder with all weights in one of them")
        # Beside the weights, some hold the causal mask and the output layer, which is the embedding again.
        names = {name.removeprefix("transformer."): name for name in shapes
                 if not name.endswith((*MASKS, "lm_head.weight"))}
        own = self.state_dict()
        for name in sorted(own.keys() ^ names.keys()):
            what = "lacks" if name in own else "has an unknown"
            raise ValueError(f"{path} {what} weight {ascii(name)[1:-1]}: not this GPT-2")
        for name, w in own.items():
            shape = shapes[names[name]]
            if shape != (w.t() if _is_conv1d(name) else w).shape:
                raise ValueError(f"{path}: {name} has shape {shape}, which is not what config.json asks for")
        if "lm_head.weight" in shapes and not torch.equal(read("lm_head.weight"), read(names["wte.weight"])):
            raise ValueError(f"{path}: lm_head.weight is not wte.weight, as it is in GPT-2")
        for name, w in own.items():
            w.copy_(read(names[name]).t() if _is_conv1d(name) else read(names[name]))

    def save_pretrained(self, folder, dtype=torch.float32):
        """Write config.json and model.safetensors as the released checkpoints have them, weights as dtype."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        config = GPT2 | asdict(self.config) | {"architectures": ["GPT2LMHeadModel"], "dtype": "float32",
                                               "bos_token_id": self.config.eos_token_id}
        state = {f"transformer.{name}": w.t() if _is_conv1d(name) else w
                 for name, w in self.state_dict().items()}
        text = json.dumps(config, indent=2) + "\n"
        replace(folder / "config.json", lambda path: path.write_text(text, encoding="utf-8"))
        replace(folder / "model.safetensors", lambda path: _write_safetensors(path, state, dtype))


def _draw(p):
    """One token of each row of probabilities p (B, V), drawn: (B,)."""
    # torch.multinomial draws a random number per token of the vocabulary: 1.2 ms of a step's 15 on a CPU. One
    # is enough; in float64, where the many small probabilities of rare tokens do not vanish in the sum.
    if p.device.type != "cpu":
        return torch.multinomial(p, 1)[:, 0]
    cdf = p.cumsum(-1, dtype=torch.float64)
    u = torch.rand(len(p), 1, dtype=torch.float64)
    return torch.searchsorted(cdf, u * cdf[:, -1:], right=True)[:, 0]


def _truncate(logits, top_k, top_p):
    """logits (B, V), with all but the likeliest tokens at -inf."""
    if top_k is not None:
        likeliest, index = logits.topk(min(top_k, logits.shape[-1]))
        logits = torch.full_like(logits, -float("inf")).scatter(1, index, likeliest)
    if top_p is not None and top_p < 1:
        # Sorting all of GPT-2's vocabulary takes 28 ms on a CPU, twice as long as the network; finding the
        # likeliest 1,000 takes half of one, and nearly always they have the probability.
        p = logits.softmax(-1)
        for k in 1000, logits.shape[-1]:
            likeliest, index = p.topk(min(k, logits.shape[-1]))
            before = likeliest.cumsum(-1) - likeliest
            if (before[:, -1] >= top_p).all():
                break
        # Drop a token if those before it already have the probability: the first always stays.
        kept = logits.gather(1, index).masked_fill((before >= top_p) & (before > 0), -float("inf"))
        logits = torch.full_like(logits, -float("inf")).scatter(1, index, kept)
    return logits


# --- checkpoint folders, files and downloads ---

REPOS = {name: f"openai-community/{name}" for name in ("gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl")}
REPOS["distilgpt2"] = "distilbert/distilgpt2"
HUB = "https://huggingface.co"
# The weights' SHA-256 where it is known for certain; a mirror may serve what it likes.
SHA256 = {"gpt2": "248dfc3911869ec493c76e65bf2fcf7f615828b0254c12b473182f0f81d3a707",
          "distilgpt2": "e1ff18884359fe8beb795a5f414feb85a6ce3d929ad019c0d958c039d2b94a1b"}
# What a released checkpoint is made of. The weights come last: where they are, all the rest is.
FILES = ("config.json", "vocab.json", "merges.txt", "model.safetensors")

# What config.json says of every GPT-2; a model with other values computes something else.
GPT2 = {"model_type": "gpt2", "activation_function": "gelu_new", "scale_attn_weights": True,
        "scale_attn_by_inverse_layer_idx": False, "add_cross_attention": False, "tie_word_embeddings": True}

# Buffers that old checkpoints hold beside the weights.
MASKS = (".attn.bias", ".attn.masked_bias")
DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


def checkpoint_folder(name_or_folder):
    """The local folder of a checkpoint. The released names are downloaded into torch.hub's directory, once.

    Raises OSError if there is no such folder or it cannot be downloaded. HF_ENDPOINT names a mirror.
    """
    name = str(name_or_folder)
    if name not in REPOS or isinstance(name_or_folder, Path):  # ./gpt2 is a folder, gpt2 is not
        if not Path(name, "config.json").exists():
            raise FileNotFoundError(f"{name} is neither a checkpoint folder (no config.json there; train.py "
                                    f"makes one) nor one of {', '.join(REPOS)}")
        return Path(name)
    folder = Path(torch.hub.get_dir(), "pdl", name)
    endpoint = os.environ.get("HF_ENDPOINT", HUB).rstrip("/")
    for file in FILES:
        if (folder / file).exists():
            continue
        part = _part(folder / file)
        try:
            folder.mkdir(parents=True, exist_ok=True)
            sha256 = SHA256.get(name) if file == FILES[-1] and endpoint == HUB else None
            _download(f"{endpoint}/{REPOS[name]}/resolve/main/{file}", part, sha256)
            os.replace(part, folder / file)
        except (OSError, http.client.HTTPException, RuntimeError, ValueError) as error:
            if not (folder / file).exists():  # else another process was faster, and may have it open
                raise OSError(f"{name} is not cached and cannot be downloaded ({_reason(file, error)}): "
                              "connect, or name a checkpoint folder such as tiny") from None
        finally:
            if part.exists():
                part.unlink()
    return folder


def _download(url, path, sha256):
    # The size is asked for first, with a time limit: torch.hub sets none, and takes a connection cut short
    # for the end. By GET, since the address that weights are redirected to may be signed for that alone.
    with urllib.request.urlopen(url, timeout=10) as reply:
        size = reply.headers["Content-Length"]
    torch.hub.download_url_to_file(url, str(path), hash_prefix=sha256)
    if size is not None and path.stat().st_size != int(size):
        raise OSError(f"got {path.stat().st_size:,} of {int(size):,} bytes; try again")
    if url.endswith(".safetensors"):
        try:
            _open_safetensors(path)  # its header states its length
        except ValueError:
            raise OSError("what came is damaged, or no safetensors file; try again") from None


def _reason(file, error):
    if isinstance(error, RuntimeError):  # torch.hub's, which quotes both hashes
        return f"{file} has another SHA-256 than the one published"
    if isinstance(error, urllib.error.URLError) and isinstance(error.reason, OSError):  # no connection
        return error.reason.strerror or str(error.reason)
    return f"{file}: {getattr(error, 'strerror', None) or error}"


def read_config(folder):
    """The GPTConfig of a checkpoint folder. Raises ValueError for what is not GPT-2."""
    path = Path(folder) / "config.json"
    try:
        given = json.loads(path.read_text(encoding="utf-8"))
        for name, value in GPT2.items():
            if given.get(name, value) != value:
                raise ValueError(f"{name} is {given[name]!r}, not {value!r}")
        default = asdict(GPTConfig())
        if type(given.get("eos_token_id")) is not int:  # it may lack one, or have several
            given["eos_token_id"] = given.get("vocab_size", default["vocab_size"]) - 1
        config = GPTConfig(**{name: type(value)(given.get(name, value)) for name, value in default.items()})
        if min(asdict(config).values()) < 0 or config.n_head < 1 or config.n_embd % config.n_head:
            raise ValueError("its sizes fit no network")
    except (ValueError, TypeError, AttributeError, OverflowError, RecursionError) as error:
        raise ValueError(f"{path} does not describe a GPT-2: {error}") from None
    return config


def _open_safetensors(path):
    """What a safetensors file holds: {name: shape}, and a function that reads one tensor. Raises ValueError.

    Eight bytes are the header's length, then come the header, JSON, and the tensors, without a gap. They are
    read, not mapped: Windows does not replace a mapped file, and in those of GPT-2 nothing is aligned.
    """
    try:
        with open(path, "rb") as file:
            size = os.fstat(file.fileno()).st_size
            start = 8 + int.from_bytes(file.read(8), "little")
            if start > size:
                raise ValueError(f"cut short at {size:,} bytes")
            header = json.loads(file.read(start - 8))
        header.pop("__metadata__", None)
        header = {name: (*w["data_offsets"], w["dtype"], w["shape"]) for name, w in header.items()}
        end = 0
        for name, (begin, stop, dtype, shape) in sorted(header.items(), key=lambda item: item[1][:2]):
            if begin != end or any(type(n) is not int or n < 0 for n in (begin, stop, *shape)):
                raise ValueError(f"{name[:99]!a} is out of place")
            if not name.endswith(MASKS) and stop - begin != math.prod(shape) * DTYPES[dtype].itemsize:
                raise ValueError(f"{name[:99]!a} is not of its length")
            end = stop
        if start + end != size:
            raise ValueError(f"{size:,} bytes, not {start + end:,}")
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        what = error if isinstance(error, ValueError) else f"its header, {type(error).__name__} {error}"
        raise ValueError(f"{path} is damaged, or no safetensors file of F32, F16 or BF16: {what}") from None

    def read(name):
        begin, stop, dtype, shape = header[name]
        data = torch.empty(stop - begin, dtype=torch.uint8)
        with open(path, "rb") as file:
            file.seek(start + begin)
            file.readinto(data.numpy())
        return data.view(DTYPES[dtype]).view(shape)

    return {name: tuple(shape) for name, (_, _, _, shape) in header.items()}, read


def _write_safetensors(path, state, dtype):
    header, end = {"__metadata__": {"format": "pt"}}, 0
    code = next(code for code in DTYPES if DTYPES[code] == dtype)
    for name, w in state.items():
        begin, end = end, end + w.numel() * dtype.itemsize
        header[name] = {"dtype": code, "shape": list(w.shape), "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # so that whoever maps the file finds the tensors aligned
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for w in state.values():
            file.write(w.to("cpu", dtype).contiguous().view(torch.uint8).numpy())


def _is_conv1d(name):
    # The released checkpoints keep a block's linear layers as Conv1D: (in, out), not (out, in) as nn.Linear.
    return name.endswith(("c_attn.weight", "c_proj.weight", "c_fc.weight"))


def load_state(path):
    """The dict that torch.save wrote: tensors and plain values only, so that a stranger's file runs no code.

    Raises ValueError for anything else.
    """
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        if not isinstance(state, dict):
            raise ValueError(f"a {type(state).__name__}, no dict")
        return state
    except Exception as error:
        reason = str(error).partition("\n")[0]
        raise ValueError(f"{path} is damaged or not a PyTorch checkpoint: {reason}") from None


def replace(path, write):
    """Write a file beside its place and rename it: a reader finds the old one or the new, never a part.

    write: called with the path to write to. Raises OSError if it cannot be written.
    """
    part = _part(path)
    try:
        write(part)
        os.replace(part, path)
    except (OSError, RuntimeError) as error:  # torch.save raises the latter when the disk is full
        reason = str(error).partition("\n")[0]
        raise OSError(f"{path} could not be written ({reason}); what was there before is untouched") from None
    finally:
        part.unlink(missing_ok=True)


def _part(path):
    # Named for this process alone: two that write the same file do not write into each other's.
    return path.with_name(f"{path.name}.{os.getpid()}-{secrets.token_hex(4)}.part")


# --- device, dtype, processes ---


def pick_device(name="auto", local_rank=0):
    """The torch.device of a --device flag. Raises ValueError if this machine lacks it."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        device = torch.device(f"cuda:{local_rank}" if name == "cuda" else name)
        torch.zeros(1, device=device).item()
    except (RuntimeError, AssertionError) as error:
        reason = str(error).partition("\n")[0]
        raise ValueError(f"--device {name} cannot be used here ({reason}): without the flag, the best one "
                         "there is") from None
    return device


def pick_dtype(name, device):
    """The torch.dtype of a --dtype flag for the matrix products of training.

    auto: bfloat16 where the hardware multiplies in it; elsewhere it would only be emulated, slowly.
    """
    if name != "auto":
        return getattr(torch, name)
    if device.type == "cuda":
        fast = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        cpu = torch.cpu
        fast = device.type == "cpu" and (cpu._is_amx_tile_supported() or cpu._is_avx512_bf16_supported())
    return torch.bfloat16 if fast else torch.float32


def sampling_dtype(name, device, single_rows):
    """The torch.dtype to move a model to before generate, for a --dtype flag.

    auto: as in pick_dtype. But where generate computes single rows (one sequence, a short prompt, not past
    the context window), a CPU waits for the weights to be read, not for products: half the bytes take half
    the time, also without hardware for bfloat16; there, float16 is the faster one.
    """
    dtype = pick_dtype(name, device)
    if name == "auto" and device.type == "cpu" and single_rows and dtype == torch.float32:
        return torch.float16
    return dtype


class Machine:
    """The device of this process, and the other processes, if torchrun started several."""

    def __init__(self, args):
        self.rank, self.world_size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
        self.device = pick_device(args.device, int(os.environ.get("LOCAL_RANK", 0)))
        self.dtype = pick_dtype(args.dtype, self.device)
        self.signals = []
        if self.device.type == "cuda":
            torch.cuda.set_device(self.device)
        if self.world_size > 1:
            dist.init_process_group("cpu:gloo,cuda:nccl" if self.device.type == "cuda" else "gloo")
        torch.set_float32_matmul_precision("high")

    def autocast(self):
        return torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32)

    def say(self, text):
        if text and self.rank == 0:
            print(text, flush=True)

    def progress(self, what):
        """A function that shows on a terminal how much of what is done; the next line takes its place."""
        if self.rank > 0 or not sys.stderr.isatty():
            return lambda part: None
        return lambda part: print(f"{what}: {part:.0%}\033[K", end="\r", file=sys.stderr, flush=True)

    def share(self, rows):
        """This process's share of the rows of a batch."""
        return rows.tensor_split(self.world_size)[self.rank]

    def once(self, function):
        """What function returns, or the error it raises, called in the first process alone."""
        result, error = None, None
        if self.rank == 0:
            try:
                result = function()
            except (OSError, ValueError) as raised:
                error = raised
        if self.world_size > 1:
            told = [result, error]
            dist.broadcast_object_list(told, 0)
            result, error = told
        if error:
            raise error
        return result

    def first(self, function):
        """What function returns, called in the first process before the others: it fills their caches."""
        mine = []
        self.once(lambda: mine.append(function()))
        return mine[0] if mine else function()

    def sum(self, tensor):
        """The sum of a tensor over all processes, in its place."""
        if self.world_size > 1:
            dist.all_reduce(tensor)
        return tensor

    @contextlib.contextmanager
    def noting_signals(self):
        """Ctrl-C and SIGTERM are noted, to end the run between two steps; a second one ends it at once."""
        def note(signum, frame):
            self.signals.append(signum)
            if self.rank == 0:  # by the system's call: what is interrupted may be a print
                os.write(2, b"\nstopping after this step; once more: at once, at the last save\n")
            signal.signal(signum, before[signum])

        before = {signum: signal.signal(signum, note) for signum in (signal.SIGINT, signal.SIGTERM)}
        yield
        for signum, handler in before.items():
            signal.signal(signum, handler)

    def stop_requested(self):
        """Whether a signal came to any of the processes: they stop at the same step."""
        return self.sum(torch.tensor(len(self.signals))).item() > 0
