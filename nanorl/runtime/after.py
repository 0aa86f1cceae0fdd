"""--after_save: a command of the user's that runs in the background after every save.

It may copy the run to another machine, for example. Whatever it does, training goes on.
"""

import os
import shlex
import subprocess
import threading

PATIENCE = 600.0  # seconds that a stage waits for the command at its end


class AfterSave:
    """Starts the command when it is called, in a thread of its own.

    command: a line for the shell, in which {dir} is the run's folder and {run} its name. Empty:
    nothing happens.
    directory: the run's folder.
    active: False on ranks other than the first, where nothing happens either.

    While the command still runs, a call has it run once more afterwards, however many calls there
    are. A failure is told at once, with the last line that the command printed. The next call
    tries again.
    """

    def __init__(self, command, directory, active=True):
        self.command = ""
        if active:
            self.command = command.replace("{dir}", shlex.quote(directory))
            self.command = self.command.replace("{run}", shlex.quote(_run_name(directory)))
        self.lock = threading.Lock()
        self.thread = None  # the one that runs the command, while it does
        self.due = False  # whether the command is to run, or to run once more

    def __call__(self):
        with self.lock:
            self.due = bool(self.command)
            if self.due and self.thread is None:
                self.thread = threading.Thread(target=self._work, daemon=True)
                self.thread.start()

    def _work(self):
        """Run the command as long as it is due."""
        while True:
            with self.lock:
                if not self.due:
                    self.thread = None
                    return
                self.due = False

            try:
                failure = self._run_command()
            except Exception as error:
                failure = str(error)
            if failure:
                print(
                    f"WARNING: --after_save failed ({failure}); the next save tries again: "
                    f"{self.command}",
                    flush=True,
                )

    def _run_command(self):
        """Run the command once -> what went wrong, or ""."""
        # It has a session of its own: Ctrl-C stops the training and lets the command finish.
        done = subprocess.run(
            self.command,
            shell=True,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        if done.returncode == 0:
            return ""
        lines = done.stdout.decode("utf-8", "replace").strip().splitlines()
        reason = lines[-1] if lines else "it said nothing"
        return f"exit status {done.returncode}: {reason[:200]}"

    def finish(self):
        """Wait until the command is done, at most PATIENCE seconds. For the end of a stage."""
        thread = self.thread
        if thread is None:
            return
        thread.join(PATIENCE)
        if thread.is_alive():
            print(
                f"WARNING: --after_save still runs after {PATIENCE:.0f} s and is left to itself: "
                f"{self.command}",
                flush=True,
            )


def _run_name(directory):
    """A run's folder -> its name: the path below out/, such as "d4"."""
    name = os.path.relpath(directory, os.environ.get("NANORL_OUT", "out"))
    if name.startswith(".."):
        # A model outside of out/ is no run. It goes by the name of its own folder.
        name = os.path.basename(os.path.abspath(directory))
    return name
