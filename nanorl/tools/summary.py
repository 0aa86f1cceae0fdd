"""The stages of a run side by side: `python -m nanorl.tools.summary out/quickstart`.

Reads what train_*.py and eval.py wrote; prints a table and completions before and after RL; writes summary.json."""

import json
import os
import sys

from nanorl.report.rates import machine_rates
from nanorl.runtime import checkpoint
from nanorl.runtime.log import duration

STAGES = ("base", "sft", "rl")


def stage_result(directory):
    """A stage's directory -> (the summary of the first task that its newest checkpoint has answered greedily, with `sampled` and with `seconds` of
    training; its greedy outcomes)."""
    path = checkpoint.latest(directory) or ""
    if not os.path.exists(checkpoint.eval_file(path, "summary.json")):
        raise SystemExit(
            f"error: no evaluated checkpoint in {directory}: run `python eval.py --model={directory}`"
        )
    with open(checkpoint.eval_file(path, "summary.json"), encoding="utf-8") as f:
        name, found = next(
            (name, found) for name, found in json.load(f).items() if "greedy" in found
        )
    result = {**found.pop("greedy"), **found}
    with open(os.path.join(directory, "metrics.jsonl"), encoding="utf-8") as f:
        rows = [json.loads(line) for line in f]
    result["seconds"] = round(sum(row.get("time/step", 0.0) for row in rows), 1)
    result["peak_gb"] = max(row.get("memory/peak_gb", 0.0) for row in rows)
    with open(checkpoint.eval_file(path, name + ".jsonl"), encoding="utf-8") as f:
        outcomes = [json.loads(line) for line in f]
    return result, [o for o in outcomes if o["how"] == "greedy"]


def table(results):
    """{stage: result} -> lines."""
    lines = ["stage   greedy accuracy, 95% interval   sampled   pass@8   mean length   seconds"]
    for stage, r in results.items():
        s = r.get("sampled", {})
        share = lambda key: f"{s[key]:.1%}" if key in s else "-"
        lines.append(
            f"{stage:6}  {r['accuracy']:7.1%}  [{r['low']:6.1%}, {r['high']:6.1%}]      {share('accuracy'):>7}  {share('pass@8'):>7}"
            f"   {r['length']:11.1f}   {r['seconds']:7.1f}"
        )
    n = next(iter(results.values()))
    return lines + [
        f"{n['n']} held-out problems of {n['task']}, {n['split']} split; lengths in tokens, greedy; seconds of training"
    ]


def main(run, seconds=None):
    read = {stage: stage_result(os.path.join(run, stage)) for stage in STAGES}
    results = {stage: result for stage, (result, _) in read.items()}
    print("\n".join(table(results)))
    print("\nThe same problems before and after RL:")
    for before, after in list(zip(read["sft"][1], read["rl"][1]))[:3]:
        print(
            f"  {before['prompt'][-1]['content']!r}, answer {before['answer']}\n"
            f"    SFT  {before['texts'][0]!r}\n    RL   {after['texts'][0]!r}"
        )
    with open(os.path.join(run, "summary.json"), "w", encoding="utf-8") as f:
        json.dump(results, f, indent=2)
    print(f"\nwrote {os.path.join(run, 'summary.json')}")
    if seconds:
        m = machine_rates()
        print(
            f"the whole command took {duration(float(seconds))} and at most {max(r['peak_gb'] for r in results.values()):.1f} GB; this machine now gives "
            f"{m['fp32_gflops']:.0f} GFLOP/s fp32, {m['bf16_gflops']:.0f} bf16, {m['copy_gb_s']:.0f} GB/s"
        )


if __name__ == "__main__":
    if len(sys.argv) not in (2, 3):
        raise SystemExit(
            "usage: python -m nanorl.tools.summary <run folder, such as out/quickstart> [seconds the run took]"
        )
    main(*sys.argv[1:])
