"""GRPO steps of TRL on the workload that merf is measured on, one for every line of the standard input.

    python trl.py SPEC.json

SPEC: config (a Hugging Face config, for random weights), prompts (ids of each), workload.sizes, dtype, threads.
Answers with one JSON object a line: when it is loaded, then the seconds of each step.

The settings are the fastest that TRL has for the CPU: no gradient checkpointing, the fused optimiser, one iteration
and no KL, so that neither old nor reference log-probabilities are computed; bfloat16 by autocast.
"""

import json
import os
import sys
import time

sys.path.pop(0)  # this folder, whose trl is this file
answers, sys.stdout = sys.stdout, sys.stderr  # a trainer prints

import accelerate
import torch
import transformers
import trl
from datasets import Dataset
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast, TrainerCallback
from trl import GRPOConfig, GRPOTrainer


class TimedTrainer(GRPOTrainer):
    def _generate_single_turn(self, *args, **kwargs):
        start = time.perf_counter()
        out = super()._generate_single_turn(*args, **kwargs)
        self.generation_seconds = time.perf_counter() - start
        self.generated_tokens = sum(len(ids) for ids in out[0])
        return out


class StepTime(TrainerCallback):
    def on_step_begin(self, *args, **kwargs):
        self.start = time.perf_counter()

    def on_step_end(self, *args, **kwargs):
        self.seconds = time.perf_counter() - self.start


def answer(value):
    print(json.dumps(value), file=answers, flush=True)


def main():
    with open(sys.argv[1]) as file:
        spec = json.load(file)
    sizes = spec["workload"]["sizes"]
    torch.set_num_threads(spec["threads"])

    # Every id is a word.
    words = {f"w{i}": i for i in range(spec["config"]["vocab_size"])}
    tokenizer = Tokenizer(WordLevel(words, unk_token="w0"))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="w0", eos_token="w1")
    prompts = [" ".join(f"w{i}" for i in ids) for ids in spec["prompts"]]

    step_time = StepTime()
    trainer = TimedTrainer(
        model=AutoModelForCausalLM.from_config(AutoConfig.for_model(**spec["config"]), dtype=torch.float32),
        processing_class=tokenizer,
        train_dataset=Dataset.from_dict({"prompt": prompts}),
        reward_funcs=lambda completions, **_: [float(i % 2) for i in range(len(completions))],
        callbacks=[step_time],
        args=GRPOConfig(
            output_dir=os.path.dirname(sys.argv[1]),
            use_cpu=True,
            bf16=spec["dtype"] == "bf16",
            per_device_train_batch_size=sizes["group"],
            gradient_accumulation_steps=sizes["prompts"],
            num_generations=sizes["group"],
            max_completion_length=sizes["completionTokens"],
            generation_kwargs={"min_new_tokens": sizes["completionTokens"]},
            beta=0.0,
            loss_type="grpo",
            gradient_checkpointing=False,
            max_steps=1,
            disable_tqdm=True,
            save_strategy="no",
            report_to="none",
        ),
    )
    answer({"versions": {"TRL": trl.__version__, "transformers": transformers.__version__,
                         "accelerate": accelerate.__version__, "PyTorch": torch.__version__}})
    for _ in sys.stdin:
        trainer.train()
        generation, step = trainer.generation_seconds, step_time.seconds
        answer({"generation": generation, "training": step - generation, "step": step,
                "tokens": trainer.generated_tokens})


if __name__ == "__main__":
    main()
