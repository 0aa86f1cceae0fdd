"""Checkpoints: a directory step_000120/ is whole, or it is not there.

Each is a Hugging Face model directory with trainer.pt beside the weights. It is whole when it holds
DONE, which is written last. When to save is run.py's to decide.
"""

import hashlib
import math
import os
import re
import shutil

import torch
from safetensors import SafetensorError

USED = "used_by.txt"  # in a checkpoint: the runs that started from it

# Settings that a run may change when it is resumed: they do not alter the training so far,
FREE_TO_CHANGE = re.compile(
    r"steps$|save_|after_save$|track$|eval_|log_|resume$|run$|run_name$|dry_run$|selfcheck$|"
    r"probe_prompts$|max_bad_steps$|sample_tokens$|note$|timestamps$|rollout_tokens$|rollouts_gb$|"
    r"keep$|noise_scale$|"
    # or they change only its speed and how its sums are rounded.
    r"device$|device_rows$|device_tokens$|recompute$|compile$"
)
# Those of them that say nothing of the run.
OF_THE_START = ("resume", "run", "run_name", "timestamps", "dry_run", "selfcheck")

# Constants that older runs did not have yet -> what those runs did.
ADDED = {
    "sampler": "engine",
    "compile": False,
    "keep": "",
    "noise_scale": False,
    "optimizer": "adamw",
    "beta1": 0.9,
    "beta2": 0.95,
}


# ---- where things are ----------------------------------------------------------------------------


def stage_directory(run, stage):
    """out/<run>/<stage>; NANORL_OUT moves out/."""
    return os.path.join(os.path.expanduser(os.environ.get("NANORL_OUT", "out")), run, stage)


def path_of(directory, step):
    """The directory of a step's checkpoint."""
    return os.path.join(directory, f"step_{step:06d}")


def _steps(directory):
    """Steps of the whole checkpoints in a directory, ascending."""
    if not os.path.isdir(directory):
        return []
    steps = []
    for name in os.listdir(directory):
        match = re.fullmatch(r"step_(\d+)", name)
        if match and os.path.exists(os.path.join(directory, name, "DONE")):
            steps.append(int(match[1]))
    return sorted(steps)


def latest(directory, before=math.inf):
    """Path of the newest whole checkpoint in a directory, of a step below `before`, or None."""
    steps = [step for step in _steps(directory) if step < before]
    return path_of(directory, steps[-1]) if steps else None


def is_model(path):
    """Whether a path is a model directory."""
    return os.path.exists(os.path.join(path, "config.json"))


def resolve(path):
    """What a user names -> a model directory: that one, or the newest checkpoint in it.

    Where there is neither, the path comes back as it is, with ~ spelled out.
    """
    path = os.path.expanduser(path)
    if is_model(path):
        return path
    return latest(path) or path


def eval_folder(path):
    """The folder that eval.py writes into: <model>/eval, where that can be written.

    The hub's cache is not nanorl's to write in: the results of a model there go to
    out/<owner>--<model>/eval. Those of a model in a folder that is read-only go to out/<its whole
    path, with "--" for "/">/eval.
    """
    cached = re.search(r"models--([^/]+)/snapshots/", path)
    if cached:
        return stage_directory(cached[1], "eval")
    own = os.path.join(path, "eval")
    if os.access(own if os.path.isdir(own) else path, os.W_OK):
        return own
    name = os.path.abspath(path).strip("/").replace("/", "--")
    return stage_directory(name, "eval")


def eval_file(path, name):
    """The path of a file that eval.py writes for the model at `path`.

    What a file's name may not hold, which a task's may, becomes "_".
    """
    return os.path.join(eval_folder(path), _safe(name))


def _safe(name):
    name = re.sub(r"[^A-Za-z0-9._=,@-]", "_", name)
    if len(name) > 200:
        # Too long for a file system: its end, and of the rest enough to know it by.
        digest = hashlib.blake2b(name.encode(), digest_size=8).hexdigest()
        name = f"{digest}_{name[-150:]}"
    return name


def written_eval_file(path, name):
    """eval_file, or what others have left in the model's own folder, which is read-only by now."""
    file = eval_file(path, name)
    own = os.path.join(path, "eval", _safe(name))
    return own if os.path.exists(own) and not os.path.exists(file) else file


def free_disk(path):
    """Bytes free on the disk where `path` is or will be."""
    while not os.path.exists(path):
        path = os.path.dirname(path) or "."
    return shutil.disk_usage(path).free


# ---- save and remove -----------------------------------------------------------------------------


def save(directory, step, write_model, state, best_step=None, sound_step=None, keep=""):
    """Save a step's checkpoint, and remove old ones (see prune).

    write_model(path): puts the model directory at path.
    state: goes to trainer.pt.

    All is written to a temporary directory and flushed to disk before it takes its name. Returns a
    sentence that says what was saved and removed. Raises ValueError where the disk does not take
    it, and for a model that is not finite: no checkpoint gives way to one that can do nothing.
    """
    final = path_of(directory, step)
    temporary = os.path.join(directory, f".step_{step:06d}.tmp")

    # A process that died in a save has left its temporary directory.
    if os.path.isdir(directory):
        for name in os.listdir(directory):
            if name.startswith(".step_"):
                shutil.rmtree(os.path.join(directory, name))

    try:
        _write(temporary, write_model, state)
    except FloatingPointError as error:
        shutil.rmtree(temporary, ignore_errors=True)
        raise ValueError(_not_finite(directory, step, error)) from error
    except (OSError, RuntimeError, SafetensorError) as error:
        shutil.rmtree(temporary, ignore_errors=True)
        if not _is_disk_error(error):
            raise
        raise ValueError(_not_saved(directory, step, error)) from error

    _remove(final)
    os.rename(temporary, final)
    _sync(directory)
    removed = prune(directory, best_step, sound_step, keep)
    report = f"saved {final}"
    if removed:
        report += f", removed {', '.join(removed)}"
    return report


def _write(path, write_model, state):
    """Write a checkpoint to a new directory, and flush its files and then the directory."""
    os.makedirs(path)
    write_model(path)
    torch.save(state, os.path.join(path, "trainer.pt"))
    for name in os.listdir(path):
        _sync(os.path.join(path, name))
    with open(os.path.join(path, "DONE"), "w") as f:
        f.write("whole\n")
        f.flush()
        os.fsync(f.fileno())
    _sync(path)


def _sync(path):
    """Flush a file or a directory to disk, since the machine may lose power."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def _is_disk_error(error):
    """Whether an error in a save comes from the disk, such as a full one.

    Python then raises OSError. torch raises RuntimeError and safetensors SafetensorError, as they
    do for a defect: only their words tell the two apart.
    """
    if isinstance(error, OSError):
        return True
    words = r"PytorchStreamWriter|inline_container|iostream|I/O ?error|IoError|os error \d+"
    return re.search(words, str(error)) is not None


def _first_line(error):
    """What an error says, in one line. One that says nothing goes by its name."""
    lines = str(error).splitlines()
    return lines[0] if lines else type(error).__name__


def _not_saved(directory, step, error):
    """What to tell the user of a save that failed."""
    reason = _first_line(error)
    last = latest(directory)
    outlook = f"the run goes on from {last}" if last else "nothing was saved before it"
    return (
        f"step {step} could not be saved in {directory} ({reason}): "
        f"free some space and start again; {outlook}"
    )


def _not_finite(directory, step, error):
    """What to tell the user of a step that has ruined the model."""
    last = latest(directory)
    return (
        f"step {step} is not saved in {directory}: {error}; the last good checkpoint is "
        f"{last or 'the one that the run started from'}: start again with a lower learning rate "
        "and another --run_name"
    )


def prune(directory, best_step=None, sound_step=None, keep=""):
    """Remove old checkpoints. Returns the paths removed.

    The first, the best and the last two stay, and those that another run started from.
    sound_step: of a run whose gradient is not finite. The last one up to that step stays too.
    keep: see is_kept.
    """
    steps = _steps(directory)
    stay = {*steps[:1], *steps[-2:], best_step}
    if sound_step is not None:
        sound = [step for step in steps if step <= sound_step]
        stay.update(sound[-1:])
    removed = []
    for step in steps:
        path = path_of(directory, step)
        used = os.path.exists(os.path.join(path, USED))
        if step not in stay and not used and not is_kept(step, keep):
            removed.append(path)
    for path in removed:
        _remove(path)
    return removed


def is_kept(step, keep):
    """Whether the constant `keep` holds a step's checkpoint: "all", each k-th step, or "": none."""
    if keep == "all":
        return True
    return bool(keep) and step % int(keep) == 0


def check_keep(keep, save_every):
    """Raise ValueError for a `keep` that is none, or that would keep less often than it says."""
    if keep in ("", "all"):
        return
    if not keep.isdecimal() or int(keep) == 0:
        raise ValueError(f"--keep={keep}: it must be all, or a number of steps, such as 40")
    if not save_every or int(keep) % save_every:
        raise ValueError(
            f"--keep={keep}: it must be a multiple of --save_every={save_every}, because only what "
            f"is saved is kept: give --save_every={keep} too"
        )


def _remove(path):
    """Remove a checkpoint, if it is there."""
    # DONE goes first. From then on it is not a checkpoint, even if the process dies half-way.
    done = os.path.join(path, "DONE")
    if os.path.exists(done):
        os.remove(done)
    if os.path.exists(path):
        shutil.rmtree(path)


# ---- the model that a run starts from ------------------------------------------------------------


def origin_of(path):
    """What a run must know of the model it starts from -> {path, hash, published}.

    hash: of its weights. published: whether it is a published model or descends from one. Such a
    model needs other learning rates than one that was trained here from scratch.
    """
    published = True
    if os.path.exists(os.path.join(path, "trainer.pt")):
        state = load_state(path, mmap=True)
        published = state.get("start", {}).get("published", False)
    return {"path": path, "hash": fingerprint(path), "published": published}


def fingerprint(path):
    """A hash of a model directory's weights, to know them again."""
    digest = hashlib.blake2b(digest_size=16)
    names = [name for name in os.listdir(path) if name.endswith(".safetensors")]
    for name in sorted(names):
        with open(os.path.join(path, name), "rb") as f:
            while block := f.read(2**24):
                digest.update(block)
    return digest.hexdigest()


def must_be(origin):
    """Raise ValueError unless the model at origin["path"] still has the hash origin["hash"]."""
    path = origin["path"]
    if not is_model(path) or fingerprint(path) != origin["hash"]:
        raise ValueError(
            f"{path} is gone or has changed since this run started from it, and it is needed again "
            f"(by LoRA, a KL term, --match_flops): put it back, or start another run"
        )


def mark_used(path, directory):
    """Note in the checkpoint at `path` that a run in `directory` starts from it.

    From now on it is not removed. Nothing is written into a model that is no checkpoint of nanorl,
    or into a directory that cannot be written: that cannot be removed either.
    """
    is_checkpoint = os.path.exists(os.path.join(path, "DONE"))
    if not is_checkpoint or not os.access(path, os.W_OK):
        return
    with open(os.path.join(path, USED), "a+", encoding="utf-8") as f:
        f.seek(0)
        if directory not in f.read().splitlines():
            f.write(directory + "\n")


# ---- resume --------------------------------------------------------------------------------------


def load_state(path, mmap=False):
    """What a checkpoint's trainer.pt holds.

    mmap: read only what is looked at.

    Raises ValueError where there is no trainer.pt, or a damaged one.
    """
    file = os.path.join(path, "trainer.pt")
    if not os.path.exists(file):
        raise ValueError(f"{path} has no trainer.pt: it is a model, not a run that can be resumed")
    try:
        return torch.load(file, map_location="cpu", weights_only=True, mmap=mmap)
    except MemoryError:
        raise
    except PermissionError as error:
        raise ValueError(f"{error}: make it readable, or use another checkpoint") from error
    except Exception as error:
        # torch raises errors of many kinds for a damaged file.
        raise ValueError(
            f"{file} cannot be read ({_first_line(error)}): it is damaged or cut short; remove "
            f"{path}, and the run goes on from the checkpoint before it"
        ) from error


def resume_point(directory, resume, settings):
    """The checkpoint to go on from, or None to start afresh.

    resume: auto, never or must.
    settings: this run's resolved constants.

    Raises ValueError where the saved run had other constants, and names those.
    """
    if resume not in ("auto", "never", "must"):
        raise ValueError(f"--resume={resume}: it must be auto, never or must")
    path = latest(directory)
    if path is None:
        if resume == "must":
            raise ValueError(f"--resume=must, but there is no checkpoint in {directory}")
        return None
    if resume == "never":
        raise ValueError(
            f"--resume=never, but {directory} holds a run: choose another --run_name, or remove "
            f"that folder"
        )

    changed = changes(load_state(path, mmap=True)["settings"], settings)
    refused = [text for name, text in changed.items() if not FREE_TO_CHANGE.match(name)]
    if refused:
        words = (
            f"{directory} holds a run with other constants ({'; '.join(refused)}): set them back "
            "to resume it, or start another with --run_name=<name>"
        )
        if "model" in settings:
            words += f" (and --model={path} to start from its weights)"
        raise ValueError(words)
    return path


def changes(saved, settings):
    """The constants that a run was saved with and those that it has now -> {name: what changed}."""
    saved = {**ADDED, **saved}
    changed = {}
    for name, value in settings.items():
        if saved.get(name) != value:
            changed[name] = f"{name}: {saved.get(name)!r} -> {value!r}"
    return changed
