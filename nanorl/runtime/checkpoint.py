"""Checkpoints: a directory step_000120/ is whole (it holds DONE, written last) or it is not there.

Each is a Hugging Face model directory with trainer.pt beside the weights. When to save is the script's decision."""

import hashlib
import os
import re
import shutil

import torch
from safetensors import SafetensorError


def _steps(directory):
    """Steps of the whole checkpoints in `directory`, ascending."""
    if not os.path.isdir(directory):
        return []
    found = [re.fullmatch(r"step_(\d+)", name) for name in os.listdir(directory)]
    return sorted(
        int(m[1]) for m in found if m and os.path.exists(os.path.join(directory, m[0], "DONE"))
    )


def path_of(directory, step):
    return os.path.join(directory, f"step_{step:06d}")


def latest(directory):
    """Path of the newest whole checkpoint, or None."""
    steps = _steps(directory)
    return path_of(directory, steps[-1]) if steps else None


def stage_directory(run, stage):
    """out/<run>/<stage>; NANORL_OUT moves out/."""
    return os.path.join(os.environ.get("NANORL_OUT", "out"), run, stage)


def is_model(path):
    return os.path.exists(os.path.join(path, "config.json"))


def resolve(path):
    """What a user names -> a model directory: one itself, or a stage's directory, whose newest checkpoint is meant."""
    return path if is_model(path) else latest(path) or path


def eval_file(path, name):
    """<model>/eval/<name>: where eval.py writes, a task's name may hold what a file's may not. What is in the hub's cache is not ours to write in: such a
    model's results go to out/<owner>--<model>/eval."""
    cached = re.search(r"models--([^/]+)/snapshots/", path)
    folder = stage_directory(cached[1], "eval") if cached else os.path.join(path, "eval")
    return os.path.join(folder, re.sub(r"[^A-Za-z0-9._=,@-]", "_", name))


def _sync(path):
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def save(directory, step, write_model, state, best_step=None):
    """write_model(path) puts the model directory at path; `state` goes to trainer.pt. All is written to a temporary
    directory and flushed to disk before it takes its name; then old checkpoints go (see prune).

    Returns a sentence that says what was saved and removed."""
    final, temporary = path_of(directory, step), os.path.join(directory, f".step_{step:06d}.tmp")
    for name in os.listdir(directory) if os.path.isdir(directory) else []:
        if name.startswith(".step_"):  # what a process that died in a save has left
            shutil.rmtree(os.path.join(directory, name))
    try:
        os.makedirs(temporary)
        write_model(temporary)
        torch.save(state, os.path.join(temporary, "trainer.pt"))
        for name in os.listdir(temporary):
            _sync(os.path.join(temporary, name))
        with open(os.path.join(temporary, "DONE"), "w") as f:
            f.write("whole\n")
            f.flush()
            os.fsync(f.fileno())
        _sync(temporary)
    except (
        OSError,
        RuntimeError,
        SafetensorError,
    ) as error:  # a full disk, as Python, torch and safetensors say it
        shutil.rmtree(temporary, ignore_errors=True)
        if type(error) is RuntimeError and not re.search(
            "PytorchStreamWriter|inline_container|write", str(error)
        ):
            raise
        kept = latest(directory)
        raise ValueError(
            f"step {step} could not be saved in {directory} ({str(error).splitlines()[0]}): free some space and start again; "
            + (f"the run goes on from {kept}" if kept else "nothing was saved before it")
        ) from error
    _remove(final)
    os.rename(temporary, final)
    _sync(directory)
    removed = prune(directory, best_step)
    return f"saved {final}" + (f", removed {', '.join(removed)}" if removed else "")


def prune(directory, best_step=None):
    """Keep the first, the best and the last two checkpoints, and those that another run started from. Returns the paths removed."""
    steps = _steps(directory)
    keep = {*steps[:1], *steps[-2:], best_step}
    removed = [
        path
        for path in (path_of(directory, s) for s in steps if s not in keep)
        if not os.path.exists(os.path.join(path, USED))
    ]
    for path in removed:
        _remove(path)
    return removed


USED = "used_by.txt"  # in a checkpoint: the runs that started from it


def mark_used(path, directory):
    """A run in `directory` starts from the checkpoint at `path`, which is from now on not removed. Of a model that is no checkpoint of
    ours nothing is written."""
    if os.path.exists(os.path.join(path, "DONE")) and os.access(
        path, os.W_OK
    ):  # what cannot be written cannot be removed either
        with open(os.path.join(path, USED), "a+", encoding="utf-8") as f:
            f.seek(0)
            if directory not in f.read().splitlines():
                f.write(directory + "\n")


def origin_of(path):
    """What a run must know of the model it starts from: its path, its hash, and whether it is, or descends from, a published model, for which
    other learning rates are right than for one that was trained from scratch here."""
    state = (
        load_state(path, mmap=True) if os.path.exists(os.path.join(path, "trainer.pt")) else None
    )
    return {
        "path": path,
        "hash": fingerprint(path),
        "published": state is None or state.get("start", {}).get("published", False),
    }


def must_be(origin):
    """Raises ValueError unless the model at origin["path"] still has the weights whose hash is origin["hash"]."""
    if not is_model(origin["path"]) or fingerprint(origin["path"]) != origin["hash"]:
        raise ValueError(
            f"{origin['path']} is gone or has changed since this run started from it, and it is needed again (by LoRA, a KL term, --match_flops): put it back, or start another run"
        )


def free_disk(path):
    """Bytes free where `path` is or will be."""
    while not os.path.exists(path):
        path = os.path.dirname(path) or "."
    return shutil.disk_usage(path).free


def fingerprint(path):
    """A hash of a model directory's weights, to know them again."""
    digest = hashlib.blake2b(digest_size=16)
    for name in sorted(name for name in os.listdir(path) if name.endswith(".safetensors")):
        with open(os.path.join(path, name), "rb") as f:
            while block := f.read(2**24):
                digest.update(block)
    return digest.hexdigest()


def _remove(path):
    if os.path.exists(os.path.join(path, "DONE")):
        os.remove(
            os.path.join(path, "DONE")
        )  # from here on it is not a checkpoint, even if we die half-way
    if os.path.exists(path):
        shutil.rmtree(path)


def load_state(path, mmap=False):
    """A checkpoint's trainer.pt; mmap: read only what is looked at."""
    file = os.path.join(path, "trainer.pt")
    if not os.path.exists(file):
        raise ValueError(f"{path} has no trainer.pt: it is a model, not a run that can be resumed")
    try:
        return torch.load(file, map_location="cpu", weights_only=True, mmap=mmap)
    except Exception as error:  # torch has many kinds for a file that is damaged
        raise ValueError(
            f"{file} cannot be read ({str(error).splitlines()[0]}): it is damaged or cut short; remove {path}, and the run goes on "
            "from the checkpoint before it"
        ) from error


# Settings that a run may change when it is resumed: they do not alter the training that has been done.
FREE_TO_CHANGE = re.compile(
    r"steps$|save_|after_save$|eval_|log_|resume$|run$|run_name$|dry_run$|selfcheck$|device_rows$|recompute$|max_bad_steps$|sample_tokens$"
)


# Constants that older runs did not have yet, with what those runs did.
ADDED = {"sampler": "engine"}


def resume_point(directory, resume, settings):
    """The checkpoint to go on from, or None to start afresh. resume: auto, never or must; `settings` are this run's
    resolved constants. Raises ValueError when the saved run was another one, naming what changed."""
    if resume not in ("auto", "never", "must"):
        raise ValueError(f"--resume={resume}: it must be auto, never or must")
    path = latest(directory)
    if path is None:
        if resume == "must":
            raise ValueError(f"--resume=must, but there is no checkpoint in {directory}")
        return None
    if resume == "never":
        raise ValueError(
            f"--resume=never, but {directory} holds a run: choose another --run_name, or remove that folder"
        )
    saved = load_state(path)["settings"]
    saved = {**ADDED, **saved}
    changed = [
        f"{k}: {saved.get(k)!r} -> {v!r}"
        for k, v in settings.items()
        if saved.get(k) != v and not FREE_TO_CHANGE.match(k)
    ]
    if changed:
        raise ValueError(
            f"{directory} holds a run with other constants ({'; '.join(changed)}): "
            f"set them back to resume it, or start another with --run_name=<name>"
        )
    return path
