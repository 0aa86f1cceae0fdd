"""What the devices have room for at nearly the same cost: rows of a decode step, tokens of a pass.

One command is one algorithm on any number of GPUs, so --prompts_per_step and --batch_tokens stay
what they are, and over many GPUs each has little to do. These lines say so before a run, and which
values would use the GPUs. They are for GPUs: a CPU is busy with a few rows.
"""

from nanorl.report.cost import cache_numbers, forward_flops
from nanorl.runtime import dist

# Base and SFT: tokens of a GPU's forward and backward in a step with which their products take most
# of its time. AdamW moves 28 bytes a weight, and the all-reduce 4 at some 200 GB/s over NVLink.
# Reckoned for an H100 (700 TFLOP/s, 2.8 TB/s) that is as long as the products of 3,500 tokens, 6
# FLOPs a weight and token.
FULL_PASS = 8192


def on_a_gpu(device):
    return device.type == "cuda"


# ---- RL: rows of a decode step -------------------------------------------------------------------


def rows_at_twice(config, itemsize, cached, flop_rate, copy_rate):
    """How many rows a decode step serves in at most twice the time that one row takes.

    A step reads the weights once for all rows, and multiplies by them meanwhile. Then it reads each
    row's cache. So it takes at most twice as long as reading the weights does, as long as the
    caches are no more bytes than they are, and the products take no longer than reading them. The
    start of kernels is not counted: for a small model it is most of the time, and more rows fit.

    cached: tokens of cache that a row adds, on average. The rates are rates.device_rates.
    """
    _, weights = config.n_params()
    seconds = itemsize * weights / copy_rate
    seconds_of_cache = itemsize * cache_numbers(config, cached) / copy_rate
    seconds_of_products = forward_flops(config, 1, 0, 1) / flop_rate
    return int(seconds / max(seconds_of_cache, seconds_of_products))


def decode_lines(rollouts, engine, policy, settings, flop_rate, copy_rate):
    """-> a line where this rank's rows are under half of what a decode step serves, else none.

    rollouts: a few, for the lengths to come.
    """
    if not on_a_gpu(policy.device) or not rollouts:
        return []
    P, G, ranks = settings["prompts_per_step"], settings["samples_per_prompt"], dist.world_size()
    rows = -(-P // ranks) * G

    # The rows of a prompt share its cache. A row's own is half full on average.
    prompt = sum(len(rollout.prompt_ids) for rollout in rollouts) / len(rollouts)
    lengths = [len(completion.ids) for rollout in rollouts for completion in rollout.completions]
    own = sum(lengths) / len(lengths) / 2
    config, itemsize = policy.model.config, policy.model.compute_dtype.itemsize
    served = rows_at_twice(config, itemsize, prompt / G + own, flop_rate, copy_rate)
    served = min(served, engine.max_rows or served)
    if 2 * rows >= served:
        return []
    more = power_of_two(served // G * ranks)
    return [
        f"decode: {rows:,} rows a GPU, and a step of {served:,} would take less than twice as "
        f"long: --prompts_per_step={more} would use them, as another algorithm (larger batches)"
    ]


def power_of_two(n):
    """The largest that is not above n."""
    return 1 << (n.bit_length() - 1)


# ---- base and SFT: tokens of a pass --------------------------------------------------------------


def say_tokens(device, settings):
    """A line where a rank's tokens of a step are under half of FULL_PASS or --device_tokens."""
    ranks = dist.world_size()
    tokens = settings["batch_tokens"] // ranks
    full = min(FULL_PASS, settings["device_tokens"])
    if not on_a_gpu(device) or 2 * tokens >= full:
        return
    more = full // settings["seq_len"] * settings["seq_len"] * ranks
    dist.say(
        f"      {tokens:,} tokens a GPU and step; with {full:,} the optimizer and the all-reduce "
        f"would take less of the time: --batch_tokens={more} gives each so many, as another "
        "algorithm (larger batches)"
    )
