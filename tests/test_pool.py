"""Rewards in worker processes.

Whatever a reward does, it ends, is counted, and leaves nothing behind.
"""

import os
import subprocess
import sys
import time

import pytest

from nanorl import rollout
from nanorl.tasks import Problem, Reward, get_task
from nanorl.tasks.cores import cpus
from nanorl.tasks.pool import RAISED, TIMEOUT, Failure, RewardPool, share_of_cores

TASK = """
import os, subprocess, sys, time
from nanorl.tasks import Problem, Reward

class Nasty:
    timeout = 2.0
    def __init__(self, split="train", scale="1"):
        self.scale = float(scale)
    def __len__(self):
        return 10
    def problem(self, index):
        return Problem([{"role": "user", "content": str(index)}], str(index))
    def reward(self, problem, text):
        if text == "hang":
            while True:
                pass
        if text == "hang in C":
            import re
            re.match(r"(a+)+$", "a" * 60 + "b")
        if text == "sleep":
            time.sleep(60)
        if text == "die":
            os._exit(0)
        if text == "raise":
            raise RuntimeError("no")
        if text == "exit":
            sys.exit(0)
        if text == "exec exit":
            exec("exit()")
        if text == "NaN":
            return Reward(float("nan"))
        if text == "numpy":
            import numpy
            return Reward(numpy.float32(0.5), {"steps": numpy.int64(3)})
        if text == "child":
            subprocess.Popen(["sleep", "61.234"])
            time.sleep(60)
        if text.startswith("meet "):
            folder = text.removeprefix("meet ")
            open(os.path.join(folder, str(os.getpid())), "w").close()
            while len(os.listdir(folder)) < 2:
                time.sleep(0.01)
            return Reward(2.0)
        if text == "odd":
            return lambda: 0
        print("a worker may print")
        return Reward(self.scale * len(text), \
{"length": float(len(text)), "pid": float(os.getpid())})
"""


@pytest.fixture(scope="module")
def task(tmp_path_factory):
    path = tmp_path_factory.mktemp("tasks") / "nasty.py"
    path.write_text(TASK)
    return get_task(f"{path}:Nasty", split="val", scale="2")


@pytest.fixture
def pool(task):
    pool = RewardPool(task._recipe, task.timeout, workers=2)
    yield pool
    pool.close()


def test_each_gets_its_own_answer_and_none_is_lost(task, pool):
    problem = task.problem(3)
    texts = ["a", "hang", "bb", "raise", "die", "ccc", "exit", "hang in C", "odd", "dddd"]
    texts += ["exec exit", "NaN"]
    answers = pool.judge([(problem, text) for text in texts])
    expected = {
        "hang": TIMEOUT,
        "hang in C": TIMEOUT,
        "raise": RAISED,
        "die": RAISED,
        "odd": RAISED,
        "exit": RAISED,
        "exec exit": RAISED,
        "NaN": RAISED,
    }
    for text, answer in zip(texts, answers):
        if text in expected:
            assert isinstance(answer, Failure) and answer.kind == expected[text], text
        else:
            # In order, with the task's settings, and from another process.
            assert isinstance(answer, Reward)
            assert answer.total == 2 * len(text)
            assert answer.parts["pid"] != os.getpid()
    assert answers[texts.index("exit")].text == "SystemExit: 0"
    assert pool.judge([(problem, "numpy")]) == [Reward(0.5, {"steps": 3.0})]
    # The pool works on.
    assert [a.total for a in pool.judge([(problem, "xy")] * 3)] == [4.0] * 3
    assert pool.judge([]) == []


def test_workers_work_side_by_side_and_stay(task, tmp_path):
    """Each of two rewards waits for the other: one after the other, neither would ever end."""
    pool = RewardPool(task._recipe, 60.0, workers=2)
    problem = task.problem(0)
    try:
        assert [r.total for r in pool.judge([(problem, f"meet {tmp_path}")] * 2)] == [2.0, 2.0]
        before = {w.process.pid for w in pool.workers}
        pool.judge([(problem, "more")] * 4)
        assert {w.process.pid for w in pool.workers} == before  # not made anew for each reward
    finally:
        pool.close()


def test_a_child_of_the_reward_dies_with_its_worker(task, pool):
    assert pool.judge([(task.problem(0), "child")])[0].kind == TIMEOUT
    for _ in range(50):
        running = subprocess.run(["ps", "-eo", "args"], capture_output=True, text=True).stdout
        if "sleep 61.234" not in running:
            break
        time.sleep(0.1)
    assert "sleep 61.234" not in running


def test_workers_end_with_the_trainer(task):
    """A killed trainer cannot close its pool.

    An idle worker sees that the pipe is shut, and one that hangs has an alarm.
    """
    code = (
        f"import sys, time; sys.path[:0] = {sys.path!r};"
        " from nanorl.tasks import get_task; from nanorl.tasks.pool import RewardPool;"
        f" t = get_task({task._recipe[0]!r});"
        "p = RewardPool(t._recipe, 0.7, 1); p.judge([(t.problem(0), 'x')]);"
        " print(p.workers[0].process.pid, flush=True);"
        "p.timeout = 0.1; {}; time.sleep(60)"
    )
    for busy in ("0", "p.workers[0].send((t.problem(0), 'hang', 0.1))"):
        trainer = subprocess.Popen(
            [sys.executable, "-c", code.replace("{}", busy)],
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        # The worker's own print comes first or second.
        lines = [trainer.stdout.readline() for _ in range(2)]
        worker = int(next(line for line in lines if line.strip().isdigit()))
        time.sleep(0.2)
        trainer.kill()
        trainer.wait()
        for _ in range(100):
            if not alive(worker):
                break
            time.sleep(0.1)
        assert not alive(worker), busy


BUSY = "p.me = p\np.workers[0].send((t.problem(0), 'hang', 20.0))"


@pytest.mark.parametrize("end", [BUSY, "import os; os._exit(0)"])
def test_a_trainer_that_closes_nothing_leaves_no_word_and_no_worker(task, end):
    code = (
        f"import sys; sys.path[:0] = {sys.path!r}\n"
        "from nanorl.tasks import get_task\nfrom nanorl.tasks.pool import RewardPool\n"
        f"t = get_task({task._recipe[0]!r})\n"
        "p = RewardPool(t._recipe, 5.0, 1)\np.judge([(t.problem(0), 'x')])\n"
        f"print(p.workers[0].process.pid, flush=True)\n{end}\n"
    )
    # The worker has the same streams, so this waits for it too, for 41 s if it is not killed.
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=30)
    assert ended.returncode == 0 and ended.stderr == ""
    (worker,) = [int(line) for line in ended.stdout.split() if line.isdigit()]
    assert not alive(worker)


def alive(pid):
    command = ["ps", "-o", "stat=", "-p", str(pid)]
    state = subprocess.run(command, capture_output=True, text=True).stdout.strip()
    return bool(state) and not state.startswith("Z")


def test_scores_of_a_task_with_a_deadline(task):
    problem = task.problem(1)
    rewards, failures = rollout.score(
        task, problem, ["ab", "hang", "raise", "abc"], [True, True, True, False]
    )
    assert [r.total for r in rewards] == [4.0, 0.0, 0.0, 0.0]
    assert failures == [
        None,
        Failure(TIMEOUT, "no answer in 2 s"),
        Failure(RAISED, "RuntimeError: no"),
        None,
    ]
    task._reward_pool.close()


def test_workers_that_die_while_idle_are_replaced(task, pool):
    problem = task.problem(0)
    pool.judge([(problem, "x")] * 2)
    for worker in pool.workers:
        worker.process.kill()
        worker.process.wait()
    assert [r.total for r in pool.judge([(problem, "xy")] * 3)] == [4.0] * 3


def test_an_interrupted_question_is_not_answered_later(task, pool, monkeypatch):
    problem = task.problem(0)
    pool.judge([(problem, "x")] * 2)

    def interrupt(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr("nanorl.tasks.pool.wait", interrupt)
    with pytest.raises(KeyboardInterrupt):
        pool.judge([(problem, "long text")] * 2)
    monkeypatch.undo()
    assert pool.judge([(problem, "x")])[0].total == 2.0


def test_large_texts_and_problems_pass(task, pool):
    problem = task.problem(0)
    problem.meta["tests"] = "y" * 3_000_000
    assert [r.total for r in pool.judge([(problem, "x" * 1_000_000)] * 3)] == [2e6] * 3


@pytest.mark.parametrize(
    "how, words",
    [
        ("raise RuntimeError('no file')", "worker process died"),
        ("import time; time.sleep(60)", "no answer"),
    ],
)
def test_a_task_that_workers_cannot_make_is_the_users_mistake(
    task, tmp_path, monkeypatch, how, words
):
    """The task works in the trainer's process and not in a worker's."""
    monkeypatch.setattr("nanorl.tasks.pool.START", 3.0)
    in_workers = f"self.scale = 1.0\n        if 'pool' in __import__('sys').argv[0]: {how}"
    (tmp_path / "here.py").write_text(TASK.replace("self.scale = float(scale)", in_workers))
    pool = RewardPool((f"{tmp_path / 'here.py'}:Nasty", "train", {}), 0.7, workers=1)
    with pytest.raises(ValueError, match=words):
        pool.judge([(task.problem(0), "x")])
    assert pool.workers == []


def test_a_mixture_takes_the_longest_deadline_of_its_tasks(task):
    assert get_task(f"{task._recipe[0]}=1,counting=1").timeout == task.timeout
    assert get_task("counting=1,binary=1").timeout == 0


def test_a_task_without_a_deadline_is_asked_here():
    class Here:
        def reward(self, problem, text):
            return Reward(float(os.getpid()))

    assert rollout.judge(Here(), [(Problem([], ""), "")])[0].total == os.getpid()


# ---- how many workers ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "files, cores",
    [
        ({}, 8),
        # Version 2: the group's own quota, or that of a group above it.
        ({"proc/self/cgroup": "0::/a/b\n", "sys/fs/cgroup/a/b/cpu.max": "100000 100000\n"}, 1),
        ({"proc/self/cgroup": "0::/a/b\n", "sys/fs/cgroup/a/cpu.max": "350000 100000\n"}, 3),
        ({"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/cpu.max": "max 100000\n"}, 8),
        ({"sys/fs/cgroup/cpu.max": "50000 100000\n"}, 1),
        ({"sys/fs/cgroup/cpu.max": "9900000 100000\n"}, 8),
        # Version 1. In a container the path is the host's, and only the root is there.
        (
            {
                "proc/self/cgroup": "2:cpuacct:/x\n1:cpu:/docker/7f\n0::/\n",
                "sys/fs/cgroup/cpu/cpu.cfs_quota_us": "200000\n",
                "sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000\n",
            },
            2,
        ),
        (
            {
                "sys/fs/cgroup/cpu/cpu.cfs_quota_us": "-1\n",
                "sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000\n",
            },
            8,
        ),
    ],
)
def test_workers_are_as_many_as_the_cores_that_may_be_used(tmp_path, monkeypatch, files, cores):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(8)), raising=False)
    monkeypatch.setattr(os, "cpu_count", lambda: 64)
    for path, text in files.items():
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_text(text)
    assert cpus(tmp_path) == cores
    monkeypatch.setattr("nanorl.tasks.pool.cpus", lambda: cores)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    assert share_of_cores() == max(1, cores // 2)
