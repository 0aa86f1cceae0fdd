"""Several tasks at once: of 'sum3=50,counting=25,comparison=25' half of the problems are sums."""

import math


class Mixture:
    """Problems of several tasks, interleaved evenly.

    tasks: {name: task}. weights: {name: positive whole number}; 50 and 25 are taken as 2 and 1.

    The tasks take turns in a pattern as long as the sum of the weights, which is repeated. For
    training the mixture is as long as the task that lasts longest; the others come round again. A
    held-out split is as long as the task that ends first, so that no problem in it counts twice.

    Raises ValueError where a held-out split has too few problems for the pattern.
    """

    def __init__(self, tasks, weights, split="train"):
        divisor = math.gcd(*weights.values())
        self.tasks = tasks
        self.weights = {name: weight // divisor for name, weight in weights.items()}
        self.pattern = make_pattern(self.weights)
        self.n = self._rounds(split) * len(self.pattern)
        self.timeout = max(getattr(task, "timeout", 0) for task in tasks.values())

    def __len__(self):
        return self.n

    def _rounds(self, split):
        """How often the pattern is repeated."""
        weights = self.weights
        if split == "train":
            return max(math.ceil(len(self.tasks[name]) / weights[name]) for name in weights)

        fewest, name = min((len(self.tasks[name]) // weights[name], name) for name in weights)
        if not fewest:
            raise ValueError(
                f"mixture: the {split} split of {name} has {len(self.tasks[name])} problems, "
                f"fewer than its weight {weights[name]}: give smaller weights"
            )
        return fewest

    def _locate(self, index):
        """A problem's index -> its task's name, and its index in that task."""
        cycle, turn = divmod(index, len(self.pattern))
        name, k = self.pattern[turn]
        number = cycle * self.weights[name] + k  # of the task's problems that came before
        return name, number % len(self.tasks[name])

    def problem(self, index):
        name, i = self._locate(index)
        problem = self.tasks[name].problem(i)
        problem.task = name
        return problem

    def solution(self, problem):
        return self.tasks[problem.task].solution(problem)

    def reward(self, problem, completion):
        return self.tasks[problem.task].reward(problem, completion)

    def document(self, index):
        name, i = self._locate(index)
        return self.tasks[name].document(i)


def make_pattern(weights):
    """{name: weight} -> the turns in their order, (name, k) for a task's k-th turn.

    {"a": 2, "b": 1} -> [("a", 0), ("b", 0), ("a", 1)]
    """
    # Turn k of a task with weight w is due at (k + 1/2) / w. What is due first comes first.
    turns = []
    for name, weight in weights.items():
        turns += [((k + 0.5) / weight, name, k) for k in range(weight)]
    return [(name, k) for _, name, k in sorted(turns)]
