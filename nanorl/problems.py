"""Which problems a step trains on.

Each pass visits every training problem once, in an order of its own that the seed gives. So what a
step asks depends on the seed and on how many problems were taken before, and on nothing else.
"""

from functools import lru_cache

import numpy as np

from nanorl.tasks import get_stages, parse_settings


class Problems:
    """The training problems of a task, of a mixture, or of a curriculum's stages.

    limit: take only the first so many of the split; 0: all of them.
    taken: how many were taken before, in a run that is resumed.
    """

    def __init__(self, task, task_args, seed, limit=0, taken=0):
        settings = parse_settings(task_args)
        self.name, self.seed, self.limit, self.taken = task, seed, limit, taken
        self.stages = get_stages(task, "train", **settings)  # [(first step, task)]
        # A curriculum is judged by where it leads.
        _, self.val = get_stages(task, "val", **settings)[-1]
        self.order = lru_cache(maxsize=2)(self._order)  # of the last two passes

    def __len__(self):
        """Training problems, of a curriculum those of its last stage."""
        _, last = self.stages[-1]
        return self.limit or len(last)

    def task_of(self, step):
        """The task that a step trains on; "probe", before the first step, is of the first stage."""
        number = 0 if step == "probe" else step
        started = [task for first, task in self.stages if first <= number]
        return started[-1]

    def take(self, step, count):
        """The step's next `count` problems -> (number, problem) pairs.

        The number counts on over passes, so that a problem that comes again gets other random
        numbers.
        """
        asked = self._ask(self.task_of(step), self.taken, count)
        self.taken += count
        return asked

    def peek(self, count):
        """The first `count` problems of the first stage, without taking them."""
        return self._ask(self.task_of(0), 0, count)

    def _ask(self, task, before, count):
        n = self.limit or len(task)
        asked = []
        for number in range(before, before + count):
            epoch, i = divmod(number, n)
            index = int(self.order(epoch, n)[i])
            asked.append((number, task.problem(index)))
        return asked

    def _order(self, epoch, n):
        """The order in which pass `epoch` visits n problems, (n,)."""
        return np.random.default_rng([self.seed, epoch]).permutation(n)

    def check(self, per_step, resample):
        """Raise ValueError where a step may ask for more different problems than there are."""
        for _, task in self.stages:
            n, most = self.limit or len(task), per_step * (1 + resample)
            if self.limit > len(task):
                raise ValueError(
                    f"--problems={self.limit}: task {self.name} has {len(task):,} training problems"
                )
            if most > n:
                asks = f"--prompts_per_step={per_step}"
                if resample:
                    asks += f" --resample={resample}"
                raise ValueError(
                    f"{asks}: a step may ask for {most:,} different problems, "
                    f"and the run has {n:,}: lower it, or raise --problems"
                )
            different = len({str(task.problem(i).prompt) for i in range(self.limit)})
            if different < self.limit:
                raise ValueError(
                    f"--problems={self.limit}: the first {self.limit} problems of {self.name} "
                    f"are only {different} different ones"
                )
