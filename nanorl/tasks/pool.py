"""Rewards in worker processes, with a deadline kept from outside. A task asks for it by an attribute:

    class Proofs:
        timeout = 5.0  # seconds that one reward may take

A worker is a fresh Python, in a process group of its own: nothing is forked from a process that holds a GPU. It makes the task
again from its name and settings, and answers one (problem, text) at a time. One that does not answer in time is killed
with its whole group, and another takes its place."""

import os
import pickle
import signal
import struct
import subprocess
import sys
import time
from collections import namedtuple
from multiprocessing.connection import Connection, Pipe, wait

RAISED, TIMEOUT = "raised", "timeout"
Failure = namedtuple(
    "Failure", "kind text"
)  # in place of a Reward: RAISED or TIMEOUT, and what the exception said
READY, DIED = "ready", Failure(RAISED, "the worker process died")
START = 60.0  # seconds that a worker may take to make its task


class RewardPool:
    """`recipe` (name, split, settings) makes the task in each of `workers` processes (default: this rank's share of the cores)."""

    def __init__(self, recipe, timeout, workers=None):
        self.recipe, self.timeout = recipe, timeout
        self.n = workers or max(
            1, (os.cpu_count() or 1) // int(os.environ.get("LOCAL_WORLD_SIZE", 1))
        )
        self.workers, self.false_starts = [], 0

    def judge(self, pairs):
        """[(problem, text)] -> for each its Reward or a Failure, in order. Raises ValueError when workers cannot make the task."""
        try:
            return self._judge(pairs)
        except BaseException:
            self.close()  # a worker that is still at it would answer the next question
            raise

    def _judge(self, pairs):
        results, waiting = [None] * len(pairs), list(range(len(pairs)))[::-1]
        while None in results:
            while len(self.workers) < min(self.n, results.count(None)):
                self.workers.append(_Worker(self.recipe))
            for worker in [w for w in self.workers if w.ready and w.index is None][: len(waiting)]:
                if worker.send((*pairs[waiting[-1]], self.timeout)):
                    worker.index, worker.deadline = waiting.pop(), time.monotonic() + self.timeout
                else:  # it died while it was idle
                    self._drop(worker)
            active = [w for w in self.workers if not w.ready or w.index is not None]
            heard = wait(
                [w.connection for w in active],
                max(0.0, min((w.deadline for w in active), default=0.0) - time.monotonic()),
            )
            for worker in active:
                if worker.connection in heard:
                    answer = worker.receive()
                elif time.monotonic() >= worker.deadline:
                    answer = Failure(TIMEOUT, f"no answer in {self.timeout:g} s")
                else:
                    continue
                if answer == READY:
                    worker.ready, self.false_starts = True, 0
                    continue
                if not worker.ready:
                    self._drop(worker)
                    self.false_starts += 1
                    if self.false_starts < 3:
                        continue
                    raise ValueError(
                        f"task {self.recipe[0]}: a reward worker could not make the task ({answer.text}); its own message is above"
                    )
                results[worker.index], worker.index = answer, None
                if answer == DIED or isinstance(answer, Failure) and answer.kind == TIMEOUT:
                    self._drop(worker)
        return results

    def _drop(self, worker):
        worker.kill()
        self.workers.remove(worker)

    def close(self):
        for worker in list(self.workers):
            self._drop(worker)

    __del__ = close


class _Worker:
    """One process. ready: it has made its task; index: of the pair that it is at, or None."""

    def __init__(self, recipe):
        self.connection, theirs = Pipe()
        self.process = subprocess.Popen(
            [sys.executable, "-m", "nanorl.tasks.pool", str(theirs.fileno())],
            pass_fds=[theirs.fileno()],
            stdin=subprocess.DEVNULL,
            start_new_session=True,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
        )
        theirs.close()
        self.ready, self.index, self.deadline = False, None, time.monotonic() + START
        self.send(recipe)

    def send(self, message):
        """False: it has died. Only a worker that waits for a message is sent one, so this does not block."""
        try:
            self.connection.send(message)
            return True
        except OSError:
            return False

    def receive(self):
        """What the worker says, or DIED."""
        try:
            return self.connection.recv()
        except (EOFError, OSError, pickle.UnpicklingError, struct.error):
            return DIED

    def kill(self):
        try:
            os.killpg(self.process.pid, signal.SIGKILL)
        except ProcessLookupError:
            pass
        self.process.wait()
        self.connection.close()


def describe(error):
    return f"{type(error).__name__}: {error}"[:300]


def _serve(connection):
    from nanorl.tasks import get_task

    name, split, settings = connection.recv()
    task = get_task(name, split, **settings)
    connection.send(READY)
    while True:
        try:
            problem, text, timeout = connection.recv()
        except EOFError:  # the trainer has gone
            return
        signal.setitimer(
            signal.ITIMER_REAL, 2 * timeout + 1
        )  # ends this process, should nobody be left to kill it
        try:
            reward = task.reward(problem, text)
            pickle.dumps(reward)
        except Exception as error:
            reward = Failure(RAISED, describe(error))
        signal.setitimer(signal.ITIMER_REAL, 0)
        connection.send(reward)


if __name__ == "__main__":
    from nanorl.tasks.pool import Failure  # noqa: F811  the one that the trainer can unpickle, not __main__'s

    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the trainer's to handle
    _serve(Connection(int(sys.argv[1])))
