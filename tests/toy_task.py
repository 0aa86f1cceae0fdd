"""A task on which any model, however little trained, gets different rewards for different completions."""
from nanorl.tasks import Problem, Reward


class Toy:
    def __init__(self, split="train"):
        self.first = {"train": 0, "val": 1000, "test": 2000}[split]

    def __len__(self):
        return 50

    def problem(self, index):
        return Problem([{"role": "user", "content": f"Write about {self.first + index}"}], "even")

    def reward(self, problem, completion):
        even = float(len(completion) % 2 == 0)
        return Reward(even - 0.1 * completion.count("1"), {"correct": even})
