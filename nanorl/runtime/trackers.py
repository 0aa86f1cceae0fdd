"""--track: a run's numbers in wandb, tensorboard or trackio, whatever these do.

Each has a process of its own (nanorl/tools/track.py) that reads the files which the run writes. So
a service that is slow, that hangs or that is not there costs the run nothing and cannot stop it.
"""

import os
import subprocess
import sys
import time

KNOWN = ("wandb", "tensorboard", "trackio")
TOLD = 1  # exit status of a process that has told the user what went wrong
PATIENCE = 10.0  # seconds that a stage waits at its end for what is still to be sent


def parse(names):
    """'wandb, tensorboard' -> [wandb, tensorboard]. Raises ValueError for one that is not known."""
    chosen = [name.strip() for name in names.split(",") if name.strip()]
    for name in chosen:
        if name not in KNOWN:
            raise ValueError(f"--track={names}: {name} is none of {', '.join(KNOWN)}")
    return chosen


class Trackers:
    """The processes that send a stage's numbers.

    names: the constant `track`. directory: the stage's folder. active: False on ranks other than
    the first, where nothing happens.

    Raises ValueError for a name that is not known.
    """

    def __init__(self, names, directory, active=True):
        self.names = parse(names)
        self.directory, self.active = directory, active
        self.processes = {}

    def start(self):
        """Call it when run.json is there. The processes end by themselves when this one does."""
        if not self.active:
            return
        for name in self.names:
            command = [sys.executable, "-m", "nanorl.tools.track", self.directory, f"--to={name}"]
            # They know by the end of their input that this process has ended, however that was. In
            # sessions of their own they outlive a Ctrl-C, and send what it has left.
            self.processes[name] = subprocess.Popen(
                [*command, "--follow"],
                stdin=subprocess.PIPE,
                start_new_session=True,
                env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
            )

    def finish(self):
        """Wait until all is sent, at most PATIENCE seconds. For the end of a stage."""
        for process in self.processes.values():
            process.stdin.close()
        deadline = time.monotonic() + PATIENCE
        for name, process in self.processes.items():
            log = os.path.join(self.directory, "track", f"{name}.log")
            try:
                status = process.wait(max(0.0, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                print(f"      {name} is still sending, and is left to itself: {log}", flush=True)
                continue
            if status not in (0, TOLD):
                print(f"WARNING: --track={name} ended with status {status}: {log}", flush=True)
        self.processes = {}
