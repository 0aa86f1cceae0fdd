"""The recipes in runs/: what they call exists and fits together, is done once, and goes on.

A stand-in for python and torchrun writes down what it is called with, and leaves what the scripts
leave; test_slow.py runs runs/laptop.sh itself, at a small size.
"""

import importlib
import importlib.util
import os
import subprocess
import sys

import pytest

from nanorl.data.parts import is_weighted, parse_parts
from nanorl.runtime.config import configure, read_constants
from scripts import ROOT

STAND_IN = """#!/usr/bin/env bash
record() { (IFS=$'\\x1f'; echo "$*") >> "$CALLS"; }
ranks=1
if [ "$(basename "$0")" = torchrun ]; then
    ranks=${1#--nproc_per_node=}
    shift 2
fi
case $1 in
-c) case $2 in *device_count*) echo "$MACHINE" ;; esac ; exit 0 ;;
-) exec "$PYTHON" "$@" ;;
-m) [ "$2" = pip ] || record "$ranks" "$@" ; exit 0 ;;
esac
record "$ranks" "$@"
if [[ $1 = train_* ]]; then
    stage=${1#train_}; stage=${stage%.py}
    for argument in "$@"; do
        case $argument in
        --run_name=*) run=${argument#*=} ;;
        --match_flops=*) run=${argument#*=$NANORL_OUT/}; run=${run%/rl}; stage=sft_more ;;
        esac
    done
    folder=$NANORL_OUT/$run/$stage
    mkdir -p "$folder/step_000007"
    echo '{"steps": 7, "settings": {"steps": 0}}' > "$folder/run.json"
    [ "$stage" = "${STOPS:-}" ] || touch "$folder/step_000007/DONE"
fi
"""
NODE = "8 79 NVIDIA H100 80GB HBM3"
ONE = "1 23 NVIDIA GeForce RTX 4090"
CPU = "0 0 cpu"


@pytest.fixture
def recipe(tmp_path):
    """recipe(name, machine, *arguments, **environment) -> (exit status, calls, what was said).

    A call is [ranks, script, *arguments].
    """
    for name in ("python", "torchrun"):
        (tmp_path / name).write_text(STAND_IN)
        (tmp_path / name).chmod(0o755)
    calls = tmp_path / "calls"

    def run(name, machine, *arguments, **more):
        calls.write_text("")
        settings = {
            "PATH": f"{tmp_path}{os.pathsep}{os.environ['PATH']}",
            "PYTHON": sys.executable,
            "VIRTUAL_ENV": str(tmp_path),
            "NANORL_OUT": str(tmp_path / "out"),
            "CALLS": str(calls),
            "MACHINE": machine,
            **more,
        }
        done = subprocess.run(
            ["bash", f"runs/{name}", *arguments],
            cwd=ROOT,
            env=settings,
            capture_output=True,
            text=True,
        )
        lines = calls.read_text().splitlines()
        return done.returncode, [line.split("\x1f") for line in lines], done.stdout + done.stderr

    return run


def check_call(script, arguments):
    """Fail where a script does not take its arguments, or refuses their values."""
    if script == "-m":
        module, *arguments = arguments
        if not arguments or not arguments[0].startswith("--"):
            assert importlib.util.find_spec(module), module
            return
        settings = load(importlib.util.find_spec(module).origin)
    else:
        settings = load(os.path.join(ROOT, script))
    found = configure(settings, arguments)
    if script == "eval.py":
        settings["check_settings"]()
    elif "check_settings" in settings:
        settings["check_settings"](found)
    if is_weighted(found.get("data", "")):
        assert parse_parts(found["data"])


def load(path):
    """A script's globals, in a module of its own."""
    spec = importlib.util.spec_from_file_location("script", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert read_constants(spec.loader.get_source("script"))
    return vars(module)


def is_plan(call):
    return call[1:3] == ["-m", "nanorl.tools.plan"]


# A recipe, on which machine, with which arguments -> how many calls.
RECIPES = [
    ("quickstart.sh", CPU, [], 8),
    ("laptop.sh", CPU, [], 8),
    ("single_gpu.sh", ONE, [], 8),
    ("speedrun.sh", NODE, [], 9),
    ("tasks.sh", CPU, ["countdown"], 4),
    ("journal.sh", CPU, ["curriculum"], 5),
    ("qwen_gsm8k.sh", NODE, [], 2),
    ("rl_vs_sft.sh", CPU, ["--seeds=0"], 11),
    ("rl_vs_sft_gsm8k.sh", NODE, [], 15),
]


@pytest.mark.parametrize("name, machine, arguments, n", RECIPES)
def test_the_scripts_take_what_recipes_give_them(recipe, name, machine, arguments, n):
    status, calls, said = recipe(name, machine, *arguments, SEEDS="0")
    assert status == 0, said
    assert len(calls) == n
    several = {"8"} if machine == NODE else {"1"}
    for call in calls:
        ranks, script, *arguments = call
        if script != "-m":
            assert {ranks} == several, call
        if not is_plan(call):
            check_call(script, arguments)


@pytest.mark.parametrize("name, machine", [("single_gpu.sh", ONE), ("speedrun.sh", NODE)])
def test_the_plan_comes_first(recipe, name, machine):
    status, calls, said = recipe(name, machine)
    assert is_plan(calls[0])
    assert not any(map(is_plan, calls[1:]))
    card = {ONE: "--gpu=rtx4090", NODE: "--gpu=h100"}[machine]
    assert {f"--gpus={machine[0]}", card} <= set(calls[0])
    if importlib.util.find_spec("nanorl.tools.plan"):
        check_call(*calls[0][1:2], calls[0][2:])

    status, calls, said = recipe(name, "1 40 Some Other Card")
    assert (status, calls) == (1, [])
    assert "error: the plan does not know Some Other Card: GPU=a100" in said
    status, calls, said = recipe(name, "1 40 Some Other Card", GPU="a100")
    assert status == 0
    assert "--gpu=a100" in calls[0]


@pytest.mark.parametrize(
    "name", ["laptop.sh", "single_gpu.sh", "speedrun.sh", "rl_vs_sft.sh", "rl_vs_sft_gsm8k.sh"]
)
def test_what_is_done_is_not_done_again(recipe, name):
    machine = CPU if name in ("laptop.sh", "rl_vs_sft.sh") else NODE
    recipe(name, machine, SEEDS="0")
    status, calls, said = recipe(name, machine, SEEDS="0")
    assert status == 0
    scripts = {call[1] for call in calls}
    assert scripts <= {"-m"}  # the plan, the table, the report
    assert "done before: train_sft.py" in said
    # Where results go has no part in what is done.
    assert recipe(name, machine, SEEDS="0", AFTER_SAVE="true")[1] == calls


def test_a_stage_that_stops_early_ends_the_recipe_and_goes_on(recipe):
    """SIGTERM ends a script with status 0, its state saved."""
    status, calls, said = recipe("laptop.sh", CPU, STOPS="sft")
    assert status == 1
    assert calls[-1][1] == "train_sft.py"
    assert "sft stopped before its last step: the same command goes on" in said
    status, calls, said = recipe("laptop.sh", CPU)
    assert status == 0
    assert [call[1] for call in calls[:2]] == ["train_sft.py", "train_rl.py"]


def test_other_constants_are_the_scripts_to_judge(recipe):
    recipe("laptop.sh", CPU)
    calls = recipe("laptop.sh", CPU, SFT="--steps=900")[1]
    assert [call[1] for call in calls if call[1] != "-m"] == ["train_sft.py"]
    assert calls[0][-1] == "--steps=900"


@pytest.mark.parametrize(
    "name, machine", [("speedrun.sh", NODE), ("rl_vs_sft.sh", CPU), ("laptop.sh", CPU)]
)
def test_one_variable_takes_all_results_off_the_machine(recipe, tmp_path, name, machine):
    target = tmp_path / "left"
    command = f"echo {{dir}} {{run}} >> {target}"
    status, calls, said = recipe(name, machine, AFTER_SAVE=command)
    assert status == 0
    for call in calls:
        if call[1] != "-m":
            assert call[-1] == f"--after_save={command}"
    # What no script writes, the report, leaves at the end.
    folder, run = target.read_text().split()
    assert folder == f"{tmp_path}/out/{run}"


def test_a_laptop_takes_what_files_there_are(recipe, tmp_path):
    plain = recipe("laptop.sh", CPU)[2]
    assert "GSM8K is left out" in plain
    data = tmp_path / "my data"
    for name in ("text/a.txt", "gsm8k/train.jsonl", "alpaca/train.jsonl"):
        (data / name).parent.mkdir(parents=True)
        (data / name).write_text("x")
    status, calls, said = recipe("laptop.sh", CPU, NANORL_DATA=str(data), RUN="with")
    assert status == 0
    assert "left out" not in said
    own = tmp_path / "out" / "with" / "tasks.txt"
    assert f"--data={data}/text/*.txt,{own}" in calls[0]
    assert own.read_text().count("<|endoftext|>") == 40_000
    sft = next(call for call in calls if call[1] == "train_sft.py")
    assert f"--data=spelling=6,sum3=6,gsm8k=1,{data}/alpaca/train.jsonl=1" in sft
    assert any("--task=gsm8k" in call for call in calls)
