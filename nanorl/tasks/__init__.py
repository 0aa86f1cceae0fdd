"""Tasks: what is asked, and what an answer earns.

A task is a small class. This one is complete:

    # capitals.py
    from nanorl.tasks import Problem, Reward

    PAIRS = {
        "train": [("France", "Paris"), ("Japan", "Tokyo"), ("Kenya", "Nairobi")],
        "val": [("Peru", "Lima"), ("Norway", "Oslo")],
        "test": [("Cuba", "Havana")],
    }

    class Capitals:
        def __init__(self, split="train"):
            self.pairs = PAIRS[split]

        def __len__(self):
            return len(self.pairs)  # problems in this split

        def problem(self, index):
            country, capital = self.pairs[index]  # an index gives the same problem every time
            question = f"What is the capital of {country}?"
            return Problem([{"role": "user", "content": question}], answer=capital)

        def reward(self, problem, completion):
            correct = float(completion.strip(" .") == problem.answer)
            return Reward(correct, {"correct": correct})  # the total, and named parts for the log

    python train_rl.py --task=capitals.py:Capitals

Problem and Reward are in problem.py. What else a task may have:

    def __init__(self, split="train", continent="all"):  # --task_args='continent=Asia': a string
    def solution(self, problem):  # -> str, a worked answer, for SFT
    def document(self, index):  # -> str, a text for pretraining
    timeout = 5.0  # rewards run in worker processes, and each may take so many seconds (pool.py)
    marker = "#"  # stands before an answer; --task_args='template=r1' needs it (templates.py)
    answer_words = "yes|no"  # for templates: a regular expression, where answers are no numbers
"""

import difflib
import importlib.util
import os
import sys
from functools import partial

from nanorl.tasks.arithmetic import PRESETS, Arithmetic
from nanorl.tasks.binary import Binary
from nanorl.tasks.choice import SOURCES, Cloze, MultipleChoice
from nanorl.tasks.comparison import Comparison
from nanorl.tasks.countdown import Countdown
from nanorl.tasks.counting import Counting
from nanorl.tasks.few_shot import FewShot
from nanorl.tasks.gsm8k import GSM8K
from nanorl.tasks.humaneval import HumanEval
from nanorl.tasks.mixture import Mixture
from nanorl.tasks.problem import Problem, Reward, is_correct
from nanorl.tasks.settings import (
    is_mixture,
    parse_curriculum,
    parse_mixture,
    parse_settings,
    parse_weights,
    settings_by_task,
)
from nanorl.tasks.spelling import Spelling
from nanorl.tasks.templates import Templated

__all__ = [
    "TASKS",
    "FewShot",
    "Problem",
    "Reward",
    "get_stages",
    "get_task",
    "is_correct",
    "parse_settings",
    "parse_weights",
]

# Multiple choice that a base model is asked in plain text too.
IN_TEXT = ("arc_easy", "arc_challenge", "mmlu")
# name -> what makes the task.
TASKS = {
    "arithmetic": Arithmetic,
    **{name: partial(Arithmetic, preset=name) for name in PRESETS},
    "counting": Counting,
    "comparison": Comparison,
    "binary": Binary,
    "spelling": Spelling,
    "countdown": Countdown,
    "gsm8k": GSM8K,
    "humaneval": HumanEval,
    **{name: partial(MultipleChoice, name) for name in SOURCES},
    **{f"{name}:text": partial(Cloze, name) for name in IN_TEXT},
}


def get_task(name, split="train", **settings):
    """A task by its name, a user's own by path.py:Class, or a mixture, 'sum3=50,counting=50'.

    In a mixture a setting goes to every task, or to one when it is written name.setting. Raises
    ValueError for what is not there or does not fit.
    """
    if is_mixture(name):
        task = make_mixture(name, split, settings)
    else:
        task = make_task(name, split, settings)
    task._recipe = (name, split, settings)  # from which a worker process makes the same task
    return task


def get_stages(text, split="train", **settings):
    """A task's name, or a curriculum '0-20 until 20; 2-digit until 50; sum3'.

    -> [(first step, task)]. Raises ValueError for what is not there or does not fit.
    """
    return [(first, get_task(name, split, **settings)) for first, name in parse_curriculum(text)]


def make_mixture(text, split, settings):
    """'sum3=50,counting=50' -> a Mixture."""
    weights = parse_mixture(text)
    own_settings = settings_by_task(text, list(weights), settings)
    tasks = {name: get_task(name, split, **own_settings[name]) for name in weights}
    return Mixture(tasks, weights, split)


def make_task(name, split, settings):
    """One task, checked. Raises ValueError for what is not there or does not fit."""
    if name in TASKS:
        make = TASKS[name]
    elif ":" in name:
        make = load_class(name)
    else:
        near = difflib.get_close_matches(name, TASKS, n=1)
        guess = f"did you mean {near[0]}? " if near else ""
        raise ValueError(
            f"no task {name!r}: {guess}there are {', '.join(TASKS)}, and path.py:Class for your own"
        )

    # `template` and what belongs to it are not the task's settings, but those of Templated.
    own_settings, template_settings = dict(settings), {}
    if "template" in settings:
        for key in ("template", "format_weight"):
            if key in settings:
                template_settings[key] = own_settings.pop(key)

    try:
        task = make(split=split, **own_settings)
        if template_settings:
            if not hasattr(task, "marker"):
                raise ValueError(
                    f"task {name} has no `marker` before its answers, "
                    f"so template={settings['template']} does not know where they are"
                )
            task = Templated(task, **template_settings)
    except TypeError as error:
        # A setting that the task's __init__ does not take, above all.
        raise ValueError(f"task {name}: {error}") from None
    check_task(task, name, split)
    return task


def check_task(task, name, split):
    """Raise ValueError where a task lacks a method, has no problems, or gives what is none."""
    missing = [method for method in ("__len__", "problem", "reward") if not hasattr(task, method)]
    if missing:
        raise ValueError(
            f"task {name} has no {', '.join(missing)}: "
            "nanorl/tasks/__init__.py shows what a task needs"
        )
    if len(task) < 1:
        raise ValueError(f"task {name}, split {split}: there are no problems in it")
    first = task.problem(0)
    if not isinstance(first, Problem):
        raise ValueError(
            f"task {name}, split {split}: problem(0) gave {first!r}, not a nanorl.tasks.Problem"
        )


def load_class(name):
    """'path.py:Class' -> the class. Raises ValueError where there is none."""
    path, _, class_name = name.rpartition(":")
    path = os.path.expanduser(path)
    if not path.endswith(".py"):
        raise ValueError(f"task file {path!r} is not a .py file")
    if not os.path.isfile(path):
        raise ValueError(f"task file {path!r} does not exist")

    # The module is known by its name before it runs, as dataclasses need.
    module_name = "task_" + os.path.basename(path)[:-3]
    spec = importlib.util.spec_from_file_location(module_name, path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[module_name] = module
    spec.loader.exec_module(module)
    if not hasattr(module, class_name):
        raise ValueError(f"{path} has no class {class_name!r}")
    return getattr(module, class_name)
