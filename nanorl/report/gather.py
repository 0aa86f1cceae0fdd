"""A run's folder -> what there is to show of it, as plain values.

Everything is read from files that the scripts have written: run.json, metrics.jsonl, events.jsonl,
eval/summary.json. A file that is missing or cut short leaves a gap, and no error.
"""

import json
import os
import re

from nanorl.runtime.log import duration

MOST_ROWS = 2000  # of a stage; of more every k-th is shown, and each that holds an evaluation

# Older runs lack some columns: what else says nearly the same.
SHARE_RIGHT = ("solved", "reward/correct")


# ---- files ---------------------------------------------------------------------------------------


def read_json(path):
    """What a JSON file holds; {} where there is none that can be read."""
    try:
        with open(path, encoding="utf-8") as f:
            found = json.load(f)
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def read_lines(path):
    """The objects in a file of JSON lines. A line that is cut short is left out."""
    found = []
    if not os.path.exists(path):
        return found
    with open(path, encoding="utf-8", errors="replace") as f:
        for line in f:
            try:
                value = json.loads(line)
            except ValueError:
                continue
            if isinstance(value, dict) and isinstance(value.get("step"), int):
                found.append(value)
    return found


def newest_checkpoint(folder):
    """Path of the newest whole checkpoint in a stage's folder, or None."""
    whole = [path for path in checkpoints(folder) if os.path.exists(os.path.join(path, "DONE"))]
    return whole[-1] if whole else None


def checkpoints(folder):
    """Paths of a stage's checkpoints, whole or not, by step."""
    names = [name for name in os.listdir(folder) if re.fullmatch(r"step_\d+", name)]
    return [os.path.join(folder, name) for name in sorted(names)]


# ---- a run ---------------------------------------------------------------------------------------


def run(path):
    """A run's folder, or that of one stage -> {name, folder, stages, about}.

    stages: of base, SFT and RL in the order in which they were trained; see stage. Where a stage's
    folder is named, other stages of its kind are left out. about: the RL stage that the headline
    is of, or the last stage; see main_stage.

    Raises ValueError for a folder without a run.
    """
    path = os.path.abspath(os.path.expanduser(path))
    only = None
    if os.path.exists(os.path.join(path, "metrics.jsonl")):
        path, only = os.path.dirname(path), os.path.basename(path)
    names = sorted(os.listdir(path)) if os.path.isdir(path) else []
    stages = []
    for name in names:
        if os.path.exists(os.path.join(path, name, "metrics.jsonl")):
            stages.append(stage(os.path.join(path, name)))
    if only:
        kind = next(found["kind"] for found in stages if found["name"] == only)
        stages = [found for found in stages if found["kind"] != kind or found["name"] == only]
    stages = [found for found in stages if found["rows"]]
    if not stages:
        raise ValueError(f"{path}: no run there; name a run's folder, such as out/d4")

    order = ("base", "sft", "rl")
    stages.sort(key=lambda found: (order.index(found["kind"]), found["name"]))
    name = os.path.basename(path)
    if only and kind == "rl" and only != "rl":
        name = f"{name}/{only}"
    return {"name": name, "folder": path, "stages": stages, "about": main_stage(stages)}


def main_stage(stages):
    """The stage named rl, or else the last."""
    for found in stages:
        if found["name"] == "rl":
            return found
    return stages[-1]


def stage(folder):
    """A stage's folder -> {name, kind, folder, card, settings, rows, events, evaluations}."""
    card = read_json(os.path.join(folder, "run.json"))
    rows = read_lines(os.path.join(folder, "metrics.jsonl"))
    return {
        "name": os.path.basename(folder),
        "kind": kind_of(rows),
        "folder": folder,
        "card": card,
        "settings": card.get("settings", {}),
        "rows": rows,
        "events": events(os.path.join(folder, "events.jsonl")),
        "evaluations": evaluations(folder),
    }


def events(path):
    """What was said once, each once: every start of a run says anew what is amiss before a step."""
    found, known = [], set()
    for event in read_lines(path):
        what = event["step"], event.get("kind"), event.get("text")
        if what not in known or event.get("kind") != "warning":
            found.append(event)
        known.add(what)
    return found


def kind_of(rows):
    """base, sft or rl, from what is in a stage's rows."""
    names = {name for row in rows for name in row}
    if "reward" in names or ("val/reward" in names and "packing" not in names):
        return "rl"
    return "sft" if "packing" in names else "base"


def evaluations(folder):
    """What eval.py found of a stage's checkpoints -> [{step, task, way, ...numbers}]."""
    found = []
    for path in checkpoints(folder):
        step = int(os.path.basename(path).removeprefix("step_"))
        summary = read_json(os.path.join(path, "eval", "summary.json"))
        for task, result in summary.items():
            ways = result.items() if isinstance(result, dict) else []
            for way, numbers in ways:
                if isinstance(numbers, dict) and "accuracy" in numbers:
                    plain = {k: v for k, v in numbers.items() if isinstance(v, (int, float, str))}
                    found.append({**plain, "step": step, "label": task, "way": way})
    return found


# ---- columns -------------------------------------------------------------------------------------


def thinned(rows):
    """At most about MOST_ROWS of the rows -> (rows, every which one)."""
    every = -(-len(rows) // MOST_ROWS)
    kept = []
    for number, row in enumerate(rows):
        held_out = any(name.startswith("val/") for name in row)
        if number % every == 0 or held_out or row is rows[-1]:
            kept.append(row)
    return kept, every


def column(rows, name):
    """A number of each row, None where it has none."""
    values = []
    for row in rows:
        value = row.get(name)
        values.append(value if isinstance(value, (int, float)) else None)
    return values


def with_derived(stage):
    """A stage's rows, each with what only several rows or the run card tell.

    x/<axis>: how far the run has come at a row's end. right: the share of right samples.
    tokens_in_vain: the share of the tokens in groups that teach nothing.
    """
    total = dict(passes=0.0, samples=0.0, tokens=0.0, seconds=0.0)
    found = []
    for logged in stage["rows"]:
        row = dict(logged)
        add_up(total, row, stage)
        row["x/step"] = row["step"]
        for name, value in total.items():
            row[f"x/{name}"] = value
        row["x/FLOPs"] = row.get("flops_total") or 0.0
        for name in SHARE_RIGHT:
            if name in row:
                row.setdefault("right", row[name])
        if row.get("tokens_with_signal") is not None:
            row["tokens_in_vain"] = 1 - row["tokens_with_signal"]
        found.append(row)
    return found


def add_up(total, row, stage):
    """Add a row's samples, tokens and seconds to those of the rows before."""
    card, settings = stage["card"], stage["settings"]
    tokens = row.get("tokens") or 0
    if stage["kind"] == "base" and row["step"]:
        tokens = settings.get("batch_tokens", 0)
    total["tokens"] += tokens
    total["seconds"] += row.get("time/step") or 0.0
    if row.get("completions/mean_length"):
        total["samples"] += tokens / row["completions/mean_length"]
    total["passes"] = row.get("epoch") or total["passes"]
    problems = card.get("train_problems") or settings.get("problems")
    if problems and "samples_per_prompt" in settings:
        total["passes"] = total["samples"] / settings["samples_per_prompt"] / problems


# ---- the numbers of the headline -----------------------------------------------------------------


def facts(run):
    """What a run has cost, and on what it ran -> [(label, words)]."""
    about = run["about"]
    card, rows = about["card"], about["rows"]
    seconds = sum(row.get("time/step") or 0.0 for row in rows)
    done, planned = rows[-1]["step"], about["settings"].get("steps")
    found = [("steps", f"{done:,} of {planned:,}" if planned else f"{done:,}")]
    found.append(("training", duration(seconds)))
    flops = last(rows, "flops_total")
    if flops:
        found.append(("FLOPs", f"{flops:.2g}"))
    if card.get("params"):
        found.append(("model", f"{count(card['params'])} parameters"))
    found.append(("hardware", hardware(card)))
    return found


def hardware(card):
    """On what a stage ran, in words."""
    ranks = card.get("world_size", 1)
    device = str(card.get("device", "?")).split(":")[0]
    name = card.get("hardware") or f"{device}, {card.get('machine', '?')}"
    words = f"{ranks} x {name}" if ranks > 1 else name
    if card.get("dtype"):
        words += f", {card['dtype'].removeprefix('torch.')}"
    if card.get("flop_rate"):
        words += f", {card['flop_rate'] / 1e9:,.0f} GFLOP/s measured"
    return words


def last(rows, name):
    """The last number of that name in the rows, or None."""
    for row in reversed(rows):
        if isinstance(row.get(name), (int, float)):
            return row[name]
    return None


def count(number):
    """1390272 -> '1.4 M'"""
    for unit, size in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if number >= size:
            return f"{number / size:.3g} {unit}"
    return f"{number:g}"


# ---- several runs --------------------------------------------------------------------------------


def differences(runs):
    """Constants of the RL stage, or the last, that are not the same in all runs.

    -> [(name, [its value in each run])]; None where a run has no such constant.
    """
    settings = [found["about"]["settings"] for found in runs]
    names = []
    for one in settings:
        names += [name for name in one if name not in names]
    found = []
    for name in names:
        if name in ("run_name", "resume", "note"):
            continue
        values = [one.get(name) for one in settings]
        if any(value != values[0] for value in values):
            found.append((name, values))
    return found
