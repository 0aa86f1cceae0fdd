"""Rewards in worker processes, with a deadline that is kept from outside.

A task asks for it by an attribute:

    class Proofs:
        timeout = 5.0  # seconds that one reward may take

A worker is a fresh Python in a process group of its own: nothing is forked from a process that
holds a GPU. It makes the task again, from its name and settings, and answers one (problem, text) at
a time. A worker that does not answer in time is killed with its whole group. Another takes over.

    pool                                worker
    (name, split, settings)       ->
                                  <-    READY
    (problem, text, timeout)      ->
                                  <-    a Reward or a Failure; and so on with the next problem
"""

import os
import pickle
import signal
import struct
import subprocess
import sys
import time
import weakref
from collections import namedtuple
from contextlib import suppress
from multiprocessing.connection import Connection, Pipe, wait

from nanorl.tasks import get_task
from nanorl.tasks.cores import cpus
from nanorl.tasks.problem import plain_reward

# What stands in place of a Reward. kind: RAISED or TIMEOUT. text: what the exception said.
Failure = namedtuple("Failure", "kind text")
RAISED, TIMEOUT = "raised", "timeout"

# What a worker says when it has made its task, and what its end is taken for.
READY = "ready"
DIED = Failure(RAISED, "the worker process died")

START = 60.0  # seconds that a worker may take to make its task
FALSE_STARTS = 3  # the pool gives up when so many workers in a row could not make it


class RewardPool:
    """Workers that judge texts side by side.

    recipe: (name, split, settings), from which each worker makes the task. timeout: seconds that
    one reward may take. workers: how many; by default this rank's share of the cores.
    """

    def __init__(self, recipe, timeout, workers=None):
        self.recipe, self.timeout = recipe, timeout
        self.n = workers or share_of_cores()
        self.workers = []
        self.false_starts = 0
        # Also when nobody closes the pool, and before Python takes its modules down at its end.
        weakref.finalize(self, kill_all, self.workers)

    def judge(self, pairs):
        """(problem, text) pairs -> for each its Reward or a Failure, in order.

        Raises ValueError when workers cannot make the task.
        """
        try:
            return self._judge(pairs)
        except BaseException:
            # A worker that is still busy would answer the next question with this one's answer.
            self.close()
            raise

    def _judge(self, pairs):
        results = [None] * len(pairs)
        waiting = list(reversed(range(len(pairs))))  # indices of pairs; the next one is the last
        while None in results:
            # No more workers than there are results to come.
            while len(self.workers) < min(self.n, results.count(None)):
                self.workers.append(Worker(self.recipe))
            self._hand_out(pairs, waiting)

            for worker, answer in self._answers():
                if answer == READY:
                    worker.ready = True
                    self.false_starts = 0
                elif not worker.ready:
                    self._drop(worker)
                    self._count_false_start(answer)
                else:
                    results[worker.index] = answer
                    worker.index = None
                    timed_out = isinstance(answer, Failure) and answer.kind == TIMEOUT
                    if timed_out or answer == DIED:
                        self._drop(worker)
        return results

    def _hand_out(self, pairs, waiting):
        """Give each idle worker a pair, and take the pair's index from `waiting`."""
        idle = [worker for worker in self.workers if worker.ready and worker.index is None]
        for worker in idle[: len(waiting)]:
            problem, text = pairs[waiting[-1]]
            if worker.send((problem, text, self.timeout)):
                worker.index = waiting.pop()
                worker.deadline = time.monotonic() + self.timeout
            else:
                # It died while it was idle. The pair goes to another.
                self._drop(worker)

    def _answers(self):
        """Wait until a worker speaks or is late -> (worker, answer) of those that do.

        The answer is what the worker says, or a Failure.
        """
        active = [w for w in self.workers if not w.ready or w.index is not None]
        first_deadline = min((worker.deadline for worker in active), default=0.0)
        seconds = max(0.0, first_deadline - time.monotonic())
        heard = wait([worker.connection for worker in active], seconds)

        for worker in active:
            if worker.connection in heard:
                yield worker, worker.receive()
            elif time.monotonic() >= worker.deadline:
                yield worker, Failure(TIMEOUT, f"no answer in {self.timeout:g} s")

    def _count_false_start(self, answer):
        """A worker could not make the task. Raises ValueError when others before it could not."""
        self.false_starts += 1
        if self.false_starts >= FALSE_STARTS:
            raise ValueError(
                f"task {self.recipe[0]}: a reward worker could not make the task ({answer.text}); "
                "its own message is above"
            )

    def _drop(self, worker):
        worker.kill()
        self.workers.remove(worker)

    def close(self):
        kill_all(self.workers)


def kill_all(workers):
    """End the workers of a list, and empty it."""
    while workers:
        workers.pop().kill()


def share_of_cores():
    """How many of the cores that may be used there are for each of the ranks, at least 1."""
    ranks = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    return max(1, cpus() // ranks)


class Worker:
    """One process, as the pool sees it.

    ready: it has made its task. index: of the pair that it judges, or None. deadline: when it must
    have answered, by time.monotonic().
    """

    def __init__(self, recipe):
        self.connection, its_end = Pipe()
        fd = its_end.fileno()
        import_path = os.pathsep.join(filter(None, sys.path))
        self.process = subprocess.Popen(
            [sys.executable, "-m", "nanorl.tasks.pool", str(fd)],
            pass_fds=[fd],
            stdin=subprocess.DEVNULL,
            start_new_session=True,
            env={**os.environ, "PYTHONPATH": import_path},
        )
        its_end.close()
        self.ready = False
        self.index = None
        self.deadline = time.monotonic() + START
        self.send(recipe)

    def send(self, message):
        """-> whether it went through; if not, the worker has died.

        A message is sent only to a worker that waits for one, so this does not block.
        """
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
        """End the process and all that it has started."""
        try:
            os.killpg(self.process.pid, signal.SIGKILL)
        except ProcessLookupError:
            pass
        self.process.wait()
        self.connection.close()


# ---- one reward ----------------------------------------------------------------------------------


def ask(task, problem, text):
    """The reward of one text, or the Failure: one odd completion must not end a run.

    A reward that runs the text may raise SystemExit too. Ctrl-C is the user's.
    """
    try:
        return plain_reward(task.reward(problem, text))
    except KeyboardInterrupt:
        raise
    except BaseException as error:
        return Failure(RAISED, f"{type(error).__name__}: {error}"[:300])


# ---- in the worker process -----------------------------------------------------------------------


def serve(connection):
    """Make the task and answer, until the trainer has gone."""
    name, split, settings = connection.recv()
    task = get_task(name, split, **settings)
    with suppress(EOFError, ConnectionError):
        connection.send(READY)
        while True:
            problem, text, timeout = connection.recv()
            # This alarm ends the process, should nobody be left to kill it.
            signal.setitimer(signal.ITIMER_REAL, 2 * timeout + 1)
            reward = ask(task, problem, text)
            signal.setitimer(signal.ITIMER_REAL, 0)
            connection.send(reward)


if __name__ == "__main__":
    # Run as a program, this file is the module __main__, whose Failure the trainer could not
    # unpickle. So the work is done by the module of this name.
    from nanorl.tasks import pool

    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the trainer's to handle
    pool.serve(Connection(int(sys.argv[1])))
