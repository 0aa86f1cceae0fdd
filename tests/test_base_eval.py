"""A base model's evaluation: the likelihood of continuations, bits per byte, samples, the score.

Likelihoods are compared with a forward pass a choice, and of a real model with transformers'.
"""

import json
import math

import pytest
import torch

from conftest import toy_model
from nanorl.engine import Engine
from nanorl.evaluate import base, continuations
from nanorl.evaluate.outcomes import by_likelihood
from nanorl.evaluate.statistics import summary
from nanorl.hf import load_model
from nanorl.runtime import checkpoint
from nanorl.tasks import FewShot, get_task
from nanorl.tokenizer import Tokenizer
from scripts import call, rows
from test_choice import write_files


@pytest.fixture
def files(tmp_path, monkeypatch):
    write_files(tmp_path)
    monkeypatch.setenv("NANORL_DATA", str(tmp_path))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    return tmp_path


def test_a_question_in_plain_text(files):
    task = get_task("arc_easy:text", "val")
    problem = task.problem(1)
    assert problem.prompt[0]["content"] == "Question: Which is a number?\nAnswer:"
    assert problem.meta["choices"] == [" cat", " two", " sky", " sea"]
    assert (problem.answer, task.solution(problem)) == ("2", " two")
    assert task.reward(problem, "two").total == 1
    assert task.reward(problem, "2").total == 0

    shown = FewShot(task, get_task("arc_easy:text", "train"), 2).problem(1)
    text = continuations.plain_text(shown.prompt)
    before = "Question: Which is a colour?\nAnswer: red\n\nQuestion: Which barks?\nAnswer: dog\n\n"
    assert text == before + "Question: Which is a number?\nAnswer:"


@torch.no_grad()
def slow_mean_logprobs(model, tokenizer, problem):
    """Every choice by itself, after the prompt, in a forward pass of its own."""
    text = continuations.plain_text(problem.prompt)
    found = []
    for choice in problem.meta["choices"]:
        before, after = tokenizer.encode(text), tokenizer.encode(choice)
        ids = torch.tensor([[tokenizer.document_end, *before, *after]])
        logprobs = model(ids)[0].log_softmax(-1)
        total = 0.0
        for t in range(1 + len(before), ids.size(1)):
            total += float(logprobs[t - 1, ids[0, t]])
        found.append(total / len(after))
    return found


@pytest.mark.parametrize("tokens", [1, 150, 10**6])
def test_continuations_are_as_likely_as_in_a_forward_pass_each(
    files, tokenizer, monkeypatch, tokens
):
    monkeypatch.setattr(continuations, "TOKENS", tokens)
    model = toy_model(vocab=tokenizer.n_tokens, context=1024)
    engine = Engine(model)
    source = get_task("arc_easy:text", "val")
    task = FewShot(source, get_task("arc_easy:text", "train"), 1)
    problems = [source.problem(0), task.problem(3), source.problem(2), task.problem(1)]
    done = []
    found = continuations.mean_logprobs(engine, tokenizer, problems, done.append)
    assert sum(done) == 4
    assert (len(done) == 4) == (tokens == 1)
    assert (len(done) == 1) == (tokens == 10**6)
    for problem, logprobs in zip(problems, found):
        assert logprobs == pytest.approx(slow_mean_logprobs(model, tokenizer, problem), abs=1e-9)

    # Nothing is padded: a prompt once, and of each choice all tokens but the last.
    needed = 0
    for problem in problems:
        needed += len(continuations.prompt_ids(tokenizer, problem))
        needed += sum(len(tokenizer.encode(choice)) - 1 for choice in problem.meta["choices"])
    assert engine.stats["work"]["prefill"]["tokens"] == engine.stats["prompt_tokens"] == needed


def test_the_choice_of_least_perplexity_is_the_answer(files, tokenizer):
    model = toy_model(vocab=tokenizer.n_tokens, context=100)
    task = get_task("arc_easy:text", "val")
    found = by_likelihood(Engine(model), tokenizer, task, range(4))
    for outcome in found[:3]:
        problem = task.problem(outcome["index"])
        means = slow_mean_logprobs(model, tokenizer, problem)
        chosen = problem.meta["labels"][means.index(max(means))]
        assert outcome["texts"] == [chosen]
        assert outcome["solved"] == [chosen == problem.answer]
        assert list(outcome["logprobs"].values()) == pytest.approx(means, abs=1e-9)
    # The last question is too long for this model, and counts as not solved.
    assert found[3]["too_long"]
    chance = (1 / 3 + 1 / 4 + 1 / 5 + 1 / 4) / 4
    assert summary(found)["chance"] == pytest.approx(chance)


def test_the_score_is_the_mean_of_centred_accuracies():
    one = dict(accuracy=0.4, centred=0.2, chance=0.25, low=0.36, high=0.46)
    two = dict(accuracy=0.45, centred=-0.1, chance=0.5, low=0.40, high=0.48)
    found = base.score([one, two])
    assert found["score"] == pytest.approx(0.05)
    # Distances of 0.04 and 0.05 below, of 0.06 and 0.03 above, stretched by 1 / 0.75 and 1 / 0.5.
    assert found["low"] == pytest.approx(0.05 - math.hypot(0.04 / 0.75, 0.1) / 2)
    assert found["high"] == pytest.approx(0.05 + math.hypot(0.06 / 0.75, 0.06) / 2)


def evaluate(*arguments):
    return call("eval.py", "--task=base", "--device=cpu", "--dtype=fp64", *arguments)


def test_a_base_model_is_evaluated_in_one_command(out, files, capfd):
    assert evaluate(f"--model={out / 'a' / 'base'}", "--shots=1") is None
    said = capfd.readouterr().out
    path = checkpoint.latest(str(out / "a" / "base"))
    with open(f"{path}/eval/summary.json") as f:
        found = json.load(f)["base.1shot"]

    # The bits per byte that training measured on the same text.
    trained = rows(out / "a" / "base")[-1]["val/bits_per_byte"]
    assert found["bits_per_byte"] == pytest.approx(trained, rel=1e-9)
    assert f"bits per byte  {trained:.4f}" in said
    assert list(found["samples"]) == list(base.PROMPTS)
    assert f"        {base.PROMPTS[0]} ▸" in said

    # ARC's challenge is not at hand.
    assert "arc_challenge:text  skipped" in said
    sets = ["arc_easy:text.1shot", "mmlu:text.1shot"]
    mean = sum(found[name]["centred"] for name in sets) / 2
    assert found["score"] == pytest.approx(mean)
    assert found["low"] < found["score"] < found["high"]
    assert f"the mean of centred over {', '.join(sets)}" in said
    with open(f"{path}/eval/arc_easy_text.1shot.jsonl") as f:
        assert len(f.readlines()) == found[sets[0]]["n"] == 4

    # Fewer problems do not replace them.
    assert evaluate(f"--model={path}", "--shots=1", "--problems=2") is None
    with open(f"{path}/eval/summary.json") as f:
        later = json.load(f)
    assert later["base.1shot"] == found
    assert len([name for name in later if name.startswith("base.1shot.")]) == 1


def test_bits_per_byte_of_a_text(out, files, capfd):
    """Every token of the text is predicted once, in rows as long as training's."""
    path = checkpoint.latest(str(out / "a" / "base"))
    text = "7+5=12 5+5+1=11\nCalculate: 12 + 34 = é " * 30
    (files / "some.txt").write_text(text)
    assert evaluate(f"--model={path}", f"--text={files / 'some.txt'}", "--problems=1") is None
    tokenizer = Tokenizer.from_pretrained(path)
    model = load_model(path, torch.float64)
    model.compute_dtype = torch.float64
    ids = [tokenizer.document_end, *tokenizer.encode(text)]
    nats = 0.0
    for start in range(0, len(ids) - 1, 64):
        row = torch.tensor([ids[start : start + 65]])
        with torch.no_grad():
            logprobs = model(row[:, :-1])[0].log_softmax(-1)
        nats -= float(logprobs.gather(1, row[0, 1:, None]).sum())
    bits = nats / math.log(2) / len(text.encode())
    assert f"bits per byte  {bits:.4f}, of {files / 'some.txt'}" in capfd.readouterr().out


def test_what_cannot_be_evaluated_is_said(out, files, capfd):
    path = checkpoint.latest(str(out / "a" / "base"))
    assert "a base model answers by likelihood" in evaluate(f"--model={path}", "--how=greedy")
    assert "is read by --task=base alone" in call("eval.py", "--text=a.txt", f"--model={path}")
    (files / "empty.txt").write_text("")
    for name in ("empty.txt", "missing.txt"):
        said = evaluate(f"--model={path}", f"--text={files / name}")
        assert said.startswith(f"error: --text={files / name} ")
        assert "centred" not in capfd.readouterr().out  # before the work


def test_continuations_are_as_likely_as_in_transformers(real_data, real_model, monkeypatch):
    transformers = pytest.importorskip("transformers")
    monkeypatch.setenv("NANORL_DATA", real_data)
    net, tokenizer = load_model(real_model, torch.float32), Tokenizer.from_pretrained(real_model)
    net.config.n_tokens = net.config.vocab_size  # transformers knows of no rows that only pad
    theirs = transformers.AutoModelForCausalLM.from_pretrained(real_model, dtype=torch.float32)
    encode = transformers.AutoTokenizer.from_pretrained(real_model).encode
    task = FewShot(get_task("arc_easy:text", "val"), get_task("arc_easy:text", "train"), 1)
    problems = [task.problem(0), get_task("mmlu:text", "val").problem(100)]
    found = continuations.mean_logprobs(Engine(net), tokenizer, problems)
    for problem, ours in zip(problems, found):
        text = continuations.plain_text(problem.prompt)
        for choice, logprob in zip(problem.meta["choices"], ours):
            # The whole text is encoded at once, and begins with the prompt's ids.
            before, whole = encode(text), encode(text + choice)
            assert whole[: len(before)] == before
            ids = torch.tensor([[tokenizer.document_end, *whole]])
            with torch.no_grad():
                logprobs = theirs(ids).logits[0].log_softmax(-1)
            of_tokens = logprobs[:-1].gather(1, ids[0, 1:, None])[len(before) :]
            assert logprob == pytest.approx(float(of_tokens.mean()), abs=1e-3)
