"""What ranks do together, and what a script's end tells its user."""

import errno
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta

import pytest
import torch

from nanorl import rollout
from nanorl.runtime import dist
from scripts import ROOT, environment, finish_ranks, ranks

CPU_ALLOCATION = "DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes"


@pytest.mark.parametrize(
    "error, words",
    [
        (ValueError("--lr=x: why"), "--lr=x: why"),
        (MemoryError(), "--device_tokens"),
        (RuntimeError(CPU_ALLOCATION), "--device_rows"),
        (OSError(errno.ENOSPC, "No space left on device", "metrics.jsonl"), "last checkpoint"),
    ],
)
def test_trouble_that_is_not_a_defect_ends_with_one_line(error, words):
    def main():
        raise error

    with pytest.raises(SystemExit) as end:
        dist.run(main)
    said = end.value.code
    assert said.startswith("error: ") and words in said and "\n" not in said


@pytest.mark.parametrize(
    "error",
    [RuntimeError("shapes differ"), FileNotFoundError(errno.ENOENT, "gone"), TypeError("no")],
)
def test_a_defect_keeps_its_traceback(error):
    def main():
        raise error

    with pytest.raises(type(error)):
        dist.run(main)


# Rank 1 has a defect while rank 0 waits for it in a collective.
DEFECT = """
from nanorl.runtime import dist

def destroy():
    raise SystemExit("the process group is taken down, which may wait for the others")

def main():
    dist.setup("cpu")
    dist.dist.destroy_process_group = destroy
    if dist.rank() == 1:
        raise TypeError("this is the defect")
    dist.total(1)

dist.run(main)
"""


def test_a_defect_on_one_rank_is_printed_and_does_not_wait_for_the_others():
    with ranks(["-c", DEFECT]) as (first, second):
        said = second.communicate(timeout=60)[1]
        assert second.returncode == 1 and said.count("TypeError: this is the defect") == 1
        assert "Traceback" in said and "taken down" not in said
        said = first.communicate(timeout=60)[1]
        assert first.returncode == 1 and "has lost another rank" in said


# What each rank runs, with values that differ, so that a wrong operation gives a wrong number.
TOGETHER = """
import torch
from nanorl import rollout
from nanorl.runtime import dist

dist.setup("cpu")
r = dist.rank()
assert (dist.total(r + 1), dist.total(r + 1, "max"), dist.total(r + 1, "min")) == (6, 3, 1)
values = {"a": r, "b": 10 - r}
assert dist.totals(values) == {"a": 3, "b": 27}
assert dist.totals(values, "max") == {"a": 2, "b": 10}
assert dist.totals(values, "min") == {"a": 0, "b": 8}
assert dist.gather([r] * r) == ([1, 2, 2] if r == 0 else [])
assert dist.broadcast(f"from {r}") == "from 0"
every = dist.gather_numbers(torch.tensor([r, 0.5], dtype=torch.bfloat16))
assert [part.tolist() for part in every] == [[0, 0.5], [1, 0.5], [2, 0.5]]
n = 7
assert dist.total(len(range(n)[dist.share(n)])) == n
assert dist.gather(list(range(n)[dist.share(n)])) == (list(range(n)) if r == 0 else [])

params = [torch.nn.Parameter(torch.zeros(2, 3)), torch.nn.Parameter(torch.zeros(4))]
params[0].grad = torch.full((2, 3), 1.0 + r)
if r == 1:  # the others have none for this one
    params[1].grad = torch.arange(4.0)
dist.sum_gradients(params)
assert torch.equal(params[0].grad, torch.full((2, 3), 6.0))
assert torch.equal(params[1].grad, torch.arange(4.0))

assert dist.stop_requested() == 0
if r == 2:
    dist._on_signal(15, None)
assert dist.stop_requested() == 15
print("said by", r)
dist.barrier()
torch.distributed.destroy_process_group()
"""


def test_ranks_agree():
    with ranks(["-c", TOGETHER], n=3) as processes:
        assert finish_ranks(processes) == [f"said by {r}\n" for r in range(3)]


def test_ranks_that_start_again_do_not_take_the_names_of_the_dead():
    """The store stays over restarts, and the dead may have asked and never been answered."""
    store = torch.distributed.HashStore()
    store.set("rank 2 is", "one that died before rank 0 came")
    names = []
    for _ in range(3):
        with ThreadPoolExecutor(3) as threads:
            ranks = [threads.submit(dist._name_of_start, store, rank, 3) for rank in range(3)]
            names.append({rank.result(20) for rank in ranks})
    assert [len(name) for name in names] == [1, 1, 1] and len(set.union(*names)) == 3


def test_a_rank_that_never_comes_is_named(monkeypatch):
    monkeypatch.setattr(dist, "TIMEOUT", timedelta(seconds=0.1))
    store = torch.distributed.HashStore()
    store.set("rank 1 is", "one that has died")
    with pytest.raises(ValueError, match="rank 1 of 2 has not come within 0:00:00.1"):
        dist._name_of_start(store, 0, 2)


# Rank 0 is slower than collectives wait, twice.
SLOW_MAIN = """
import datetime, time
import torch.distributed
from nanorl.runtime import dist

def main():
    dist.setup("cpu")
    dist.barrier()
    # In place of an hour.
    torch.distributed.distributed_c10d._set_pg_timeout(datetime.timedelta(seconds=1))
    for turn in range(2):
        if dist.is_main():
            time.sleep(2)
            print("done", turn, time.time(), flush=True)
        else:
            print("waits", flush=True)
        dist.wait_for_main()
        print("went on", turn, time.time(), flush=True)

dist.run(main)
"""


def test_rank_0_may_work_alone_for_longer_than_a_collective_waits():
    with ranks(["-c", SLOW_MAIN]) as processes:
        main, other = finish_ranks(processes)
    done = [float(line.split()[-1]) for line in main.splitlines() if line.startswith("done")]
    went_on = [float(line.split()[-1]) for line in other.splitlines() if line != "waits"]
    assert len(done) == len(went_on) == 2
    assert all(later >= earlier for earlier, later in zip(done, went_on))


# A save that takes longer than collectives wait.
SLOW_SAVE = """
import datetime, sys, time
import torch.distributed
from nanorl.runtime import checkpoint, dist
from nanorl.runtime.run import Run

def slow(*arguments):
    time.sleep(2)
    return "saved"

def main():
    dist.setup("cpu")
    settings = dict(run_name="a", resume="auto", after_save="", track="")
    settings.update(max_bad_steps=9, save_every=1)
    run = Run(settings, "base")
    torch.distributed.distributed_c10d._set_pg_timeout(datetime.timedelta(seconds=1))
    checkpoint.save = slow
    for step in (1, 2):
        run.end_of_step(step, step == 2, lambda: None, dict)
    dist.say("went on")

dist.run(main)
"""


def test_a_slow_save_does_not_time_out_the_ranks_that_wait_for_it(tmp_path):
    with ranks(["-c", SLOW_SAVE], NANORL_OUT=str(tmp_path)) as processes:
        assert finish_ranks(processes) == ["saved\nsaved\nwent on\n", ""]


def test_a_rank_0_that_dies_alone_ends_the_others_with_one_line():
    with ranks(["-c", SLOW_MAIN]) as processes:
        assert processes[1].stdout.readline() == "waits\n"
        processes[0].kill()
        said = processes[1].communicate(timeout=60)[1]
    assert processes[1].returncode == 1 and "Traceback" not in said
    assert "error: rank 1 has lost another rank (connection closed while rank 0" in said


# Two nodes, each with an out/ of its own, or with one.
NODES = """
import os, sys
from nanorl.runtime import dist
from nanorl.runtime.run import Run

def main():
    dist.setup("cpu")
    dist.PATIENCE = 0.2
    os.environ["NANORL_OUT"] = sys.argv[1] + os.environ["RANK"] * int(sys.argv[2])
    settings = dict(run_name="a", resume="auto", after_save="", track="")
    no_start = "no model"
    Run(settings, "rl", start="none" if dist.rank() else None, no_start=no_start)

dist.run(main)
"""


@pytest.mark.parametrize("apart", [True, False])
def test_nodes_that_do_not_share_out_are_told_so_before_anything_is_missed(tmp_path, apart):
    with ranks(["-c", NODES, str(tmp_path / "out"), str(int(apart))]) as processes:
        said = [process.communicate(timeout=60)[1] for process in processes]
    assert [process.returncode for process in processes][1] == 1
    for line in said if apart else []:
        assert line.startswith("error: ") and line.count("\n") == 1
        assert "does not see what rank 0 writes" in line and "NANORL_OUT=<folder>" in line
    assert apart or said[1] == "error: no model\n"
    assert [name for name in (tmp_path).rglob(".seen*")] == []


PARENT = """
import subprocess, sys
x = b"1" * (900 << 20)
child = "from nanorl.runtime import dist as d; print(d.peak_memory(d.torch.device('cpu')))"
subprocess.run([sys.executable, "-c", child], check=True)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere the parent's peak is counted too")
def test_the_peak_is_this_programs_and_not_its_parents():
    ended = subprocess.run(
        [sys.executable, "-c", PARENT], cwd=ROOT, env=environment(), capture_output=True, text=True
    )
    assert 50e6 < int(ended.stdout) < 800e6, ended.stderr


class Interrupted:
    """A reward during which a second signal comes."""

    def reward(self, problem, text):
        dist._on_signal(signal.SIGTERM, None)


def test_a_second_signal_ends_the_run_also_within_a_reward(monkeypatch):
    monkeypatch.setattr(dist, "_stop", False)

    def main():
        dist._on_signal(signal.SIGTERM, None)
        rollout.judge(Interrupted(), [(None, "a")])

    with pytest.raises(SystemExit) as end:
        dist.run(main)
    assert end.value.code == 128 + signal.SIGTERM
