"""Work that goes on beside the training: a checkpoint is copied, and written while steps go on."""

import threading

import torch

NAME = "nanorl writes a checkpoint"  # of the thread, by which the end of a rank finds it


class Background:
    """Does one piece of work at a time, in a thread.

    What it raises is raised by the next call of any method here. The thread is no daemon, so the
    process ends when the work is done, unless it is killed.
    """

    def __init__(self):
        self.thread = None
        self.error = None

    def start(self, work):
        """Call work() in the background, once the work before it is done."""
        self.finish()
        self.thread = threading.Thread(target=self._run, args=(work,), name=NAME)
        self.thread.start()

    def _run(self, work):
        try:
            work()
        except Exception as error:
            self.error = error

    def check(self):
        """Raise what the work has raised, if it is done and has."""
        error, self.error = self.error, None
        if error:
            raise error

    def finish(self):
        """Wait until the work is done, and raise what it has raised."""
        if self.thread:
            self.thread.join()
        self.check()


def wait():
    """Wait for all such threads of this process."""
    for thread in threading.enumerate():
        if thread.name == NAME:
            thread.join()


def copied(value):
    """A value of dicts, lists, tuples, tensors and constants -> a copy, whose tensors are on the
    CPU."""
    if isinstance(value, torch.Tensor):
        return value.detach().to("cpu", copy=True)
    if isinstance(value, dict):
        return {key: copied(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(copied(item) for item in value)
    return value
