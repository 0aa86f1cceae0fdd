"""Did it work, and why: a run's rows -> sentences.

Two accuracies are told apart by the 95% interval of their difference. It is made of the intervals
of both (Newcombe 1998, method 10), as if the problems were different ones. They are the same, so
the true interval is narrower, as a rule: what is called a change here is one.
"""

FEW = 3  # steps over which a share in training is averaged at the start and at the end

GOOD, FLAT, WORSE, OPEN = "better", "no clear change", "worse", "open"


def held_out(stage):
    """The held-out evaluations of a stage -> [{step, accuracy, low, high, n, length}]."""
    found = []
    for row in stage["rows"]:
        if row.get("val/accuracy") is None or row.get("val/low") is None:
            continue
        one = {"step": row["step"]}
        for name in ("accuracy", "low", "high", "n", "length"):
            one[name] = row.get(f"val/{name}")
        found.append(one)
    return found


def change(before, after):
    """Two evaluations -> (difference, low, high): with its 95% interval."""
    difference = after["accuracy"] - before["accuracy"]
    down = (after["accuracy"] - after["low"]) ** 2 + (before["high"] - before["accuracy"]) ** 2
    up = (after["high"] - after["accuracy"]) ** 2 + (before["accuracy"] - before["low"]) ** 2
    return difference, difference - down**0.5, difference + up**0.5


def verdict(stage):
    """-> {tone, words, sentence, before, after, best}: what a stage has come to.

    tone: better, no clear change, worse or open. before, after, best: evaluations, or None.
    """
    evaluations = held_out(stage)
    if len(evaluations) < 2 or evaluations[0]["step"] >= stage["rows"][-1]["step"]:
        return no_verdict(stage, evaluations)
    before, after = evaluations[0], evaluations[-1]
    best = max(evaluations, key=lambda one: one["accuracy"])
    gain, low, high = change(before, after)
    _, fall, _ = change(after, best)

    name = {"rl": "RL", "sft": "SFT", "base": "Pretraining"}[stage["kind"]]
    said = f"{percent(before['accuracy'])} to {percent(after['accuracy'])}"
    interval = f"{points(gain)} points, 95% interval {points(low)} to {points(high)}"
    if low > 0:
        tone, words = GOOD, f"{name} worked"
        sentence = f"Held-out accuracy rose from {said} ({interval})."
    elif high < 0:
        halved = after["accuracy"] < before["accuracy"] / 2
        tone, words = WORSE, f"{name} collapsed" if halved else f"{name} made the model worse"
        sentence = f"Held-out accuracy fell from {said} ({interval})."
    else:
        tone, words = FLAT, "No clear change"
        sentence = f"Held-out accuracy went from {said} ({interval}): that may be chance."
    if fall > 0 and best is not before:
        sentence += f" It had been {percent(best['accuracy'])} at step {best['step']}."
        if tone != WORSE:
            words = f"{name} worked, then fell back" if low > 0 else f"{name} collapsed"
            tone = WORSE
    found = dict(tone=tone, words=words, sentence=sentence, before=before, after=after, best=best)
    planned = stage["settings"].get("steps", 0)
    if after["step"] < planned:
        found["words"] += ", so far"
        found["sentence"] += f" {progress(stage)}"
    return found


def against(stages, names):
    """Several stages -> sentences: where each ends beside the first one.

    Stages of other tasks, or with another number of problems, are not compared.
    """
    first, *others = [verdict(stage) for stage in stages]
    found = []
    for stage, name, other in zip(stages[1:], names[1:], others):
        same_task = stage["settings"].get("task") == stages[0]["settings"].get("task")
        if not (same_task and first["after"] and other["after"]):
            continue
        if first["after"]["n"] != other["after"]["n"]:
            continue
        gain, low, high = change(first["after"], other["after"])
        words = f"{name} ends at {percent(other['after']['accuracy'])}, {names[0]} at "
        words += f"{percent(first['after']['accuracy'])}: {points(gain)} points, 95% interval "
        words += f"{points(low)} to {points(high)}"
        found.append(f"{words}{'.' if low > 0 or high < 0 else ', which may be chance.'}")
    return found


def no_verdict(stage, evaluations):
    """Of a stage without an evaluation before it and one after."""
    before = evaluations[0] if evaluations else None
    found = dict(tone=OPEN, before=before, after=None, best=None)
    sentence = progress(stage)
    if stage["kind"] == "rl":
        found["words"] = "Too early to say"
        sentence += " It takes held-out evaluations before and after some steps to tell."
    else:
        found["words"] = {"base": "A base model", "sft": "Fine-tuned"}[stage["kind"]]
        losses = [row["loss"] for row in stage["rows"] if row.get("loss") is not None]
        if losses:
            mean = sum(losses[-FEW:]) / len(losses[-FEW:])
            sentence += f" The loss is {mean:.3f} nats a token."
        bits = [row for row in stage["rows"] if row.get("val/bits_per_byte") is not None]
        if bits:
            sentence += f" {bits[-1]['val/bits_per_byte']:.3f} bits per byte on held-out text."
    return dict(found, sentence=sentence)


def progress(stage):
    done, planned = stage["rows"][-1]["step"], stage["settings"].get("steps")
    if not planned or done >= planned:
        return f"All {done:,} steps are done."
    return f"{done:,} of {planned:,} steps are done."


# ---- why -----------------------------------------------------------------------------------------


def reasons(stage):
    """An RL stage -> [(label, sentence)]: what the numbers say of why."""
    steps = [row for row in stage["rows"] if "reward" in row]
    if not steps:
        return []
    found = [warned(stage), training(steps), signal(steps), lengths(stage, steps)]
    found += [entropy(steps), cut_off(steps), by_heart(stage)]
    return [reason for reason in found if reason]


def ends(steps, name):
    """Means of a column over the first and over the last few steps, or None."""
    values = [row[name] for row in steps if isinstance(row.get(name), (int, float))]
    if not values:
        return None
    first, final = values[:FEW], values[-FEW:]
    return sum(first) / len(first), sum(final) / len(final)


def training(steps):
    found = ends(steps, "solved") or ends(steps, "reward/correct")
    if not found:
        return ()
    first, final = found
    words = f"{percent(first)} of the samples were right in the first steps, {percent(final)} in "
    words += "the last"
    formed = ends(steps, "reward/format")
    if formed and formed[1] < 0.9:
        words += f"; {percent(formed[1])} have the form that the task asks for"
    return "In training", words + "."


def signal(steps):
    found = ends(steps, "frac_reward_zero_std")
    if not found:
        return ()
    first, final = found
    words = f"{percent(first)} of the groups taught nothing in the first steps, {percent(final)} "
    words += "in the last"
    tokens = vain = 0
    for row in steps:
        if row.get("tokens_with_signal") is not None:
            tokens += row["tokens"]
            vain += row["tokens"] * (1 - row["tokens_with_signal"])
    if tokens:
        words += f"; {percent(vain / tokens)} of all sampled tokens went into such groups"
    return "Signal", f"{words}.{dead_at_the_end(steps) if final > 0.5 else ''}"


def dead_at_the_end(steps):
    """What it means that most groups are dead in the end: of right samples, or of wrong ones."""
    right = ends(steps, "solved") or ends(steps, "reward/correct")
    if not right:
        return ""
    why = "most samples are right: the task is nearly learnt, take a harder one"
    if right[1] < right[0] / 2:
        why = "most samples are wrong, which they were not at first: a lower --lr"
    elif right[1] < 0.5:
        why = "most samples are wrong: more SFT, an easier task or more samples a prompt"
    return f" At the end {why}."


def lengths(stage, steps):
    evaluations = [one for one in held_out(stage) if one["length"] is not None]
    if len(evaluations) > 1:
        before, after = evaluations[0]["length"], evaluations[-1]["length"]
        return "Length", f"Held-out answers went from {before:.1f} to {after:.1f} tokens."
    found = ends(steps, "completions/mean_length")
    if not found:
        return ()
    first, final = found
    return "Length", f"Completions went from {first:.1f} to {final:.1f} tokens."


def entropy(steps):
    found = ends(steps, "entropy")
    if not found:
        return ()
    first, final = found
    words = f"{first:.3f} nats a token in the first steps, {final:.3f} in the last"
    if final > first + 0.5 and final > 2 * first:
        words += ": the samples turn to noise, a lower --lr helps"
    elif final < first / 10:
        words += ": a problem's samples hardly differ any more"
    return "Entropy", words + "."


def cut_off(steps):
    found = ends(steps, "completions/clipped_ratio")
    if not found or found[1] <= 0.05:
        return ()
    words = f"{percent(found[1])} of the last completions were cut off, and earned nothing."
    return "Cut off", words


def by_heart(stage):
    rows = [row for row in stage["rows"] if row.get("train_set/accuracy") is not None]
    if not rows:
        return ()
    row = rows[-1]
    words = f"{percent(row['train_set/accuracy'])} of {row['train_set/n']} training problems are "
    words += f"solved greedily, {percent(row['val/accuracy'])} of the held-out ones"
    if row.get("train_set/p", 1) < 0.01:
        words += ": they are learnt by heart"
    return "By heart", words + "."


def warned(stage):
    texts = [event for event in stage["events"] if event.get("kind") == "warning"]
    if not texts:
        return ()
    number = "1 warning" if len(texts) == 1 else f"{len(texts)} warnings"
    first = texts[0]
    return "Warnings", f"{number}, the first at step {first['step']}: {first.get('text', '')}."


# ---- numbers in words ----------------------------------------------------------------------------


def percent(share):
    """0.9875 -> '98.8%'"""
    return f"{100 * share:.1f}%"


def points(share):
    """0.172 -> '+17.2', with a true minus for what is below 0."""
    return f"{100 * share:+.1f}".replace("-", "−")
