"""One run of a stage: where it starts or goes on, when it saves, and when it stops.

All three training scripts have one. What is learnt, and from what, is theirs.
"""

import math
import os
import signal
import sys
from functools import partial

from nanorl.runtime import checkpoint, dist, lock
from nanorl.runtime.after import AfterSave
from nanorl.runtime.background import Background, copied
from nanorl.runtime.log import RunLog, Stamped, make_folder
from nanorl.runtime.trackers import Trackers


class Run:
    """A run that starts, or that goes on from its last checkpoint.

    settings: the script's resolved constants. The run's name is filled in where it is empty.
    start: the model directory that a new run begins from, or None where the stage makes its own.
    no_start: what to tell a user who has no such model.
    writes: False leaves no trace, for a dry run.

    resumed: the checkpoint that it goes on from, or None for a new run.
    model: the directory of the weights to begin with, of that checkpoint or start.
    state: what that checkpoint holds besides, or what a new run begins with.
    origin: what the run started from when it was new, {path, hash, published}, or None.
    dtype: the precision of its activations, from the call of `dtypes` on.

    Raises ValueError for a start that is no model, for a run that another process is in, for nodes
    that do not share out/, and where checkpoint.resume_point does.
    """

    def __init__(self, settings, stage, start=None, no_start="", writes=True):
        settings["run_name"] = settings["run_name"] or f"d{settings['depth']}"
        self.settings, self.stage = settings, stage
        if settings.get("timestamps"):
            sys.stdout = Stamped(sys.stdout)
        self.directory = checkpoint.stage_directory(settings["run_name"], stage)
        if writes:
            self._check_shared()
        point = partial(checkpoint.resume_point, self.directory, settings["resume"], settings)
        model = point() or start
        if model and not checkpoint.is_model(model):
            raise ValueError(no_start)

        # Before the lock is free another process may save more.
        self.log = RunLog(self.directory, dist.is_main() and writes)
        self._lock()
        self.resumed = point()
        self.model = self.resumed or start
        self.state = self._state(start)
        self.dtype = self.state.get("dtype")
        if self.resumed and settings.get("device_tokens") == 0:
            # What was found when the run was new.
            settings["device_tokens"] = self.state["settings"]["device_tokens"]
        self.origin = self.state.get("start")
        if settings.get("lora_rank") or settings.get("kl_coef"):
            # Adapters are a change of the very weights that the run started from, and a KL term
            # measures from them.
            checkpoint.must_be(self.origin)

        self.first_step = self.state["step"]
        self.bad_steps = self.state["bad"]  # in a row, with an update skipped
        self.best = self.state.get("best", {"step": None, "reward": -math.inf})  # saved step of RL
        run_directory = os.path.dirname(self.directory)
        self.after_save = AfterSave(settings["after_save"], run_directory, self.log.active)
        self.trackers = Trackers(settings["track"], self.directory, self.log.active)
        self.on_gpu = False  # until the call of `dtypes`
        self.background = Background()

    def _check_shared(self):
        """Refuse nodes that do not see one out/. Before a rank has looked for anything in it."""
        out = checkpoint.stage_directory("", "")
        if dist.is_main():
            make_folder(out)
        dist.check_shared(out)

    def _lock(self):
        """Keep other processes out, until this one ends. Every rank takes part."""
        holder = ""
        if self.log.active:
            # It is kept as long as this object is.
            self.lock, holder = lock.take(os.path.join(self.directory, "lock"))
        holder = dist.broadcast(holder)
        if holder:
            raise ValueError(
                f"{holder} is in {self.directory}, and two runs cannot share it: wait for that "
                "one, or choose another --run_name"
            )

    def _state(self, start):
        """The state of the checkpoint to go on from, or that of a new run."""
        if self.resumed:
            return checkpoint.load_state(self.resumed)
        new = dict(step=0, bad=0, flops={})
        if start:
            new["start"] = checkpoint.origin_of(start)
        return new

    def dtypes(self, device):
        """--dtype -> (precision of the weights, precision of the activations).

        auto stays what it was when the run was new, on whatever device it goes on.
        """
        self.on_gpu = device.type == "cuda"
        asked = self.settings["dtype"]
        if asked != "auto":
            self.dtype = asked
        elif self.dtype is None:
            self.dtype = dist.auto_dtype(device)
        elif self.dtype != dist.auto_dtype(device):
            dist.say(f"      --dtype=auto stays {self.dtype}, as this run began")
        return dist.dtypes(self.dtype, device)

    def card(self, model, **values):
        """Write run.json, after rows and rollouts beyond the checkpoint have been cut off.

        values: what was derived from the settings. More is added here.
        """
        self.log.cut(self.first_step if self.resumed else -1)
        if self.origin:
            values["start"] = self.origin
        changed = self._changes()
        values["changes"] = changed
        n_params, _ = model.config.n_params()
        self.log.card(
            stage=self.stage,
            settings=self.settings,
            params=n_params,
            dtype=str(model.compute_dtype),
            device=str(model.cos.device),
            world_size=dist.world_size(),
            **values,
        )
        if self.resumed:
            dist.say(f"resumed {self.resumed}")
            self.log.event(self.first_step, "resumed", f"resumed {self.resumed}")
            if changed and changed[-1]["step"] == self.first_step:
                dist.say(f"      with other constants: {'; '.join(changed[-1]['constants'])}")

    def _changes(self):
        """All changes of constants so far -> [{step, constants}], those of this start last."""
        if not self.resumed:
            return []
        saved = self.state["settings"]
        constants = []
        for name, text in checkpoint.changes(saved, self.settings).items():
            # A constant that the scripts did not have then is not one that was changed.
            if name in saved and name not in checkpoint.OF_THE_START:
                constants.append(text)
        # What an earlier start had changed at this step or later is undone, as its rows are.
        changes = []
        for change in self.log.earlier_card().get("changes", []):
            if change["step"] < self.first_step:
                changes.append(change)
        if constants:
            changes.append({"step": self.first_step, "constants": constants})
        return changes

    def begin(self):
        """Call it before the first step: from now on the model that it starts from is in use."""
        if self.log.active and self.origin:
            checkpoint.mark_used(self.origin["path"], self.directory)
        self.trackers.start()
        dist.catch_signals()

    def count_bad_steps(self, norms):
        """Norms of the gradients of a step's updates -> bad steps in a row, this one counted."""
        finite = all(math.isfinite(norm) for norm in norms)
        self.bad_steps = 0 if finite else self.bad_steps + 1
        return self.bad_steps

    def end_of_step(self, step, last, model_writer, state, reward=None):
        """Save where it is time to, and leave where a signal or too many bad steps say so.

        step: the number of steps that are done.
        last: whether no more are to come.
        model_writer(): takes the model as it is now -> write(path), for a model directory.
        state(): what only the script has and a resumed run needs.
        reward: of this step, in RL.

        Raises ValueError after too many bad steps and where a save has failed, SystemExit after a
        signal.
        """
        self.background.check()
        settings = self.settings
        stop = dist.stop_requested()
        hopeless = self.bad_steps >= settings["max_bad_steps"]
        due = bool(settings["save_every"]) and step % settings["save_every"] == 0
        improved = False
        if reward is not None:
            improved = reward > max(self.best["reward"], settings["save_reward_above"])

        leaves = last or stop or hopeless
        if leaves or due or improved:
            if reward is not None and reward > self.best["reward"]:
                self.best = {"step": step, "reward": reward}
            if dist.is_main():
                self._save(step, model_writer, state(), reward, improved)
            if leaves:
                self.background.finish()
            if leaves or not self.on_gpu:
                dist.wait_for_main()

        if last and self.bad_steps and not hopeless:
            words = f"the last {self.bad_steps} steps changed nothing, because the gradient was "
            words += "not finite"
            dist.say(f"WARNING: {words}")
            self.log.event(step, "warning", words)
        if leaves:
            self.trackers.finish()
            self.after_save.finish()
        if hopeless:
            why = self._why_hopeless(step - self.bad_steps)
            self.log.event(step, "stopped", why)
            raise ValueError(why)
        if stop:
            self.log.event(step, "stopped", f"stopped by {signal.Signals(stop).name}")
            raise SystemExit(0 if stop == signal.SIGTERM else 130)

    def _save(self, step, model_writer, state, reward, improved):
        """Save a checkpoint and say so, on the first rank. See end_of_step.

        A GPU goes on with the next step once all is copied to the CPU, which is the only wait. On a
        CPU the copies would take the memory that the training needs, so it waits for the disk.
        """
        state = dict(state, step=step, bad=self.bad_steps, settings=self.settings)
        state["dtype"] = self.dtype
        if self.origin:
            state["start"] = self.origin
        if reward is not None:
            state["best"] = self.best
        # Where the gradient is not finite, the last step at which the weights may still be good.
        sound_step = step - self.bad_steps - 1 if self.bad_steps else None
        steps_to_keep = self.best["step"], sound_step, self.settings.get("keep", "")
        note = f" (a new best reward, {reward:.3f})" if improved else ""
        if self.on_gpu:
            state = copied(state)
        save = partial(checkpoint.save, self.directory, step, model_writer(), state, *steps_to_keep)
        if self.on_gpu:
            self.background.start(partial(self._write, save, step, note))
        else:
            self._write(save, step, note)

    def _write(self, save, step, note):
        """Save, and say what was saved."""
        report = save() + note
        print(report, flush=True)
        self.log.event(step, "saved", report)
        self.after_save()

    def _why_hopeless(self, step):
        """What to tell the user after too many bad steps.

        step: the last one with a finite gradient, 0 for none. The next gradient is that of the
        weights which it left, so these are ruined, and the advice is to start from others.
        """
        since = f"since step {step} has ruined the weights" if step else "from the first step on"
        words = (
            f"in {self.bad_steps} steps in a row updates were skipped because the gradient was not "
            f"finite, {since}"
        )
        rates = "a lower --lr"
        if "matrix_lr" in self.settings:
            rates = "a lower --matrix_lr or --other_lr"
        if self.dtype == "bf16":
            rates += ", or --dtype=fp32"
        start = ""
        if self.origin and not self.settings.get("match_flops"):
            sound = checkpoint.latest(self.directory, before=step) or self.origin["path"]
            start = f"--model={sound} "
        return f"{words}; start again with {start}--run_name=<name> and {rates}"
