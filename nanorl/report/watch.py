"""Says in words when training begins to go wrong."""


class Watch:
    """Says in words when training begins to go wrong, each thing once a run. `state` goes into the checkpoint: the first step's values,
    against which later ones are held, and what has been said."""

    def __init__(self, state=None):
        self.state = state or {"first": {}, "said": []}

    def look(self, row):
        """A step's metrics -> sentences about what is new."""
        first = self.state["first"]
        for name in ("entropy", "logp_diff/mean"):
            first.setdefault(name, row[name])
        dead, cut, entropy, gap = (
            row[name]
            for name in (
                "frac_learned_zero_std",
                "completions/clipped_ratio",
                "entropy",
                "logp_diff/mean",
            )
        )
        right = row.get("reward/correct", row["reward"])
        cure = (
            f"most samples are right ({right:.0%}): stop here, or take a harder task"
            if right > 0.5
            else f"most samples are wrong ({right:.0%} right): more SFT, an easier task, or more --samples_per_prompt"
        )
        found = {
            "dead 0.5": dead > 0.5
            and f"{dead:.0%} of the groups that are learnt from teach nothing (above 0.5), so little is learnt any more; {cure}",
            "dead 0.25": 0.25 < dead <= 0.5
            and f"{dead:.0%} of the groups that are learnt from teach nothing (above 0.25); {cure}",
            "entropy": entropy < 0.1 * first["entropy"]
            and f"entropy {entropy:.4f} is below a tenth of the first step's {first['entropy']:.4f}: a problem's samples "
            "hardly differ any more; a lower --lr, a higher --temperature or a --kl_coef keeps them apart",
            "errors": row["reward/errors"] + row["reward/timeouts"] > 0
            and f"the task's reward failed on {row['reward/errors']} completions and took too long on "
            f"{row['reward/timeouts']}: `python eval.py --show=` this run shows which, and why",
            "cut": cut > 0.2
            and f"{cut:.0%} of the completions were cut off, and earn nothing: raise --max_new_tokens, or teach the model to stop (SFT)",
            "gap": gap > max(5 * first["logp_diff/mean"], 1e-9)
            and f"sampler and learner differ by {gap:.1e} a token, more than 5 times the first step's "
            f"{first['logp_diff/mean']:.1e}: samples are no longer quite from the policy that learns; --dtype=fp32, or a lower --lr",
        }
        new = {
            name: text for name, text in found.items() if text and name not in self.state["said"]
        }
        self.state["said"] += new
        return list(new.values())
