"""train_sft.py --match_flops: more SFT in place of an RL run, for as many FLOPs.

It starts from the model that RL started from, on the problems that RL had. The optimizer's
constants and the data are those of the SFT that made that model.
"""

import os
from dataclasses import dataclass

from nanorl.runtime import checkpoint

# Constants of the earlier SFT that the new one keeps.
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
# Those of them that depend on what is trained, the weights or LoRA's adapters.
RATES = ("optimizer", "matrix_lr", "other_lr")
# Constants of the RL run that the new SFT keeps.
OF_RL = ("run_name", "seed", "dtype", "lora_rank", "lora_alpha", "lora_targets")
# Constants that make the order of the data. Where they are the same, a cursor means the same.
DATA = ("task", "task_args", "examples", "data", "seq_len", "seed")


@dataclass
class Followed:
    """An RL run, as more SFT needs it."""

    settings: dict  # train_sft.py's constants, set by the RL run
    flops: float  # what the RL run took in training
    cursor: dict  # where in its data the earlier SFT stopped; None: it had other data


def follow(settings, given):
    """-> Followed, for the RL run that settings["match_flops"] names.

    settings: train_sft.py's resolved constants. given: names of those that the user has set. These
    stay where they may differ.

    Raises ValueError where they may not differ, and for a run that cannot be followed.
    """
    flag = f"--match_flops={settings['match_flops']}"
    rl = read_rl_run(settings["match_flops"], flag)
    start = rl["start"]["path"]
    checkpoint.must_be(rl["start"])
    sft = {"settings": {}}
    if os.path.exists(os.path.join(start, "trainer.pt")):
        sft = checkpoint.load_state(start, mmap=True)

    # What the comparison fixes: the start, the problems, and FLOPs in place of steps.
    fixed = dict(
        model=start,
        data="",
        task=rl["settings"]["task"],
        task_args=rl["settings"]["task_args"],
        examples=rl["settings"]["problems"],
        steps=0,
    )
    refuse_others(fixed, settings, given, flag)

    # What stays as the two runs had it, unless the user says otherwise.
    kept = kept_settings(rl["settings"], sft["settings"])
    kept["dtype"] = rl.get("dtype") or rl["settings"]["dtype"]  # what auto was on its machine
    kept = {name: value for name, value in kept.items() if name not in given}

    path = os.path.normpath(settings["match_flops"])
    settings = {**settings, **kept, **fixed, "match_flops": path}
    same_data = all(sft["settings"].get(name) == settings[name] for name in DATA)
    return Followed(settings, rl["flops"]["train"], sft["data"] if same_data else None)


def refuse_others(fixed, settings, given, flag):
    """Raise ValueError where the user has set a fixed constant to another value."""
    others = sorted(name for name in fixed if name in given and settings[name] != fixed[name])
    if others:
        said = " ".join(f"--{name}={settings[name]}" for name in others)
        problems = fixed["examples"] or "training"
        raise ValueError(
            f"{said} with {flag}: it goes on from that run's start, on its {problems} problems of "
            f"{fixed['task']}, for its FLOPs; leave these out"
        )


def kept_settings(rl, sft):
    """Constants of the RL run and of the SFT before it -> those that more SFT keeps.

    sft: empty where the RL run started from a model that no run here has made.
    """
    kept = {name: rl[name] for name in OF_RL if name in rl}
    kept["stage"] = "sft_more"
    kept.setdefault("run_name", rl.get("run"))  # of runs before this constant had its name
    if "examples" not in sft:
        return kept  # RL did not start from SFT

    # LoRA needs other rates than the weights do.
    same_kind = sft.get("lora_rank", 0) == kept.get("lora_rank", 0)
    for name in OPTIMIZATION:
        if name in sft and (same_kind or name not in RATES):
            kept[name] = sft[name]
    return kept


def read_rl_run(name, flag):
    """The state of an RL run's last checkpoint.

    name: the run's directory. flag: what the user wrote, for messages.

    Raises ValueError for what cannot be followed.
    """
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
        raise ValueError(f"{flag}: its task is a curriculum, {settings['task']}, and SFT has none")
    return rl
