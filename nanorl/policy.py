"""The model that learns, what of it is trained, and what a KL term measures it against."""

from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial

from nanorl.hf import load_model
from nanorl.lora import adapted_model


@dataclass
class Policy:
    """A model in training.

    model: the GPT whose tokens are sampled and whose log-probs are learnt from.
    adapters: LoRA's, which are trained in place of the weights, or None.
    reference: `with policy.reference() as model:` gives the model that a KL term measures from.
        None without a KL term: then that model is not in memory.
    """

    model: object
    adapters: object = None
    reference: object = None

    def __post_init__(self):
        self.params = [p for _, p in self.trained.named_parameters()]

    @property
    def trained(self):
        """Whatever has the named_parameters() that are trained."""
        return self.adapters or self.model

    @property
    def device(self):
        return self.model.cos.device

    def merge(self):
        """After an update: LoRA's adapters into the weights that everything multiplies by."""
        if self.adapters:
            self.adapters.merge()

    def adapter_state(self):
        """What a checkpoint holds of the adapters; None without them."""
        return self.adapters and self.adapters.state_dict()

    def load_adapters(self, state):
        if self.adapters:
            self.adapters.load_state_dict(state)


def load(run, settings, weight_dtype, compute_dtype, device):
    """-> the Policy of a run, from its last checkpoint or from where it starts.

    run.model is a directory of weights to begin with. run.origin names the weights that the run
    started from: LoRA's adapters are a change of those, and a KL term measures from them.
    """
    start = run.origin["path"]
    adapters, reference = None, None
    if settings["lora_rank"]:
        targets = settings["lora_targets"].split(",")
        lora = (settings["lora_rank"], settings["lora_alpha"], targets, settings["seed"])
        model, adapters = adapted_model(start, compute_dtype, device, *lora)
    else:
        model = load_model(run.model, weight_dtype, device)
    model.compute_dtype = compute_dtype
    model.recompute, model.compiled = settings["recompute"], settings["compile"]

    if settings.get("kl_coef") and adapters:
        # The policy without its adapters: the weights are there anyway.
        reference = partial(adapters.base, model)
    elif settings.get("kl_coef"):
        frozen = load_model(start, compute_dtype, device).requires_grad_(False)
        frozen.compute_dtype, frozen.compiled = compute_dtype, settings["compile"]
        reference = partial(nullcontext, frozen)
    return Policy(model, adapters, reference)
