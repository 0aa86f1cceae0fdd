"""Parts of a check, each in a process of its own, and the report that they write together."""

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from datetime import datetime, timezone

import torch


def run_all(limits, command, file):
    """Run parts, {part: seconds that it may take} -> the report, which also goes to `file`.

    command: what starts a part, which is named in GPU_CHECK_PART. Parts that an earlier command has
    run stay in the report.
    """
    folder = os.path.dirname(file)
    os.makedirs(folder, exist_ok=True)
    report = read_report(file)
    report.update(about())
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as work:
        for part, limit in limits.items():
            report["parts"][part] = run_part(part, limit, command, folder, work)
            with open(file, "w", encoding="utf-8") as f:
                json.dump(report, f, indent=1)
    return report


def results_file(name):
    """The path of a check's JSON file: in $OUT, by default in out/gpu_check."""
    folder = os.environ.get("OUT") or os.path.join("out", "gpu_check")
    return os.path.abspath(os.path.join(folder, f"{name}.json"))


def run_part(part, limit, command, folder, work):
    """A part in a process of its own -> {status, seconds, results}.

    status: ok, or why the part ended early. What it had told by then is among the results.
    """
    told = os.path.join(folder, f"{part}.jsonl")
    if os.path.exists(told):
        os.remove(told)
    names = dict(GPU_CHECK_PART=part, GPU_CHECK_FOLDER=folder, GPU_CHECK_WORK=work)
    begun = time.perf_counter()
    with open(os.path.join(folder, f"{part}.log"), "w+", encoding="utf-8") as log:
        # A session of its own, so that what the part has started ends with it.
        process = subprocess.Popen(
            command,
            stdout=log,
            stderr=subprocess.STDOUT,
            env={**os.environ, **names},
            start_new_session=True,
        )
        status = end_of(process, limit)
        log.seek(0)
        said = log.read().strip().splitlines()
    if status == "failed":
        status = f"failed: {said[-1][:300] if said else 'it said nothing'}"

    results = []
    if os.path.exists(told):
        with open(told, encoding="utf-8") as f:
            results = [json.loads(line) for line in f]
        os.remove(told)
    seconds = round(time.perf_counter() - begun, 1)
    print(f"== {part}: {status}, {seconds:.0f} s of {limit}", flush=True)
    return dict(status=status, seconds=seconds, results=results)


def end_of(process, limit):
    """Wait for a part -> ok, failed, or that its time was over. Nothing of it goes on running."""
    try:
        code = process.wait(timeout=limit)
        status = "ok" if code == 0 else "failed"
    except subprocess.TimeoutExpired:
        status = f"stopped at its limit of {limit} s"
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        pass
    process.wait()
    return status


# ---- the report ----------------------------------------------------------------------------------


def read_report(file):
    """What an earlier half has left, or an empty report."""
    try:
        with open(file, encoding="utf-8") as f:
            return json.load(f)
    except (OSError, ValueError):
        return {"parts": {}}


def about():
    """Card, versions, commit, date."""
    values = dict(
        card=None,
        torch=torch.__version__,
        cuda=torch.version.cuda,
        python=sys.version.split()[0],
        commit=commit(),
        date=datetime.now(timezone.utc).isoformat(timespec="seconds"),
        tiny="--tiny" in sys.argv,
    )
    if torch.cuda.is_available():
        memory = torch.cuda.get_device_properties(0).total_memory
        values.update(card=torch.cuda.get_device_name(), memory_gb=round(memory / 1e9, 1))
    return values


def commit():
    """The project's, or None where there is no git."""
    try:
        ended = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True)
    except OSError:
        return None
    return ended.stdout.strip() or None
