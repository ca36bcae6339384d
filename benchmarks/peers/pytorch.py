"""PyTorch with transformers on the very prompts and completions that benchmarks/index.ts measured merf with.

    python pytorch.py SPEC.json

SPEC: {model: directory} or {config: a Hugging Face config, for random weights}, prompts: ids of each, group,
completions: ids of each (prompt-major), maxTokens, dtype, threads, microBatch, repetitions. Prints one JSON object.

Generation is `generate` with the key/value cache, every row of the batch at once, sampling at temperature 1, in
bfloat16 where dtype is bf16. Training is what TRL does: each completion is a row with its prompt before it (prompts
padded left, completions right), log-probabilities of the completions, their clipped policy gradient, clipping, AdamW
on float32 weights, with bfloat16 autocast where dtype is bf16.
"""

import json
import statistics
import sys
import time

import torch
import transformers
from transformers import AutoConfig, AutoModelForCausalLM


def padded(rows, left):
    """Ids and mask [rows, longest]."""
    width = max(len(row) for row in rows)
    ids, mask = torch.zeros(len(rows), width, dtype=torch.long), torch.zeros(len(rows), width, dtype=torch.long)
    for i, row in enumerate(rows):
        at = slice(width - len(row), width) if left else slice(0, len(row))
        ids[i, at] = torch.tensor(row)
        mask[i, at] = 1
    return ids, mask


def median_rate(repetitions, run):
    """Tokens a second of runs that return how many tokens they made."""
    rates = []
    for _ in range(repetitions):
        start = time.perf_counter()
        tokens = run()
        rates.append(tokens / (time.perf_counter() - start))
    return statistics.median(rates)


def train_step(model, optimizer, prompts, completions, micro_batch, autocast):
    (prompt_ids, prompt_mask), (ids, mask) = prompts, completions
    for rows in torch.arange(len(ids)).split(micro_batch):
        attention = torch.cat([prompt_mask[rows], mask[rows]], 1)
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
            logits = model(
                input_ids=torch.cat([prompt_ids[rows], ids[rows]], 1), attention_mask=attention,
                position_ids=(attention.cumsum(1) - 1).clamp(min=0), use_cache=False,
                logits_to_keep=ids.shape[1] + 1,
            ).logits[:, :-1]
        logprobs = torch.log_softmax(logits.float(), -1).gather(-1, ids[rows][..., None])[..., 0]
        ratio = torch.exp(logprobs - logprobs.detach())
        (-(ratio * mask[rows]).sum() / mask.sum()).backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()
    return mask.sum().item()


def generate(model, prompts, max_tokens):
    """Tokens drawn, to each row's end token."""
    ids, mask = prompts
    with torch.no_grad():
        full = model.generate(ids, attention_mask=mask, max_new_tokens=max_tokens, do_sample=True, temperature=1.0,
                              top_k=0, top_p=1.0, pad_token_id=0)
    ends = model.generation_config.eos_token_id
    ends = torch.tensor([ends] if isinstance(ends, int) else ends or [])
    drawn = torch.isin(full[:, ids.shape[1]:], ends)
    return sum(row.int().argmax().item() + 1 if row.any() else len(row) for row in drawn)


def main():
    with open(sys.argv[1]) as file:
        spec = json.load(file)
    torch.set_num_threads(spec["threads"])
    torch.manual_seed(0)
    if "model" in spec:
        model = AutoModelForCausalLM.from_pretrained(spec["model"], dtype=torch.float32)
    else:
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**spec["config"]), dtype=torch.float32)
    bf16, micro_batch = spec["dtype"] == "bf16", spec["microBatch"]
    prompts = padded([prompt for prompt in spec["prompts"] for _ in range(spec["group"])], left=True)
    completions = padded(spec["completions"], left=False)

    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6)

    def step(rows=None):
        some = slice(rows)
        return train_step(model, optimizer, [t[some] for t in prompts], [t[some] for t in completions], micro_batch, bf16)

    step(rows=2)
    training = median_rate(spec["repetitions"], step)
    del optimizer
    model.zero_grad(set_to_none=True)

    model.eval()
    if bf16:
        model.to(torch.bfloat16)
    generate(model, [t[:2] for t in prompts], 2)
    rollout = median_rate(spec["repetitions"], lambda: generate(model, prompts, spec["maxTokens"]))
    print(json.dumps({
        "name": f"PyTorch {torch.__version__.split('+')[0]}, transformers {transformers.__version__}",
        "rollout": rollout,
        "training": training,
    }))


if __name__ == "__main__":
    main()
