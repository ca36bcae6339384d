"""The tables of scripts/gpu-check.sh.

    python report.py --card CARD --name NAME --out FOLDER WORK

Reads what one call left in WORK: parts.jsonl, and where they are there cases.jsonl, operators.jsonl, step.jsonl,
train-<device>.jsonl and kernels-<group>.csv of ncu. Prints Markdown, and writes it with all that was measured to
FOLDER/<name>.md and <name>.json, and every number of ncu's, a launch a line, to <name>-kernels.csv. Uses nothing but
Python itself. Every ratio is of two times of this one run.
"""

import argparse
import csv
import glob
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


def case_rows(cases):
    """The test cases that did not pass, and the ten that took longest."""
    rows = [[c["case"], c["mode"], c["status"] + (f" ({c['code']})" if c["code"] else ""), number(c["seconds"])]
            for c in cases if c["status"] != "passed"]
    longest = sorted((c for c in cases if c["status"] == "passed"), key=lambda c: -c["seconds"])[:10]
    return rows + [[c["case"], c["mode"], "passed", number(c["seconds"])] for c in longest]


def train_rows(trained):
    """Rewards of the same steps on each device, and what else a step says of itself on the first."""
    first = next(iter(trained.values()))
    rows = []
    for i, line in enumerate(first):
        others = [lines[i].get("reward") if i < len(lines) else None for lines in list(trained.values())[1:]]
        rows.append([line.get("step", i + 1)] + [number(value) for value in [line.get("reward"), *others]]
                    + [number(line.get(key)) for key in ("loss", "gradientNorm", "seconds")])
    return rows


# ---- what ncu says

MICROSECONDS = {"n": 1e-3, "u": 1.0, "m": 1e3, "s": 1e6}
MEGABYTES = {"b": 1e-6, "k": 1e-3, "m": 1.0, "g": 1e3}


class Launch:
    def __init__(self, group, name, block, grid):
        self.group, self.name, self.block, self.grid = group, short_name(name), block, grid
        self.metrics = {}  # "section: metric" to (value, unit)

    def get(self, metric, section="", units=None):
        """The number whose names hold these, in the unit that `units` counts by its first letter."""
        for key, (value, unit) in self.metrics.items():
            place, _, name = key.partition(": ")
            if name == metric and section in place:
                try:
                    return float(value.replace(",", "")) * (units.get(unit[:1].lower(), 1.0) if units else 1.0)
                except ValueError:
                    return None
        return None

    def stalls(self):
        """The two reasons that most cycles between two instructions of a warp go to."""
        found = [(self.get(key.partition(": ")[2]) or 0.0, key.partition(": ")[2].removeprefix("Stall "))
                 for key in self.metrics if key.partition(": ")[2].startswith("Stall ")]
        return ", ".join(f"{name} {number(value)}" for value, name in sorted(found, reverse=True)[:2] if value > 0)


def short_name(demangled):
    """kernel<float, 64> of void merf::cuda::<unnamed>::kernel<float, 64>(float const*, long)."""
    name = re.sub(r"\((anonymous namespace|int|bool)\)|<unnamed>", "", demangled)
    name = re.sub(r"\b\w*::|::", "", name)
    depth = 0
    for i, c in enumerate(name):
        depth += (c == "<") - (c == ">")
        if c == "(" and depth == 0:
            name = name[:i]
            break
    return name.removeprefix("void ").strip()


def read_kernels(path):
    group = re.sub(r".*kernels-|\.csv$", "", path)
    with open(path, errors="replace") as file:
        lines = [line for line in file if line.startswith('"')]
    launches = {}
    for row in csv.DictReader(lines):
        if not row.get("Metric Name"):  # a rule's advice
            continue
        launch = launches.setdefault(row["ID"], Launch(group, row.get("Kernel Name") or "", row.get("Block Size") or "",
                                                       row.get("Grid Size") or ""))
        key = f"{row.get('Section Name') or ''}: {row['Metric Name']}"
        launch.metrics.setdefault(key, (row.get("Metric Value") or "", row.get("Metric Unit") or ""))
    return group, list(launches.values())


def kernel_rows(launches):
    rows = []
    for each in launches:
        percent = lambda metric, section="Speed Of Light": number(each.get(metric, section))  # noqa: E731
        rows.append([each.group, each.name, f"{each.grid} x {each.block}",
                     number(each.get("Duration", "Speed Of Light", MICROSECONDS)), percent("DRAM Throughput"),
                     percent("L2 Cache Throughput"), percent("Compute (SM) Throughput"),
                     number(each.get("Registers Per Thread")),
                     f"{percent('Achieved Occupancy', '')} / {percent('Theoretical Occupancy', '')}",
                     number(each.get("Waves Per SM")), each.stalls()])
    return rows


def decode_rows(launches):
    """The launches of the last decode step, from one draw of tokens to the next, by kernel."""
    draws = [i for i, each in enumerate(launches) if "sample" in each.name]
    starts = [i for i in draws if i + 1 not in draws]  # a draw may take more than one launch
    step = launches[starts[-2] + 1:starts[-1] + 1] if len(starts) > 1 else launches
    kernels = {}
    for each in step:
        kernels.setdefault(each.name, []).append(
            [each.get("gpu__time_duration.sum", units=MICROSECONDS) or 0.0]
            + [each.get(f"dram__bytes_{way}.sum", units=MEGABYTES) or 0.0 for way in ("read", "write")])
    total = sum(line[0] for lines in kernels.values() for line in lines) or 1.0
    rows = []
    for name, lines in sorted(kernels.items(), key=lambda item: -sum(line[0] for line in item[1])):
        us, read_mb, written_mb = (sum(column) for column in zip(*lines))
        rows.append([name, len(lines), number(us), f"{100 * us / total:.1f}%", number(read_mb), number(written_mb),
                     number((read_mb + written_mb) / us * 1e3) if us else ""])
    rows.append(["all", len(step), number(total), "", "", "", ""])
    return rows


def write_kernels(path, launches):
    columns = list(dict.fromkeys(f"{key} [{unit}]" for each in launches for key, (_, unit) in each.metrics.items()))
    with open(path, "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["group", "kernel", "grid", "block", *columns])
        for each in launches:
            values = {f"{key} [{unit}]": value for key, (value, unit) in each.metrics.items()}
            writer.writerow([each.group, each.name, each.grid, each.block, *(values.get(c, "") for c in columns)])


def markdown(card, parts, operators, steps, cases, trained, kernels):
    devices = [line["device"] for line in operators.devices or steps.devices]
    libraries = {name: version for device in devices for name, version in device["libraries"].items()}
    lines = [f"# {card}", "", f"`npm run gpu:check`, {date.today().isoformat()}"
             + "".join(f", {name} {version}" for name, version in libraries.items()) + ".", ""]
    lines += [table(["part", "result", "seconds:", ""],
                    [[p["part"], p["status"], p["seconds"], p["detail"]] for p in parts]), ""]
    if cases:
        lines += ["Test cases that did not pass (with their exit code), and those that took longest; none: without "
                  "cuBLASLt.", "", table(["test case", "mode", "result", "seconds:"], case_rows(cases)), ""]
    if trained:
        first, *others = trained
        lines += [f"`merf train` of the shipped model through Node, loss, norm and seconds on {first}.", "",
                  table(["step:", f"reward, {first}:", *(f"reward, {name}:" for name in others), "loss:",
                         "gradient norm:", "seconds:"], train_rows(trained)), ""]
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
    main_kernels = [launch for group, launches in kernels.items() if group != "decode-step" for launch in launches]
    if main_kernels:
        lines += ["What `ncu` says of the main kernels: DRAM, L2 and SM in percent of what the card can do, occupancy "
                  "achieved / theoretical in percent, stalls in cycles between two instructions of a warp.", "",
                  table(["", "kernel", "grid x block", "us:", "DRAM:", "L2:", "SM:", "registers:", "occupancy:", "waves:",
                         "stalls"], kernel_rows(main_kernels)), ""]
    if kernels.get("decode-step"):
        lines += ["One decode step, by kernel, as `ncu` replays each by itself with cold caches.", "",
                  table(["kernel", "launches:", "us:", "share:", "MB read:", "MB written:", "GB/s:"],
                        decode_rows(kernels["decode-step"])), ""]
    return "\n".join(lines)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--card", required=True)
    parser.add_argument("--name", required=True)
    parser.add_argument("--out", required=True)
    parser.add_argument("work")
    arguments = parser.parse_args()
    parts, cases, operators, steps = (read(os.path.join(arguments.work, f"{name}.jsonl"))
                                      for name in ("parts", "cases", "operators", "step"))
    # The GPU first: cuda, or cuda-emulated in a rehearsal.
    trained = {re.sub(r".*train-|\.jsonl$", "", path): read(path)
               for path in glob.glob(os.path.join(arguments.work, "train-*.jsonl"))}
    trained = dict(sorted(trained.items(), key=lambda item: item[0] == "cpu"))
    kernels = dict(read_kernels(path) for path in sorted(glob.glob(os.path.join(arguments.work, "kernels-*.csv"))))
    text = markdown(arguments.card, parts, Measured(operators), Measured(steps), cases, trained, kernels)
    print("\n" + text)
    path = os.path.join(arguments.out, arguments.name)
    os.makedirs(arguments.out, exist_ok=True)
    with open(path + ".md", "w") as file:
        file.write(text)
    with open(path + ".json", "w") as file:
        json.dump({"card": arguments.card, "date": date.today().isoformat(), "parts": parts, "cases": cases,
                   "operators": operators, "steps": steps, "train": trained}, file, indent=1)
        file.write("\n")
    launches = [launch for group in kernels.values() for launch in group]
    if launches:
        write_kernels(path + "-kernels.csv", launches)
    print(f"Written to {path}.md and {path}.json")


if __name__ == "__main__":
    main()
