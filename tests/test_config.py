"""`--name=value` over a script's constants."""

import dataclasses
import os
import re

import pytest
from torch.distributed.run import get_args_parser

from nanorl.runtime import from_trl
from nanorl.runtime.config import RENAMED, configure, read_constants
from scripts import ROOT, call

TRAINING = ["train_base.py", "train_sft.py", "train_rl.py"]
SCRIPTS = [*TRAINING, "eval.py"]

SOURCE = '''"""What the script does."""
import dataclasses
import os
import re

# ---- run
seed = 0  # fixes the order
# a remark between the lines, not a heading
run = ""  # a folder
muon = True  # which optimizer
dry = False  # stop early
# ---- optimization
lr = 2e-4  # of AdamW
floor = -1.5  # a negative one
bare = 3
derived = seed + 1  # not a literal
names = ["a", "b"]  # not a setting
raise RuntimeError("the source is read, never run")


def main():
    hidden = 1  # inside a function


late = 2  # after the first function
'''


@pytest.fixture
def script(tmp_path):
    """-> a fresh copy of the globals of a script with SOURCE's constants"""
    path = tmp_path / "script.py"
    path.write_text(SOURCE)
    return lambda: dict(
        __file__=str(path),
        __doc__="What the script does.",
        **{name: value for name, (value, _, _) in read_constants(SOURCE).items()},
    )


def message(script, *argv):
    with pytest.raises(SystemExit) as error:
        configure(script(), list(argv))
    return str(error.value)


def test_constants_with_comment_and_heading_up_to_the_first_function():
    # The source raises when it runs, so that these come out shows that it was only read.
    assert read_constants(SOURCE) == {
        "seed": (0, "fixes the order", "run"),
        "run": ("", "a folder", "run"),
        "muon": (True, "which optimizer", "run"),
        "dry": (False, "stop early", "run"),
        "lr": (2e-4, "of AdamW", "optimization"),
        "floor": (-1.5, "a negative one", "optimization"),
        "bare": (3, "", "optimization"),
    }


def test_constants_stop_at_a_class_too():
    assert list(read_constants("a = 1\nclass C:\n    b = 2\nc = 3\n")) == ["a"]


def test_a_value_has_the_type_of_its_default(script):
    names = script()
    resolved = configure(names, ["--seed=1_000", "--lr=3", "--run=7", "--muon=no", "--floor=-2"])
    expected = dict(seed=1000, lr=3.0, run="7", muon=False, floor=-2.0, dry=False, bare=3)
    assert resolved == expected
    for name, value in expected.items():
        assert type(resolved[name]) is type(value)
        assert names[name] == value  # the script's own globals are what main() reads


def test_true_and_false_in_words_and_the_bare_flag(script):
    for text in ("--dry", "--dry=true", "--dry=1"):
        assert configure(script(), [text])["dry"] is True
    for text in ("--muon=False", "--muon=0"):
        assert configure(script(), [text])["muon"] is False


def test_a_value_may_hold_equals_signs_and_be_empty(script):
    assert configure(script(), ["--run=a=b; c=d"])["run"] == "a=b; c=d"
    assert configure(script(), ["--run="])["run"] == ""


def test_a_tilde_is_the_users_home(script, monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    assert configure(script(), ["--run=~/a,~/b"])["run"] == "/home/me/a,~/b"


def test_nothing_in_a_value_is_executed(script, tmp_path):
    made = tmp_path / "made"
    text = f"__import__('os').mkdir({str(made)!r})"
    assert configure(script(), [f"--run={text}"])["run"] == text
    assert "a whole number" in message(script, f"--seed={text}")
    assert not made.exists()


def test_an_unknown_name_names_the_near_miss(script):
    assert message(script, "--sed=1") == "--sed: no such constant: did you mean --seed?"
    assert "--help" in message(script, "--zzzzzz=1")
    # What is below the first function is no setting, nor is a list.
    assert "no such constant" in message(script, "--late=1")
    assert "no such constant" in message(script, "--names=1")


def test_an_ill_typed_value_is_refused_with_value_and_remedy(script):
    assert message(script, "--seed=1.5") == "--seed=1.5: seed takes a whole number (default 0)"
    assert message(script, "--lr=fast") == "--lr=fast: lr takes a number (default 0.0002)"
    said = message(script, "--muon=maybe")
    assert said == "--muon=maybe: muon takes true or false (default True)"
    # A bare name is a flag only where the default is true or false.
    assert "--lr=0.0002" in message(script, "--lr")
    assert "--name=value" in message(script, "seed=1")


@pytest.mark.parametrize("flag", ["--help", "-h"])
def test_help_shows_every_constant_with_its_comment(script, capsys, flag):
    with pytest.raises(SystemExit) as stop:
        configure(script(), ["--seed=1", flag])
    shown = capsys.readouterr().out
    assert stop.value.code == 0 and shown.startswith("What the script does.")
    lines = shown.splitlines()
    for name, (default, comment, heading) in read_constants(SOURCE).items():
        line = next(line for line in lines if line.startswith(f"  --{name}={default} "))
        assert line.endswith(comment) and f"\n{heading}\n" in shown


def test_a_constant_that_is_refused_on_purpose_says_why(script):
    with pytest.raises(SystemExit, match="--top_k: no such constant: because"):
        configure(script(), ["--top_k=5"], refused={"top_k": "because"})


# ---- the scripts' own ----------------------------------------------------------------------------


def constants_of(script):
    with open(os.path.join(ROOT, script), encoding="utf-8") as f:
        return read_constants(f.read())


@pytest.mark.parametrize("script", SCRIPTS)
def test_every_constant_of_the_scripts_has_a_comment(script):
    constants = constants_of(script)
    assert len(constants) > 10
    assert [name for name, (_, comment, _) in constants.items() if not comment] == []


@pytest.mark.parametrize("script", SCRIPTS)
def test_torchrun_leaves_every_constant_to_the_script(script):
    """It looks for its own options behind the script's name too, and takes a beginning for one."""
    parser, command = get_args_parser(), ["--nproc_per_node=2", script]
    expected = vars(parser.parse_args(command))
    for name in constants_of(script):
        expected["training_script_args"] = [f"--{name}=1"]
        assert vars(parser.parse_args([*command, f"--{name}=1"])) == expected


@pytest.mark.parametrize("script", TRAINING)
def test_a_constant_that_had_another_name_is_refused_with_the_new_one(script):
    said = call(script, "--run=x")
    assert said == f"--run: no such constant: {RENAMED['run']}"
    assert "--run_name" in said and "\n" not in said


def test_a_name_of_trl_is_answered_with_ours(script):
    with open(os.path.join(ROOT, "train_rl.py"), encoding="utf-8") as f:
        constants = read_constants(f.read())
    for name, (ours, _) in from_trl.NAMES.items():
        assert name not in constants and (not ours or ours in constants), name
        said = from_trl.hint(name, constants)
        assert said and (not ours or f"--{ours} here" in said), name
    # Where a script has no such constant, the near misses are named as ever.
    assert from_trl.hint("beta", ["steps"]) == "" == from_trl.hint("kl_coeff", constants)


def test_the_script_says_so():
    said = call("train_rl.py", "--beta=0.1")
    assert said == "--beta: no such constant: TRL's beta is --kl_coef here"
    assert "problems / prompts_per_step" in call("train_rl.py", "--num_train_epochs=2")
    assert "its own sampler" in call("train_rl.py", "--use_vllm")


def test_the_table_from_trl_has_the_defaults_of_train_rl():
    with open(os.path.join(ROOT, "train_rl.py"), encoding="utf-8") as f:
        constants = read_constants(f.read())
    with open(os.path.join(ROOT, "docs", "from_trl.md"), encoding="utf-8") as f:
        rows = [line.split(" | ") for line in f if line.startswith("| `")]
    assert len(rows) > 20
    for row in rows:
        names = re.findall(r"`(\w+)`", row[2])
        shown = row[3].split(", ")
        if len(names) != len(shown):
            continue  # the row has values beside those of constants
        for name, default in zip(names, shown):
            if name in constants and re.fullmatch(r"[\w.]+", default) and default != "none":
                assert str(constants[name][0]).lower() == default.lower(), name
    # All names that the program knows stand there, but those that speak for themselves.
    text = " ".join(row[0] for row in rows)
    for name in ("beta", "num_generations", "loss_type", "scale_rewards", "epsilon_high"):
        assert f"`{name}`" in text and name in from_trl.NAMES


def test_the_names_are_those_of_trl():
    trl = pytest.importorskip("trl")
    fields = {field.name for field in dataclasses.fields(trl.GRPOConfig)}
    of_others = {"model_name_or_path", "dataset_name", "reward_funcs", "max_prompt_length"}
    of_others |= {"warmup_ratio", "lora_r", "lora_target_modules", "use_peft"}
    assert set(from_trl.NAMES) - of_others <= fields
