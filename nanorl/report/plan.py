"""What the stages of a depth will cost, before any of them has run: FLOPs, memory, disk, seconds.

FLOPs and bytes follow from shapes (cost.py), seconds from them and from what a device reaches. That
is measured, or a share of what its data sheet says, which is assumed and named. FLOPs are those
that are needed, as in the metric mfu: of attention the pairs that see each other, no padding. The
optimizer's are not counted.
"""

import json
import math
import os
import statistics
from dataclasses import dataclass, replace

from nanorl.report import memory
from nanorl.report.cost import cache_numbers, forward_flops

# Base: as many tokens for a model of so many parameters (Hoffmann et al. 2022).
TOKENS_A_PARAMETER = 20

# name: (bytes of memory, FLOP/s of dense bf16 products, bytes/s of its memory), by NVIDIA's data
# sheets; of the SXM form where there are several.
CARDS = {
    "h100": (80e9, 989e12, 3.35e12),
    "h200": (141e9, 989e12, 4.8e12),
    "a100": (80e9, 312e12, 2.04e12),
    "a100-40gb": (40e9, 312e12, 1.56e12),
    "b200": (180e9, 2250e12, 8.0e12),
    "l40s": (48e9, 362e12, 0.864e12),
    "rtx4090": (24e9, 165e12, 1.01e12),
}

# What a device is assumed to reach of that. No GPU has been measured.
BASE_MFU, SFT_MFU, LEARNER_MFU = 0.40, 0.30, 0.30
DECODE_MBU = 0.30  # of the bandwidth, over a whole rollout: prefill, sampling, rewards

# docs/scaling.md, measured on English text with a vocabulary of 32,768: bytes a token, and tokens
# of token files a second, on a core and at most.
BYTES_A_TOKEN = 4.27
TOKENIZED_A_CORE, TOKENIZED_AT_MOST = 2.3e6, 8e6


# ---- how much ------------------------------------------------------------------------------------


def base_steps(config, batch_tokens, tokens_a_parameter=TOKENS_A_PARAMETER):
    """Optimizer steps of base."""
    return math.ceil(tokens_a_parameter * config.n_params()[0] / batch_tokens)


def text_flops(config, tokens, seq_len):
    """To learn from so many tokens, in rows of seq_len: a forward and twice that backward."""
    return 3 * forward_flops(config, tokens, tokens * (seq_len + 1) // 2, tokens)


@dataclass
class Rollouts:
    """The sampling of a step of RL, or of an evaluation.

    problems x samples, prompts of `prompt` tokens, answers of `answer` on average and `most` at
    most. Some answer is taken to be that long, and the step to wait for it.
    """

    problems: int
    samples: int
    prompt: int
    answer: int
    most: int

    def rows(self):
        return self.problems * self.samples

    def tokens(self):
        """Sampled."""
        return self.rows() * self.answer

    def flops(self, config):
        """Of a forward pass over all of it, each prompt once: to sample it, or to score it."""
        prompts = self.problems * self.prompt
        pairs = prompts * (self.prompt + 1) // 2
        pairs += self.tokens() * self.prompt + self.tokens() * (self.answer + 1) // 2
        return forward_flops(config, prompts + self.tokens(), pairs, self.tokens())

    def share(self, devices):
        """What the device with the most of it has."""
        problems = math.ceil(self.problems / devices)
        return Rollouts(problems, self.samples, self.prompt, self.answer, self.most)

    def bytes_read(self, config, itemsize):
        """By its decode steps on one device, as cost.bytes_decoded counts them."""
        _, weights = config.n_params()
        cached = self.problems * self.prompt * self.most
        cached += self.tokens() * (self.answer + 1) // 2
        return itemsize * (self.most * weights + cache_numbers(config, cached))

    def cache_bytes(self, config, itemsize):
        sizes = self.problems, self.prompt, self.rows(), self.most
        return memory.cache_bytes(config, itemsize, *sizes)


# ---- bytes ---------------------------------------------------------------------------------------


def optimizer_numbers(config, muon):
    """AdamW keeps two moments of a weight, Muon one of the blocks' matrices."""
    total, multiplied = config.n_params()
    matrices = multiplied - config.vocab_size * config.n_embd
    return 2 * total - (matrices if muon else 0)


def checkpoint_bytes(config, muon, itemsize=4):
    """On disk: the weights and what the optimizer keeps."""
    return itemsize * (config.n_params()[0] + optimizer_numbers(config, muon))


def saved_bytes(policy, muon):
    """checkpoint_bytes of a policy.Policy, which may train LoRA's adapters in the weights' place.

    Adapters come to the weights, which they are merged into.
    """
    config, weight = policy.model.config, next(policy.model.parameters())
    if not policy.adapters:
        return checkpoint_bytes(config, muon, weight.element_size())
    adapters = memory.bytes_of(policy.params)
    return weight.element_size() * config.n_params()[0] + 3 * adapters


def token_file_bytes(n_tokens, vocabulary):
    return n_tokens * (2 if vocabulary <= 2**16 else 4)


def training_bytes(config, muon, ranks, activations, itemsize=4):
    """What a device holds at its peak -> {part: bytes}, in the order of memory.py."""
    weights = itemsize * config.n_params()[0]
    parts = dict(weights=weights, gradients=weights)
    parts["optimizer"] = itemsize * optimizer_numbers(config, muon)
    # The gradients of several ranks go into one row, after the activations are gone.
    row = weights if ranks > 1 else 0
    name = "all-reduce" if row > activations else "activations"
    parts[name] = max(row, activations)
    return parts


# ---- seconds -------------------------------------------------------------------------------------


@dataclass
class Speeds:
    """What one device reaches: FLOP/s of each stage, and bytes/s while it decodes.

    how: {stage: in words, where the number is from}.
    """

    base: float
    sft: float
    learner: float
    decode: float
    how: dict


def assumed_speeds(flop_rate, bandwidth):
    """As shares of what a device can do at most."""
    how = dict(
        base=f"{BASE_MFU:.0%} MFU in base",
        sft=f"{SFT_MFU:.0%} MFU in SFT",
        learner=f"{LEARNER_MFU:.0%} MFU in RL's learner",
        decode=f"rollouts at {DECODE_MBU:.0%} of the memory's bandwidth",
    )
    rates = BASE_MFU * flop_rate, SFT_MFU * flop_rate, LEARNER_MFU * flop_rate
    return Speeds(*rates, DECODE_MBU * bandwidth, how)


def measured_speeds(speeds, run):
    """-> Speeds in which what a run's folder holds is as in that run, and {name: its number}.

    Raises ValueError where it holds no steps.
    """
    found = {}
    for stage in ("base", "sft"):
        card, rows = read_stage(os.path.join(run, stage))
        rows = [row for row in rows if "loss" in row]
        if rows:
            seconds = sum(row["time/step"] for row in rows)
            found[stage] = rows[-1]["flops_causal_total"] / seconds / card["world_size"]
    card, rows = read_stage(os.path.join(run, "rl"))
    rows = [row for row in rows if "mbu" in row]
    if rows:
        found["learner"] = card["flop_rate"] * statistics.median(row["mfu"] for row in rows)
        found["decode"] = card["copy_rate"] * statistics.median(row["mbu"] for row in rows)
    if not found:
        raise ValueError(
            f"--like={run}: no steps of base, sft or rl in it: name the folder of a run, out/d12"
        )
    how = {name: text for name, text in speeds.how.items() if name not in found}
    return replace(speeds, how=how, **found), found


def read_stage(directory):
    """-> (run.json, rows of metrics.jsonl), or ({}, []) where they are not there."""
    paths = [os.path.join(directory, name) for name in ("run.json", "metrics.jsonl")]
    if not all(os.path.exists(path) for path in paths):
        return {}, []
    with open(paths[0], encoding="utf-8") as f:
        card = json.load(f)
    with open(paths[1], encoding="utf-8") as f:
        return card, [json.loads(line) for line in f]


def rollout_seconds(rollouts, config, devices, speeds, itemsize=2):
    """Decoding waits for bytes, or where there are very many rows for products."""
    read = rollouts.share(devices).bytes_read(config, itemsize)
    return max(read / speeds.decode, rollouts.flops(config) / devices / speeds.learner)


def rl_step_seconds(rollouts, config, devices, speeds, itemsize=2):
    """-> (of the rollout, of the learner)."""
    learner = 3 * rollouts.flops(config) / devices / speeds.learner
    return rollout_seconds(rollouts, config, devices, speeds, itemsize), learner
