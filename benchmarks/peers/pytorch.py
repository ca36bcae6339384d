"""PyTorch with transformers on the work of benchmarks/bench.ts; prints one JSON object.

    python pytorch.py SPEC.json

SPEC: {config: a Hugging Face config, tokens: {opening, question, completion: lengths}, prompts, group, dtype,
threads, microBatch, repetitions}. Weights are random: no figure here depends on their values.

Training is what TRL does: every completion is a row of its own with its prompt before it, log-probabilities of the
completions, their policy gradient, AdamW in float32 with bfloat16 autocast where dtype is bf16. Generation is
`generate` with the key/value cache, all rows in one batch, sampling at temperature 1.
"""

import json
import sys
import time

import torch
from transformers import AutoConfig, AutoModelForCausalLM


def rows(spec, vocabulary, completions):
    """Token ids [prompts * group, length]: rows share the opening, groups share the question."""
    generator = torch.Generator().manual_seed(0)
    tokens = spec["tokens"]

    def draw(count):
        return torch.randint(3, vocabulary, (count,), generator=generator)

    opening = draw(tokens["opening"])
    found = []
    for _ in range(spec["prompts"]):
        prompt = torch.cat([opening, draw(tokens["question"])])
        for _ in range(spec["group"]):
            found.append(torch.cat([prompt, draw(tokens["completion"])]) if completions else prompt)
    return torch.stack(found)


def median(values):
    return sorted(values)[len(values) // 2]


def timed(repetitions, run):
    seconds = []
    for _ in range(repetitions):
        start = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - start)
    return median(seconds)


def train_step(model, optimizer, ids, completion, micro_batch, autocast):
    optimizer.zero_grad()
    count = ids.shape[0] * completion
    for chunk in ids.split(micro_batch):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
            logits = model(input_ids=chunk, use_cache=False, logits_to_keep=completion + 1).logits[:, :-1]
        logprobs = torch.log_softmax(logits.float(), -1).gather(-1, chunk[:, -completion:, None])[..., 0]
        ratio = torch.exp(logprobs - logprobs.detach())
        (-(ratio * 0.5).sum() / count).backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()


def generate(model, ids, completion):
    with torch.no_grad():
        model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=completion, min_new_tokens=completion,
                       do_sample=True, top_k=0, pad_token_id=0)


def main():
    with open(sys.argv[1]) as file:
        spec = json.load(file)
    torch.set_num_threads(spec["threads"])
    torch.manual_seed(0)
    config = AutoConfig.for_model(**spec["config"])
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    completion = spec["tokens"]["completion"]
    bf16 = spec["dtype"] == "bf16"

    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6)
    ids = rows(spec, config.vocab_size, completions=True)
    train_step(model, optimizer, ids[: spec["microBatch"]], completion, spec["microBatch"], bf16)
    training = timed(spec["repetitions"],
                     lambda: train_step(model, optimizer, ids, completion, spec["microBatch"], bf16))
    del optimizer
    model.zero_grad(set_to_none=True)

    model.eval()
    if bf16:
        model.to(torch.bfloat16)
    prompts = rows(spec, config.vocab_size, completions=False)
    generate(model, prompts, 4)
    rollout = timed(spec["repetitions"], lambda: generate(model, prompts, completion))
    import transformers
    print(json.dumps({
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
        "rolloutSeconds": rollout, "trainingSeconds": training,
    }))


if __name__ == "__main__":
    main()
