"""Tasks: problems, splits, demonstrations, rewards, data files, and a user's own task."""
import json
import os
import re
import subprocess
import sys
from functools import partial

import numpy as np
import pytest

from conftest import ROOT
from nanorl.tasks import arithmetic, get_task, parse_settings
from nanorl.tasks.files import load_rows

SIZES = {"sum3": 810_000, "0-20": 1_323, "2-digit": 16_200, "chain4": 30_000, "3x2": 81_000}
STYLES = ("direct", "worked", "mixed")


@pytest.fixture(autouse=True, scope="module")
def fewer_chains():
    """A million chains take seconds to draw; fewer are made by the same function."""
    whole = arithmetic.PRESETS["chain4"]
    arithmetic.PRESETS["chain4"] = (partial(arithmetic._chains, SIZES["chain4"]), whole[1])
    arithmetic._table.cache_clear()
    yield
    arithmetic.PRESETS["chain4"] = whole
    arithmetic._table.cache_clear()


@pytest.fixture(params=SIZES)
def preset(request):
    return request.param


def question(problem):
    return problem.prompt[-1]["content"].removeprefix("Calculate: ").removesuffix(" = ")


def compute(text):
    """An independent reading of '12 + 3 - 4' or '12×3', left to right."""
    value, *rest = re.findall(r"^\s*-?\d+|[-+*×]|\d+", text)
    value = int(value)
    for sign, number in zip(rest[::2], rest[1::2], strict=True):
        value = {"+": value + int(number), "-": value - int(number), "*": value * int(number), "×": value * int(number)}[sign]
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


# ---- arithmetic: what is written and how it is judged --------------------------------------------------------

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
            results = check_steps(worked)
            # The steps lead to the answer: the last one is it, or the columns' last digits spell it.
            spelled = int(str(results[-1]) + "".join(str(r)[-1] for r in reversed(results[:-1])))
            assert int(answer) in (results[-1], spelled, -spelled)


def test_half_of_the_mixed_demonstrations_are_direct():
    for preset in ("sum3", "2-digit", "chain4", "3x2"):
        task = get_task(preset, demonstrations="mixed")
        direct = sum(task.solution(task.problem(i)).startswith("#") for i in range(2000))
        assert abs(direct / 2000 - 0.5) < 0.03


def test_either_summand_may_be_worked_first():
    task = get_task("sum3", demonstrations="worked")
    first = [(task.solution(p)[0], p.meta["numbers"]) for p in map(task.problem, range(400))]
    swapped = [digit == str(b)[-1] for digit, (a, b) in first if a % 10 != b % 10]
    assert 0.4 < sum(swapped) / len(swapped) < 0.6


def test_wrong_answers_and_garbage_earn_nothing(preset):
    task = get_task(preset)
    for i in range(20):
        problem = task.problem(i)
        right = int(problem.answer)
        for text, answered in [(f"#{right + 1}", 1), (f"#{right}1", 1), (f"#{-right or 1}", 1), (f"#{right} #{right + 1}", 1), (f"{right}", 0),
                               (f"# is {right}", 0), ("#", 0), ("", 0), ("garbage", 0), ("#" * 500, 0), ("\x00\ufffd🙂", 0), ("#" + "9" * 5000, 0)]:
            reward = task.reward(problem, text)
            assert (reward.total, reward.parts) == (0, {"correct": 0, "answered": answered}), text
        assert task.reward(problem, f"{right + 1} no, #{right}.").total == 1


def test_instruction_and_precision():
    plain, told = get_task("0-20"), get_task("0-20", instruction="Answer only.")
    assert told.problem(3).prompt[0]["content"] == "Answer only. " + plain.problem(3).prompt[0]["content"]
    task = get_task("0-20", precision="1")  # right within half a unit of the first decimal place
    problem = next(p for p in map(task.problem, range(100)) if int(p.answer) > 0)
    near, far = f"#{problem.answer}.05", f"#{problem.answer}.051"
    assert (task.reward(problem, near).total, task.reward(problem, far).total) == (1, 0)
    assert plain.reward(problem, near).total == 0
    for bad in ("x", "-1", "1.5"):
        with pytest.raises(ValueError, match="precision is '.*': it must be a number of decimal places"):
            get_task("0-20", precision=bad)


# ---- arithmetic: splits ---------------------------------------------------------------------------------------

def codes(rows, sort_operands):
    """Rows of integers -> one integer each; with sort_operands a + b and b + a (and products) get the same."""
    rows = rows.copy()
    if sort_operands and rows.shape[1] == 3:
        commutes = rows[:, 0] != arithmetic.SIGNS.index("-")
        rows[commutes, 1:] = np.sort(rows[commutes, 1:], axis=1)
    return (rows * (int(rows.max()) + 1) ** np.arange(rows.shape[1])).sum(1)


def test_splits_are_disjoint_by_content_and_cover_everything(preset):
    split = {name: get_task(preset, split=name) for name in ("train", "val", "test")}
    everything = np.concatenate([codes(task.rows, False) for task in split.values()])
    assert sum(map(len, split.values())) == len(everything) == len(np.unique(everything)) == SIZES[preset]
    content = {name: np.unique(codes(task.rows, True)) for name, task in split.items()}
    for a, b in [("train", "val"), ("train", "test"), ("val", "test")]:
        assert len(np.intersect1d(content[a], content[b])) == 0
    assert abs(len(split["val"]) / SIZES[preset] - 0.2) < 0.02
    assert abs(len(split["test"]) / SIZES[preset] - 0.1) < 0.02


def test_problems_come_mixed_not_in_the_order_of_the_table():
    task = get_task("sum3")
    first = [task.problem(i).meta["numbers"][0] for i in range(100)]
    assert min(first) < 200 and max(first) > 900


def test_problems_and_demonstrations_are_the_same_in_a_fresh_process():
    code = """if True:
        import json
        from nanorl.tasks import get_task
        tasks = [get_task(preset, split=split) for preset in ("0-20", "2-digit", "3x2") for split in ("train", "val")]
        print(json.dumps([[t.problem(i).prompt, t.problem(i).answer, t.solution(t.problem(i)), t.document(i)] for t in tasks for i in range(50)]))"""
    other = {**os.environ, "PYTHONHASHSEED": "12345", "PYTHONPATH": ROOT}
    there = subprocess.run([sys.executable, "-c", code], env=other, capture_output=True, text=True, check=True).stdout
    tasks = [get_task(preset, split=split) for preset in ("0-20", "2-digit", "3x2") for split in ("train", "val")]
    here = [[t.problem(i).prompt, t.problem(i).answer, t.solution(t.problem(i)), t.document(i)] for t in tasks for i in range(50)]
    assert json.loads(there) == here


@pytest.mark.parametrize("preset", ["0-20", "2-digit", "chain4"])
def test_documents_show_only_problems_of_the_train_split(preset):
    task = get_task(preset)
    known = {question(task.problem(i)): task.problem(i).answer for i in range(len(task))}
    counting, shown = 0, set()
    for i in range(300):
        text = task.document(i)
        if text.startswith("Count: "):
            numbers = [int(n) for n in text.removeprefix("Count: ").split(" ")]
            assert len(set(np.diff(numbers))) == 1
            counting += 1
            continue
        for line in text.split("\n"):
            problem, said, rest = re.fullmatch(r"([^=:]+)( = |: )(.+)", line).groups()
            shown.add(problem)
            assert problem in known
            assert rest == known[problem] if said == " = " else check_steps(rest)
    assert 30 < counting < 100 and len(shown) > 700


# ---- gsm8k and data files ---------------------------------------------------------------------------------------

def write_gsm8k(root, n=600):
    os.makedirs(root / "gsm8k")
    with open(root / "gsm8k" / "train.jsonl", "w", encoding="utf-8") as f:
        for i in range(n):
            f.write(json.dumps({"question": f"Ann has {i} pens and buys {i * 1000}. How many?",
                                "answer": f"She has {i}+{i * 1000}=<<{i}+{i * 1000}={i * 1001}>>{i * 1001} pens.\n#### {i * 1001:,}"}) + "\n\n")


def check_gsm8k(sizes):
    train, val = get_task("gsm8k"), get_task("gsm8k", split="val")
    questions = [{task.problem(i).prompt[0]["content"] for i in range(len(task))} for task in (train, val)]
    assert [len(q) for q in questions] == [len(train), len(val)] == sizes and not questions[0] & questions[1]
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
    assert train.document(5).startswith("Ann has") and train.document(5).endswith(train.solution(problem))
    assert train.reward(problem, f"{n * 1001}").parts == {"correct": 0, "answered": 0}  # no marker
    assert train.reward(problem, f"#### {n * 1001 + 1}").parts == {"correct": 0, "answered": 1}


def test_gsm8k_splits_follow_the_content_not_the_order_of_the_file(tmp_path, monkeypatch):
    write_gsm8k(tmp_path)
    monkeypatch.setenv("NANORL_DATA", str(tmp_path))
    before = {r["question"] for r in get_task("gsm8k", split="val").rows}
    path = tmp_path / "gsm8k" / "train.jsonl"
    path.write_text("\n".join(reversed(path.read_text().split("\n"))))
    assert {r["question"] for r in get_task("gsm8k", split="val").rows} == before


def test_gsm8k_real(real_data):
    check_gsm8k([7000, 473])


def test_a_missing_data_set_names_both_ways_to_get_it(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)  # the hub is out of reach
    monkeypatch.setenv("NANORL_DATA", str(tmp_path))
    with pytest.raises(ValueError) as error:
        get_task("gsm8k", split="test")
    assert str(tmp_path / "gsm8k" / "test.jsonl") in str(error.value) and "openai/gsm8k" in str(error.value)
    monkeypatch.delenv("NANORL_DATA")
    with pytest.raises(ValueError, match=r"\$NANORL_DATA.gsm8k.train\.jsonl.*`datasets` can fetch openai/gsm8k"):
        get_task("gsm8k")


def test_a_broken_row_is_named_by_file_and_line(tmp_path, monkeypatch):
    write_gsm8k(tmp_path, 3)
    path = tmp_path / "gsm8k" / "train.jsonl"
    with open(path, "a") as f:
        f.write('{"question": "cut o')
    monkeypatch.setenv("NANORL_DATA", str(tmp_path))
    with pytest.raises(ValueError, match=rf"{re.escape(str(path))}, line 7: not JSON"):  # blank lines count
        get_task("gsm8k")


def test_csv_and_parquet_give_the_same_rows(tmp_path, monkeypatch):
    parquet, table = pytest.importorskip("pyarrow.parquet"), pytest.importorskip("pyarrow").table
    rows = [{"question": 'a, "b"\nc', "answer": "#### 1"}, {"question": "µ", "answer": "#### 2"}]
    for name in ("c", "p"):
        os.makedirs(tmp_path / name)
    (tmp_path / "c" / "train.csv").write_text('question,answer\n"a, ""b""\nc",#### 1\nµ,#### 2\n', encoding="utf-8")
    parquet.write_table(table({key: [r[key] for r in rows] for key in rows[0]}), tmp_path / "p" / "train.parquet")
    monkeypatch.setenv("NANORL_DATA", str(tmp_path))
    assert load_rows("c", "train", "none") == load_rows("p", "train", "none") == rows


# ---- getting a task ----------------------------------------------------------------------------------------------

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
"""


def test_a_users_own_task(tmp_path):
    path = tmp_path / "json.py"  # a name that the standard library has too
    path.write_text(OWN)
    task = get_task(f"{path}:Capitals", split="val", answer="Lyon")
    assert task.split == "val" and len(task) == 1
    assert task.reward(task.problem(0), "Lyon").total == 1 and task.reward(task.problem(0), "Paris").total == 0
    assert sys.modules["json"] is json
    (tmp_path / "notes.txt").write_text(OWN)
    for name, message in [(f"{path}:Mute", "has no reward"), (f"{path}:Capital", "has no class 'Capital'"),
                          (f"{tmp_path}/none.py:A", "none.py' does not exist"), (f"{tmp_path}:A", "is not a .py file"),
                          (f"{tmp_path}/notes.txt:Capitals", "is not a .py file")]:
        with pytest.raises(ValueError, match=message):
            get_task(name)
    with pytest.raises(ValueError, match="Capitals.*'colour'"):
        get_task(f"{path}:Capitals", colour="red")


@pytest.mark.parametrize("name, settings, message", [
    ("sums", {}, "no task 'sums': there are .*arithmetic.*gsm8k.*path.py:Class"),
    ("sum3", {"colour": "red"}, "task sum3.*'colour'"),
    ("sum3", {"split": "valid"}, "split is 'valid': it must be one of train, val, test"),
    ("gsm8k", {"split": "valid"}, "split is 'valid': it must be one of train, val, test"),
    ("arithmetic", {"preset": "sum4"}, "preset is 'sum4': it must be one of sum3, 0-20"),
    ("sum3", {"demonstrations": "none"}, "demonstrations is 'none': it must be direct, worked or mixed"),
])
def test_what_does_not_fit_is_refused(name, settings, message):
    with pytest.raises(ValueError, match=message):
        get_task(name, **settings)


def test_a_preset_is_a_task_name():
    assert (get_task("arithmetic", preset="0-20").rows == get_task("0-20").rows).all()


def test_parse_settings():
    assert parse_settings("") == parse_settings(" ; ") == {}
    assert parse_settings(" demonstrations=worked; instruction = Be brief: a=b ;") == {
        "demonstrations": "worked", "instruction": "Be brief: a=b"}
    with pytest.raises(ValueError, match="'worked' has no '='"):
        parse_settings("demonstrations=direct; worked")
