"""What RL leaves for people to read: every token of its rollouts, the answers of its evaluations,
and how much of it there is."""

import json
import re
import shutil
import sys

import pytest
import torch

from nanorl import hf
from nanorl.report import forecast
from nanorl.report.cost import gpu_load
from nanorl.report.metrics import allowed_bytes
from nanorl.report.watch import Watch
from nanorl.runtime.log import RunLog, write_records
from nanorl.tasks import get_task
from nanorl.tokenizer import Tokenizer
from scripts import (
    RL,
    SFT,
    TOY,
    assert_same_run,
    call,
    call_on_ranks,
    records,
    rows,
    step_records,
)
from toy_task import Toy

BY_TOKEN = {"ids", "logprobs", "entropies"}


def rl_call(out, name, *constants):
    model = f"--model={out / 'a' / 'sft'}"
    return ["train_rl.py", *RL, model, f"--run_name={name}", *constants]


def rl(out, name, *constants):
    """A short RL run -> its folder out/<name>/rl."""
    assert call(*rl_call(out, name, *constants)) is None
    return out / name / "rl"


def model_of_step(out, name, step):
    """The weights that a step samples from, and its tokenizer."""
    path = out / name / "rl" / f"step_{step - 1:06d}" if step > 1 else out / "a/sft/step_000030"
    model = hf.load_model(path, torch.float64)
    model.compute_dtype = torch.float64
    return model, Tokenizer.from_pretrained(path)


@torch.no_grad()
def check_tokens(out, name, step, temperature):
    """Each value belongs to its token: a forward over each completion alone says the same.

    Returns the groups with entropies and those without.
    """
    model, tokenizer = model_of_step(out, name, step)
    with_entropies, without, prompt_ids = set(), set(), {}
    for record in step_records(out / name, step):
        group, ids = record["group"], record["ids"]
        if record["sample"] == 0:
            prompt_ids[group] = record["prompt_ids"]
        assert ("prompt_ids" in record) == (record["sample"] == 0)
        assert tokenizer.decode(prompt_ids[group]) == record["prompt"]
        said = ids[:-1] if record["finish"] == "stop" else ids
        assert tokenizer.decode(said) == record["completion"] and len(ids) == record["tokens"]

        logits = model(torch.tensor([prompt_ids[group] + ids[:-1]]))[0, -len(ids) :]  # (L, V)
        logprobs = (logits / temperature).log_softmax(-1)
        chosen = logprobs.gather(-1, torch.tensor(ids)[:, None])[:, 0]
        assert record["logprobs"] == pytest.approx(chosen.tolist(), abs=6e-5)
        (with_entropies if "entropies" in record else without).add(group)
        if "entropies" in record:
            entropies = -(logprobs.exp() * logprobs).sum(-1)
            assert record["entropies"] == pytest.approx(entropies.tolist(), abs=6e-4)
            assert len(set(record["entropies"])) > 1 or len(ids) == 1
    assert not with_entropies & without
    return with_entropies, without


MANY = ["--resample=2", "--updates_per_rollout=2", "--kl_coef=0.1", "--temperature=0.8"]
MANY += ["--samples_per_prompt=2", "--prompts_per_step=6", "--device_tokens=64", "--steps=2"]


def test_ids_logprobs_and_entropies_are_those_of_each_token(out):
    """In packed micro-batches, in groups that are split over two, after a resampling."""
    many = rows(rl(out, "many", *MANY))
    for step in (1, 2):
        learnt, replaced = check_tokens(out, "many", step, 0.8)
        assert len(learnt) == 6 and len(replaced) == many[step]["resampled"]
    assert any(row["resampled"] for row in many[1:])

    # Over two ranks all is the same, in the order of the ranks.
    call_on_ranks(rl_call(out, "ranks", *MANY))
    assert len(check_tokens(out, "ranks", 2, 0.8)[0]) == 6
    one, two = (
        sorted(step_records(out / name, 1), key=lambda r: (r["index"], r["sample"]))
        for name in ("many", "ranks")
    )
    for a, b in zip(one, two, strict=True):
        assert a["ids"] == b["ids"] and ("entropies" in a) == ("entropies" in b)
        for values in ("logprobs", "entropies"):
            assert a.get(values, []) == pytest.approx(b.get(values, []), abs=2e-3)


def test_an_index_is_the_problems_number_in_its_split(out):
    run = rl(out, "index", "--steps=2")
    entropies = [e for record in step_records(out / "index", 1) for e in record["entropies"]]
    assert sum(entropies) / len(entropies) == pytest.approx(rows(run)[1]["entropy"], abs=1e-3)
    for record in step_records(out / "index", 2):
        assert f"Write about {record['index']}<" in record["prompt"] and "task" not in record

    mixture = f"{TOY.removeprefix('--task=')}=2,0-20=1"
    run = rl(out, "mixture", f"--task={mixture}", "--steps=1")
    tokenizer = Tokenizer.from_pretrained(run / "step_000001")
    for path, split in ((run / "rollouts", "train"), (run / "evals", "val")):
        task = get_task(mixture, split)
        for record in records(path / "step_000001.jsonl.gz"):
            problem = task.problem(record["index"])
            assert record["prompt"] == tokenizer.decode(tokenizer.render_prompt(problem.prompt))
            assert record["task"] == problem.task and record["answer"] == problem.answer


# ---- evaluations and the probe -------------------------------------------------------------------


def test_evaluations_are_on_disk(out):
    run = rl(out, "evals", "--steps=5", "--task=" + TOY.removeprefix("--task="), "--problems=7")
    files = {path.name for path in (run / "evals").iterdir()}
    assert files == {f"step_{step:06d}.jsonl.gz" for step in (0, 2, 4, 5)}
    asked = []
    for row in rows(run):
        if "val/accuracy" not in row:
            continue
        found = records(run / "evals" / f"step_{row['step']:06d}.jsonl.gz")
        assert all(record["step"] == row["step"] for record in found)
        for split, metric in (("val", "val"), ("train", "train_set")):
            some = [record for record in found if record["split"] == split]
            assert len(some) == row[f"{metric}/n"]
            correct = sum(record["correct"] for record in some)
            assert correct / len(some) == pytest.approx(row[f"{metric}/accuracy"])
        val = [record for record in found if record["split"] == "val"]
        assert sum(record["reward"] for record in val) / 10 == pytest.approx(row["val/reward"])
        assert sum(record["tokens"] for record in val) / 10 == pytest.approx(row["val/length"])
        cut = sum(record["finish"] == "length" for record in val)
        assert cut / 10 == pytest.approx(row["val/clipped"])
        for record in val:
            assert f"Write about {1000 + record['index']}<" in record["prompt"]
            assert record["reward"] == Toy("val").reward(None, record["completion"]).total or (
                record["finish"] == "length"
            )
        asked.append([(record["split"], record["index"]) for record in found])
    assert len(asked) == 4 and all(some == asked[0] for some in asked)


def test_sfts_answers_are_on_disk(out):
    """Of a task, and of the tasks of a mixture."""
    run = ["train_sft.py", *SFT, f"--model={out / 'a' / 'base'}", "--steps=2", "--eval_problems=5"]
    chats = f"{TOY.removeprefix('--task=')}=2, 0-20=1"
    for name, data, tasks in (("one", [], {None}), ("two", [f"--data={chats}"], None)):
        assert call(*run, f"--run_name=sft{name}", *data) is None
        stage = out / f"sft{name}" / "sft"
        for step, row in ((0, rows(stage)[0]), (2, rows(stage)[-1])):
            found = records(stage / "evals" / f"step_{step:06d}.jsonl.gz")
            by_task = {}
            for record in found:
                by_task.setdefault(record.get("task"), []).append(record["correct"])
            assert by_task.keys() == (tasks or {TOY.removeprefix("--task="), "0-20"})
            for task, correct in by_task.items():
                accuracy = row["val/accuracy" + (f"/{task}" if task else "")]
                assert len(correct) == 5 and sum(correct) / 5 == pytest.approx(accuracy)


def test_the_probe_is_on_disk_as_what_was_tried(out, capsys):
    run = rl(out, "probe", "--steps=1")
    probe = records(run / "probe.jsonl.gz")
    assert len(probe) == 16 and {record["step"] for record in probe} == {0}
    solved = sum(record["correct"] for record in probe)
    assert f"probe: {solved} of 16 samples solved" in capsys.readouterr().out
    assert all(BY_TOKEN <= record.keys() for record in probe)
    assert rl(out, "dry", "--dry_run").exists() is False


def test_a_prompt_that_does_not_fit_and_a_reward_that_fails_are_said(out):
    task = TOY.replace("Toy", "Broken").removeprefix("--task=")
    run = rl(out, "odd", f"--task={task}", "--task_args=fails=some", "--steps=1")
    found = [r for r in records(run / "evals" / "step_000000.jsonl.gz") if r["split"] == "val"]
    for record in found:
        assert ("error" in record) == (record["index"] % 2 == 0)
    run = rl(out, "uneven", "--steps=1", f"--task={TOY.removeprefix('--task=')[:-3]}Uneven")
    found = [r for r in records(run / "evals" / "step_000000.jsonl.gz") if r["split"] == "val"]
    assert [r["index"] for r in found if r["finish"] == "too_long"] == [2, 5, 6]


def test_a_resumed_run_has_the_files_of_one_that_went_through(out):
    cut = rl(out, "cut", "--save_every=3")
    whole = out / "whole" / "rl"
    shutil.copytree(cut, whole)
    for folder in ("rollouts", "evals"):  # as of later steps, one of them half-written
        for name in ("step_000006.jsonl.gz", "step_000004.jsonl.gz.tmp", "step_000099.jsonl.gz"):
            (cut / folder / name).write_bytes(b"")
    shutil.rmtree(cut / "step_000006")
    rl(out, "cut", "--save_every=3", "--resume=must")
    assert_same_run(whole, cut, "step_000006")
    for folder in ("rollouts", "evals"):
        names = [sorted(path.name for path in (run / folder).iterdir()) for run in (whole, cut)]
        assert names[0] == names[1]
    for name in names[0]:
        assert records(whole / "evals" / name) == records(cut / "evals" / name)


# ---- how much ------------------------------------------------------------------------------------


def number(text):
    value, unit = re.fullmatch(r"([\d.]+) (bytes|kB|MB)", text).groups()
    return float(value) * {"bytes": 1, "kB": 1e3, "MB": 1e6}[unit]


def stored(folder):
    return sum(path.stat().st_size for path in folder.iterdir())


LARGER = ["--prompts_per_step=12", "--probe_prompts=12", "--lr=1e-12", "--eval_problems=30"]
LARGER += ["--save_every=0", "--device_rows=64"]


@pytest.mark.parametrize(
    "options",
    [
        [],
        ["--rollout_tokens=false"],
        ["--resample=1", "--samples_per_prompt=2", "--prompts_per_step=24", "--probe_prompts=24"],
    ],
)
def test_the_forecast_of_the_disk_is_right_within_a_tenth(out, capsys, options):
    name = f"disk{len(options)}"
    run = rl(out, name, *LARGER, "--steps=4", *options)
    said = capsys.readouterr().out
    rollouts, evals = re.search(r"rollouts about (.+?) in all, evaluations (.+?),", said).groups()
    assert number(rollouts) == pytest.approx(stored(run / "rollouts"), rel=0.1)
    assert number(evals) == pytest.approx(stored(run / "evals"), rel=0.1)
    has_tokens = options != ["--rollout_tokens=false"]
    assert ("ids" in step_records(out / name, 1)[0]) == has_tokens
    assert "prompt_ids" in step_records(out / name, 1)[0] or not has_tokens


def kept(run, steps):
    """What each step's file has: whole, text, none."""
    found = []
    for step in range(1, steps + 1):
        path = run / "rollouts" / f"step_{step:06d}.jsonl.gz"
        found.append("none")
        if path.exists():
            found[-1] = "whole" if "ids" in records(path)[0] else "text"
    return found


def test_beyond_its_bound_a_run_keeps_to_it_and_says_so(out, capsys):
    rl(out, "free", *LARGER, "--dry_run")
    said = capsys.readouterr().out
    a_step = number(re.search("rollouts about (.+?) in all", said)[1]) / 6
    bound = 5.2 * a_step / 1e9
    options = [*LARGER, "--steps=10", "--eval_every=0", "--save_every=6"]
    run = rl(out, "bound", *options, f"--rollouts_gb={bound}")
    said = capsys.readouterr().out
    found = kept(run, 10)
    assert 0.8 * bound < stored(run / "rollouts") / 1e9 <= bound
    assert found[0] == "whole" and "text" in found and found[-1] != "none"
    left_out = [row.get("rollouts/left_out", 0) for row in rows(run)[1:]]
    assert left_out == [["whole", "text", "none"].index(form) for form in found]

    # Before the run, and when it comes to it.
    plan = r"about (\d+) steps are written whole, (\d+) as text alone, (\d+) not at all"
    planned = [int(count) for count in re.search(plan, said).groups()]
    for form, count in zip(("whole", "text", "none"), planned):
        assert abs(found.count(form) - count) <= 1
    assert said.count(f"WARNING, step {found.index('text') + 1}: rollouts/ has come to") == 1
    assert "more than --rollouts_gb=" in said

    # A run that was killed leaves out the same.
    shutil.rmtree(run / "step_000010")
    rl(out, "bound", *options, f"--rollouts_gb={bound}", "--resume=must")
    assert kept(run, 10) == found
    assert call("eval.py", f"--show={run}") is None


def test_the_plan_of_a_long_run_is_spread_over_it():
    settings = {"rollouts_gb": 1.0, "steps": 1000}
    held, counts = forecast.kept_steps(5e6, 1e5, settings)
    assert held <= 1e9 and counts["none"] == 0 and 150 < counts["whole"] < 200
    assert forecast.kept_steps(1e5, 1e4, settings) == (1e8, {"whole": 1000, "text": 0, "none": 0})
    _, counts = forecast.kept_steps(5e6, 4e6, settings)
    assert counts["none"] > 700
    assert allowed_bytes(1000, settings) == 1e9
    assert forecast.kept_steps(1.0, 1.0, {**settings, "rollouts_gb": 0.0})[1]["none"] == 1000


def test_whole_steps_left_out_are_worse_than_values(tmp_path):
    row = {"reward": 0.5, "frac_learned_zero_std": 0.1, "completions/clipped_ratio": 0.0}
    row |= {"entropy": 1.0, "logp_diff/mean": 0.0, "reward/errors": 0, "reward/timeouts": 0}
    row |= {"bad_steps": 0, "lr": 0.1, "tokens": 10, "completions/mean_length": 10.0}
    watch = Watch(None, 300)
    said = [watch.look({**row, "rollouts/left_out": level}) for level in (0, 1, 0, 1, 2, 2)]
    assert [len(sentences) for sentences in said] == [0, 1, 0, 0, 1, 0]
    assert "text alone" in said[1][0] and "not at all" in said[4][0]

    log = RunLog(str(tmp_path))
    assert log.rollouts(1, [{"a": 1}], most=10**6)
    assert not log.rollouts(2, [{"a": 1}], most=stored(tmp_path / "rollouts") + 10)
    assert [path.name for path in (tmp_path / "rollouts").iterdir()] == ["step_000001.jsonl.gz"]


# ---- reading, and what a run is called -----------------------------------------------------------


def test_rollouts_of_before_there_were_tokens_are_shown(tmp_path, capsys):
    old = dict(step=1, time=0.0, group=0, sample=0, prompt="ask", answer="4", completion="5")
    old |= dict(reward=0.0, parts={"correct": 0.0}, advantage=0.0, tokens=2, finish="stop")
    (tmp_path / "rl" / "rollouts").mkdir(parents=True)
    with open(tmp_path / "rl" / "rollouts" / "step_000001.jsonl.gz", "wb") as f:
        write_records(f, [old, {**old, "sample": 1}])
    assert call("eval.py", f"--show={tmp_path}") is None
    assert "2 x reward 0 (correct 0), advantage +0.000, 2 tokens" in capsys.readouterr().out


def test_note_timestamps_and_lines(out, capsys, monkeypatch):
    monkeypatch.setattr(sys, "stdout", sys.stdout)  # which is put back
    note = "whether it learns 'this'"
    options = ["--timestamps", "--log_every=3", "--steps=4", "--eval_every=2", "--save_every=0"]
    run = rl(out, "noted", f"--note={note}", *options)
    lines = capsys.readouterr().out.splitlines()
    assert json.loads((run / "run.json").read_text())["settings"]["note"] == note
    assert all(re.match(r"\d\d:\d\d:\d\d  \S|\d\d:\d\d:\d\d   ", line) for line in lines), lines
    steps = [int(step) for step in re.findall(r"rl +(\d+)/4", "\n".join(lines))]
    assert steps == [2, 3, 4]  # 2 and 4 have an evaluation
    assert any("saved " in line for line in lines)
    assert [row["step"] for row in rows(run)] == [0, 1, 2, 3, 4]


def test_a_gpu_tells_its_load_or_nothing(monkeypatch):
    gpu = torch.device("cuda")
    monkeypatch.setattr(torch.cuda, "utilization", lambda device: 87)
    monkeypatch.setattr(torch.cuda, "power_draw", lambda device: 412_000)
    assert gpu_load(gpu) == {"gpu/utilization": 0.87, "gpu/watts": 412.0}
    assert gpu_load(torch.device("cpu")) == {}

    def refuse(device):
        raise ModuleNotFoundError("nvidia-ml-py does not seem to be installed")

    monkeypatch.setattr(torch.cuda, "power_draw", refuse)
    assert gpu_load(gpu) == {}
