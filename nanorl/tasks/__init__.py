"""Tasks: problem -> prompt, (problem, completion text) -> reward. A task is a small class:

    class Capitals:
        def __init__(self, split="train", **settings): ...
        def __len__(self): ...                                # problems in this split
        def problem(self, index): ...                         # -> Problem(prompt, answer, meta), always the same
        def solution(self, problem): ...                      # -> str, a worked answer for SFT (optional)
        def reward(self, problem, completion): ...            # -> Reward(total, parts)
        def document(self, index): ...                        # -> str, a text for pretraining (optional)

    python train_rl.py --task=capitals.py:Capitals
"""
import importlib.util
import os
import sys
from functools import partial

from nanorl.tasks.arithmetic import PRESETS, Arithmetic
from nanorl.tasks.gsm8k import GSM8K
from nanorl.tasks.problem import Problem, Reward

TASKS = {"arithmetic": Arithmetic, "gsm8k": GSM8K, **{name: partial(Arithmetic, preset=name) for name in PRESETS}}


def get_task(name, split="train", **settings):
    """A task by name, or a user's own by path.py:Class. Raises ValueError for what is not there or does not fit."""
    if ":" in name:
        make = _load_class(name)
    elif name in TASKS:
        make = TASKS[name]
    else:
        raise ValueError(f"no task {name!r}: there are {', '.join(sorted(TASKS))}, and path.py:Class for your own")
    try:
        task = make(split=split, **settings)
    except TypeError as error:
        raise ValueError(f"task {name}: {error}") from None
    missing = [method for method in ("__len__", "problem", "reward") if not hasattr(task, method)]
    if missing:
        raise ValueError(f"task {name} has no {', '.join(missing)}: nanorl/tasks/__init__.py shows what a task needs")
    return task


def parse_settings(text):
    """'demonstrations=worked; instruction=Be brief' -> {'demonstrations': 'worked', 'instruction': 'Be brief'}."""
    settings = {}
    for item in filter(None, (part.strip() for part in text.split(";"))):
        key, equals, value = item.partition("=")
        if not equals:
            raise ValueError(f"task setting {item!r} has no '=': write --task_args='name=value; name=value'")
        settings[key.strip()] = value.strip()
    return settings


def _load_class(name):
    path, _, class_name = name.rpartition(":")
    if not os.path.isfile(path) or not path.endswith(".py"):
        raise ValueError(f"task file {path!r} does not exist" if path.endswith(".py") else f"task file {path!r} is not a .py file")
    spec = importlib.util.spec_from_file_location("task_" + os.path.basename(path)[:-3], path)
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)  # known by name, as dataclasses need
    spec.loader.exec_module(module)
    if not hasattr(module, class_name):
        raise ValueError(f"{path} has no class {class_name!r}")
    return getattr(module, class_name)
