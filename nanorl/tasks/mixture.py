"""Several tasks at once: 'sum3=50,counting=25,comparison=25' takes of every hundred problems so many of each."""

import math


class Mixture:
    """tasks: {name: task}; weights: {name: positive whole number}. Problems of all tasks are interleaved evenly, in a
    pattern as long as the weights' sum. For training it is as long as the task that lasts longest and the others come
    round again; otherwise as long as the first that would repeat itself, so that no held-out problem counts twice."""

    def __init__(self, tasks, weights, split="train"):
        divisor = math.gcd(*weights.values())
        self.tasks, self.weights = (
            tasks,
            {name: weight // divisor for name, weight in weights.items()},
        )
        # The task whose next turn is due first goes next: turn k of a weight w is due at (k + 1/2) / w.
        turns = sorted(
            ((k + 0.5) / w, name, k) for name, w in self.weights.items() for k in range(w)
        )
        self.pattern = [(name, k) for _, name, k in turns]
        if split == "train":
            rounds = max(math.ceil(len(tasks[name]) / w) for name, w in self.weights.items())
        else:
            rounds, name = min((len(tasks[name]) // w, name) for name, w in self.weights.items())
            if not rounds:
                raise ValueError(
                    f"mixture: the {split} split of {name} has {len(tasks[name])} problems, fewer than its weight {self.weights[name]}: "
                    "give smaller weights"
                )
        self.n = rounds * len(self.pattern)
        self.timeout = max(getattr(task, "timeout", 0) for task in tasks.values())

    def __len__(self):
        return self.n

    def _place(self, index):
        """index -> (task's name, index in that task)"""
        cycle, at = divmod(index, len(self.pattern))
        name, k = self.pattern[at]
        return name, (cycle * self.weights[name] + k) % len(self.tasks[name])

    def problem(self, index):
        name, i = self._place(index)
        problem = self.tasks[name].problem(i)
        problem.task = name
        return problem

    def solution(self, problem):
        return self.tasks[problem.task].solution(problem)

    def reward(self, problem, completion):
        return self.tasks[problem.task].reward(problem, completion)

    def document(self, index):
        name, i = self._place(index)
        return self.tasks[name].document(i)
