"""One run of a stage: where it starts or goes on, when it saves, and when it stops.

All three training scripts have one. What is learnt, and from what, is theirs.
"""

import math
import os
import signal

from nanorl.runtime import checkpoint, dist
from nanorl.runtime.after import AfterSave
from nanorl.runtime.log import RunLog


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

    Raises ValueError for a start that is no model, and where checkpoint.resume_point does.
    """

    def __init__(self, settings, stage, start=None, no_start="", writes=True):
        settings["run_name"] = settings["run_name"] or f"d{settings['depth']}"
        self.settings, self.stage = settings, stage
        self.directory = checkpoint.stage_directory(settings["run_name"], stage)
        self.resumed = checkpoint.resume_point(self.directory, settings["resume"], settings)
        self.model = self.resumed or start
        if self.model and not checkpoint.is_model(self.model):
            raise ValueError(no_start)
        self.state = self._state(start)
        self.origin = self.state.get("start")
        if settings.get("lora_rank") or settings.get("kl_coef"):
            # Adapters are a change of the very weights that the run started from, and a KL term
            # measures from them.
            checkpoint.must_be(self.origin)

        self.first_step = self.state["step"]
        self.bad_steps = self.state["bad"]  # in a row, with an update skipped
        self.best = self.state.get("best", {"step": None, "reward": -math.inf})  # saved step of RL
        self.log = RunLog(self.directory, dist.is_main() and writes)
        run_directory = os.path.dirname(self.directory)
        self.after_save = AfterSave(settings["after_save"], run_directory, self.log.active)

    def _state(self, start):
        """The state of the checkpoint to go on from, or that of a new run."""
        if self.resumed:
            return checkpoint.load_state(self.resumed)
        new = dict(step=0, bad=0, flops={})
        if start:
            new["start"] = checkpoint.origin_of(start)
        return new

    def card(self, model, **values):
        """Write run.json, after rows and rollouts beyond the checkpoint have been cut off.

        values: what was derived from the settings. More is added here.
        """
        self.log.cut(self.first_step if self.resumed else -1)
        if self.origin:
            values["start"] = self.origin
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

    def begin(self):
        """Call it before the first step: from now on the model that it starts from is in use."""
        if self.log.active and self.origin:
            checkpoint.mark_used(self.origin["path"], self.directory)
        dist.catch_signals()

    def count_bad_steps(self, norms):
        """Norms of the gradients of a step's updates -> bad steps in a row, this one counted."""
        finite = all(math.isfinite(norm) for norm in norms)
        self.bad_steps = 0 if finite else self.bad_steps + 1
        return self.bad_steps

    def end_of_step(self, step, last, write_model, state, reward=None):
        """Save where it is time to, and leave where a signal or too many bad steps say so.

        step: the number of steps that are done.
        last: whether no more are to come.
        write_model(path): writes the model directory.
        state(): what only the script has and a resumed run needs.
        reward: of this step, in RL.

        Raises ValueError after too many bad steps, SystemExit after a signal.
        """
        settings = self.settings
        stop = dist.stop_requested()
        hopeless = self.bad_steps >= settings["max_bad_steps"]
        due = bool(settings["save_every"]) and step % settings["save_every"] == 0
        improved = False
        if reward is not None:
            improved = reward > max(self.best["reward"], settings["save_reward_above"])

        if last or stop or hopeless or due or improved:
            if reward is not None and reward > self.best["reward"]:
                self.best = {"step": step, "reward": reward}
            if dist.is_main():
                self._save(step, write_model, state(), reward, improved)
            dist.barrier()

        if last and self.bad_steps and not hopeless:
            dist.say(
                f"WARNING: the last {self.bad_steps} steps changed nothing, because the gradient "
                "was not finite"
            )
        if last or stop or hopeless:
            self.after_save.finish()
        if hopeless:
            raise ValueError(self._why_hopeless())
        if stop:
            raise SystemExit(0 if stop == signal.SIGTERM else 130)

    def _save(self, step, write_model, state, reward, improved):
        """Save a checkpoint and say so, on the first rank. See end_of_step."""
        state = dict(state, step=step, bad=self.bad_steps, settings=self.settings)
        if self.origin:
            state["start"] = self.origin
        if reward is not None:
            state["best"] = self.best
        best_step = self.best["step"]
        report = checkpoint.save(self.directory, step, write_model, state, best_step)
        if improved:
            report += f" (a new best reward, {reward:.3f})"
        print(report, flush=True)
        self.after_save()

    def _why_hopeless(self):
        """What to tell the user after too many bad steps."""
        if "matrix_lr" in self.settings:
            return (
                f"{self.bad_steps} updates in a row were skipped because the gradient was not "
                "finite; the state is saved: start again with a lower --matrix_lr or --other_lr "
                "and another --run_name"
            )
        return (
            f"in {self.bad_steps} steps in a row updates were skipped because the gradient was not "
            f"finite; the state is saved in {self.directory}: go on from it with "
            f"--model={checkpoint.latest(self.directory)} --run_name=<name> and a lower --lr, or "
            "--dtype=fp32"
        )
