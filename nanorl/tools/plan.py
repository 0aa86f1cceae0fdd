"""What all stages of a depth will cost, before any has run.

    python -m nanorl.tools.plan --depth=20 --gpus=8 --gpu=h100 --dollars_per_gpu_hour=3
    python -m nanorl.tools.plan --depth=4 --gpus=1 --gpu=cpu --like=out/d3

Counts follow from shapes (nanorl/report/plan.py). Hours follow from them and from what a GPU
reaches: as in the run that --like names, or else a share of its data sheet that is assumed; the
output says which. `train_base.py --dry_run` and the others look at the data and time this device.
"""

import os

import torch

from nanorl.gpt import GPTConfig
from nanorl.report import memory, plan
from nanorl.report.rates import device_rates
from nanorl.runtime import dist
from nanorl.runtime.config import at_least, configure, one_of
from nanorl.runtime.log import duration, size

# ---- model and devices
depth = 20  # layers; the width is 64 x depth
vocab_size = 32768  # tokens
gpus = 8  # of one node
gpu = "h100"  # h100, h200, a100, a100-40gb, b200, l40s, rtx4090; cpu: this machine, measured
cores = 16  # of the node's CPU, that make token files
dollars_per_gpu_hour = 0.0  # price of one GPU for an hour; 0: no cost is named
like = ""  # a run's folder, out/d12: speeds as it reached them, stage by stage
device_tokens = 16384  # tokens of one forward on one GPU
recompute = False  # activations are computed again in backward
# ---- base
tokens_per_parameter = 20.0  # Hoffmann et al. 2022: about the best for its FLOPs
batch_tokens = 524288  # tokens of a step, over all GPUs
seq_len = 2048  # tokens of a row
# ---- SFT
conversations = 100000  # gone through once
conversation_tokens = 512  # of one, on average
# ---- RL
problems = 7473  # of the training split; GSM8K's number
passes = 1.0  # over them
prompts_per_step = 64  # P, over all GPUs
samples_per_prompt = 16  # G
prompt_tokens = 128  # of a problem, on average
answer_tokens = 128  # of a completion, on average
max_new_tokens = 256  # a completion is cut off here, and a step waits for one that is
eval_every = 10  # steps between held-out evaluations
eval_problems = 400  # in each
# ---- evaluation, eval.py
test_problems = 1319  # GSM8K's number, greedy, after each of the three stages

WEIGHTS, SAMPLED = 4, 2  # bytes of a number of the weights (fp32), and of the sampler's (bf16)


def main():
    settings = configure(globals())
    check_settings(settings)
    config = GPTConfig.from_depth(depth, vocab_size)
    speeds, about_speeds = speeds_of_the_device()
    activations = memory.activation_bytes_on_a_gpu(config, torch.bfloat16, device_tokens, recompute)
    stages = [text(config)]
    stages.append(base(config, speeds, activations))
    stages.append(sft(config, speeds, activations))
    stages.append(rl(config, speeds, activations))
    stages.append(evaluation(config, speeds))

    parameters = config.n_params()[0]
    shape = f"{config.n_layer} layers of width {config.n_embd:,}, vocabulary {vocab_size:,}"
    print(f"depth {depth}: {parameters:,} parameters ({shape}), on {gpus} x {gpu}\n")
    for line in table(stages):
        print(line)
    print()
    for stage in stages:
        print(f"{stage['name']}: {stage['why']}")
    for line in [*about_speeds, *in_short(stages)]:
        print(line)


# ---- the stages ----------------------------------------------------------------------------------


def text(config):
    """Text -> token files; no GPU works."""
    tokens = base_tokens(config)
    rate = min(cores * plan.TOKENIZED_A_CORE, plan.TOKENIZED_AT_MOST)
    nbytes = plan.BYTES_A_TOKEN * tokens
    why = (
        f"{size(nbytes)} of text at {plan.BYTES_A_TOKEN} bytes a token, and {rate / 1e6:.1f} "
        f"million tokens/s on {cores} cores (docs/scaling.md); fetching it is not counted"
    )
    disk = plan.token_file_bytes(tokens, vocab_size)
    return dict(name="text", tokens=tokens, flops=0, seconds=tokens / rate, disk=disk, why=why)


def base_tokens(config):
    return plan.base_steps(config, batch_tokens, tokens_per_parameter) * batch_tokens


def base(config, speeds, activations):
    tokens = base_tokens(config)
    flops = plan.text_flops(config, tokens, seq_len)
    why = (
        f"{tokens_per_parameter:g} tokens a parameter, {tokens // batch_tokens:,} steps of "
        f"{batch_tokens:,} tokens; {flops / tokens / 1e9:.2f} GFLOPs a token"
    )
    held = plan.training_bytes(config, True, gpus, activations, WEIGHTS)
    stage = dict(name="base", tokens=tokens, flops=flops, why=why, memory=held)
    stage["seconds"] = flops / gpus / speeds.base
    stage["disk"] = kept(config, muon=True)
    return stage


def sft(config, speeds, activations):
    tokens = conversations * conversation_tokens
    flops = plan.text_flops(config, tokens, conversation_tokens)
    why = (
        f"{conversations:,} conversations of {conversation_tokens} tokens, once; the head is "
        "counted on all of them"
    )
    held = plan.training_bytes(config, True, gpus, activations, WEIGHTS)
    stage = dict(name="SFT", tokens=tokens, flops=flops, why=why, memory=held)
    stage["seconds"] = flops / gpus / speeds.sft
    stage["disk"] = kept(config, muon=True)
    return stage


def rl(config, speeds, activations):
    steps = max(1, round(passes * problems / prompts_per_step))
    step = rollouts(prompts_per_step, samples_per_prompt)
    validation = rollouts(eval_problems, 1)
    validations = 2 + (steps - 1) // eval_every  # before, on the way, and after
    rollout, learner = plan.rl_step_seconds(step, config, gpus, speeds, SAMPLED)
    seconds_validating = plan.rollout_seconds(validation, config, gpus, speeds, SAMPLED)

    asked = steps * prompts_per_step
    rows = f"{steps} steps x {prompts_per_step} problems x {samples_per_prompt} samples"
    why = f"{rows} = {asked / problems:.2f} passes over {problems:,} problems; "
    why += f"prompts of {prompt_tokens} tokens, answers of {answer_tokens}, at most "
    why += f"{max_new_tokens}; a step {rollout:.1f} s to sample, {learner:.1f} s to learn; "
    why += f"{validations} evaluations of {eval_problems}, {seconds_validating:.1f} s each"
    held = plan.training_bytes(config, False, gpus, activations, WEIGHTS)
    held["sampler's copy"] = SAMPLED * config.n_params()[0]
    held["cache"] = step.share(gpus).cache_bytes(config, SAMPLED)
    held["cache"] += validation.share(gpus).cache_bytes(config, SAMPLED)
    stage = dict(name="RL", tokens=steps * step.tokens(), why=why, memory=held)
    stage["flops"] = steps * 4 * step.flops(config) + validations * validation.flops(config)
    stage["seconds"] = steps * (rollout + learner) + validations * seconds_validating
    stage["disk"] = kept(config, muon=False)
    return stage


def evaluation(config, speeds):
    asked = rollouts(test_problems, 1)
    seconds = 3 * plan.rollout_seconds(asked, config, gpus, speeds, SAMPLED)
    stage = dict(name="evaluation", tokens=3 * asked.tokens(), seconds=seconds, disk=0)
    stage["why"] = f"three models, {test_problems:,} problems each, greedy"
    stage["flops"] = 3 * asked.flops(config)
    cache = asked.share(gpus).cache_bytes(config, SAMPLED)
    stage["memory"] = dict(weights=SAMPLED * config.n_params()[0], cache=cache)
    return stage


def rollouts(n, samples):
    return plan.Rollouts(n, samples, prompt_tokens, answer_tokens, max_new_tokens)


def kept(config, muon):
    """Bytes of the checkpoints that a stage leaves: its first and its last two."""
    return 3 * plan.checkpoint_bytes(config, muon, WEIGHTS)


# ---- the devices ---------------------------------------------------------------------------------


def speeds_of_the_device():
    """-> (Speeds, lines that say where they are from)."""
    if gpu == "cpu":
        _, flop_rate, bandwidth = this_machine()
        source = "measured now"
    else:
        _, flop_rate, bandwidth = plan.CARDS[gpu]
        source = "its data sheet"
    speeds = plan.assumed_speeds(flop_rate, bandwidth)
    rates = f"{flop_rate / 1e12:,.4g} TFLOP/s, {bandwidth / 1e12:.3g} TB/s"
    lines = [f"{gpu}: {rates} ({source})"]
    if like:
        speeds, found = plan.measured_speeds(speeds, os.path.expanduser(like))
        shown = []
        for name, rate in found.items():
            unit = "B/s" if name == "decode" else "FLOP/s"
            shown.append(f"{name} {rate:.3g} {unit}")
        lines.append(f"measured in {like}, a device: {', '.join(shown)}")
    if speeds.how:
        lines.append(f"assumed, not measured: {', '.join(speeds.how.values())}")
    return speeds, lines


def this_machine():
    device = torch.device("cpu")
    _, dtype = dist.dtypes("auto", device)
    return dist.free_memory(device), *device_rates(device, dtype)


def memory_of_the_device():
    return dist.free_memory(torch.device("cpu")) if gpu == "cpu" else plan.CARDS[gpu][0]


# ---- in words ------------------------------------------------------------------------------------


def table(stages):
    """-> a line a stage, and one for all of them."""
    everything = dict(name="in all", tokens=None)
    for name in ("flops", "seconds", "disk"):
        everything[name] = sum(stage[name] for stage in stages)
    heads = ["stage", "tokens", "FLOPs", "time", "GPU hours"]
    heads += ["dollars"] * bool(dollars_per_gpu_hour) + ["on disk", "GB a GPU"]
    rows = [heads] + [cells(stage) for stage in [*stages, everything]]

    widths = [max(len(row[i]) for row in rows) for i in range(len(heads))]
    lines = []
    for name, *others in rows:
        line = name.ljust(widths[0])
        for cell, width in zip(others, widths[1:]):
            line += "  " + cell.rjust(width)
        lines.append(line)
    return lines


def cells(stage):
    gpu_hours = gpus * stage["seconds"] / 3600
    shown = [stage["name"]]
    shown.append("" if stage["tokens"] is None else f"{stage['tokens'] / 1e6:,.1f} M")
    shown.append(f"{stage['flops']:.2e}" if stage["flops"] else "")
    shown.append(duration(stage["seconds"]))
    shown.append(f"{gpu_hours:,.1f}")
    if dollars_per_gpu_hour:
        shown.append(f"{gpu_hours * dollars_per_gpu_hour:,.0f}")
    shown.append(size(stage["disk"]) if stage["disk"] else "")
    shown.append(memory.gigabytes(sum(stage["memory"].values())) if "memory" in stage else "")
    return shown


def in_short(stages):
    """-> lines about memory and money."""
    largest = max((s for s in stages if "memory" in s), key=lambda s: sum(s["memory"].values()))
    parts = largest["memory"]
    needed, there = sum(parts.values()), memory_of_the_device()
    named = ", ".join(f"{name} {memory.gigabytes(n)}" for name, n in parts.items())
    lines = [
        f"memory: {largest['name']} needs the most, {memory.gigabytes(needed)} GB of "
        f"{memory.gigabytes(there)}: {named} ({device_tokens:,} tokens at once)"
    ]
    if needed > there:
        lines.append(
            f"WARNING: that does not fit {gpu}: lower --device_tokens, or --recompute, or --depth"
        )
    if dollars_per_gpu_hour:
        lines.append(
            f"cost: at {dollars_per_gpu_hour:g} dollars a GPU and hour, as --dollars_per_gpu_hour "
            "says, also while the text is made: make it before, on a machine without GPUs"
        )
    return lines


def check_settings(settings):
    """Refuse what cannot be, with the value and the remedy."""
    one_of(settings, "gpu", (*plan.CARDS, "cpu"))
    at_least(
        settings,
        1,
        "depth vocab_size gpus cores device_tokens batch_tokens seq_len conversations "
        "conversation_tokens problems prompts_per_step samples_per_prompt prompt_tokens "
        "answer_tokens max_new_tokens eval_every eval_problems test_problems",
    )
    at_least(settings, 0, "dollars_per_gpu_hour passes tokens_per_parameter")
    if answer_tokens > max_new_tokens:
        raise SystemExit(
            f"--answer_tokens={answer_tokens}: at most --max_new_tokens={max_new_tokens}"
        )


if __name__ == "__main__":
    dist.run(main)
