"""Tasks: problems, splits, demonstrations, documents, data files, mixtures and curricula.

A user's own task is here too. What earns a reward is in test_verifiers.py.
"""

import json
import os
import random
import re
import subprocess
import sys
from collections import Counter
from fractions import Fraction
from functools import lru_cache, partial

import numpy as np
import pytest
import torch

from conftest import ROOT
from nanorl.tasks import (
    TASKS,
    Problem,
    arithmetic,
    comparison,
    countdown,
    counting,
    get_stages,
    get_task,
    parse_settings,
)
from nanorl.tasks.files import load_rows
from nanorl.tasks.spelling import BUILT_IN

SIZES = {"sum3": 810_000, "0-20": 1_323, "2-digit": 16_200, "chain4": 30_000, "3x2": 81_000}
# The tables hold hundreds of thousands of problems; the tests draw these numbers.
FEWER = [
    (counting, "PROBLEMS", 20_000),
    (comparison, "PROBLEMS", 40_000),
    (countdown, "DRAWS", 10_000),
]
STYLES = ("direct", "worked", "mixed")
SPLITS = ("train", "val", "test")


@pytest.fixture(autouse=True, scope="module")
def fewer_problems():
    """Whole tables take seconds to draw; smaller ones are made by the same functions."""
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("NANORL_DATA", raising=False)
        patch.setitem(
            arithmetic.PRESETS, "chain4", (partial(arithmetic._chains, SIZES["chain4"]), "fewer")
        )
        for module, name, n in FEWER:
            patch.setattr(module, name, n)
        for module, name in [
            (arithmetic, "_table"),
            (counting, "_table"),
            (comparison, "_table"),
            (countdown, "_problems"),
        ]:
            patch.setattr(module, name, lru_cache(getattr(module, name).__wrapped__))
        yield


@pytest.fixture(params=SIZES)
def preset(request):
    return request.param


def question(problem):
    return problem.prompt[-1]["content"].removeprefix("Calculate: ").removesuffix(" = ")


def compute(text):
    """An independent reading of '12 + 3 - 4' or '12×3', left to right."""
    first, *rest = re.findall(r"^\s*-?\d+|[-+*×]|\d+", text)
    value = int(first)
    for sign, number in zip(rest[::2], rest[1::2], strict=True):
        results = {
            "+": value + int(number),
            "-": value - int(number),
            "*": value * int(number),
            "×": value * int(number),
        }
        value = results[sign]
    return value


def check_steps(worked):
    """Every step must be true. Returns the results, least significant column first."""
    results = []
    for step in worked.split(" "):
        left, relation, right = re.fullmatch(r"(-?\d+(?:[-+*]\d+)*)([=<])(-?\d+)", step).groups()
        if relation == "<":
            assert int(left) < int(right), step
        else:
            assert compute(left) == int(right), step
            results.append(int(right))
    return results


# ---- arithmetic: what is written and how it is judged --------------------------------------------


def test_answers_are_right(preset):
    task = get_task(preset)
    for i in range(200):
        problem = task.problem(i)
        assert [m["role"] for m in problem.prompt] == ["user"]
        assert compute(question(problem)) == int(problem.answer)


@pytest.mark.parametrize("style", STYLES)
def test_demonstrations_earn_the_reward_and_their_steps_are_true(preset, style):
    task = get_task(preset, demonstrations=style)
    for i in range(200):
        problem = task.problem(i)
        text = task.solution(problem)
        assert task.reward(problem, text).total == 1
        worked, _, answer = text.partition("#")
        assert answer == problem.answer
        if style != "mixed":
            assert bool(worked) == (style == "worked")
        if worked:
            # The steps lead to the answer: it is the last result, or the columns' last digits
            # spell it.
            results = check_steps(worked)
            last_digits = "".join(str(r)[-1] for r in reversed(results[:-1]))
            spelled = int(str(results[-1]) + last_digits)
            assert int(answer) in (results[-1], spelled, -spelled)


def test_half_of_the_mixed_demonstrations_are_direct():
    for preset in ("sum3", "2-digit", "chain4", "3x2"):
        task = get_task(preset, demonstrations="mixed")
        direct = sum(task.solution(task.problem(i)).startswith("#") for i in range(2000))
        assert abs(direct / 2000 - 0.5) < 0.03


@pytest.mark.parametrize("style", ["worked", "mixed"])
def test_either_summand_may_be_worked_first(style):
    task = get_task("sum3", demonstrations=style)
    first = [(task.solution(p)[0], p.meta["numbers"]) for p in map(task.problem, range(800))]
    swapped = []
    for digit, (a, b) in first:
        if digit != "#" and a % 10 != b % 10:
            swapped.append(digit == str(b)[-1])
    assert 0.4 < sum(swapped) / len(swapped) < 0.6


def test_instruction_and_precision():
    plain = get_task("0-20")
    told = get_task("0-20", instruction="Answer only.")
    asked = plain.problem(3).prompt[0]["content"]
    assert told.problem(3).prompt[0]["content"] == "Answer only. " + asked

    # An answer is right within half a unit of the first decimal place.
    task = get_task("0-20", precision="1")
    problem = next(p for p in map(task.problem, range(100)) if int(p.answer) > 0)
    near, far = f"#{problem.answer}.05", f"#{problem.answer}.051"
    assert (task.reward(problem, near).total, task.reward(problem, far).total) == (1, 0)
    assert plain.reward(problem, near).total == 0
    message = "precision is '.*': it must be a number of decimal places"
    for precision in ("x", "-1", "1.5"):
        with pytest.raises(ValueError, match=message):
            get_task("0-20", precision=precision)


# ---- arithmetic: splits --------------------------------------------------------------------------


def codes(rows, sort_operands):
    """Rows of integers -> one integer each.

    With sort_operands a + b and b + a get the same integer, and so do products.
    """
    rows = rows.copy()
    if sort_operands and rows.shape[1] == 3:
        commutes = rows[:, 0] != arithmetic.SIGNS.index("-")
        rows[commutes, 1:] = np.sort(rows[commutes, 1:], axis=1)
    return (rows * (int(rows.max()) + 1) ** np.arange(rows.shape[1])).sum(1)


def test_splits_are_disjoint_by_content_and_cover_everything(preset):
    split = {name: get_task(preset, split=name) for name in ("train", "val", "test")}
    everything = np.concatenate([codes(task.rows, False) for task in split.values()])
    size = SIZES[preset]
    assert sum(map(len, split.values())) == len(everything) == len(np.unique(everything)) == size
    content = {name: np.unique(codes(task.rows, True)) for name, task in split.items()}
    for a, b in [("train", "val"), ("train", "test"), ("val", "test")]:
        assert len(np.intersect1d(content[a], content[b])) == 0
    assert abs(len(split["val"]) / size - 0.2) < 0.02
    assert abs(len(split["test"]) / size - 0.1) < 0.02


def test_problems_come_mixed_not_in_the_order_of_the_table():
    task = get_task("sum3")
    first = [task.problem(i).meta["numbers"][0] for i in range(100)]
    assert min(first) < 200 and max(first) > 900


@pytest.mark.parametrize("preset", ["0-20", "2-digit", "chain4"])
def test_documents_show_only_problems_of_the_train_split(preset):
    task = get_task(preset)
    known = {question(task.problem(i)): task.problem(i).answer for i in range(len(task))}
    count_documents = 0
    problems_shown = set()
    for i in range(300):
        text = task.document(i)
        if text.startswith("Count: "):
            numbers = [int(n) for n in text.removeprefix("Count: ").split(" ")]
            assert len(set(np.diff(numbers))) == 1
            count_documents += 1
            continue
        for line in text.split("\n"):
            problem, said, rest = re.fullmatch(r"([^=:]+)( = |: )(.+)", line).groups()
            problems_shown.add(problem)
            assert problem in known
            if said == " = ":
                assert rest == known[problem]
            else:
                assert check_steps(rest)
    assert 30 < count_documents < 100 and len(problems_shown) > 700


# ---- the other tasks -----------------------------------------------------------------------------
# They are read by functions that share no code with them.

KINDS = {
    "counting": {},
    "comparison": {},
    "binary": {},
    "spelling": {},
    "words.txt": {},
    "countdown": {},
    "countdown 4": {"numbers": "4"},
    "countdown 3-4": {"numbers": "3-4"},
    "countdown to 9": {"largest": "9"},
}


@pytest.fixture(scope="module")
def words(tmp_path_factory):
    """A words.txt as people have them: the most frequent first, and not all fit for the task."""
    rng = random.Random(0)
    folder = tmp_path_factory.mktemp("words")
    strings = [
        "".join(rng.choices("aabcdeefghiijlmnooprsttuy", k=rng.randint(3, 14))) for _ in range(2000)
    ]
    good = list(dict.fromkeys(strings))  # each once, in their order
    odd = ["it", "e-mail", "naïve", "Straße", "don't", "3rd", "x" * 15, good[0], good[1].upper()]
    (folder / "words.txt").write_text("\n".join(good[:1000] + odd + good[1000:]), encoding="utf-8")
    return folder, good


@pytest.fixture(params=KINDS)
def kind(request, words, monkeypatch):
    """(kind, make): make(split, **settings) gives its task."""
    if request.param == "words.txt":
        monkeypatch.setenv("NANORL_DATA", str(words[0]))
    name = request.param.split(" ")[0].replace("words.txt", "spelling")

    def make(split="train", **settings):
        return get_task(name, split=split, **{**KINDS[request.param], **settings})

    return name, make


def read(name, problem):
    """The prompt -> (what it asks, its content). Problems with the same content share a split."""
    patterns = {
        "counting": r"How many ([a-f]) are in: ([a-f](?: [a-f]){3,15}) \?",
        "comparison": r"Is (\d+) greater than (\d+)\? yes or no",
        "binary": r"Write (\d+) in binary: ",
        "spelling": r"How many ([a-z]) are in ([a-z]+)\?",
        "countdown": (
            r"Use (\d+(?:, \d+){2,3}), each once, and \+ - \* / to make (\d+)\."
            r" Think .* <answer> </answer>\."
        ),
    }
    assert [m["role"] for m in problem.prompt] == ["user"]
    asked = re.fullmatch(patterns[name], problem.prompt[0]["content"]).groups()
    if name == "spelling":
        return asked, asked[1]
    if name == "countdown":
        numbers = sorted(map(int, asked[0].split(", ")))
        return asked, (*numbers, "make", int(asked[1]))
    if name == "comparison":
        return asked, tuple(sorted(asked))
    return asked, asked


def right_answer(name, asked):
    if name == "counting":
        return str(sum(letter == asked[0] for letter in asked[1].split(" ")))
    if name == "comparison":
        return "yes" if int(asked[0]) - int(asked[1]) > 0 else "no"
    if name == "binary":
        return np.base_repr(int(asked[0]))
    if name == "spelling":
        return str(len(asked[1].split(asked[0])) - 1)
    assert name == "countdown"
    return asked[1]


def exact(expression):
    """The value of a demonstration's '(3+9)*2/5', read by Python and computed in fractions."""
    return eval(re.sub(r"\d+", r"Fraction(\g<0>)", expression), {"Fraction": Fraction})


def counted(worked, things, wanted):
    """Whether 'a b1 c b2' names each of the things, and numbers the wanted ones from 1."""
    expected = []
    number = 0
    for thing in things:
        if thing == wanted:
            number += 1
            expected.append(wanted + str(number))
        else:
            expected.append(thing)
    return worked.split(" ") == expected


def compared(x, y):
    return "=><"[(x > y) - (x < y)]


def check_comparison(asked, worked):
    """The lengths are compared, or digit by digit up to the first that differs."""
    a, b = asked
    steps = worked.split(" ")
    if len(a) != len(b):
        assert worked == f"{len(a)}{compared(len(a), len(b))}{len(b)} digits"
    else:
        assert steps == [f"{x}{compared(x, y)}{y}" for x, y in zip(a, b)][: len(steps)]
        assert all("=" in step for step in steps[:-1])
        assert "=" not in steps[-1] or a == b


def check_binary(asked, worked):
    """The number is halved down to 0, and the remainders are its bits from the last one."""
    pairs = [[int(n) for n in step.split(":")] for step in worked.split(" ")]
    halves = [n for n, _ in pairs[1:]] + [0]
    assert pairs[0][0] == int(asked[0])
    assert all(n == 2 * half + bit for (n, bit), half in zip(pairs, halves))
    assert "".join(str(bit) for _, bit in reversed(pairs)) == np.base_repr(int(asked[0]))


def check_countdown(asked, worked):
    """Every attempt joins the given numbers into one, and only the last makes the target."""
    results = []
    for attempt in worked.split(", "):
        unused = Counter(asked[0].split(", "))
        for step in attempt.split(" "):
            x, sign, y, result = re.fullmatch(r"(\d+)([-+*/])(\d+)=(\d+)", step).groups()
            assert exact(f"{x}{sign}{y}") == int(result) > 0
            unused.subtract([x, y])
            assert min(unused.values()) >= 0  # only numbers that are there, and each once
            unused[result] += 1
        results += unused.elements()  # a single number
    assert [result == asked[1] for result in results] == [False] * worked.count(", ") + [True]


def check_working(name, asked, worked):
    """Every step is true and belongs to this problem, and the steps lead to its answer."""
    if name in ("counting", "spelling"):
        letters = asked[1].split(" ") if name == "counting" else list(asked[1])
        assert counted(worked, letters, asked[0])
    elif name == "comparison":
        check_comparison(asked, worked)
    elif name == "binary":
        check_binary(asked, worked)
    else:
        check_countdown(asked, worked)


def parts_of(name, text):
    """A demonstration -> (its working, its answer)."""
    if name == "countdown":
        return re.fullmatch(r"<think>(.*)</think><answer>(.+)</answer>", text).groups()
    return re.fullmatch(r"([^#]*)#(.+)", text).groups()


def test_other_answers_are_right(kind):
    name, make = kind
    for split in SPLITS:
        task = make(split)
        for problem in map(task.problem, range(min(len(task), 200))):
            assert problem.answer == right_answer(name, read(name, problem)[0])


@pytest.mark.parametrize("style", STYLES)
def test_other_demonstrations_earn_the_reward_and_their_steps_are_true(kind, style):
    name, make = kind
    task = make(demonstrations=style)
    for problem in map(task.problem, range(300)):
        asked, _ = read(name, problem)
        text = task.solution(problem)
        reward = task.reward(problem, text)
        assert reward.total == 1
        assert list(reward.parts) == ["format", "answered", "correct"]
        assert set(reward.parts.values()) == {1.0}
        worked, answer = parts_of(name, text)
        if name == "countdown":
            assert exact(answer) == int(problem.answer)
        else:
            assert answer == problem.answer
        assert style == "mixed" or bool(worked) == (style == "worked")
        if worked:
            check_working(name, asked, worked)


def test_half_of_the_other_mixed_demonstrations_are_direct(kind):
    name, make = kind
    task = make(demonstrations="mixed")
    n = min(len(task), 2000)
    direct = sum(not parts_of(name, task.solution(task.problem(i)))[0] for i in range(n))
    assert abs(direct / n - 0.5) < 2.5 / n**0.5  # five standard deviations


def test_other_splits_are_disjoint_by_content(kind):
    name, make = kind
    contents = {}
    for split in SPLITS:
        task = make(split)
        problems = [task.problem(i) for i in range(len(task))]
        assert len({p.prompt[0]["content"] for p in problems}) == len(problems) > 30  # none twice
        contents[split] = {read(name, p)[1] for p in problems}
        assert name != "countdown" or len(contents[split]) == len(problems)  # nor in another order
    whole = set.union(*contents.values())
    assert sum(map(len, contents.values())) == len(whole)
    for split, share in [("train", 0.7), ("val", 0.2), ("test", 0.1)]:
        deviation = (share * (1 - share) / len(whole)) ** 0.5
        assert abs(len(contents[split]) / len(whole) - share) < 4 * deviation


def test_every_number_and_every_word_is_in_some_split(words, monkeypatch):
    def everything(name, i):
        found = set()
        for split in SPLITS:
            task = get_task(name, split=split)
            for problem in map(task.problem, range(len(task))):
                asked, _ = read(name, problem)
                found.add(asked[i])
        return found

    assert everything("binary", 0) == {str(n) for n in range(4096)}
    assert everything("spelling", 1) == set(BUILT_IN.split())
    monkeypatch.setenv("NANORL_DATA", str(words[0]))
    assert everything("spelling", 1) == set(words[1])
    # Of a long file the first words.
    monkeypatch.setattr("nanorl.tasks.spelling.MOST_WORDS", 100)
    uncached = sys.modules["nanorl.tasks.spelling"]._problems.__wrapped__
    monkeypatch.setattr("nanorl.tasks.spelling._problems", lru_cache(uncached))
    assert everything("spelling", 1) == set(words[1][:100])


def test_words_that_fit_in_no_way_are_refused(tmp_path, monkeypatch):
    (tmp_path / "words.txt").write_text("no 12 e-mail\n")
    monkeypatch.setenv("NANORL_DATA", str(tmp_path))
    with pytest.raises(ValueError, match="task spelling, split val: there are no problems in it"):
        get_task("spelling", split="val")


def test_no_answer_to_a_spelling_problem_is_right_most_of_the_time():
    task = get_task("spelling")
    asked = {}
    for problem in map(task.problem, range(len(task))):
        (letter, word), _ = read("spelling", problem)
        asked.setdefault(word, []).append(word.count(letter))
    for word, counts in asked.items():
        repeated = [n for n in Counter(word).values() if n > 1]
        assert sorted(counts) == [0] + [1] * (1 in Counter(word).values()) + sorted(repeated)
    assert max(Counter(sum(asked.values(), [])).values()) < 0.5 * len(task)


@pytest.mark.parametrize("split", SPLITS)
def test_the_split_of_a_word_does_not_tell_which_of_its_letters_is_asked_for(
    words, monkeypatch, split
):
    """Both come from a hash of the word.

    If it were the same hash, held-out problems would ask for other letters than training does.
    """
    monkeypatch.setenv("NANORL_DATA", str(words[0]))
    task = get_task("spelling", split=split)
    positions = Counter()
    for problem in map(task.problem, range(len(task))):
        (letter, word), _ = read("spelling", problem)
        once = sorted(c for c in word if word.count(c) == 1)
        if len(once) == 5 and letter in once:
            positions[once.index(letter)] += 1
    assert len(positions) == 5 and max(positions.values()) < 0.5 * positions.total()


def test_neither_yes_nor_the_first_digit_settles_a_comparison():
    rows = np.concatenate([get_task("comparison", split=split).rows for split in SPLITS])
    assert abs((rows[:, 0] > rows[:, 1]).mean() - 0.5) < 0.02
    alike = np.mean([len(str(a)) == len(str(b)) and str(a)[0] == str(b)[0] for a, b in rows])
    assert 0.3 < alike < 0.6 and 0 < (rows[:, 0] == rows[:, 1]).mean() < 0.05


def test_counting_has_lists_of_all_lengths_and_all_letters():
    task = get_task("counting")
    problems = [task.problem(i).meta for i in range(3000)]
    assert Counter(len(p["letters"]) for p in problems).keys() == set(range(4, 17))
    assert min(Counter(p["wanted"] for p in problems).values()) > 400


@pytest.mark.parametrize("count, sizes", [("3", {3}), ("4", {4}), ("3-4", {3, 4})])
@pytest.mark.parametrize("largest", ["9", "20", "99"])
def test_countdown_numbers_and_targets(count, sizes, largest):
    task = get_task("countdown", numbers=count, largest=largest)
    rows = [(p.meta["numbers"], int(p.answer)) for p in map(task.problem, range(len(task)))]
    assert {len(numbers) for numbers, _ in rows} == sizes
    lowest = min(min(numbers) for numbers, _ in rows)
    highest = max(max(numbers) for numbers, _ in rows)
    assert {lowest, highest} == {1, int(largest)}
    targets = [target for _, target in rows]
    assert min(targets) >= 1 and 90 < max(targets) <= 100


def shown(name, line):
    """A line of a document -> (what it shows as `read` gives it, its working, its answer)."""
    if name == "counting":
        wanted, worked, answer = re.fullmatch(r"([a-f]): (.+) = (\d+)", line).groups()
        return (wanted, re.sub(r"\d", "", worked)), worked, answer
    if name == "comparison":
        a, b, worked = re.fullmatch(r"(\d+) and (\d+): (.+)", line).groups()
        return (a, b), worked, None
    if name == "binary":
        n, worked, answer = re.fullmatch(r"(\d+): (.+) = ([01]+)", line).groups()
        return (n,), worked, answer
    numbers, target, worked = re.fullmatch(r"(.+) make (\d+): (.+)", line).groups()
    return (numbers, target), worked, None


def test_other_documents_show_only_problems_of_the_train_split(kind):
    name, make = kind
    task = make()
    known = {read(name, p)[0] for p in map(task.problem, range(len(task)))}
    known_words = {word for _, word in known} if name == "spelling" else None
    seen = set()
    for i in [*range(100), 10**6]:
        assert task.document(i) == task.document(i)
        for line in task.document(i).split("\n"):
            seen.add(line)
            if name == "spelling":
                word, spelled = line.split(": ")
                assert word in known_words and spelled.split(" ") == list(word)
            else:
                asked, worked, answer = shown(name, line)
                assert asked in known and answer in (None, right_answer(name, asked))
                check_working(name, asked, worked)
    assert len(seen) >= 95


def split_contents(name, split, **settings):
    """The content of every problem of a split, as `read` gives it."""
    task = get_task(name, split=split, **settings)
    return {read(name, problem)[1] for problem in map(task.problem, range(len(task)))}


def test_no_try_that_countdown_shows_solves_a_problem_of_another_split():
    """A try that misses its own target may hit that of a held-out problem with the same numbers."""
    task = get_task("countdown", demonstrations="worked")
    tries = []
    for problem in map(task.problem, range(len(task))):
        numbers = sorted(problem.meta["numbers"])
        for attempt in parts_of("countdown", task.solution(problem))[0].split(", "):
            tries.append((*numbers, "make", int(attempt.split("=")[-1])))
    assert len(tries) > 2 * len(task)  # there is something to see
    for split in ("val", "test"):
        assert not set(tries) & split_contents("countdown", split)


def test_the_split_of_a_problem_does_not_depend_on_what_else_there_is(words, tmp_path, monkeypatch):
    """One task with other settings may be another stage of a curriculum, or part of a mixture."""
    for one, other in [
        ({"numbers": "3"}, {"numbers": "3-4"}),
        ({"numbers": "4"}, {"numbers": "3-4"}),
        ({"largest": "9"}, {}),
    ]:
        train = split_contents("countdown", "train", **one)
        assert len(train & split_contents("countdown", "train", **other)) > 50
        assert not train & split_contents("countdown", "val", **other)
    built_in = split_contents("spelling", "train")
    (tmp_path / "words.txt").write_text("\n".join(words[1] + BUILT_IN.split()[::-1]))
    monkeypatch.setenv("NANORL_DATA", str(tmp_path))
    assert built_in <= split_contents("spelling", "train")


def test_presets_that_share_problems_share_their_splits():
    def questions(preset, split):
        task = get_task(preset, split=split)
        return {question(problem) for problem in map(task.problem, range(len(task)))}

    small = questions("0-20", "train")
    assert len(small & questions("2-digit", "train")) > 100
    assert not small & questions("2-digit", "val")


FRESH = """if True:
    import json
    from nanorl.tasks import comparison, countdown, counting, get_task
    comparison.PROBLEMS, countdown.DRAWS, counting.PROBLEMS = 40_000, 10_000, 20_000
    names = ("0-20", "2-digit", "3x2", "counting", "comparison", "binary", "spelling", \
"countdown", "binary=2,0-20=1")
    tasks = [get_task(name, split=split) for name in names for split in ("train", "val")]
    said = [[t.problem(i).prompt, t.problem(i).answer, t.solution(t.problem(i)), t.document(i)] \
for t in tasks for i in range(50)]"""


def test_problems_and_demonstrations_are_the_same_in_a_fresh_process():
    environment = {**os.environ, "PYTHONHASHSEED": "12345", "PYTHONPATH": ROOT}
    fresh = subprocess.run(
        [sys.executable, "-c", FRESH + "\n    print(json.dumps(said))"],
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    )
    names = {}
    exec(FRESH, names)
    assert json.loads(fresh.stdout) == names["said"]


# ---- gsm8k and data files ------------------------------------------------------------------------


def write_gsm8k(root, n=600):
    os.makedirs(root / "gsm8k")
    with open(root / "gsm8k" / "train.jsonl", "w", encoding="utf-8") as f:
        for i in range(n):
            row = {
                "question": f"Ann has {i} pens and buys {i * 1000}. How many?",
                "answer": (
                    f"She has {i}+{i * 1000}=<<{i}+{i * 1000}={i * 1001}>>{i * 1001} pens.\n"
                    f"#### {i * 1001:,}"
                ),
            }
            f.write(json.dumps(row) + "\n\n")


def check_gsm8k(sizes):
    train = get_task("gsm8k")
    val = get_task("gsm8k", split="val")
    questions = []
    for task in (train, val):
        questions.append({task.problem(i).prompt[0]["content"] for i in range(len(task))})
    assert [len(q) for q in questions] == [len(train), len(val)] == sizes
    assert not questions[0] & questions[1]
    for task in (train, val):
        for problem in map(task.problem, range(len(task))):
            text = task.solution(problem)
            assert "<<" not in text and ">>" not in text and task.reward(problem, text).total == 1
    return train, val


def test_gsm8k_from_a_file(tmp_path, monkeypatch):
    write_gsm8k(tmp_path)
    monkeypatch.setenv("NANORL_DATA", str(tmp_path))
    train, _ = check_gsm8k([127, 473])
    problem = train.problem(5)
    n = int(re.search(r"has (\d+)", problem.prompt[0]["content"])[1])
    assert problem.answer == str(n * 1001)
    assert train.solution(problem) == f"She has {n}+{n * 1000}={n * 1001} pens.\n#### {n * 1001:,}"
    document = train.document(5)
    assert document.startswith("Ann has") and document.endswith(train.solution(problem))
    # Without the marker there is no answer.
    no_answer = {"format": 0, "answered": 0, "correct": 0}
    assert train.reward(problem, f"{n * 1001}").parts == no_answer
    wrong = {"format": 1, "answered": 1, "correct": 0}
    assert train.reward(problem, f"#### {n * 1001 + 1}").parts == wrong
    signed = get_task("gsm8k", rewards="signed")
    texts = (f"#### {n * 1001}", f"#### {n * 1001 + 1}", "")
    assert [signed.reward(problem, text).total for text in texts] == [1, -1, -1]


def test_gsm8k_splits_follow_the_content_not_the_order_of_the_file(tmp_path, monkeypatch):
    write_gsm8k(tmp_path)
    monkeypatch.setenv("NANORL_DATA", str(tmp_path))
    before = {r["question"] for r in get_task("gsm8k", split="val").rows}
    path = tmp_path / "gsm8k" / "train.jsonl"
    path.write_text("\n".join(reversed(path.read_text().split("\n"))))
    assert {r["question"] for r in get_task("gsm8k", split="val").rows} == before


def test_gsm8k_real(real_data, monkeypatch):
    monkeypatch.setenv("NANORL_DATA", real_data)
    check_gsm8k([7000, 473])


def test_a_missing_data_set_names_both_ways_to_get_it(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)  # the hub is out of reach
    monkeypatch.setenv("NANORL_DATA", str(tmp_path))
    with pytest.raises(ValueError) as error:
        get_task("gsm8k", split="test")
    assert str(tmp_path / "gsm8k" / "test.jsonl") in str(error.value)
    assert "openai/gsm8k" in str(error.value)
    monkeypatch.delenv("NANORL_DATA")
    message = r"\$NANORL_DATA.gsm8k.train\.jsonl.*`datasets` can fetch openai/gsm8k"
    with pytest.raises(ValueError, match=message):
        get_task("gsm8k")


def test_a_broken_row_is_named_by_file_and_line(tmp_path, monkeypatch):
    write_gsm8k(tmp_path, 3)
    path = tmp_path / "gsm8k" / "train.jsonl"
    with open(path, "a") as f:
        f.write('{"question": "cut o')
    monkeypatch.setenv("NANORL_DATA", str(tmp_path))
    # Blank lines count.
    with pytest.raises(ValueError, match=rf"{re.escape(str(path))}, line 7: not JSON"):
        get_task("gsm8k")


def test_csv_and_parquet_give_the_same_rows(tmp_path, monkeypatch):
    parquet = pytest.importorskip("pyarrow.parquet")
    table = pytest.importorskip("pyarrow").table
    rows = [{"question": 'a, "b"\nc', "answer": "#### 1"}, {"question": "µ", "answer": "#### 2"}]
    for name in ("c", "p"):
        os.makedirs(tmp_path / name)
    text = 'question,answer\n"a, ""b""\nc",#### 1\nµ,#### 2\n'
    (tmp_path / "c" / "train.csv").write_text(text, encoding="utf-8")
    columns = {key: [r[key] for r in rows] for key in rows[0]}
    parquet.write_table(table(columns), tmp_path / "p" / "train.parquet")
    monkeypatch.setenv("NANORL_DATA", str(tmp_path))
    assert load_rows("c", "train", "none") == load_rows("p", "train", "none") == rows


# ---- getting a task ------------------------------------------------------------------------------

OWN = """
from __future__ import annotations
from dataclasses import dataclass
from nanorl.tasks import Problem, Reward

@dataclass
class Capitals:
    split: str = "train"
    answer: str = "Paris"
    def __len__(self): return 1
    def problem(self, index): return Problem([{"role": "user", "content": "France?"}], self.answer)
    def reward(self, problem, completion): return Reward(float(completion == problem.answer))

class Mute:
    def __init__(self, split="train"): pass
    def __len__(self): return 1
    def problem(self, index): return None

class Odd(Mute):
    def reward(self, problem, completion): return Reward(0.0)

class Empty(Odd):
    def __len__(self): return 0
"""


def test_a_users_own_task(tmp_path):
    path = tmp_path / "json.py"  # a name that the standard library has too
    path.write_text(OWN)
    task = get_task(f"{path}:Capitals", split="val", answer="Lyon")
    assert task.split == "val" and len(task) == 1
    assert task.reward(task.problem(0), "Lyon").total == 1
    assert task.reward(task.problem(0), "Paris").total == 0
    assert sys.modules["json"] is json
    (tmp_path / "notes.txt").write_text(OWN)
    for name, message in [
        (f"{path}:Mute", "has no reward"),
        (f"{path}:Odd", r"Odd, split train: problem\(0\) gave None, not a"),
        (f"{path}:Empty", "Empty, split train: there are no problems in it"),
        (f"{path}:Capital", "has no class 'Capital'"),
        (f"{tmp_path}/none.py:A", "none.py' does not exist"),
        (f"{tmp_path}:A", "is not a .py file"),
        (f"{tmp_path}/notes.txt:Capitals", "is not a .py file"),
    ]:
        with pytest.raises(ValueError, match=message):
            get_task(name)
    with pytest.raises(ValueError, match="Capitals.*'colour'"):
        get_task(f"{path}:Capitals", colour="red")


def test_a_text_is_a_prompt_and_values_of_numpy_and_torch_are_answers():
    assert Problem("Hello", "x").prompt == [{"role": "user", "content": "Hello"}]
    for answer, plain in [
        (np.int64(3), 3),
        (np.str_("a"), "a"),
        (np.array([1.5, 2.0]), [1.5, 2.0]),
        (torch.tensor(4), 4),
        ({"least": 1}, {"least": 1}),
    ]:
        assert json.dumps(Problem("", answer).answer) == json.dumps(plain)


@pytest.mark.parametrize(
    "prompt, answer, message",
    [
        ("Hello", {1, 2}, r"answer is \{1, 2\}: it must be a text or numbers"),
        ("Hello", [np.int64(3)], "answer is .*it must be a text or numbers"),
        ("Hello", float("nan"), "answer is nan"),
        (None, "x", "prompt is None: it must be a text, or a list of messages"),
        (["Hello"], "x", "prompt is .'Hello'.: it must be"),
        ([{"role": "user"}], "x", "it must be a text, or a list"),
        ([{"role": "user", "content": 3}], "x", "it must be a text, or a list"),
    ],
)
def test_a_problem_that_cannot_be_asked_or_written_is_refused(prompt, answer, message):
    with pytest.raises(ValueError, match=message):
        Problem(prompt, answer)


@pytest.mark.parametrize(
    "name, settings, message",
    [
        (
            "sums",
            {},
            f"no task 'sums': did you mean sum3. there are {', '.join(TASKS)}, and path.py:Class",
        ),
        ("zzz", {}, "no task 'zzz': there are "),
        ("sum3", {"colour": "red"}, "task sum3.*'colour'"),
        ("sum3", {"split": "valid"}, "split is 'valid': it must be one of train, val, test"),
        ("gsm8k", {"split": "valid"}, "split is 'valid': it must be one of train, val, test"),
        ("arithmetic", {"preset": "sum4"}, "preset is 'sum4': it must be one of sum3, 0-20"),
        (
            "sum3",
            {"demonstrations": "none"},
            "demonstrations is 'none': it must be one of direct, worked, mixed",
        ),
    ],
)
def test_what_does_not_fit_is_refused(name, settings, message):
    with pytest.raises(ValueError, match=message):
        get_task(name, **settings)


@pytest.mark.parametrize(
    "name, settings, message",
    [
        (
            "counting",
            {"rewards": "graded"},
            "rewards is 'graded': it must be one of binary, signed",
        ),
        (
            "sum3",
            {"rewards": "some"},
            "rewards is 'some': it must be one of binary, signed, graded",
        ),
        ("countdown", {"numbers": "5"}, "numbers is '5': it must be one of 3, 4, 3-4"),
        ("countdown", {"largest": "2"}, "largest is '2': it must be a number from 3 to 99"),
        ("countdown", {"largest": "many"}, "largest is 'many'"),
        ("countdown", {"format_weight": "1"}, "format_weight is '1': it must be a share below 1"),
        ("countdown", {"format_weight": "nan"}, "format_weight is 'nan'"),
        *[
            (
                name,
                {"demonstrations": "none"},
                "demonstrations is 'none': it must be one of direct, worked, mixed",
            )
            for name in ("counting", "comparison", "binary", "spelling", "countdown")
        ],
        *[
            (name, {"split": "valid"}, "split is 'valid': it must be one of train, val, test")
            for name in ("counting", "comparison", "binary", "spelling", "countdown")
        ],
    ],
)
def test_what_does_not_fit_the_other_tasks_is_refused(name, settings, message):
    with pytest.raises(ValueError, match=message):
        get_task(name, **settings)


def test_a_preset_is_a_task_name():
    assert (get_task("arithmetic", preset="0-20").rows == get_task("0-20").rows).all()


def test_parse_settings():
    assert parse_settings("") == parse_settings(" ; ") == {}
    assert parse_settings(" demonstrations=worked; instruction = Be brief: a=b ;") == {
        "demonstrations": "worked",
        "instruction": "Be brief: a=b",
    }
    with pytest.raises(ValueError, match="split.*is not one"):
        parse_settings("split=val")
    with pytest.raises(ValueError, match="'sum3 until 40', goes on to the end"):
        get_stages("0-20 until 20; sum3 until 40")
    with pytest.raises(ValueError, match="'worked' has no '='"):
        parse_settings("demonstrations=direct; worked")


# ---- mixtures and curricula ----------------------------------------------------------------------

SMALL = "binary=2,0-20=5,countdown=1"


def test_a_mixture_holds_its_weights_in_every_cycle_and_spreads_them():
    mixture = get_task(SMALL)
    weights = {"binary": 2, "0-20": 5, "countdown": 1}
    names = [mixture.problem(i).task for i in range(80)]
    for start in range(0, 73):
        # In every eight that follow each other, not only in whole cycles.
        assert Counter(names[start : start + 8]) == weights
    for n in range(80):
        for name, weight in weights.items():
            assert abs(names[:n].count(name) - n * weight / 8) <= 0.5  # never far ahead or behind
    multiple = get_task("binary=50,0-20=125,countdown=25")
    prompts = [mixture.problem(i).prompt for i in range(20)]
    assert [multiple.problem(i).prompt for i in range(20)] == prompts


def test_a_mixture_takes_each_tasks_problems_in_their_order():
    mixture = get_task(SMALL)
    for name in ("binary", "0-20", "countdown"):
        task = get_task(name)
        mine = [p.prompt for p in map(mixture.problem, range(len(mixture))) if p.task == name]
        assert mine == [task.problem(i % len(task)).prompt for i in range(len(mine))]


@pytest.mark.parametrize(
    "weights",
    [{"binary": 2, "0-20": 5, "countdown": 1}, {"binary": 3, "0-20": 1}, {"binary": 1, "0-20": 4}],
)
def test_training_on_a_mixture_visits_every_problem_and_no_held_out_problem_comes_twice(weights):
    text = ",".join(f"{name}={weight}" for name, weight in weights.items())
    visits = {}
    for split in SPLITS:
        mixture = get_task(text, split=split)
        problems = [mixture.problem(i) for i in range(len(mixture))]
        visits[split] = Counter((p.task, p.prompt[0]["content"]) for p in problems)

    # Training visits each problem of a task once, then each twice, and so on.
    for name in weights:
        counts = [n for (task, _), n in visits["train"].items() if task == name]
        assert len(counts) == len(get_task(name))
        assert max(counts) - min(counts) <= 1
    # It is not longer than that takes.
    rounds = {name: len(get_task(name)) / weight for name, weight in weights.items()}
    whole_rounds = -int(-max(rounds.values()) // 1)
    assert visits["train"].total() == sum(weights.values()) * whole_rounds

    for split in ("val", "test"):
        assert set(visits[split].values()) == {1}
        # Another cycle would repeat a problem of some task.
        unvisited = {}
        for name in weights:
            visited = sum(task == name for task, _ in visits[split])
            unvisited[name] = len(get_task(name, split=split)) - visited
        assert min(unvisited[name] - weights[name] for name in weights) < 0


def test_a_mixture_gives_each_problem_to_the_task_it_comes_from():
    mixture = get_task("counting=1,comparison=1,countdown=1,sum3=1")
    documents = {
        "counting": r"[a-f]: ",
        "comparison": r"\d+ and ",
        "countdown": r".* make ",
        "sum3": r"Count|\d+ \+ ",
    }
    for i in range(40):
        problem = mixture.problem(i)
        text = mixture.solution(problem)
        assert ("<answer>" in text) == (problem.task == "countdown")
        assert mixture.reward(problem, text).total == 1
        assert mixture.reward(problem, "#maybe").parts == {
            "format": problem.task != "countdown",
            "answered": 0,
            "correct": 0,
        }
        # The prompt is one of that task, or its reader raises.
        if problem.task == "sum3":
            compute(question(problem))
        else:
            read(problem.task, problem)
        assert re.match(documents[problem.task], mixture.document(i))


def test_settings_go_to_all_tasks_of_a_mixture_or_to_one():
    def silence(mixture):
        """What an empty completion earns, by task."""
        problems = [mixture.problem(i) for i in range(2)]
        return {p.task: mixture.reward(p, "").total for p in problems}

    both = get_task("counting=1,comparison=1", rewards="signed")
    assert silence(both) == {"counting": -1, "comparison": -1}
    settings = {"rewards": "binary", "comparison.rewards": "signed"}
    one = get_task("counting=1,comparison=1", **settings)
    assert silence(one) == {"counting": 0, "comparison": -1}
    settings = parse_settings("counting.demonstrations=worked; sum3.demonstrations=direct")
    mixture = get_task("counting=1,sum3=1", **settings)
    direct = {
        (p.task, mixture.solution(p).startswith("#")) for p in map(mixture.problem, range(40))
    }
    assert direct == {("counting", False), ("sum3", True)}


def test_a_users_own_task_in_a_mixture(tmp_path):
    (tmp_path / "own.py").write_text(OWN)
    own = f"{tmp_path}/own.py:Capitals"
    mixture = get_task(f"{own}=50,counting=150", split="train", **{f"{own}.answer": "Lyon"})
    problem = next(p for p in map(mixture.problem, range(4)) if p.task == own)
    assert mixture.reward(problem, "Lyon").total == 1 and mixture.reward(problem, "#3").total == 0
    assert [mixture.problem(i).task for i in range(4)].count(own) == 1
    # It has one problem, so there is one of each.
    assert len(get_task(f"{own}=1,counting=1", split="val")) == 2
    with pytest.raises(ValueError, match="Capitals has 1 problems, fewer than its weight 2"):
        get_task(f"{own}=2,counting=1", split="val")


def test_a_mixture_of_one_is_that_task():
    mixture = get_task("0-20=7")
    task = get_task("0-20")
    assert len(mixture) == len(task)
    for i in range(9):
        assert mixture.problem(i).prompt == task.problem(i).prompt


@pytest.mark.parametrize(
    "name, settings, message",
    [
        ("sum3=50,countng=50", {}, "no task 'countng': did you mean counting"),
        (
            "sum3=50,counting",
            {},
            "mixture .*: 'counting' must be a task and its weight, each task once",
        ),
        ("sum3,counting", {}, "'sum3' must be a task and its weight"),
        ("sum3=50,counting=0", {}, "'counting=0' must be"),
        ("sum3=50,counting=-1", {}, "'counting=-1' must be"),
        ("sum3=50,counting=1.5", {}, "'counting=1.5' must be"),
        ("sum3=50,counting=a", {}, "'counting=a' must be"),
        ("sum3=50,sum3=50", {}, "'sum3=50' must be"),
        ("sum3=50,", {}, "'' must be"),
        ("=50,sum3=50", {}, "'=50' must be"),
        ("sum3=0", {}, "'sum3=0' must be"),
        (
            "sum3=1,counting=1",
            {"binary.rewards": "signed"},
            "task setting 'binary.rewards': the mixture 'sum3=1,counting=1' has no task 'binary'",
        ),
        ("sum3=1,counting=1", {"counting.rewards": "graded"}, "rewards is 'graded'"),
        ("sum3=1,counting=1", {"precision": "2"}, "task counting: .*'precision'"),
    ],
)
def test_a_mixture_that_does_not_fit_is_refused(name, settings, message):
    with pytest.raises(ValueError, match=message):
        get_task(name, **settings)


def test_a_curriculum_gives_its_tasks_with_their_first_steps():
    stages = get_stages(
        " 0-20 until 20;binary=1,0-20=1   until 50 ; 2-digit ", "val", demonstrations="direct"
    )
    assert [first for first, _ in stages] == [0, 20, 50]
    for (_, task), name in zip(stages, ["0-20", "binary=1,0-20=1", "2-digit"]):
        same = get_task(name, split="val")
        assert len(task) == len(same) and task.problem(7).prompt == same.problem(7).prompt
        assert task.solution(task.problem(0)).startswith("#")
    assert [first for first, _ in get_stages("0-20")] == [0]


@pytest.mark.parametrize(
    "text, message",
    [
        (
            "0-20 until 20; 2-digit until 20; sum3",
            "curriculum .*: '2-digit until 20' must be a task and the step it ends at,"
            " later than the one before",
        ),
        ("0-20 until 30; 2-digit until 20; sum3", "'2-digit until 20' must be"),
        ("0-20 until 0; sum3", "'0-20 until 0' must be"),
        ("0-20; sum3", "'0-20' must be"),
        ("0-20 until 20 steps; sum3", "'0-20 until 20 steps' must be"),
        ("until 20; sum3", "'until 20' must be"),
        ("; sum3", "'' must be"),
        ("0-20 until 20;", "no task ''"),
        ("0-20 until 20; sums", "no task 'sums': did you mean sum3"),
        ("0-20 until 20; 2-digit until 40", "'2-digit until 40', goes on to the end"),
        ("0-2 until 20; sum3", "no task '0-2': did you mean 0-20"),
        ("sum3 until 20; 0-20=0", "'0-20=0' must be"),
    ],
)
def test_a_curriculum_that_does_not_fit_is_refused(text, message):
    with pytest.raises(ValueError, match=message):
        get_stages(text)


def test_countdown_does_not_begin_with_the_easy_problems():
    """The order must not follow how often a problem is hit.

    What many draws hit is found first, and evaluation takes the first n problems.
    """
    task = get_task("countdown")
    problems = [task.problem(i) for i in range(len(task))]
    # Random joining hits the plain sum most often.
    easy = [int(p.answer) == sum(p.meta["numbers"]) for p in problems]
    half = len(easy) // 2
    assert abs(sum(easy[:half]) - sum(easy[half:])) < 40


# ---- rows that are no problems -------------------------------------------------------------------

QUESTION = {"question": "q?"}
ARC_CHOICES = {"text": ["x", "y"], "label": ["A", "B"]}


@pytest.mark.parametrize(
    "name, row, message",
    [
        ("gsm8k", {**QUESTION, "answer": "It is 18."}, "no number after ####: end it with one"),
        ("gsm8k", {**QUESTION, "answer": "#### many"}, "no number after ####"),
        ("gsm8k", {**QUESTION, "answer": None}, "'answer' is null: it must be a text"),
        ("gsm8k", QUESTION, "'answer' is missing"),
        ("gsm8k", {"answer": "#### 1"}, "'question' is missing"),
        ("gsm8k", {"question": " ", "answer": "#### 1"}, "'question' is \" \""),
        ("mmlu", {**QUESTION, "choices": ["x", "y"], "answer": -1}, "answer is -1.*0 to 1.*A, B"),
        ("mmlu", {**QUESTION, "choices": ["x", "y"], "answer": 2}, "answer is 2: it must be"),
        ("mmlu", {**QUESTION, "choices": ["x", "y"], "answer": True}, "answer is True"),
        ("mmlu", {**QUESTION, "choices": ["x", "y"], "answer": "C"}, "answer is 'C'"),
        ("mmlu", {**QUESTION, "choices": ["x", "x"], "answer": "x"}, "answer is 'x'"),
        ("mmlu", {**QUESTION, "choices": ["x", "y"]}, "answer is None"),
        ("mmlu", {**QUESTION, "choices": None, "answer": 0}, "'choices' must be two or more"),
        ("mmlu", {**QUESTION, "choices": ["x"], "answer": 0}, "'choices' must be two or more"),
        ("mmlu", {**QUESTION, "choices": ["x"] * 11, "answer": 0}, "has 11 texts: at most 10"),
        ("arc_easy", {**QUESTION, "choices": ARC_CHOICES, "answerKey": "D"}, "answer is 'D'"),
        ("arc_easy", {"choices": ARC_CHOICES, "answerKey": "A"}, "'question' is missing"),
        (
            "arc_easy",
            {**QUESTION, "choices": {**ARC_CHOICES, "label": ["A", "B", "C"]}, "answerKey": "A"},
            "2 texts and 3 labels",
        ),
        ("humaneval", {"prompt": "def f():", "test": "x"}, "'canonical_solution' is missing"),
    ],
)
def test_a_row_that_is_no_problem_is_named(tmp_path, monkeypatch, name, row, message):
    split = {"arc_easy": "validation", "mmlu": "validation"}.get(name, "test")
    (tmp_path / name).mkdir()
    path = tmp_path / name / f"{split}.jsonl"
    path.write_text(json.dumps(row) + "\n")
    monkeypatch.setenv("NANORL_DATA", str(tmp_path))
    settings = {"allow_code": "true"} if name == "humaneval" else {}
    with pytest.raises(ValueError, match=rf"^{re.escape(str(path))}, line 1: .*{message}") as error:
        get_task(name, "val" if split == "validation" else "test", **settings)
    assert "\n" not in str(error.value)


def test_gsm8k_needs_more_rows_than_val_takes(tmp_path, monkeypatch):
    write_gsm8k(tmp_path, 473)
    monkeypatch.setenv("NANORL_DATA", str(tmp_path))
    path = tmp_path / "gsm8k" / "train.jsonl"
    for split in ("train", "val"):
        with pytest.raises(ValueError, match=rf"^{re.escape(str(path))} has 473 rows.*needs more"):
            get_task("gsm8k", split)
    # The remedy.
    path.rename(path.with_name("test.jsonl"))
    assert len(get_task("gsm8k", "test")) == 473


@pytest.mark.parametrize("answer", [1, "B", "run"])
def test_mmlu_names_the_right_choice_by_number_label_or_text(tmp_path, monkeypatch, answer):
    (tmp_path / "mmlu").mkdir()
    row = {**QUESTION, "choices": ["A dog", "run"], "answer": answer}
    (tmp_path / "mmlu" / "test.jsonl").write_text(json.dumps(row))
    monkeypatch.setenv("NANORL_DATA", str(tmp_path))
    assert get_task("mmlu", "test").problem(0).answer == "B"
