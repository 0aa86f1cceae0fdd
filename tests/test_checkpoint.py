"""A checkpoint is whole or it is not there, whenever the process dies; which run may be resumed."""

import os
import random
import shutil
import signal
import time

import pytest
import torch
from safetensors import SafetensorError

from nanorl.runtime import checkpoint
from nanorl.runtime.config import read_constants
from nanorl.runtime.run import Run
from scripts import ROOT

SETTINGS = dict(
    steps=40,
    lr=2e-4,
    seed=0,
    task="sum3",
    save_every=10,
    save_reward_above=1.0,
    eval_every=10,
    log_every=5,
    run_name="d4",
    resume="auto",
    dry_run=False,
    device_rows=0,
    max_bad_steps=5,
    device_tokens=16384,
)


def save(directory, step, version=0, best_step=None, settings=SETTINGS, keep=""):
    """A checkpoint of three files, in each of which step and version can be checked."""

    def write_model(path):
        for name in ("config.json", "model.safetensors"):
            with open(os.path.join(path, name), "w") as f:
                f.write(f"{step} {version}\n" * 2000)

    state = {
        "step": step,
        "version": version,
        "weights": torch.full((2000,), float(step)),
        "settings": settings,
    }
    return checkpoint.save(str(directory), step, write_model, state, best_step, keep=keep)


def version_of(path):
    """The version of a checkpoint all of whose files belong to the same save."""
    state = checkpoint.load_state(path)
    step = int(os.path.basename(path).removeprefix("step_"))
    assert state["step"] == step and bool((state["weights"] == step).all())
    for name in ("config.json", "model.safetensors"):
        with open(os.path.join(path, name)) as f:
            assert f.read() == f"{step} {state['version']}\n" * 2000
    return state["version"]


def whole(directory):
    """{step: version} of all that are found as checkpoints; fails if one of them is not whole."""
    directory = str(directory)
    found = {}
    for step in checkpoint._steps(directory):
        found[step] = version_of(checkpoint.path_of(directory, step))
    newest = checkpoint.path_of(directory, max(found)) if found else None
    assert checkpoint.latest(directory) == newest
    return found


def test_saved_is_found_and_loaded(tmp_path):
    assert checkpoint.latest(str(tmp_path / "none")) is None and whole(tmp_path) == {}
    assert save(tmp_path, 9) == f"saved {tmp_path / 'step_000009'}"
    save(tmp_path, 10, version=3)
    assert whole(tmp_path) == {9: 0, 10: 3}
    assert checkpoint.resolve(str(tmp_path)) == str(tmp_path / "step_000010")
    assert checkpoint.resolve(str(tmp_path / "step_000009")) == str(tmp_path / "step_000009")
    assert checkpoint.resolve(str(tmp_path / "none")) == str(tmp_path / "none")
    save(tmp_path, 10, version=4)  # once more in its place
    assert whole(tmp_path) == {9: 0, 10: 4}


def test_newest_is_by_number_not_by_name(tmp_path):
    for step in (999_999, 1_000_000):
        save(tmp_path, step)
    assert checkpoint.latest(str(tmp_path)).endswith("step_1000000")


def test_a_save_that_fails_leaves_none_and_the_earlier_one_intact(tmp_path):
    def write_half(path):
        with open(os.path.join(path, "model-00001-of-00002.safetensors"), "w") as f:
            f.write("half")
        raise OSError("disk full")

    with pytest.raises(ValueError, match="disk full.*free some space.*nothing was saved before"):
        checkpoint.save(str(tmp_path), 1, write_half, {})
    assert whole(tmp_path) == {}
    save(tmp_path, 1)
    for step in (1, 2):
        with pytest.raises(ValueError, match="disk full.*goes on from .*step_000001"):
            checkpoint.save(str(tmp_path), step, write_half, {})
        assert whole(tmp_path) == {1: 0}
    save(tmp_path, 2)  # what the failed one left is no obstacle, and does not get into it
    assert whole(tmp_path) == {1: 0, 2: 0}
    files = ["DONE", "config.json", "model.safetensors", "trainer.pt"]
    assert sorted(os.listdir(tmp_path / "step_000002")) == files


def test_a_model_that_is_not_finite_is_not_saved(tmp_path):
    def ruined(path):
        raise FloatingPointError("model.norm.weight holds values that are not finite")

    with pytest.raises(ValueError, match="step 1 is not saved.*one that the run started from"):
        checkpoint.save(str(tmp_path), 1, ruined, {})
    save(tmp_path, 1)
    with pytest.raises(ValueError, match="model.norm.weight.*the last good .*step_000001"):
        checkpoint.save(str(tmp_path), 2, ruined, {})
    assert whole(tmp_path) == {1: 0} and os.listdir(tmp_path) == ["step_000001"]


@pytest.mark.parametrize(
    "error, of_the_disk",
    [
        (OSError(), True),
        (RuntimeError("[enforce fail at inline_container.cc:672] unexpected pos 64 vs 0"), True),
        (RuntimeError("PytorchStreamWriter failed writing file data/0: file write failed"), True),
        (SafetensorError("Error while serializing: I/O error: No space left (os error 28)"), True),
        (SafetensorError("Error while serializing: InvalidTensorView"), False),
        (RuntimeError("one of the variables was changed by an inplace write"), False),
        (NotImplementedError("no such kernel"), False),
        (torch.OutOfMemoryError("CUDA out of memory"), False),
    ],
)
def test_what_comes_of_the_disk_is_told_from_a_defect(tmp_path, error, of_the_disk):
    def write_model(path):
        raise error

    save(tmp_path, 1)
    expected = ValueError if of_the_disk else type(error)
    with pytest.raises(expected) as found:
        checkpoint.save(str(tmp_path), 2, write_model, {})
    assert ("could not be saved" in str(found.value)) == of_the_disk
    assert os.listdir(tmp_path) == ["step_000001"]


def test_without_done_it_is_not_a_checkpoint(tmp_path):
    save(tmp_path, 1)
    save(tmp_path, 2)
    os.remove(tmp_path / "step_000002" / "DONE")
    for other in ("step_000003.old", ".step_000004.tmp", "tokens"):  # nor are other folders
        shutil.copytree(tmp_path / "step_000001", tmp_path / other)
    assert whole(tmp_path) == {1: 0}


def test_prune_keeps_first_best_and_last_two_and_reports_the_others(tmp_path):
    said = [save(tmp_path, step, best_step=3) for step in range(1, 8)]
    assert sorted(os.listdir(tmp_path)) == [f"step_{s:06d}" for s in (1, 3, 6, 7)]
    removed = {step: text.partition(", removed ")[2] for step, text in enumerate(said, 1)}
    path = str(tmp_path / "step_00000")
    assert removed == {1: "", 2: "", 3: "", 4: f"{path}2", 5: "", 6: f"{path}4", 7: f"{path}5"}
    assert checkpoint.prune(str(tmp_path), best_step=None) == [f"{path}3"]


@pytest.mark.parametrize(
    "keep, stay", [("all", range(1, 8)), ("2", (1, 2, 4, 6, 7)), ("", (1, 6, 7))]
)
def test_keep_holds_checkpoints_beside_those_that_stay_anyway(tmp_path, keep, stay):
    for step in range(1, 8):
        save(tmp_path, step, keep=keep)
    assert sorted(os.listdir(tmp_path)) == [f"step_{s:06d}" for s in stay]


def test_keep_that_would_not_keep_what_it_says_is_refused():
    checkpoint.check_keep("40", 20)
    for keep in ("some", "0", "-20"):
        with pytest.raises(ValueError, match="must be all, or a number of steps"):
            checkpoint.check_keep(keep, 20)
    for save_every in (20, 0):
        with pytest.raises(ValueError, match="give --save_every=30 too"):
            checkpoint.check_keep("30", save_every)
    checkpoint.check_keep("30", 30)


def test_all_is_on_disk_before_it_takes_its_name_and_then_the_name(tmp_path, monkeypatch):
    """A machine may lose power: every file is flushed as it stays, then the folder, then it is
    renamed, then the folder above is flushed."""
    log, sync, rename = [], os.fsync, os.rename

    def syncing(fd):
        sync(fd)
        log.append((os.fstat(fd).st_ino, os.fstat(fd).st_size))

    def renaming(*names):
        rename(*names)
        log.append("renamed")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", syncing)
        patch.setattr(os, "rename", renaming)
        save(tmp_path, 1)
    before, after = log[: log.index("renamed")], log[log.index("renamed") + 1 :]
    made = tmp_path / "step_000001"
    files = [(path.stat().st_ino, path.stat().st_size) for path in made.iterdir()]
    assert len(files) == 4 and set(files) < set(before)
    assert before[-1][0] == made.stat().st_ino and after[0][0] == tmp_path.stat().st_ino
    done = (made / "DONE").stat().st_ino
    assert [number for number, _ in before].index(done) == len(before) - 2  # the last of the files


# ---- death at any moment -------------------------------------------------------------------------


class Killed(BaseException):
    """Raised in place of a system call; from then on no other is made, as after a real death."""


class Dying:
    """Kills the process, as it seems, at its system call after `calls_allowed` others."""

    def __init__(self, calls_allowed):
        self.calls_allowed, self.calls = calls_allowed, 0

    def wrap(self, real):
        def call(*args, **kwargs):
            if self.calls == self.calls_allowed:
                raise Killed
            self.calls += 1
            return real(*args, **kwargs)

        return call


BEFORE = {1: 0, 2: 0, 3: 0}


@pytest.mark.parametrize(
    "step, allowed",
    [
        # Before; saved; and step 2 pruned.
        (4, [BEFORE, {**BEFORE, 4: 1}, {1: 0, 3: 0, 4: 1}]),
        # A second save of step 3: old, absent or new.
        (3, [BEFORE, {1: 0, 2: 0}, {1: 0, 2: 0, 3: 1}]),
    ],
)
def test_death_before_each_system_call_of_a_save(tmp_path, monkeypatch, step, allowed):
    for s in (1, 2, 3):
        save(tmp_path / "start", s)
    seen, dead = [], True
    while dead:
        directory, dead = tmp_path / str(len(seen)), False
        shutil.copytree(tmp_path / "start", directory)
        dying = Dying(calls_allowed=len(seen))
        with monkeypatch.context() as patched:
            for name in ("open", "mkdir", "fsync", "rename", "remove", "unlink", "rmdir"):
                patched.setattr(os, name, dying.wrap(getattr(os, name)))
            try:
                save(directory, step, version=1)
            except Killed:
                dead = True
        seen.append(whole(directory))
        assert seen[-1] in allowed
    assert len(seen) > 15 and all(state in seen for state in allowed) and seen[-1] == allowed[-1]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_sigkill_at_random_moments(tmp_path):
    rng, before = random.Random(0), 0
    for _ in range(10):
        # Not a fresh interpreter: importing torch takes longer than all saves together.
        child = os.fork()
        if child == 0:
            try:
                for step in range(before + 1, before + 1000):
                    save(tmp_path, step, best_step=3)
            finally:
                os._exit(1)
        try:
            newest = None
            while newest is None or newest <= before:  # at least one save is through
                assert os.waitpid(child, os.WNOHANG) == (0, 0), "the child failed"
                newest = max(checkpoint._steps(str(tmp_path)), default=None)
                time.sleep(0.001)
            time.sleep(rng.uniform(0, 0.03))
        finally:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
        found = whole(tmp_path)
        assert max(found) >= newest and 1 in found
        before = max(found)


# ---- resuming ------------------------------------------------------------------------------------


def test_resume_auto_never_must(tmp_path):
    directory = str(tmp_path)
    assert checkpoint.resume_point(directory, "auto", SETTINGS) is None
    assert checkpoint.resume_point(directory, "never", SETTINGS) is None
    with pytest.raises(ValueError, match="no checkpoint in"):
        checkpoint.resume_point(directory, "must", SETTINGS)
    save(tmp_path, 5)
    save(tmp_path, 10)
    for resume in ("auto", "must"):
        assert checkpoint.resume_point(directory, resume, SETTINGS) == str(tmp_path / "step_000010")
    with pytest.raises(ValueError, match="--resume=never.*choose another --run_name"):
        checkpoint.resume_point(directory, "never", SETTINGS)
    with pytest.raises(ValueError, match="--resume=yes: it must be auto, never or must"):
        checkpoint.resume_point(directory, "yes", SETTINGS)


def test_a_run_with_other_constants_is_refused_and_they_are_named(tmp_path):
    save(tmp_path, 5)
    other = {**SETTINGS, "lr": 1e-4, "task": "0-20", "eval_every": 1, "kl_coef": 0.1}
    for resume in ("auto", "must"):
        with pytest.raises(ValueError) as error:
            checkpoint.resume_point(str(tmp_path), resume, other)
        said = str(error.value)
        assert "(lr: 0.0002 -> 0.0001; task: 'sum3' -> '0-20'; kl_coef: None -> 0.1)" in said
        assert "--run_name=" in said


RUN = {
    "steps",
    "save_every",
    "after_save",
    "track",
    "run_name",
    "resume",
    "max_bad_steps",
    "eval_every",
}
RUN |= {"device", "device_tokens", "compile", "dry_run", "note", "timestamps"}
MAY_CHANGE = {
    "train_base.py": RUN | {"log_every", "eval_tokens", "sample_tokens"},
    "train_sft.py": RUN | {"log_every", "eval_problems", "eval_new_tokens", "recompute"},
    "train_rl.py": RUN
    | {"eval_problems", "save_reward_above", "device_rows", "recompute", "selfcheck"}
    | {"probe_prompts", "log_every", "rollout_tokens", "rollouts_gb", "keep", "noise_scale"},
}


@pytest.mark.parametrize("script", MAY_CHANGE)
def test_constants_that_may_change(tmp_path, script):
    """Of the script's own: these may differ when a run is resumed, and all others may not."""
    with open(os.path.join(ROOT, script), encoding="utf-8") as f:
        settings = {name: value for name, (value, *_) in read_constants(f.read()).items()}
    save(tmp_path, 5, settings=settings)
    refused = set()
    for name in settings:
        try:
            resume = checkpoint.resume_point(str(tmp_path), "auto", {**settings, name: "other"})
            assert resume == str(tmp_path / "step_000005")
        except ValueError as error:
            assert f"other constants ({name}: " in str(error)
            refused.add(name)
    assert settings.keys() - refused == MAY_CHANGE[script]


@pytest.mark.parametrize("size", [0, 10])
def test_a_cut_state_is_said_with_the_older_one(tmp_path, size):
    save(tmp_path, 5)
    save(tmp_path, 10)
    os.truncate(tmp_path / "step_000010" / "trainer.pt", size)
    with pytest.raises(ValueError) as error:
        checkpoint.resume_point(str(tmp_path), "auto", SETTINGS)
    said = str(error.value)
    assert f"remove {tmp_path / 'step_000010'}," in said and "\n" not in said
    shutil.rmtree(tmp_path / "step_000010")
    assert checkpoint.resume_point(str(tmp_path), "auto", SETTINGS).endswith("step_000005")


@pytest.mark.parametrize(
    "error, words", [(OSError(), "(OSError)"), (PermissionError(13, "denied", "f"), "readable")]
)
def test_a_state_that_cannot_be_read_is_said(tmp_path, monkeypatch, error, words):
    def load(*_, **__):
        raise error

    save(tmp_path, 5)
    monkeypatch.setattr(torch, "load", load)
    with pytest.raises(ValueError) as found:
        checkpoint.load_state(str(tmp_path / "step_000005"))
    assert words in str(found.value)


def test_the_name_of_an_evaluations_file_fits_a_file_system(tmp_path):
    one, two = ("a" * 300 + name for name in ("b.jsonl", "c.jsonl"))
    files = {checkpoint.eval_file(str(tmp_path), name) for name in (one, two, "x" + one)}
    assert len(files) == 3 and all(len(os.path.basename(file)) < 200 for file in files)


def test_a_model_is_not_a_run(tmp_path):
    save(tmp_path, 5)
    os.remove(tmp_path / "step_000005" / "trainer.pt")
    with pytest.raises(ValueError, match="no trainer.pt"):
        checkpoint.resume_point(str(tmp_path), "auto", SETTINGS)


def test_a_checkpoint_that_another_run_started_from_is_never_removed(tmp_path):
    for step in range(1, 4):
        save(tmp_path, step)
    used = checkpoint.path_of(str(tmp_path), 2)
    for _ in range(2):  # resumed, it marks it again
        checkpoint.mark_used(used, "out/d4/rl")
    checkpoint.mark_used(used, "out/d4/other")
    with open(os.path.join(used, checkpoint.USED)) as f:
        assert f.read().splitlines() == ["out/d4/rl", "out/d4/other"]
    for step in range(4, 8):
        report = save(tmp_path, step)
    assert sorted(whole(tmp_path)) == [1, 2, 6, 7] and "step_000005" in report
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    checkpoint.mark_used(str(foreign), "out/d4/rl")
    assert os.listdir(foreign) == []  # a model that is not ours is left as it is


def test_weights_are_known_again_by_their_hash(tmp_path):
    save(tmp_path, 1)
    path = checkpoint.path_of(str(tmp_path), 1)
    origin = {"path": path, "hash": checkpoint.fingerprint(path)}
    checkpoint.must_be(origin)
    with open(os.path.join(path, "model.safetensors"), "r+") as f:
        f.seek(5000)
        f.write("x")
    with pytest.raises(ValueError, match="has changed"):
        checkpoint.must_be(origin)
    shutil.rmtree(path)
    with pytest.raises(ValueError, match="gone"):
        checkpoint.must_be(origin)


def test_free_disk_of_a_folder_that_is_not_there_yet(tmp_path):
    free = shutil.disk_usage(tmp_path).free
    assert checkpoint.free_disk(str(tmp_path / "a" / "b")) == pytest.approx(free, rel=0.1)
    assert checkpoint.free_disk("no/such/folder") > 0


def test_the_best_saved_step_stays_also_below_save_reward_above(tmp_path, monkeypatch):
    """Above 1 no step is saved for its reward alone. The best of those that were saved is kept."""
    monkeypatch.setenv("NANORL_OUT", str(tmp_path))
    settings = dict(run_name="x", resume="auto", after_save="", track="", max_bad_steps=9)
    run = Run({**settings, "save_every": 1, "save_reward_above": 1.0}, "rl")

    def write_model(path):
        with open(os.path.join(path, "config.json"), "w"):
            pass

    for step, reward in enumerate((0.1, 0.5, 0.2, 0.3, 0.2), 1):
        run.end_of_step(step, False, lambda: write_model, dict, reward)
    assert run.best["step"] == 2
    saved = sorted(path.name for path in (tmp_path / "x" / "rl").glob("step_*"))
    assert saved == ["step_000001", "step_000002", "step_000004", "step_000005"]
