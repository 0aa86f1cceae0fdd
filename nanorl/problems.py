"""Which problems a step trains on.

Each pass visits every training problem once, in an order of its own that the seed gives. So what a
step asks depends on the seed and on how many problems were taken before, and on nothing else. A
problem whose prompt is too long for the model is passed over: the next one takes its turn.
"""

import copy
from functools import lru_cache

import numpy as np

from nanorl.tasks import get_stages, parse_settings

# Before the first step at most so many problems are looked at. That takes half a second.
LOOKED_AT = 10_000
# A training set of at most so many problems, or one that --problems makes, may be learnt by heart.
SMALL = 1000
TRIED = 100  # of such a set at most so many are evaluated, beside the held-out ones


class Problems:
    """The training problems of a task, of a mixture, or of a curriculum's stages.

    limit: take only the first so many of the split; 0: all of them.
    taken: how many were taken before, in a run that is resumed.
    longest: the most tokens that a prompt may have, to fit the model.
    """

    def __init__(self, task, task_args, seed, limit, taken, tokenizer, longest):
        settings = parse_settings(task_args)
        self.name, self.seed, self.limit, self.taken = task, seed, limit, taken
        self.tokenizer, self.longest = tokenizer, longest
        self.stages = get_stages(task, "train", **settings)  # [(first step, task)]
        # A curriculum is judged by where it leads.
        _, self.val = get_stages(task, "val", **settings)[-1]
        self.order = lru_cache(maxsize=2)(self._order)  # of the last two passes
        self.step, self.left_out = None, []  # the problems that this step has passed over
        self.named = set()  # those that the user was told of

    def __len__(self):
        """Training problems, of a curriculum those of its last stage."""
        _, last = self.stages[-1]
        return self.limit or len(last)

    def task_of(self, step):
        """The task that a step trains on; "probe", before the first step, is of the first stage."""
        number = 0 if step == "probe" else step
        started = [task for first, task in self.stages if first <= number]
        return started[-1]

    def n_of(self, task):
        """Training problems of a stage's task."""
        return self.limit or len(task)

    def passes(self, step):
        """How often the problems of the step's stage were gone through so far."""
        return self.taken / self.n_of(self.task_of(step))

    def length(self, problem):
        """Tokens of its prompt."""
        return len(self.tokenizer.render_prompt(problem.prompt))

    def take(self, step, count):
        """The step's next `count` problems -> (number, problem) pairs.

        The number counts on over passes, so that a problem that comes again gets other random
        numbers.
        """
        if step != self.step:
            self.step, self.left_out = step, []
        asked, left_out = self._ask(self.task_of(step), self.taken, count)
        self.taken += len(asked) + len(left_out)
        self.left_out += left_out
        return asked

    def peek(self, count):
        """The first `count` problems of the first stage, without taking them."""
        asked, _ = self._ask(self.task_of(0), 0, count)
        return asked

    def _ask(self, task, before, count):
        """-> (number, problem) pairs of those that fit, (index, tokens) of those passed over."""
        n = self.n_of(task)
        asked, left_out = [], []
        while len(asked) < count:
            number = before + len(asked) + len(left_out)
            epoch, i = divmod(number, n)
            index = int(self.order(epoch, n)[i])
            problem = copy.copy(task.problem(index))  # a task may give one object twice
            problem.index = index
            tokens = self.length(problem)
            if tokens <= self.longest:
                asked.append((number, problem))
            else:
                left_out.append((index, tokens))
            if len(left_out) == n:
                raise ValueError(self._none_fits(tokens))
        return asked, left_out

    def _order(self, epoch, n):
        """The order in which pass `epoch` visits n problems, (n,)."""
        return np.random.default_rng([self.seed, epoch]).permutation(n)

    def fixed(self):
        """The task, and the indices of the first problems that a small set's first pass asks.

        Of a large set there are none, nor of a curriculum.
        """
        _, task = self.stages[-1]
        n = len(self)
        if len(self.stages) > 1 or (n > SMALL and not self.limit):
            return task, []
        first = [int(index) for index in self.order(0, n)[:TRIED]]
        return task, [i for i in first if self.length(task.problem(i)) <= self.longest]

    # ---- before the first step ----

    def check(self, per_step, resample, n_val):
        """Look at the problems before the first step -> what to say of each stage, a dict.

        n problems, the number looked at, how many of those are different and how many are among
        the n_val held-out ones, which are too long, (index, tokens) each.

        Raises ValueError where a step may ask for more different problems than there are.
        """
        held_out = {content(self.val.problem(i)) for i in range(min(n_val, len(self.val)))}
        return [self._check_stage(task, per_step, resample, held_out) for _, task in self.stages]

    def _check_stage(self, task, per_step, resample, held_out):
        n, most = self.limit or len(task), per_step * (1 + resample)
        if self.limit > len(task):
            raise ValueError(
                f"--problems={self.limit}: task {self.name} has {len(task):,} training problems"
            )
        asks = f"--prompts_per_step={per_step}"
        if resample:
            asks += f" --resample={resample}"
        asks += f": a step may ask for {most:,} different problems, and "
        if most > n:
            raise ValueError(f"{asks}the run has {n:,}: lower it, or raise --problems")

        # A fixed set is looked at as a whole.
        looked_at = self.limit or min(n, LOOKED_AT)
        different, too_long = set(), []
        for i in range(looked_at):
            problem = task.problem(i)
            different.add(content(problem))
            tokens = self.length(problem)
            if tokens > self.longest:
                too_long.append((i, tokens))
        if len(different) < self.limit:
            raise ValueError(
                f"--problems={self.limit}: the first {self.limit} problems of {self.name} "
                f"are only {len(different)} different ones"
            )
        if len(too_long) == looked_at:
            raise ValueError(self._none_fits(too_long[0][1]))
        if looked_at == n and most > n - len(too_long):
            raise ValueError(
                f"{asks}of {n:,} only {n - len(too_long):,} fit the model: lower it, lower "
                "--max_new_tokens, or raise --problems"
            )
        self.named.update(too_long)
        shared = len(different & held_out)
        found = dict(n=n, looked_at=looked_at, different=len(different), too_long=too_long)
        return dict(found, shared=shared, held_out=len(held_out))

    def _none_fits(self, tokens):
        return (
            f"no training problem of {self.name} fits the model: a prompt has {tokens:,} tokens, "
            f"and beside --max_new_tokens there is room for {self.longest:,}: lower it, shorten "
            "the prompts, or take a model with a longer context"
        )

    def newly_left_out(self):
        """A sentence about the problems that the step has passed over and that are new, or none."""
        new = []
        for found in self.left_out:
            if found not in self.named:
                self.named.add(found)
                new.append(found)
        return [self.in_words(new)] if new else []

    def in_words(self, too_long):
        """(index, tokens) of problems that are left out -> a sentence."""
        index, tokens = too_long[0]
        return (
            f"{len(too_long):,} training problems are left out, such as problem({index}), whose "
            f"prompt has {tokens:,} tokens: beside --max_new_tokens there is room for "
            f"{self.longest:,}"
        )


def content(problem):
    """What makes two problems the same: what is asked."""
    return str(problem.prompt)
