"""What a run leaves to read: run.json, metrics.jsonl, rollouts/, and one line a step on the console."""
import gzip
import json
import math
import os
import platform
import subprocess
import time


class RunLog:
    """Files of one stage's directory; on ranks other than the first (`active` false) every call does nothing."""

    def __init__(self, directory, active=True):
        self.directory, self.active, self.started = directory, active, time.time()
        if active:
            os.makedirs(directory, exist_ok=True)

    def _path(self, *names):
        return os.path.join(self.directory, *names)

    def card(self, **values):
        """run.json: the resolved constants and what was derived from them, with commit and versions."""
        if self.active:
            import torch
            commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, cwd=os.path.dirname(os.path.abspath(__file__)))
            values.update(commit=commit.stdout.strip() or None, torch=torch.__version__, python=platform.python_version(), machine=platform.machine())
            _replace(self._path("run.json"), (json.dumps(values, indent=2) + "\n").encode())

    def cut(self, step):
        """Forget rows and rollouts after `step`: they are about to be made again. -1: all, since no checkpoint was reached."""
        if self.active and os.path.exists(self._path("metrics.jsonl")):
            with open(self._path("metrics.jsonl"), encoding="utf-8") as f:
                lines = f.readlines()
            kept = [line for line in lines if line.endswith("\n") and json.loads(line)["step"] <= step]
            _replace(self._path("metrics.jsonl"), "".join(kept).encode())
            if len(kept) < len(lines):
                print(f"{self._path('metrics.jsonl')}: {len(lines) - len(kept)} rows " + (f"after step {step}" if step >= 0 else "of a run that had saved "
                      "no checkpoint") + " are removed and made again", flush=True)
        if self.active and os.path.isdir(self._path("rollouts")):
            for name in os.listdir(self._path("rollouts")):
                if name > f"step_{step:06d}.jsonl.gz":
                    os.remove(self._path("rollouts", name))

    def row(self, step, **values):
        """One line of metrics.jsonl."""
        if self.active:
            values = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in values.items()}  # JSON has no NaN
            with open(self._path("metrics.jsonl"), "a", encoding="utf-8") as f:
                f.write(json.dumps({"step": step, "time": round(time.time(), 3), **values}) + "\n")

    def rollouts(self, step, records):
        """rollouts/step_000120.jsonl.gz, one record a completion. No time stamp inside, so equal runs give equal bytes."""
        if self.active:
            os.makedirs(self._path("rollouts"), exist_ok=True)
            text = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)
            _replace(self._path("rollouts", f"step_{step:06d}.jsonl.gz"), gzip.compress(text.encode("utf-8"), mtime=0))


def _replace(path, content):
    """Write a file whole or not at all."""
    with open(path + ".tmp", "wb") as f:
        f.write(content)
    os.replace(path + ".tmp", path)


def duration(seconds):
    """75 -> '1m15s'"""
    seconds = int(round(seconds))
    h, m, s = seconds // 3600, seconds // 60 % 60, seconds % 60
    return f"{h}h{m:02d}m" if h else f"{m}m{s:02d}s" if m else f"{s}s"
