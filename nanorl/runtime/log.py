"""What a run leaves to read: run.json, metrics.jsonl, rollouts/, and one line a step on the console."""

import gzip
import io
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

            commit = subprocess.run(
                ["git", "rev-parse", "HEAD"],
                capture_output=True,
                text=True,
                cwd=os.path.dirname(os.path.abspath(__file__)),
            )
            values.update(
                commit=commit.stdout.strip() or None,
                torch=torch.__version__,
                python=platform.python_version(),
                machine=platform.machine(),
            )
            _replace(self._path("run.json"), (json.dumps(values, indent=2) + "\n").encode())

    def cut(self, step):
        """Forget rows and rollouts after `step`: they are about to be made again. -1: all, since no checkpoint was reached."""
        if self.active and os.path.exists(self._path("metrics.jsonl")):
            with open(self._path("metrics.jsonl"), encoding="utf-8") as f:
                lines = f.readlines()
            kept = [
                line for line in lines if line.endswith("\n") and json.loads(line)["step"] <= step
            ]
            _replace(self._path("metrics.jsonl"), "".join(kept).encode())
            if len(kept) < len(lines):
                print(
                    f"{self._path('metrics.jsonl')}: {len(lines) - len(kept)} rows "
                    + (
                        f"after step {step}"
                        if step >= 0
                        else "of a run that had saved no checkpoint"
                    )
                    + " are removed and made again",
                    flush=True,
                )
        if self.active and os.path.isdir(self._path("rollouts")):
            for name in os.listdir(self._path("rollouts")):
                if name > f"step_{step:06d}.jsonl.gz":
                    os.remove(self._path("rollouts", name))

    def row(self, step, **values):
        """One line of metrics.jsonl."""
        if self.active:
            values = {
                k: None if isinstance(v, float) and not math.isfinite(v) else v
                for k, v in values.items()
            }  # JSON has no NaN
            with open(self._path("metrics.jsonl"), "a", encoding="utf-8") as f:
                f.write(json.dumps({"step": step, "time": round(time.time(), 3), **values}) + "\n")

    def rollouts(self, step, records):
        """rollouts/step_000120.jsonl.gz, one record a completion, compressed as it is made. No time stamp in gzip's own header."""
        if self.active:
            os.makedirs(self._path("rollouts"), exist_ok=True)
            path = self._path("rollouts", f"step_{step:06d}.jsonl.gz")
            with open(path + ".tmp", "wb") as f:
                write_records(f, records)
            os.replace(path + ".tmp", path)


def write_records(file, records):
    """Records as gzipped JSON lines into an open binary file."""
    with gzip.GzipFile("", "wb", fileobj=file, mtime=0) as zipped:
        for record in records:
            zipped.write((json.dumps(record, ensure_ascii=False) + "\n").encode("utf-8"))


def size_of(records):
    """Bytes that such a file of these records takes."""
    file = io.BytesIO()
    write_records(file, records)
    return file.tell()


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


def size(n):
    """Bytes -> '1.2 MB'"""
    for unit in ("bytes", "kB", "MB", "GB"):
        if n < 1000:
            break
        n, unit = n / 1000, "TB"
    return f"{n:.0f} {unit}" if unit == "bytes" else f"{n:.1f} {unit}"
