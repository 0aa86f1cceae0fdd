"""What goes wrong on real machines.

Ranks that die, disks that fill, gradients that explode, uneven work, several nodes.
"""

import gzip
import json
import os
import re
import signal
import subprocess
import sys
import time

import pytest
import torch
from safetensors.torch import load_file

from nanorl.report.watch import CUT, marks_passed
from nanorl.runtime import checkpoint
from scripts import (
    BASE,
    RL,
    ROOT,
    SFT,
    assert_rows_agree,
    assert_same_run,
    call,
    environment,
    finish,
    free_port,
    ranks,
    records,
    rows,
    step_records,
    torchrun,
    wait_for,
)


def completions(run):
    """(prompt, completion) pairs of the last step, sorted.

    With dynamic sampling their order depends on the number of ranks.
    """
    path = sorted((run / "rollouts").iterdir())[-1]
    return sorted((r["prompt"], r["completion"]) for r in records(path))


EVERYTHING = [
    "--kl_coef=0.05",
    "--updates_per_rollout=2",
    "--resample=2",
    "--overlong=mask",
    "--advantage=loo",
    "--loss_norm=constant",
    "--lr_schedule=cosine",
    "--warmup=2",
    "--reward_weights=correct=1",
]


@pytest.mark.parametrize(
    "n, options", [pytest.param(4, [], marks=pytest.mark.slow), (2, EVERYTHING)]
)
def test_ranks_give_the_rows_of_one(out, n, options):
    """The gradient, and with it every number of the run, does not depend on the number of ranks.

    In fp64, with everything on too.
    """
    run = [*RL, *options, f"--model={out / 'a' / 'sft'}", "--steps=4"]
    name = f"ranks{n}"
    process = torchrun(*run, f"--run_name={name}", n=n)
    assert call("train_rl.py", *run, f"--run_name={name}one") is None
    finish(process)
    assert_rows_agree(rows(out / f"{name}one" / "rl"), rows(out / name / "rl"))
    assert completions(out / f"{name}one" / "rl") == completions(out / name / "rl")

    # The summed gradient itself, against one row at a time.
    said = finish(torchrun(*run, f"--run_name={name}", "--selfcheck", n=n))
    assert "within the bounds" in said and "(bound 1e-10)" in said


def two_nodes(rendezvous, n, *command):
    """Start a script under two agents, as on two nodes, with n ranks each -> their processes."""
    launch = [sys.executable, "-m", "torch.distributed.run", "--nnodes=2", f"--nproc_per_node={n}"]
    return [
        subprocess.Popen(
            [*launch, *rendezvous, f"--node_rank={node}", "--", *command],
            cwd=ROOT,
            env=environment(),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for node in range(2)
    ]


STAGES = {
    "base": ["train_base.py", *BASE, "--device_tokens=128", "--eval_every=2", "--sample_tokens=0"],
    "sft": ["train_sft.py", *SFT, "--device_tokens=128", "--optimizer=muon"],
    "rl": ["train_rl.py", *RL, "--prompts_per_step=6"],
}


TWO_EACH = [pytest.param(2, stage, marks=pytest.mark.slow) for stage in STAGES]


@pytest.mark.parametrize("n, stage", [(1, "rl"), *TWO_EACH])
def test_two_nodes_on_loopback_give_the_one_process_result(out, n, stage):
    """With one rank each, and with two: Muon's work is shared, and problems not evenly."""
    start = {"base": [], "sft": [f"--model={out / 'a' / 'base'}"]}
    start["rl"] = [f"--model={out / 'a' / 'sft'}"]
    run = [*STAGES[stage], *start[stage], "--steps=3"]
    static = ["--master_addr=127.0.0.1", f"--master_port={free_port()}"]
    nodes = two_nodes(static, n, *run, f"--run_name=nodes{n}")
    assert call(*run, f"--run_name=onenode{n}") is None
    for node in nodes:
        finish(node)
    assert_rows_agree(rows(out / f"onenode{n}" / stage), rows(out / f"nodes{n}" / stage))


@pytest.mark.slow
def test_a_rank_that_dies_on_one_of_two_nodes_is_started_again_with_all_others(out):
    run = ["train_sft.py", *SFT, f"--model={out / 'a' / 'base'}", "--save_every=5", "--steps=60"]
    assert call(*run, "--run_name=whole-nodes") is None
    point = f"--rdzv_endpoint=127.0.0.1:{free_port()}"
    options = ["--rdzv_backend=c10d", "--rdzv_id=dies", point, "--max-restarts=1"]
    nodes = two_nodes(options, 2, *run, "--run_name=dies")
    directory = out / "dies" / "sft"
    wait_for(lambda: checkpoint.latest(directory), nodes[0])
    os.kill(workers(nodes[1])[1], signal.SIGKILL)
    said = [finish(node) for node in nodes]
    assert any(f"resumed {directory}" in text for text in said)
    assert_rows_agree(rows(out / "whole-nodes" / "sft"), rows(directory))


def test_uneven_ranks_do_not_wait_for_each_other(out):
    """One problem a step, and one to evaluate, on two ranks.

    The other rank has no rows, no gradient and nothing to say, and takes part in everything.
    """
    run = [*RL, "--prompts_per_step=1", "--eval_problems=1", "--probe_prompts=1", "--steps=3"]
    run += [f"--model={out / 'a' / 'sft'}"]
    process = torchrun(*run, "--run_name=uneven")
    assert call("train_rl.py", *run, "--run_name=unevenone") is None
    finish(process)
    assert_rows_agree(rows(out / "unevenone" / "rl"), rows(out / "uneven" / "rl"))


@pytest.mark.slow
def test_a_rank_that_dies_ends_the_run_and_max_restarts_resumes_it(out):
    """kill -9 to one worker: the agent starts both again from the last checkpoint.

    They come to the result of an undisturbed run. The second death is one too many, and the command
    ends.
    """
    run = [*RL, f"--model={out / 'a' / 'sft'}", "--steps=12"]
    finish(torchrun(*run, "--run_name=undisturbed"))
    process = torchrun(*run, "--run_name=restarted", options=["--max-restarts=1"])
    directory = out / "restarted" / "rl"
    wait_for(lambda: checkpoint.latest(directory), process)
    os.kill(workers(process)[1], signal.SIGKILL)
    finish(process)
    assert_same_run(out / "undisturbed" / "rl", directory, "step_000012")

    process = torchrun(*run, "--run_name=dead", "--steps=100000")
    wait_for(lambda: checkpoint.latest(out / "dead" / "rl"), process)
    begun = time.time()
    os.kill(workers(process)[1], signal.SIGKILL)
    finish(process, code=1, seconds=60)
    assert time.time() - begun < 60


def workers(agent):
    """Process numbers of torchrun's children, by rank."""
    command = ["ps", "-o", "pid=", "--ppid", str(agent.pid)]
    listed = subprocess.run(command, capture_output=True, text=True).stdout
    return sorted(map(int, listed.split()))


def test_without_an_agent_too_a_dead_rank_ends_the_others_with_one_line(out):
    """As under a scheduler that starts each rank itself."""
    run = [*RL, "--run_name=alone", f"--model={out / 'a' / 'sft'}", "--steps=100000"]
    with ranks(["train_rl.py", *run]) as processes:
        wait_for(lambda: checkpoint.latest(out / "alone" / "rl"), processes[0])
        processes[1].kill()
        said = processes[0].communicate(timeout=60)[1]
    assert processes[0].returncode == 1 and "Traceback" not in said
    assert "rank 0 has lost another rank" in said


# ---- gradients that are not finite ---------------------------------------------------------------

EXPLODES = """
from nanorl.tasks import Problem, Reward
from toy_task import Toy

class Explodes(Toy):
    '''Rewards so large, on some problems, that the gradient is not finite.

    1e308 is a number, and twice it is none.
    '''
    def reward(self, problem, completion):
        plain = super().reward(problem, completion)
        number = int(problem.prompt[0]["content"].split()[-1])
        return Reward(plain.total * (1e308 if number in self.bad else 1.0), plain.parts)

class Once(Explodes):
    bad = {0, 1, 2, 3}

class Always(Explodes):
    bad = set(range(5000))
"""


@pytest.mark.parametrize("n", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_an_update_that_is_not_finite_is_skipped_by_all_and_after_some_the_run_stops(
    out, tmp_path, n, monkeypatch
):
    (tmp_path / "explodes.py").write_text(EXPLODES)
    monkeypatch.setenv("PYTHONPATH", os.path.join(ROOT, "tests"))
    run = [*RL, f"--model={out / 'a' / 'sft'}", "--save_every=0"]

    def start(name, task, *more):
        task = f"--task={tmp_path / 'explodes.py'}:{task}"
        tests = os.path.join(ROOT, "tests")
        return torchrun(*run, f"--run_name={name}{n}", task, *more, n=n, PYTHONPATH=tests)

    finish(start("once", "Once", "--steps=13"))
    seen = rows(out / f"once{n}" / "rl")[1:]
    bad = [r["step"] for r in seen if r["grad_norm"] is None]
    assert 0 < len(bad) < 13
    assert [r["updated"] for r in seen] == [float(r["step"] not in bad) for r in seen]
    assert all((r["bad_steps"] > 0) == (r["step"] in bad) for r in seen)

    said = finish(start("always", "Always", "--steps=50", "--max_bad_steps=3"), code=1)
    assert "in 3 steps in a row updates were skipped" in said
    assert len(rows(out / f"always{n}" / "rl")) == 4
    last = checkpoint.latest(out / f"always{n}" / "rl")
    assert last.endswith("step_000003") and checkpoint.load_state(last)["bad"] == 3

    # Nothing had moved.
    first = checkpoint.latest(out / "a" / "sft")
    before = load_file(os.path.join(first, "model.safetensors"))
    after = load_file(os.path.join(last, "model.safetensors"))
    assert all(torch.equal(before[name].double(), after[name]) for name in before)


def test_bad_steps_are_counted_on_after_a_resume(out, tmp_path, monkeypatch):
    """Two before the run was stopped, one after it: three in a row."""
    (tmp_path / "explodes.py").write_text(EXPLODES)
    monkeypatch.syspath_prepend(os.path.join(ROOT, "tests"))
    task = f"--task={tmp_path / 'explodes.py'}:Always"
    run = [*RL, task, "--run_name=counted", f"--model={out / 'a' / 'sft'}", "--max_bad_steps=3"]
    assert call("train_rl.py", *run, "--steps=2") is None
    said = call("train_rl.py", *run, "--steps=50")
    assert "in 3 steps in a row updates were skipped" in said
    assert [r["bad_steps"] for r in rows(out / "counted" / "rl")[1:]] == [1, 2, 3]


# ---- files ---------------------------------------------------------------------------------------

# A script, in a process none of whose files may grow beyond 600 bytes.
LIMITED = """
import resource, runpy, sys

sys.argv = sys.argv[1:]
resource.setrlimit(resource.RLIMIT_FSIZE, (600, 600))
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def test_a_full_disk_while_rollouts_are_written_is_said_and_the_checkpoint_stays(out):
    """The rollouts of a step take more than there is; before that a checkpoint was saved."""
    run = [*RL, "--run_name=fullrollouts", f"--model={out / 'a' / 'sft'}"]
    assert call("train_rl.py", *run, "--steps=2") is None
    ended = subprocess.run(
        [sys.executable, "-c", LIMITED, "train_rl.py", *run],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
        env=environment(),
    )
    assert ended.returncode == 1 and "Traceback" not in ended.stderr, ended.stderr
    assert "goes on from its last checkpoint" in ended.stderr, ended.stderr
    assert checkpoint.latest(out / "fullrollouts" / "rl").endswith("step_000002")
    names = os.listdir(out / "fullrollouts" / "rl" / "rollouts")
    of_step_3 = [name for name in names if name.startswith("step_000003.jsonl.gz")]
    assert all(name.endswith(".tmp") for name in of_step_3)
    assert call("train_rl.py", *run, "--resume=must") is None
    assert call("train_rl.py", *RL, "--run_name=notfull", f"--model={out / 'a' / 'sft'}") is None
    assert_same_run(out / "fullrollouts" / "rl", out / "notfull" / "rl", "step_000006")


def test_a_run_with_everything_on_resumes_to_the_same_end(out):
    """KL against the starting weights, two updates, resampled groups, a schedule.

    All that they need is in the checkpoint. A finished run goes on when it is given more steps.
    """
    run = [*RL, *EVERYTHING[:-3], "--lr_schedule=constant", f"--model={out / 'a' / 'sft'}"]
    assert call("train_rl.py", *run, "--run_name=unbroken") is None
    assert call("train_rl.py", *run, "--run_name=broken", "--steps=4") is None
    assert call("train_rl.py", *run, "--run_name=broken", "--resume=must") is None
    assert_same_run(out / "unbroken" / "rl", out / "broken" / "rl", "step_000006")
    seen = rows(out / "unbroken" / "rl")[1:]
    # It starts at the reference and leaves it.
    assert seen[0]["kl"] == pytest.approx(0, abs=1e-12) and seen[-1]["kl"] > 1e-4
    assert all(r["updated"] for r in seen) and seen[-1]["ratio/std"] > 1e-4


def test_the_weights_that_a_kl_term_measures_from_are_kept_and_known_again(out):
    first = out / "a" / "sft" / "step_000030"
    run = [*RL, "--kl_coef=0.1", "--run_name=kept", f"--model={first}"]
    assert call("train_rl.py", *run, "--steps=2") is None
    assert str(out / "kept" / "rl") in (first / checkpoint.USED).read_text().splitlines()
    os.rename(first, out / "moved")
    message = call("train_rl.py", *run, "--steps=3")
    os.rename(out / "moved", first)
    assert "step_000030" in message and "KL" in message and "\n" not in message
    assert call("train_rl.py", *run, "--steps=3") is None


def test_clipping_does_nothing_to_a_step_of_one_update(out):
    """Later updates are held to the formula in test_loop.py."""
    one = [*RL, "--steps=1", "--lr=3e-3", f"--model={out / 'a' / 'sft'}"]
    for name, clip in (("one", []), ("oneclipped", ["--clip_low=0", "--clip_high=0"])):
        assert call("train_rl.py", *one, *clip, f"--run_name={name}") is None
    names = ("grad_norm", "entropy", "ratio/mean", "flops_total")
    plain, clipped = (rows(out / name / "rl")[1] for name in ("one", "oneclipped"))
    assert [plain[name] for name in names] == [clipped[name] for name in names]


def test_without_a_kl_term_there_is_no_reference_and_with_one_dead_groups_are_pulled_too(
    out, monkeypatch
):
    """A base model that solves nothing: no advantage is other than 0.

    Only the KL term gives a gradient, on a policy that has left its reference.
    """
    import nanorl.policy

    loaded, load = [], nanorl.policy.load_model
    monkeypatch.setattr(nanorl.policy, "load_model", lambda *a: loaded.append(a[0]) or load(*a))
    start = [*RL, f"--model={out / 'a' / 'sft'}"]
    assert call("train_rl.py", *start, "--run_name=noreference", "--steps=1") is None
    assert len(loaded) == 1
    run = [*start, "--run_name=pull", "--kl_coef=0.1", "--problems=4"]
    assert call("train_rl.py", *run, "--steps=2") is None
    assert len(loaded) == 3  # the policy, and what it started from

    state = checkpoint.load_state(checkpoint.latest(out / "pull" / "rl"))
    path = os.path.join(checkpoint.latest(out / "pull" / "rl"), "trainer.pt")
    state["settings"]["task"] = "chain4"
    torch.save(state, path)  # from here on nothing can be solved
    assert call("train_rl.py", *run, "--steps=3", "--task=chain4") is None
    row = rows(out / "pull" / "rl")[-1]
    assert row["frac_reward_zero_std"] == 1 and row["advantage/max"] == 0
    assert row["kl"] > 0 and row["updated"] == 1 and row["grad_norm"] > 0


def test_a_save_because_the_reward_rose_says_so(out, capsys):
    run = [*RL, "--run_name=rose", f"--model={out / 'a' / 'sft'}", "--steps=6"]
    assert call("train_rl.py", *run, "--save_every=0", "--save_reward_above=0.3") is None
    lines = capsys.readouterr().out.splitlines()
    said = [line.split("step_")[1] for line in lines if line.startswith("saved")]

    # Each step with a higher reward than all before it. The last step is saved in any case.
    rewards = {r["step"]: r["reward"] for r in rows(out / "rose" / "rl")[1:]}
    best, risen, expected = 0.3, [], []
    for step, reward in rewards.items():
        if reward > best:
            risen.append(step)
            if step < 6:
                expected.append(f"{step:06d} (a new best reward, {reward:.3f})")
        best = max(best, reward)
    assert risen and said[:-1] == expected


def test_dynamic_sampling_replaces_dead_groups_up_to_the_cap(out):
    """With two samples a group is often dead.

    What left is on disk too, and counts in the reward. The learner sees as many live groups as
    there were.
    """
    run = [*RL, "--samples_per_prompt=2", "--prompts_per_step=6", "--steps=3"]
    run += [f"--model={out / 'a' / 'sft'}"]
    assert call("train_rl.py", *run, "--run_name=plain") is None
    assert call("train_rl.py", *run, "--run_name=once", "--resample=1") is None
    assert call("train_rl.py", *run, "--run_name=often", "--resample=7") is None

    def groups_on_disk(name, step):
        groups = {}
        for record in step_records(out / name, step):
            groups.setdefault(record["group"], []).append(record)
        return groups

    plain, once, often = (rows(out / name / "rl")[1:] for name in ("plain", "once", "often"))
    assert [r["resampled"] for r in plain] == [0, 0, 0]
    # Up to the first step with a dead group the runs are the same.
    step = next(r["step"] for r in plain if r["frac_reward_zero_std"])
    dead = round(6 * plain[step - 1]["frac_reward_zero_std"])
    assert once[step - 1]["resampled"] == dead
    assert len(groups_on_disk("once", step)) == 6 + dead
    for name, some in (("once", once), ("often", often)):
        for r in some:
            assert len(groups_on_disk(name, r["step"])) == 6 + r["resampled"]
    for r in often:  # all that were dead have left: none is among the six that are learnt from
        groups = groups_on_disk("often", r["step"])
        live = [g for g in groups.values() if len({x["reward"] for x in g}) > 1]
        assert len(live) == 6 and all(x["advantage"] != 0 for g in live for x in g)
        assert r["frac_reward_zero_std"] == pytest.approx(1 - 6 / len(groups))
    # Each problem comes once a pass.
    prompts = []
    for path in sorted((out / "often" / "rl" / "rollouts").iterdir()):
        prompts += [r["prompt"] for r in records(path)]
    most = 2 * (1 + len(prompts) // 100)
    assert all(prompts.count(p) <= most for p in set(prompts))


def test_schedule_weights_and_masks_reach_the_loop(out, capsys):
    """The rate that is logged; that it is the one applied: test_loop.py."""
    run = [*RL, f"--model={out / 'a' / 'sft'}", "--steps=4"]
    options = ["--lr_schedule=linear", "--warmup=2", "--reward_weights=correct=3"]
    options += ["--overlong=mask"]
    assert call("train_rl.py", *run, *options, "--run_name=wired") is None
    assert call("train_rl.py", *run, "--run_name=unwired") is None
    wired, plain = (rows(out / name / "rl")[1:] for name in ("wired", "unwired"))
    assert [r["lr"] for r in wired] == pytest.approx([5e-4, 1e-3, 1e-3, 5e-4])
    assert [r["lr"] for r in plain] == [1e-3] * 4
    assert wired[0]["reward"] == pytest.approx(3 * wired[0]["reward/correct"], abs=1e-12)
    assert wired[0]["reward/correct"] == plain[0]["reward/correct"]

    capsys.readouterr()
    assert call("train_rl.py", *run, "--run_name=masked", "--overlong=mask") is None
    masked = rows(out / "masked" / "rl")[1:]
    assert plain[0]["completions/clipped_ratio"] > 0
    assert masked[0]["grad_norm"] != pytest.approx(plain[0]["grad_norm"], rel=1e-3)
    cut = [r["completions/clipped_ratio"] for r in masked]
    step = next(step for step, share in enumerate(cut, 1) if share > 0.2)
    said = capsys.readouterr().out
    assert f"WARNING, step {step}: {cut[step - 1]:.0%} of the completions were cut off" in said
    assert said.count("were cut off") == times_worse(cut)
    # It is not said again where it is no worse, also when the run was resumed.
    assert call("train_rl.py", *run, "--run_name=masked", "--overlong=mask", "--steps=6") is None
    longer = [r["completions/clipped_ratio"] for r in rows(out / "masked" / "rl")[1:]]
    again = capsys.readouterr().out.count("were cut off")
    assert again == times_worse(longer) - times_worse(cut)


def times_worse(cut):
    """In how many steps the share of cut-off completions passes a mark that none before did."""
    levels = [marks_passed(share, CUT) for share in cut]
    return sum(level > max(levels[:i], default=0) for i, level in enumerate(levels))


BUG = """
import numpy as np, torch
from nanorl.tasks import Problem, Reward
from toy_task import Toy

class Bug(Toy):
    def reward(self, problem, text):
        return super().reward(problem, text) if len(text) % 3 else 1 / 0

class Odd(Toy):
    def problem(self, index):
        return Problem(f"Write about {index}", np.int64(index))

    def reward(self, problem, text):
        kind = (len(text) + int(problem.answer)) % 5
        if kind == 0:
            exec("exit()")
        if kind == 1:
            return Reward(torch.tensor(0.5), {"correct": np.float32(1), "length": np.int64(3)})
        return [Reward(0.0, {"correct": None}), Reward(np.float64("nan")), None][kind - 2]
"""


def test_a_reward_that_fails_is_said_with_its_reason(out, tmp_path, capsys):
    (tmp_path / "bug.py").write_text(BUG)
    run = [*RL, f"--task={tmp_path / 'bug.py'}:Bug", "--run_name=bug", "--steps=1"]
    assert call("train_rl.py", *run, f"--model={out / 'a' / 'sft'}") is None
    said = capsys.readouterr().out
    assert "the task's reward failed on" in said and "ZeroDivisionError: division by zero" in said
    assert "WARNING, step 1: the task's reward failed on" in said
    assert call("eval.py", f"--show={out / 'bug'}") is None
    assert "the reward failed: ZeroDivisionError: division by zero" in capsys.readouterr().out
    failed = [r for r in step_records(out / "bug", 1) if "error" in r]
    assert len(failed) == rows(out / "bug" / "rl")[1]["reward/errors"] > 0
    assert all(r["reward"] <= 0 for r in failed)


def test_no_value_of_a_reward_and_no_exit_in_it_ends_a_run(out, tmp_path, capsys):
    (tmp_path / "odd.py").write_text(BUG)
    task = f"--task={tmp_path / 'odd.py'}:Odd"
    run = [*RL, task, "--run_name=odd", "--steps=2", f"--model={out / 'a' / 'sft'}"]
    assert call("train_rl.py", *run) is None
    found = step_records(out / "odd", 1) + step_records(out / "odd", 2)
    errors = " ".join({record.get("error", "none") for record in found})
    for words in ("SystemExit: None", "none", "correct is None", "total is nan", "gave None"):
        assert words in errors
    assert all(record["prompt"].count("Write about") == 1 for record in found)
    assert {type(record["answer"]) for record in found} == {int}
    good = [record for record in found if "error" not in record and record["finish"] == "stop"]
    assert good and all(record["parts"] == {"correct": 1, "length": 3} for record in good)
    for way in ("greedy", "sampled"):
        options = [task, f"--model={out / 'odd' / 'rl'}", f"--how={way}", "--device=cpu"]
        few = ["--problems=20", "--sample_problems=20", "--samples=4", "--max_new_tokens=12"]
        assert call("eval.py", *options, *few) is None


# ---- the self-check ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [
        [],
        ["--loss_norm=sequence", "--advantage=zscore", "--temperature=0.7"],
        ["--loss_norm=constant", "--advantage=loo", "--overlong=mask"],
        ["--kl_coef=0.5", "--kl_estimator=k2", "--updates_per_rollout=2"],
        ["--kl_coef=0.5", "--kl_estimator=k1-in-reward"],
        ["--kl_coef=0.5", "--temperature=0.7"],
        ["--kl_coef=0.5", "--temperature=0.7", "--kl_estimator=k1-in-reward"],
        ["--kl_coef=0.5", "--updates_per_rollout=2", "--clip_low=0.1"],
        ["--lora_rank=3", "--kl_coef=0.5", "--recompute", "--lr=1e-2"],
    ],
)
def test_selfcheck_agrees_in_fp64(out, options, capsys):
    """On a run that has moved away from its reference, so that there are KL terms to be checked."""
    name = f"check{abs(hash(str(options)))}"
    run = [*RL, *options, f"--run_name={name}", f"--model={out / 'a' / 'sft'}"]
    assert call("train_rl.py", *run, "--steps=2") is None
    before = rows(out / name / "rl")
    capsys.readouterr()
    assert call("train_rl.py", *run, "--steps=2", "--selfcheck") is None
    said = capsys.readouterr().out
    # Also of a run that has made all its steps.
    assert "within the bounds" in said and "4 problems, 16 completions" in said
    assert float(re.search(r"norm ([\d.]+e[+-]\d+)", said)[1]) > 0
    assert rows(out / name / "rl") == before  # it leaves everything as it was


# What is broken, and which of the three figures it shows in.
BREAKS = [
    ("nanorl.grpo.token_weights = lambda lengths, *a: -(lengths > 0).double()", {"gradient"}),
    ("nanorl.grpo.denominator = lambda *a: 7", {"gradient"}),
    (
        "nanorl.gpt.CausalAttention.__call__ = lambda s, layer, q, k, v: "
        "v.repeat_interleave(q.size(2) // v.size(2), 2)",
        {"sampler's log-probs"},
    ),
    ("nanorl.grpo.advantages = lambda r, kind: r", {"advantages", "gradient"}),
]


@pytest.mark.parametrize("broken, figures", BREAKS)
def test_selfcheck_sees_what_is_broken(out, broken, figures):
    """And says where: just the figures that the break spoils are out of their bounds."""
    code = (
        f"import runpy, sys, nanorl.grpo, nanorl.gpt; {broken}; sys.argv = sys.argv[1:]; "
        "runpy.run_path(sys.argv[0], run_name='__main__')"
    )
    run = ["--run_name=brokencheck", f"--model={out / 'a' / 'sft'}", "--selfcheck"]
    ended = subprocess.run(
        [sys.executable, "-c", code, "train_rl.py", *RL, *run],
        cwd=ROOT,
        capture_output=True,
        text=True,
        env=environment(),
        timeout=120,
    )
    assert ended.returncode == 1 and "OUT OF BOUNDS" in ended.stdout, ended.stdout + ended.stderr
    line = r"  (.+?) +(?:largest difference|difference / norm) (\S+) \(bound (\S+)\)"
    measured = re.findall(line, ended.stdout)
    assert {name for name, _, _ in measured} == {"sampler's log-probs", "advantages", "gradient"}
    assert {name for name, off, bound in measured if float(off) > float(bound)} == figures


# ---- reading -------------------------------------------------------------------------------------


def test_rollouts_are_shown_readably(out, capsys):
    run = [*RL, "--run_name=read", f"--model={out / 'a' / 'sft'}", "--steps=2"]
    assert call("train_rl.py", *run) is None
    written = step_records(out / "read", 2)
    capsys.readouterr()
    assert call("eval.py", f"--show={out / 'read'}", "--step=2", "--prompt=1") is None
    said = capsys.readouterr().out
    assert "step 2, 4 prompts, 16 completions" in said
    assert "prompt 1, answer even" in said and "prompt 0" not in said
    for record in written:
        if record["group"] == 1:
            assert f"reward {record['reward']:g} (correct {record['parts']['correct']:g})" in said
    assert "\x1b" not in said and "\x00" not in said
    assert call("eval.py", f"--show={out / 'read' / 'rl'}") is None
    assert capsys.readouterr().out.count("prompt ") >= 4
    for options, words in ((["--step=9"], "steps 1 to 2"), (["--prompt=4"], "prompts 0 to 3")):
        assert words in call("eval.py", f"--show={out / 'read'}", *options)
    assert "no rollouts" in call("eval.py", f"--show={out / 'a'}")


def test_rollouts_on_disk_hold_all_that_was_seen(out):
    run = [*RL, "--run_name=disk", f"--model={out / 'a' / 'sft'}", "--steps=1"]
    assert call("train_rl.py", *run) is None
    with gzip.open(out / "disk" / "rl" / "rollouts" / "step_000001.jsonl.gz", "rt") as f:
        some = [json.loads(line) for line in f]
    fields = "step time group sample prompt answer completion reward parts advantage tokens finish"
    fields += " index correct prompt_ids ids logprobs entropies"
    assert set(some[0]) == set(fields.split())
    assert all(r["step"] == 1 and abs(r["time"] - time.time()) < 600 for r in some)
