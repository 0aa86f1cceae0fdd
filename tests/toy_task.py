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


class Uneven(Toy):
    """Of ten problems three do not fit any small model."""

    def __len__(self):
        return 10

    def problem(self, index):
        problem = super().problem(index)
        if index in (2, 5, 6):
            problem.prompt[0]["content"] += " now" * 1100
        return problem


class Everywhere(Toy):
    """The splits have the same problems."""

    def __init__(self, split="train"):
        super().__init__("train")


class ByHeart(Toy):
    """Only the training problems can be solved."""

    def reward(self, problem, completion):
        trained = float(int(problem.prompt[0]["content"].removeprefix("Write about ")) < 1000)
        return Reward(trained, {"correct": trained})


class Broken(Toy):
    """The reward fails on all problems, or on those with an even number."""

    def __init__(self, split="train", fails="all"):
        super().__init__(split)
        self.fails = fails

    def reward(self, problem, completion):
        number = int(problem.prompt[0]["content"].removeprefix("Write about "))
        if self.fails == "all" or number % 2 == 0:
            raise RuntimeError("no verifier")
        return super().reward(problem, completion)


class Splits(Toy):
    """Each split's prompts name it, and whatever is said in it earns the same, cut off or not."""

    earns = {"train": -1.0, "val": -0.5, "test": -0.25}

    def __init__(self, split="train"):
        self.split = split

    def problem(self, index):
        return Problem([{"role": "user", "content": f"{self.split} {index}"}], "none")

    def reward(self, problem, completion):
        return Reward(self.earns[self.split], {"correct": 0.0})
