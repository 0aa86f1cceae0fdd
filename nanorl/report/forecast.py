"""What a run will do, from a few problems tried before its first step.

What share of the groups will teach something, how long it will take, what it will hold in memory
and what it will write.
"""

import math
import time
from dataclasses import replace
from functools import partial

import torch

from nanorl import grpo, learner
from nanorl.batch import pack
from nanorl.report import memory, plan, sizes, terminal
from nanorl.report.metrics import add_entropies, allowed_bytes, records, rollout_metrics
from nanorl.rollout import Rollout, reward_table
from nanorl.runtime import checkpoint, dist
from nanorl.runtime.log import duration, size, size_of
from nanorl.sampling import Completion
from nanorl.tasks import is_correct

# A dry run of RL tries no more problems, and evaluates no more, than take about so many seconds,
# reckoned at this share of the device's FLOP/s and bandwidth, which is assumed.
SECONDS, SHARE = 20.0, 0.1

# Checkpoints of base and SFT that stay: the first and the last two (checkpoint.prune).
KEPT = 3


def say(asked, sample, engine, policy, objective, meter, run, tokenizer):
    """Try a few problems, and print what follows from them.

    asked: the problems; sample(step, asked): this rank's Rollouts of them. The rest is what a step
    needs, because a step is what is tried.
    """
    settings = run.settings

    # Do as a step does, with the clock running, but for the update.
    begun = time.time()
    rollouts = sample("probe", asked)
    sampled = time.time()
    held = memory_lines(rollouts, engine, policy, settings) if rollouts else []
    learning = time.time()
    try_learning(rollouts, policy, objective, meter, settings)
    learnt = time.time()

    # The time of a whole step, on the slowest rank.
    once = sampled - begun + (learnt - learning) * settings["updates_per_rollout"]
    seconds = dist.total(once / len(asked) * settings["prompts_per_step"], "max")
    for p in policy.params:
        p.grad = None  # this only timed a backward pass
    meter.step.clear()

    rollouts = dist.gather(rollouts)
    if dist.is_main():
        lines = learning_lines(rollouts, seconds, settings["steps"] - run.first_step)
        rates = meter.flop_rate, meter.copy_rate
        lines += sizes.decode_lines(rollouts, engine, policy, settings, *rates) + held
        lines += disk_lines(rollouts, policy, tokenizer.decode, run)
        print(*("      " + text for text in lines), sep="\n", flush=True)
        run.log.probe(probe_records(rollouts, tokenizer.decode, settings))
        for line in lines:
            if line.startswith("WARNING: "):
                run.log.event(0, "warning", line.removeprefix("WARNING: "))


def dry_run(asked, evaluate, *a_step):
    """What a dry run of RL says after the heading. Every rank takes part.

    asked, a_step: what say() takes. evaluate(): the held-out evaluation. As much of both is done as
    is quick.
    """
    _, engine, policy, _, meter, run, tokenizer = a_step
    settings = run.settings
    prompts = [tokenizer.render_prompt(problem.prompt) for _, problem in asked]
    prompt = max(map(len, prompts))
    most = settings["max_new_tokens"]
    group = plan.Rollouts(1, settings["samples_per_prompt"], prompt, most, most)
    validation = plan.Rollouts(settings["eval_problems"], 1, prompt, most, most)
    seconds = seconds_at_most(group, 4, policy, meter)  # sampling, forward and twice that backward
    seconds_validating = seconds_at_most(validation, 1, policy, meter)

    reckoned = f"reckoned at an assumed {SHARE:.0%} of the device's FLOP/s and bandwidth"
    if seconds_validating > SECONDS:
        clock = duration(seconds_validating)
        dist.say(f"      held-out before: left out, it may take {clock} ({reckoned})")
    else:
        terminal.held_out_before(evaluate(0))
    affordable = int(SECONDS / seconds)
    if affordable < len(asked):
        clock = duration(seconds * len(asked))
        tried = f"{affordable} of {len(asked)} problems are tried"
        dist.say(f"      probe: {tried}, since all may take {clock} ({reckoned})")
    if affordable:
        say(asked[:affordable], *a_step)
    else:
        # Without a completion: the sizes of those that may come.
        untried = [like_rollout(ids, settings["samples_per_prompt"]) for ids in prompts]
        lines = speed_lines(group, policy, meter, run)
        lines += memory_lines(untried, engine, policy, settings)
        lines += disk_lines([], policy, tokenizer.decode, run)
        dist.say("\n".join("      " + line for line in lines))
    dist.say("      a dry run: nothing is trained, and nothing was written")


def seconds_at_most(rollouts, forwards, policy, meter):
    """Of so many forwards over them, the first to sample them; with answers as long as can be."""
    model = policy.model
    flops = forwards * rollouts.flops(model.config) / dist.world_size()
    read = rollouts.bytes_read(model.config, model.compute_dtype.itemsize)
    seconds = (flops / meter.flop_rate + read / meter.copy_rate) / SHARE
    return dist.total(seconds, "max")


def like_rollout(prompt_ids, samples):
    """A Rollout of which the sizes count alone: its completions have 8 tokens."""
    completions = [Completion(prompt_ids[-1:] * 8, [0.0] * 8, True)] * samples
    return Rollout(None, prompt_ids, completions, None, None, None)


def speed_lines(group, policy, meter, run):
    """How long a run may take whose problems are as `group`, where none is tried."""
    config, settings = policy.model.config, run.settings
    step = replace(group, problems=settings["prompts_per_step"])
    speeds = plan.assumed_speeds(meter.flop_rate, meter.copy_rate)
    itemsize = policy.model.compute_dtype.itemsize
    rollout, learner = plan.rl_step_seconds(step, config, dist.world_size(), speeds, itemsize)
    seconds = rollout + learner * settings["updates_per_rollout"]
    steps = settings["steps"] - run.first_step
    return [
        f"forecast: about {seconds:,.1f} s a step, {duration(steps * seconds)} in all, without "
        f"evaluations, where every answer has {group.answer} tokens (assumed, not measured: "
        f"{speeds.how['learner']}, {speeds.how['decode']})"
    ]


def try_learning(rollouts, policy, objective, meter, settings):
    """Forward and backward over Rollouts as train_rl.py's loop does them, to be timed.

    The Rollouts get their entropies.
    """
    temperature = settings["temperature"]
    ones = torch.ones(len(rollouts), settings["samples_per_prompt"], dtype=torch.float64)  # (P, G)
    batches = pack(rollouts, ones, ones, settings["device_tokens"], policy.device)
    if policy.reference:
        batches = learner.with_reference(batches, policy, objective, temperature, meter)
    sums = []
    for batch in batches:
        outputs = learner.forward(policy.model, batch, temperature, with_entropy=True)
        gain = grpo.surrogate(outputs.logprobs, batch, objective)
        loss = -(batch.token_weights * gain).sum()
        loss.backward()
        sums.append(learner.token_sums(outputs, batch, objective))
    add_entropies(rollouts, batches, sums)


# ---- in words ------------------------------------------------------------------------------------


def learning_lines(rollouts, seconds, steps):
    """Whether the run can learn something. seconds: of a step."""
    row = rollout_metrics(rollouts)
    G = len(rollouts[0].rewards)
    n = len(rollouts) * G
    solved = sum(is_correct(reward) for rollout in rollouts for reward in rollout.rewards)
    dead = row["frac_reward_zero_std"]
    length, cut_off = row["completions/mean_length"], row["completions/clipped_ratio"]
    signal = row["tokens_with_signal"]

    probe = f"probe: {solved} of {n} samples solved ({solved / n:.1%})"
    without = f"forecast: {dead:.0%} of the groups without signal (all {G} rewards equal)"
    teach = f"{signal:.0%} of the tokens in groups that teach"
    clock = f"about {seconds:.1f} s a step, {duration(seconds * steps)} in all"
    lines = [f"{probe}, {length:.1f} tokens, {cut_off:.0%} cut off"]
    lines.append(f"{without}, {teach}; {clock}, without evaluations")

    failures = [failure for rollout in rollouts for failure in rollout.failures if failure]
    if failures:
        failed = f"the task's reward failed on {len(failures)} of {n} samples"
        lines.append(f"WARNING: {failed}, such as: {failures[0].text}")
    if len(failures) > n / 2:
        lines.append("Mend its reward() first: a sample that was not judged teaches nothing.")
    elif solved == 0 and cut_off > 0.5:
        lines.append(
            "WARNING: no sample was solved, and most are cut off, so that they could not be: "
            "raise --max_new_tokens first, or teach the model to stop (SFT)."
        )
    elif solved == 0:
        lines.append(
            "WARNING: no sample was solved, so this task is too hard for this model: "
            "most steps will change nothing."
        )
        lines.append("Train it further (SFT), take an easier task, or raise --samples_per_prompt.")
    elif dead > 0.5:
        kind = "hard" if solved < n / 2 else "easy"
        lines.append(
            f"WARNING: more than half of the groups teach nothing: the task is too {kind} "
            f"for this model, or --samples_per_prompt={G} too few."
        )
    return lines


def memory_lines(rollouts, engine, policy, settings):
    """What the run will need at its peak."""
    model, device = policy.model, policy.device
    itemsize = model.compute_dtype.itemsize
    used = dist.used_memory(device)

    # The learner: a forward over device_tokens, or over all that this rank's problems may come to.
    # Completions grow as a model learns, so their length now is no bound.
    problems = share(settings["prompts_per_step"])
    longest = max(len(rollout.prompt_ids) for rollout in rollouts)
    new_tokens = settings["max_new_tokens"]
    most = problems * (longest + settings["samples_per_prompt"] * new_tokens)
    tokens = min(settings["device_tokens"], most)
    small, large = memory.passes(model, rollouts)
    activations = memory.activation_bytes(model, small, large, tokens, packed=True)

    # The sampler: its cache in a step, or in an evaluation, if that is larger. On a GPU both are
    # kept.
    caches = []
    graphs = 0
    for asked, samples in (
        (problems, settings["samples_per_prompt"]),
        (share(settings["eval_problems"]), 1),
    ):
        rows = min(engine.max_rows, asked * samples)
        prompts = min(engine.max_rows, asked)
        needed = memory.cache_bytes(model.config, itemsize, prompts, longest, rows, new_tokens)
        caches.append(needed)
        if engine.kept > 1:
            graphs += memory.graph_bytes(model, device, rows, new_tokens, longest)
    stays = engine.kept > 1
    cache = sum(caches) if stays else max(caches)

    # Models beside the policy: the sampler's narrower copy, and a reference of its own.
    copies = []
    if engine.model is not model:
        copies.append(engine.model)
    if policy.reference and not policy.adapters:
        with policy.reference() as reference:
            copies.append(reference)
    parts = memory.estimate(model, copies, policy.params, used, activations, cache, stays, graphs)
    parts["optimizer"] = moments(settings) * parts["gradients"]
    return memory.describe(parts, used, dist.free_memory(device))


def say_plan(run, trial, steps, held, saved, others=0):
    """What a dry run of base or SFT foretells.

    trial: a trial.Trial. steps: still to come. held: ({part: bytes} of memory, bytes of that in use
    now, the device). saved: bytes of a checkpoint. others: bytes that come on disk besides.
    """
    parts, used, device = held
    seconds = f"{trial.seconds:,.2f} s a step, {duration(trial.seconds * steps)} in all"
    lines = [f"forecast: about {seconds}, without evaluations ({trial.how})"]
    can_recompute = "recompute" in run.settings
    remedy = memory.REMEDY if can_recompute else "lower --device_tokens, or --depth"
    lines += memory.describe(parts, used, dist.free_memory(device), remedy)
    kept = KEPT + 1  # the next one is written before one goes
    tokens = f"token files {size(others)}, " if others else ""
    lines.append(
        f"on disk: {tokens}a checkpoint {size(saved)}, of which at most {KEPT} are kept, and those "
        "that others start from"
    )
    lines += too_little_disk(run.directory, others + kept * saved)
    lines.append("a dry run: nothing is trained, and nothing was written")
    dist.say("\n".join("      " + line for line in lines))


def too_little_disk(directory, needed):
    """-> a warning, or none."""
    free = checkpoint.free_disk(directory)
    if free >= needed:
        return []
    return [f"WARNING: {size(needed)} may be needed and only {size(free)} are free at {directory}"]


def say_memory_of_rows(policy, loss_of, seq_len, tokens):
    """What base or SFT will need at its peak: loss_of(n) is a forward over n rows of the kind to
    come, tokens is what this rank runs at once."""
    if not dist.is_main():
        return
    used = dist.used_memory(policy.device)  # before anything of this is alive
    small, large = ((partial(loss_of, rows), rows * seq_len) for rows in (1, 2))
    activations = memory.activation_bytes(policy.model, small, large, tokens)
    parts = memory.estimate(policy.model, [], policy.params, used, activations)
    lines = memory.describe(parts, used, dist.free_memory(policy.device))
    print(*("      " + line for line in lines), sep="\n", flush=True)


def share(problems):
    """The most problems that a rank has of so many."""
    return -(-problems // dist.world_size())


# ---- on disk -------------------------------------------------------------------------------------


def probe_records(rollouts, decode, settings):
    """The records of Rollouts that are tried before the first step, as of a step 0."""
    rewards = reward_table(rollouts, settings["samples_per_prompt"])  # (P, G)
    advantages = grpo.advantages(rewards, settings["advantage"])  # (P, G)
    return records(
        rollouts, advantages.tolist(), decode, 0, time.time(), settings["rollout_tokens"]
    )


def moments(settings):
    """How many numbers a weight the optimizer keeps."""
    return {"adamw": 2, "rmsprop": 1, "sgd": 0}[settings.get("optimizer", "adamw")]


def steps_kept(settings):
    """How many steps' checkpoints the constant `keep` holds, of those that save_every saves."""
    every = settings["save_every"]
    if not every:
        return 0
    steps = range(every, settings["steps"] + 1, every)
    return sum(checkpoint.is_kept(step, settings["keep"]) for step in steps)


def disk_lines(rollouts, policy, decode, run):
    """What the run will write. rollouts: a few; none: nobody knows how much they will take."""
    written, known, warnings = 0, "", []
    if rollouts:
        written, warnings = rollout_bytes(rollouts, decode, run.settings)
        known = f"rollouts about {size(written)} in all, "
    if run.log.evaluation_bytes:
        steps, every = run.settings["steps"], run.settings["eval_every"]
        evaluated = (1 + math.ceil(steps / (every or steps))) * run.log.evaluation_bytes
        known += f"evaluations {size(evaluated)}, "
        written += evaluated
    # A checkpoint: AdamW keeps two moments, other rules fewer.
    fewer = 2 - moments(run.settings)
    saved = plan.saved_bytes(policy, muon=False) - fewer * memory.bytes_of(policy.params)
    line = (
        f"on disk: {known}a checkpoint {size(saved)}, "
        "of which at most four are kept, and those that others start from"
    )
    kept = steps_kept(run.settings)
    if kept:
        keep = run.settings["keep"]
        line += f"; --keep={keep}: beside them {kept}, {size(kept * saved)}"
    needed = written + (5 + kept) * saved
    return [line, *warnings, *too_little_disk(run.directory, needed)]


def rollout_bytes(rollouts, decode, settings):
    """-> (bytes of all files of rollouts, a warning where --rollouts_gb is too little for them)."""
    whole = bytes_a_step(rollouts, decode, settings)
    text = bytes_a_step(rollouts, decode, {**settings, "rollout_tokens": False})
    written, counts = kept_steps(whole, text, settings)
    if counts["whole"] == settings["steps"]:
        return written, []
    bound = f"--rollouts_gb={settings['rollouts_gb']:g}"
    needed = size(whole * settings["steps"])
    return written, [
        f"WARNING: all rollouts would take {needed}, more than {bound}: about "
        f"{counts['whole']:,} steps are written whole, {counts['text']:,} as text alone, "
        f"{counts['none']:,} not at all; raise it to have more"
    ]


def bytes_a_step(rollouts, decode, settings):
    """Of a step's file of rollouts, from a few Rollouts.

    With --resample groups without signal are in it too, in the place of which others were sampled.
    """
    P = settings["prompts_per_step"]
    some = rollouts[:P]
    learnt = size_of(probe_records(some, decode, settings)) * P / len(some)

    dead = rollout_metrics(rollouts)["frac_reward_zero_std"]
    replaced = sum(P * dead**time for time in range(1, settings["resample"] + 1))
    without = [replace(rollout, entropies=None) for rollout in some]
    again = size_of(probe_records(without, decode, settings)) * replaced / len(some)
    return learnt + again


def kept_steps(whole, text, settings):
    """How much of the steps metrics.write_rollouts has room for, where each has files of so many
    bytes, whole and as text alone -> (bytes in all, {"whole", "text", "none": steps})."""
    held, counts = 0, {"whole": 0, "text": 0, "none": 0}
    for step in range(1, settings["steps"] + 1):
        most = allowed_bytes(step, settings)
        kept, taken = "none", 0
        if held + whole <= most:
            kept, taken = "whole", whole
        elif held + text <= most:
            kept, taken = "text", text
        counts[kept] += 1
        held += taken
    return held, counts
