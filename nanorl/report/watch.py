"""Says in words when training begins to go wrong, and again when it has become clearly worse."""

import math

# A warning has a level, 0 where all is well. Of a share the level says how many of these it is
# above; the last is all but rounding. Of any other number it goes up each time that it doubles.
DEAD = (0.25, 0.5, 0.75, 0.9, 0.999)
CUT = (0.2, 0.5, 0.75, 0.9, 0.999)

# A warning is said when its level is higher than at each of so many steps before.
REMEMBERED = 50

LOW = 0.1  # of the first step's entropy
UNIFORM = 0.8  # of the entropy of tokens taken blindly
RISE = 0.5  # nats: an entropy that doubles by less, from near 0, is not noise yet


class Watch:
    """state goes into the checkpoint: {first, levels}.

    first: the first step's values, against which later ones are held. levels: of each warning the
    last REMEMBERED levels. vocab_size: of the model.
    """

    def __init__(self, state, vocab_size):
        self.state = state or {"first": {}, "levels": {}}
        self.blind = math.log(vocab_size)  # entropy of tokens taken blindly, in nats
        if "said" in self.state:
            # A checkpoint of before there were levels: the names of what was said.
            said = self.state.pop("said")
            levels = {name: [1] for name in said}
            if "dead 0.25" in said:
                levels["dead"] = [1]
            if "dead 0.5" in said:
                levels["dead"] = [2]
            self.state["levels"] = levels

    def look(self, row):
        """A step's metrics -> sentences about what is new or worse."""
        first = self.state["first"]
        for name in ("entropy", "logp_diff/mean"):
            first.setdefault(name, row[name])

        new = []
        for name, (level, sentence) in self.measure(row, first).items():
            before = self.state["levels"].setdefault(name, [])
            if level > max(before, default=0):
                new.append(sentence)
            before.append(level)
            del before[:-REMEMBERED]
        return new

    def measure(self, row, first):
        """-> {name: (level, sentence)}; the names are in checkpoints."""
        noise, noise_cause = self.noise(row, first), self.noise_cause(row, first)
        failures = row["reward/errors"] + row["reward/timeouts"]
        dead, cut = row["frac_learned_zero_std"], row["completions/clipped_ratio"]
        low = LOW * first["entropy"] / max(row["entropy"], 1e-9)
        # The cure of a cause comes before that of what follows from it.
        cause = failed_cause(row) or noise_cause or narrow_cause(row, low)
        gap = row["logp_diff/mean"] / max(5 * first["logp_diff/mean"], 1e-9)

        found = {}
        found["errors"] = doublings(failures), failed_rewards(row)
        found["bad steps"] = doublings(row["bad_steps"]), not_finite(row)
        found["noise"] = noise, high_entropy(row, first, self.blind, noise_cause)
        found["entropy"] = doublings(low), low_entropy(row, first)
        found["dead"] = marks_passed(dead, DEAD), dead_groups(row, cause)
        found["cut"] = marks_passed(cut, CUT), cut_off(row, cause)
        found["gap"] = doublings(gap), sampler_apart(row, first)
        left_out = row.get("rollouts/left_out", 0)
        found["disk"] = left_out, rollouts_left_out(left_out)
        # It is not measured at every step.
        if "train_set/p" in row:
            found["by heart"] = int(row["train_set/p"] < 0.01), learnt_by_heart(row)
        return found

    def noise(self, row, first):
        """2: samples are near noise; 1: the entropy is twice the first step's; 0: neither."""
        entropy = row["entropy"]
        if entropy > UNIFORM * self.blind:
            return 2
        return int(entropy > max(2 * first["entropy"], first["entropy"] + RISE))

    def noise_cause(self, row, first):
        """What makes noise of the samples, and what helps; "" where they are none."""
        if not self.noise(row, first):
            return ""
        if first["entropy"] > UNIFORM * self.blind:
            return "samples were noise before the first update: more SFT, or another --model"
        return f"start again with a lower --lr (this step's is {row['lr']:g})"


def narrow_cause(row, low):
    """What helps where samples hardly differ and are mostly wrong; "" where they are not."""
    if low < 1 or share_right(row) > 0.5:
        return ""
    return f"start again with a lower --lr (this step's is {row['lr']:g})"


# ---- levels --------------------------------------------------------------------------------------


def marks_passed(share, marks):
    """How many of the marks the share is above."""
    return sum(share > mark for mark in marks)


def doublings(times):
    """How often a number has doubled since it reached 1, that first time counted; below 1: 0."""
    if not times >= 1:  # as of a number that is not one
        return 0
    return 1 + math.floor(math.log2(min(times, 1e9)))


# ---- the sentences -------------------------------------------------------------------------------


def dead_groups(row, cause):
    share = row["frac_learned_zero_std"]
    passed = max([mark for mark in DEAD if share > mark], default=0)
    words = f"{share:.0%} of the groups that are learnt from teach nothing"
    if passed == DEAD[-1]:
        words += ", so no reward moves the model"
    elif passed >= 0.5:
        words += f" (above {passed:g}), so little is learnt any more"
    else:
        words += f" (above {passed:g})"
    return f"{words}; {cause or cure(row)}"


def share_right(row):
    """Of the samples; of a task without such a part the mean reward."""
    return row.get("reward/correct", row["reward"])


def cure(row):
    """Of groups that teach nothing: it depends on whether most samples are right or wrong."""
    right = share_right(row)
    if right > 0.5:
        return f"most samples are right ({right:.0%}): stop here, or take a harder task"
    if row["completions/clipped_ratio"] > 0.5:
        return "most completions are cut off, and earn nothing: raise --max_new_tokens first"
    return (
        f"most samples are wrong ({right:.0%} right): more SFT, an easier task, or more "
        "--samples_per_prompt"
    )


def failed_cause(row):
    """That the reward failed on most samples, which then earn nothing; "" where it did not."""
    # The row has the tokens of all samples and their mean.
    samples = row["tokens"] / row["completions/mean_length"]
    if row["reward/errors"] + row["reward/timeouts"] > samples / 2:
        return "the task's reward failed on most samples: mend that first"
    return ""


def high_entropy(row, first, blind, cause):
    return (
        f"entropy {row['entropy']:.2f} nats a token, at the first step {first['entropy']:.2f}; "
        f"tokens taken blindly have {blind:.2f}; {cause}"
    )


def low_entropy(row, first):
    return (
        f"entropy {row['entropy']:.4f} is below a tenth of the first step's "
        f"{first['entropy']:.4f}: a problem's samples hardly differ any more; a lower --lr, a "
        "higher --temperature or a --kl_coef keeps them apart"
    )


def failed_rewards(row):
    return (
        f"the task's reward failed on {row['reward/errors']} completions and took too long on "
        f"{row['reward/timeouts']}: `python eval.py --show=` this run shows which, and why"
    )


def not_finite(row):
    return (
        f"the gradient was not finite, so {row['bad_steps']} steps in a row have changed nothing "
        "or less than they should: a lower --lr, or --dtype=fp32"
    )


def cut_off(row, cause):
    remedy = "raise --max_new_tokens, or teach the model to stop (SFT)"
    return (
        f"{row['completions/clipped_ratio']:.0%} of the completions were cut off, and earn "
        f"nothing: {cause or remedy}"
    )


def rollouts_left_out(left_out):
    what = "as text alone, without ids, log-probs and entropies"
    if left_out == 2:
        what = "not at all"
    return (
        f"rollouts/ has come to what --rollouts_gb leaves it so far: from now on some steps are "
        f"written {what}; resumed with a higher --rollouts_gb the run writes more"
    )


def learnt_by_heart(row):
    return (
        f"of {row['train_set/n']} training problems {row['train_set/accuracy']:.1%} are solved, "
        f"of the held-out ones {row['val/accuracy']:.1%} (p = {row['train_set/p']:.1g}): they are "
        "learnt by heart, and the reward says little of others; more --problems, or fewer --steps"
    )


def sampler_apart(row, first):
    return (
        f"sampler and learner differ by {row['logp_diff/mean']:.1e} a token, more than 5 times the "
        f"first step's {first['logp_diff/mean']:.1e}: samples are no longer quite from the policy "
        "that learns; --dtype=fp32, or a lower --lr"
    )
