"""What earns a reward.

Attacks on each task's reader of answers with the verdict each must get, and what a verdict pays.
"""

import ast
import random
import re
import time
from collections import Counter
from fractions import Fraction

import pytest

from nanorl.tasks import Problem, get_task
from nanorl.tasks.answers import word_after
from nanorl.tasks.countdown import LONGEST, evaluate
from test_tasks import fewer_problems  # noqa: F401, small tables here too

# A verdict: format, answered, correct.
NO_FORMAT = (0, 0, 0)
NO_ANSWER = (1, 0, 0)
WRONG = (1, 1, 0)
RIGHT = (1, 1, 1)


def check(task, problem, text, verdict):
    reward = task.reward(problem, text)
    assert reward.parts == dict(zip(("format", "answered", "correct"), verdict)), text[:200]
    assert all(type(value) is float for value in [reward.total, *reward.parts.values()])
    return reward.total


# ---- a number after the marker: arithmetic, counting, spelling -----------------------------------

NUMBERS = {  # the right answer is 12
    RIGHT: [
        "#12",
        "7+5=12#12",
        "# 12",
        "#\n12\n",
        "#12.",
        "#12 apples",
        "#12.0",
        "#012",
        "#+12",
        "#$12",
        "#24/2",
        "#" + "0" * 98 + "12",
        "#11 no, #12",
        # What may stand around it.
        "#**12**",
        "#`12`.",
        "#$\\boxed{12}$",
        "#\\(12\\)",
        "#£12",
        "#12€",
        # The first number after the last marker counts: naming many earns no more than one guess.
        "#12 or 13",
    ],
    WRONG: [
        "#13 or 12",
        "#11 12 13",
        "#12 #13",
        "#1 2",
        "#1,2",
        "#11,12",
        "#13",
        "#-12",
        "#\u221212",
        "#0",
        "#1",
        "#112",
        "#12.5",
        "#12.01",
        "#12/2",
        "#1212",
        "#12,000",
        "#7+5",
        "#6*2",
        "#3**9**9",
        "#0xC",
        "#1e1",
        "#1" + "0" * 99,
    ],
    NO_ANSWER: [
        "#12 #",
        "#",
        "#" * 500,
        "# is 12",
        "#=12",
        "#(12)",
        "#twelve",
        "#XII",
        "#\u246b",
        # Other digits than 0 to 9.
        "#\uff11\uff12",
        "#\u0661\u0662",
        "#12\u0663",
        "#12\u00bd",
        "#\\boxed{}12",
        "#\x0012",
        "#--12",
        "#12/0",
        "#nan",
        "#inf",
        "#'12'",
        "#<12>",
        "#__import__('os')",
        "#1" + "0" * 100,
        "#" + "0" * 99 + "12",
        "#" + "9" * 5000,
    ],
    NO_FORMAT: ["", "12", "= 12", "\uff0312", "\x00\ufffd🙂"],
}


@pytest.mark.parametrize("name", ["0-20", "counting", "spelling"])
def test_a_number_after_the_marker(name):
    task = get_task(name)
    problem = Problem([], "12", {"numbers": [7, 5], "signs": ["+"]})
    for verdict, texts in NUMBERS.items():
        for text in texts:
            assert check(task, problem, text, verdict) == (verdict is RIGHT)


@pytest.mark.parametrize("preset", ["sum3", "0-20", "2-digit", "chain4", "3x2"])
def test_arithmetic_by_its_own_problems(preset):
    task = get_task(preset)
    for i in range(20):
        problem = task.problem(i)
        right = int(problem.answer)
        for text, verdict in [
            (f"#{right}", RIGHT),
            (f"{right + 1} no, #{right}.", RIGHT),
            (f"#{right + 1}", WRONG),
            (f"#{right}1", WRONG),
            (f"#{-right or 1}", WRONG),
            (f"#{right} #{right + 1}", WRONG),
            (f"{right}", NO_FORMAT),
        ]:
            assert check(task, problem, text, verdict) == (verdict is RIGHT)


# ---- a word after the marker: comparison, binary -------------------------------------------------

WORDS = {  # the right answer is yes
    RIGHT: ["#yes", "4=4 8>3#yes", "#Yes.", "#YES", "# yes\n", "#\tyes .\n", "#no #yes"],
    WRONG: ["#no", "#No.", "#yes #no", "yes#no"],
    # Both, or more than the word, is no answer: else a hedge would be a free guess.
    NO_ANSWER: [
        "#yes or no",
        "#yes no",
        "#yes/no",
        "#yes, no",
        "#yesno",
        "#yes\nno",
        "#not yes",
        "#not no",
        "#yes yes",
        "#yes!",
        "#yes..",
        "#'yes'",
        "#y",
        "#yep",
        "#true",
        "#1",
        "#",
        "# .",
        "#yes #",
        "#ye\u0455",
        "#\uff59\uff45\uff53",
        "#ye\u017f",
        "#yes\x00",
        "#ye\u200bs",
        "#y e s",
    ],
    NO_FORMAT: ["yes", "", "\uff03yes"],
}
BITS = {  # the right answer is 101
    RIGHT: [
        "#101",
        "5:1 2:0 1:1#101",
        "# 101\n",
        "#101.",
        "#00101",
        "#110 #101",
        "#" + "0" * 5000 + "101",
    ],
    WRONG: ["#110", "#0", "#1010", "#1101", "#101 #110", "#" + "1" * 5000],
    NO_ANSWER: [
        "#0b101",
        "#1 0 1",
        "#101.0",
        "#2",
        "#5",
        "#101 or 110",
        "#102",
        "#\uff11\uff10\uff11",
        "#\u0661\u0660\u0661",
        "#1_0_1",
        "#+101",
        "#-101",
        "#1O1",
        "#101b",
        "#101\x00",
        "#101\n110",
        "#",
        "#.",
        "#101 #",
    ],
    NO_FORMAT: ["101", "", "\uff03101"],
}


@pytest.mark.parametrize(
    "name, answer, table", [("comparison", "yes", WORDS), ("binary", "101", BITS)]
)
def test_a_word_after_the_marker(name, answer, table):
    task = get_task(name)
    for verdict, texts in table.items():
        for text in texts:
            assert check(task, Problem([], answer), text, verdict) == (verdict is RIGHT)


def test_no_is_judged_as_yes_is_and_zero_is_a_number():
    for text, verdict in [
        ("#no", RIGHT),
        ("#No.", RIGHT),
        ("#yes", WRONG),
        ("#no yes", NO_ANSWER),
        ("#not", NO_ANSWER),
        ("#", NO_ANSWER),
    ]:
        check(get_task("comparison"), Problem([], "no"), text, verdict)
    for text, verdict in [
        ("#0", RIGHT),
        ("#000", RIGHT),
        ("#1", WRONG),
        ("#", NO_ANSWER),
        ("#o", NO_ANSWER),
    ]:
        check(get_task("binary"), Problem([], "0"), text, verdict)


@pytest.mark.parametrize(
    "text, word",
    [
        ("#Yes.", "yes"),
        ("a # b # C d . ", "c d"),
        ("#yes or no", "yes or no"),
        ("#..", "."),
        ("####x", "x"),
        ("#", None),
        ("# . ", None),
        ("yes", None),
        ("", None),
    ],
)
def test_the_word_after_the_marker(text, word):
    assert word_after(text, "#") == word


# ---- countdown: tags -----------------------------------------------------------------------------

PROBLEM = Problem([], "33", {"numbers": [3, 7, 12]})
T = "<think></think>"
A = "<answer>3*7+12</answer>"  # right
B = "<answer>3+7+12</answer>"  # wrong

TAGS = [  # text, format, verdict on the answer
    (T + A, 1, RIGHT),
    ("<think>3+7+12=22 no</think>" + A, 1, RIGHT),
    ("\n<think>\n\n</think>\n\t<answer>\n3*7+12\n</answer>\n", 1, RIGHT),
    ("<think>\x00🙂<b></think>" + A, 1, RIGHT),
    (T + B, 1, WRONG),
    (T + "<answer></answer>", 1, NO_ANSWER),
    (T + "<answer>33 </answer>", 1, WRONG),
    # The answer counts without the format, the format without the answer.
    (A, 0, RIGHT),
    (T + A + " 33", 0, RIGHT),
    ("so " + T + A, 0, RIGHT),
    (T + "so" + A, 0, RIGHT),
    (A + T, 0, RIGHT),
    (T + A + "\x00", 0, RIGHT),
    ("<think>" + A + "</think>", 0, RIGHT),
    ("<think>" + T + A, 0, RIGHT),
    (T + T + A, 0, RIGHT),
    ("</think><think>" + A, 0, RIGHT),
    ("<think>" + A, 0, RIGHT),
    # Of several answers the last.
    (T + B + A, 0, RIGHT),
    (T + A + B, 0, WRONG),
    (T + A * 50 + B, 0, WRONG),
    (T + "<answer>" + A + "</answer>", 0, RIGHT),
    (T + "<answer>3*7+12<answer></answer>", 0, NO_ANSWER),
    (T + "<answer>" + B + A + "</answer>", 0, RIGHT),
    (T + A + "<answer></answer>", 0, NO_ANSWER),
    # An answer outside its tags, or in tags that are open, reordered or misspelled, is none.
    (T + "<answer>3*7+12", 0, NO_ANSWER),
    (T + A + "<answer>", 0, NO_ANSWER),
    (T + A[:-1], 0, NO_ANSWER),
    (T + "3*7+12</answer>", 0, NO_ANSWER),
    (T + "</answer>3*7+12<answer>", 0, NO_ANSWER),
    (T + "3*7+12", 0, NO_ANSWER),
    ("3*7+12", 0, NO_ANSWER),
    (T + "<answer></answer>3*7+12", 0, NO_ANSWER),
    ("<think>3*7+12</think>", 0, NO_ANSWER),
    ((T + A).upper(), 0, NO_ANSWER),
    (T + "< answer >3*7+12</ answer >", 0, NO_ANSWER),
    ("#33", 0, NO_ANSWER),
    (T, 0, NO_ANSWER),
    ("", 0, NO_ANSWER),
    ("<answer>", 0, NO_ANSWER),
    ("</answer>", 0, NO_ANSWER),
    ("<answer>" * 99, 0, NO_ANSWER),
]


def test_countdown_tags():
    for weight in ("0.1", "0", ".5"):
        task = get_task("countdown", format_weight=weight)
        for text, well_formed, verdict in TAGS:
            total = check(task, PROBLEM, text, (well_formed, *verdict[1:]))
            for_format = float(weight) * well_formed
            for_answer = (1 - float(weight)) * (verdict is RIGHT)
            assert total == pytest.approx(for_format + for_answer)
        assert task.reward(PROBLEM, T + A).total == 1


# ---- countdown: the answer -----------------------------------------------------------------------

ANSWERS = {  # of 3, 7, 12 for 33
    RIGHT: [
        "3*7+12",
        "12+7*3",
        "(3*7)+12",
        "(((3)*((7))+12))",
        "(" * 46 + "3*7+12" + ")" * 46,
        "7*3 + 12",
        " 3 *\t7\n+ 12 ",
        "3×7+12",
        "03*7+0012",
        "3*7+12=33",
        "3*7+12 = 33 ",
    ],
    WRONG: [
        "3*7+12+3-3",
        "3*7+12*3/3",
        "3*7",
        "12",
        "0",
        "33",
        "3*11",
        "33*1",
        "37-12+8",
        "3*7+12+0",
        "3*7+12*1",
        "3+7+12",
        "3*(7+12)",
        "33=33",
        "33=3*7+12",
        "3*7+12=34",
        "3+7+12=33",
        "3*7+12=",
        "3*7+12=33.0",
        "3*7+12=033",
        "3*7+12=+33",
        "3*7+12=32+1",
        "3*7+12=\uff13\uff13",
        "9" * 100,
        "1" * 50 + "*" + "1" * 49,
    ],
    NO_ANSWER: [
        "",
        " ",
        "=33",
        "3*7+12=33=33",
        "3*7+12==33",
        "3*7=21+12=33",
        "9**9**9",
        "2^5",
        "3//7",
        "3%7",
        "3x7+12",
        "3·7+12",
        "__import__('os')",
        "lambda: 33",
        "exec('1')",
        "True*33",
        "0x21",
        "3.0*7+12",
        "3e0*7+12",
        "3_0+3",
        "-3*-7+12",
        "-(3*7+12)",
        "+3*7+12",
        "12--7*3",
        "3/0",
        "3*7+12/(7-7)",
        "12/(3*7-21)",
        "(" * 10_000,
        "(" * 10_000 + "3*7+12" + ")" * 10_000,
        "(3*7+12",
        "3*7+12)",
        ")3*7+12(",
        "()",
        "3*7()+12",
        "(3)(7)+12",
        "3(7)+12",
        "3 7 12",
        "3*7+1 2",
        "3*7+",
        "*3*7+12",
        "+",
        "9" * 101,
        "9" * 10_000,
        "3*7+12" + " " * 100,
        "\u0663*7+12",
        "\uff13*7+12",
        "3*7+12\x00",
        "3*7+12\u200b",
        "3*7+12.",
        "3*7+12;",
        "`3*7+12`",
        "the answer is 3*7+12",
        "3*7+12 or 3+7+12",
        "3*7+12, 7*3+12",
    ],
}


def test_countdown_answers():
    task = get_task("countdown")
    for verdict, answers in ANSWERS.items():
        for answer in answers:
            total = check(task, PROBLEM, f"{T}<answer>{answer}</answer>", verdict)
            assert total == pytest.approx(0.1 + 0.9 * (verdict is RIGHT)), answer[:200]


@pytest.mark.parametrize(
    "numbers, target, answer, verdict",
    [
        ([1, 49, 49], 1, "1/49*49", RIGHT),  # in floats 0.9999999999999999
        ([1, 49, 50], 1, "1/50*49", WRONG),
        ([3, 3, 7, 7], 24, "(3/7+3)*7", RIGHT),
        ([3, 3, 7, 7], 24, "(3+3÷7)×7", RIGHT),
        ([3, 3, 7, 7], 23, "(3/7+3)*7", WRONG),
        ([3, 3, 7], 24, "(3+3/7)*7", WRONG),
        ([8, 6, 2], 5, "8−6÷2", RIGHT),
        ([8, 6, 2], 5, "8–6/2", RIGHT),
        ([8, 6, 2], 4, "8-6+2", RIGHT),
        ([8, 6, 2], 0, "8-(6+2)", RIGHT),
        ([8, 2, 2], 2, "8/2/2", RIGHT),
        ([8, 2, 2], 8, "8/(2/2)", RIGHT),
        ([1, 2, 5], 17, "12+5", WRONG),
        ([1, 2, 5], 17, "1 2+5", NO_ANSWER),  # digits put side by side
        ([2, 2, 3], 7, "2*2+3", RIGHT),
        ([2, 2, 3], 5, "2+3", WRONG),
        ([2, 3], 7, "2*2+3", WRONG),  # each as often as it is given
        ([1, 1, 1], 1, "1*1*1", RIGHT),
        ([1, 1, 1], 1, "1", WRONG),
        ([3, 7, 12], 33, "12+3*7", RIGHT),
    ],
)
def test_countdown_uses_each_number_as_often_as_given_and_computes_exactly(
    numbers, target, answer, verdict
):
    task = get_task("countdown")
    problem = Problem([], str(target), {"numbers": numbers})
    check(task, problem, f"{T}<answer>{answer}</answer>", verdict)


def by_python(text):
    """What `evaluate` must give, by Python's own parser: (value, numbers used).

    None where the text has anything but + - * / and brackets over whole numbers.
    """
    text = re.sub(r"\s", " ", text.translate(str.maketrans("×÷−–", "*/--")))
    if len(text) > LONGEST or set(text) - set("0123456789+-*/() "):
        return None
    used = []

    def value(node):
        if isinstance(node, ast.Constant):
            used.append(node.value)
            return Fraction(node.value)
        # AttributeError for any other node, such as a sign before a number.
        a = value(node.left)
        b = value(node.right)
        operations = {
            ast.Add: a.__add__,
            ast.Sub: a.__sub__,
            ast.Mult: a.__mul__,
            ast.Div: a.__truediv__,
        }
        return operations[type(node.op)](b)

    # Python refuses 07; the grammar does not.
    text = re.sub(r"\b0+(?=\d)", "", text).strip()
    try:
        tree = ast.parse(text, mode="eval")
        return value(tree.body), used
    except (SyntaxError, AttributeError, KeyError, ZeroDivisionError):
        return None


def random_expression(rng, depth):
    if depth == 0 or rng.random() < 0.2:
        before = rng.choice(["", " ", "0"])
        number = rng.choice([0, 1, 2, 3, 7, 12, 100])
        after = rng.choice(["", "", "\n"])
        return f"{before}{number}{after}"
    a = random_expression(rng, depth - 1)
    b = random_expression(rng, depth - 1)
    form = rng.choice(["{}{}{}", "({}{}{})", "{} {} {}", "(({}{}{}))"])
    return form.format(a, rng.choice("++--**//×÷−–"), b)


def test_the_grammar_agrees_with_pythons_own_parser():
    rng = random.Random(0)
    kinds = Counter()
    for _ in range(4000):
        text = random_expression(rng, rng.randrange(5))
        # Break some of them at random.
        for _ in range(rng.choice([0, 0, 1, 2])):
            at = rng.randrange(len(text) + 1)
            inserted = rng.choice(["", "", *"()+-*/ 07.=x"])
            text = text[:at] + inserted + text[at + rng.randrange(3) :]
        expected = by_python(text)
        assert evaluate(text) == expected, text
        if expected is None:
            kinds["none"] += 1
        elif expected[0].denominator > 1:
            kinds["fraction"] += 1
        else:
            kinds["whole"] += 1
    assert min(kinds.values()) > 300 and len(kinds) == 3


# ---- any text ------------------------------------------------------------------------------------

TASKS = {
    "0-20": "12",
    "counting": "12",
    "spelling": "12",
    "comparison": "yes",
    "binary": "101",
    "countdown": "33",
}


def a_problem(name):
    numbers = [3, 7, 12] if name == "countdown" else [7, 5]
    return Problem([], TASKS[name], {"numbers": numbers, "signs": ["+"]})


def looks_right(name, text):
    """A coarse second opinion on a text that was paid for."""
    if name == "countdown":
        answer = re.findall(r"(?s)<answer>((?:(?!<answer>).)*?)</answer>", text)[-1].split("=")[0]
        result = by_python(answer)
        return result is not None and result[0] == 33 and sorted(result[1]) == [3, 7, 12]
    # A star is bold type around the answer.
    tail = text.split("#")[-1].strip(" \n*")
    if name == "comparison":
        return tail.rstrip(". \n*").upper() == "YES"
    if name == "binary":
        return set(tail) <= set("01. \n*") and int(tail.rstrip(". \n*"), 2) == 5
    number, under = re.match(r"[\s+]*(\d+(?:\.\d+)?)(?:/(\d+))?", tail).groups()
    return Fraction(number) / int(under or 1) == 12


def test_no_text_makes_a_reward_raise_or_pays_for_what_is_not_right():
    rng = random.Random(0)
    tasks = {name: get_task(name) for name in TASKS}
    paid = Counter()
    pieces = [
        "#",
        "#",
        " ",
        "\n",
        ".",
        "12",
        "yes",
        "no",
        "101",
        "0",
        "1",
        "-",
        "/",
        "=",
        "33",
        "*",
        "+",
        "(",
        ")",
        T,
        "<answer>",
        "</answer>",
        "3*7+12",
        A,
        A,
        "\x00",
        "\ud800",
        "\u0663",
        "\u2212",
        "\u00b2",
        "\uff11",
        "🙂",
        "\u202e",
        "9" * 60,
        "\\",
        "%s",
        "{}",
        "İ",
    ]
    for n in range(5000):
        text = "".join(rng.choices(pieces, k=rng.randrange(9)))
        if n % 4 == 0:
            noise = rng.randbytes(rng.randrange(200))
            text = noise.decode("utf-8", rng.choice(["replace", "surrogateescape", "ignore"]))
        elif n % 4 == 1:
            text = "#" + rng.choice(list(TASKS.values())) + text[:2]
        for name, task in tasks.items():
            reward = task.reward(a_problem(name), text)
            well_formed, answered, correct = reward.parts.values()
            assert {well_formed, answered, correct} <= {0, 1}
            assert correct <= answered
            assert answered <= well_formed or name == "countdown"
            if correct:
                assert looks_right(name, text), (name, text)
                paid[name] += 1
    assert len(paid) == len(TASKS) and min(paid.values()) > 20, paid


def huge(n):
    """Texts of about n characters that slow readers trip over."""
    for inside in [
        "a",
        "#",
        "9",
        "0",
        " ",
        "1,111,",
        "-",
        "\u2212",
        ".",
        "$ ",
        "(",
        "1+",
        "<",
        "🙂",
        "İ",
        "\x00",
        "<think>",
        "<answer>",
        T,
        A,
        "</answer><answer>",
    ]:
        filling = inside * (n // len(inside))
        yield from (
            filling,
            "#" + filling,
            "#1" + filling + "x",
            f"<think>{filling}</think>{A}",
            f"{T}<answer>{filling}</answer>",
            f"{T}{filling}{A}",
            f"{filling}{T}<answer>1{filling}</answer>{filling}x",
        )


@pytest.mark.parametrize("name", TASKS)
def test_a_completion_of_a_megabyte_is_judged_at_once(name):
    task = get_task(name)
    problem = a_problem(name)
    # From small to large: a reader whose time explodes fails early.
    for n in (1_000, 20_000, 1_000_000):
        for text in huge(n):
            begun = time.process_time()
            task.reward(problem, text)
            assert time.process_time() - begun < 0.1, text[:100]


# ---- what a verdict pays -------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["0-20", "counting", "spelling", "comparison", "binary"])
def test_binary_and_signed_rewards(name):
    wrong = {"comparison": "no"}.get(name, "1")
    for rewards, low in [("binary", 0), ("signed", -1)]:
        task = get_task(name, rewards=rewards)
        problem = a_problem(name)
        texts = ("#" + problem.answer, "#" + wrong, "#", "", problem.answer)
        totals = [task.reward(problem, text).total for text in texts]
        assert totals == [1, low, low, low, low]


GRADED = [
    (
        "0-20",
        [7, 12],
        "+",
        {
            "19": 1,
            "18": 0.5,
            "20": 0.5,
            "17": 0.25,
            "14": 0.25,
            "24": 0.25,
            "13": 0,
            "25": 0,
            "-19": 0,
            "19.5": 0.5,
            "17.5": 0.25,
            "-5": -0.5,
            "84": -0.5,
            "": -1,
            "x": -1,
            "9" * 101: -1,
            "8" * 100: 0,
        },
    ),
    (
        "0-20",
        [3, 9],
        "-",
        {
            "-6": 1,
            "-5": 0.5,
            "-7": 0.5,
            "-1": 0.25,
            "-11": 0.25,
            "0": 0,
            "6": 0,
            "12": -0.5,
            "27": -0.5,
        },
    ),
    # 3 is off by one, but it is 1 + 2.
    ("0-20", [1, 2], "*", {"2": 1, "3": -0.5, "-1": -0.5, "1": 0.5, "4": 0.25}),
    # 4 is 2 x 2 as well, and right.
    ("0-20", [2, 2], "+", {"4": 1, "0": -0.5, "5": 0.5}),
    ("0-20", [5, 0], "-", {"5": 1, "0": -0.5}),
    ("2-digit", [50, 20], "-", {"30": 1, "29": 0.5, "35": 0.25, "36": 0, "70": -0.5, "1000": -0.5}),
    (
        "sum3",
        [500, 200],
        "+",
        {"700": 1, "701": 0.5, "705": 0.25, "706": 0, "300": -0.5, "100000": -0.5},
    ),
    # In a chain there is no one other operation to take for the right one.
    (
        "chain4",
        [9, 8, 7, 6, 5],
        "++--",
        {"13": 1, "12": 0.5, "18": 0.25, "19": 0, "35": 0, "": -1},
    ),
    (
        "3x2",
        [500, 20],
        "*",
        {
            "10000": 1,
            "10001": 0.5,
            "10100": 0.5,
            "9900": 0.5,
            "10101": 0.25,
            "11000": 0.25,
            "9000": 0.25,
            "11001": 0,
            "8999": 0,
            "1000": 0,
            "-10000": 0,
            "520": -0.5,
            "480": -0.5,
            "": -1,
        },
    ),
]


@pytest.mark.parametrize("preset, numbers, signs, pays", GRADED)
def test_graded_rewards(preset, numbers, signs, pays):
    task = get_task(preset, rewards="graded")
    answer = next(text for text, paid in pays.items() if paid == 1)
    problem = Problem([], answer, {"numbers": numbers, "signs": list(signs)})
    verdicts = {1: RIGHT, -1: NO_ANSWER}
    for text, paid in pays.items():
        verdict = verdicts.get(paid, WRONG)
        assert check(task, problem, f"1+1=2 #{text}", verdict) == paid, text
    assert check(task, problem, answer, NO_FORMAT) == -1


def test_graded_rewards_are_full_within_the_precision():
    task = get_task("0-20", rewards="graded", precision="0")
    problem = Problem([], "19", {"numbers": [7, 12], "signs": ["+"]})
    totals = [task.reward(problem, text).total for text in ("#19.5", "#18.5", "#19.6", "#21")]
    assert totals == [1, 1, 0.5, 0.25]
