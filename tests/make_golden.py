"""
Makes the models in tests/golden/: two checkpoints that Transformers saved, and what it computes with them.
Not run by the tests. It was run once with each version:

    python -m venv hf4; hf4/bin/pip install torch "transformers==4.57.6"; hf4/bin/python tests/make_golden.py
    python -m venv hf5; hf5/bin/pip install torch "transformers==5.24.0"; hf5/bin/python tests/make_golden.py
"""

import json
from pathlib import Path

import torch
import transformers
from transformers import GPT2Config, GPT2LMHeadModel

GOLDEN = Path(__file__).parent / "golden"


def save(folder, config, pad_to=None):
    """A random model with that config, saved, with its logits and its greedy tokens."""
    torch.manual_seed(0)
    config = GPT2Config(initializer_range=0.3, **config)
    model = GPT2LMHeadModel(config).eval()
    if pad_to:
        model.resize_token_embeddings(pad_to_multiple_of=pad_to)
    for p in model.parameters():  # biases and gains, too, so that none is forgotten unseen
        p.data += 0.1 * torch.randn_like(p)
    idx = torch.randint(0, 31, (2, 12))
    model.save_pretrained(folder)  # config.json, generation_config.json, model.safetensors
    with torch.no_grad():
        logits = model(idx).logits
    how = {"do_sample": False, "max_new_tokens": 9, "eos_token_id": None}
    greedy = model.generate(idx[:, :3], attention_mask=torch.ones(2, 3), **how)
    torch.save({"idx": idx, "logits": logits, "greedy": greedy}, folder / "expected.pt")


def save_warped(path, cases):
    """The probabilities to sample with: of temperature, then top_k, then top_p."""
    logits = 2 * torch.randn(1, 40, generator=torch.Generator().manual_seed(1))
    warped = []
    for how in cases:
        p = logits / how.get("temperature", 1)
        if "top_k" in how:
            p = transformers.TopKLogitsWarper(how["top_k"])(None, p)
        if "top_p" in how:
            p = transformers.TopPLogitsWarper(how["top_p"])(None, p)
        warped.append((how, p.softmax(-1)))
    torch.save({"logits": logits, "warped": warped}, path)


if transformers.__version__ < "5":
    # Another activation's name, another width of the MLP, and a vocabulary padded from 31 tokens to 32.
    save(GOLDEN / "transformers4", dict(
        vocab_size=31, n_positions=12, n_embd=8, n_layer=1, n_head=2, n_inner=20, layer_norm_epsilon=1e-3,
        activation_function="gelu_pytorch_tanh", bos_token_id=29, eos_token_id=30, pad_token_id=28), pad_to=8)
    # In old files the window is n_ctx alone. The others are fields that are to be saved as they were.
    path = GOLDEN / "transformers4/config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    config["n_ctx"] = config.pop("n_positions")
    config |= {"task_specific_params": {"text": [1, None, 2.5]}, "other": "\u00e9", "bos_token_id": None}
    path.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
else:
    save(GOLDEN / "transformers5", dict(
        vocab_size=31, n_positions=12, n_embd=12, n_layer=2, n_head=3, bos_token_id=30, eos_token_id=30))
    save_warped(GOLDEN / "warped.pt", [
        {"temperature": 0.7}, {"top_k": 1}, {"top_k": 5}, {"top_k": 99}, {"top_p": 0.01}, {"top_p": 0.5},
        {"top_p": 0.9}, {"top_p": 0.999}, {"temperature": 1.5, "top_k": 8, "top_p": 0.6},
        {"temperature": 0.3, "top_k": 30, "top_p": 0.95}])
