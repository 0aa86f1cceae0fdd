"""--after_save: what runs, when, and that nothing it does stops a run."""

import os
import sys
import threading
import time

import pytest

from nanorl.runtime import after, dist
from nanorl.runtime.after import AfterSave
from scripts import RL, ROWS, SMALL, call


def test_the_folder_is_filled_in_whatever_its_name(tmp_path, monkeypatch):
    monkeypatch.setenv("NANORL_OUT", str(tmp_path))
    folder = tmp_path / "a 'b' $c"
    folder.mkdir()
    sent = AfterSave("echo {run} > {dir}/told; pwd > {dir}/where", str(folder))
    sent()
    sent.finish()
    assert (folder / "told").read_text() == "a 'b' $c\n"
    monkeypatch.setenv("NANORL_OUT", str(tmp_path / "elsewhere"))
    # A model that is no run has its own name.
    assert AfterSave("{run}", str(folder)).command == "'a '\"'\"'b'\"'\"' $c'"


def test_it_has_a_session_of_its_own(tmp_path):
    """So that Ctrl-C in the terminal does not reach it."""
    show = f"{sys.executable} -c 'import os; print(os.getsid(0))'"
    sent = AfterSave(f"{show} > {{dir}}/session", str(tmp_path))
    sent()
    sent.finish()
    assert int((tmp_path / "session").read_text()) != os.getsid(0)


@pytest.mark.parametrize(
    "script, start, arguments",
    [
        ("train_base.py", None, [*SMALL, *ROWS, "--documents=300", "--vocab_size=300"]),
        ("train_sft.py", "base", [*SMALL, *ROWS, "--examples=400"]),
        ("train_rl.py", "sft", RL),
    ],
)
def test_the_last_save_before_a_stop_is_sent(out, tmp_path, monkeypatch, script, start, arguments):
    monkeypatch.setattr(dist, "_stop", 15)  # SIGTERM has come
    model = [f"--model={out / 'a' / start}"] if start else []
    command = f"--after_save=sleep 0.5; echo sent > {tmp_path}/sent"
    assert call(script, *arguments, *model, "--run_name=stopped", command) == 0
    assert (tmp_path / "sent").exists()


def test_saves_while_it_runs_make_it_run_once_more(tmp_path):
    """The command waits for the test, so that a call which returns has not waited for it."""
    go = tmp_path / "go"
    wait = f"while [ ! -e {go} ]; do sleep 0.01; done"
    told = tmp_path / "told"
    sent = AfterSave(f"echo begun >> {told}; {wait}; echo done >> {told}", str(tmp_path))
    sent()
    while not told.exists():
        time.sleep(0.01)
    for _ in range(4):
        sent()
    assert told.read_text() == "begun\n"  # the five calls are over, it is not
    go.touch()
    sent.finish()
    assert told.read_text() == "begun\ndone\n" * 2


@pytest.mark.parametrize(
    "command, words",
    [
        ("echo no room >&2; exit 7", "exit status 7: no room"),
        ("kill -9 $$", "exit status -9"),
        ("no-such-program-here {dir}", "exit status 127"),
        ("echo -e '\\xff\\xfe'; false", "exit status 1"),
        ("'", "exit status 2"),
    ],
)
def test_a_failure_warns_and_the_next_save_tries_again(tmp_path, capsys, command, words):
    sent = AfterSave(command, str(tmp_path))
    for _ in range(2):
        sent()
        sent.finish()
        said = capsys.readouterr().out
        assert said.count("WARNING: --after_save failed") == 1
        assert words in said and "tries again" in said


def test_one_that_hangs_is_left_to_itself(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(after, "PATIENCE", 0.2)
    go = tmp_path / "go"
    sent = AfterSave(f"while [ ! -e {go} ]; do sleep 0.01; done", str(tmp_path))
    sent()
    sent.finish()  # it comes back, though the command still waits
    go.touch()
    assert "still runs after 0 s and is left to itself" in capsys.readouterr().out


def test_other_ranks_and_no_command_do_nothing(tmp_path):
    before = set(threading.enumerate())
    other_rank = AfterSave(f"touch {tmp_path}/told", str(tmp_path), active=False)
    no_command = AfterSave("", str(tmp_path))
    for sent in (other_rank, no_command):
        sent()
        assert set(threading.enumerate()) <= before
        sent.finish()
    assert not (tmp_path / "told").exists()


@pytest.mark.parametrize("status, name", [(0, "good"), (3, "bad")])
def test_every_stage_and_eval_run_it_and_go_on_when_it_fails(out, tmp_path, capsys, status, name):
    """The command copies what is there: after the last save the copy has its checkpoint whole."""
    to = tmp_path / name
    copy = f"mkdir -p '{to}'/{{run}} && cp -r {{dir}}/. '{to}'/{{run}}; exit {status}"
    run = [f"--run_name={name}", f"--after_save={copy}"]

    training = [*SMALL, *ROWS, *run, "--save_every=2", "--dtype=fp32", "--steps=3"]
    base = ["--documents=300", "--vocab_size=300", "--sample_tokens=0"]
    assert call("train_base.py", *training, *base) is None
    assert (to / name / "base" / "step_000003" / "DONE").exists()

    assert call("train_sft.py", *training, "--examples=400") is None
    assert call("train_rl.py", *RL, *run, "--steps=2") is None
    assert (to / name / "sft" / "step_000003" / "DONE").exists()
    assert (to / name / "rl" / "step_000002" / "DONE").exists()

    evaluation = ["--device=cpu", "--task=0-20", "--problems=4", "--samples=0"]
    model = f"--model={out / name / 'sft'}"
    assert call("eval.py", *evaluation, model, f"--after_save={copy}") is None
    assert (to / name / "sft" / "step_000003" / "eval" / "summary.json").exists()

    said = capsys.readouterr().out
    assert ("WARNING: --after_save failed (exit status 3" in said) == bool(status)
