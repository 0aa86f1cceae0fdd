"""Multiple choice: what the files hold, labels in texts, likelihoods, few-shot prompts.

Likelihoods are compared with one full forward pass a label. Prompts that do not fit are here too.
"""

import json
import sys
import time

import pytest
import torch

from conftest import toy_model
from nanorl.engine import Engine
from nanorl.evaluate.outcomes import Sampling, by_likelihood, by_sampling, which_fit
from nanorl.evaluate.statistics import summary
from nanorl.evaluate.words import describe
from nanorl.rollout import label_logprobs
from nanorl.tasks import FewShot, get_task
from nanorl.tasks.answers import chosen_label
from nanorl.tasks.problem import Problem

ARC = [
    {
        "id": "1",
        "question": "Which is a colour?",
        "choices": {"text": ["red", "dog", "run"], "label": ["A", "B", "C"]},
        "answerKey": "A",
    },
    {
        "id": "2",
        "question": "Which is a number?",
        "choices": {"text": ["cat", "two", "sky", "sea"], "label": ["1", "2", "3", "4"]},
        "answerKey": "2",
    },
    {
        "id": "3",
        "question": "Which barks?",
        "choices": {
            "text": ["cat", "ant", "bee", "cow", "dog"],
            "label": ["A", "B", "C", "D", "E"],
        },
        "answerKey": "E",
    },
    {
        "id": "4",
        "question": "Which is " + "very " * 20 + "wet?",
        "choices": {"text": ["sand", "sea", "fire", "dust"], "label": ["A", "B", "C", "D"]},
        "answerKey": "B",
    },
]
MMLU = [
    {
        "subject": subject,
        "question": f"{subject} {i}?",
        "choices": ["w", "x", "y", "z"],
        "answer": i % 4,
    }
    for subject in ("law", "logic")
    for i in range(5)
]


def write_files(folder):
    for name, split, rows in (
        ("arc_easy", "validation", ARC),
        ("arc_easy", "train", ARC),
        ("mmlu", "validation", MMLU[::2]),
        ("mmlu", "dev", MMLU),
    ):
        (folder / name).mkdir(exist_ok=True)
        (folder / name / f"{split}.jsonl").write_text(
            "".join(json.dumps(row) + "\n" for row in rows)
        )


@pytest.fixture
def files(tmp_path, monkeypatch):
    write_files(tmp_path)
    monkeypatch.setenv("NANORL_DATA", str(tmp_path))


def test_three_to_five_choices_with_letters_or_numbers(files, monkeypatch):
    task = get_task("arc_easy", "val")
    problems = [task.problem(i) for i in range(len(task))]
    assert [p.answer for p in problems] == ["A", "2", "E", "B"]
    assert [len(p.meta["labels"]) for p in problems] == [3, 4, 5, 4]
    prompt = "Which is a number?\n1. cat\n2. two\n3. sky\n4. sea\nAnswer with 1, 2, 3 or 4."
    assert problems[1].prompt[0]["content"] == prompt
    # The 1st, 3rd and 5th of the first subject, the 2nd and 4th of the second.
    mmlu_answers = [p.answer for p in map(get_task("mmlu", "val").problem, range(5))]
    assert mmlu_answers == ["A", "C", "A", "B", "D"]
    assert task.reward(problems[1], task.solution(problems[1])).total == 1
    assert task.reward(problems[1], "4").total == 0
    assert get_task("arc_easy", "val", rewards="signed").reward(problems[0], "B").total == -1
    monkeypatch.setitem(sys.modules, "datasets", None)  # no hub
    with pytest.raises(ValueError, match="arc_challenge.*not at hand.*allenai/ai2_arc"):
        get_task("arc_challenge", "val")


@pytest.mark.parametrize(
    "text, label",
    [
        ("B", "B"),
        (" B.", "B"),
        ("(C)", "C"),
        ("B. Paris", "B"),
        ("**D**", "D"),
        ("A\nbecause", "A"),
        ("The answer is C.", "C"),
        ("The correct answer is (B) dog", "B"),
        ("Answer: D", "D"),
        ("First A, but the answer would be B", "B"),
        # Two statements that differ choose nothing.
        ("The answer is A or rather the answer is D.", None),
        ("The answer is A. The answer is B. The answer is C. The answer is D.", None),
        ("A is correct. B is correct.", None),
        (r"\boxed{A} or \boxed{B}", None),
        ("<answer>A</answer><answer>B</answer>", None),
        (r"\boxed{A, B, C, D}", None),
        ("The answer is A/B/C/D", None),
        ("The answer is A B C D", None),
        ("The answer is (A), (B), (C) and (D).", None),
        ("The answer is **A** or **B**.", None),
        ("Option A. Option B. Option C. Option D.", None),
        ("I choose A. I choose B.", None),
        # The choices said again, in whole or in part.
        ("A. red\nB. dog\nC. run\nD. sky", None),
        ("A. red B. dog C. run D. sky", None),
        ("A) red, B) dog, C) ru", None),
        ("A\nB\nC\nD", None),
        ("A. red\nB. do", None),
        ("D. sky\nC. run\nB. dog\nA. red", None),
        ("A. red\nB. dog\nC. run\nD. sky\n\nThe answer is C. run", "C"),
        # What is stated, and what is denied.
        ("The correct answer is B. Option A is incorrect because it is cold.", "B"),
        ("The correct answer is B, and A is incorrect.", "B"),
        ("The answer is B. Choice A was tempting. It is A that fails.", "B"),
        ("B. Paris\n\nOption A is a city in Spain.", "B"),
        ("Option A is wrong. Option B is not right. Option D is correct.", "D"),
        ("The correct answer is A, which is incorrect.", None),
        ("A is incorrect.", None),
        ("So the best choice is D. Option A is colder.", "D"),
        ("The answer to this question is B.", "B"),
        ("The answer is option C.", "C"),
        ("Therefore, C is the correct answer.", "C"),
        ("**Answer:** `C`", "C"),
        ("**Answer: C**", "C"),
        ("B. Wrong, not wrong", "B"),
        ("The answer is B. Incorrect are A and C.", "B"),
        # Frames.
        (r"\boxed{C}", "C"),
        (r"A is cold, so $\boxed{\text{C}}$.", "C"),
        (r"The answer is $\boxed{C}$. Option A is warm.", "C"),
        ("<think>The answer is A? No.</think><answer>C</answer>", "C"),
        ("<answer>C. run</answer>", "C"),
        ("`C`", "C"),
        (r"\boxed{dog} The answer is A.", None),
        ("I choose D!", "D"),
        ("A dog barks", None),
        ("", None),
        ("B or C", None),
        ("A or B", None),
        ("It is B in my view", "B"),
        ("The answer is A because it is cold.", "A"),
        ("A is correct.", "A"),
        ("Option A is correct.", "A"),
        ("The correct answer is A since x", "A"),
        ("I think A is the right choice", "A"),
        ("A. Incorrect, since rocks melt.\nB. Correct.\nThe answer is B.", "B"),
        ("A) wrong\nC) right\nAnswer: C", "C"),
        ("A: wrong. The correct answer is D", "D"),
        ("(b)", "B"),
        ("The answer is A or B", None),
        ("The answer is A, B, C and D", None),
        ("Answer with A, B, C or D.", None),
        ("Answer with A, B, C or D.\nB", "B"),
        ("Vitamin D helps bones", None),
        ("The answer is: **C**", "C"),
        ("B is a city and A is a river", "B"),
        ("A good choice is C", "C"),
        ("none", None),
        ("ABC", None),
        ("Because", None),
        ("b", "B"),
        ("The answer is a dog", None),
        ("E", None),
    ],
)
def test_labels_in_texts(text, label):
    assert chosen_label(text, list("ABCD")) == label


@pytest.mark.parametrize("piece", ["<answer>", "\\boxed{", "A,", "A ", "(", "answer to "])
def test_a_long_text_is_read_at_once(piece):
    begun = time.process_time()
    chosen_label(piece * 20_000, list("ABCD"))
    assert time.process_time() - begun < 1


def test_numbers_as_labels():
    assert chosen_label("3", list("1234")) == "3"
    assert chosen_label("The answer is 2.", list("1234")) == "2"
    for text in ("12", "-2", "\u22122", "The answer is -2.", "\u0662", "The answer is \u0662"):
        assert chosen_label(text, list("1234")) is None
    assert chosen_label("- 2. dog", list("1234")) == "2"
    assert chosen_label("1. eat\n2. run\n\nThe answer is 2. Run", list("1234")) == "2"
    texts = ("1.5 grams", "2,000 m", "The answer is 3.5 m", "2. dog", "0.4")
    chosen = [chosen_label(text, list("1234")) for text in texts]
    assert chosen == [None, None, None, "2", None]


@torch.no_grad()
def slow_logprobs(model, tokenizer, problem):
    """Every label by itself, after the prompt, in a forward pass of its own."""
    found = []
    for label in problem.meta["labels"]:
        ids = tokenizer.render_prompt(problem.prompt) + tokenizer.encode(label)
        found.append(float(model(torch.tensor([ids]))[0, -2].log_softmax(-1)[ids[-1]]))
    return found


@pytest.mark.parametrize("batch_tokens", [1, 400, 10**6])
def test_likelihoods_are_those_of_a_forward_pass_a_label(files, tokenizer, batch_tokens):
    task = get_task("arc_easy", "val")
    model = toy_model(vocab=tokenizer.n_tokens, context=512)
    engine = Engine(model)
    problems = [task.problem(i) for i in (2, 0, 3, 1)]
    prompts = [tokenizer.render_prompt(p.prompt) for p in problems]
    candidates = [[tokenizer.encode(label)[0] for label in p.meta["labels"]] for p in problems]
    done = []
    found = engine.next_logprobs(prompts, candidates, batch_tokens, done.append)
    # With the smallest budget each prompt is a batch, with the largest all are one.
    assert sum(done) == 4
    assert (len(done) == 4) == (batch_tokens == 1)
    assert (len(done) == 1) == (batch_tokens == 10**6)
    for problem, logprobs in zip(problems, found):
        assert logprobs == pytest.approx(slow_logprobs(model, tokenizer, problem), abs=1e-9)
    results = by_likelihood(engine, tokenizer, task, range(4))
    for o, logprobs in zip(results, [found[i] for i in (1, 3, 0, 2)]):
        best = task.problem(o["index"]).meta["labels"][logprobs.index(max(logprobs))]
        assert o["texts"] == [best]
        assert o["solved"] == [best == o["answer"]]
        assert list(o["logprobs"].values()) == pytest.approx(logprobs, abs=1e-9)


def test_chance_is_of_each_problems_choices(files, tokenizer):
    task = get_task("arc_easy", "val")
    model = toy_model(vocab=tokenizer.n_tokens, context=512)
    results = by_likelihood(Engine(model), tokenizer, task, range(4))
    for o, right in zip(results, (True, True, False, False)):
        o["solved"] = [right]
    s = summary(results)
    assert s["chance"] == pytest.approx((1 / 3 + 1 / 4 + 1 / 5 + 1 / 4) / 4)
    assert s["centred"] == pytest.approx((0.5 - s["chance"]) / (1 - s["chance"]))
    assert any("guessing gets 25.8%" in line for line in describe(s))
    said = by_sampling(Engine(model), tokenizer, task, range(4), Sampling(2, 4, 1.0))
    assert summary(said)["chance"] == s["chance"]


def test_a_prompt_that_does_not_fit_is_not_solved_and_told(files, tokenizer):
    task = get_task("arc_easy", "val")
    longest = max(len(tokenizer.render_prompt(task.problem(i).prompt)) for i in range(4))
    model = toy_model(vocab=tokenizer.n_tokens, context=longest - 1)
    for results in (
        by_likelihood(Engine(model), tokenizer, task, range(4)),
        by_sampling(Engine(model), tokenizer, task, range(4), Sampling(1, 2, 0.0), leave_long=True),
    ):
        assert [o.get("too_long", False) for o in results] == [False, False, False, True]
        assert results[3]["solved"] == [False]
        assert [o["index"] for o in results] == [0, 1, 2, 3]
        s = summary(results)
        assert s["n"] == 4 and s["too_long"] == 1
        assert any(line.startswith("1 prompts do not fit") for line in describe(s))
    with pytest.raises(ValueError, match="do not fit the model's context"):
        by_sampling(Engine(model), tokenizer, task, range(4), Sampling(1, 2, 0.0))


def test_a_model_that_gives_no_numbers_is_refused(files, tokenizer):
    """Else the first label is the likeliest, and 31% of ARC-Easy are right."""
    task = get_task("arc_easy", "val")
    model = toy_model(vocab=tokenizer.n_tokens, context=512)
    model.lm_head.weight.data[5] = torch.nan
    engine = Engine(model)
    with pytest.raises(ValueError, match="log-probs are not finite on problem 0"):
        by_likelihood(engine, tokenizer, task, range(4))
    for temperature in (0.0, 1.0):
        with pytest.raises(ValueError, match="log-probs are not finite on problem 0"):
            by_sampling(engine, tokenizer, task, range(4), Sampling(1, 2, temperature))


def test_a_label_of_several_tokens_is_refused(tokenizer):
    problem = Problem([{"role": "user", "content": "?"}], "AB", {"labels": ["AB", "C"]})
    with pytest.raises(ValueError, match="the labels AB are more than one token"):
        label_logprobs(Engine(toy_model(vocab=tokenizer.n_tokens)), tokenizer, [problem])


def test_solved_problems_come_before_of_the_same_subject(files):
    task = FewShot(get_task("mmlu", "val"), get_task("mmlu", "train"), 2)
    law = task.problem(0)
    logic = task.problem(4)
    assert [m["role"] for m in law.prompt] == ["user", "assistant"] * 2 + ["user"]
    # The first problem of dev is this very one, so the second and third are shown.
    assert [m["content"] for m in law.prompt[1::2]] == ["B", "C"]
    assert all(m["content"].startswith("logic") for m in logic.prompt[::2])
    assert all(m["content"].startswith("law") for m in law.prompt[::2])
    assert task.reward(law, law.answer).total == 1
    assert len(task) == 5
    assert law.answer == get_task("mmlu", "val").problem(0).answer
    # A problem is never shown before itself.
    same = get_task("mmlu", "train")
    for i in range(10):
        assert same.problem(i).prompt[0] not in FewShot(same, same, 2).problem(i).prompt[:-1]
    with pytest.raises(ValueError, match="only 4 solved problems to show of law"):
        FewShot(get_task("mmlu", "val"), get_task("mmlu", "train"), 6).problem(0)


def test_the_published_files(real_data, monkeypatch):
    monkeypatch.setenv("NANORL_DATA", real_data)
    for name, split, n in (
        ("mmlu", "val", 1531),
        ("mmlu", "train", 285),
        ("arc_easy", "val", 570),
        ("arc_challenge", "val", 299),
        ("arc_challenge", "train", 1119),
    ):
        task = get_task(name, split)
        problems = [task.problem(i) for i in range(len(task))]
        assert len(problems) == n
        assert all(p.answer in p.meta["labels"] for p in problems)
        assert all(3 <= len(p.meta["labels"]) <= 5 for p in problems)
        assert all(task.reward(p, task.solution(p)).total == 1 for p in problems)


def test_a_prompt_that_fits_the_context_exactly_is_asked(tokenizer):
    asked = [Problem([{"role": "user", "content": "1+1"}], "2")]
    n = len(tokenizer.render_prompt(asked[0].prompt))
    engine = Engine(toy_model(vocab=tokenizer.n_tokens, context=n + 2))
    assert which_fit(engine, tokenizer, asked, 2) == [True]
    assert which_fit(engine, tokenizer, asked, 3) == [False]
