"""Says in words when training begins to go wrong, each thing once a run."""


class Watch:
    """state goes into the checkpoint: {first, said}.

    first: the first step's values, against which later ones are held. said: the warnings so far.
    """

    def __init__(self, state=None):
        self.state = state or {"first": {}, "said": []}

    def look(self, row):
        """A step's metrics -> sentences about what is new."""
        first = self.state["first"]
        for name in ("entropy", "logp_diff/mean"):
            first.setdefault(name, row[name])

        # The names of the warnings are in checkpoints.
        found = {}
        if row["frac_learned_zero_std"] > 0.5:
            found["dead 0.5"] = mostly_dead(row)
        elif row["frac_learned_zero_std"] > 0.25:
            found["dead 0.25"] = partly_dead(row)
        if row["entropy"] < 0.1 * first["entropy"]:
            found["entropy"] = low_entropy(row, first)
        if row["reward/errors"] + row["reward/timeouts"] > 0:
            found["errors"] = failed_rewards(row)
        if row["completions/clipped_ratio"] > 0.2:
            found["cut"] = cut_off(row)
        if row.get("train_set/p", 1) < 0.01:
            found["by heart"] = learnt_by_heart(row)
        if row["logp_diff/mean"] > max(5 * first["logp_diff/mean"], 1e-9):
            found["gap"] = sampler_apart(row, first)

        new = [name for name in found if name not in self.state["said"]]
        self.state["said"] += new
        return [found[name] for name in new]


# ---- the sentences -------------------------------------------------------------------------------


def mostly_dead(row):
    return (
        f"{row['frac_learned_zero_std']:.0%} of the groups that are learnt from teach nothing "
        f"(above 0.5), so little is learnt any more; {cure(row)}"
    )


def partly_dead(row):
    return (
        f"{row['frac_learned_zero_std']:.0%} of the groups that are learnt from teach nothing "
        f"(above 0.25); {cure(row)}"
    )


def cure(row):
    """Of groups that teach nothing: it depends on whether most samples are right or wrong."""
    right = row.get("reward/correct", row["reward"])
    if right > 0.5:
        return f"most samples are right ({right:.0%}): stop here, or take a harder task"
    return (
        f"most samples are wrong ({right:.0%} right): more SFT, an easier task, or more "
        "--samples_per_prompt"
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


def cut_off(row):
    return (
        f"{row['completions/clipped_ratio']:.0%} of the completions were cut off, and earn "
        "nothing: raise --max_new_tokens, or teach the model to stop (SFT)"
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
