"""--after_save: what runs, when, and that nothing it does stops a run."""

import os
import sys
import threading
import time

import pytest
from scripts import RL, SMALL, call

from nanorl.runtime import after, dist
from nanorl.runtime.after import AfterSave


def test_the_folder_is_filled_in_whatever_its_name(tmp_path, monkeypatch):
    monkeypatch.setenv("NANORL_OUT", str(tmp_path))
    folder = tmp_path / "a 'b' $c"
    folder.mkdir()
    sent = AfterSave("echo {run} > {dir}/told; pwd > {dir}/where", str(folder))
    sent()
    sent.finish()
    assert (folder / "told").read_text() == "a 'b' $c\n"
    monkeypatch.setenv("NANORL_OUT", str(tmp_path / "elsewhere"))
    assert (
        AfterSave("{run}", str(folder)).command == "'a '\"'\"'b'\"'\"' $c'"
    )  # a model that is no run has its own name


def test_it_has_a_session_of_its_own(tmp_path):
    """So that Ctrl-C in the terminal does not reach it."""
    sent = AfterSave(
        f"{sys.executable} -c 'import os; print(os.getsid(0))' > {{dir}}/session", str(tmp_path)
    )
    sent()
    sent.finish()
    assert int((tmp_path / "session").read_text()) != os.getsid(0)


@pytest.mark.parametrize(
    "script, arguments",
    [
        (
            "train_base.py",
            [*SMALL, "--documents=300", "--vocab_size=300", "--batch_tokens=512", "--seq_len=64"],
        ),
        ("train_sft.py", [*SMALL, "--batch_tokens=512", "--seq_len=64", "--examples=400"]),
        ("train_rl.py", RL),
    ],
)
def test_the_last_save_before_a_stop_is_sent(out, tmp_path, monkeypatch, script, arguments):
    monkeypatch.setattr(dist, "_stop", 15)  # SIGTERM has come
    model = (
        []
        if script == "train_base.py"
        else [f"--model={out / 'a' / ('base' if 'sft' in script else 'sft')}"]
    )
    assert (
        call(
            script,
            *arguments,
            *model,
            "--run_name=stopped",
            f"--after_save=sleep 0.5; echo sent > {tmp_path}/sent",
        )
        == 0
    )
    assert (tmp_path / "sent").exists()


def test_saves_while_it_runs_make_it_run_once_more(tmp_path):
    """The command waits for the test, so that a call which returns has not waited for it."""
    go = tmp_path / "go"
    wait = f"while [ ! -e {go} ]; do sleep 0.01; done"
    sent = AfterSave(
        f"echo begun >> {tmp_path}/told; {wait}; echo done >> {tmp_path}/told", str(tmp_path)
    )
    sent()
    while not (tmp_path / "told").exists():
        time.sleep(0.01)
    for _ in range(4):
        sent()
    assert (tmp_path / "told").read_text() == "begun\n"  # the five calls are over, it is not
    go.touch()
    sent.finish()
    assert (tmp_path / "told").read_text() == "begun\ndone\n" * 2


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
        assert (
            said.count("WARNING: --after_save failed") == 1
            and words in said
            and "tries again" in said
        )


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
    for sent in (
        AfterSave(f"touch {tmp_path}/told", str(tmp_path), active=False),
        AfterSave("", str(tmp_path)),
    ):
        sent()
        assert set(threading.enumerate()) <= before
        sent.finish()
    assert not (tmp_path / "told").exists()


def test_every_stage_and_eval_run_it_and_go_on_when_it_fails(out, tmp_path, capsys):
    """The command copies what is there: after the last save the copy has the last checkpoint whole."""
    copy = "--after_save=mkdir -p '%s'/{run} && cp -r {dir}/. '%s'/{run}; exit %d"
    for status, name in ((0, "good"), (3, "bad")):
        to = tmp_path / name
        arguments = [
            *SMALL,
            f"--run_name={name}",
            "--batch_tokens=512",
            "--seq_len=64",
            "--save_every=2",
            "--dtype=fp32",
            copy % (to, to, status),
        ]
        assert (
            call(
                "train_base.py",
                *arguments,
                "--documents=300",
                "--vocab_size=300",
                "--steps=3",
                "--sample_tokens=0",
            )
            is None
        )
        assert (to / name / "base" / "step_000003" / "DONE").exists()
        assert call("train_sft.py", *arguments, "--steps=3", "--examples=400") is None
        assert (
            call("train_rl.py", *RL, f"--run_name={name}", copy % (to, to, status), "--steps=2")
            is None
        )
        assert (to / name / "sft" / "step_000003" / "DONE").exists() and (
            to / name / "rl" / "step_000002" / "DONE"
        ).exists()
        assert (
            call(
                "eval.py",
                "--device=cpu",
                "--task=0-20",
                "--problems=4",
                "--samples=0",
                f"--model={out / name / 'sft'}",
                copy % (to, to, status),
            )
            is None
        )
        assert (to / name / "sft" / "step_000003" / "eval" / "summary.json").exists()
        said = capsys.readouterr().out
        assert ("WARNING: --after_save failed (exit status 3" in said) == bool(status)
