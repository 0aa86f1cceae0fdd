"""The gradient's noise while training: a norm more a step.

A rank's groups are packed in two halves, one after the other. Between them the gradient is that of
the first half, and at the end that of all: two batch sizes, of which noise.from_two_sizes makes
unbiased tr Sigma and |g|^2. One step's are very noisy. They are logged as they are, to be averaged
over a window of steps, each by itself, before they are divided (noise.windowed).

The cost: a norm over the parameters, and a micro-batch more where all groups would fit one.
"""

import torch

from nanorl import batch
from nanorl.dynamics.noise import from_two_sizes
from nanorl.runtime import dist


class Halves:
    """What train_rl.py's loop packs by, goes over its micro-batches by, and logs.

    problems: P, over all ranks. Not active, it is batch.pack, the list as it is, and nothing.
    Raises ValueError for ranks of less than two problems.
    """

    def __init__(self, params, active, problems):
        self.params, self.active, self.all_problems = params, active, problems
        if active and problems < 2 * dist.world_size():
            raise ValueError(
                f"--noise_scale --prompts_per_step={problems}: it compares two halves, so each "
                "rank needs two problems at least"
            )
        self.first = 0  # micro-batches of the first half
        self.problems = 0  # in it
        self.square = None  # |gradient|^2 of it, as part of the step's

    def pack(self, rollouts, advantages, token_weights, *more):
        """As batch.pack."""
        if not self.active:
            return batch.pack(rollouts, advantages, token_weights, *more)
        self.problems, self.square = len(rollouts) // 2, None
        found = []
        for which in (slice(0, self.problems), slice(self.problems, None)):
            found.append(
                batch.pack(rollouts[which], advantages[which], token_weights[which], *more)
            )
        self.first = len(found[0])
        # The second half's completions have their numbers in all of the step.
        for one in found[1]:
            one.numbers = [(self.problems + p, g) for p, g in one.numbers]
        return found[0] + found[1]

    def watch(self, batches):
        """Yield the micro-batches, and look at the gradient between the halves, at a step's first
        update."""
        for number, one in enumerate(batches):
            if self.active and number == self.first and self.square is None:
                grads = [p.grad for p in self.params if p.grad is not None]
                self.square = float(torch.nn.utils.get_total_norm(grads)) ** 2
            yield one

    def row(self, norm):
        """What is logged of a step: unbiased tr Sigma and |g|^2.

        norm: of the gradient of the step's first update, before clipping.
        """
        if not self.active:
            return {}
        # A half's gradient has the denominator of the whole step.
        P = self.all_problems
        square = self.square * (P / self.problems) ** 2
        sums = dist.totals(dict(square=square, inverse=1 / self.problems, ranks=1))
        half = sums["ranks"] / sums["inverse"]  # problems, the harmonic mean over ranks
        trace, signal = from_two_sizes(sums["square"] / sums["ranks"], norm**2, half, P)
        return {"noise/trace": trace, "noise/signal": signal}
