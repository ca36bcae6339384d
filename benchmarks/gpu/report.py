"""The tables of scripts/gpu-check.sh.

    python report.py --card NAME --out FOLDER WORK

Reads WORK/parts.jsonl, operators.jsonl and step.jsonl, prints Markdown, and writes it with all that was measured to
FOLDER/<card>.md and <card>.json. Uses nothing but Python itself. Every ratio is of two times of this one run.
"""

import argparse
import json
import os
import re
import sys
from datetime import date


def read(path):
    """The whole lines of a file; one cut short by a time limit is dropped."""
    lines = []
    if os.path.exists(path):
        with open(path) as file:
            for text in file:
                try:
                    lines.append(json.loads(text))
                except ValueError:
                    print(f"{path}: not JSON: {text.strip()[:80]}", file=sys.stderr)
    return lines


def number(value):
    if value is None:
        return ""
    return f"{value:.0f}" if abs(value) >= 100 else f"{value:.3g}"


def table(head, rows):
    """Markdown; a column whose head ends with ":" is aligned right."""
    right = [name.endswith(":") for name in head]
    lines = [[name.rstrip(":") for name in head], ["---:" if r else "---" for r in right], *rows]
    return "\n".join("| " + " | ".join(str(cell).replace("|", "/") for cell in line) + " |" for line in lines)


class Measured:
    """Lines by case: merf's, and those of its peers by engine."""

    def __init__(self, lines):
        self.lines = [line for line in lines if line["case"] != "device"]
        self.devices = [line for line in lines if line["case"] == "device"]
        self.cases = list(dict.fromkeys(line["case"] for line in self.lines))

    def merf(self, case):
        return next(line for line in self.lines if line["case"] == case and line["engine"] == "merf")

    def metric(self, case, name):
        return next((line["metrics"].get(name) for line in self.lines
                     if line["case"] == case and line["engine"] == "merf" and "metrics" in line), None)

    def best(self, case, name, engine=""):
        """(value, engine) of the least, among the peers whose name holds `engine`."""
        values = [(line["metrics"][name], line["engine"].removeprefix("PyTorch, ")) for line in self.lines
                  if line["case"] == case and line["engine"] != "merf" and engine in line["engine"]
                  and line.get("metrics", {}).get(name) is not None]
        return min(values, default=(None, ""))


class Rows:
    """Rows of: work, merf, peer, which peer, ratio, goal."""

    def __init__(self, judged):
        self.rows, self.judged = [], judged

    def add(self, work, merf, peer, which, goal=None, at_most=False, unit="ms"):
        ratio = None
        if merf and peer:
            ratio = merf / peer if at_most else peer / merf
        verdict = ""
        if goal is not None:
            verdict = f"{'at most' if at_most else 'at least'} {goal:g}"
            if ratio is not None and self.judged:
                verdict += ": met" if (ratio <= goal if at_most else ratio >= goal) else ": missed"
        self.rows.append([work, number(merf) and f"{number(merf)} {unit}", number(peer) and f"{number(peer)} {unit}",
                          which, f"{ratio:.2f}" if ratio is not None else "", verdict])


def operator_rows(measured, judged):
    rows = Rows(judged)
    for case in measured.cases:
        family, *rest = case.split("/")
        merf = measured.merf(case)
        if "metrics" not in merf:
            rows.rows.append([case, merf.get("error", "nothing was measured"), "", "", "", ""])
            continue
        if family == "attention":
            forest = rest[-1] == "forest"
            if rest[-1] == "forest-unshared":
                continue
            for name, goal in (("forward", 0.9), ("backward", 0.8), ("forward_backward", None)):
                key = f"{name}_ms"
                work = f"attention {name.replace('_', ' + ')}, {', '.join(rest)}"
                value = measured.metric(case, key)
                rows.add(work, value, *measured.best(case, key), goal=1.0 if forest and goal else goal)
                if forest:
                    rows.add(work, value, measured.metric(case + "-unshared", key), "merf, unshared")
        elif family == "decode":
            if rest[-1] != "shared":
                continue
            work, value = f"decoding, {', '.join(rest)}", measured.metric(case, "decode_ms")
            rows.add(work, value, *measured.best(case, "decode_ms"))
            rows.add(work, value, measured.metric(case.replace("/shared", "/unshared"), "decode_ms"), "merf, unshared")
        elif family == "sampling":
            rows.add(f"sampling, {', '.join(rest)}", measured.metric(case, "ms"), *measured.best(case, "ms"),
                     goal=5.0 if rest[-1] != "plain" else None)
        elif family == "loss":
            large = merf["shape"]["vocabulary"] > 150000
            for name, work, at_most, unit, goal in (
                    ("ms", "policy loss with its backward", False, "ms", 1.5),
                    ("memory_mib", "its memory beyond inputs and gradients", True, "MiB", 0.1 if large else None)):
                value, eager = measured.metric(case, name), measured.best(case, name, "eager")
                if eager[0] is not None:
                    rows.add(f"{work}, {rest[0]}", value, *eager, at_most=at_most, unit=unit)
                rows.add(f"{work}, {rest[0]}", value, *measured.best(case, name, "compile"), goal=goal,
                         at_most=at_most, unit=unit)
        elif family == "matrix":
            rows.add(f"bfloat16 product, {rest[0]} x {rest[0]} x {rest[0]}", measured.metric(case, "ms"),
                     *measured.best(case, "ms"))
    return rows.rows


def step_rows(measured):
    rows = []
    for case in measured.cases:
        line = measured.merf(case)
        name, shape = case.split("/", 1)[1], line["shape"]
        work = (f"{shape['motivation']} + {shape['prompts']} x "
                f"({shape['prompt']} + {shape['group']} x {shape['completion']})")
        if "metrics" not in line:
            rows.append([name, work, line.get("error", "nothing was measured")] + [""] * 6)
            continue
        m = line["metrics"]
        share = lambda key: "" if m.get(key) is None else f"{100 * m[key]:.1f}%"  # noqa: E731
        rows.append([name, work, number(m["rollout_tokens_per_s"]), number(m["training_tokens_per_s"]),
                     number(m["step_tokens_per_s"]), f"{number(m['rollout_gib'])} / {number(m['training_gib'])}",
                     share("rollout_share"), share("training_share"), number(m["logprob_difference"])])
    return rows


def markdown(card, parts, operators, steps):
    devices = [line["device"] for line in operators.devices or steps.devices]
    libraries = {name: version for device in devices for name, version in device["libraries"].items()}
    lines = [f"# {card}", "", f"`npm run gpu:check`, {date.today().isoformat()}"
             + "".join(f", {name} {version}" for name, version in libraries.items()) + ".", ""]
    lines += [table(["part", "result", "seconds:", ""],
                    [[p["part"], p["status"], p["seconds"], p["detail"]] for p in parts]), ""]
    if operators.cases:
        lines += ["Ratios above 1: merf takes less time (for memory, below 1: less memory). The peer is the fastest of "
                  "PyTorch's back ends that took the shape; unshared: the rows of the forest side by side. Goals are "
                  "those for an H100.", "",
                  table(["operator", "merf:", "peer:", "which", "ratio:", "goal"],
                        operator_rows(operators, judged="H100" in card)), ""]
    if steps.cases:
        rate = next((line["metrics"].get("matrix_tflops") for line in steps.lines if "metrics" in line), None)
        lines += ["A whole GRPO step on random weights, bfloat16; work: tokens of the motivation + prompts x (tokens of "
                  "each + completions x tokens of each). Rates are of completion tokens. Shares are of the rate of the "
                  f"card's bfloat16 products, measured in the same run ({number(rate)} TFLOP/s), with every distinct "
                  "token counted once.", "",
                  table(["model", "work", "rollout tokens/s:", "training tokens/s:", "step tokens/s:",
                         "GiB, rollout / training:", "rollout's share:", "training's share:",
                         "largest change of a log-probability, sampled to scored:"], step_rows(steps)), ""]
    return "\n".join(lines)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--card", required=True)
    parser.add_argument("--out", required=True)
    parser.add_argument("work")
    arguments = parser.parse_args()
    parts, operators, steps = (read(os.path.join(arguments.work, f"{name}.jsonl"))
                               for name in ("parts", "operators", "step"))
    text = markdown(arguments.card, parts, Measured(operators), Measured(steps))
    print("\n" + text)
    name = re.sub(r"[^a-z0-9]+", "-", arguments.card.lower()).strip("-")
    path = os.path.join(arguments.out, name)
    os.makedirs(arguments.out, exist_ok=True)
    with open(path + ".md", "w") as file:
        file.write(text)
    with open(path + ".json", "w") as file:
        json.dump({"card": arguments.card, "date": date.today().isoformat(), "parts": parts, "operators": operators,
                   "steps": steps}, file, indent=1)
        file.write("\n")
    print(f"Written to {path}.md and {path}.json")


if __name__ == "__main__":
    main()
