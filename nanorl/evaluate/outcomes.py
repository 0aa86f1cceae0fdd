"""Problems -> outcomes: what a model answered, and what that was worth.

An outcome is a dict, with all that is needed to judge it again: index, prompt, answer, and of each
sample texts, rewards, solved, parts, lengths (in tokens), finished. Of a mixture also task, of
multiple choice chance.
Where the task's reward failed on a sample also errors: of each sample the reason, or None.
"""

import math
from typing import NamedTuple

from tqdm import tqdm

from nanorl import rollout
from nanorl.evaluate import continuations
from nanorl.evaluate.statistics import check_judged, more_often, summary
from nanorl.tasks import is_correct


class Sampling(NamedTuple):
    """How answers are sampled. Temperature 0 is greedy."""

    samples: int  # of each problem
    max_new_tokens: int
    temperature: float
    seed: int = 0


def by_sampling(engine, tokenizer, task, indices, sampling, progress=None, leave_long=False):
    """Sample the problems `indices` of a task -> an outcome each.

    leave_long: a prompt that does not fit the model's context is no error but a problem not solved.
    Raises ValueError for a model whose log-probs are not finite.
    """
    problems = [task.problem(i) for i in indices]
    fits = [True] * len(problems)
    if leave_long:
        fits = which_fit(engine, tokenizer, problems, sampling.max_new_tokens)
    asked = [problem for problem, is_asked in zip(problems, fits) if is_asked]
    keys = [
        rollout.prompt_key(sampling.seed, "eval", index)
        for index, is_asked in zip(indices, fits)
        if is_asked
    ]
    rollouts = rollout.generate(
        engine,
        tokenizer,
        task,
        asked,
        keys,
        samples_per_prompt=sampling.samples,
        max_new_tokens=sampling.max_new_tokens,
        temperature=sampling.temperature,
        progress=progress,
    )

    found, answered = [], iter(rollouts)
    for index, problem, is_asked in zip(indices, problems, fits):
        if is_asked:
            found.append(outcome_of(index, next(answered)))
        else:
            found.append(not_solved(index, problem, sampling.samples))
    return found


def outcome_of(index, rollout):
    completions = rollout.completions
    for completion in completions:
        check_finite(index, completion.logprobs)
    found = dict(
        about(index, rollout.problem),
        texts=rollout.texts,
        rewards=[reward.total for reward in rollout.rewards],
        solved=[is_correct(reward) for reward in rollout.rewards],
        parts=[reward.parts for reward in rollout.rewards],
        lengths=[len(completion.ids) for completion in completions],
        finished=[completion.finished for completion in completions],
    )
    if any(rollout.failures):
        found["errors"] = [failure and failure.text for failure in rollout.failures]
    return found


def by_likelihood(engine, tokenizer, task, indices, progress=None):
    """Multiple choice: the answer is the label that is likeliest as its first token.

    Where problems have choices, texts that go on from a prompt in plain text, it is the likeliest
    of these (continuations.py).
    -> an outcome each, with the labels' logprobs. Raises ValueError where they are not finite.
    """
    problems = [task.problem(i) for i in indices]
    in_plain_text = bool(problems) and "choices" in problems[0].meta
    if in_plain_text:
        fits = which_fit_with_choices(engine, tokenizer, problems)
        logprobs_of = continuations.mean_logprobs
    else:
        fits = which_fit(engine, tokenizer, problems, 0)
        logprobs_of = rollout.label_logprobs
    asked = [problem for problem, is_asked in zip(problems, fits) if is_asked]
    answered = iter(logprobs_of(engine, tokenizer, asked, progress))

    found = []
    for index, problem, is_asked in zip(indices, problems, fits):
        if not is_asked:
            found.append(not_solved(index, problem, samples=1))
            continue
        logprobs = dict(zip(problem.meta["labels"], next(answered)))
        check_finite(index, logprobs.values())
        label = max(logprobs, key=logprobs.get)
        solved = label == problem.answer
        outcome = about(index, problem)
        outcome.update(texts=[label], rewards=[float(solved)], solved=[solved])
        outcome.update(parts=[{"correct": float(solved)}], lengths=[1], finished=[True])
        found.append(dict(outcome, logprobs=logprobs))
    return found


def check_finite(index, logprobs):
    """Raise ValueError unless all are numbers: no answer can be read from NaN."""
    if not all(math.isfinite(logprob) for logprob in logprobs):
        raise ValueError(
            f"the model's log-probs are not finite on problem {index}: its weights are broken or "
            "too large, so take another checkpoint, or try --dtype=fp32"
        )


def which_fit(engine, tokenizer, problems, new_tokens):
    """-> of each problem whether its prompt, and so many new tokens, fit the model's context."""
    context = engine.learner.config.context
    lengths = [len(tokenizer.render_prompt(problem.prompt)) for problem in problems]
    return [length + new_tokens <= context for length in lengths]


def which_fit_with_choices(engine, tokenizer, problems):
    """-> of each problem whether its prompt in plain text fits with its longest choice."""
    fits = []
    for problem in problems:
        prompt = continuations.prompt_ids(tokenizer, problem)
        choices = continuations.choice_ids(tokenizer, problem)
        longest = max(map(len, choices))
        fits.append(len(prompt) + longest - 1 <= engine.learner.config.context)
    return fits


def about(index, problem):
    """What an outcome says of its problem."""
    found = dict(index=int(index), prompt=problem.prompt, answer=problem.answer)
    if problem.task:
        found["task"] = problem.task
    labels = problem.meta.get("labels")
    if labels:
        found["chance"] = 1 / len(labels)
    return found


def not_solved(index, problem, samples):
    """The outcome of a problem whose prompt does not fit the context."""
    return dict(
        about(index, problem),
        texts=[""] * samples,
        rewards=[0.0] * samples,
        solved=[False] * samples,
        parts=[{}] * samples,
        lengths=[0] * samples,
        finished=[False] * samples,
        too_long=True,
    )


def validate(engine, tokenizer, problems, settings, ranks, meter, log, step):
    """held_out, and the same of a fixed set of training problems -> metrics, train_set/...

    problems: a problems.Problems. ranks: see greedy. meter: a report.cost.Meter. log: a
    runtime.log.RunLog, which writes the answers to disk.
    """
    new_tokens = settings["max_new_tokens"]
    n = settings["eval_problems"]
    row, answers = held_out(engine, tokenizer, problems.val, n, new_tokens, ranks)
    meter.evaluation(engine)
    written = records(answers, "val", tokenizer, step)

    task, indices = problems.fixed()
    if indices:
        found, answers = greedy(engine, tokenizer, task, indices, new_tokens, ranks)
        meter.evaluation(engine)
        written += records(answers, "train", tokenizer, step)
        for name in ("accuracy", "low", "high", "n"):
            row[f"train_set/{name}"] = found[name]
        counts = []
        for part in ("train_set", "val"):
            solved = round(row[f"{part}/accuracy"] * row[f"{part}/n"])
            counts += [solved, row[f"{part}/n"] - row.get(f"{part}/too_long", 0)]
        row["train_set/p"] = more_often(*counts)
    log.evaluation(step, written)
    return row


def held_out(engine, tokenizer, task, n, max_new_tokens, ranks):
    """Greedy accuracy on a task's first n problems, the same ones every time.

    -> (metrics, val/...; outcomes). See greedy.
    """
    first = range(min(n, len(task)))
    found, answers = greedy(engine, tokenizer, task, first, max_new_tokens, ranks)
    return {f"val/{name}": value for name, value in found.items()}, answers


def greedy(engine, tokenizer, task, indices, max_new_tokens, ranks):
    """The likeliest answers to a task's problems `indices` -> (their summary, their outcomes).

    A prompt that does not fit the model's context is not solved. ranks: runtime.dist, by which all
    ranks share the work and know the summary. The first one alone has the outcomes.

    Raises ValueError where the reward failed on all of them.
    """
    mine = indices[ranks.share(len(indices))]
    how = Sampling(1, max_new_tokens, 0.0)
    with tqdm(total=len(mine), desc="held-out", disable=None, leave=False) as bar:
        found = by_sampling(engine, tokenizer, task, mine, how, bar.update, leave_long=True)
    answers = ranks.gather(found)
    found = ranks.broadcast(summary(answers) if ranks.is_main() else None)
    check_judged(found)
    return found, answers


def records(outcomes, split, tokenizer, step):
    """Outcomes of one sample each -> a JSON-ready record of each (docs/metrics.md)."""
    found = []
    for outcome in outcomes:
        record = {"step": step, "split": split, "index": outcome["index"]}
        if "task" in outcome:
            record["task"] = outcome["task"]
        # As the model saw it.
        record["prompt"] = tokenizer.decode(tokenizer.render_prompt(outcome["prompt"]))
        record["answer"] = outcome["answer"]
        record["completion"] = outcome["texts"][0]
        record["reward"] = outcome["rewards"][0]
        record["parts"] = outcome["parts"][0]
        record["correct"] = outcome["solved"][0]
        record["tokens"] = outcome["lengths"][0]
        record["finish"] = "stop" if outcome["finished"][0] else "length"
        if outcome.get("too_long"):
            record["finish"] = "too_long"  # the prompt does not fit: nothing was asked
        if any(outcome.get("errors", [])):
            record["error"] = outcome["errors"][0]
        found.append(record)
    return found
