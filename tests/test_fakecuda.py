"""The CUDA path on a machine without a GPU, by the simulated device in tests/fakecuda."""

import json
import os
import shutil
import subprocess
import sys

import pytest
import torch

from scripts import (
    APART,
    BASE,
    RL,
    ROOT,
    SFT,
    TOY,
    assert_rows_agree,
    call,
    environment,
    finish_ranks,
    ranks,
    rows,
)
from test_choice import write_files

pytestmark = pytest.mark.skipif(
    shutil.which("g++") is None and not torch.version.cuda,
    reason="the simulated CUDA device needs g++",
)


def on_fake_gpu(*arguments, cwd=ROOT, **more):
    """A script of tests/fakecuda, in a process of its own: it must come before torch."""
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=cwd,
        env=environment(NANORL_DEBUG="1", **more),
        capture_output=True,
        text=True,
    )


def said(ended):
    """What it said, and no trouble."""
    assert ended.returncode == 0, ended.stdout[-4000:] + ended.stderr[-4000:]
    return ended.stdout


# ---- the device, the engine, the learner ---------------------------------------------------------


def test_the_device_refuses_and_counts_as_a_gpu_does():
    """Devices, syncs, graphs, poison, and attention that a CPU has no kernel for."""
    lines = said(on_fake_gpu("tests/fakecuda/check_device.py")).splitlines()
    assert len(lines) >= 20 and all(line.startswith("ok ") for line in lines)


@pytest.mark.parametrize("dtype", ["fp64", "fp32"])
def test_the_engine_gives_the_cpus_completions(dtype):
    """From captured graphs, over calls with other prompts, weights and settings.

    The script itself compares ids and log-probs, and counts the syncs in steps and micro-batches.
    """
    told = said(on_fake_gpu("tests/fakecuda/check_engine.py", dtype))
    *calls, last = [json.loads(line) for line in told.splitlines()]
    assert len(calls) == 6 and all(call["equal"] == call["of"] >= 9 for call in calls)
    assert all(call["steps"] > 20 and call["syncs_in_steps"] == 0 for call in calls)
    assert calls[0]["captures"] > 5 > 2 > calls[1]["captures"]  # the same settings: replayed
    assert 230 < last["kernels"] < 290
    for attention in ("micro_batch", "in_one_kernel"):
        assert last[attention]["make_batch"] == 2 and last[attention]["token_sums"] == 1
    assert last["in_one_kernel"]["forward"] == 2 < last["micro_batch"]["forward"]


def test_the_kernels_of_a_decode_step():
    """In depth 20's shape. Each costs some microseconds, however few rows there are."""
    counted = json.loads(said(on_fake_gpu("tests/fakecuda/count_kernels.py")))
    assert counted["layer"] <= 33
    assert counted["by_op"]["aten.mm.default"] == 4
    assert counted["by_op"]["aten._scaled_dot_product_efficient_attention.default"] == 2
    assert counted["rest"] <= 115


# ---- whole scripts -------------------------------------------------------------------------------

ADAPTED = ["--lora_rank=2", "--kl_coef=0.1", "--updates_per_rollout=2"]
EVAL = ["eval.py", "--dtype=fp64", "--examples=0", "--device=cpu"]
SAMPLED = ["--problems=20", "--samples=4", "--sample_problems=8", "--max_new_tokens=12"]
BENCH = (
    "-m nanorl.tools.bench rollout --depth=1 --vocab_size=64 --prompts=2 --samples=2 "
    "--prompt_tokens=5 --new_tokens=6 --repeats=1 --dtype=fp32 --naive_rows=2"
).split()


def script_calls(out, name):
    """{what: [script, argument, ...]} of the runs `name`, which begin from `out`'s models."""
    base, sft = f"--model={out / 'a' / 'base'}", f"--model={out / 'a' / 'sft'}"
    answers = ["--eval_problems=5", "--eval_every=1", "--eval_new_tokens=12"]
    rl = ["train_rl.py", *RL, sft]
    adapted = [*rl, *ADAPTED, f"--run_name={name}-adapted"]
    evaluated = [*EVAL, f"--model={out / name / 'evaluated'}"]
    return {
        "base": ["train_base.py", *BASE, "--steps=2", "--sample_tokens=8", f"--run_name={name}"],
        "sft": ["train_sft.py", *SFT, base, TOY, "--steps=2", *answers, f"--run_name={name}"],
        "rl": [*rl, "--steps=2", "--device_tokens=200", f"--run_name={name}"],
        "adapted": [*adapted, "--steps=1"],
        "resumed": [*adapted, "--steps=2", "--resume=must"],
        "sampled": [*evaluated, TOY, "--how=greedy,sampled", *SAMPLED],
        "likelihood": [*evaluated, "--task=arc_easy", "--how=likelihood"],
    }


@pytest.fixture(scope="module")
def both(out, tmp_path_factory):
    """All scripts on the CPU and on the simulated GPU -> {what: the GPU's record of it}."""
    files = tmp_path_factory.mktemp("files")
    write_files(files)
    syncs = files / "syncs.jsonl"
    for name in ("cpu", "gpu"):
        shutil.copytree(out / "a" / "sft", out / name / "evaluated")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("NANORL_DATA", str(files))
        for arguments in script_calls(out, "cpu").values():
            assert call(*arguments) is None

        # All of them in one process.
        calls = {**script_calls(out, "gpu"), "bench": BENCH}
        together = []
        for arguments in calls.values():
            together += [*arguments, "--device=cuda", "--then"]
        run = ["tests/fakecuda/fake_run.py", *together[:-1]]
        said(on_fake_gpu(*run, FAKECUDA_SYNCS=str(syncs)))
    records = [json.loads(line) for line in syncs.read_text().splitlines()]
    return dict(zip(calls, records, strict=True))


@pytest.mark.parametrize("stage", ["base", "sft", "rl", "adapted"])
def test_a_run_has_the_cpus_rows(both, out, stage):
    """In fp64, to 1e-9: losses, gradients, rewards, held-out answers. adapted: LoRA, a KL term, two
    updates a rollout, and its second step after a resume."""
    folders = {"base": "base", "sft": "sft", "rl": "rl", "adapted": "rl"}
    suffix = "-adapted" if stage == "adapted" else ""
    cpu, gpu = (rows(out / f"{name}{suffix}" / folders[stage]) for name in ("cpu", "gpu"))
    assert cpu[-1]["step"] == 2 and cpu[-1]["grad_norm"] > 0
    assert_rows_agree(cpu, gpu)


@pytest.mark.parametrize("what", ["sampled", "likelihood"])
def test_eval_has_the_cpus_answers(both, out, what):
    """Greedy, sampled and by likelihood."""
    found = []
    for name in ("cpu", "gpu"):
        (folder,) = (out / name / "evaluated").glob("step_*/eval")
        path = folder / "arc_easy.jsonl"
        if what == "sampled":
            (path,) = set(folder.glob("*.jsonl")) - {path}
        found.append([json.loads(line) for line in path.read_text().splitlines()])
    cpu, gpu = found
    assert len(cpu) == {"sampled": 28, "likelihood": 4}[what]
    for a, b in zip(cpu, gpu, strict=True):
        assert a.pop("logprobs", {}) == pytest.approx(b.pop("logprobs", {}), rel=1e-9)
        assert a == b


def test_the_benchmark_runs(both):
    assert both["bench"]["captures"] > 0


def waits(record, function, but=()):
    """Syncs of a script while this function ran, such as 'cache.py step', outside of others."""
    total = 0
    for sync in record["syncs"]:
        if function in sync["within"] and not set(but) & set(sync["within"]):
            total += sync["count"]
    return total


def looks_of_main(record, script):
    """How often main() itself looked at a number on the GPU."""
    total = 0
    for sync in record["syncs"]:
        if sync["within"][-1:] == [f"{script} main"] and "_local_scalar" in sync["op"]:
            total += sync["count"]
    return total


def test_no_sync_in_a_decode_step(both):
    """The host looks for rows that have stopped every eighth step, and otherwise never waits."""
    for what in ("base", "sft", "rl", "adapted", "resumed", "sampled", "bench"):
        record = both[what]
        assert record["replays"] >= record["captures"] > 0
        assert waits(record, "cache.py step") == 0, what
        prefills = waits(
            record, "cache.py pad"
        )  # each takes ids and lengths to the GPU, in one copy
        steps = record["replays"] + record["captures"]  # a shape's first step is not replayed
        assert waits(record, "engine.py _gone") <= steps // 8 + prefills, what


def test_syncs_of_a_micro_batch(both):
    """Stated here, so that one more is noticed: what a micro-batch takes to the GPU, and one look.

    base    inputs, targets; the loss: a step, however many micro-batches it has
    sft     five tensors, and the loss: a step; where the assistant speaks: a micro-batch
    rl      two tensors; attention's runs and squares; the look at the sums
    """
    base = waits(both["base"], "train_base.py loss_of", but=["train_base.py bits_per_byte"])
    assert base + looks_of_main(both["base"], "train_base.py") <= 2 * 3

    setup = ["train_sft.py say_memory"]
    sft = waits(both["sft"], "packing.py split", setup) + looks_of_main(both["sft"], "train_sft.py")
    sft += waits(both["sft"], "learner.py chat_loss", setup)
    in_backward = sum(s["count"] for s in both["sft"]["syncs"] if s["site"] == "autograd")
    assert sft + in_backward <= 2 * 7

    probe = ["forecast.py say"]
    rl = both["rl"]
    sums = waits(rl, "grpo.py token_sums", probe)
    micro_batches = waits(rl, "batch.py make_batch", probe) // 2
    assert micro_batches >= 3 and sums == micro_batches
    learning = sums + waits(rl, "batch.py pack", probe) + waits(rl, "learner.py forward", probe)
    assert learning <= 5 * micro_batches
    assert not any(s["site"] == "autograd" for s in rl["syncs"])
    assert looks_of_main(rl, "train_rl.py") == 0

    # An update: the gradient's norm, and its parts' for the log.
    assert waits(rl, "optim.py update") == 2
    assert waits(rl, "optim.py group_norms") == 2


# As a script, after others have joined the ranks.
COLLECTIVE = """
import torch

def main():
    try:
        torch.distributed.all_reduce(torch.ones(2))
    except RuntimeError as error:
        assert "No backend type associated with device type cpu" in str(error)
    else:
        raise AssertionError("a CPU tensor was taken")
    t = torch.ones(2, device="cuda")
    torch.distributed.all_reduce(t)
    assert t.tolist() == [2, 2]
"""


def test_two_ranks(both, out, tmp_path):
    """NCCL, posed by gloo that refuses CPU tensors: what two ranks learn is what one does."""
    together = []
    for what in ("base", "sft", "rl"):
        arguments = script_calls(out, "ranks")[what]
        together += [*arguments, "--device=cuda", "--then"]
    (tmp_path / "collective.py").write_text(COLLECTIVE)
    command = ["tests/fakecuda/fake_ranks.py", *together, str(tmp_path / "collective.py")]
    syncs = tmp_path / "syncs"
    with ranks(command, NANORL_DEBUG="1", FAKECUDA_SYNCS=str(syncs)) as processes:
        finish_ranks(processes)
    for rank in (0, 1):
        records = [json.loads(line) for line in open(f"{syncs}.{rank}", encoding="utf-8")]
        assert len(records) == 4 and records[2]["replays"] > 0
        assert not any(waits(record, "cache.py step") for record in records)
    for stage in ("base", "sft", "rl"):
        one, two = (rows(out / name / stage) for name in ("cpu", "ranks"))
        assert_rows_agree(one, two, APART | {"flops_causal_total"})


# ---- slips ---------------------------------------------------------------------------------------

# (file of nanorl, a line's text, what stands there instead). check_engine.py sees each.
SLIPS = {
    "a sync in every step": (
        "cache.py",
        "        for row in self.rows:\n            row.age += 1\n        own_pairs",
        "        self.stopped.any().item()\n"
        "        for row in self.rows:\n            row.age += 1\n        own_pairs",
    ),
    "a look every fourth step": (
        "engine.py",
        "ask_every = 8 if",
        "ask_every = 4 if",
    ),
    "a host tensor": (
        "cache.py",
        "beyond = torch.arange(padded, device=lengths.device)",
        "beyond = torch.arange(padded)",
    ),
    "a host tensor where the GPU takes one, by waiting": (
        "cache.py",
        "self.newest = (torch.arange(shape.rows, device=batch.device), ",
        "self.newest = (torch.arange(shape.rows), ",
    ),
    "a reassigned buffer": (
        "cache.py",
        "        self.numbers.copy_(torch.from_numpy(np.concatenate(parts)))",
        "        device = self.ages.device\n"
        "        self.ages = torch.from_numpy(parts[0]).to(device)\n"
        "        self.numbers.copy_(torch.from_numpy(np.concatenate(parts)))",
    ),
    "a frozen host value": (
        "cache.py",
        "        column = self.layout.ages[slots] - 1  # (rows,)",
        "        column = torch.full_like(self.layout.ages[slots], self._oldest() - 1)",
    ),
    "a number of rows that is the host's": (
        "cache.py",
        "        slots = slice(0, shape.rows)\n",
        "        slots = slice(0, shape.rows)\n"
        "        shape = shape._replace(prompts=len(self.prompt_lengths))\n",
    ),
    "weights at a new address": (
        "engine.py",
        "                mine.copy_(theirs)",
        "                mine.data = theirs.to(mine.dtype)",
    ),
    "memory that nobody wrote": (
        "sampling.py",
        "    masses[:, V:] = 0\n",
        "",
    ),
    "a graph of other settings": (
        "engine.py",
        "kept = self.batches.pop(settings, None)",
        "alike = [s for s in self.batches if s.samples == settings.samples]\n"
        "        kept = self.batches.pop(alike[0] if alike else None, None)",
    ),
    "slots that are not in use have no newest token": (
        "cache.py",
        "filled(self.ages, [row.age for row in rows], rest=1)",
        "filled(self.ages, [row.age for row in rows], rest=0)",
    ),
    "a look at each of the learner's sums": (
        "grpo.py",
        "    values = torch.cat([torch.stack(list(found.values())), entropy.double()]).tolist()",
        "    values = [float(value) for value in found.values()] + entropy.tolist()",
    ),
    "the learner's index on the host": (
        "learner.py",
        "    h = pick(h[0], batch.predicted_at)",
        "    h = pick(h[0], batch.predicted_at.cpu())",
    ),
    "the learner's mask on the host": (
        "attention.py",
        "attend=MaskedAttention(allowed.to(device)),",
        "attend=MaskedAttention(allowed),",
    ),
    "a square of the mask left out": (
        "flex.py",
        "pairs = own.T @ prefix + (own.T @ own).tril(-1)",
        "pairs = (own.T @ own).tril(-1)",
    ),
    "a square that needs the mask done without": (
        "flex.py",
        "full = pairs == BLOCK * BLOCK",
        "full = pairs > 0",
    ),
}


@pytest.fixture(scope="module")
def copy_of_nanorl(tmp_path_factory):
    """A folder with a copy of the package and of tests/fakecuda: from there it is what runs."""
    folder = tmp_path_factory.mktemp("copy")
    shutil.copytree(os.path.join(ROOT, "nanorl"), folder / "nanorl")
    shutil.copytree(os.path.join(ROOT, "tests", "fakecuda"), folder / "tests" / "fakecuda")
    return folder


def check_copy(folder):
    """check_engine.py in fp64 on the copy."""
    where = dict(cwd=folder, PYTHONPATH=str(folder))
    return on_fake_gpu("tests/fakecuda/check_engine.py", "fp64", **where)


def test_every_slip_has_its_line():
    for name, (file, line, instead) in SLIPS.items():
        with open(os.path.join(ROOT, "nanorl", file), encoding="utf-8") as f:
            assert f.read().count(line) == 1, (name, file)
        assert instead != line


@pytest.mark.slow
def test_the_copy_passes(copy_of_nanorl):
    said(check_copy(copy_of_nanorl))


@pytest.mark.slow
@pytest.mark.parametrize("slip", SLIPS)
def test_a_slip_is_caught(copy_of_nanorl, slip):
    file, line, instead = SLIPS[slip]
    path = copy_of_nanorl / "nanorl" / file
    whole = path.read_text()
    path.write_text(whole.replace(line, instead))
    try:
        ended = check_copy(copy_of_nanorl)
    finally:
        path.write_text(whole)
    assert ended.returncode != 0, ended.stdout

    # Not by a slip of the slip: the line runs.
    for trouble in ("SyntaxError", "NameError", "AttributeError", "ImportError", "TypeError"):
        assert trouble not in ended.stderr, ended.stderr
    print(slip, "->", (ended.stderr.strip().splitlines() or ["?"])[-1][:200])
