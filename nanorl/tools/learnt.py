"""What an RL run could learn from, in words: a verdict on a run without signal means little.

A step is without signal where all its groups are dead (their rewards are equal) or no update has
changed the weights. It has almost none where ALMOST of the groups are dead. rows: of metrics.jsonl.
"""

ALMOST = 0.9
NEARLY_ALL = 0.9  # of the steps, from which on a run says nothing about its reward


def signal(rows):
    """-> {steps, none, almost, right, failed, samples}.

    none, almost: how many steps are without signal, or have almost none. right: the share of right
    samples in those; None where there are no such steps. failed: the samples of those whose reward
    failed, of so many samples.
    """
    found = dict(steps=0, none=0, almost=0, failed=0)
    right = []  # shares of these steps
    samples = 0.0
    for row in rows:
        if "frac_reward_zero_std" not in row:
            continue  # an evaluation before the first step
        found["steps"] += 1
        dead = dead_share(row)
        if dead == 1 or row.get("updated") == 0:
            found["none"] += 1
        elif dead >= ALMOST:
            found["almost"] += 1
        else:
            continue
        right.append(row.get("reward/correct", row["reward"]))
        found["failed"] += row["reward/errors"] + row["reward/timeouts"]
        # The row has the tokens of all samples and their mean.
        samples += row["tokens"] / row["completions/mean_length"]
    found["right"] = sum(right) / len(right) if right else None
    found["samples"] = round(samples)
    return found


def dead_share(row):
    """Of the groups that were learnt from; runs of before it was logged: of all."""
    return row.get("frac_learned_zero_std", row["frac_reward_zero_std"])


def lacks(found):
    """Whether most steps of a signal() taught nothing, or almost nothing."""
    return found["none"] + found["almost"] > found["steps"] / 2


def caution(rows_of):
    """{seed: rows} of RL runs -> what must be said before any verdict on them; "": nothing."""
    every_row = [row for rows in rows_of.values() for row in rows]
    lacking = rows_of
    if not lacks(signal(every_row)):
        lacking = {seed: rows for seed, rows in rows_of.items() if lacks(signal(rows))}
    if not lacking:
        return ""

    found = signal([row for rows in lacking.values() for row in rows])
    words = f"RL received no signal in {found['none']} of {found['steps']} steps"
    if found["almost"]:
        words += f" and almost none in {found['almost']}"
    if len(rows_of) > 1:
        words += f" ({', '.join(of_seed(seed, signal(rows)) for seed, rows in lacking.items())})"
    return f"{words}: {why(found)}"


def of_seed(seed, found):
    return f"seed {seed}: {found['none'] + found['almost']} of {found['steps']}"


def why(found):
    """What a run without signal lacked, and what then cannot be said of it."""
    nothing = found["none"] + found["almost"] >= NEARLY_ALL * found["steps"]
    about = f"so this says {'nothing' if nothing else 'little'} about the reward"
    if found["failed"] > found["samples"] / 2:
        failed = f"{found['failed']:,} of {found['samples']:,} samples there"
        return f"the task's reward failed on {failed}, {about}"
    right = f"{found['right']:.1%} of the samples there are right"
    if found["right"] > 0.5:
        return f"{right}, so little is left to learn"
    return f"only {right}, {about}"
