"""--track: what is sent, and that no service stops or slows a run."""

import json
import os
import subprocess
import sys
import time

import pytest

from nanorl.runtime import trackers
from nanorl.runtime.log import RunLog
from nanorl.runtime.trackers import KNOWN, Trackers
from nanorl.tools import track
from scripts import BASE, RL, ROOT, call, environment

# A service that writes down what it is told.
RECORDER = """
import json, os

class Run:
    def __init__(self, kind):
        self.path = os.path.join(os.path.dirname(__file__), "told.jsonl")
    def log(self, values, step):
        with open(self.path, "a") as f:
            f.write(json.dumps([step, values]) + "\\n")
    def finish(self):
        self.log("finish", None)

def init(**options):
    run = Run(options)
    run.log(options, None)
    return run

def Table(columns, data):
    return [columns, data]
"""


@pytest.fixture
def service(tmp_path, monkeypatch):
    """-> a function that puts a module in the place of wandb."""

    def make(source):
        folder = tmp_path / "packages"
        folder.mkdir(exist_ok=True)
        (folder / "wandb.py").write_text(source)
        monkeypatch.syspath_prepend(str(folder))
        return folder / "told.jsonl"

    return make


def told(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def stage(tmp_path, steps=(1, 2), **values):
    """A stage's folder with so many rows."""
    log = RunLog(str(tmp_path / "out" / "a" / "rl"))
    log.card(stage="rl", settings=dict(run_name="a", note="why", lr=0.1))
    for step in steps:
        log.row(step, **values)
    return log


def send(log, *more):
    command = [sys.executable, "-m", "nanorl.tools.track", log.directory, "--to=wandb", *more]
    env = environment(PYTHONPATH=os.pathsep.join(filter(None, sys.path)))
    return subprocess.run(command, env=env, cwd=ROOT, capture_output=True, text=True)


def test_names_steps_and_values_are_those_of_the_rows(tmp_path, service):
    path = service(RECORDER)
    log = stage(tmp_path, reward=0.5, **{"time/step": 2, "entropy": float("nan")})
    assert send(log).returncode == 0
    begun, first, second, ended = told(path)
    assert begun[1]["name"] == "a/rl" and begun[1]["config"]["lr"] == 0.1
    assert begun[1]["notes"] == "why"
    assert first == [1, {"reward": 0.5, "time/step": 2}] and second[0] == 2
    assert ended == [None, "finish"]


def test_rows_that_are_made_again_are_not_sent_again(tmp_path, service):
    path = service(RECORDER)
    log = stage(tmp_path, (1, 2, 3), x=1)
    send(log)
    log.cut(1)  # the run goes on from a checkpoint at step 1
    for step in (2, 3, 4):
        log.row(step, x=1)
    send(log)
    sent = [step for step, _ in told(path) if step is not None]
    assert sent == [1, 2, 3, 4]
    ids = {values["id"] for step, values in told(path) if step is None and values != "finish"}
    assert len(ids) == 1


def test_a_run_that_begins_anew_is_another(tmp_path, service):
    path = service(RECORDER)
    log = stage(tmp_path, x=1)
    send(log)
    log.cut(-1)
    time.sleep(0.002)  # rows are told apart by their milliseconds
    log.row(1, x=2)
    send(log)
    ids = {values["id"] for step, values in told(path) if step is None and values != "finish"}
    assert len(ids) == 2
    assert told(path)[-2] == [1, {"x": 2}]


def test_rollouts_are_a_table_of_each_prompts_different_answers(tmp_path, service):
    path = service(RECORDER)
    log = stage(tmp_path, ())
    records = []
    for sample, text in enumerate(["7", "8", "7"]):
        record = dict(step=2, group=0, sample=sample, prompt="3+4\x1b[2J", answer=7, parts={})
        record.update(completion=text, reward=float(text == "7"), advantage=0.25, finish="stop")
        records.append(record)
    for step in (1, 2):
        log.rollouts(step, records)
    log.row(1, x=1)
    log.row(2, **{"val/accuracy": 0.5})
    assert send(log).returncode == 0
    tables = [values for _, values in told(path) if "rollouts" in values]
    [[columns, lines]] = [table["rollouts"] for table in tables]  # of step 2 alone
    assert tuple(columns) == track.COLUMNS
    assert lines == [
        [2, "3+4\\x1b[2J", "7", "7", 2, 1.0, 0.25],
        [2, "3+4\\x1b[2J", "7", "8", 1, 0.0, 0.25],
    ]


def test_a_cell_of_markdown_cannot_end_it():
    assert track.markdown("a|b\n| c") == "a\\|b⏎\\| c"
    assert len(track.shown("x" * 10**6)) == track.TEXT


def test_a_run_sends_while_it_goes_on_and_to_its_end(tmp_path, monkeypatch, service):
    monkeypatch.setenv("NANORL_OUT", str(tmp_path / "out"))
    path = service(RECORDER)
    assert call("train_base.py", *BASE, "--run_name=a", "--steps=3", "--track=wandb") is None
    steps = [step for step, _ in told(path)]
    assert steps == [None, 1, 2, 3, None]


@pytest.mark.parametrize(
    "source, words",
    [
        ("import time\ndef init(**_):\n    time.sleep(3600)", "wandb is still sending"),
        ("def init(**_):\n    raise OSError('no\\nnetwork')", "has stopped (OSError: no network)"),
        ("raise ImportError('No module named wandb')", "pip install wandb"),
        ("import os\ndef init(**_):\n    os._exit(3)", "ended with status 3"),
    ],
)
def test_no_service_stops_a_run(out, tmp_path, monkeypatch, capfd, service, source, words):
    monkeypatch.setattr(trackers, "PATIENCE", 2.0)
    monkeypatch.setenv("NANORL_OUT", str(tmp_path / "out"))
    service(source)
    begun = time.time()
    model = f"--model={out / 'a' / 'sft'}"
    assert call("train_rl.py", *RL, model, "--steps=2", "--track=wandb") is None
    assert time.time() - begun < 15
    assert words in capfd.readouterr().out


def test_a_tracker_ends_with_its_run(tmp_path, service):
    """However that ends: the pipe to it closes."""
    service(RECORDER)
    sent = Trackers("wandb", stage(tmp_path).directory)
    sent.start()
    process = sent.processes["wandb"]
    process.stdin.close()
    assert process.wait(30) == 0


def test_unknown_names_are_refused(tmp_path):
    with pytest.raises(ValueError, match="wandb, tensorboard, trackio"):
        Trackers("wandb, mlflow", str(tmp_path))
    assert Trackers("", str(tmp_path)).names == []


@pytest.mark.slow
@pytest.mark.parametrize("name", KNOWN)
def test_the_real_ones_offline(tmp_path, monkeypatch, name):
    pytest.importorskip(name)
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    log = stage(tmp_path, (1, 2, 3), reward=0.5, **{"val/accuracy": 0.25})
    record = dict(
        step=3, group=0, sample=0, prompt="a|b", answer="1", completion="x\ud800</script>"
    )
    log.rollouts(3, [dict(record, reward=1.0, advantage=0.5)])
    command = [sys.executable, "-m", "nanorl.tools.track", log.directory, f"--to={name}"]
    done = subprocess.run(command, env=environment(), cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    with open(os.path.join(log.directory, "track", f"{name}.json"), encoding="utf-8") as f:
        state = json.load(f)
    assert state["step"] == 3

    if name == "tensorboard":
        from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

        folder = os.path.join(log.directory, "tensorboard", state["id"])
        events = EventAccumulator(folder).Reload()
        assert [(e.step, e.value) for e in events.Scalars("reward")] == [
            (1, 0.5),
            (2, 0.5),
            (3, 0.5),
        ]
        assert "rollouts/text_summary" in events.Tags()["tensors"]
    if name == "trackio":
        assert any((tmp_path / "trackio").rglob("*.db"))
    if name == "wandb":
        assert any((tmp_path / "out" / "a" / "rl" / "track").rglob("*.wandb"))
