"""What train_rl.py says: before the first step, and a line a step."""

from nanorl.runtime import dist
from nanorl.runtime.log import duration


def heading(settings, start, policy, problems, lr):
    """Where the run starts from, what it trains on, and what a step is."""
    P, G = settings["prompts_per_step"], settings["samples_per_prompt"]
    parameters = policy.config.n_params()[0]
    devices = f"{dist.world_size()} x {policy.cos.device.type}"
    stage = " in its last stage" if len(problems.stages) > 1 else ""
    rows = f"{P} problems x {G} samples = {P * G} rows"
    most, update = settings["max_new_tokens"], update_in_words(settings)
    step = f"{rows} of at most {most} tokens, {update}, AdamW {lr:g}"
    dist.say(f"rl    from {start}: {parameters:,} parameters, {policy.compute_dtype} on {devices}")
    dist.say(f"      {settings['task']}: {len(problems):,} training problems{stage}")
    dist.say(f"      a step is {step}; {settings['steps']} steps")


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
    dist.say(f"      held-out before: {accuracy(row)}, {row['val/length']:.1f} tokens")


def accuracy(row):
    """Held-out accuracy with its 95% interval."""
    return f"{row['val/accuracy']:.1%} [{row['val/low']:.1%}, {row['val/high']:.1%}]"


def line(step, steps, row, seconds_left):
    """One line a step."""
    seconds = f"{row['time/rollout']:.1f}+{row['time/learner']:.1f} s"
    words = [f"rl    {step:4d}/{steps}"]
    words.append(f"reward {row['reward']:.3f}")
    words.append(f"len {row['completions/mean_length']:5.1f}")
    words.append(f"dead {row['frac_reward_zero_std']:4.0%}")
    words.append(f"cut {row['completions/clipped_ratio']:3.0%}")
    words.append(f"entropy {row['entropy']:.3f}")
    words.append(f"grad {row['grad_norm']:5.2f}")
    words.append(seconds)
    words.append(f"ETA {duration(seconds_left)}")
    if "val/accuracy" in row:
        words.append(f"val {accuracy(row)} len {row['val/length']:.1f}")
    dist.say("  ".join(words))
