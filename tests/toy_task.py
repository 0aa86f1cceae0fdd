"""Tasks on which any model, however little trained, shows what a loop does."""

from nanorl.tasks import Problem, Reward


class Toy:
    """Different completions get different rewards."""

    def __init__(self, split="train"):
        self.first = {"train": 0, "val": 1000, "test": 2000}[split]

    def __len__(self):
        return 50

    def problem(self, index):
        prompt = [{"role": "user", "content": f"Write about {self.first + index}"}]
        return Problem(prompt, "even")

    def solution(self, problem):
        return "1" * (2 + len(problem.prompt[0]["content"]) % 3)

    def reward(self, problem, completion):
        even = float(len(completion) % 2 == 0)
        return Reward(even - 0.1 * completion.count("1"), {"correct": even})


class Better(Toy):
    """The same, and every completion earns 5 more."""

    def reward(self, problem, completion):
        plain = super().reward(problem, completion)
        return Reward(plain.total + 5, plain.parts)


class Same(Toy):
    """Every problem has the same prompt."""

    def problem(self, index):
        return Problem([{"role": "user", "content": "Write"}], "even")


class Splits(Toy):
    """Each split's prompts name it, and whatever is said in it earns the same, cut off or not."""

    earns = {"train": -1.0, "val": -0.5, "test": -0.25}

    def __init__(self, split="train"):
        self.split = split

    def problem(self, index):
        return Problem([{"role": "user", "content": f"{self.split} {index}"}], "none")

    def reward(self, problem, completion):
        return Reward(self.earns[self.split], {"correct": 0.0})
