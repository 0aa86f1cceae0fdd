"""runs/gpu_check.py at its smallest, on a CPU and on the simulated GPU, and its table."""

import importlib
import json
import os
import shutil
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest

from scripts import BASE, RL, ROOT, SFT, TOY, call, environment

RUNS = os.path.join(ROOT, "runs")
PARTS = ("where", "exact", "decode", "step", "learner", "profile", "paths")  # no process of theirs


@pytest.fixture(scope="module")
def check():
    """gpu_check.py and the modules of its parts, in their small sizes."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(RUNS)
        patch.setattr(sys, "argv", ["gpu_check.py", "--tiny"])
        names = ("common", "exact", "speed", "training", "table", "parts")
        found = {name: importlib.import_module(f"gpu_checks.{name}") for name in names}
        yield SimpleNamespace(main=importlib.import_module("gpu_check"), **found)


def told(folder, part):
    with open(folder / f"{part}.jsonl", encoding="utf-8") as f:
        return [json.loads(line) for line in f]


# ---- the parts -----------------------------------------------------------------------------------


def test_a_half_takes_six_minutes_at_most(check):
    first, second = check.main.HALVES
    assert not first.keys() & second.keys()
    assert sum(first.values()) <= 360 and sum(second.values()) <= 360
    of_modules = [(m, p) for m in ("exact", "speed", "training") for p in (*first, *second)]
    found = [p for m, p in of_modules if hasattr(getattr(check, m), p)]
    assert sorted({**first, **second}) == sorted(found)
    assert check.main.limits_of([]) == {**first, **second}
    assert check.main.limits_of(["2"]) == second
    assert check.main.limits_of(["exact"]) == {"exact": first["exact"]}
    with pytest.raises(SystemExit, match="nonsense is no part"):
        check.main.limits_of(["nonsense"])


def test_figures(check, tmp_path, monkeypatch):
    """exact, decode, learner and step, in this process, and a rollout without fast paths."""
    monkeypatch.setenv("GPU_CHECK_FOLDER", str(tmp_path))
    for module in (check.exact, check.speed):
        monkeypatch.setattr(module, "rates", lambda _device: (1e12, 1e11))
    for part in ("decode", "learner", "step"):
        getattr(check.speed, part)()
    check.exact.exact()
    assert [d["rows"] for d in told(tmp_path, "decode")] == [8, 16, 8, 16]
    assert all(d["tok_s"] > 0 and 0 < d["of_floor"] < 1 for d in told(tmp_path, "decode"))
    assert all(0 < run["mfu"] < 1 for run in told(tmp_path, "learner"))
    assert all(run["rollout_s"] < run["seconds"] for run in told(tmp_path, "step"))
    *calls, gradient = told(tmp_path, "exact")
    assert [c["equal"] for c in calls] == [64] * 3 and gradient["gradient"] < 1e-5

    # Counted is the second step of a rollout, and the step itself is put back.
    step = check.speed.DecodeBatch.step
    monkeypatch.setattr(check.speed, "kernels_of", lambda work: work() or [("k", 1)] * 7)
    case = check.speed.sampling(1, 8)
    assert check.speed.kernels_of_a_step(case.work) == 7
    assert check.speed.DecodeBatch.step is step and len(case.engine.stats["live"]) == 23


def test_kernels_and_backends(check):
    """What runs on the host is not counted, and cuDNN's names, which have "flash" in them, are."""
    cuda, cpu = (getattr(check.common.torch.autograd.DeviceType, d) for d in ("CUDA", "CPU"))
    span = SimpleNamespace(elapsed_us=lambda: 5.0)
    events = []
    for name, device, marked in (
        ("aten::mm", cpu, False),
        ("cudnn_generated_fort_native_sdpa_sm90_flash_fprop", cuda, False),
        ("a range", cuda, True),
    ):
        events.append(
            SimpleNamespace(
                name=name, device_type=device, time_range=span, is_user_annotation=marked
            )
        )
    kernels = check.common.on_gpu(events)
    assert [name for name, _ in kernels] == ["cudnn_generated_fort_native_sdpa_sm90_flash_fprop"]
    assert check.exact.backend_of(kernels)[0] == "cuDNN"
    assert check.exact.backend_of([("fmha_cutlassF_bf16", 1), ("softmax", 9)]) == (
        "memory-efficient",
        "softmax",
    )


def test_the_gpu_is_watched(check, tmp_path, monkeypatch):
    """Means of what nvidia-smi says twice a second; nothing where it is not or does not tell."""
    assert shutil.which("nvidia-smi") or no_figures(check)
    tool = tmp_path / "nvidia-smi"
    tool.write_text("#!/bin/sh\necho '50, 300.0, 1000'\necho '[N/A], 1, 2'\necho '90, 500, 2000'\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    with check.common.Watch() as watch:
        watch.process.wait()
    expected = dict(utilisation=0.7, watts=400, used_gb=2000 * 2**20 / 1e9)
    assert watch.means() == pytest.approx(expected)


def no_figures(check):
    with check.common.Watch() as watch:
        pass
    return set(watch.means().values()) == {None}


# ---- processes -----------------------------------------------------------------------------------

STAND_IN = """
import json, os, subprocess, sys
part, folder = os.environ["GPU_CHECK_PART"], os.environ["GPU_CHECK_FOLDER"]
with open(f"{folder}/{part}.jsonl", "a") as f:
    print(json.dumps({"value": 1}), file=f)
if part == "where":
    sys.exit("error: no such GPU")
if part == "decode":
    child = subprocess.Popen(["sleep", "60"])
    open(f"{folder}/child", "w").write(str(child.pid))
    child.wait()
"""


def test_a_failure_costs_only_itself(check, tmp_path):
    """What a part had told stays, its last line is the reason, and its processes end with it."""
    (tmp_path / "stand_in.py").write_text(STAND_IN)
    command = [sys.executable, str(tmp_path / "stand_in.py")]
    limits = dict(where=9, decode=1, exact=9)
    file = tmp_path / "results" / "check.json"
    check.parts.run_all(limits, command, str(file))
    check.parts.run_all({"exact": 9}, command, str(file))  # a later half adds to the report
    tmp_path = file.parent
    found = json.loads(file.read_text())["parts"]
    assert [found[part]["results"] for part in found] == [[{"value": 1}]] * 3
    assert found["where"]["status"] == "failed: error: no such GPU"
    assert found["decode"]["status"] == "stopped at its limit of 1 s"
    assert found["exact"]["status"] == "ok"
    child = (tmp_path / "child").read_text()
    deadline = time.time() + 10
    while is_running(child) and time.time() < deadline:
        time.sleep(0.05)
    assert not is_running(child)


def is_running(number):
    try:
        with open(f"/proc/{number}/stat", encoding="utf-8") as f:
            return f.read().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


def test_the_table_has_targets_and_verdicts(check):
    """Of the sizes that are measured: ok, below, not measured; and why a part failed."""
    few = dict(depth=2, rows=8, ms_step=1.5)
    decode = [{**few, "tok_s": 123456.0, "of_floor": 0.25}]
    off = dict(depth=2, variant="no graphs")
    paths = [{**off, "of": "decode", "rows": 8, "tok_s": 1000.0}]
    profile = [{**off, "kernels": 1234}]
    resume = [dict(difference=1e-2, of_two_whole_runs=0.0)]
    report = dict(
        card="a card",
        torch="2",
        commit="abc",
        date="today",
        tiny=False,
        parts=dict(
            decode=dict(status="ok", results=decode),
            resume=dict(status="ok", results=resume),
            paths=dict(status="ok", results=paths),
            profile=dict(status="ok", results=profile),
            learner=dict(status="failed: out of memory", results=[]),
        ),
    )
    lines = check.table.lines(report)
    by_start = {" ".join(line.split()[:5]): line for line in lines}
    assert by_start["d2, 8 rows: tokens/s 123,456"].split()[-4:] == [
        "at",
        "least",
        "100,000",
        "ok",
    ]
    (floor,) = (line for line in lines if line.startswith("d2, 8 rows: share of the floor"))
    assert floor.split()[-5:] == ["25.0%", "at", "least", "30.0%", "below"]
    (killed,) = (line for line in lines if line.startswith("kill -9"))
    assert killed.endswith("below")
    (mfu,) = (line for line in lines if line.startswith("d2 learner: MFU"))
    assert mfu.endswith("not measured")
    assert "learner failed: out of memory" in lines
    (path,) = (line for line in lines if line.startswith("d2 decode, 8 rows"))
    assert path.split()[-4:] == ["no", "graphs", "1,000", "1,234"]


def test_a_difference_between_runs_is_the_largest_of_any_metric(check):
    rows = [{"step": 1, "reward": 0.5, "time/step": 1.0}]
    others = [{"step": 1, "reward": 0.4, "time/step": 9.0}]
    assert check.training.largest_difference(rows, others) == pytest.approx(0.2)
    with pytest.raises(AssertionError):
        check.training.largest_difference(rows, [])


# ---- several ranks -------------------------------------------------------------------------------


@pytest.mark.slow
def test_several_gpus(tmp_path):
    """Two ranks on a CPU: the gradient of one, the all-reduce's share, how a dead rank is told."""
    command = [sys.executable, "runs/multi_gpu_check.py", "--tiny"]
    where = environment(OUT=str(tmp_path))
    ended = subprocess.run(command, cwd=ROOT, env=where, capture_output=True, text=True)
    report = json.loads((tmp_path / "multi_gpu_check.json").read_text())["parts"]
    assert [found["status"] for found in report.values()] == ["ok"] * 3, ended.stdout
    (gradient,) = report["gradient"]["results"]
    assert gradient["ranks"] == 2 and 0 < gradient["difference"] < 1e-5
    assert all(0 < found["share"] < 1 for found in report["reduce"]["results"])
    alone, by_agent = report["dead"]["results"]
    assert alone["seconds"] < 30 and "rank 0 has lost another rank" in alone["lines"][0]
    assert by_agent["seconds"] < 30 and by_agent["codes"] == [1]
    assert "dead rank, torchrun" in ended.stdout and "not measured" not in ended.stdout


# ---- without packages ----------------------------------------------------------------------------

ABSENT = ("datasets", "huggingface_hub", "pyarrow", "pandas", "transformers")


def test_the_stages_run_without_datasets(tmp_path, monkeypatch):
    """Nor with what comes with it: base, SFT, RL and eval."""
    for name in ABSENT:
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.setenv("NANORL_OUT", str(tmp_path))
    assert call("train_base.py", *BASE, "--run_name=a", "--steps=1") is None
    assert call("train_sft.py", *SFT, TOY, "--run_name=a", "--steps=1") is None
    assert call("train_rl.py", *RL, "--run_name=a", "--steps=1") is None
    asked = ["--device=cpu", "--problems=4", "--samples=0", "--examples=0", TOY]
    assert call("eval.py", f"--compare={tmp_path}/a/sft,{tmp_path}/a/rl", *asked) is None


# ---- all of it -----------------------------------------------------------------------------------


@pytest.mark.slow
def test_both_halves_as_a_user_runs_them(tmp_path):
    """Two commands, one report, without the packages that a rented machine may lack."""
    code = "import sys\nfor name in {}:\n    sys.modules[name] = None\n"
    (tmp_path / "sitecustomize.py").write_text(code.format(ABSENT))
    path = f"{tmp_path}{os.pathsep}{ROOT}"
    where = environment(OUT=str(tmp_path / "out"), PYTHONPATH=path, PYTHON=sys.executable)
    for half in ("1", "2"):
        command = ["bash", "runs/gpu_check.sh", half, "--tiny"]
        ended = subprocess.run(command, cwd=ROOT, env=where, capture_output=True, text=True)
        assert ended.returncode == 0, ended.stdout + ended.stderr
    report = json.loads((tmp_path / "out" / "gpu_check.json").read_text())
    assert [found["status"] for found in report["parts"].values()] == ["ok"] * 10
    assert report["torch"] and report["commit"] and report["tiny"]
    (resumed,) = report["parts"]["resume"]["results"]
    assert resumed["resumed"] and resumed["difference"] == resumed["of_two_whole_runs"] == 0
    assert "kill -9, resumed: largest difference  0.0e+00" in " ".join(ended.stdout.split("   "))


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="the simulated CUDA device needs g++")
@pytest.mark.parametrize("part", PARTS)
def test_parts_on_the_simulated_gpu(tmp_path, part):
    where = environment(GPU_CHECK_FOLDER=str(tmp_path), GPU_CHECK_PART=part)
    command = ["tests/fakecuda/fake_run.py", "runs/gpu_check.py", "--tiny"]
    ended = subprocess.run(
        [sys.executable, *command], cwd=ROOT, env=where, capture_output=True, text=True
    )
    assert ended.returncode == 0, ended.stdout[-3000:] + ended.stderr[-3000:]
    results = told(tmp_path, part)
    assert results and not any("error" in result for result in results)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="the simulated CUDA device needs g++")
@pytest.mark.parametrize("part", ["gradient", "reduce"])
def test_a_rank_on_the_simulated_gpu(tmp_path, part):
    folder = str(tmp_path)
    where = environment(GPU_CHECK_FOLDER=folder, GPU_CHECK_WORK=folder, RANK="0")
    command = ["tests/fakecuda/fake_run.py", "runs/multi_gpu_check.py", part, "--tiny"]
    ended = subprocess.run(
        [sys.executable, *command], cwd=ROOT, env=where, capture_output=True, text=True
    )
    assert ended.returncode == 0, ended.stdout[-3000:] + ended.stderr[-3000:]
    assert (tmp_path / {"gradient": "gradient-1.pt", "reduce": "reduce.jsonl"}[part]).exists()
