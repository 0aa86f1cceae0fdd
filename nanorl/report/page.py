"""A run as one page: a file that opens anywhere, without a server and without a network.

The page is assets/page.html with the run's numbers as JSON, its rollouts as chunks (embed.py), and
the scripts beside it. What a model has written reaches the reader as text alone: `<` is escaped in
all JSON, chunks are base64, and a policy allows no script but those that stand in the file.
"""

import base64
import hashlib
import html
import os
import time
from importlib import resources

from nanorl.report import charts, gather, verdict
from nanorl.report.embed import DURING_BYTES, MOST_BYTES, Embedded, packed
from nanorl.runtime.log import to_json

SCRIPTS = ("chart.js", "page.js", "rollouts.js")
MOST_SHARE = 0.01  # of a run's time goes into pages that are written on the way
FIRST_SECONDS = 1.0  # what the first page is thought to take


def write(paths, file, most_bytes=MOST_BYTES):
    """Make the page of some runs -> the bytes of the file.

    Raises ValueError for a folder without a run.
    """
    runs = [gather.run(path) for path in paths]
    text = page(runs, most_bytes).encode("utf-8", "replace")
    with open(file + ".tmp", "wb") as f:
        f.write(text)
    os.replace(file + ".tmp", file)
    return len(text)


def file_of(folder, stage):
    """Where the page of a run's stage goes: a second RL stage has one of its own."""
    name = "report" if stage in ("base", "sft", "rl") else f"report_{stage}"
    return os.path.join(folder, f"{name}.html")


def page(runs, most_bytes):
    """gather.run of each -> the page's text."""
    chunks, shown = {}, []
    for number, (run, label) in enumerate(zip(runs, labels(runs))):
        embedded = Embedded(run["about"], most_bytes / len(runs))
        for name, text in embedded.chunks.items():
            chunks[f"r{number}-{name}"] = text
        chunks[f"r{number}-pieces"] = packed(embedded.pieces)
        shown.append(run_values(run, label, embedded))

    kinds = {}
    for kind in charts.CHARTS:
        kinds[kind] = charts.as_values(charts.shown(kind, tables_of(runs, kind)))
    values = {
        "runs": shown,
        "charts": {kind: found for kind, found in kinds.items() if found},
        "axes": charts.AXES,
        "differences": gather.differences(runs),
        "against": verdict.against([run["about"] for run in runs], labels(runs)),
        "made": time.strftime("Made by nanorl on %d %B %Y at %H:%M."),
    }
    return filled(values, chunks, " + ".join(run["name"] for run in runs))


def labels(runs):
    """A short name of each run that no other has."""
    names = [run["name"] for run in runs]
    found = []
    for number, name in enumerate(names):
        found.append(f"{name} ({number + 1})" if names.count(name) > 1 else name)
    return found


def tables_of(runs, kind):
    """The rows of each run's stages of a kind, with what is derived."""
    found = []
    for run in runs:
        for stage in run["stages"]:
            if stage["kind"] == kind:
                found.append(gather.with_derived(stage))
    return found


def run_values(run, label, embedded):
    """A run as JSON-ready values for the page."""
    about = run["about"]
    stages = []
    for stage in run["stages"]:
        values = stage_values(stage)
        if stage is about and (embedded.steps or embedded.answers):
            values["rollouts"] = {
                "steps": embedded.steps,
                "of_steps": embedded.of_steps,
                "cut": embedded.cut,
                "by_token": embedded.by_token,
                "answers": embedded.answers,
            }
        stages.append(values)
    found = {"name": run["name"], "label": label, "kind": about["kind"]}
    found["task"] = about["settings"].get("task", "")
    found["note"] = about["settings"].get("note", "")
    found["verdict"] = verdict.verdict(about)
    found["reasons"] = verdict.reasons(about) if about["kind"] == "rl" else []
    found["facts"] = gather.facts(run)
    found["stages"] = stages
    found["about"] = run["stages"].index(about)
    return found


def stage_values(stage):
    rows, every = gather.thinned(gather.with_derived(stage))
    card = {name: value for name, value in stage["card"].items() if name != "settings"}
    return {
        "name": stage["name"],
        "kind": stage["kind"],
        "columns": charts.columns(charts.CHARTS[stage["kind"]], rows),
        "every": every,
        "events": stage["events"],
        "evaluations": stage["evaluations"],
        "settings": stage["settings"],
        "card": card,
    }


# ---- HTML ----------------------------------------------------------------------------------------


def filled(values, chunks, title):
    """The page's template with all that belongs into it."""
    scripts = [asset(name) for name in SCRIPTS]
    hashes = " ".join(f"'sha256-{digest(script)}'" for script in scripts)
    policy = f"default-src 'none'; script-src {hashes}; style-src 'unsafe-inline'"
    blocks = []
    for name, text in chunks.items():
        blocks.append(f'<script type="text/plain" id="{name}">{text}</script>')
    parts = {
        "policy": policy,
        "title": html.escape(title),
        "style": asset("page.css"),
        "data": to_json(values, separators=(",", ":")).replace("<", "\\u003c"),
        "chunks": "\n".join(blocks),
        "scripts": "\n".join(f"<script>{script}</script>" for script in scripts),
    }

    # The template is cut at its gaps first, so that nothing in a run's text is taken for one.
    text = ""
    for number, piece in enumerate(asset("page.html").split("{{")):
        if number == 0:
            text += piece
            continue
        name, rest = piece.split("}}", 1)
        text += parts[name] + rest
    return text


def asset(name):
    return resources.files("nanorl.report").joinpath("assets", name).read_text(encoding="utf-8")


def digest(script):
    """What a Content-Security-Policy knows a script by."""
    return base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()


# ---- while a run goes on -------------------------------------------------------------------------


class LivePage:
    """Writes report.html beside the stages of an RL run while it goes on.

    After each evaluation, as far as that takes MOST_SHARE of the run's time, and at its end. No
    error here stops a run.
    """

    def __init__(self, run):
        self.active = run.log.active
        self.directory = run.directory
        self.file = file_of(*os.path.split(run.directory))
        self.begun, self.spent, self.last = time.monotonic(), 0.0, FIRST_SECONDS

    def update(self, row, last):
        """row: the step's, which has an evaluation or has not. last: no more are to come."""
        if not self.active or "val/accuracy" not in row:
            return
        now = time.monotonic()
        if not last and self.spent + self.last > MOST_SHARE * (now - self.begun):
            return
        try:
            write([self.directory], self.file, DURING_BYTES)
            if last:
                print(f"wrote {self.file}: the run to look at", flush=True)
        except Exception as error:  # whatever it is, training matters more
            print(f"WARNING: {self.file} could not be written ({error})", flush=True)
        self.last = time.monotonic() - now
        self.spent += self.last
