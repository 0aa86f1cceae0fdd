"""Tasks: problem -> prompt, (problem, completion text) -> reward. A task is a small class:

class Capitals:
    def __init__(self, split="train", **settings): ...
    def __len__(self): ...                                # problems in this split
    def problem(self, index): ...                         # -> Problem(prompt, answer, meta), always the same
    def solution(self, problem): ...                      # -> str, a worked answer for SFT (optional)
    def reward(self, problem, completion): ...            # -> Reward(total, parts)
    def document(self, index): ...                        # -> str, a text for pretraining (optional)
    timeout = 5.0                                         # rewards in worker processes, so many seconds each (optional)
    marker = "#"                                          # what stands before an answer, for other templates (optional;
    answer_words = "yes|no"                               # and for answers that are no numbers)

python train_rl.py --task=capitals.py:Capitals
"""

import difflib
import importlib.util
import math
import os
import re
import sys
from dataclasses import replace
from functools import partial
from itertools import islice

from nanorl.tasks.arithmetic import PRESETS, Arithmetic
from nanorl.tasks.binary import Binary
from nanorl.tasks.choice import SOURCES, MultipleChoice
from nanorl.tasks.comparison import Comparison
from nanorl.tasks.countdown import Countdown
from nanorl.tasks.counting import Counting
from nanorl.tasks.gsm8k import GSM8K
from nanorl.tasks.humaneval import HumanEval
from nanorl.tasks.mixture import Mixture
from nanorl.tasks.problem import Problem, Reward, is_correct
from nanorl.tasks.spelling import Spelling
from nanorl.tasks.templates import Templated

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
}


def get_task(name, split="train", **settings):
    """A task by name, a user's own by path.py:Class, or a mixture, 'sum3=50,counting=50'. In a mixture a setting goes to
    every task, or to one when it is written name.setting. Raises ValueError for what is not there or does not fit."""
    task = (
        _mixture(name, split, settings)
        if "," in name or re.search(r"=\d+$", name)
        else _single(name, split, settings)
    )
    task._recipe = (name, split, settings)  # from which a worker process makes the same task
    return task


def _single(name, split, settings):
    if ":" in name:
        make = _load_class(name)
    elif name in TASKS:
        make = TASKS[name]
    else:
        near = difflib.get_close_matches(name, TASKS, n=1)
        raise ValueError(
            f"no task {name!r}: {f'did you mean {near[0]}? ' if near else ''}there are {', '.join(TASKS)}, and path.py:Class for your own"
        )
    try:
        template = (
            {key: settings[key] for key in ("template", "format_weight") if key in settings}
            if "template" in settings
            else {}
        )
        task = make(
            split=split, **{key: value for key, value in settings.items() if key not in template}
        )
        if template:
            if not hasattr(task, "marker"):
                raise ValueError(
                    f"task {name} has no `marker` before its answers, so template={template['template']} does not know where they are"
                )
            task = Templated(task, **template)
    except TypeError as error:
        raise ValueError(f"task {name}: {error}") from None
    missing = [method for method in ("__len__", "problem", "reward") if not hasattr(task, method)]
    if missing:
        raise ValueError(
            f"task {name} has no {', '.join(missing)}: nanorl/tasks/__init__.py shows what a task needs"
        )
    if len(task) < 1 or not isinstance(task.problem(0), Problem):
        raise ValueError(
            f"task {name}, split {split}: "
            + (
                "there are no problems in it"
                if len(task) < 1
                else f"problem(0) gave {task.problem(0)!r}, not a nanorl.tasks.Problem"
            )
        )
    return task


def _mixture(text, split, settings):
    weights = {}
    for item in text.split(","):
        name, _, weight = (part.strip() for part in item.rpartition("="))
        if not name or not weight.isdecimal() or int(weight) < 1 or name in weights:
            raise ValueError(
                f"mixture {text!r}: {item.strip()!r} must be a task and its weight, each task once, as in sum3=50,counting=50"
            )
        weights[name] = int(weight)
    own = {name: {} for name in weights}
    for key, value in settings.items():
        name, dot, setting = key.rpartition(".")
        if dot and name not in weights:
            raise ValueError(f"task setting {key!r}: the mixture {text!r} has no task {name!r}")
        for task in [name] if dot else weights:
            own[task][setting] = value
    return Mixture({name: get_task(name, split, **own[name]) for name in weights}, weights, split)


class FewShot:
    """A task whose every prompt begins with `shots` solved problems of another split, as turns of a chat: its first ones, of the same subject where the
    problems have one, and never the problem itself. Raises ValueError when there are too few, or no solution() to show."""

    def __init__(self, task, source, shots):
        if not hasattr(source, "solution"):
            raise ValueError(f"--shots={shots}: this task has no solution() to show")
        self.task, self.source, self.shots, self.shown = task, source, shots, {}

    def __len__(self):
        return len(self.task)

    def __getattr__(self, name):  # reward, timeout and whatever else the task has
        return getattr(self.task, name)

    def problem(self, index):
        problem = self.task.problem(index)
        subject = problem.meta.get("subject", "")
        if subject not in self.shown:
            alike = (
                p
                for p in map(self.source.problem, range(len(self.source)))
                if p.meta.get("subject", "") == subject
            )
            self.shown[subject] = [
                (p.prompt, [*p.prompt, {"role": "assistant", "content": self.source.solution(p)}])
                for p in islice(alike, self.shots + 1)
            ]
        others = [turns for prompt, turns in self.shown[subject] if prompt != problem.prompt][
            : self.shots
        ]
        if len(others) < self.shots:
            raise ValueError(
                f"--shots={self.shots}: there are only {len(others)} solved problems to show{f' of {subject}' if subject else ''}"
            )
        return replace(
            problem, prompt=[turn for turns in others for turn in turns] + problem.prompt
        )


def get_stages(text, split="train", **settings):
    """A task's name, or a curriculum '0-20 until 20; 2-digit until 50; sum3' -> [(first step, task)]."""
    stages, first = [], 0
    *early, last = text.split(";")
    if re.search(r"\suntil\s+\d+\s*$", last):
        raise ValueError(
            f"curriculum {text!r}: the last stage, {last.strip()!r}, goes on to the end of the run: write it without a step"
        )
    for item in early:
        match = re.fullmatch(r"\s*(.+?)\s+until\s+(\d+)\s*", item)
        if match is None or int(match[2]) <= first:
            raise ValueError(
                f"curriculum {text!r}: {item.strip()!r} must be a task and the step it ends at, later than the one before, "
                "as in '0-20 until 20; sum3'"
            )
        stages.append((first, get_task(match[1], split, **settings)))
        first = int(match[2])
    return stages + [(first, get_task(last.strip(), split, **settings))]


def parse_settings(text):
    """'demonstrations=worked; instruction=Be brief' -> {'demonstrations': 'worked', 'instruction': 'Be brief'}."""
    settings = {}
    for item in filter(None, (part.strip() for part in text.split(";"))):
        key, equals, value = item.partition("=")
        if not equals:
            raise ValueError(
                f"task setting {item!r} has no '=': write --task_args='name=value; name=value'"
            )
        if key.strip() == "split":
            raise ValueError(
                f"task setting {item!r}: the split is not one (training takes train, validation val; eval.py has --split)"
            )
        settings[key.strip()] = value.strip()
    return settings


def parse_weights(text):
    """'correct=1; format=0.2' -> {'correct': 1.0, 'format': 0.2}: what each part of a reward counts."""
    weights = {}
    for name, value in parse_settings(text).items():
        try:
            weights[name] = float(value)
        except ValueError:
            weights[name] = math.nan
        if not math.isfinite(weights[name]):
            raise ValueError(f"reward_weights: {name}={value}: the weight must be a finite number")
    return weights


def _load_class(name):
    path, _, class_name = name.rpartition(":")
    if not os.path.isfile(path) or not path.endswith(".py"):
        raise ValueError(
            f"task file {path!r} does not exist"
            if path.endswith(".py")
            else f"task file {path!r} is not a .py file"
        )
    spec = importlib.util.spec_from_file_location("task_" + os.path.basename(path)[:-3], path)
    module = sys.modules[spec.name] = importlib.util.module_from_spec(
        spec
    )  # known by name, as dataclasses need
    spec.loader.exec_module(module)
    if not hasattr(module, class_name):
        raise ValueError(f"{path} has no class {class_name!r}")
    return getattr(module, class_name)
