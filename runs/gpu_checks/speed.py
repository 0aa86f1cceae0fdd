"""How fast a rollout, a learner pass and a whole step are, and what each fast path is worth."""

import os
from functools import partial
from typing import NamedTuple

import torch
from gpu_checks.common import (
    D12,
    D20,
    FEW_ROWS,
    MANY_ROWS,
    TINY,
    Watch,
    free_memory,
    kernels_of,
    median_seconds,
    options,
    peaks,
    randomize,
    rates,
    start,
    tell,
)

from nanorl.cache import DecodeAttention, DecodeBatch
from nanorl.tools import bench

# ---- cases ---------------------------------------------------------------------------------------


def sampling(depth, rows):
    """A rollout to measure: nanorl.tools.bench's, with random matrices."""
    case = bench.Sampling(options(depth, rows))
    randomize(case.net)
    case.engine.refresh()
    return case


def learning(depth):
    """The learner's pass over such a rollout."""
    case = bench.Learning(options(depth))
    randomize(case.net)
    return case


# ---- decode, learner, step -----------------------------------------------------------------------


def decode():
    """Rollouts: tokens a second and the share of the floor."""
    device = start()
    machine = rates(device)
    for depth in (D20, D12):
        for rows in (FEW_ROWS, MANY_ROWS):
            free_memory()
            case = sampling(depth, rows)
            figures = of_rollout(case, machine, tries=2)
            tell("decode", depth=depth, rows=rows, **figures, **peaks())
            del case


def of_rollout(case, machine, tries):
    """-> figures of a rollout. machine: its rates."""
    flop_rate, copy_rate = machine
    # The first call warms up and captures the graphs.
    case.work()
    seconds = median_seconds(case.work, case.device, tries)
    flops, moved = case.needed()
    stats = case.engine.stats
    return dict(
        seconds=seconds,
        tok_s=stats["new_tokens"] / seconds,
        ms_step=1000 * seconds / len(stats["live"]),
        of_floor=(flops / flop_rate + moved / copy_rate) / seconds,
        of_bytes_floor=moved / copy_rate / seconds,
    )


def learner():
    """Forward and backward of a step's completions: seconds and MFU."""
    device = start()
    machine = rates(device)
    for depth in (D20, D12):
        free_memory()
        case = learning(depth)
        tell("learner", depth=depth, **of_learner(case, machine, tries=3), **peaks())
        del case


def of_learner(case, machine, tries):
    """-> figures of the learner."""
    flop_rate, _ = machine
    first, tokens = bench.timed(case.work, case.device)
    case.work()
    seconds = median_seconds(case.work, case.device, tries)
    flops, _ = case.needed()
    return dict(
        first_s=first,
        seconds=seconds,
        mfu=flops / seconds / flop_rate,
        tok_s=tokens / seconds,
    )


def step():
    """A whole step: rollout, learner, update, and what the GPU does meanwhile."""
    start()
    for depth in (D20, D12):
        free_memory()
        case = bench.WholeStep(options(depth))
        randomize(case.net)
        case.engine.refresh()
        for _ in range(2):
            case.work()

        case.parts.clear()
        with Watch() as watch:
            seconds = median_seconds(case.work, case.device, 1 if TINY else 5)
        rollouts, learners, updates = zip(*case.parts)
        tell(
            "step",
            depth=depth,
            seconds=seconds,
            rollout_s=min(rollouts),
            learner_s=min(learners),
            update_s=min(updates),
            **watch.means(),
            **peaks(),
        )
        del case


# ---- fast paths, on and off ----------------------------------------------------------------------


def without_graphs(case):
    """Each decode step is launched kernel by kernel."""
    engine = case.engine
    with_graphs = engine._batch_for

    def batch_for(prompts, settings):
        batch = with_graphs(prompts, settings)
        batch.uses_graphs = False
        return batch

    engine._batch_for = batch_for


def without_kernel_attention(case):
    """The decode step's attention by matrix products: the plain form."""
    case.engine.attention = DecodeAttention


def without_common_products(case):
    """q, k and v, and gate and up, are products of their own."""
    for block in case.engine.model.model.layers:
        for module in (block.self_attn, block.mlp):
            vars(module).pop("project", None)


def with_cudnn(_case):
    """cuDNN's attention, which dist.setup turns off because of its plans for new shapes."""
    torch.backends.cuda.enable_cudnn_sdp(True)


def without_flex(_case):
    """The plain form of the learner's attention: rectangles, a call each (nanorl/attention.py)."""
    os.environ["NANORL_FLEX"] = "0"


def with_recompute(case):
    """Activations are computed again in backward."""
    case.net.recompute = True


class Variant(NamedTuple):
    """A way to run: what is changed of a case before it is measured."""

    name: str
    changes: tuple = ()


# A fast path more is a line more.
DECODE_VARIANTS = (
    Variant("as it is"),
    Variant("no graphs", (without_graphs,)),
    Variant("no attention kernel", (without_kernel_attention,)),
    Variant("no common products", (without_common_products,)),
    Variant("none", (without_graphs, without_kernel_attention, without_common_products)),
)
LEARNER_VARIANTS = (
    Variant("as it is"),
    Variant("rectangles", (without_flex,)),
    Variant("rectangles, cuDNN", (without_flex, with_cudnn)),
    Variant("recompute", (with_recompute,)),
)


def paths():
    """A rollout and a learner pass with each fast path off."""
    device = start()
    machine = rates(device)
    for depth in (D20, D12):
        for variant in LEARNER_VARIANTS:
            free_memory()
            case = learning(depth)
            changed(case, variant)
            figures = of_learner(case, machine, tries=1)
            tell("paths", of="learner", depth=depth, variant=variant.name, **figures, **peaks())
            # What a variant has set for the whole process.
            del case
            os.environ.pop("NANORL_FLEX", None)
            start()

        for rows in (FEW_ROWS, MANY_ROWS):
            for variant in DECODE_VARIANTS:
                free_memory()
                case = sampling(depth, rows)
                changed(case, variant)
                name = dict(of="decode", depth=depth, rows=rows, variant=variant.name)
                tell("paths", **name, **of_rollout(case, machine, tries=1))
                del case


def changed(case, variant):
    """Make the variant's changes to a case."""
    for change in variant.changes:
        change(case)


# ---- profile -------------------------------------------------------------------------------------


def profile():
    """Kernels of a decode step in each variant, and those that take most of the time.

    It is a part of its own: a profiler that fails takes no figure with it. The rollouts are short,
    because a step is like another, and each has hundreds of kernels.
    """
    start()
    for depth in (D20, D12):
        for variant in DECODE_VARIANTS:
            free_memory()
            case = short_rollout(depth)
            changed(case, variant)
            case.work()
            kernels = kernels_of_a_step(case.work)
            tell("profile", depth=depth, variant=variant.name, kernels=kernels)
            del case

    for of, case in (("decode", short_rollout(D20)), ("learner", learning(D20))):
        # Twice without the profiler: what happens only at first is not of interest.
        case.work()
        case.work()
        totals = {}
        for name, microseconds in kernels_of(case.work):
            count, total = totals.get(name, (0, 0))
            totals[name] = count + 1, total + microseconds
        tell("profile", of=of, longest=longest(totals, 15))


def short_rollout(depth):
    case = sampling(depth, FEW_ROWS)
    case.options.new_tokens //= 8
    return case


def kernels_of_a_step(work):
    """How many kernels one decode step of a rollout takes; None on a CPU.

    It is the second step of a rollout: a replay, if an earlier call has captured the graphs.
    """
    counts = []
    steps = 0
    step = DecodeBatch.step

    def counted(batch):
        nonlocal steps
        steps += 1
        if steps == 2:
            counts.append(len(kernels_of(partial(step, batch))))
        else:
            step(batch)

    DecodeBatch.step = counted
    try:
        work()
    finally:
        DecodeBatch.step = step
    return counts[0] or None


def longest(totals, n):
    """{name: (count, microseconds)} -> the n that take most, [name, count, milliseconds] each."""
    rows = []
    for name, (count, microseconds) in totals.items():
        rows.append([name[:100], count, round(microseconds / 1000, 3)])
    rows.sort(key=milliseconds, reverse=True)
    return rows[:n]


def milliseconds(row):
    return row[2]
