"""A checkpoint on a GPU: what a step waits for, what is saved, and who waits for the writing."""

import os
import threading

import pytest
import torch

from nanorl.runtime import background, checkpoint
from nanorl.runtime.background import Background, copied
from nanorl.runtime.run import Run
from scripts import ranks


def write_model(path):
    with open(os.path.join(path, "config.json"), "w"):
        pass


@pytest.fixture
def run(tmp_path, monkeypatch):
    """A run on a GPU, as far as it knows, and whose disk is slow: a save waits for disk.set()."""
    monkeypatch.setenv("NANORL_OUT", str(tmp_path))
    settings = dict(
        run_name="x", resume="auto", after_save="", track="", max_bad_steps=9, save_every=1
    )
    run = Run({**settings, "save_reward_above": 1.0}, "rl")
    run.on_gpu = True
    run.disk = threading.Event()
    save = checkpoint.save

    def slow_save(*arguments):
        assert run.disk.wait(20)
        return save(*arguments)

    monkeypatch.setattr(checkpoint, "save", slow_save)
    yield run
    run.disk.set()
    background.wait()


def test_steps_go_on_while_a_checkpoint_is_written_as_it_was(run, capsys):
    """Also where the step after it moves the weights and the state before they are on disk."""
    moments, seen = torch.ones(3), {"levels": [1]}
    run.end_of_step(1, False, lambda: write_model, lambda: dict(moments=moments, watch=seen))
    moments += 1
    seen["levels"].append(2)
    run.after_save = lambda: print("after the save")
    assert checkpoint.latest(run.directory) is None and capsys.readouterr().out == ""

    run.disk.set()
    background.wait()
    saved = checkpoint.load_state(checkpoint.latest(run.directory))
    assert saved["moments"].tolist() == [1, 1, 1] and saved["watch"] == {"levels": [1]}
    assert saved["step"] == 1
    saved, after = capsys.readouterr().out.splitlines()
    assert saved.startswith("saved ") and after == "after the save"


@pytest.mark.parametrize("next_step", ["saves", "is the last"])
def test_the_next_save_and_the_end_wait_for_it(run, next_step):
    run.end_of_step(1, False, lambda: write_model, dict)
    disk = threading.Timer(0.2, run.disk.set)
    disk.start()
    run.end_of_step(2, next_step == "is the last", lambda: write_model, dict)
    assert checkpoint._steps(run.directory)[0] == 1
    if next_step == "is the last":
        assert checkpoint._steps(run.directory) == [1, 2]


@pytest.mark.parametrize("last", [False, True])
def test_a_save_that_fails_stops_the_run_at_the_next_step_or_at_its_end(run, last):
    def full(path):
        raise OSError(28, "No space left on device")

    run.disk.set()
    if not last:
        run.end_of_step(1, False, lambda: full, dict)
        background.wait()
        run.settings["save_every"] = 0
    with pytest.raises(ValueError, match="step 1 could not be saved .*No space left"):
        run.end_of_step(2 - last, last, lambda: full, dict)
    assert checkpoint.latest(run.directory) is None


def test_a_copy_has_its_own_tensors_and_lists():
    value = {"a": [torch.ones(2), (1, "b", None)], 0: {"c": torch.zeros(1, dtype=torch.int64)}}
    copy = copied(value)
    assert str(copy) == str(value)
    value["a"][0] += 1
    value["a"].append(3)
    assert copy["a"][0].tolist() == [1, 1] and len(copy["a"]) == 2
    assert copy[0]["c"].dtype == torch.int64


# A rank that ends, by its own will or not, while a checkpoint is being written.
ENDS = """
import sys, time
from nanorl.runtime import dist
from nanorl.runtime.background import Background

def write():
    time.sleep(1)
    print("written", flush=True)

def main():
    dist.setup("cpu")
    Background().start(write)
    raise ValueError("the end")

dist.run(main)
"""


def test_a_rank_that_ends_on_an_error_lets_the_checkpoint_become_whole():
    with ranks(["-c", ENDS], n=1) as (process,):
        out, err = process.communicate(timeout=60)
    assert (process.returncode, out, err) == (1, "written\n", "error: the end\n")


def test_one_piece_of_work_at_a_time():
    order, first = [], threading.Event()
    worker = Background()
    worker.start(lambda: (first.wait(20), order.append(1)))
    threading.Timer(0.1, first.set).start()
    worker.start(lambda: order.append(2))
    worker.finish()
    assert order == [1, 2]
