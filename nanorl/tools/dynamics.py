"""The dynamics of RL at a checkpoint: what its gradient, its next step and its entropy do.

    python -m nanorl.tools.dynamics out/quickstart/rl/step_000020
    python -m nanorl.tools.dynamics out/quickstart/rl/step_0000{10,20,40} --measure=noise,change

    noise       tr Sigma and |g|^2 at these weights: is a step of P problems large enough?
    entropy     of held-out completions, by two estimators, and its gradient
    step        the next update by hand, from the optimizer's state; what makes it wrong
    change      what that update does to the entropy: to first and second order, and truly
    kernel      what learning one completion does to others, and to the entropy
    covariance  which tokens make the entropy fall
    online      tr Sigma and |g|^2 of a run with --noise_scale, over a --window of its steps

The checkpoint is one of train_rl.py, with its trainer.pt; `train_rl.py --keep=all` keeps more than
the last ones. The next step is the run's own: its problems, its samples. Nothing is changed.

What is found is printed, and with --out=<folder> also written: dynamics.json, and dynamics.png, a
page of plots over the checkpoints. docs/dynamics.md derives each formula and says what it assumes.
"""

import copy
import json
import os
import sys
import time
from dataclasses import dataclass

import torch

from nanorl import grpo, rollout
from nanorl.dynamics import change as changes
from nanorl.dynamics import covariance as covariances
from nanorl.dynamics import entropy as entropies
from nanorl.dynamics import kernel as kernels
from nanorl.dynamics import noise as noises
from nanorl.dynamics import step as steps
from nanorl.dynamics import vectors
from nanorl.dynamics.measured import sequences_of
from nanorl.dynamics.source import load
from nanorl.hf import load_model
from nanorl.optim import update
from nanorl.runtime import checkpoint, dist
from nanorl.runtime.config import at_least, configure
from nanorl.tools import dynamics_report as report

measure = "noise,entropy,step,change,kernel,covariance"  # which, in this order
small = False  # few problems and completions: a look in under a minute
problems = 512  # noise: problems at these weights, two groups each
completions = 512  # entropy, change: held-out ones, of a problem each
prompts = 0  # step, change, kernel, covariance: problems of the next step; 0: the run's P
dtype = "fp64"  # fp64, or fp32: half the memory, and the precision floor of a run in fp32
window = 20  # online: steps up to the checkpoint's
out = ""  # a folder for dynamics.json and the page of plots; empty: only print

DTYPES = {"fp64": torch.float64, "fp32": torch.float32}
BLOCKS = 16  # of problems, for the noise


def main():
    paths = [argument for argument in sys.argv[1:] if not argument.startswith("--")]
    settings = configure(globals(), [a for a in sys.argv[1:] if a.startswith("-")])
    names = measure.split(",")
    check(paths, names)
    sizes = Sizes(problems, completions, prompts)
    if small:
        sizes = Sizes(2 * BLOCKS, 64, prompts or 4)

    found = []
    for path in paths:
        source = load(path, DTYPES[dtype])
        print(report.heading(source, dtype), flush=True)
        of_path = dict(path=source.path, after=source.step, settings=settings)
        next_step = None
        for name in names:
            begun = time.time()
            if name in ("step", "change", "kernel", "covariance") and next_step is None:
                next_step = NextStep(source, sizes)
            of_path[name] = MEASURES[name](source, sizes, next_step)
            of_path[name]["seconds"] = time.time() - begun
            print(*report.LINES[name](of_path[name]), sep="\n", flush=True)
        print(*report.in_words(of_path), sep="\n", flush=True)
        found.append(of_path)
        if out:
            write(found)


def check(paths, names):
    """Refuse what cannot be measured, with the remedy."""
    if not paths:
        raise SystemExit("name a checkpoint of RL, such as out/quickstart/rl (--help says more)")
    unknown = set(names) - set(MEASURES)
    if unknown:
        known = ", ".join(MEASURES)
        raise SystemExit(f"--measure={','.join(sorted(unknown))}: it takes some of {known}")
    if dtype not in DTYPES:
        raise SystemExit(f"--dtype={dtype}: it must be fp64 or fp32")
    at_least(globals(), 2 * BLOCKS, "problems")
    at_least(globals(), 2, "completions window")
    at_least(globals(), 0, "prompts")
    if prompts == 1:
        raise SystemExit("--prompts=1: at least 2, because pairs of prompts are compared")


def write(found):
    """dynamics.json and dynamics.png of the checkpoints so far."""
    os.makedirs(out, exist_ok=True)
    with open(os.path.join(out, "dynamics.json"), "w", encoding="utf-8") as f:
        json.dump(found, f, indent=1)
    page = os.path.join(out, "dynamics.png")
    if not report.plot(found, page):
        print("no page of plots: `pip install matplotlib` first")


@dataclass
class Sizes:
    """How much is sampled: see the constants of these names."""

    problems: int
    completions: int
    prompts: int


class NextStep:
    """The update that the run's next step would make, or one of its first problems alone.

    sequences (B completions), advantages and a (B,) each (a as in dynamics/kernel.py), g the loss's
    gradient, update, and u = v / lr in the precision of the weights.
    """

    def __init__(self, source, sizes):
        settings, measured = source.settings, source.measured
        P = sizes.prompts or settings["prompts_per_step"]
        if not source.lr:
            raise ValueError("the next step's learning rate is 0: name an earlier checkpoint")
        rollouts = source.next_batch(P)
        gain, N = noises.gain_gradient(measured, rollouts, settings)
        self.prompts, self.N = P, N
        self.sequences = sequences_of(rollouts)
        self.g = vectors.scaled(gain, -1 / N)
        self.max_norm = settings["max_grad_norm"]
        step = source.optimizers, source.named, self.g, source.scale, self.max_norm
        self.update = steps.update(*step)
        u = vectors.scaled(self.update.v, 1 / source.lr)
        self.u = vectors.like(u, measured.theta)

        G = settings["samples_per_prompt"]
        rewards = rollout.reward_table(rollouts, G)
        self.advantages = grpo.advantages(rewards, settings["advantage"]).flatten()
        lengths = rollout.length_table(rollouts, G)
        counted = None
        if settings["overlong"] == "mask":
            counted = rollout.finished_table(rollouts, G)
        most = settings["max_new_tokens"]
        weights = grpo.token_weights(lengths, settings["loss_norm"], most, counted)
        self.factor = steps.clip_factor(self.g, self.max_norm)
        self.a = self.factor / N * weights.flatten() * self.advantages


# ---- the measures: (source, sizes, next step) -> a dict of numbers -------------------------------


def measure_noise(source, sizes, _next_step):
    settings, measured = source.settings, source.measured
    G, P = settings["samples_per_prompt"], settings["prompts_per_step"]
    size = sizes.problems // BLOCKS
    asked = source.drawn("noise", "train", size * BLOCKS)
    halves = [source.sample(measured.theta, name, "train", asked, G) for name in ("one", "two")]
    _, tokens = noises.step_batches(measured, halves[0] + halves[1], settings)
    mean_tokens = tokens / (2 * len(asked))  # of a group

    def pairs():
        for rollouts in zip(*halves):
            pair = []
            for one in rollouts:
                gain, _ = noises.gain_gradient(measured, [one], settings)
                pair.append(vectors.flat(gain) / mean_tokens)
            yield pair

    blocks = noises.blocks_of(pairs(), size)
    found = dict(problems=len(asked), samples=G, prompts=P)
    for name in ("signal", "trace", "within", "between", "scale"):
        found[name] = noises.jackknife(blocks, lambda one, name=name: getattr(one, name))
    scale, error = found["scale"]
    found["to_signal"] = scale / P, error / P
    found["more_samples"] = noises.more_samples(noises.noise(blocks))
    found["law"] = []
    for together in (1, 2, 4, 8):
        observed = noises.observed_variance(blocks, together)
        found["law"].append((together * size, observed))
    return found


def measure_entropy(source, sizes, _next_step):
    measured = source.measured
    sequences = source.held_out("entropy", sizes.completions)
    logprobs, H = entropies.tokens_at(measured, measured.theta, sequences)
    blackwell, plain = entropies.estimates(logprobs, H)
    with_score = entropies.entropy_gradient(measured, sequences)
    without = entropies.entropy_gradient(measured, sequences, with_score=False)
    return dict(
        completions=len(sequences),
        H=vars(blackwell),
        minus_logp=vars(plain),
        tokens=float(sequences.lengths.double().mean()),
        gradient_norm=vectors.norm(with_score),
        without_score_norm=vectors.norm(without),
        without_score_cosine=vectors.cosine(without, with_score),
    )


def measure_step(source, _sizes, next_step):
    named, optimizers = copy.deepcopy((source.named, source.optimizers))
    g, v, max_norm = next_step.g, next_step.update.v, next_step.max_norm
    before = {name: p.detach().double().clone() for name, p in named.items()}
    for name, p in named.items():
        p.grad = g[name].to(p.dtype).clone()
    update(optimizers, list(named.values()), source.scale, max_norm)
    true = {name: p.detach().double() - before[name] for name, p in named.items()}

    found = dict(prompts=next_step.prompts, lr=source.lr, rule=source.settings["optimizer"])
    found["gradient_norm"], found["clipped_by"] = vectors.norm(g), next_step.factor
    found["norm"] = vectors.norm(v)
    found["largest"] = max(float(x.abs().max()) for x in v.values())
    found["off"] = vectors.norm(vectors.plus(v, true, -1.0)) / vectors.norm(true)
    found["parts"] = {}
    for name in ("gradient", "momentum", "decay"):
        part = getattr(next_step.update, name)
        found["parts"][name] = vectors.dot(part, v) / vectors.dot(v, v)
    step = source.optimizers, source.named, g, source.scale, max_norm
    found["mistakes"] = steps.mistakes(*step)
    found["on_disk"] = compare_with_disk(source, next_step)
    return found


def compare_with_disk(source, next_step):
    """v beside what the run itself did next, where that checkpoint is -> (norm ratio, cosine).

    None where it is not, or where the two are not of the same groups and objective.
    """
    settings, v = source.settings, next_step.update.v
    alike = next_step.prompts == settings["prompts_per_step"] and not report.left_out(settings)
    following = checkpoint.path_of(os.path.dirname(source.path), source.step + 1)
    if not alike or not checkpoint.is_model(following):
        return None
    after = checkpoint.load_state(following)["lora"]
    if not after:
        after = dict(load_model(following, torch.float64).named_parameters())
    true = {}
    for name, p in source.named.items():
        true[name] = after[name].detach().double() - p.detach().double()
    return vectors.norm(v) / vectors.norm(true), vectors.cosine(v, true)


def measure_change(source, sizes, next_step):
    measured, u, lr = source.measured, next_step.u, source.lr
    sequences = source.held_out("change", sizes.completions)
    first, second = changes.expansion(measured, sequences, u)
    etas = sorted({*changes.ETAS, lr})
    points = changes.curve(measured, sequences, u, etas)
    at_lr = points[etas.index(lr)]

    # Afresh: the same problems and random numbers, sampled after the step.
    moved = vectors.plus(measured.theta, u, lr)
    others = source.held_out("change", sizes.completions, moved)
    _, H_before = entropies.tokens_at(measured, measured.theta, sequences)
    _, H_after = entropies.tokens_at(measured, moved, others)
    fresh = entropies.estimate(H_after.sum(1) - H_before.sum(1))
    found = dict(completions=len(sequences), lr=lr, effective=at_lr.effective)
    found["H"] = vars(entropies.estimate(H_before.sum(1)))
    found["first"], found["second"] = vars(first), vars(second)
    found["one"], found["one_error"] = lr * first.mean, lr * first.error
    found["two"], found["two_error"] = lr**2 / 2 * second.mean, lr**2 / 2 * second.error
    found["curve"] = [(p.eta, p.change.mean, p.change.error, p.effective) for p in points]
    found["at_lr"], found["fresh"] = vars(at_lr.change), vars(fresh)
    found["linear"] = changes.linear_range(points, first.mean)
    return found


def measure_kernel(source, sizes, next_step):
    if next_step.update.M is None:
        raise ValueError("Muon has no diagonal preconditioner, so there is no kernel of its step")
    measured, sequences, a = source.measured, next_step.sequences, next_step.a
    v = next_step.update
    K = kernels.kernel(measured, sequences, v.M)
    foreseen = K @ a  # (B,) of each log pi(t), by this gradient alone

    # Truth: this gradient's part of the step, and the whole step.
    logp = logprobs_after(measured, sequences, None)  # (B,), as the next two
    true = logprobs_after(measured, sequences, v.gradient) - logp
    whole = logprobs_after(measured, sequences, v.v) - logp
    found = dict(B=len(sequences), prompts=next_step.prompts)
    found["moved"] = float(true.abs().mean())
    found["moved_by_all"] = float(whole.abs().mean())
    found["foreseen_off"] = float((foreseen - true).norm() / true.norm())
    hundredth = logprobs_after(measured, sequences, vectors.scaled(v.gradient, 0.01)) - logp
    found["linear_off"] = float((foreseen / 100 - hundredth).norm() / hundredth.norm())
    both = torch.stack([foreseen, true])
    found["foreseen_correlation"] = float(torch.corrcoef(both)[0, 1])
    own = K.diagonal() * a  # (B,)
    found["own"] = float(own.abs().sum() / foreseen.abs().sum())

    # The entropy: by pairs in the batch, and of other problems.
    h = kernels.centred(logp, sequences.group)
    found["split"] = kernels.entropy_split(K, h, a, sequences)
    found["U"] = kernels.between_groups(K, h, a, sequences.group)
    others = source.held_out("kernel", sizes.completions)
    for name in ("gradient", "momentum"):
        part = vectors.like(getattr(v, name), measured.theta)
        found[name] = vars(changes.slope(measured, others, part))
    return found


def logprobs_after(measured, sequences, v):
    """log pi(t) at theta + v, (B,) in fp64. v None: 0."""
    theta = measured.theta
    if v is not None:
        theta = vectors.plus(theta, vectors.like(v, theta))
    logprobs, _ = entropies.tokens_at(measured, theta, sequences)
    return logprobs.double().sum(1)


def measure_covariance(source, sizes, next_step):
    if next_step.update.M is None:
        raise ValueError("Muon has no diagonal preconditioner: tokens have no shares of its step")
    measured, sequences = source.measured, next_step.sequences
    others = source.held_out("kernel", sizes.completions)
    H_gradient = entropies.entropy_gradient(measured, others)
    M = vectors.like(next_step.update.M, measured.theta)
    shares = covariances.entropy_shares(measured, sequences, next_step.a, H_gradient, M)
    logprobs, _ = entropies.tokens_at(measured, measured.theta, sequences)
    sampled, A = sequences.sampled, next_step.advantages
    cov = covariances.covariances(logprobs.double(), A, sampled)
    shares = shares.double()

    found = dict(tokens_in_all=int(sampled.sum()), change=float(shares.sum()))
    found["covariance"] = float(cov[sampled].mean())
    found["correlation"] = covariances.rank_correlation(cov[sampled], -shares[sampled])
    found["tops"] = []
    for part in (0.002, 0.01, 0.05, 0.2):
        best = covariances.top(cov, shares, logprobs, A, sampled, part)
        found["tops"].append(dict(part=part, **vars(best)))

    found["tokens"] = []
    order = cov.abs().flatten().argsort(descending=True)
    for i in order[:10].tolist():
        row, k = divmod(i, cov.size(1))
        text = source.tokenizer.decode([int(sequences.targets[row, k])])
        numbers = cov[row, k], logprobs[row, k], A[row], shares[row, k]
        found["tokens"].append((text, *map(float, numbers)))
    return found


def measure_online(source, _sizes, _next_step):
    """Of a run with --noise_scale: its log's numbers over a window of steps."""
    with open(os.path.join(os.path.dirname(source.path), "metrics.jsonl"), encoding="utf-8") as f:
        rows = [json.loads(line) for line in f]
    rows = [row for row in rows if row["step"] <= source.step and row.get("noise/trace")]
    rows = rows[-window:]
    if len(rows) < 2:
        raise ValueError(f"the run of {source.path} logs no noise: train with --noise_scale")
    traces, signals = [[row[f"noise/{name}"] for row in rows] for name in ("trace", "signal")]
    found = dict(steps=len(rows), prompts=source.settings["prompts_per_step"])
    for name, values in (("trace", traces), ("signal", signals)):
        estimate = entropies.estimate(torch.tensor(values, dtype=torch.float64))
        found[name] = estimate.mean, estimate.error
    found["scale"] = noises.windowed(traces, signals)
    scale, error = found["scale"]
    found["to_signal"] = scale / found["prompts"], error / found["prompts"]
    return found


MEASURES = {
    "online": measure_online,
    "noise": measure_noise,
    "entropy": measure_entropy,
    "step": measure_step,
    "change": measure_change,
    "kernel": measure_kernel,
    "covariance": measure_covariance,
}


if __name__ == "__main__":
    dist.run(main)
