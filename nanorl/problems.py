"""Which problems a step trains on: each pass visits every one once, in an order given by the seed."""
from functools import lru_cache

import numpy as np

from nanorl import rollout
from nanorl.tasks import Reward, get_stages, parse_settings


class Problems:
    """The training problems of a task or a curriculum. `drawn` of them have been taken so far."""

    def __init__(self, task, task_args, seed, limit=0, drawn=0):
        self.stages = get_stages(task, "train", **parse_settings(task_args))  # [(first step, task)]
        self.val = get_stages(task, "val", **parse_settings(task_args))[-1][1]  # judged by where it leads
        self.name, self.seed, self.limit, self.drawn = task, seed, limit, drawn
        self._order = lru_cache(maxsize=2)(lambda epoch, n: np.random.default_rng([seed, epoch]).permutation(n))

    def __len__(self):
        return self.limit or len(self.stages[-1][1])

    def of(self, step):
        """The task of a step; "probe", before the first: of the first."""
        return [source for first, source in self.stages if step == "probe" or first <= step][0 if step == "probe" else -1]

    def take(self, step, count):
        """The next `count` pairs (number, problem). The number counts on over passes, so that a problem
        that comes again gets other random numbers."""
        source = self.of(step)
        n = self.limit or len(source)
        places = [divmod(self.drawn + i, n) for i in range(count)]
        self.drawn += count
        return [(epoch * n + i, source.problem(int(self._order(epoch, n)[i]))) for epoch, i in places]

    def peek(self, count):
        """The first `count`, without taking them."""
        n, source = self.limit or len(self.of(0)), self.of(0)
        places = [divmod(i, n) for i in range(count)]
        return [(epoch * n + i, source.problem(int(self._order(epoch, n)[i]))) for epoch, i in places]

    def check(self, per_step, resample, part_weights):
        """Refuse a step that asks for more different problems than there are, and a fixed set that is none."""
        for _, source in self.stages:
            n, most = self.limit or len(source), per_step * (1 + resample)
            if self.limit > len(source):
                raise ValueError(f"--problems={self.limit}: task {self.name} has {len(source):,} training problems")
            if most > n:
                raise ValueError(f"--prompts_per_step={per_step}{f' --resample={resample}' if resample else ''}: "
                                 f"a step may ask for {most:,} different problems, and the run has {n:,}: lower it, "
                                 "or raise --problems")
            some = [(source.problem(i), "") for i in range(min(n, 20))] if part_weights else []
            for result in rollout.judge(source, some):
                if isinstance(result, Reward):
                    rollout.weighted(result, part_weights)  # raises for a part that the task does not give
            different = len({str(source.problem(i).prompt) for i in range(self.limit)})
            if different < self.limit:
                raise ValueError(f"--problems={self.limit}: the first {self.limit} problems of {self.name} are only "
                                 f"{different} different ones")
