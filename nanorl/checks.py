"""What train_rl.py cannot do, refused before anything starts, with the value and the remedy."""
import math

import torch

from nanorl import grpo
from nanorl.runtime.config import at_least

POSITIVE = "prompts_per_step max_new_tokens steps updates_per_rollout device_tokens eval_problems probe_prompts max_bad_steps"
NOT_NEGATIVE = ("seed problems device_rows resample lora_rank lora_alpha kl_coef clip_low clip_high lr warmup weight_decay "
                "max_grad_norm eval_every save_every")
CHOICES = {"overlong": ("zero", "mask"), "kl_estimator": grpo.ESTIMATORS, "lr_schedule": ("constant", "linear", "cosine")}


def rl(s):
    """s: the resolved settings."""
    at_least(s, 1, POSITIVE)
    at_least(s, 0, NOT_NEGATIVE)
    G, rows, temperature = s["samples_per_prompt"], s["device_rows"], s["temperature"]
    if G < 2:
        raise ValueError(f"--samples_per_prompt={G}: at least 2, because rewards are compared within a group")
    if 0 < rows < G:
        raise ValueError(f"--device_rows={rows}: it must hold one group, --samples_per_prompt={G}")
    if not 0 < temperature < math.inf:
        raise ValueError(f"--temperature={temperature}: it must be above 0, because training needs samples that differ")
    for name, choices in CHOICES.items():
        if s[name] not in choices:
            raise ValueError(f"--{name}={s[name]}: it must be one of {', '.join(choices)}")
    if s["clip_low"] > 1:
        raise ValueError(f"--clip_low={s['clip_low']}: it must be at most 1, since the ratio is never below 0")
    grpo.advantages(torch.zeros(1, 2), s["advantage"])  # raises for an unknown name,
    grpo.token_weights(torch.ones(1, 1), s["loss_norm"])  # and so does this
