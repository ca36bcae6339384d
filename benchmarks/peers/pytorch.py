"""GRPO steps of plain PyTorch with transformers on the workload that merf is measured on, one for every line of the
standard input.

    python pytorch.py SPEC.json

SPEC: config (a Hugging Face config, for random weights), prompts (ids of each), workload.sizes, dtype, threads.
Answers with one JSON object a line: when it is loaded, then the seconds of each step.

Generation is `generate` with the key/value cache, every row of the batch at once, sampling at temperature 1, with
weights in bfloat16 where dtype is bf16. Training: each completion is a row with its prompt before it, a group at a time;
log-probabilities of the completions, their clipped policy gradient, clipping, AdamW on float32 weights, with bfloat16
autocast where dtype is bf16.
"""

import copy
import json
import sys
import time

import torch
import transformers
from transformers import AutoConfig, AutoModelForCausalLM


def generate(model, prompts, tokens):
    with torch.no_grad():
        return model.generate(prompts, attention_mask=torch.ones_like(prompts), max_new_tokens=tokens, do_sample=True,
                              temperature=1.0, top_k=0, top_p=1.0, pad_token_id=0)


def train(model, optimizer, sequences, prompt_tokens, micro_batch, autocast):
    for ids in sequences.split(micro_batch):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
            logits = model(ids, use_cache=False, logits_to_keep=ids.shape[1] - prompt_tokens + 1).logits[:, :-1]
        targets = ids[:, prompt_tokens:, None]
        logprobs = torch.log_softmax(logits.float(), -1).gather(-1, targets)[..., 0]
        ratio = torch.exp(logprobs - logprobs.detach())
        advantages = (1.0 - 2.0 * (torch.arange(len(ids)) % 2))[:, None]
        loss = -torch.minimum(ratio * advantages, ratio.clamp(0.8, 1.2) * advantages).mean()
        (loss * len(ids) / len(sequences)).backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()


def main():
    with open(sys.argv[1]) as file:
        spec = json.load(file)
    sizes, bf16 = spec["workload"]["sizes"], spec["dtype"] == "bf16"
    torch.set_num_threads(spec["threads"])
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**spec["config"]), dtype=torch.float32)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6, fused=True)
    sampler = copy.deepcopy(model).to(torch.bfloat16) if bf16 else model
    prompts = torch.tensor(spec["prompts"]).repeat_interleave(sizes["group"], 0)
    print(json.dumps({"versions": {"PyTorch": torch.__version__, "transformers": transformers.__version__}}), flush=True)
    for _ in sys.stdin:
        start = time.perf_counter()
        if bf16:
            sampler.load_state_dict(model.state_dict())
        sequences = generate(sampler, prompts, sizes["completionTokens"])
        sampled = time.perf_counter()
        train(model, optimizer, sequences, prompts.shape[1], sizes["group"], bf16)
        end = time.perf_counter()
        print(json.dumps({"generation": sampled - start, "training": end - sampled, "step": end - start,
                          "tokens": sequences.numel() - prompts.numel()}), flush=True)


if __name__ == "__main__":
    main()
