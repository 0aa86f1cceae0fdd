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
from multiprocessing.connection import Connection, Pipe, wait

RAISED, TIMEOUT = "raised", "timeout"  # in place of a Reward
READY, DIED = "ready", "died"  # what else a worker may have to say
START = 60.0  # seconds that a worker may take to make its task


class RewardPool:
    """`recipe` (name, split, settings) makes the task in each of `workers` processes (default: this rank's share of the cores)."""

    def __init__(self, recipe, timeout, workers=None):
        self.recipe, self.timeout = recipe, timeout
        self.n = workers or max(1, (os.cpu_count() or 1) // int(os.environ.get("LOCAL_WORLD_SIZE", 1)))
        self.workers = []

    def judge(self, pairs):
        """[(problem, text)] -> for each its Reward, RAISED or TIMEOUT, in order."""
        results, waiting, busy = [None] * len(pairs), list(range(len(pairs)))[::-1], {}
        while waiting or busy:
            idle = [w for w in self.workers if w not in busy]
            while waiting and (idle or len(self.workers) < self.n):
                if not idle:
                    idle.append(_Worker(self.recipe))
                    self.workers.append(idle[-1])
                worker, index = idle.pop(), waiting.pop()
                worker.send(pairs[index], self.timeout)
                busy[worker] = index
            ready = wait([w.connection for w in busy], max(0.0, min(w.deadline for w in busy) - time.monotonic()))
            for worker in list(busy):
                if worker.connection in ready:
                    answer = worker.receive()
                elif time.monotonic() >= worker.deadline:
                    answer = TIMEOUT
                else:
                    continue
                if answer == READY:  # the task is made: only now the clock of its first reward starts
                    worker.deadline = time.monotonic() + self.timeout
                    continue
                results[busy.pop(worker)] = RAISED if answer == DIED else answer
                if answer in (DIED, TIMEOUT):
                    worker.kill()
                    self.workers.remove(worker)
        return results

    def close(self):
        for worker in self.workers:
            worker.kill()
        self.workers = []

    __del__ = close


class _Worker:
    def __init__(self, recipe):
        self.connection, theirs = Pipe()
        self.process = subprocess.Popen([sys.executable, "-m", "nanorl.tasks.pool", str(theirs.fileno())], pass_fds=[theirs.fileno()],
                                        stdin=subprocess.DEVNULL, start_new_session=True, cwd=os.getcwd(),
                                        env={**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)})
        theirs.close()
        self.connection.send(recipe)
        self.new = True

    def send(self, pair, timeout):
        self.deadline = time.monotonic() + (START if self.new else timeout)
        self.new = False
        self.connection.send((*pair, timeout))

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
        signal.setitimer(signal.ITIMER_REAL, 2 * timeout + 1)  # ends this process, should nobody be left to kill it
        try:
            reward = task.reward(problem, text)
            pickle.dumps(reward)
        except Exception:
            reward = RAISED
        signal.setitimer(signal.ITIMER_REAL, 0)
        connection.send(reward)


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the trainer's to handle
    _serve(Connection(int(sys.argv[1])))
