"""The FLOPs that the scripts log, computed from shapes, against torch's FlopCounterMode.

FlopCounterMode sees every product as it runs. It knows nothing of the fused attention on a CPU, so
attention is spelled out here. Whole squares are counted, masked or not.
"""

import contextlib
import json

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from conftest import toy_model
from nanorl import grpo
from nanorl.attention import CausalAttention, MaskedAttention, SharedPrefixAttention, pick
from nanorl.batch import pack
from nanorl.engine import Engine
from nanorl.lora import LoRA
from nanorl.report.cost import (
    Meter,
    causal_sampling_flops,
    forward_flops,
    learning_flops,
    sampling_flops,
)
from nanorl.rollout import Rollout
from scripts import RL, SMALL, call

BOUND = 0.02


@pytest.fixture(autouse=True)
def attention_is_spelled_out(monkeypatch):
    monkeypatch.setattr(MaskedAttention, "__call__", MaskedAttention.by_matrix_products)
    monkeypatch.setattr(torch, "inference_mode", torch.no_grad)
    # The optimizer's own products are not in the count.
    monkeypatch.setattr("nanorl.muon.orthogonalized", lambda stack, *_: stack)


@contextlib.contextmanager
def counted(found):
    with FlopCounterMode(display=False) as counter:
        yield
    found.append(counter.get_total_flops())


def close(a, b):
    assert abs(a / b - 1) < BOUND, (a, b, a / b)


PROMPTS = [[5, 6, 7, 8, 9, 10, 11], [20, 21], [30, 31, 32, 33, 34, 35, 36, 37, 38, 39, 40], [50]]


@pytest.mark.parametrize("max_rows", [0, 8])
def test_prefill_and_decode(max_rows):
    """Ragged prompts, rows that stop, and (8 rows) others that take their slots."""
    model = toy_model()
    engine = Engine(model, max_rows)
    found = []
    with counted(found):
        engine.generate(PROMPTS, 4, 24, stop_ids=range(0, 70, 20))
    parts = sampling_flops(engine)
    close(sum(parts.values()), found[0])
    with counted(found):
        engine.generate(PROMPTS, 4, 1)  # nothing to decode: prefill alone
    close(sampling_flops(engine)["prefill"], found[1])
    assert sampling_flops(engine)["decode"] == 0
    assert 0 < causal_sampling_flops(engine) < found[1]


@pytest.mark.parametrize("kind", ["all", "lora", "some lora"])
@pytest.mark.parametrize("recompute", [False, True])
def test_the_learner(kind, recompute):
    # Under a first layer without all adapters more products fall away: 3% of two layers.
    model = toy_model(vocab=200, n_layer=6 if kind == "some lora" else 2)
    model.recompute = recompute
    adapters = None
    if kind == "lora":
        adapters = LoRA(model, 2, 4.0)
    elif kind == "some lora":
        adapters = LoRA(model, 2, 4.0, ("q", "down"))
    groups = Engine(model).generate(PROMPTS, 4, 20, stop_ids=range(0, 70, 20))
    rollouts = [
        Rollout(None, prompt, group, None, None, None) for prompt, group in zip(PROMPTS, groups)
    ]
    ones = torch.ones(4, 4, dtype=torch.float64)
    (batch,) = pack(rollouts, ones, ones, 10_000, "cpu")

    def forward():
        attend = SharedPrefixAttention(batch.rows, "cpu")
        h = model.hidden(batch.ids, batch.positions, attend)
        return attend, model.logprobs(pick(h[0], batch.predicted_at), batch.targets)[0]

    found = []
    with torch.no_grad(), counted(found):
        attend, logprobs = forward()
    work = learning_flops(
        model.config, batch.ids.numel(), attend.computed_pairs, len(logprobs), recompute, adapters
    )
    close(work["forward"], found[0])
    with counted(found):
        objective = grpo.reinforce(forward()[1], batch.advantages)
        grpo.policy_loss(objective, batch.token_weights, 1.0).backward()
    close(sum(work.values()), found[1])
    # Squares and padding, against what a token may see.
    assert attend.computed_pairs > batch.visible_pairs


def test_padded_rows_of_documents_count_as_they_run():
    model, found = toy_model(), []
    document = torch.tensor([[1, 1, 1, 2, 2, 0, 0, 0], [1, 1, 1, 1, 1, 1, 1, 0]])
    with torch.no_grad(), counted(found):
        model.hidden(document, attend=CausalAttention(document))
    close(forward_flops(model.config, 16, 2 * 8 * 8, 0), found[0])


def last_row(directory):
    return json.loads((directory / "metrics.jsonl").read_text(encoding="utf-8").splitlines()[-1])


SFT = [*SMALL, "--batch_tokens=512", "--seq_len=64", "--examples=400", "--dtype=fp32"]
BASE = [
    *SMALL,
    "--documents=300",
    "--vocab_size=300",
    "--batch_tokens=512",
    "--seq_len=64",
    "--dtype=fp32",
    "--sample_tokens=0",
    "--eval_every=3",
]
FEW = [
    "--eval_problems=2",
    "--probe_prompts=1",
    "--prompts_per_step=2",
    "--eval_every=2",
    "--max_new_tokens=6",
]
SCRIPTS = {
    "base": ["train_base.py", *BASE],
    "sft": ["train_sft.py", *SFT],
    "sft lora": ["train_sft.py", *SFT, "--lora_rank=2"],
    "sft answers": [
        "train_sft.py",
        *SFT,
        "--eval_problems=3",
        "--eval_every=2",
        "--eval_new_tokens=6",
    ],
    "rl lora kl": ["train_rl.py", *RL, *FEW, "--lora_rank=2", "--kl_coef=0.1", "--recompute"],
    "rl kl": ["train_rl.py", *RL, *FEW, "--kl_coef=0.1", "--updates_per_rollout=2"],
}


@pytest.mark.parametrize("what", SCRIPTS)
def test_what_a_script_logs(what, out):
    """Two runs of one seed, one of them longer.

    What is done before the first step is the same in both. So the counts differ by as much as the
    logged sums.
    """
    stage = what.split()[0]
    arguments = list(SCRIPTS[what])
    if stage == "sft":
        arguments.append(f"--model={out / 'a' / 'base'}")
    elif stage == "rl":
        arguments.append(f"--model={out / 'a' / 'sft'}")
    found, logged = [], []
    for steps in (1, 3):
        run = f"flops-{what.replace(' ', '-')}-{steps}"
        options = [f"--run_name={run}", f"--steps={steps}", "--save_every=0"]
        with counted(found):
            assert call(*arguments, *options) is None
        row = last_row(out / run / stage)
        logged.append(row["flops_total"] + row["flops_eval_total"])
        assert 0 < row["flops_causal_total"] < row["flops_total"]
    close(logged[1] - logged[0], found[1] - found[0])


def test_the_share_of_the_devices_rate_is_of_the_learners_time():
    """mfu, by hand: 40 FLOPs needed in 2 of 6 seconds, on a device that makes 10 a second."""
    meter = Meter(toy_model(), None, {}, flop_rate=10.0, copy_rate=1.0)
    meter.step_begun, meter.sampled_at, meter.learnt_at = 0.0, 4.0, 6.0
    meter.step["causal/learner"] = 40
    assert meter.rollout_and_learner(tokens=1, learnt_tokens=1)["mfu"] == 40 / 2 / 10


def test_bases_share_of_the_devices_rate_is_of_what_a_step_needs(monkeypatch):
    """By hand: half of the computed pairs are needed; a forward, two for backward; 5 seconds."""
    monkeypatch.setattr("time.time", lambda: 100.0)
    model = toy_model()
    meter = Meter(model, None, {}, flop_rate=1e6)
    meter.step_begun = 95.0
    meter.rows((8, 64), (8, 36), trained=8)
    assert meter.mfu() == pytest.approx(3 * forward_flops(model.config, 8, 36, 8) / 5 / 1e6)
