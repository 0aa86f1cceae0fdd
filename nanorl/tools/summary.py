"""The stages of a run side by side: `python -m nanorl.tools.summary out/quickstart`.

Reads what train_*.py and eval.py wrote. Prints a table, and completions before and after RL. Writes
summary.json into the run's folder.
"""

import json
import os
import sys

from nanorl.evaluate import words
from nanorl.report.rates import machine_rates
from nanorl.runtime import checkpoint
from nanorl.runtime.log import duration, to_json
from nanorl.tools import learnt

STAGES = ("base", "sft", "rl")


def read_json(path):
    with open(path, encoding="utf-8") as f:
        return json.load(f)


def read_lines(path):
    with open(path, encoding="utf-8") as f:
        return [json.loads(line) for line in f]


def stage_result(directory):
    """A stage's directory -> (result, outcomes) of the first task with a greedy evaluation.

    The result is the greedy summary of the newest checkpoint, with `sampled` beside it, `seconds`
    of training and `peak_gb` of memory. The outcomes are the greedy ones, one a problem.
    """
    path = checkpoint.latest(directory) or ""
    summary = checkpoint.written_eval_file(path, "summary.json")
    if not os.path.exists(summary):
        remedy = f"run `python eval.py --model={directory}`"
        raise SystemExit(f"error: no evaluated checkpoint in {directory}: {remedy}")
    evaluated = read_json(summary)
    name = next(name for name, found in evaluated.items() if "greedy" in found)
    found = evaluated[name]
    result = {**found.pop("greedy"), **found}

    rows = read_lines(os.path.join(directory, "metrics.jsonl"))
    result["seconds"] = round(sum(row.get("time/step", 0.0) for row in rows), 1)
    result["peak_gb"] = max(row.get("memory/peak_gb", 0.0) for row in rows)

    outcomes = read_lines(checkpoint.written_eval_file(path, name + ".jsonl"))
    return result, [outcome for outcome in outcomes if outcome["how"] == "greedy"]


def stage_line(stage, result):
    interval = f"[{result['low']:6.1%}, {result['high']:6.1%}]"
    sampled = {"accuracy": "-", "pass@8": "-"}
    for key in sampled:
        if key in result.get("sampled", {}):
            sampled[key] = f"{result['sampled'][key]:.1%}"
    return (
        f"{stage:6}  {result['accuracy']:7.1%}  {interval}      {sampled['accuracy']:>7}"
        f"  {sampled['pass@8']:>7}   {result['length']:11.1f}   {result['seconds']:7.1f}"
    )


def table(results):
    """{stage: result} -> lines."""
    lines = ["stage   greedy accuracy, 95% interval   sampled   pass@8   mean length   seconds"]
    lines += [stage_line(stage, result) for stage, result in results.items()]
    one = next(iter(results.values()))
    lines.append(
        f"{one['n']} held-out problems of {one['task']}, {one['split']} split; "
        "lengths in tokens, greedy; seconds of training"
    )
    return lines


def cautions(run, results):
    """What makes the table mean less -> lines. results: {stage: result}."""
    lines = []
    for stage, result in results.items():
        if "failed" in result:
            lines.append(f"{stage}: {words.failed(result['failed'], result['failure'])}")
        # A base model has not learnt to stop.
        if stage != "base" and result["clipped"] > words.CUT_OFF:
            lines.append(f"{stage}: {result['clipped']:.0%} of the answers are cut off")
    caution = learnt.caution({"": read_lines(os.path.join(run, "rl", "metrics.jsonl"))})
    return [*lines, caution] if caution else lines


def print_completions(before, after, count=3):
    """The first problems' outcomes of SFT and of RL."""
    print("\nThe same problems before and after RL:")
    for sft, rl in list(zip(before, after))[:count]:
        print(f"  {sft['prompt'][-1]['content']!r}, answer {sft['answer']}")
        print(f"    SFT  {sft['texts'][0]!r}")
        print(f"    RL   {rl['texts'][0]!r}")


def print_machine(seconds, peak_gb):
    rates = machine_rates()
    print(
        f"the whole command took {duration(seconds)} and at most {peak_gb:.1f} GB; "
        f"this machine now gives {rates['fp32_gflops']:.0f} GFLOP/s fp32, "
        f"{rates['bf16_gflops']:.0f} bf16, {rates['copy_gb_s']:.0f} GB/s"
    )


def main(run, seconds=None):
    results, outcomes = {}, {}
    for stage in STAGES:
        results[stage], outcomes[stage] = stage_result(os.path.join(run, stage))
    print(*table(results), *cautions(run, results), sep="\n")
    print_completions(outcomes["sft"], outcomes["rl"])

    path = os.path.join(run, "summary.json")
    with open(path, "w", encoding="utf-8") as f:
        f.write(to_json(results, indent=2))
    print(f"\nwrote {path}")
    if seconds:
        print_machine(float(seconds), max(result["peak_gb"] for result in results.values()))


if __name__ == "__main__":
    if len(sys.argv) not in (2, 3):
        raise SystemExit(
            "usage: python -m nanorl.tools.summary <run folder, such as out/quickstart> "
            "[seconds the run took]"
        )
    main(*sys.argv[1:])
