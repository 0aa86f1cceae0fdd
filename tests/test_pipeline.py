"""The scripts as a person runs them, on a model of 80 thousand parameters: end to end, killed and
resumed, on two ranks."""

import gzip
import json
import os
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch
from safetensors.torch import load_file, save_file

from nanorl.runtime import checkpoint
from nanorl.tokenizer import Tokenizer
from scripts import (
    BASE,
    RL,
    ROOT,
    SFT,
    SMALL,
    assert_rows_agree,
    assert_same_run,
    call,
    call_on_ranks,
    records,
    rows,
    start_and_kill,
)


def test_rl_killed_and_resumed_equals_the_uninterrupted_run(out):
    """Three kills; twenty are in test_slow.py."""
    assert call("train_rl.py", *RL, "--run_name=a") is None
    model = f"--model={out / 'a' / 'sft'}"
    assert call("train_rl.py", *RL, "--run_name=c", model) is None
    for step in (1, 3, 5):
        start_and_kill("train_rl.py", [*RL, "--run_name=d", model], out / "d" / "rl", step)
    assert call("train_rl.py", *RL, "--run_name=d", model, "--resume=must") is None
    assert_same_run(out / "c" / "rl", out / "d" / "rl", "step_000006")
    assert rows(out / "a" / "rl") == rows(out / "c" / "rl")  # one seed, one run
    assert all(r["updated"] for r in rows(out / "c" / "rl")[1:]), (
        "nothing was learnt: the test would show little"
    )


LORA = ["--lora_rank=2", "--lora_alpha=8", "--lora_targets=q,v,down"]


def test_lora_killed_and_resumed_equals_the_uninterrupted_run(out):
    """Adapters go into trainer.pt, with the base's path and hash. What is saved beside them is a
    plain model, merged."""
    arguments = [*RL, *LORA, "--kl_coef=0.1", f"--model={out / 'a' / 'sft'}", "--lr=1e-2"]
    assert call("train_rl.py", *arguments, "--run_name=lora") is None
    start_and_kill("train_rl.py", [*arguments, "--run_name=lora2"], out / "lora2" / "rl", 3)
    assert call("train_rl.py", *arguments, "--run_name=lora2", "--resume=must") is None
    assert_same_run(out / "lora" / "rl", out / "lora2" / "rl", "step_000006")
    assert rows(out / "lora" / "rl")[-1]["kl"] > 0  # from the base, which is the reference
    last = out / "lora" / "rl" / "step_000006"
    state, base = (
        torch.load(last / "trainer.pt", weights_only=True),
        load_file(out / "a" / "sft" / "step_000030" / "model.safetensors"),
    )
    assert (
        state["start"]["hash"] == checkpoint.fingerprint(out / "a" / "sft" / "step_000030")
        and len(state["lora"]) == 6
    )  # one layer, three projections
    assert (
        sum(
            len(group["params"])
            for optimizer in state["optimizers"]
            for group in optimizer["param_groups"]
        )
        == 6
    )
    moved = {
        name
        for name, p in load_file(last / "model.safetensors").items()
        if not torch.equal(p, base[name].to(p.dtype))
    }
    assert moved == {
        f"model.layers.0.{name}_proj.weight" for name in ("self_attn.q", "self_attn.v", "mlp.down")
    }
    for name in moved:  # merged
        a, b = (state["lora"][f"{name.removesuffix('.weight')}.lora_{x}.weight"] for x in "AB")
        assert torch.equal(
            load_file(last / "model.safetensors")[name], base[name].double() + 4 * b @ a
        )


def test_lora_moves_between_the_updates_of_one_rollout(out):
    """The second update is taken at the merged weights of the first: the ratio to the sampler has
    left 1."""
    assert (
        call(
            "train_rl.py",
            *RL,
            *LORA,
            f"--model={out / 'a' / 'sft'}",
            "--lr=3e-2",
            "--run_name=twice",
            "--steps=2",
            "--updates_per_rollout=2",
        )
        is None
    )
    ratios = [row["ratio/std"] for row in rows(out / "twice" / "rl")[1:]]
    assert max(ratios) > 1e-3, ratios


def test_lora_without_its_base_is_refused(out, tmp_path):
    shutil.copytree(out / "a" / "sft" / "step_000030", tmp_path / "base")
    arguments = [*RL, *LORA, f"--model={tmp_path / 'base'}", "--run_name=baseless"]
    assert call("train_rl.py", *arguments, "--steps=1") is None
    weights = load_file(tmp_path / "base" / "model.safetensors")
    save_file({name: p + 1 for name, p in weights.items()}, tmp_path / "base" / "model.safetensors")
    assert "is gone or has changed since this run started from it" in call(
        "train_rl.py", *arguments, "--steps=2"
    )


def test_recomputation_changes_only_what_it_costs(out):
    arguments = [*RL, f"--model={out / 'a' / 'sft'}", "--steps=3"]
    assert (
        call("train_rl.py", *arguments, "--run_name=keep") is None
        and call("train_rl.py", *arguments, "--run_name=again", "--recompute") is None
    )
    keep, again = rows(out / "keep" / "rl"), rows(out / "again" / "rl")
    assert again[-1].pop("flops_total") > 1.1 * keep[-1].pop("flops_total")
    assert again[-1]["flops/recompute"] > 0 == keep[-1]["flops/recompute"]
    for row in keep + again:
        row.pop("flops_total", None), row.pop("flops/recompute", None)
    assert keep == again


def test_a_published_model_in_sft(out, capsys):
    """Without trainer.pt a directory is a published model: AdamW at a published model's rate. With
    LoRA, resumed."""
    shutil.copytree(
        out / "a" / "base" / "step_000006",
        out / "published",
        ignore=shutil.ignore_patterns("trainer.pt", "DONE"),
    )
    arguments = [
        *SMALL,
        f"--model={out / 'published'}",
        "--steps=6",
        "--batch_tokens=512",
        "--seq_len=64",
        "--examples=400",
        "--save_every=3",
        "--dtype=fp32",
    ]
    assert call("train_sft.py", *arguments, "--run_name=p1") is None
    assert "AdamW 2e-05" in capsys.readouterr().out
    assert (
        call(
            "train_rl.py",
            *RL[:-2],
            "--dtype=fp64",
            f"--model={out / 'p1' / 'sft'}",
            "--run_name=p4",
            "--dry_run",
        )
        is None
    )
    assert "AdamW 5e-06" in capsys.readouterr().out  # what descends from a published model is one
    assert (
        call(
            "train_sft.py",
            *arguments,
            f"--model={out / 'p1' / 'sft'}",
            "--run_name=p5",
            "--steps=1",
        )
        is None
    )
    assert "AdamW 2e-05" in capsys.readouterr().out
    assert call("train_sft.py", *arguments, *LORA, "--run_name=p2", "--steps=3") is None
    assert "AdamW 0.0002 on adapters of rank 2" in capsys.readouterr().out
    assert call("train_sft.py", *arguments, *LORA, "--run_name=p3") is None
    shutil.copytree(out / "p3" / "sft", out / "p6" / "sft")
    shutil.rmtree(out / "p6" / "sft" / "step_000006")  # as if it had died after step 3
    assert call("train_sft.py", *arguments, *LORA, "--run_name=p6", "--resume=must") is None
    assert_same_run(out / "p3" / "sft", out / "p6" / "sft", "step_000006")
    assert (
        len(
            torch.load(out / "p6" / "sft" / "step_000006" / "trainer.pt", weights_only=True)["lora"]
        )
        == 6
    )
    early, late = (
        load_file(out / "p6" / "sft" / step / "model.safetensors")
        for step in ("step_000003", "step_000006")
    )
    assert any(not torch.equal(early[name], late[name]) for name in early)  # it went on learning


def test_base_and_sft_killed_and_resumed_equal_the_uninterrupted_run(out):
    """Resumed from a checkpoint in the middle: what came after it is taken away, as if the process
    had died there."""
    for script, stage, keep, last, arguments in [
        (
            "train_base.py",
            "base",
            "step_000002",
            "step_000006",
            [*BASE, "--steps=6", "--save_every=2"],
        ),
        (
            "train_sft.py",
            "sft",
            "step_000010",
            "step_000030",
            [*SFT, "--steps=30", "--save_every=10"],
        ),
    ]:
        shutil.copytree(out / "a" / stage, out / "before" / stage)
        for name in os.listdir(out / "a" / stage):
            if name.startswith("step_") and name != keep:
                shutil.rmtree(out / "a" / stage / name)
        assert call(script, *arguments, "--run_name=a", "--resume=must") is None
        assert_same_run(out / "before" / stage, out / "a" / stage, last)


def test_two_ranks_give_the_rows_of_one(out):
    model = f"--model={out / 'a' / 'sft'}"
    assert call("train_rl.py", *RL, "--run_name=one", model) is None
    call_on_ranks(["train_rl.py", *RL, "--run_name=two", model])
    one, two = (out / name / "rl" for name in ("one", "two"))
    assert [r["step"] for r in rows(one)] == list(range(7))
    assert_rows_agree(rows(one), rows(two))
    texts = [
        [r["completion"] for r in records(run / "rollouts" / "step_000006.jsonl.gz")]
        for run in (one, two)
    ]
    assert texts[0] == texts[1]


def test_what_a_run_leaves(out):
    assert (
        call("train_rl.py", *RL, "--run_name=left", f"--model={out / 'a' / 'sft'}", "--steps=3")
        is None
    )
    directory = out / "left" / "rl"
    card = json.loads((directory / "run.json").read_text())
    assert (
        card["settings"]["prompts_per_step"] == 4
        and card["device_rows"] >= 4
        and card["torch"] == torch.__version__
    )
    assert [r["step"] for r in rows(directory)] == [0, 1, 2, 3]
    assert "val/accuracy" in rows(directory)[2] and "val/accuracy" not in rows(directory)[1]
    records = [
        json.loads(line)
        for line in gzip.open(
            directory / "rollouts" / "step_000001.jsonl.gz", "rt", encoding="utf-8"
        )
    ]
    assert len(records) == 16
    assert records[0]["prompt"].startswith("<|im_start|>user\nWrite about ") and records[0][
        "prompt"
    ].endswith("<|im_start|>assistant\n")
    assert {"completion", "reward", "parts", "advantage", "finish", "tokens"} <= records[0].keys()
    assert sorted(os.listdir(directory / "step_000003")) == sorted(
        [
            "DONE",
            "chat_template.jinja",
            "config.json",
            "generation_config.json",
            "model.safetensors",
            "tokenizer.json",
            "tokenizer_config.json",
            "trainer.pt",
        ]
    )


def test_forecast_warns_where_no_sample_is_solved(out, capsys):
    assert (
        call(
            "train_rl.py",
            *RL,
            "--task=chain4",
            "--run_name=dry",
            f"--model={out / 'a' / 'base'}",
            "--dry_run",
        )
        is None
    )
    said = capsys.readouterr().out
    assert (
        "4 problems x 4 samples = 16 rows" in said
        and "0 of 16 samples solved" in said
        and "most are cut off, so that they could not be: raise --max_new_tokens first" in said
        and "too hard" not in said
    )
    assert not (out / "dry").exists()  # a dry run leaves everything as it was


def test_eval_writes_outcomes_that_can_be_judged_again(out):
    assert (
        call(
            "eval.py",
            f"--model={out / 'a' / 'sft'}",
            "--task=0-20",
            "--problems=12",
            "--samples=4",
            "--sample_problems=5",
            "--max_new_tokens=12",
        )
        is None
    )
    folder = out / "a" / "sft" / "step_000030" / "eval"
    outcomes = [json.loads(line) for line in (folder / "0-20.jsonl").read_text().splitlines()]
    assert [len(o["texts"]) for o in outcomes] == [1] * 12 + [4] * 5
    result = json.loads((folder / "summary.json").read_text())["0-20"]
    assert (
        result["greedy"]["n"] == 12
        and result["greedy"]["accuracy"] == sum(o["rewards"][0] for o in outcomes[:12]) / 12
    )
    assert {"pass@1", "pass@2", "pass@4"} <= result["sampled"].keys() and result["greedy"][
        "flops"
    ] > 0


def test_a_users_own_task_in_every_stage(out, tmp_path):
    (tmp_path / "vowels.py").write_text('''
from nanorl.tasks import Problem, Reward

class Vowels:
    """Count the vowels of a made-up word."""
    def __init__(self, split="train", letters="5"):
        self.offset, self.letters = {"train": 0, "val": 1000, "test": 2000}[split], int(letters)
    def __len__(self):
        return 200
    def problem(self, index):
        number = index + self.offset
        word = "".join("abcdefghij"[number // 10 ** k % 10] for k in range(self.letters))
        vowels = sum(c in "aei" for c in word)
        return Problem([{"role": "user", "content": "Vowels in " + word}], str(vowels))
    def solution(self, problem):
        return problem.answer
    def reward(self, problem, completion):
        said = completion.strip()
        return Reward(float(said == problem.answer), {"digit": float(said.isdigit())})
''')
    task = [
        f"--task={tmp_path / 'vowels.py'}:Vowels",
        "--task_args=letters=4",
        "--depth=1",
        "--run_name=own",
        "--device=cpu",
    ]
    assert (
        call(
            "train_sft.py",
            *task,
            f"--model={out / 'a' / 'base'}",
            "--steps=3",
            "--batch_tokens=512",
            "--seq_len=64",
        )
        is None
    )
    assert call("train_rl.py", *RL, *task, "--steps=1") is None
    assert "reward/digit" in rows(out / "own" / "rl")[1]
    assert (
        call("eval.py", f"--model={out / 'own' / 'rl'}", *task[:2], "--problems=5", "--samples=0")
        is None
    )


MISTAKES = [
    ("train_rl.py", ["--stpes=3"], "did you mean --steps"),
    ("train_rl.py", ["--steps=many"], "--steps=many"),
    ("train_rl.py", ["--run_name=nowhere"], "python train_sft.py --depth="),
    ("train_sft.py", ["--run_name=nowhere"], "python train_base.py --depth="),
    ("eval.py", ["--model=nowhere"], "no model in nowhere"),
    ("train_rl.py", ["--samples_per_prompt=1"], "samples_per_prompt=1"),
    ("train_rl.py", ["--prompts_per_step=-2"], "prompts_per_step=-2"),
    ("train_rl.py", ["--temperature=0"], "temperature=0"),
    ("train_rl.py", ["--advantage=median"], "'median'"),
    ("train_rl.py", ["--loss_norm=batch"], "'batch'"),
    ("train_rl.py", ["--dtype=fp8"], "fp8"),
    ("train_rl.py", ["--task=sudoku"], "no task 'sudoku'"),
    ("train_rl.py", ["--task=nofile.py:Task"], "nofile.py"),
    ("train_rl.py", ["--task_args=demonstrations=spoken"], "'spoken'"),
    ("train_rl.py", ["--task_args=colour=red"], "colour"),
    ("train_rl.py", ["--max_new_tokens=5000"], "context"),
    ("train_rl.py", ["--prompts_per_step=5000"], "5000"),
    ("train_rl.py", ["--device_rows=2"], "device_rows=2"),
    ("train_rl.py", ["--max_bad_steps=0"], "max_bad_steps=0"),
    ("train_rl.py", ["--resume=maybe"], "maybe"),
    ("train_rl.py", ["--resume=must"], "no checkpoint"),
    ("train_rl.py", ["--task=comparision"], "did you mean comparison"),
    ("train_rl.py", ["--task=0-20=0,counting=5"], "'0-20=0' must be a task and its weight"),
    ("train_rl.py", ["--task=0-20 until 3; 2-digit until 2; sum3"], "'2-digit until 2' must be"),
    (
        "train_rl.py",
        ["--task=0-20=1,counting=1", "--task_args=binary.rewards=signed"],
        "no task 'binary'",
    ),
    ("train_rl.py", ["--problems=100000"], "--problems=100000: task 0-20 has"),
    (
        "train_rl.py",
        ["--problems=3", "--prompts_per_step=4"],
        "ask for 4 different problems, and the run has 3",
    ),
    ("train_rl.py", ["--problems=-5"], "problems=-5"),
    (
        "train_rl.py",
        ["--problems=16", "--prompts_per_step=8", "--resample=2"],
        "may ask for 24 different problems",
    ),
    ("train_rl.py", ["--reward_weights=style=1"], "names style"),
    ("train_rl.py", ["--reward_weights=correct=nan"], "correct=nan"),
    ("train_rl.py", ["--reward_weights=correct"], "'correct'"),
    ("train_rl.py", ["--top_k=5"], "full distribution"),
    ("train_rl.py", ["--kl_estimator=k1"], "kl_estimator=k1"),
    ("train_rl.py", ["--overlong=drop"], "overlong=drop"),
    ("train_rl.py", ["--lr_schedule=step"], "lr_schedule=step"),
    ("train_rl.py", ["--kl_coef=-1"], "kl_coef=-1"),
    ("train_rl.py", ["--lora_rank=-1"], "lora_rank=-1"),
    ("train_rl.py", ["--lora_rank=4", "--lora_alpha=0"], "lora_alpha 0"),
    ("train_rl.py", ["--lora_rank=4", "--lora_targets=q,x"], "names x: it takes some of q, k"),
    ("train_rl.py", ["--task_args=template=r2"], "'r2'"),
    ("train_sft.py", ["--optimizer=sgd"], "optimizer=sgd"),
    ("train_sft.py", ["--optimizer=muon", "--lora_rank=4"], "with LoRA it must be adamw"),
    ("train_rl.py", ["--clip_low=1.5"], "clip_low=1.5"),
    ("train_rl.py", ["--updates_per_rollout=0"], "updates_per_rollout=0"),
    (
        "train_rl.py",
        ["--problems=2500", "--task=0-20=1,counting=1"],
        "are only",
    ),  # 0-20 comes round again
    ("train_rl.py", ["--lr=nan"], "lr=nan"),
    ("train_rl.py", ["--lr=-0.1"], "lr=-0.1"),
    ("train_rl.py", ["--temperature=inf"], "temperature=inf"),
    ("train_rl.py", ["--seed=-1"], "seed=-1"),
    ("train_rl.py", ["--device=tpu"], "tpu"),
    ("train_rl.py", ["steps=3"], "written --name=value"),
    ("train_rl.py", ["--steps"], "--steps needs a value"),
    ("train_rl.py", ["--task=gsm8k"], "openai/gsm8k"),
    ("train_sft.py", ["--task=countdown", "--task_args=largest=two"], "'two'"),
    ("train_sft.py", ["--seq_len=8"], "--seq_len"),
    ("train_sft.py", ["--steps=-1"], "steps=-1"),
    ("train_base.py", ["--batch_tokens=1000", "--seq_len=64"], "1000"),
    ("train_base.py", ["--depth=0"], "0"),
    ("train_base.py", ["--run_name=" + 300 * "x"], "choose another --run_name"),
]


@pytest.mark.parametrize("script,mistake,words", MISTAKES, ids=[f"{s}{m}" for s, m, _ in MISTAKES])
def test_a_users_mistake_gets_one_line(out, script, mistake, words, monkeypatch):
    """With the value and the remedy, and no traceback: anything but SystemExit would come through
    `call`."""
    monkeypatch.setitem(sys.modules, "datasets", None)  # the hub is out of reach
    monkeypatch.delenv("NANORL_DATA", raising=False)
    run = (
        []
        if script == "eval.py" or mistake[0].startswith("--run")
        else [f"--run_name=m{abs(hash(str(mistake)))}"]
    )
    small = [] if script == "eval.py" else SMALL
    model = (
        [f"--model={out / 'a' / ('sft' if script == 'train_rl.py' else 'base')}"]
        if run and script != "train_base.py"
        else []
    )
    message = call(script, *small, *run, *model, *mistake)
    assert isinstance(message, str) and words in message and "\n" not in message


OWN = """
from nanorl.tasks import Problem, Reward

class Own:
    def __init__(self, split="train"): pass
    def __len__(self): return 20
    def problem(self, index): return Problem([{"role": "user", "content": f"Say {index}"}], "x")
    def reward(self, problem, completion): return Reward(0.0)

class NoReward:
    __init__, __len__, problem = Own.__init__, Own.__len__, Own.problem

class NoProblems(Own):
    def __len__(self): return 0

class PlainText(Own):
    def problem(self, index): return "Say it"

class LongPrompt(Own):
    def problem(self, index):
        return Problem([{"role": "user", "content": "so many words " * 5000}], "x")

class WordReward(Own):
    def reward(self, problem, completion): return "good"

class NotANumber(Own):
    def reward(self, problem, completion): return Reward(float("nan"))
"""
OWN_MISTAKES = [
    ("train_rl.py", "NoReward", "has no reward"),
    ("train_rl.py", "NoProblems", "there are no problems"),
    ("train_rl.py", "PlainText", "not a nanorl.tasks.Problem"),
    ("train_rl.py", "LongPrompt", "context"),
    ("train_rl.py", "WordReward", "'good'"),
    ("train_rl.py", "NotANumber", "nan"),
    ("train_rl.py", "None", "no class 'None'"),
    ("train_sft.py", "Own", "no solution()"),
    ("train_base.py", "Own", "no document()"),
    ("eval.py", "NoReward", "has no reward"),
]


@pytest.mark.parametrize("script,name,words", OWN_MISTAKES)
def test_a_mistake_in_a_users_own_task_gets_one_line(out, tmp_path, script, name, words):
    (tmp_path / "own.py").write_text(OWN)
    arguments = [*SMALL[::2], f"--task={tmp_path / 'own.py'}:{name}"] + (
        [] if script == "eval.py" else [f"--run_name=own{name}"]
    )
    arguments += (
        []
        if script == "train_base.py"
        else [f"--model={out / 'a' / ('base' if script == 'train_sft.py' else 'sft')}"]
    )
    message = call(script, *arguments)
    assert isinstance(message, str) and words in message and "\n" not in message


def damaged(model, how):
    """Spoil a copied model directory. Returns words of the message that is due."""
    if how == "weights cut short":
        os.truncate(model / "model.safetensors", 5000)
        return "model.safetensors cannot be read"
    if how == "no weights":
        os.remove(model / "model.safetensors")
        return "model.safetensors"
    if how == "config cut short":
        os.truncate(model / "config.json", 50)
        return "config.json cannot be read"
    if how == "another tokenizer":
        Tokenizer.train(["quite different words"], 265).save(model)
        return "do not belong together"
    if how == "no tokenizer":
        os.remove(model / "tokenizer.json")
        return "tokenizer.json"
    config = json.loads((model / "config.json").read_text())
    config.update(
        {"architectures": ["MambaForCausalLM"]}
        if how == "another architecture"
        else {"hidden_size": 128}
    )
    (model / "config.json").write_text(json.dumps(config))
    return "MambaForCausalLM" if how == "another architecture" else "expected"


@pytest.mark.parametrize(
    "how",
    [
        "weights cut short",
        "no weights",
        "config cut short",
        "another tokenizer",
        "no tokenizer",
        "another architecture",
        "another size",
    ],
)
@pytest.mark.parametrize("script", ["train_sft.py", "train_rl.py", "eval.py"])
def test_a_damaged_model_gets_one_line(out, tmp_path, script, how):
    shutil.copytree(out / "a" / "sft" / "step_000030", tmp_path / "model")
    words = damaged(tmp_path / "model", how)
    message = call(
        script,
        *SMALL[::2],
        "--task=0-20",
        f"--model={tmp_path / 'model'}",
        *([] if script == "eval.py" else ["--run_name=damaged"]),
    )
    assert isinstance(message, str) and words in message and "\n" not in message


def test_a_damaged_checkpoint_of_the_run_gets_one_line_and_the_one_before_it_resumes(out):
    model = f"--model={out / 'a' / 'sft'}"
    assert call("train_rl.py", *RL, "--run_name=cut", model, "--steps=3") is None
    os.truncate(out / "cut" / "rl" / "step_000003" / "trainer.pt", 1000)
    message = call("train_rl.py", *RL, "--run_name=cut", model)
    assert "trainer.pt cannot be read" in message and "remove" in message and "\n" not in message
    shutil.rmtree(out / "cut" / "rl" / "step_000003")
    assert call("train_rl.py", *RL, "--run_name=cut", model, "--resume=must") is None
    assert [r["step"] for r in rows(out / "cut" / "rl")] == list(range(7))


# Runs a script, whose files may not grow beyond a size.
WITH_SMALL_FILES = """
import resource, runpy, sys
most = int(sys.argv[1])
resource.setrlimit(resource.RLIMIT_FSIZE, (most, most))
sys.argv = sys.argv[2:]
runpy.run_path(sys.argv[0], run_name='__main__')
"""


def test_a_full_disk_while_saving_is_said_and_loses_nothing(out):
    """The disk is full from step 3 on: once step 2 is saved no file may grow beyond 300 kB, and the
    weights take 600."""
    run = [*RL, "--run_name=full", f"--model={out / 'a' / 'sft'}"]
    assert call("train_rl.py", *run, "--steps=2") is None
    ended = subprocess.run(
        [sys.executable, "-c", WITH_SMALL_FILES, "300_000", "train_rl.py", *run],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
    )
    lines = ended.stderr.strip().splitlines()
    assert ended.returncode == 1 and "Traceback" not in ended.stderr
    assert (
        "step 3 could not be saved" in lines[-1]
        and "free some space" in lines[-1]
        and "step_000002" in lines[-1]
    )
    assert call("train_rl.py", *run, "--resume=must") is None
    assert call("train_rl.py", *RL, "--run_name=whole", f"--model={out / 'a' / 'sft'}") is None
    assert_same_run(out / "full" / "rl", out / "whole" / "rl", "step_000006")


def test_a_fixed_set_of_problems_is_all_that_is_trained_on(out):
    assert (
        call(
            "train_rl.py",
            *RL,
            "--run_name=fixed",
            f"--model={out / 'a' / 'sft'}",
            "--problems=5",
            "--steps=5",
        )
        is None
    )
    prompts = [
        {json.loads(line)["prompt"] for line in gzip.open(path, "rt")}
        for path in sorted((out / "fixed" / "rl" / "rollouts").iterdir())
    ]
    assert len(set().union(*prompts)) == 5 and all(len(p) >= 2 for p in prompts)
    counts = [
        json.loads(line)["prompt"]
        for path in (out / "fixed" / "rl" / "rollouts").iterdir()
        for line in gzip.open(path, "rt")
    ]
    assert {counts.count(p) for p in set(counts)} == {
        16
    }  # 5 steps of 4 problems are 4 passes, of 4 samples each


def test_a_mixture_and_a_curriculum(out):
    task = "--task=0-20 until 2; 0-20=1,comparison=1"
    assert (
        call(
            "train_rl.py",
            *RL,
            task,
            "--run_name=stages",
            f"--model={out / 'a' / 'sft'}",
            "--steps=4",
        )
        is None
    )
    said = [
        " ".join(json.loads(line)["prompt"] for line in gzip.open(path, "rt"))
        for path in sorted((out / "stages" / "rl" / "rollouts").iterdir())
    ]
    assert ["Calculate" in text for text in said[:2]] == [True, True] and not any(
        "greater" in text for text in said[:2]
    )
    assert any("greater" in text for text in said[2:]) and any(
        "Calculate" in text for text in said[2:]
    )
    later = rows(out / "stages" / "rl")[3:]
    assert (
        "reward_of/comparison" in later[0].keys() | later[1].keys()
        and "reward_of/0-20" not in rows(out / "stages" / "rl")[1]
    )


def test_changed_constants_do_not_silently_resume(out):
    assert (
        call("train_rl.py", *RL, "--run_name=changed", f"--model={out / 'a' / 'sft'}", "--steps=1")
        is None
    )
    message = call(
        "train_rl.py",
        *RL,
        "--run_name=changed",
        f"--model={out / 'a' / 'sft'}",
        "--steps=2",
        "--lr=5e-4",
    )
    assert "lr: 0.001 -> 0.0005" in message and "--run_name=" in message
    assert (
        call("train_rl.py", *RL, "--run_name=changed", f"--model={out / 'a' / 'sft'}", "--steps=2")
        is None
    )  # more steps is the same run


@pytest.mark.parametrize("number,code", [(signal.SIGTERM, 0), (signal.SIGINT, 130)])
def test_signals_save_and_leave(out, number, code):
    run = f"signal{code}"
    process = subprocess.Popen(
        [
            sys.executable,
            "train_rl.py",
            *RL,
            f"--run_name={run}",
            f"--model={out / 'a' / 'sft'}",
            "--steps=100000",
            "--save_every=0",
        ],
        cwd=ROOT,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
    )
    metrics = out / run / "rl" / "metrics.jsonl"
    deadline = time.time() + 120
    while (
        not (metrics.exists() and len(metrics.read_text().splitlines()) > 2)
        and process.poll() is None
        and time.time() < deadline
    ):
        time.sleep(0.02)
    process.send_signal(number)
    error = process.communicate(timeout=60)[1].decode()
    assert process.returncode == code and "Traceback" not in error
    last = rows(out / run / "rl")[-1]["step"]
    assert (out / run / "rl" / f"step_{last:06d}" / "DONE").exists()
