"""--after_save: a command of the user's that runs in the background after every save, such as a copy to another machine. Whatever becomes of it, training goes on."""

import os
import shlex
import subprocess
import threading

PATIENCE = 600.0  # seconds that a stage waits for it at its end


class AfterSave:
    """command: a line for the shell, in which {dir} is the run's folder and {run} its name; empty: nothing happens. A call starts it, or, while it still runs,
    has it run once more. A failure is told at once, with the last line it printed; the next call tries again."""

    def __init__(self, command, directory, active=True):
        name = os.path.relpath(directory, os.environ.get("NANORL_OUT", "out"))
        name = (
            os.path.basename(os.path.abspath(directory)) if name.startswith("..") else name
        )  # a model that is no run of ours
        self.command = (
            command.replace("{dir}", shlex.quote(directory)).replace("{run}", shlex.quote(name))
            if active
            else ""
        )
        self.lock, self.thread, self.due = threading.Lock(), None, False

    def __call__(self):
        with self.lock:
            self.due = bool(self.command)
            if self.due and self.thread is None:
                self.thread = threading.Thread(target=self._work, daemon=True)
                self.thread.start()

    def _work(self):
        while True:
            with self.lock:
                if not self.due:
                    self.thread = None
                    return
                self.due = False
            try:  # in a session of its own, so that Ctrl-C, which stops the training, lets it finish
                done = subprocess.run(
                    self.command,
                    shell=True,
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.PIPE,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,
                )
                why = (
                    (
                        done.stdout.decode("utf-8", "replace").strip().splitlines()
                        or ["it said nothing"]
                    )[-1]
                    if done.returncode
                    else ""
                )
                failed = f"exit status {done.returncode}: {why[:200]}" if done.returncode else ""
            except Exception as error:
                failed = str(error)
            if failed:
                print(
                    f"WARNING: --after_save failed ({failed}); the next save tries again: {self.command}",
                    flush=True,
                )

    def finish(self):
        """At the end of a stage: wait until it is done, at most PATIENCE."""
        thread = self.thread
        if thread is not None:
            thread.join(PATIENCE)
            if thread.is_alive():
                print(
                    f"WARNING: --after_save still runs after {PATIENCE:.0f} s and is left to itself: {self.command}",
                    flush=True,
                )
