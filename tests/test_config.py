"""`--name=value` over a script's constants."""

import os

import pytest
from conftest import ROOT

from nanorl.runtime.config import configure, read_constants

SOURCE = '''"""What the script does."""
import os

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
    assert resolved == expected and {n: type(v) for n, v in resolved.items()} == {
        n: type(v) for n, v in expected.items()
    }
    assert {
        n: names[n] for n in expected
    } == expected  # the script's own globals are what main() reads


def test_true_and_false_in_words_and_the_bare_flag(script):
    for text, value in [
        ("--dry", True),
        ("--dry=true", True),
        ("--dry=1", True),
        ("--muon=False", False),
        ("--muon=0", False),
    ]:
        assert configure(script(), [text])[text[2:].split("=")[0]] is value


def test_a_value_may_hold_equals_signs_and_be_empty(script):
    assert configure(script(), ["--run=a=b; c=d"])["run"] == "a=b; c=d"
    assert configure(script(), ["--run="])["run"] == ""


def test_nothing_in_a_value_is_executed(script, tmp_path):
    made = tmp_path / "made"
    text = f"__import__('os').mkdir({str(made)!r})"
    assert configure(script(), [f"--run={text}"])["run"] == text
    assert "a whole number" in message(script, f"--seed={text}")
    assert not made.exists()


def test_an_unknown_name_names_the_near_miss(script):
    assert message(script, "--sed=1") == "--sed: no such constant: did you mean --seed?"
    assert "--help" in message(script, "--zzzzzz=1")
    assert "no such constant" in message(
        script, "--late=1"
    )  # below the first function: not a setting
    assert "no such constant" in message(script, "--names=1")


def test_an_ill_typed_value_is_refused_with_value_and_remedy(script):
    assert message(script, "--seed=1.5") == "--seed=1.5: seed takes a whole number (default 0)"
    assert message(script, "--lr=fast") == "--lr=fast: lr takes a number (default 0.0002)"
    assert (
        message(script, "--muon=maybe") == "--muon=maybe: muon takes true or false (default True)"
    )
    assert "--lr=0.0002" in message(
        script, "--lr"
    )  # a bare name is a flag only where the default is true or false
    assert "--name=value" in message(script, "seed=1")


@pytest.mark.parametrize("flag", ["--help", "-h"])
def test_help_shows_every_constant_with_its_comment(script, capsys, flag):
    with pytest.raises(SystemExit) as stop:
        configure(script(), ["--seed=1", flag])
    shown = capsys.readouterr().out
    assert stop.value.code == 0 and shown.startswith("What the script does.")
    for name, (default, comment, heading) in read_constants(SOURCE).items():
        line = next(
            line for line in shown.splitlines() if line.startswith(f"  --{name}={default} ")
        )
        assert line.endswith(comment) and f"\n{heading}\n" in shown


@pytest.mark.parametrize("name", ["train_base.py", "train_sft.py", "train_rl.py", "eval.py"])
def test_every_constant_of_the_scripts_has_a_comment(name):
    with open(os.path.join(ROOT, name), encoding="utf-8") as f:
        constants = read_constants(f.read())
    assert len(constants) > 10
    assert [n for n, (_, comment, _) in constants.items() if not comment] == []


def test_a_constant_that_is_refused_on_purpose_says_why(script):
    with pytest.raises(SystemExit, match="--top_k: no such constant: because"):
        configure(script(), ["--top_k=5"], refused={"top_k": "because"})
