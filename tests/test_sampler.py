"""The plain sampler against the engine, and in its place."""

import random

import pytest
import torch

from conftest import toy_model
from nanorl import sampler
from nanorl.engine import SAMPLERS, Engine
from nanorl.gpt import token_logprobs
from scripts import APART, RL, assert_rows_agree, call, records, rows

HEADS = [dict(), dict(n_kv_head=4, tie_embeddings=True), dict(n_kv_head=1, qk_norm=False)]


def prompts_of(lengths, vocabulary=70, seed=0):
    rng = random.Random(seed)
    return [[rng.randrange(vocabulary) for _ in range(length)] for length in lengths]


def flat(groups):
    return [completion for group in groups for completion in group]


@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize("temperature", [0.0, 0.7, 1.0])
@pytest.mark.parametrize("stop_ids", [(), (3, 5, 9, 11, 12, 40)])
def test_the_engine_gives_the_plain_samplers_completions(heads, temperature, stop_ids):
    """With fewer rows at a time than there are, so that rows leave and others come in."""
    model, prompts = toy_model(**heads), prompts_of([7, 1, 19, 4, 4, 30])
    settings = dict(samples_per_prompt=3, max_new_tokens=24, temperature=temperature)
    settings.update(stop_ids=stop_ids, keys=[11, 12, 13, 14, 15, 16])
    plain = flat(sampler.generate(model, prompts, **settings))
    fast = flat(Engine(model, max_rows=7).generate(prompts, **settings))
    assert [c.ids for c in plain] == [c.ids for c in fast]
    assert [c.finished for c in plain] == [c.finished for c in fast]
    gaps = [abs(x - y) for a, b in zip(plain, fast) for x, y in zip(a.logprobs, b.logprobs)]
    assert max(gaps) <= 1e-9
    lengths = {len(c.ids) for c in plain}
    assert lengths == {24} if not stop_ids else min(lengths) < 24


def test_its_log_probs_are_the_full_forwards():
    model, prompts = toy_model(), prompts_of([5, 9])
    for prompt, group in zip(prompts, sampler.generate(model, prompts, 4, 12, 0.7, keys=[1, 2])):
        for completion in group:
            ids = torch.tensor([prompt + completion.ids])
            logits = model(ids)[0, len(prompt) - 1 : -1]  # (new tokens, V)
            expected = token_logprobs(logits, torch.tensor(completion.ids), 0.7)
            sampled = torch.tensor(completion.logprobs, dtype=torch.float64)
            assert (sampled - expected).abs().max() < 1e-9


def test_in_parts_it_is_the_same_and_counts_what_it_took():
    """For --device_rows: a part of the prompts at a time."""
    model, prompts = toy_model(), prompts_of([5, 9, 2, 7, 3])
    settings = dict(samples_per_prompt=2, max_new_tokens=10, stop_ids=range(0, 70, 9))
    whole, parts = SAMPLERS["plain"](model), SAMPLERS["plain"](model, max_rows=5)
    told = []
    a = whole.generate(prompts, **settings)
    b = parts.generate(prompts, **settings, progress=told.append)
    assert [c.ids for c in flat(a)] == [c.ids for c in flat(b)] and told == [4, 4, 2]
    assert whole.stats["row_slots"] == 10 and parts.stats["row_slots"] == 4
    longest = max(len(c.ids) for c in flat(a))
    assert whole.stats["live"] == [10] * (longest - 1)
    assert whole.stats["work"]["prefill"] == dict(tokens=5 * 9, pairs=5 * 81, head_tokens=10)
    engine = Engine(model)
    engine.generate(prompts, **settings)
    for name in ("rows", "prompt_tokens", "new_tokens", "row_steps", "pairs", "cached"):
        assert whole.stats[name] == parts.stats[name] == engine.stats[name]


def test_rl_with_the_plain_sampler_is_the_same_run(out):
    """But for what it computes: it pads, and no row leaves early."""
    model = f"--model={out / 'a' / 'sft'}"
    for name in ("engine", "plain"):
        arguments = [*RL, model, f"--sampler={name}", f"--run_name={name}", "--steps=3"]
        assert call("train_rl.py", *arguments) is None
    one, two = (out / name / "rl" for name in ("engine", "plain"))
    assert_rows_agree(rows(one), rows(two), APART)
    for step in (1, 3):
        files = [run / "rollouts" / f"step_{step:06d}.jsonl.gz" for run in (one, two)]
        texts = [[r["completion"] for r in records(file)] for file in files]
        assert texts[0] == texts[1]


def test_another_sampler_is_refused(out):
    message = call("train_rl.py", *RL, f"--model={out / 'a' / 'sft'}", "--sampler=vllm")
    assert message == "--sampler=vllm: it must be one of engine, plain"
