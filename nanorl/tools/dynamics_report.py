"""How dynamics.py's numbers are worded, and its page of plots.

A template takes what the measure of its name gave, a dict.
"""

NOISE = """\
noise ({seconds:.0f} s): {problems} problems x 2 groups of {samples}, before clipping
  tr Sigma {trace[0]:.4g} +- {trace[1]:.2g}, |g|^2 {signal[0]:.4g} +- {signal[1]:.2g}
  tr Sigma within a problem {within[0]:.4g} +- {within[1]:.2g}, between {between[0]:.4g} +- \
{between[1]:.2g}"""
LAW = "  a batch of {0:4} problems varies by {1:.3g}, times {0}: {2:.3g} (law: tr Sigma)"
SCALE = """\
  noise scale tr Sigma / |g|^2: {scale[0]:.4g} +- {scale[1]:.2g} problems
  noise to signal of a step of {prompts}, tr Sigma / (P |g|^2): {to_signal[0]:.3g} +- \
{to_signal[1]:.2g}"""
ONLINE = """\
online ({seconds:.0f} s): the last {steps} steps of {prompts} problems, before clipping
  mean tr Sigma {trace[0]:.4g} +- {trace[1]:.2g}, mean |g|^2 {signal[0]:.4g} +- {signal[1]:.2g}"""
NO_SCALE = "  |g|^2 is not told from 0, so there is no noise scale: raise --problems"
NO_STEPS = "  |g|^2 is not told from 0, so there is no noise scale: a longer --window"

ENTROPY = """\
entropy ({seconds:.0f} s): {completions} held-out completions, of {tokens:.1f} tokens
  H in nats a completion: by sum H_k {H[mean]:.4g} +- {H[error]:.2g}, by - log p \
{minus_logp[mean]:.4g} +- {minus_logp[error]:.2g}
  variance of a completion {H[variance]:.3g} and {minus_logp[variance]:.3g}
  |grad H| {gradient_norm:.4g}; without the score term {without_score_norm:.4g}, cosine \
{without_score_cosine:.3f}"""

STEP = """\
step ({seconds:.0f} s): {prompts} problems, {rule} {lr:g}; |g| {gradient_norm:.3g}, times \
{clipped_by:.3g} by clipping
  |v| {norm:.4g}, its largest number {largest:.3g}
  along v: gradient {parts[gradient]:.1%}, momentum {parts[momentum]:.1%}, decay {parts[decay]:.1%}
  by hand and by the optimizer: difference / norm {off:.1e}"""
ON_DISK = "  the run's own next step: norm ratio {on_disk[0]:.6f}, cosine {on_disk[1]:.6f}"
MISTAKES = "  one mistake each                               norm ratio    cosine"
MISTAKE = "    {0:44} {1:10.4f} {2:10.4f}"

CHANGE = """\
change ({seconds:.0f} s): H {H[mean]:.4g} +- {H[error]:.2g} of {completions} held-out completions
  at the rate used, {lr:g}: first order {one:.4g} +- {one_error:.2g}, second {two:.4g} +- \
{two_error:.2g}
  true: by importance sampling {at_lr[mean]:.4g} +- {at_lr[error]:.2g} ({effective:.0f} \
completions count), afresh {fresh[mean]:.4g} +- {fresh[error]:.2g}
         eta       change   change/eta  first order   count"""
POINT = "    {0:8.1e} {1:12.4e} {4:12.5g} {5:12.5g} {3:7.0f}"
LINEAR = "  linear (within 10%) from {linear[0]:.1e} to {linear[1]:.1e}; the rate used is {lr:.1e}"
NO_SLOPE = "  the first order is not told from 0: raise --completions to see where it holds"
NOT_LINEAR = "  change / eta is the slope at no eta: rounding hides what curvature leaves"

KERNEL = """\
kernel ({seconds:.0f} s): {B} completions of {prompts} prompts
  this gradient moves log pi(t) by {moved:.3g} on average, the whole step by {moved_by_all:.3g}
  sum K a foresees that: difference / norm {foreseen_off:.3f}, correlation \
{foreseen_correlation:.4f}; at a hundredth of the rate {linear_off:.4f}
  of a completion's sum K a its own term is {own:.0%} in size
  delta H of this gradient, by pairs: a completion acts on
    itself {split[itself]:.4g}, its copies {split[its copies]:.4g}, its prompt \
{split[its prompt]:.4g}, other prompts {split[other prompts]:.4g}
    of all pairs V {split[V]:.4g} (biased), of different prompts U {U[0]:.4g} +- {U[1]:.2g} \
(unbiased)
  on held-out problems, grad H . v: this gradient {gradient[mean]:.4g} +- {gradient[error]:.2g}, \
momentum {momentum[mean]:.4g} +- {momentum[error]:.2g}"""

COVARIANCE = """\
covariance ({seconds:.0f} s): of {tokens_in_all} tokens, mean {covariance:.4g}; delta H of this \
gradient {change:.4g}
  rank correlation of cov_k and - d_k: {correlation:.3f}
  largest |cov_k|      sum of d_k   unlikely   in wrong answers"""
TOP = "    {part:6.1%} ({tokens:5}) {change:14.4g} {unlikely:10.0%} {wrong:18.0%}"
TOKENS = "  token            cov_k    log pi   advantage          d_k"
TOKEN = "    {0!r:12} {1:8.3f} {2:9.3f} {3:11.3f} {4:12.3e}"


def heading(source, dtype):
    settings = source.settings
    n = sum(p.numel() for p in source.named.values())
    of = "of LoRA's adapters" if source.measured.adapters else "parameters"
    lines = [f"{source.path}: after step {source.step}, {n:,} {of}, in {dtype}"]
    step = "  a step is {prompts_per_step} problems x {samples_per_prompt} samples, {optimizer} "
    lines.append(step.format_map(settings) + f"{source.lr:g}")
    lines += [f"  WARNING: {text}" for text in left_out(settings)]
    return "\n".join(lines)


def left_out(settings):
    """What the run does and the measurements do not."""
    found = []
    if settings["kl_coef"]:
        found.append(f"the gradient is without the KL term, --kl_coef={settings['kl_coef']:g}")
    if settings["updates_per_rollout"] > 1:
        found.append("of the updates on a step's samples only the first is measured")
    if settings["resample"]:
        found.append(f"groups without signal are not replaced, --resample={settings['resample']}")
    return found


# ---- a measure's lines ---------------------------------------------------------------------------


def noise_lines(found):
    lines = [NOISE.format_map(found)]
    for problems, variance in found["law"]:
        lines.append(LAW.format(problems, variance, problems * variance))
    lines.append(SCALE.format_map(found) if has_signal(found) else NO_SCALE)
    return lines


def online_lines(found):
    return [ONLINE.format_map(found), SCALE.format_map(found) if has_signal(found) else NO_STEPS]


def has_signal(found):
    """Whether |g|^2 is told from 0: else no ratio to it means anything."""
    value, error = found["signal"]
    return value > 2 * error


def entropy_lines(found):
    return [ENTROPY.format_map(found)]


def step_lines(found):
    lines = [STEP.format_map(found)]
    if found["on_disk"]:
        lines.append(ON_DISK.format_map(found))
    lines.append(MISTAKES)
    for name, numbers in found["mistakes"].items():
        lines.append(MISTAKE.format(name, *numbers))
    return lines


def change_lines(found):
    lines = [CHANGE.format_map(found)]
    slope = found["first"]["mean"]
    for point in found["curve"]:
        ratio = point[1] / point[0]
        lines.append(POINT.format(*point, ratio, slope))
    return [*lines, range_of_eta(found)]


def range_of_eta(found):
    """Where the linear formula holds."""
    if not has_slope(found):
        return NO_SLOPE
    return LINEAR.format_map(found) if found["linear"] else NOT_LINEAR


def has_slope(found):
    """Whether grad H . u is told from 0: else nothing can be linear in it."""
    return abs(found["one"]) > 2 * found["one_error"]


def kernel_lines(found):
    return [KERNEL.format_map(found)]


def covariance_lines(found):
    lines = [COVARIANCE.format_map(found)]
    lines += [TOP.format_map(top) for top in found["tops"]]
    lines.append(TOKENS)
    lines += [TOKEN.format(*token) for token in found["tokens"]]
    return lines


LINES = {
    "online": online_lines,
    "noise": noise_lines,
    "entropy": entropy_lines,
    "step": step_lines,
    "change": change_lines,
    "kernel": kernel_lines,
    "covariance": covariance_lines,
}


# ---- the answers ---------------------------------------------------------------------------------

SAMPLES = """\
  More prompts or more samples? For twice the completions, twice the prompts leave half of the
    noise, twice the samples of a prompt {more_samples:.0%}."""
ENOUGH = """\
  Is the batch large enough? Of a step's squared gradient {share:.0%} is noise, on average.
  May I double the rate? Twice the prompts pay for {twice:.2f} times the rate, by SGD's law; at
    these prompts that is for the curvature to say."""
NOT_TOLD = "  Is the batch large enough? Not told: |g|^2 is lost in the noise (raise --problems)."
NO_ANSWER = """\
  Does the linear formula hold at the rate used? To first order the change is not told from 0."""
HOLDS = """\
  Does the linear formula hold at the rate used? {holds}: it foresees {one:.4g}, and the entropy
    changes by {at_lr[mean]:.4g}."""
EXPLAINS = """\
  What does the step do to the entropy? On held-out problems, to first order: this gradient
    {gradient[mean]:.4g} +- {gradient[error]:.2g}, older ones through the momentum \
{momentum[mean]:.4g} +- {momentum[error]:.2g}.
  Do a completion's own terms explain it? On the batch itself they are {split[itself]:.4g} of \
{split[V]:.4g}.
    On prompts that are not in the batch there are none, and it is {U[0]:.4g} +- {U[1]:.2g}."""


def in_words(found):
    """What the measures of one checkpoint say together."""
    lines = []
    if "noise" in found:
        lines += noise_answers(found["noise"])
    if "change" in found:
        lines.append(linear_answer(found["change"]))
    if "kernel" in found:
        lines.append(EXPLAINS.format_map(found["kernel"]))
    return ["in words", *lines] if lines else []


def noise_answers(found):
    lines = [SAMPLES.format_map(found)]
    if not has_signal(found):
        return [*lines, NOT_TOLD]
    # The best rate goes as 1 / (1 + noise to signal).
    r = found["to_signal"][0]
    twice = (1 + r) / (1 + r / 2)
    return [*lines, ENOUGH.format(share=r / (1 + r), twice=twice)]


def linear_answer(found):
    if not has_slope(found):
        return NO_ANSWER
    true = found["at_lr"]["mean"]
    off = abs(true - found["one"])
    holds = "Yes, within 10%" if off <= 0.1 * abs(true) else "No"
    return HOLDS.format_map({**found, "holds": holds})


# ---- the page of plots ---------------------------------------------------------------------------


def plot(found, path):
    """A page over checkpoints -> whether there is one: it needs matplotlib."""
    try:
        import matplotlib
    except ImportError:
        return False
    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(2, 3, figsize=(15, 8.5), dpi=110)
    panels = (plot_noise, plot_law, plot_entropy, plot_linear, plot_split, plot_tokens)
    for panel, axis in zip(panels, axes.flatten()):
        panel(axis, found)
        axis.grid(alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
        handles, _ = axis.get_legend_handles_labels()
        if handles:
            axis.legend()
    figure.tight_layout()
    figure.savefig(path)
    pyplot.close(figure)
    return True


def of_measure(found, name):
    """-> (number, step, numbers) of the checkpoints that have this measure."""
    return [(i, one["after"], one[name]) for i, one in enumerate(found) if name in one]


def plot_noise(axis, found):
    axis.set_title("noise scale, where |g|^2 is told from 0")
    axis.set_xlabel("step (dotted: problems of a step)")
    axis.set_ylabel("tr Sigma / |g|^2, problems")
    for i, step, noise in of_measure(found, "noise"):
        axis.axhline(noise["prompts"], color="grey", linestyle=":")
        if has_signal(noise):
            scale, error = noise["scale"]
            axis.errorbar(step, scale, 2 * error, marker="o", color=f"C{i}", capsize=3)


def plot_law(axis, found):
    axis.set_title("variance of a batch's gradient")
    axis.set_xlabel("problems (line: tr Sigma / problems)")
    for i, step, noise in of_measure(found, "noise"):
        trace, _ = noise["trace"]
        sizes, variances = zip(*noise["law"])
        expected = [trace / size for size in sizes]
        axis.loglog(sizes, variances, "o", color=f"C{i}", label=f"step {step}")
        axis.loglog(sizes, expected, color=f"C{i}")


def plot_entropy(axis, found):
    axis.set_title("entropy of held-out completions, 2 standard errors")
    axis.set_xlabel("step")
    axis.set_ylabel("nats a completion")
    for name, label, shift in (("H", "sum H_k", 0.0), ("minus_logp", "- log p", 0.5)):
        steps, means, errors = [], [], []
        for _, step, entropy in of_measure(found, "entropy"):
            steps.append(step + shift)
            means.append(entropy[name]["mean"])
            errors.append(2 * entropy[name]["error"])
        axis.errorbar(steps, means, errors, marker="o", capsize=3, label=label)


def plot_linear(axis, found):
    axis.set_title("true change / first order")
    axis.set_xlabel("eta (dotted: the rate used)")
    axis.set_ylim(-0.5, 1.5)
    for i, step, change in of_measure(found, "change"):
        slope = change["first"]["mean"]
        etas = [point[0] for point in change["curve"]]
        ratios = [point[1] / point[0] / slope for point in change["curve"]]
        label, style = f"step {step}", "o-"
        if not has_slope(change):
            label, style = f"step {step}: the slope is not told from 0", "o:"
        axis.semilogx(etas, ratios, style, color=f"C{i}", label=label)
        axis.axvline(change["lr"], color=f"C{i}", linestyle=":")


def plot_split(axis, found):
    axis.set_title("delta H of the next step, first order")
    names = ("itself", "its copies", "its prompt", "other prompts", "U", "held out", "momentum")
    width = 0.8 / len(found)
    for i, step, kernel in of_measure(found, "kernel"):
        values = dict(kernel["split"], U=kernel["U"][0])
        values["held out"] = kernel["gradient"]["mean"]
        values["momentum"] = kernel["momentum"]["mean"]
        heights = [values[name] for name in names]
        left = i * width - 0.4 + width / 2
        lefts = [number + left for number in range(len(names))]
        axis.bar(lefts, heights, width, label=f"step {step}")
    axis.set_xticks(range(len(names)), names, rotation=20)
    axis.axhline(0, color="black", linewidth=0.8)


def plot_tokens(axis, found):
    axis.set_title("delta H of the tokens with the largest |cov_k|")
    axis.set_xlabel("share of the tokens")
    for _, step, covariance in of_measure(found, "covariance"):
        parts = [top["part"] for top in covariance["tops"]]
        sums = [top["change"] for top in covariance["tops"]]
        axis.semilogx([*parts, 1.0], [*sums, covariance["change"]], "o-", label=f"step {step}")
    axis.axhline(0, color="black", linewidth=0.8)
