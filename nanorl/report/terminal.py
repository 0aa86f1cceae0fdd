"""What the training scripts say: before the first step, and a line a step."""

import sys

from nanorl.optim import RULES, lr_scale
from nanorl.runtime import dist
from nanorl.runtime.log import duration


def rl_heading(run, model, problems, looks, lr):
    """Where the run starts from, what it trains on, and what a step is.

    problems: a problems.Problems; looks: what its check() has found.
    """
    settings, start = run.settings, run.model
    P, G = settings["prompts_per_step"], settings["samples_per_prompt"]
    parameters = model.config.n_params()[0]
    devices = f"{dist.world_size()} x {model.cos.device.type}"
    rows = f"{P} problems x {G} samples = {P * G} rows"
    most, update = settings["max_new_tokens"], update_in_words(settings)
    rule = RULES[settings["optimizer"]]
    step = f"{rows} of at most {most} tokens, {update}, {rule} {lr:g}"
    dist.say(f"rl    from {start}: {parameters:,} parameters, {model.compute_dtype} on {devices}")
    for number, look in enumerate(looks, 1):
        stage = f" in stage {number}" if len(looks) > 1 else ""
        about_problems(settings["task"] + stage, problems, look, run.log)
    dist.say(f"      a step is {step}; {passes_in_words(problems, P, settings['steps'])}")


def passes_in_words(problems, per_step, steps):
    """How often so many steps go through the problems, of a curriculum through each stage's."""
    words = [f"{steps} steps x {per_step} problems"]
    firsts = [first for first, _ in problems.stages]
    for first, end, (_, task) in zip(firsts, [*firsts[1:], steps], problems.stages):
        n = problems.n_of(task)
        asked = per_step * max(0, min(end, steps) - first)
        # Of a task that makes its problems there may be no end, and 0.00 would say nothing.
        number = "less than 0.01" if asked / n < 0.01 else f"{asked / n:.2f}"
        passes = f"{number} passes over {n:,} problems"
        words.append(passes if len(firsts) == 1 else f"from step {first} on {passes}")
    return " = ".join(words) if len(firsts) == 1 else "; ".join(words)


def about_problems(name, problems, look, log):
    """How many there are, how many are different, and what is wrong with them."""
    looked_at, different = look["looked_at"], look["different"]
    shared, held_out = look["shared"], look["held_out"]
    first = "" if looked_at == look["n"] else f"looked at {looked_at:,}: "
    counts = f"{first}{different:,} different"
    among = f"{shared:,} among the {held_out:,} held-out ones"
    dist.say(f"      {name}: {look['n']:,} training problems ({counts}, {among})")
    if shared:
        warn(
            f"{shared:,} of the {held_out:,} held-out problems are training problems too, so the "
            "held-out accuracy is not of unseen problems: give the val split others",
            log,
        )
    if different < looked_at:
        warn(
            f"the first {looked_at:,} training problems are only {different:,} different ones: "
            "the others come again",
            log,
        )
    if look["too_long"]:
        warn(problems.in_words(look["too_long"]), log)


def warn(sentence, log):
    """Say before the first step what is amiss, and keep it in events.jsonl."""
    dist.say(f"      WARNING: {sentence}")
    log.event(0, "warning", sentence)


def update_in_words(settings):
    """What a step does with its samples, where it is not the default."""
    words = []
    if settings["lora_rank"]:
        words.append(f"LoRA of rank {settings['lora_rank']}")
    updates = settings["updates_per_rollout"]
    if updates == 1:
        words.append("one update")
    else:
        low, high = 1 - settings["clip_low"], 1 + settings["clip_high"]
        words.append(f"{updates} updates with the ratio in [{low:g}, {high:g}]")
    if settings["kl_coef"]:
        words.append(f"KL {settings['kl_coef']:g} ({settings['kl_estimator']})")
    if settings["resample"]:
        words.append(f"dead groups replaced up to {settings['resample']} times")
    if settings["overlong"] == "mask":
        words.append("cut-off completions left out")
    return ", ".join(words)


def held_out_before(row):
    """The held-out evaluation that comes before the first step."""
    words = f"{accuracy(row)}, {row['val/length']:.1f} tokens{trained(row)}"
    dist.say(f"      held-out before: {words}")


def trained(row):
    """Of a fixed set of training problems, their accuracy."""
    if "train_set/accuracy" not in row:
        return ""
    return f"  trained problems {row['train_set/accuracy']:.1%}"


def accuracy(row):
    """Held-out accuracy with its 95% interval, and on how many answers the reward failed."""
    words = f"{row['val/accuracy']:.1%} [{row['val/low']:.1%}, {row['val/high']:.1%}]"
    if "val/failed" in row:
        words += f" (WARNING: the task's reward failed on {row['val/failed']} of {row['val/n']}, "
        words += f"which count as not solved, such as: {row['val/failure']})"
    if "val/too_long" in row:
        words += f" ({row['val/too_long']} prompts do not fit the model and count as not solved)"
    return words


def rl_line(step, steps, row, seconds_left, every=1):
    """A line every `every` steps, and one for an evaluation."""
    if step % every and "val/accuracy" not in row:
        return
    seconds = f"{row['time/rollout']:.1f}+{row['time/learner']:.1f} s"
    words = [f"rl    {step:4d}/{steps}"]
    words.append(f"reward {row['reward']:.3f}")
    if "reward/correct" in row:
        words.append(f"right {row['reward/correct']:4.0%}")
    words.append(f"len {row['completions/mean_length']:5.1f}")
    words.append(f"dead {row['frac_reward_zero_std']:4.0%}")
    words.append(f"cut {row['completions/clipped_ratio']:3.0%}")
    words.append(f"entropy {row['entropy']:.3f}")
    words.append(f"grad {row['grad_norm']:5.2f}")
    words.append(seconds)
    words.append(f"ETA {duration(seconds_left)}")
    if "val/accuracy" in row:
        words.append(f"val {accuracy(row)} len {row['val/length']:.1f}{trained(row)}")
    dist.say("  ".join(words))


def warnings(step, sentences, log):
    """Say what begins to go wrong, and keep it in events.jsonl. log: a runtime.log.RunLog."""
    for sentence in sentences:
        dist.say(f"      WARNING, step {step}: {sentence}")
        log.event(step, "warning", sentence)


def short_run(steps, warmup, *schedule):
    """Say so where the learning rate never gets to what was announced; all as optim.lr_scale's."""
    highest = max(lr_scale(step, steps, warmup, *schedule) for step in range(steps))
    if highest < 0.995:
        dist.say(
            f"      the rate rises to {highest:.0%} of that at most: {steps} steps are too few for "
            f"--warmup={warmup}"
        )


# ---- SFT -----------------------------------------------------------------------------------------


def rule(policy, muon, rate, other_rate):
    """By which rule what is trained, in words."""
    words = f"Muon {rate:g}, AdamW {other_rate:g}" if muon else f"AdamW {rate:g}"
    if policy.adapters:
        numbers = sum(p.numel() for p in policy.params)
        rank = policy.adapters.rank
        words += f" on adapters of rank {rank}, {numbers:,} parameters"
    return words


def sft_heading(run, rule, steps, n, mean_length, held_out, note):
    """n: examples, of so many tokens on average. note: what the user should know of the data."""
    settings = run.settings
    kind = "conversations" if settings["data"] else "demonstrations"
    batch_tokens = settings["batch_tokens"]
    passes = steps * batch_tokens / (n * mean_length)
    words = f"{n:,} {kind} of {mean_length:.0f} tokens"
    words += f", {steps} steps of {batch_tokens:,} tokens = {passes:.2f} passes"
    if settings["data"]:
        words += f"; {held_out:,} held out"
    dist.say(f"sft   from {run.model}; {rule}; {words}")
    if note:
        dist.say(f"      {note}")


def sft_parts(parts, epochs):
    """A line for every part of a mixture: how often the run goes through it. epochs: {name: so}."""
    for name, part in parts.items():
        words = f"{name}: weight {part.weight}, {len(part.train):,} conversations, "
        words += f"{epochs[name]:.2f} epochs; {len(part.held_out):,} validate"
        dist.say(f"      {words}")
        if part.note:
            dist.say(f"        {part.note}")


def matched_flops(settings, target, steps):
    """That SFT takes the place of an RL run."""
    data = "after what that SFT has seen" if target.cursor else "from the first pass on"
    of_run = f"the {target.flops:.3g} FLOPs of {settings['match_flops']}"
    tokens = steps * settings["batch_tokens"]
    dist.say(f"      these are {of_run}: {tokens:,} tokens, {data}; every pass in another order")


def sft_held_out_before(row):
    dist.say(f"      held-out before: {in_words(row)}")
    held_out_parts(row)


def in_words(row):
    """What a row says of a validation; nothing where there was none."""
    if "val/loss" in row:
        return f"{row['val/loss']:.3f} nats a token"
    if "val/accuracy" in row:
        return accuracy(row)
    return ""


def held_out_parts(row):
    """What a validation found for the parts of a mixture; nothing where there are none."""
    words = []
    for key in row:
        if not key.startswith("val/loss/"):
            continue
        name = key.removeprefix("val/loss/")
        word = f"{name} {row[key]:.3f}"
        if f"val/accuracy/{name}" in row:
            word += f" ({row[f'val/accuracy/{name}']:.1%} right)"
        words.append(word)
    if words:
        dist.say(f"        by part: {', '.join(words)}")


def sft_line(step, steps, row, losses, seconds_left):
    """A line every `log_every` steps; losses: since the last."""
    words = [f"sft   {step:5d}/{steps}", f"loss {sum(losses) / len(losses):.3f}"]
    if in_words(row):
        words.append(f"val {in_words(row)}")
    words.append(f"grad {row['grad_norm']:.2f}")
    words.append(f"packed {row['packing']:.0%}")
    words.append(f"{row['tok_per_s/learner']:,.0f} tok/s")
    words.append(f"ETA {duration(seconds_left)}")
    dist.say("  ".join(words))
    held_out_parts(row)


# ---- base ----------------------------------------------------------------------------------------


def base_heading(model, vocabulary, steps, batch_tokens, passes, tokens):
    """tokens: there are to train on. passes: over them; None where that is not known."""
    parameters, depth = model.config.n_params()[0], model.config.n_layer
    shape = f"{parameters:,} parameters, depth {depth}, vocabulary {vocabulary}"
    where = f"{model.compute_dtype} on {model.cos.device}"
    work = f"{steps} steps of {batch_tokens:,} tokens"
    if passes is not None:
        work += f" = {passes:.1f} passes over {tokens:,} tokens"
    dist.say(f"base  {shape}, {where}; {work}")


def base_line(step, steps, row, losses, seconds_left):
    """A line every `log_every` steps, and one for a validation; losses: since the last."""
    words = [f"base  {step:5d}/{steps}", f"loss {sum(losses) / len(losses):.3f}"]
    words.append(f"grad {row['grad_norm']:.2f}")
    words.append(f"{row['tok_per_s/learner']:,.0f} tok/s")
    words.append(f"MFU {row['mfu']:.0%}")
    words.append(f"pass {row['epoch']:.2f}")
    words.append(f"ETA {duration(seconds_left)}")
    dist.say("  ".join(words))
    if "val/bits_per_byte" in row:
        dist.say(f"        val {row['val/bits_per_byte']:.3f} bits/byte")


def one_line(text):
    """Text for the terminal: line breaks as ⏎, what cannot be printed as ·"""
    shown = ""
    for character in text:
        if character == "\n":
            shown += "⏎"
        else:
            shown += character if character.isprintable() else "·"
    encoding = sys.stdout.encoding or "utf-8"
    return shown.encode(encoding, "replace").decode(encoding)
