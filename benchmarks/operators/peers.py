"""merf's operators beside the same work in PyTorch.

    python peers.py [--device cuda] [--backends flash,cudnn,efficient] [--seconds N] -- OPERATORS [ARGUMENT...]

OPERATORS is the program operators with its arguments, of which --dtype, --threads and --tiny hold for PyTorch, too. It is run as a server: for each of its cases merf measures
first and PyTorch right after it, on the same shapes and the same card. Prints the lines of both, one JSON object each.
Cases that would begin after --seconds are left out, with a line that says so.

PyTorch's times are medians of up to 11 samples after a warm-up, by CUDA events on a GPU; a sample is as many calls one
after another as take a few milliseconds, as merf's are.

What PyTorch is given to do:
- attention: scaled_dot_product_attention, causal, by every back end that takes the shape. A forest is given to it as
  the rows it stands for, side by side ("unshared"), and once more as one row with the forest's mask ("masked").
- decoding: the same, one query a row against its keys and values, side by side in memory.
- sampling: softmax, sort, top-k, top-p, multinomial, and log-probabilities of what was drawn.
- loss: the clipped policy gradient of GRPO with its backward, eager and compiled.
"""

import argparse
import json
import math
import statistics
import subprocess
import sys
import time

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

BACKENDS = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "math": SDPBackend.MATH,
}


class Peer:
    def __init__(self, device, dtype, tiny, backends):
        self.device, self.dtype, self.tiny, self.backends = torch.device(device), dtype, tiny, backends
        self.cuda = self.device.type == "cuda"

    # ---- measuring

    def synchronize(self):
        if self.cuda:
            torch.cuda.synchronize()

    def sample(self, run, calls):
        """Milliseconds of one call."""
        if not self.cuda:
            start = time.perf_counter()
            for _ in range(calls):
                run()
            return 1e3 * (time.perf_counter() - start) / calls
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        for _ in range(calls):
            run()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / calls

    def median_ms(self, run):
        self.synchronize()
        first = self.sample(run, 1)
        if self.tiny:
            return first
        estimate = first if first > 1000.0 else min(self.sample(run, 2), self.sample(run, 2))
        calls = int(min(max(5.0 / estimate, 1.0), 200.0))
        count = int(min(max(4000.0 / (estimate * calls), 3.0), 11.0))
        return statistics.median(self.sample(run, calls) for _ in range(count))

    def normals(self, *shape, scale=1.0, dtype=None):
        return torch.randn(*shape, device=self.device, dtype=torch.float32).mul_(scale).to(dtype or self.dtype)

    # ---- operators

    def attention_by_backend(self, q, k, v, mask, causal, backward):
        """Yields (back end, metrics), or (back end, reason) where it does not take the shape."""
        dout = torch.randn_like(q) if backward else None
        for name in self.backends:
            # Where a back end has no grouped heads, they are repeated beforehand, which is not timed.
            for grouped in (True, False):
                groups = 1 if grouped else q.shape[1] // k.shape[1]
                keys, values = (x.repeat_interleave(groups, 1) if groups > 1 else x for x in (k, v))
                x = [t.detach().requires_grad_(backward) for t in (q, keys, values)]

                def forward():
                    return F.scaled_dot_product_attention(*x, attn_mask=mask, is_causal=causal, enable_gqa=grouped)

                try:
                    with sdpa_kernel(BACKENDS[name]):
                        if not backward:
                            with torch.no_grad():
                                metrics = {"decode_ms": self.median_ms(forward)}
                                out = forward()
                        else:
                            with torch.no_grad():
                                metrics = {"forward_ms": self.median_ms(forward)}
                            out = forward()
                            metrics["backward_ms"] = self.median_ms(
                                lambda: torch.autograd.grad(out, x, dout, retain_graph=True))
                            metrics["forward_backward_ms"] = self.median_ms(
                                lambda: torch.autograd.grad(forward(), x, dout))
                    if not torch.isfinite(out.detach().float()).all():
                        raise RuntimeError("the output is not finite")
                    yield name, metrics
                    break
                except RuntimeError as error:
                    if not grouped:
                        yield name, f"{type(error).__name__}: {str(error).splitlines()[0]}"

    def attention(self, shape):
        heads, kv_heads, size = shape["q_heads"], shape["kv_heads"], shape["head_size"]

        def qkv(rows, tokens):
            # Heads next to each other in one token's row, as a projection leaves them.
            return [self.normals(rows, tokens, h, size).transpose(1, 2) for h in (heads, kv_heads, kv_heads)]

        if "motivation" not in shape:
            if shape["rows"] == 1:
                yield from self.attention_by_backend(*qkv(1, shape["tokens"]), None, True, True)
            return  # rows side by side stand beside the forest that they come from
        rows = shape["prompts"] * shape["group"]
        row = shape["motivation"] + shape["prompt"] + shape["completion"]
        for name, result in self.attention_by_backend(*qkv(rows, row), None, True, True):
            yield f"{name}, unshared", result
        until = forest_visible_until(shape)
        tokens = len(until)
        index = torch.arange(tokens)
        visible = (index[None, :] <= index[:, None]) & (index[:, None] < until[None, :])
        mask = torch.zeros(tokens, tokens, dtype=self.dtype).masked_fill_(~visible, -math.inf).to(self.device)
        for name, result in self.attention_by_backend(*qkv(1, tokens), mask, False, True):
            if not isinstance(result, str):  # not every back end takes a mask
                yield f"{name}, masked", result

    def decode(self, shape):
        rows, tokens, size = shape["rows"], shape["prefix"] + shape["own"], shape["head_size"]
        q = self.normals(rows, shape["q_heads"], 1, size)
        k, v = (self.normals(rows, tokens, shape["kv_heads"], size).transpose(1, 2) for _ in range(2))
        for name, result in self.attention_by_backend(q, k, v, None, False, False):
            yield f"{name}, unshared", result

    def sampling(self, shape):
        logits = self.normals(shape["rows"], shape["vocabulary"], scale=3.0, dtype=torch.float32)
        top_k, top_p = shape["top_k"], shape["top_p_percent"] / 100

        def run():
            raw = torch.log_softmax(logits, -1)
            if top_p < 1:
                ordered, index = raw.sort(-1, descending=True)
                p = ordered.exp()
                if top_k:
                    p[:, top_k:] = 0
                    p /= p.sum(-1, keepdim=True)
                p[p.cumsum(-1) - p >= top_p] = 0
                p /= p.sum(-1, keepdim=True)
                drawn = torch.multinomial(p, 1)
                token = index.gather(-1, drawn)
                logprob = p.gather(-1, drawn).log()
            else:
                token = torch.multinomial(torch.softmax(logits, -1), 1)
                logprob = raw.gather(-1, token)
            return token, logprob, raw.gather(-1, token)

        with torch.no_grad():
            yield "eager", {"ms": self.median_ms(run)}

    def loss(self, shape):
        rows, hidden_size, vocabulary = shape["rows"], shape["hidden"], shape["vocabulary"]
        hidden = self.normals(rows, hidden_size).requires_grad_()
        head = self.normals(vocabulary, hidden_size, scale=0.05).requires_grad_()
        targets = (torch.arange(rows) * 7919 % vocabulary).to(self.device)
        advantages = self.normals(rows, dtype=torch.float32)

        def policy_loss(hidden, head, targets, advantages, old):
            logits = (hidden @ head.T).float()
            logprobs = torch.log_softmax(logits, -1).gather(-1, targets[:, None])[:, 0]
            ratio = torch.exp(logprobs - old)
            clipped = ratio.clamp(0.8, 1.2)
            return -torch.minimum(ratio * advantages, clipped * advantages).mean()

        with torch.no_grad():
            # Block by block, so that what follows begins with little memory in use.
            old = torch.cat([
                torch.log_softmax((h @ head.T).float(), -1).gather(-1, t[:, None])[:, 0]
                for h, t in zip(hidden.split(256), targets.split(256))
            ])
        torch.compiler.reset()  # each size is compiled for itself
        gradients = (hidden.numel() + head.numel()) * hidden.element_size()
        for name, compute in (("eager", policy_loss), ("torch.compile", torch.compile(policy_loss, dynamic=False))):
            try:
                def run():
                    return torch.autograd.grad(compute(hidden, head, targets, advantages, old), (hidden, head))

                run()
                self.synchronize()
                metrics = {}
                if self.cuda:
                    torch.cuda.empty_cache()
                    torch.cuda.reset_peak_memory_stats()
                    before = torch.cuda.memory_allocated()
                    run()
                    self.synchronize()
                    # At their peak the gradients may not be there yet: what is taken off is in its favour.
                    extra = torch.cuda.max_memory_allocated() - before - gradients
                    metrics["memory_mib"] = max(extra, 0) / 2**20
                metrics["ms"] = self.median_ms(run)
                yield name, metrics
            except Exception as error:  # compilation fails in many ways
                yield name, f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
            if self.cuda:
                torch.cuda.empty_cache()

    def matrix(self, shape):
        n = shape["n"]
        x, w = self.normals(n, n), self.normals(n, n, scale=0.05)
        ms = self.median_ms(lambda: F.linear(x, w))
        yield "linear", {"ms": ms, "tflops": 2 * n**3 / ms / 1e9}

    def measure(self, case):
        family = case["case"].split("/")[0]
        if case["case"].startswith("decode/") and case["case"].endswith("/unshared"):
            return  # beside the shared one
        try:
            for name, result in getattr(self, family)(case["shape"]):
                what = {"error": result} if isinstance(result, str) else {"metrics": result}
                emit({"case": case["case"], "engine": f"PyTorch, {name}", "shape": case["shape"], **what})
        except Exception as error:
            emit({"case": case["case"], "engine": "PyTorch", "shape": case["shape"],
                  "error": f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"})
        if self.cuda:
            torch.cuda.empty_cache()


def forest_visible_until(shape):
    """The end of the subtree of each token's segment; depth first: motivation, then each prompt and its group."""
    until = []

    def add(tokens, below):
        until.extend([len(until) + tokens + below] * tokens)

    under_prompt = shape["group"] * shape["completion"]
    add(shape["motivation"], shape["prompts"] * (shape["prompt"] + under_prompt))
    for _ in range(shape["prompts"]):
        add(shape["prompt"], under_prompt)
        for _ in range(shape["group"]):
            add(shape["completion"], 0)
    return torch.tensor(until)


def emit(line):
    text = json.dumps(line, allow_nan=False) if finite(line) else json.dumps({**line, "metrics": {}, "error": "not finite"})
    print(text, flush=True)


def finite(line):
    return all(math.isfinite(value) for value in line.get("metrics", {}).values())


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--backends", default="flash,cudnn,efficient")
    parser.add_argument("--seconds", type=float, default=math.inf)
    parser.add_argument("--probe", action="store_true", help="says which PyTorch this is, or why it cannot be used")
    parser.add_argument("operators", nargs="*")
    arguments = parser.parse_args()
    if arguments.device == "cuda" and not torch.cuda.is_available():
        sys.exit(f"PyTorch {torch.__version__} finds no GPU")
    if arguments.probe:
        print(f"PyTorch {torch.__version__}")
        return 0
    deadline = time.monotonic() + arguments.seconds
    torch.manual_seed(0)
    listed = subprocess.run([*arguments.operators, "--list"], check=True, capture_output=True, text=True)
    cases = [json.loads(line) for line in listed.stdout.splitlines()]
    option = lambda name, fallback: next(  # noqa: E731
        (value for key, value in zip(arguments.operators, arguments.operators[1:]) if key == name), fallback)
    if threads := int(option("--threads", 0)):
        torch.set_num_threads(threads)
    dtype = {"f32": torch.float32, "bf16": torch.bfloat16}[option("--dtype", "bf16")]
    peer = Peer(arguments.device, dtype, "--tiny" in arguments.operators, arguments.backends.split(","))
    versions = {"PyTorch": torch.__version__, "cuDNN": str(torch.backends.cudnn.version())}
    emit({"case": "device", "engine": "PyTorch", "shape": {}, "device": {
        "name": arguments.device,
        "description": torch.cuda.get_device_name() if peer.cuda else "the host",
        "libraries": versions,
    }})
    merf = subprocess.Popen([*arguments.operators, "--serve"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    print(merf.stdout.readline(), end="", flush=True)  # the device
    for case in cases:
        if time.monotonic() > deadline:
            emit({"case": case["case"], "engine": "merf", "shape": case["shape"],
                  "error": "left out: there was no time left"})
            continue
        merf.stdin.write(case["case"] + "\n")
        merf.stdin.flush()
        line = merf.stdout.readline()
        if not line:
            emit({"case": case["case"], "engine": "merf", "shape": case["shape"],
                  "error": f"operators ended with {merf.wait()}"})
            return 1
        print(line, end="", flush=True)
        peer.measure(case)
    merf.stdin.close()
    return merf.wait()


if __name__ == "__main__":
    sys.exit(main())
