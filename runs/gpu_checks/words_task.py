"""A task in the shape of GSM8K: prompts of 100 to 200 tokens, and 7,473 of them."""

import random

from nanorl.tasks import Problem, Reward

# Words of random letters: a tokenizer that is trained on them has a token for most of them.
LETTERS = "etaoinshrdlucmfwypvbgk"


def random_words(n=30000):
    rng = random.Random(0)
    return ["".join(rng.choices(LETTERS, k=rng.randint(3, 9))) for _ in range(n)]


class Words:
    """No model knows what is asked. Every other length of text is right, so that groups teach."""

    def __init__(self, split="train"):
        self.words = random_words()
        self.first = {"train": 0, "val": 10000, "test": 20000}[split]

    def __len__(self):
        return 7473

    def problem(self, index):
        rng = random.Random(self.first + index)
        text = " ".join(rng.choices(self.words, k=rng.randint(50, 95)))
        return Problem([{"role": "user", "content": text}], "")

    def solution(self, _problem):
        return "1"

    def reward(self, _problem, completion):
        right = float(len(completion) % 2)
        return Reward(right, {"correct": right})
