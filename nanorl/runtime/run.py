"""One run of a stage: where it starts or goes on, what it writes, and what it needs to go on after it was killed."""
import math
import os

from nanorl.runtime import checkpoint, dist
from nanorl.runtime.after import AfterSave
from nanorl.runtime.log import RunLog, Watch


class Run:
    """`model`: the directory of the weights to begin with, of its last checkpoint or of what it starts from."""

    def __init__(self, settings, stage, start, writes=True):
        settings["run"] = settings["run"] or f"d{settings['depth']}"
        self.settings, self.directory = settings, checkpoint.stage_directory(settings["run"], stage)
        self.point = checkpoint.resume_point(self.directory, settings["resume"], settings)
        self.model = self.point or start
        if not checkpoint.is_model(self.model):
            raise ValueError(f"no SFT model in {start}: make one with `python train_sft.py "
                             f"--depth={settings['depth']}`, or name one with --model=")
        fresh = dict(step=0, best={"step": None, "reward": -math.inf}, bad=0, flops={}, drawn=0, watch=None)
        self.state = checkpoint.load_state(self.point) if self.point else {**fresh, "start": checkpoint.origin_of(start)}
        self.origin, self.first, self.best, self.bad = (self.state[k] for k in ("start", "step", "best", "bad"))
        self.log = RunLog(self.directory, dist.is_main() and writes)
        self.sent = AfterSave(settings["after_save"], os.path.dirname(self.directory), self.log.active)
        self.watch = Watch(self.state["watch"])
        self.log.cut(self.first if self.point else -1)  # what is beyond the checkpoint, about to be made again

    def card(self, policy, place, device_rows, meter):
        self.log.card(stage=self.settings["stage"], settings=self.settings, start=self.origin, device_rows=device_rows,
                      flop_rate=meter.flop_rate, copy_rate=meter.copy_rate, world_size=dist.world_size(),
                      dtype=str(policy.compute_dtype), device=str(place), params=policy.config.n_params()[0])

    def begin(self):
        """The first step is about to come."""
        if self.log.active:
            checkpoint.mark_used(self.origin["path"], self.directory)
        dist.catch_signals()

    def warn(self, step, row):
        for sentence in self.watch.look(row):
            dist.say(f"      WARNING, step {step}: {sentence}")

    def end_of_step(self, step, row, write_model, whole):
        """Save where it is time to, and leave where a signal or too many bad steps say so. whole: what only the
        script has and a resumed run needs, made when it is asked for."""
        s, stop, best = self.settings, dist.stop_requested(), self.best["reward"]
        hopeless, improved = self.bad >= s["max_bad_steps"], row["reward"] > max(best, s["save_reward_above"])
        due = s["save_every"] and step % s["save_every"] == 0
        if step == s["steps"] or stop or improved or hopeless or due:
            if row["reward"] > best:
                self.best = {"step": step, "reward": row["reward"]}
            if dist.is_main():
                state = dict(step=step, best=self.best, bad=self.bad, watch=self.watch.state, start=self.origin,
                             settings=s, **whole())
                said = checkpoint.save(self.directory, step, write_model, state, self.best["step"])
                print(said + (f" (a new best reward, {row['reward']:.3f})" if improved else ""), flush=True)
                self.sent()
            dist.barrier()
        if stop or hopeless or step == s["steps"]:
            self.sent.finish()
        if hopeless:
            raise ValueError(f"in {self.bad} steps in a row updates were skipped because the gradient was not finite; the "
                             f"state is saved in {self.directory}: go on from it with "
                             f"--model={checkpoint.latest(self.directory)} --run=<name> and a lower --lr, or --dtype=fp32")
        if stop:
            raise SystemExit(0 if stop == 15 else 130)
