"""
Makes tests/golden/: folders that Transformers saved, and what its GPT-2 and its tokenizers compute, for the
tests to hold ours against. Not run by the tests; needs `pip install transformers`, and was run once, with
transformers 5.23.0, by

    python tests/make_golden.py
"""

import json
from pathlib import Path

import torch
from transformers import AutoTokenizer, GPT2Config, GPT2LMHeadModel, GPT2Tokenizer

golden = Path(__file__).parent / "golden"
golden.mkdir(exist_ok=True)

torch.manual_seed(0)
config = GPT2Config(vocab_size=31, n_positions=12, n_embd=12, n_layer=2, n_head=3, initializer_range=0.3,
                    bos_token_id=30, eos_token_id=30)
model = GPT2LMHeadModel(config).eval()
for p in model.parameters():  # biases and gains, too, so that none is forgotten unseen
    p.data += 0.1 * torch.randn_like(p)
idx = torch.randint(0, 31, (2, 12))
model.save_pretrained(golden)  # config.json, generation_config.json, model.safetensors
with torch.no_grad():
    torch.save({"idx": idx, "logits": model(idx).logits}, golden / "logits.pt")

# White space of all kinds, contractions, marks, digits, an emoji, and <|endoftext|> written out.
text = ("It's we'll I'VE  two  spaces\t\ttabs\r\nCRLF\r\n\r\n\n\nblank lines   \n   indented\u00a0no-break"
        "\u3000ideographic e\u0301 na\u00efve \U0001f469\u200d\U0001f680 1234 x1y2 a,b;c... ??!  "
        "<|endoftext|> 'quoted' \x1c\x85 end \n")


def save_tokens(tokenizer, folder):
    tokens = tokenizer.encode(text, split_special_tokens=True)
    (folder / "tokens.json").write_text(json.dumps({"text": text, "tokens": tokens}), encoding="utf-8")


tiny = Path(__file__).parent.parent / "tiny"
save_tokens(AutoTokenizer.from_pretrained(tiny), golden)

# A tokenizer as Transformers 5 saves it, without vocab.json and merges.txt: the first tokens of tiny's.
tokens = list(json.loads((tiny / "vocab.json").read_text(encoding="utf-8")))[:399] + ["<|endoftext|>"]
merges = [tuple(m.split()) for m in (tiny / "merges.txt").read_text(encoding="utf-8").splitlines()[1:144]]
tokenizer = GPT2Tokenizer(vocab={token: i for i, token in enumerate(tokens)}, merges=merges)
tokenizer.save_pretrained(golden / "tokenizer")
save_tokens(tokenizer, golden / "tokenizer")
