"""train_sft.py --match_flops: more SFT, in the place of an RL run and for as many FLOPs.

It starts from the model that RL started from, on the problems that RL had, and goes on with the
optimizer's constants, and with the data, of the SFT that made that model.
"""

import os
from dataclasses import dataclass

from nanorl.runtime import checkpoint

# Constants of the SFT before, which goes on as it was.
OPTIMIZATION = (
    "batch_tokens",
    "seq_len",
    "optimizer",
    "matrix_lr",
    "other_lr",
    "warmup",
    "cooldown",
    "max_grad_norm",
)
RATES = ("optimizer", "matrix_lr", "other_lr")
OF_RL = ("run_name", "seed", "dtype", "lora_rank", "lora_alpha", "lora_targets")
# What makes the order of the data: with the same the cursor means the same.
DATA = ("task", "task_args", "examples", "data", "seq_len", "seed")


@dataclass
class Followed:
    """settings: train_sft.py's constants, set by the RL run. flops: what that run took in training.
    cursor: where in its data the SFT before it stopped; None: it had other data."""

    settings: dict
    flops: float
    cursor: dict


def follow(settings, given):
    """settings: train_sft.py's resolved constants. given: names of those that the user has set.

    What is given stays where it may differ, and is refused where it may not. -> Followed.
    """
    flag = f"--match_flops={settings['match_flops']}"
    rl = read_rl_run(settings["match_flops"], flag)
    theirs, before = rl["settings"], rl["start"]["path"]
    checkpoint.must_be(rl["start"])
    sft = {"settings": {}}
    if os.path.exists(os.path.join(before, "trainer.pt")):
        sft = checkpoint.load_state(before, mmap=True)

    # Fixed by the comparison.
    fixed = dict(model=before, data="", task=theirs["task"], task_args=theirs["task_args"])
    fixed.update(examples=theirs["problems"], steps=0)
    others = sorted(name for name in fixed if name in given and settings[name] != fixed[name])
    if others:
        said = " ".join(f"--{name}={settings[name]}" for name in others)
        problems = fixed["examples"] or "training"
        raise ValueError(
            f"{said} with {flag}: it goes on from that run's start, on its {problems} problems of "
            f"{fixed['task']}, for its FLOPs; leave these out"
        )

    # As RL and the SFT before it had it, unless the user says otherwise.
    usual = {name: theirs[name] for name in OF_RL if name in theirs}
    usual["stage"] = "sft_more"
    usual.setdefault("run_name", theirs.get("run"))  # of runs before this constant had its name
    if "examples" in sft["settings"]:
        # Under LoRA, or no longer under it, other rates are right.
        same_kind = sft["settings"].get("lora_rank", 0) == usual["lora_rank"]
        for name in OPTIMIZATION:
            if name in sft["settings"] and (same_kind or name not in RATES):
                usual[name] = sft["settings"][name]
    usual = {name: value for name, value in usual.items() if name not in given}

    path = os.path.normpath(settings["match_flops"])
    settings = {**settings, **usual, **fixed, "match_flops": path}
    same_data = all(sft["settings"].get(name) == settings[name] for name in DATA)
    return Followed(settings, rl["flops"]["train"], sft["data"] if same_data else None)


def read_rl_run(name, flag):
    """The state of an RL run's last checkpoint. Raises ValueError for what cannot be followed."""
    path = checkpoint.resolve(name)
    if not checkpoint.is_model(path):
        raise ValueError(f"{flag}: no checkpoint there; name an RL run's folder, such as out/d4/rl")
    rl = checkpoint.load_state(path)
    settings = rl["settings"]
    if "samples_per_prompt" not in settings:
        raise ValueError(f"{flag}: {path} is no checkpoint of RL")
    if rl["step"] < settings["steps"]:
        raise ValueError(
            f"{flag}: that run is at step {rl['step']} of {settings['steps']}: let it end first"
        )
    if ";" in settings["task"]:
        raise ValueError(
            f"{flag}: its task is a curriculum, {settings['task']}, which SFT has none of"
        )
    return rl
