"""
GPT-2 (Radford et al. 2019): the network and how it generates, then checkpoint folders and downloads.

    model = GPT.from_pretrained("gpt2")     # a released model, OWNER/NAME on the hub, or a folder
    logits = model(idx)                     # (B, T) int64 -> (B, T, vocab_size)

The network and generate() come first. What follows reads, writes and downloads files: skip it at first.
Module names and files are Hugging Face's. This file knows neither the loss (pdl.py) nor text (count.py).
"""

import http.client
import json
import math
import os
import re
import secrets
import sys
import urllib.error
import urllib.request
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.benchmark import Timer
from torch.utils.checkpoint import checkpoint


@dataclass
class GPTConfig:
    """The fields of config.json that are used here. The defaults are GPT-2's."""

    vocab_size: int = 50257
    n_positions: int = 1024  # the context window
    n_embd: int = 768
    n_layer: int = 12
    n_head: int = 12
    n_inner: int | None = None  # width of the MLP; None: 4 * n_embd
    layer_norm_epsilon: float = 1e-5
    eos_token_id: int = 50256  # the end-of-text token
    other: dict = field(default_factory=dict)  # all other fields, to be saved as they were


class Attention(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.n_head = config.n_head
        self.c_attn = nn.Linear(config.n_embd, 3 * config.n_embd)  # query, key and value at once
        self.c_proj = nn.Linear(config.n_embd, config.n_embd)
        self.dropout = nn.Dropout(0.0)

    def forward(self, x, cache=None, pos=0):
        B, T, C = x.shape
        # q, k, v: (B, n_head, T, C / n_head) each
        q, k, v = self.c_attn(x).view(B, T, 3, self.n_head, -1).permute(2, 0, 3, 1, 4)
        if cache is not None:  # (2, B, n_head, length, C / n_head): keys and values of the tokens before pos
            cache[:, :, :, pos : pos + T] = torch.stack((k, v))
            k, v = cache[:, :, :, : pos + T]  # (B, n_head, pos + T, C / n_head) each
        dropout = self.dropout.p if self.training else 0.0
        # A prompt needs the causal mask. A single new token may see all keys.
        y = F.scaled_dot_product_attention(q, k, v, dropout_p=dropout, is_causal=T > 1)
        y = y.transpose(1, 2).reshape(B, T, C)  # the heads side by side
        return self.dropout(self.c_proj(y))


class MLP(nn.Module):
    def __init__(self, config):
        super().__init__()
        n_inner = config.n_inner or 4 * config.n_embd
        self.c_fc = nn.Linear(config.n_embd, n_inner)
        self.c_proj = nn.Linear(n_inner, config.n_embd)
        self.dropout = nn.Dropout(0.0)

    def forward(self, x):
        return self.dropout(self.c_proj(F.gelu(self.c_fc(x), approximate="tanh")))


class Block(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.n_embd, config.layer_norm_epsilon)
        self.attn = Attention(config)
        self.ln_2 = nn.LayerNorm(config.n_embd, config.layer_norm_epsilon)
        self.mlp = MLP(config)

    def forward(self, x, cache=None, pos=0, recompute_mlp=False):
        x = x + self.attn(self.ln_1(x), cache, pos)
        if recompute_mlp:
            return x + checkpoint(lambda x: self.mlp(self.ln_2(x)), x, use_reentrant=False)
        return x + self.mlp(self.ln_2(x))


class GPT(nn.Module):
    """GPT-2. The token embedding is also the output layer (tied weights)."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.generation_config = {}  # the content of generation_config.json, to be saved as it was
        # True: the backward pass computes the MLPs again, which halves the memory of a block at little cost.
        self.activation_checkpointing = False
        self.wte = nn.Embedding(config.vocab_size, config.n_embd)
        self.wpe = nn.Embedding(config.n_positions, config.n_embd)
        self.drop = nn.Dropout(0.0)
        self.h = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        self.ln_f = nn.LayerNorm(config.n_embd, config.layer_norm_epsilon)
        # A fresh model: layers that write to the residual stream start smaller (GPT-2, section 2.3).
        residual_std = 0.02 / math.sqrt(2 * config.n_layer)
        for name, p in self.named_parameters():
            if p.dim() > 1:
                nn.init.normal_(p, std=residual_std if "c_proj" in name else 0.02)
            elif name.endswith("bias"):
                nn.init.zeros_(p)

    def set_dropout(self, p):
        """Set the dropout probability. It is 0 until then, whatever config.json says."""
        for module in self.modules():
            if isinstance(module, nn.Dropout):
                module.p = p

    @property
    def lm_head(self):
        """The output matrix, (vocab_size, n_embd): logits = hidden @ lm_head.T."""
        return self.wte.weight

    def forward(self, idx, return_hidden=False, cache=None, pos=0):
        """idx (B, T) int64 -> logits (B, T, vocab_size), or the hidden states they come from, (B, T, n_embd).

        cache: from new_cache. pos: the number of tokens in it; if it is not 0, idx has one token.
        Raises ValueError for more tokens than the context window holds.
        """
        T, window = idx.shape[1], self.config.n_positions
        if pos + T > window:
            raise ValueError(f"{pos + T} tokens do not fit into the context window of {window}")
        x = self.drop(self.wte(idx) + self.wpe.weight[pos : pos + T])  # (B, T, n_embd)
        recompute_mlp = self.activation_checkpointing and self.training
        for i, block in enumerate(self.h):
            x = block(x, None if cache is None else cache[i], pos, recompute_mlp)
        x = self.ln_f(x)
        return x if return_hidden else F.linear(x, self.lm_head)

    def new_cache(self, batch_size, length):
        """Room for the keys and values of length tokens: (n_layer, 2, B, n_head, length, head size)."""
        c = self.config
        return self.lm_head.new_empty(c.n_layer, 2, batch_size, c.n_head, length, c.n_embd // c.n_head)

    @torch.no_grad()
    def generate(self, idx, max_new_tokens, temperature=1.0, top_k=None, top_p=None, logit_bias=None):
        """Append max_new_tokens sampled tokens to idx: (B, T) -> (B, T + max_new_tokens). T >= 1.

        temperature: 0 takes the likeliest token. top_k: sample among the k likeliest. top_p: among the fewest
        likeliest whose probabilities reach top_p together (Holtzman et al. 2020). logit_bias: (V,), added to
        the logits. Beyond the context window, the last n_positions tokens are seen.
        """
        B, T = idx.shape
        window, was_training, onednn = self.config.n_positions, self.training, torch.backends.mkldnn.enabled
        idx = torch.cat((idx, idx.new_empty(B, max_new_tokens)), dim=1)
        cache, pos = self.new_cache(B, min(window, T + max_new_tokens)), 0
        self.eval()
        for end in range(T, T + max_new_tokens):
            inputs = idx[:, pos:end]  # all of the prompt, then the newest token alone
            if end > window:  # now each token's position changes, so the cache is of no use
                inputs, cache, pos = idx[:, end - window : end], None, 0
            # oneDNN is slow for one row in half precision: 63 tokens/s with it, 116 without (AMD EPYC).
            one_row = inputs.numel() == 1 and self.lm_head.dtype != torch.float32
            torch.backends.mkldnn.enabled = onednn and not one_row
            hidden = self(inputs, True, cache, pos)  # (B, T, n_embd)
            logits = F.linear(hidden[:, -1], self.lm_head).float()  # (B, V), of the newest token
            torch.backends.mkldnn.enabled = onednn
            pos = end
            if logit_bias is not None:
                logits += logit_bias
            idx[:, end] = sample_token(logits, temperature, top_k, top_p)
        self.train(was_training)
        return idx

    @classmethod
    def from_pretrained(cls, name_or_folder):
        """Load a released model ("gpt2"), OWNER/NAME on the hub, or a checkpoint folder, in float32.

        Raises OSError if it cannot be found or downloaded, ValueError if it is not a GPT-2.
        """
        folder = checkpoint_folder(name_or_folder)
        model = empty_model(folder)
        model.load_state_dict(read_weights(folder, model), assign=True)
        return model

    def save_pretrained(self, folder):
        """Write a checkpoint folder that Transformers opens, too; without the tokenizer. Raises OSError."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        known = asdict(self.config)
        other = known.pop("other")
        new = {"architectures": ["GPT2LMHeadModel"], "bos_token_id": known["eos_token_id"]}
        config = FIXED | new | other | known  # the last one wins
        for name in {"dtype", "torch_dtype"} & config.keys():  # Transformers opens the file in it
            config[name] = str(self.lm_head.dtype).removeprefix("torch.")
        write_json(folder / "config.json", config)
        if self.generation_config:
            write_json(folder / "generation_config.json", self.generation_config)
        state = {f"transformer.{name}": transpose_linear(name, w) for name, w in self.state_dict().items()}
        write_safely(folder / "model.safetensors", lambda path: write_safetensors(path, state))


def sample_token(logits, temperature=1.0, top_k=None, top_p=None):
    """A token for each row of logits (B, V): (B,). The arguments are those of GPT.generate."""
    if temperature < 1e-6:
        return logits.argmax(-1)
    logits = logits / temperature
    if top_k is None and top_p is None:
        return torch.multinomial(logits.softmax(-1), 1)[:, 0]
    V = logits.shape[-1]
    logits, tokens = logits.topk(min(top_k or V, V))  # (B, k) each, the likeliest first
    p = logits.softmax(-1)
    if top_p is not None:
        before = p.cumsum(-1) - p  # (B, k), the probability of all likelier tokens
        p[:, 1:][before[:, 1:] >= top_p] = 0  # the likeliest token always stays
    return tokens.gather(1, torch.multinomial(p, 1))[:, 0]


# --- checkpoint folders: config.json, model.safetensors and the tokenizer's files ---

# What config.json says of every GPT-2. With other values it would be another network.
FIXED = {"model_type": "gpt2", "activation_function": "gelu_new", "scale_attn_weights": True,
         "scale_attn_by_inverse_layer_idx": False, "add_cross_attention": False, "tie_word_embeddings": True}
WEIGHT_FILES = ("model.safetensors", "pytorch_model.bin")  # the first that exists is read
NOT_WEIGHTS = (".attn.bias", ".attn.masked_bias", "lm_head.weight")  # causal masks, and wte once more
DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
          "BOOL": torch.bool, "U8": torch.uint8}  # the last two are for causal masks


def empty_model(folder):
    """The GPT that config.json describes, without weights (on torch's meta device). Raises ValueError."""
    try:
        given = json.loads((folder / "config.json").read_bytes())
        for name, value in FIXED.items():
            if given.get(name, value) not in (value, "gelu_pytorch_tanh"):  # another name of gelu_new
                raise ValueError(f"{name} is {given[name]!r}, not {value!r}")
        given.setdefault("n_positions", given.get("n_ctx", GPTConfig.n_positions))
        known = GPTConfig.__dataclass_fields__.keys() - {"other"}
        config = GPTConfig(**{name: given.pop(name) for name in known & given.keys()}, other=given)
        with torch.device("meta"):
            model = GPT(config)
            model(torch.zeros(1, 1, dtype=torch.int64))  # fails unless its sizes fit together
        if (folder / "generation_config.json").exists():
            generation_config = json.loads((folder / "generation_config.json").read_bytes())
            model.generation_config = {} | generation_config  # fails unless it is a dict
        return model
    except Exception as error:  # a stranger's file can hold anything
        raise ValueError(f"{folder}: config.json or generation_config.json is not GPT-2's: "
                         f"{first_line(error)}") from None


def read_weights(folder, model):
    """The state dict for a GPT from a checkpoint folder, in float32. Raises ValueError."""
    paths = [folder / name for name in WEIGHT_FILES]
    path = next((path for path in paths if path.exists()), paths[0])
    try:
        if path.suffix == ".bin":  # a stranger's file runs no code
            stored = dict(torch.load(path, map_location="cpu", weights_only=True))
        else:
            stored = read_safetensors(path)
        state = {}
        for name in [name for name in stored if not name.endswith(NOT_WEIGHTS)]:
            w = transpose_linear(name, stored.pop(name))  # pop, to hold no weight twice
            state[name.removeprefix("transformer.")] = w.float().contiguous()
        found = {name: tuple(w.shape) for name, w in state.items()}
        wanted = {name: tuple(w.shape) for name, w in model.state_dict().items()}
        for name in sorted(found.keys() | wanted.keys()):
            if found.get(name) != wanted.get(name):
                raise ValueError(f"{name!r} has shape {found.get(name)}, in config.json {wanted.get(name)}")
            if not state[name].isfinite().all():
                raise ValueError(f"{name} is NaN or infinite")
        return state
    except Exception as error:
        raise ValueError(f"{path} is damaged, or does not fit config.json: {first_line(error)}") from None


def first_line(error):
    return str(error).partition("\n")[0] or type(error).__name__


def transpose_linear(name, w):
    """Checkpoints have the linear layers of a block as (in, out), nn.Linear as (out, in)."""
    return w.transpose(0, -1) if name.endswith(("c_attn.weight", "c_proj.weight", "c_fc.weight")) else w


def read_safetensors(path):
    """{name: tensor}. The file has 8 bytes for the header's length, the header in JSON, and the tensors."""
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        header, state = json.loads(file.read(length)), {}
        for name, entry in header.items():
            if name != "__metadata__":
                begin, end = entry["data_offsets"]
                file.seek(8 + length + begin)
                data = bytearray(file.read(end - begin))  # in memory, since in the file it may be unaligned
                state[name] = torch.frombuffer(data, dtype=DTYPES[entry["dtype"]]).view(entry["shape"])
        return state


def write_safetensors(path, state):
    header, end = {"__metadata__": {"format": "pt"}}, 0
    codes = {dtype: code for code, dtype in DTYPES.items()}
    for name, w in state.items():
        begin, end = end, end + w.nbytes
        header[name] = {"dtype": codes[w.dtype], "shape": list(w.shape), "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # aligns the tensors, for those who map the file into memory
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for w in state.values():
            file.write(w.cpu().contiguous().view(torch.uint8).numpy())


def write_safely(path, write):
    """Let write(path) make a temporary file, then rename it to its place. Raises OSError."""
    part = path.with_name(path.name + ".part")
    try:
        write(part)
        os.replace(part, path)
    except (OSError, RuntimeError) as error:  # torch.save raises RuntimeError when the disk is full
        raise OSError(f"{path} could not be written ({first_line(error)}); nothing was changed") from None
    finally:
        part.unlink(missing_ok=True)


def write_json(path, content):
    write_safely(path, lambda part: part.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8"))


# --- downloads ---

RELEASED = {name: f"openai-community/{name}" for name in ("gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl")}
RELEASED["distilgpt2"] = "distilbert/distilgpt2"
# A tokenizer is tokenizer.json, or vocab.json with merges.txt. The other files belong to it.
TOKENIZER_FILES = ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "tokenizer.json",
                   "merges.txt", "vocab.json")


def checkpoint_folder(name_or_folder, weights=True):
    """The local folder of a checkpoint, or of just a tokenizer. A model on the hub is downloaded once.

    Hugging Face's own cache may have it, by either name. HF_ENDPOINT names a mirror.
    Raises OSError if there is no such folder or model, ValueError if it is not a GPT-2.
    """
    name = str(name_or_folder)
    repo = RELEASED.get(name_or_folder, name)  # only the string "gpt2"; "./gpt2" and Path("gpt2") are folders
    folders = [Path(name)]
    if repo != name or (re.fullmatch(r"\w[\w.-]*/[\w.-]+", name) and not Path(name).exists()):
        own = Path(torch.hub.get_dir(), "pdl", repo.replace("/", "--"))
        folders = own, hub_snapshot(name), hub_snapshot(repo)
        if not any(is_complete(folder, weights) for folder in folders):
            fetch(name, repo, own, weights)
    for folder in folders:
        if is_complete(folder, weights):
            return folder
    needs = f"config.json and {' or '.join(WEIGHT_FILES)} (an adapter must be merged, shards be joined)"
    if not weights:
        needs = "tokenizer.json, or vocab.json and merges.txt"
    raise FileNotFoundError(f"{name} is none of {', '.join(RELEASED)}, and no folder with {needs}")


def is_complete(folder, weights):
    has = {path.name for path in folder.glob("*") if path.exists()}  # not a link to a file that is gone
    if weights:
        return "config.json" in has and not has.isdisjoint(WEIGHT_FILES)
    return "tokenizer.json" in has or {"vocab.json", "merges.txt"} <= has


def hub_snapshot(repo):
    """The folder of a model in Hugging Face's own cache. It may not exist."""
    cache = os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")
    hub = os.environ.get("HF_HUB_CACHE", Path(os.environ.get("HF_HOME", Path(cache, "huggingface")), "hub"))
    folder = Path(hub, f"models--{repo.replace('/', '--')}")
    main = folder / "refs/main"
    return folder / "snapshots" / (main.read_text(encoding="utf-8").strip() if main.exists() else "none")


def fetch(name, repo, folder, weights):
    """Download the files that a folder lacks. Weights come last, so a folder with weights is complete."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        files = "config.json", "generation_config.json", *TOKENIZER_FILES, *(WEIGHT_FILES if weights else ())
        for file in files:
            if not (folder / file).exists() and not (file in WEIGHT_FILES and is_complete(folder, weights)):
                download(repo, folder / file)
            if file == "config.json" and (folder / file).exists():
                empty_model(folder)  # fails for another network, before much is downloaded
    except (OSError, http.client.HTTPException) as error:
        reason = getattr(error, "reason", error)  # of a URLError
        raise OSError(f"{name} is neither a folder nor cached, and cannot be downloaded ({reason})") from None


def download(repo, path):
    """Download a file of a model, if the model has it. A broken download leaves no file."""
    endpoint = os.environ.get("HF_ENDPOINT", "https://huggingface.co").rstrip("/")
    part = path.with_name(f"{path.name}.{secrets.token_hex(4)}.part")  # its own, if several download at once
    try:
        with urllib.request.urlopen(f"{endpoint}/{repo}/resolve/main/{path.name}", timeout=30) as reply:
            size, done = int(reply.headers["Content-Length"] or 0), 0
            with open(part, "wb") as file:
                while data := reply.read(1 << 22):
                    done += file.write(data)
                    if sys.stderr.isatty():
                        print(f"{path.name}: {done:,} of {size:,} bytes\033[K", end="\r", file=sys.stderr)
        if size and done != size:
            raise OSError(f"{path.name}: {done:,} of {size:,} bytes came; try again")
        with open(part, "rb") as file:
            if file.read(5).lower() in (b"<html", b"<!doc"):  # a log-in page
                raise ValueError
        if path.suffix == ".json":
            json.loads(part.read_bytes())
        os.replace(part, path)
    except urllib.error.HTTPError as error:
        if error.code != 404:
            raise OSError(f"{path.name}: {error}") from None
    except (ValueError, RecursionError):
        raise OSError(f"{path.name} from the hub is not what it should be: try again") from None
    finally:
        part.unlink(missing_ok=True)


# --- devices and dtypes ---


def pick_device(name="auto", local_rank=0):
    """The torch.device of a --device flag. Raises ValueError if this machine lacks it."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        device = torch.device(f"cuda:{local_rank}" if name == "cuda" else name)
        torch.zeros(1, device=device).item()
    except Exception as error:  # each backend has its own
        raise ValueError(f"--device {name} cannot be used here ({first_line(error)}): leave it out") from None
    return device


def pick_dtype(name, device, sampling=False):
    """The torch.dtype of a --dtype flag. "auto" is what should be fastest here."""
    if name != "auto":
        return getattr(torch, name)
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float32
    if device.type != "cpu":
        return torch.float32
    if sampling:  # reading the weights takes most of the time, so half the bytes take half the time
        has_bfloat16 = torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported()
        return torch.bfloat16 if has_bfloat16 else torch.float16

    def seconds(dtype):  # of a matrix product: many CPUs are slower with bfloat16
        a, b = torch.ones(512, 768, dtype=dtype), torch.ones(768, 3072, dtype=dtype)
        return Timer("a @ b", globals={"a": a, "b": b}).timeit(5).mean

    return torch.bfloat16 if 1.5 * seconds(torch.bfloat16) < seconds(torch.float32) else torch.float32
