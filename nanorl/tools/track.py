"""A stage's numbers in a tracker: `python -m nanorl.tools.track out/d4/rl --to=wandb`.

    --to=wandb        project nanorl, or WANDB_PROJECT; WANDB_MODE=offline keeps it here
    --to=tensorboard  into out/d4/rl/tensorboard: tensorboard --logdir=out
    --to=trackio      project nanorl; it stays on this machine until you say otherwise

The names are those of metrics.jsonl. What is not sent yet is sent, of a run that is over or that
goes on. Training with --track starts this with --follow: then a row is sent when it is written,
until the training ends. A step with an evaluation has a table too, with a line for each different
answer that its prompts got.

What is sent is noted in out/d4/rl/track/wandb.json. Rows that a resumed run makes again are not
sent again. What the tracker itself says is in track/wandb.log.
"""

import json
import os
import sys
import threading
import time
import traceback
from collections import Counter

from nanorl.report import rollouts
from nanorl.runtime import lock
from nanorl.runtime.config import configure
from nanorl.runtime.log import replace_file, to_json
from nanorl.runtime.trackers import KNOWN, TOLD

to = ""  # one of wandb, tensorboard, trackio
follow = False  # go on until the input ends

EVERY = 1.0  # seconds between looks at the files
PATIENCE = 120.0  # seconds to send what is left, when the input has ended
TEXT = 2000  # characters of a prompt or an answer in a table
COLUMNS = ("step", "prompt", "answer", "completion", "times", "reward", "advantage")


# ---- the services --------------------------------------------------------------------------------
# Each has row(step, time, values), table(step, lines) and finish().


class Wandb:
    def __init__(self, run):
        import wandb

        self.wandb = wandb
        self.run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", "nanorl"),
            id=run["id"],
            name=run["name"],
            group=run["group"],
            config=run["config"],
            notes=run["config"].get("note") or None,
            dir=os.path.join(run["directory"], "track"),
            resume="allow",
        )

    def row(self, step, _time, values):
        self.run.log(values, step=step)

    def table(self, step, lines):
        table = self.wandb.Table(columns=list(COLUMNS), data=lines)
        self.run.log({"rollouts": table}, step=step)

    def finish(self):
        self.run.finish()


class Trackio:
    def __init__(self, run):
        import trackio

        self.trackio = trackio
        trackio.init(
            project="nanorl",
            name=f"{run['name']}-{run['id']}",
            group=run["group"],
            config=run["config"],
            resume="allow",
        )

    def row(self, step, _time, values):
        self.trackio.log(values, step=step)

    def table(self, step, lines):
        import pandas

        frame = pandas.DataFrame(lines, columns=COLUMNS)
        self.trackio.log({"rollouts": self.trackio.Table(dataframe=frame)}, step=step)

    def finish(self):
        self.trackio.finish()


class TensorBoard:
    def __init__(self, run):
        from torch.utils.tensorboard import SummaryWriter

        folder = os.path.join(run["directory"], "tensorboard", run["id"])
        self.writer = SummaryWriter(folder)
        settings = [f"    {name} = {value!r}" for name, value in run["config"].items()]
        self.writer.add_text("settings", "\n".join(settings))

    def row(self, step, at, values):
        for name, value in values.items():
            self.writer.add_scalar(name, value, step, walltime=at)

    def table(self, step, lines):
        cells = [" | ".join(map(markdown, line)) for line in (COLUMNS, *lines)]
        cells.insert(1, "|".join("---" for _ in COLUMNS))
        self.writer.add_text("rollouts", "\n".join(f"| {line} |" for line in cells), step)

    def finish(self):
        self.writer.close()


SERVICES = {"wandb": Wandb, "tensorboard": TensorBoard, "trackio": Trackio}


def markdown(value):
    """A cell of a table: model text must not end it."""
    return str(value).replace("\\", "\\\\").replace("|", "\\|").replace("\n", "⏎")


# ---- what is sent --------------------------------------------------------------------------------


def numbers_of(row):
    """A row of metrics.jsonl -> {name: number}, without what is no number."""
    kept = {}
    for name, value in row.items():
        if name not in ("step", "time") and isinstance(value, (int, float)):
            kept[name] = value
    return kept


def table_of(path):
    """A file of rollouts -> lines of COLUMNS: of each prompt its answers, equal ones together."""
    lines = []
    for group in rollouts.read_groups(path).values():
        times = Counter(record["completion"] for record in group)
        once = {record["completion"]: record for record in group}
        for text, record in once.items():
            words = [shown(record["prompt"]), shown(str(record["answer"])), shown(text)]
            lines.append(
                [record["step"], *words, times[text], record["reward"], record["advantage"]]
            )
    return lines


def shown(text):
    """Model text as a table takes it: of bounded length, nothing in it that is not printable."""
    return "\n".join(rollouts.indented(text[:TEXT], ""))


class Sender:
    """Sends a stage's rows to a service, and remembers how far it is.

    Raises ImportError where the service's package is not installed.
    """

    def __init__(self, directory, name):
        self.directory = directory
        self.state_path = os.path.join(directory, "track", f"{name}.json")
        self.metrics = os.path.join(directory, "metrics.jsonl")
        self.offset = 0  # bytes of it that are read
        self.state = self.earlier_state()
        self.service = SERVICES[name](self.about())
        self.remember()

    def earlier_state(self):
        """What is sent of this run; of a run that has begun anew nothing is."""
        new = {"id": os.urandom(4).hex(), "began": None, "step": -1}
        if not os.path.exists(self.state_path) or not os.path.exists(self.metrics):
            return new
        with open(self.metrics, encoding="utf-8") as f:
            first = f.readline()
        with open(self.state_path, encoding="utf-8") as f:
            state = json.load(f)
        same = first.endswith("\n") and json.loads(first)["time"] == state["began"]
        return state if same else new

    def about(self):
        """What a service is told of the run."""
        with open(os.path.join(self.directory, "run.json"), encoding="utf-8") as f:
            card = json.load(f)
        run, stage = card["settings"]["run_name"], card["stage"]
        return dict(
            id=self.state["id"],
            name=f"{run}/{stage}",
            group=run,
            config=card["settings"],
            directory=self.directory,
        )

    def remember(self):
        replace_file(self.state_path, (to_json(self.state) + "\n").encode())

    def send(self):
        """Send the rows that have come since the last call."""
        rows = self.new_rows()
        for row in rows:
            step = row["step"]
            self.service.row(step, row["time"], numbers_of(row))
            path = os.path.join(self.directory, "rollouts", f"step_{step:06d}.jsonl.gz")
            if "val/accuracy" in row and os.path.exists(path):
                self.service.table(step, table_of(path))
            self.state["step"] = step
        if rows:
            self.remember()

    def new_rows(self):
        """Rows that are written and not sent. A line that is being written waits."""
        if not os.path.exists(self.metrics):
            return []
        with open(self.metrics, "rb") as f:
            f.seek(self.offset)
            whole, _, _ = f.read().rpartition(b"\n")
        self.offset += len(whole) + 1 if whole else 0
        rows = [json.loads(line) for line in whole.splitlines()]
        if rows and self.state["began"] is None:
            self.state["began"] = rows[0]["time"]
        return [row for row in rows if row["step"] > self.state["step"]]


# ---- the process ---------------------------------------------------------------------------------


def main():
    if len(sys.argv) < 2 or sys.argv[1].startswith("-"):
        raise SystemExit(
            f"usage: python -m nanorl.tools.track <stage, such as out/d4/rl> --to={'|'.join(KNOWN)}"
        )
    directory = sys.argv[1]
    configure(globals(), sys.argv[2:])
    if to not in KNOWN:
        raise SystemExit(f"error: --to={to}: name one of {', '.join(KNOWN)}")
    if not os.path.exists(os.path.join(directory, "run.json")):
        raise SystemExit(f"error: {directory} is no stage of a run, such as out/d4/rl")
    os.makedirs(os.path.join(directory, "track"), exist_ok=True)
    console = own_console(os.path.join(directory, "track", f"{to}.log")) if follow else sys.stdout

    # A process of an earlier start may still be sending. This one goes on where that one ends.
    held, holder = lock.take(os.path.join(directory, "track", f"{to}.lock"), PATIENCE)
    if held is None:
        raise SystemExit(f"error: {holder} is sending {directory} to {to}: wait for it")
    try:
        send_all(Sender(directory, to))
    except Exception as error:
        print(failure(directory, error), file=console, flush=True)
        if follow:
            traceback.print_exc()  # into the log
        os._exit(TOLD)  # a service's own threads may hang


def send_all(sender):
    """Send what there is; with --follow also what comes, until the input has ended."""
    ended = threading.Event()
    if follow:
        threading.Thread(target=wait_for_end, args=(ended,), daemon=True).start()
        while not ended.is_set():
            sender.send()
            ended.wait(EVERY)
    sender.send()
    sender.service.finish()


def wait_for_end(ended):
    """Set `ended` when the training has. A service that hangs then has PATIENCE seconds."""
    sys.stdin.buffer.read()
    ended.set()
    time.sleep(PATIENCE)
    os._exit(TOLD)


def own_console(log):
    """Send what this process prints to a log -> the console that it has had."""
    console = os.fdopen(os.dup(1), "w")
    with open(log, "ab") as f:
        os.dup2(f.fileno(), 1)
        os.dup2(f.fileno(), 2)
    return console


def failure(directory, error):
    """What to tell the user."""
    said = " ".join(str(error).split())[:200]
    remedy = f"python -m nanorl.tools.track {directory} --to={to} sends it later"
    if isinstance(error, ImportError):
        return f"WARNING: --track={to}: {said}: pip install {to}; {remedy}"
    return f"WARNING: --track={to} has stopped ({type(error).__name__}: {said}); {remedy}"


if __name__ == "__main__":
    main()
