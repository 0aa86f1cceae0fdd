#!/usr/bin/env python3
"""What a first run on a GPU should tell, in two halves of six minutes: bash runs/gpu_check.sh

    python runs/gpu_check.py [1 | 2 | part ...] [--tiny]

Run it from the project's root. `1` and `2` are the halves, without an argument both. Each part is a
process of its own with a time limit: a failure costs only itself. --tiny: small sizes, for a CPU.

    where        rates, and which backend takes each shape of attention    gpu_checks/exact.py
    exact        fp32: engine and a step's gradient on the GPU and the CPU
    decode       tokens/s and the share of the floor                       gpu_checks/speed.py
    step         a whole step, with utilisation and watts
    learner      forward and backward: seconds and MFU
    profile      kernels of a decode step; those that take most of the time
    run          eight steps of depth 12 in GSM8K's shape, memory          gpu_checks/training.py
    quickstart   runs/quickstart.sh's stages and accuracies
    resume       kill -9, and on from the checkpoint
    paths        a rollout and a learner pass with each fast path off      gpu_checks/speed.py

Read the table at the end from above: a verdict is `ok`, `below` (the target is missed) or `not
measured` (the part failed: the lines under the table say why). Figures go into docs/results.md's
table `On a GPU`, with card, torch, commit and date. All of them are in gpu_check.json, in the
folder $OUT, by default out/gpu_check, and what a part said is in <part>.log beside it.
"""

import os
import sys

sys.path.insert(0, os.getcwd())
sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))

from gpu_checks import exact, speed, table, training
from gpu_checks.parts import results_file, run_all

# Seconds that each part may take; the most valuable part of a half comes first.
HALVES = (
    dict(where=35, exact=55, decode=95, step=70, learner=60, profile=45),
    dict(run=75, quickstart=110, resume=55, paths=120),
)


def main():
    if "GPU_CHECK_PART" in os.environ:
        run_here(os.environ["GPU_CHECK_PART"])
        return
    print(__doc__, flush=True)
    arguments = sys.argv[1:]
    limits = limits_of([argument for argument in arguments if not argument.startswith("--")])
    file = results_file("gpu_check")
    command = [sys.executable, os.path.abspath(__file__), *arguments]
    report = run_all(limits, command, file)
    print("", *table.lines(report), f"\nwrote {file}", sep="\n", flush=True)


def limits_of(arguments):
    """['2'] -> {part: limit} of the second half; parts by name -> of those; nothing -> of all."""
    all_parts = {**HALVES[0], **HALVES[1]}
    limits = {}
    for argument in arguments or ("1", "2"):
        if argument in ("1", "2"):
            limits.update(HALVES[int(argument) - 1])
        elif argument in all_parts:
            limits[argument] = all_parts[argument]
        else:
            names = ", ".join(all_parts)
            raise SystemExit(f"error: {argument} is no part: give 1, 2, or some of {names}")
    return limits


def run_here(part):
    """The part itself, in this process."""
    for module in (exact, speed, training):
        if hasattr(module, part):
            getattr(module, part)()
            return


if __name__ == "__main__":
    main()
