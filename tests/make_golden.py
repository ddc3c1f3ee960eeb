"""
Makes tests/golden/: what Transformers' GPT-2 and its tokenizer compute, for test_model.py and test_count.py to hold ours
against. Not run by the tests; needs `pip install transformers`, and was run once, with transformers 5.23.0, by

    python tests/make_golden.py
"""

import json
from pathlib import Path

import torch
from transformers import AutoTokenizer, GPT2Config, GPT2LMHeadModel

golden = Path(__file__).parent / "golden"
golden.mkdir(exist_ok=True)

torch.manual_seed(0)
config = GPT2Config(vocab_size=31, n_positions=12, n_embd=12, n_layer=2, n_head=3, initializer_range=0.3,
                    bos_token_id=30, eos_token_id=30)
model = GPT2LMHeadModel(config).eval()
for p in model.parameters():  # biases and gains, too, so that none is forgotten unseen
    p.data += 0.1 * torch.randn_like(p)
idx = torch.randint(0, 31, (2, 12))
config.save_pretrained(golden)
torch.save(model.state_dict(), golden / "pytorch_model.bin")
with torch.no_grad():
    model(idx)
    torch.save({"idx": idx, "logits": model(idx).logits}, golden / "logits.pt")

# White space of all kinds, contractions, marks, digits, an emoji, and <|endoftext|> written out.
text = ("It's we'll I'VE  two  spaces\t\ttabs\r\nCRLF\r\n\r\n\n\nblank lines   \n   indented\u00a0no-break\u3000ideographic "
        "e\u0301 na\u00efve \U0001f469\u200d\U0001f680 1234 x1y2 a,b;c... ??!  <|endoftext|> 'quoted' \x1c\x85 end \n")
tokenizer = AutoTokenizer.from_pretrained(Path(__file__).parent.parent / "tiny")
tokens = tokenizer.encode(text, split_special_tokens=True)
json.dump({"text": text, "tokens": tokens}, open(golden / "tokens.json", "w"))
