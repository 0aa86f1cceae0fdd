"""Which curves a report shows, and what they are made of: the page, the terminal and the paper's
chart draw the same ones. What each number means: docs/metrics.md."""

from dataclasses import asdict, dataclass

from nanorl.report import gather


@dataclass
class Line:
    """A column of the rows as a curve. points: a marker at each value, with its interval."""

    column: str
    label: str
    points: bool = False
    low: str = ""  # columns that hold the ends of an interval
    high: str = ""
    band: bool = False  # shade from the least to the most of the steps around


@dataclass
class Chart:
    """Some curves on one axis, in one unit."""

    name: str
    title: str
    unit: str  # share, or the words behind a number
    lines: list
    note: str = ""
    levels: list = ()  # [(value, label)]: lines across
    log: bool = False


HELD_OUT = Line("val/accuracy", "held-out", points=True, low="val/low", high="val/high")

RL = [
    Chart(
        "right",
        "Share correct",
        "share",
        [
            HELD_OUT,
            Line("right", "training"),
            Line(
                "train_set/accuracy",
                "trained problems",
                points=True,
                low="train_set/low",
                high="train_set/high",
            ),
        ],
        "Held-out and trained problems: one greedy answer each, with 95% intervals. "
        "Training: samples at the run's temperature, so it may lie lower.",
    ),
    Chart(
        "reward",
        "Reward",
        "",
        [Line("reward", "training"), Line("val/reward", "held-out", True)],
        "In its own unit: no share of right answers.",
    ),
    Chart(
        "dead",
        "Groups without signal",
        "share",
        [Line("frac_reward_zero_std", "groups")],
        "All samples of a prompt earn the same: nothing to compare.",
        [(0.25, "25%"), (0.5, "50%")],
    ),
    Chart(
        "vain",
        "Tokens in groups that teach nothing",
        "share",
        [Line("tokens_in_vain", "tokens")],
    ),
    Chart("entropy", "Entropy", "nats a token", [Line("entropy", "entropy")]),
    Chart(
        "kl",
        "KL to the starting weights",
        "nats a token",
        [Line("kl", "KL", band=True)],
        "The band spans the steps around.",
    ),
    Chart("grad", "Gradient norm", "", [Line("grad_norm", "norm")], "Before clipping.", log=True),
    Chart(
        "length",
        "Length",
        "tokens",
        [
            Line("completions/mean_length", "training"),
            Line("val/length", "held-out", True),
            Line("completions/max_length", "longest"),
        ],
    ),
    Chart(
        "cut",
        "Cut off",
        "share",
        [Line("completions/clipped_ratio", "training"), Line("val/clipped", "held-out", True)],
        "Completions without an end within --max_new_tokens.",
    ),
    Chart(
        "gap",
        "Sampler against learner",
        "nats",
        [Line("logp_diff/mean", "mean")],
        "Of the same tokens by the same weights.",
        log=True,
    ),
    Chart(
        "speed",
        "Tokens a second",
        "",
        [Line("tok_per_s/rollout", "sampled"), Line("tok_per_s/learner", "learnt")],
    ),
    Chart("occupancy", "Occupancy of decoding", "share", [Line("occupancy", "rows in use")]),
    Chart("memory", "Memory", "GB", [Line("memory/peak_gb", "peak")]),
    Chart("watts", "Power", "W", [Line("gpu/watts", "GPU")]),
    Chart("busy", "GPU in use", "share", [Line("gpu/utilization", "GPU")]),
]

SFT = [
    Chart(
        "loss", "Loss", "nats a token", [Line("loss", "training"), Line("val/loss", "held-out", 1)]
    ),
    Chart("right", "Share correct", "share", [HELD_OUT]),
    Chart("form", "Answers in the task's form", "share", [Line("val/format", "held-out", True)]),
    Chart("grad", "Gradient norm", "", [Line("grad_norm", "norm")], "Before clipping.", log=True),
]

BASE = [
    Chart("bits", "Bits per byte", "", [Line("val/bits_per_byte", "held-out", True)]),
    Chart("loss", "Loss", "nats a token", [Line("loss", "training")]),
    Chart("grad", "Gradient norm", "", [Line("grad_norm", "norm")], "Before clipping.", log=True),
]

CHARTS = {"rl": RL, "sft": SFT, "base": BASE}
AXES = ("step", "passes", "samples", "tokens", "FLOPs", "seconds")


def shown(kind, tables):
    """The charts of a kind of stage that some of the tables of rows have numbers for.

    Lines without a number are left out. tables: lists of rows, as gather.with_derived gives.
    """
    names = {name for rows in tables for row in rows for name in row if row[name] is not None}
    found = []
    for chart in CHARTS[kind]:
        lines = [line for line in chart.lines if line.column in names]
        if chart.name == "reward" and all(map(reward_is_the_share, tables)):
            continue
        if chart.name == "kl" and not any(row.get("kl") for rows in tables for row in rows):
            continue
        if lines:
            found.append(Chart(**{**vars(chart), "lines": lines}))
    return found


def reward_is_the_share(rows):
    """Whether the reward says the same as the share of right samples, so that one is enough."""
    return all(row["reward"] == row.get("right") for row in rows if "reward" in row)


def columns(charts, rows):
    """{column: its values} of all that some charts of a stage need, axes among them."""
    names = [f"x/{axis}" for axis in AXES]
    for chart in charts:
        for line in chart.lines:
            names += [name for name in (line.column, line.low, line.high) if name]
    found = {}
    for name in names:
        found[name] = [rounded(value) for value in gather.column(rows, name)]
    return found


def rounded(value):
    """To six digits: a page holds thousands of them."""
    return value if value is None else float(f"{value:.6g}")


def as_values(charts):
    """Charts as JSON-ready values."""
    return [asdict(chart) for chart in charts]
