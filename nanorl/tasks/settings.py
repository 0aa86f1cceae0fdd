"""What a user writes of tasks, as text: settings, weights, mixtures, curricula."""

import math
import os
import re


def parse_settings(text):
    """'demonstrations=worked; instruction=Be brief' -> {name: value}, all of them strings.

    Raises ValueError for an item without '=', and for a split.
    """
    settings = {}
    for part in text.split(";"):
        item = part.strip()
        if not item:
            continue
        key, equals, value = item.partition("=")
        if not equals:
            raise ValueError(
                f"task setting {item!r} has no '=': write --task_args='name=value; name=value'"
            )
        if key.strip() == "split":
            raise ValueError(
                f"task setting {item!r}: the split is not one "
                "(training takes train, validation val; eval.py has --split)"
            )
        settings[key.strip()] = value.strip()
    return settings


def parse_weights(text):
    """'correct=1; format=0.2' -> {'correct': 1.0, 'format': 0.2}.

    It is what each part of a reward counts. Raises ValueError for a weight that is not a finite
    number.
    """
    weights = {}
    for name, value in parse_settings(text).items():
        try:
            weights[name] = float(value)
        except ValueError:
            weights[name] = math.nan
        if not math.isfinite(weights[name]):
            raise ValueError(f"reward_weights: {name}={value}: the weight must be a finite number")
    return weights


# ---- mixtures ------------------------------------------------------------------------------------


def is_mixture(name):
    """Whether a task's name is that of a mixture, such as 'sum3=50,counting=50' or 'sum3=1'."""
    path, _, class_name = name.rpartition(":")
    if class_name.isidentifier() and os.path.isfile(os.path.expanduser(path)):
        return False  # one task, of a file whose name may have a comma
    return "," in name or re.search(r"=\d+$", name) is not None


def parse_mixture(text):
    """'sum3=50,counting=50' -> {'sum3': 50, 'counting': 50}.

    Raises ValueError for an item that is not a task and a positive whole number, or comes twice.
    """
    weights = {}
    for item in text.split(","):
        name, _, weight = item.rpartition("=")
        name, weight = name.strip(), weight.strip()
        is_weight = weight.isdecimal() and int(weight) >= 1
        if not name or not is_weight or name in weights:
            raise ValueError(
                f"mixture {text!r}: {item.strip()!r} must be a task and its weight, "
                "each task once, as in sum3=50,counting=50"
            )
        weights[name] = int(weight)
    return weights


def settings_by_task(text, names, settings):
    """Settings of a mixture -> {name: its task's settings}.

    text: what the user wrote. names: of its tasks. A setting goes to every task, or to one when it
    is written name.setting. Raises ValueError where there is no such task.
    """
    by_task = {name: {} for name in names}
    for key, value in settings.items():
        name, dot, setting = key.rpartition(".")
        if dot and name not in by_task:
            raise ValueError(f"task setting {key!r}: the mixture {text!r} has no task {name!r}")
        receivers = [name] if dot else names
        for receiver in receivers:
            by_task[receiver][setting] = value
    return by_task


# ---- curricula -----------------------------------------------------------------------------------


def parse_curriculum(text):
    """'0-20 until 20; sum3' -> (0, '0-20'), (20, 'sum3'): each stage's first step and its task.

    A task's name alone is a curriculum of one stage. Raises ValueError where a stage has no end or
    ends no later than it begins, and where the last one has an end.
    """
    *early, last = text.split(";")
    if re.search(r"\suntil\s+\d+\s*$", last):
        raise ValueError(
            f"curriculum {text!r}: the last stage, {last.strip()!r}, "
            "goes on to the end of the run: write it without a step"
        )
    first = 0
    for item in early:
        match = re.fullmatch(r"\s*(.+?)\s+until\s+(\d+)\s*", item)
        if match is None or int(match[2]) <= first:
            raise ValueError(
                f"curriculum {text!r}: {item.strip()!r} must be a task and the step it ends at, "
                "later than the one before, as in '0-20 until 20; sum3'"
            )
        yield first, match[1]
        first = int(match[2])
    yield first, last.strip()
