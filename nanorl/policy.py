"""The model that learns, what of it is trained, and what a KL term measures it against."""
from contextlib import nullcontext
from functools import partial

from nanorl.hf import load_model
from nanorl.lora import adapted_model
from nanorl.runtime import checkpoint


def load(here, s, weight_dtype, compute_dtype, place):
    """here: the run, s: its settings -> policy, adapters or None, and a context that gives the reference, or None:
    without a KL term it does not exist in memory."""
    origin = here.origin
    if s["kl_coef"] or s["lora_rank"]:
        checkpoint.must_be(origin)
    adapters = None
    if s["lora_rank"]:
        policy, adapters = adapted_model(origin["path"], compute_dtype, place, s["lora_rank"], s["lora_alpha"],
                                         s["lora_targets"].split(","), s["seed"])
    else:
        policy = load_model(here.model, weight_dtype, place)  # fp32 master weights
    policy.compute_dtype, policy.recompute = compute_dtype, s["recompute"]
    if not s["kl_coef"]:
        return policy, adapters, None
    if adapters:
        return policy, adapters, partial(adapters.base, policy)  # the policy without its adapters
    frozen = load_model(origin["path"], compute_dtype, place).requires_grad_(False)
    frozen.compute_dtype = compute_dtype
    return policy, adapters, partial(nullcontext, frozen)
