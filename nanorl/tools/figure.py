"""A run as one picture for a paper or a README, light and dark: matplotlib draws it.

Accuracy, in training and held-out, with the length of the answers and the groups without signal
below on the same axis.
"""

from nanorl.report import gather, verdict

# Ink, soft ink, rules, paper, and a colour for each curve.
LIGHT = dict(ink="#1d1f21", soft="#5d6166", rule="#dcdcd6", paper="#ffffff")
DARK = dict(ink="#e8e6e1", soft="#a3a6aa", rule="#34373b", paper="#0d1117")
LIGHT.update(held_out="#0b62a8", training="#b8500b")
DARK.update(held_out="#6fb3f0", training="#f0a05a")
THEMES = {"light": LIGHT, "dark": DARK}


def save(run, file, theme):
    """Draw gather.run of an RL run into a file, PNG or SVG by its name.

    theme: light or dark. Raises ValueError without matplotlib, and for a run without RL.
    """
    if run["about"]["kind"] != "rl":
        raise ValueError(f"{run['folder']} has no RL stage to draw: run train_rl.py first")
    try:
        import matplotlib
    except ImportError:
        raise ValueError("--png and --svg need matplotlib: pip install 'nanorl[plot]'") from None
    matplotlib.use("Agg")
    from matplotlib import pyplot

    colors = THEMES[theme]
    style = {"font.size": 10, "svg.fonttype": "none", "text.parse_math": False}
    style.update({"axes.edgecolor": colors["rule"], "axes.labelcolor": colors["soft"]})
    style.update({"xtick.color": colors["soft"], "ytick.color": colors["soft"]})
    with pyplot.rc_context(style):
        shape = dict(nrows=3, sharex=True, height_ratios=[3, 1, 1], figsize=(7.4, 5.4))
        figure, panels = pyplot.subplots(**shape)
        figure.set_facecolor(colors["paper"])
        rows = gather.with_derived(run["about"])
        draw_accuracy(panels[0], rows, colors)
        draw_length(panels[1], rows, colors)
        draw_dead(panels[2], rows, colors)
        for panel in panels:
            plain(panel, colors)
        panels[2].set_xlabel("step")
        head(figure, run, colors)
        figure.savefig(file, dpi=160, bbox_inches="tight", pad_inches=0.15)
        pyplot.close(figure)


def head(figure, run, colors):
    """The verdict above the curves."""
    found = verdict.verdict(run["about"])
    figure.text(0.06, 1.04, found["words"], size=15, weight="bold", color=colors["ink"])
    figure.text(0.06, 0.995, found["sentence"], size=9.5, color=colors["soft"])
    figure.subplots_adjust(left=0.06, right=0.86, top=0.92, bottom=0.08, hspace=0.35)


def plain(panel, colors):
    """Only what helps to read: faint rules across, no frame."""
    panel.set_facecolor(colors["paper"])
    panel.grid(axis="y", color=colors["rule"], linewidth=0.7)
    panel.set_axisbelow(True)
    for side in panel.spines.values():
        side.set_visible(False)
    panel.tick_params(length=0)


def title(panel, words, colors):
    panel.set_title(words, loc="left", size=10, color=colors["ink"])


def curve(rows, name):
    """-> (steps, values) of the rows that have a number of that name."""
    kept = [row for row in rows if isinstance(row.get(name), (int, float))]
    return [row["step"] for row in kept], [row[name] for row in kept]


def draw_accuracy(panel, rows, colors):
    title(panel, "Share correct, with 95% intervals", colors)
    steps, right = curve(rows, "right")
    line(panel, steps, right, "training", colors["training"], shown=True)
    steps, values = curve(rows, "val/accuracy")
    _, low = curve(rows, "val/low")
    _, high = curve(rows, "val/high")
    panel.vlines(steps, low, high, color=colors["held_out"], linewidth=1)
    line(panel, steps, values, "held-out", colors["held_out"], marker="o", shown=True)
    panel.set_ylim(-0.02, 1.04)
    panel.yaxis.set_major_formatter(as_percent)


def draw_length(panel, rows, colors):
    title(panel, "Length, tokens", colors)
    line(panel, *curve(rows, "completions/mean_length"), "training", colors["training"])
    line(panel, *curve(rows, "val/length"), "held-out", colors["held_out"], marker="o")
    panel.set_ylim(bottom=0)


def draw_dead(panel, rows, colors):
    title(panel, "Groups without signal", colors)
    steps, shares = curve(rows, "frac_reward_zero_std")
    line(panel, steps, shares, "", colors["training"], shown=True)
    for level in (0.25, 0.5):
        panel.axhline(level, color=colors["soft"], linewidth=0.8, linestyle=(0, (2, 3)))
    panel.set_ylim(-0.04, 1.04)
    panel.set_yticks([0, 0.25, 0.5, 1])
    panel.yaxis.set_major_formatter(as_percent)


def line(panel, steps, values, label, color, marker="", shown=False):
    """A curve with its name beside its end, not on colour alone. shown: as a share in percent."""
    if not steps:
        return
    dashes = "-" if marker else (0, (5, 2))
    panel.plot(steps, values, color=color, marker=marker, markersize=4.5, linestyle=dashes)
    final = f"{values[-1]:.1%}" if shown else f"{values[-1]:.1f}"
    # Names that would lie on one another stand above and below.
    above = 5 if marker else -7
    panel.annotate(
        f"{label} {final}".strip(),
        (steps[-1], values[-1]),
        xytext=(8, above),
        textcoords="offset points",
        va="center",
        color=color,
        weight="bold",
        annotation_clip=False,
    )


def as_percent(value, _position):
    return f"{value:.0%}"
