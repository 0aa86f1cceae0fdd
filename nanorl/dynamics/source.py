"""A checkpoint of an RL run, in any precision, and completions of its model.

In another precision than the run's, weights and moments are cast. The engine that samples, the
tasks and the problems of a step are the run's own.
"""

from dataclasses import dataclass

import numpy as np
import torch

from nanorl import rollout
from nanorl.dynamics.measured import Measured, sequences_of
from nanorl.engine import Engine
from nanorl.hf import load_model
from nanorl.lora import adapted_model
from nanorl.optim import load_states, lr_scale, make_optimizers
from nanorl.problems import Problems
from nanorl.runtime import checkpoint
from nanorl.tokenizer import Tokenizer


@dataclass
class Source:
    """What is measured.

    named: {name: parameter} of what is trained. optimizers: with the checkpoint's moments.
    settings: the run's constants. step: steps that are done. scale: of the next step's rate.
    """

    path: str
    measured: Measured
    named: dict
    optimizers: list
    settings: dict
    step: int
    scale: float
    tokenizer: Tokenizer
    problems: Problems

    @property
    def lr(self):
        """Of the next step."""
        return self.optimizers[0].param_groups[0]["initial_lr"] * self.scale

    # ---- completions ----

    def sample(self, theta, name, split, asked, samples):
        """Problems of a split, (number, problem) pairs -> Rollouts of the model at theta.

        name: of the random numbers. The same name gives the same ones at any theta.
        """
        task = self.problems.val
        if split == "train":
            task = self.problems.task_of(self.step)
        settings = {**self.settings, "samples_per_prompt": samples}
        engine = Engine(self.measured.at(theta))
        return rollout.sample(engine, self.tokenizer, task, name, asked, settings)

    def drawn(self, name, split, count):
        """`count` problems of a split, with replacement -> (number, problem) pairs."""
        task = self.problems.val
        n = len(task)
        if split == "train":
            task = self.problems.task_of(self.step)
            n = self.problems.limit or len(task)
        seed = rollout.prompt_key(self.settings["seed"], name, split)
        indices = np.random.default_rng(seed).integers(n, size=count)
        return [(number, task.problem(int(index))) for number, index in enumerate(indices)]

    def groups(self, name, count):
        """Groups of G completions of training problems drawn with replacement -> Rollouts."""
        asked = self.drawn(name, "train", count)
        samples = self.settings["samples_per_prompt"]
        return self.sample(self.measured.theta, name, "train", asked, samples)

    def held_out(self, name, count, theta=None):
        """Completions of held-out problems, one each -> Sequences. theta: by default as it is."""
        asked = self.drawn(name, "val", count)
        theta = self.measured.theta if theta is None else theta
        return sequences_of(self.sample(theta, name, "val", asked, 1))

    def next_batch(self, count):
        """The first `count` groups that the run's next step would learn from -> Rollouts."""
        asked = self.problems.take(self.step, count)
        samples = self.settings["samples_per_prompt"]
        return self.sample(self.measured.theta, self.step, "train", asked, samples)


def load(path, dtype=torch.float64):
    """A checkpoint's directory -> Source, on the CPU.

    Raises ValueError where there is none, or one of another stage.
    """
    path = checkpoint.resolve(path)
    if not checkpoint.is_model(path):
        raise ValueError(f"no checkpoint in {path}: name one of RL (--keep=all keeps all of a run)")
    state = checkpoint.load_state(path)
    settings = {**checkpoint.ADDED, **state["settings"]}
    if "samples_per_prompt" not in settings:
        raise ValueError(
            f"{path} is a checkpoint of another stage: the dynamics are those of RL, so name one "
            "that train_rl.py has saved"
        )
    adapters = None
    if settings["lora_rank"]:
        checkpoint.must_be(state["start"])
        targets = settings["lora_targets"].split(",")
        lora = settings["lora_rank"], settings["lora_alpha"], targets, settings["seed"]
        model, adapters = adapted_model(state["start"]["path"], dtype, "cpu", *lora)
        adapters.load_state_dict(state["lora"])
    else:
        model = load_model(path, dtype, "cpu")
    model.compute_dtype = dtype

    trained = adapters or model
    betas = settings["beta1"], settings["beta2"]
    rule = dict(muon=False, rule=settings["optimizer"], betas=betas)
    optimizers = make_optimizers(trained, 1.0, 1.0, settings["weight_decay"], **rule)
    load_states(optimizers, state["optimizers"])  # with the rates, and cast to `dtype`

    tokenizer = Tokenizer.from_pretrained(path)
    longest = model.config.context - settings["max_new_tokens"]
    which = settings["task"], settings["task_args"], settings["seed"], settings["problems"]
    return Source(
        path=path,
        measured=Measured(model, adapters, settings["temperature"]),
        named=dict(trained.named_parameters()),
        optimizers=optimizers,
        settings=settings,
        step=state["step"],
        scale=next_scale(state["step"], settings),
        tokenizer=tokenizer,
        problems=Problems(*which, state["drawn"], tokenizer, longest),
    )


def next_scale(step, settings):
    """Of the next step's rate, as train_rl.py has it; after the last step, of that one's."""
    steps, warmup, shape = settings["steps"], settings["warmup"], settings["lr_schedule"]
    cooldown = 0.0 if shape == "constant" else 1 - warmup / steps
    return lr_scale(min(step, steps - 1), steps, warmup, cooldown, shape)
