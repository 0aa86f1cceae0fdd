"""What a run leaves for people to read: run.json, the .jsonl files, rollouts/ and evals/."""

import gzip
import io
import json
import math
import os
import platform
import subprocess
import time

# ---- JSON ----------------------------------------------------------------------------------------


def to_json(value, **options):
    """json.dumps, with null for infinities and NaN, which JSON lacks: other readers refuse them."""
    return json.dumps(_finite(value), allow_nan=False, **options)


def _finite(value):
    """A value with None for every float in it that is not finite."""
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


# ---- files ---------------------------------------------------------------------------------------


def make_folder(path):
    """Make a folder, if it is not there. Raises ValueError where it cannot be made."""
    try:
        os.makedirs(path, exist_ok=True)
    except OSError as error:
        # Its name is too long, or a file has that name, or the folder above is read-only.
        raise ValueError(
            f"no folder {path} can be made ({error.strerror}): choose another --run_name, or "
            "another folder with NANORL_OUT=<folder>"
        ) from None


class RunLog:
    """The files of one stage's directory.

    active: False on ranks other than the first, where every method does nothing.

    Raises ValueError for a directory that cannot be made.
    """

    def __init__(self, directory, active=True):
        self.directory, self.active = directory, active
        self.evaluation_bytes = 0  # of the last one
        if active:
            make_folder(directory)

    def _path(self, *names):
        return os.path.join(self.directory, *names)

    def card(self, **values):
        """Write run.json: the values, and the commit, the versions and the machine.

        values: the resolved constants and what was derived from them.
        """
        if not self.active:
            return
        import torch  # for its version alone

        values.update(
            commit=_commit(),
            torch=torch.__version__,
            python=platform.python_version(),
            machine=platform.machine(),
            hardware=_hardware(values.get("device", "cpu")),
        )
        text = to_json(values, indent=2) + "\n"
        replace_file(self._path("run.json"), text.encode())

    def earlier_card(self):
        """What run.json holds from an earlier start of this run; nothing where none can be read."""
        path = self._path("run.json")
        if not os.path.exists(path):
            return {}
        try:
            with open(path, encoding="utf-8") as f:
                return json.load(f)
        except ValueError:
            return {}  # a machine that lost power may leave half of it

    def cut(self, step):
        """Remove rows, events, rollouts and evaluations after `step`: they are made again.

        step: -1 removes all, since no checkpoint was reached.
        """
        if self.active:
            self._cut_lines("events.jsonl", step)
            removed = self._cut_lines("metrics.jsonl", step)
            if removed:
                which = "of a run that had saved no checkpoint"
                if step >= 0:
                    which = f"after step {step}"
                words = f"{removed} rows {which} are removed and made again"
                print(f"{self._path('metrics.jsonl')}: {words}", flush=True)
                self.event(max(step, 0), "removed", words)
            self._cut_steps("rollouts", step)
            self._cut_steps("evals", step)

    def _cut_lines(self, name, step):
        """Remove the lines after `step` from a file of JSON lines -> how many."""
        path = self._path(name)
        if not os.path.exists(path):
            return 0
        with open(path, encoding="utf-8") as f:
            lines = f.readlines()

        # A killed process may leave half a line at the end. It goes too.
        kept = []
        for line in lines:
            if line.endswith("\n") and json.loads(line)["step"] <= step:
                kept.append(line)
        replace_file(path, "".join(kept).encode())
        return len(lines) - len(kept)

    def _cut_steps(self, folder, step):
        folder = self._path(folder)
        if not os.path.isdir(folder):
            return
        for name in os.listdir(folder):
            if name > f"step_{step:06d}.jsonl.gz":
                os.remove(os.path.join(folder, name))

    def row(self, step, **values):
        """Add a line to metrics.jsonl. Infinities and NaN, which JSON lacks, become null."""
        if not self.active:
            return
        self._add("metrics.jsonl", {"step": step, "time": round(time.time(), 3), **values})

    def event(self, step, kind, text):
        """Add a line to events.jsonl: what the console said once, of what happened at a step.

        kind: warning, saved, resumed, removed or stopped.
        """
        if self.active:
            event = {"step": step, "time": round(time.time(), 3), "kind": kind, "text": text}
            self._add("events.jsonl", event)

    def _add(self, name, value):
        with open(self._path(name), "a", encoding="utf-8") as f:
            f.write(to_json(value) + "\n")

    def rollouts(self, step, records, most=math.inf):
        """Write rollouts/step_000120.jsonl.gz, one record a completion, whole or not at all.

        most: the bytes that rollouts/ may hold then -> whether there was room for it.
        """
        if not self.active:
            return True
        os.makedirs(self._path("rollouts"), exist_ok=True)
        path = self._path("rollouts", f"step_{step:06d}.jsonl.gz")
        with open(path + ".tmp", "wb") as f:
            write_records(f, records)
        with os.scandir(self._path("rollouts")) as files:
            held = sum(file.stat().st_size for file in files)
        if held > most:
            os.remove(path + ".tmp")
            return False
        os.replace(path + ".tmp", path)
        return True

    def evaluation(self, step, records):
        """Write evals/step_000120.jsonl.gz likewise. Its bytes are known where it is not written,
        too."""
        content = zipped(records)
        self.evaluation_bytes = len(content)
        if self.active:
            os.makedirs(self._path("evals"), exist_ok=True)
            replace_file(self._path("evals", f"step_{step:06d}.jsonl.gz"), content)

    def probe(self, records):
        """Write probe.jsonl.gz, the samples of before the first step, likewise."""
        if self.active:
            replace_file(self._path("probe.jsonl.gz"), zipped(records))


def _hardware(device):
    """The name of the GPU, or of the processor and how many cores it has."""
    import torch

    if device.startswith("cuda"):
        return torch.cuda.get_device_name()
    name = platform.processor() or platform.machine()
    if os.path.exists("/proc/cpuinfo"):
        with open("/proc/cpuinfo", encoding="utf-8", errors="replace") as f:
            models = [line for line in f if line.startswith("model name")]
        if models:
            name = models[0].split(":", 1)[1].strip()
    return f"{name}, {os.cpu_count()} cores"


def _commit():
    """The commit of this code, or None where git does not know one."""
    answer = subprocess.run(
        ["git", "rev-parse", "HEAD"],
        capture_output=True,
        text=True,
        cwd=os.path.dirname(os.path.abspath(__file__)),
    )
    return answer.stdout.strip() or None


def replace_file(path, content):
    """Write bytes to a file, whole or not at all."""
    with open(path + ".tmp", "wb") as f:
        f.write(content)
    os.replace(path + ".tmp", path)


def write_records(file, records):
    """Write records as gzipped lines of JSON into an open binary file.

    Each is compressed as it comes. gzip's header gets no time stamp, so that equal records give
    equal bytes.
    """
    with gzip.GzipFile("", "wb", fileobj=file, mtime=0) as zipped:
        for record in records:
            line = to_json(record, ensure_ascii=False) + "\n"
            zipped.write(line.encode("utf-8", "backslashreplace"))


def zipped(records):
    """The bytes that write_records makes of these records."""
    file = io.BytesIO()
    write_records(file, records)
    return file.getvalue()


def size_of(records):
    """How many they are."""
    return len(zipped(records))


# ---- lines with the time -------------------------------------------------------------------------


class Stamped:
    """A text stream, sys.stdout, each line of which begins with the time: --timestamps."""

    def __init__(self, stream):
        self.stream, self.at_start = stream, True

    def write(self, text):
        for line in text.splitlines(keepends=True):
            if self.at_start:
                self.stream.write(time.strftime("%H:%M:%S  "))
            self.stream.write(line)
            self.at_start = line.endswith("\n")
        return len(text)

    def __getattr__(self, name):
        return getattr(self.stream, name)


# ---- numbers as a person reads them --------------------------------------------------------------


def duration(seconds):
    """75 -> '1m15s'"""
    seconds = int(round(seconds))
    h, m, s = seconds // 3600, seconds // 60 % 60, seconds % 60
    if h:
        return f"{h}h{m:02d}m"
    if m:
        return f"{m}m{s:02d}s"
    return f"{s}s"


def size(n):
    """Bytes -> '1.2 MB'"""
    unit = "bytes"
    for larger in ("kB", "MB", "GB", "TB"):
        if n < 1000:
            break
        n /= 1000
        unit = larger
    decimals = 0 if unit == "bytes" else 1
    return f"{n:.{decimals}f} {unit}"
