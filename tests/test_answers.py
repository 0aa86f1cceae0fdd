"""The one parser of numeric answers."""

import random
from fractions import Fraction

import pytest

from nanorl.tasks.answers import is_close, last_number, number_after

PARSED = [  # what directly follows the marker -> its value
    ("12", 12),
    (" 12", 12),
    ("\n 12 apples", 12),
    ("007", 7),
    ("+7", 7),
    ("1,234", 1234),
    ("1,234,567.5", Fraction(2469135, 2)),
    ("1,2,3", 1),
    ("12,000.", 12000),
    ("$5", 5),
    ("$ 5", 5),
    ("-$5", -5),
    ("$-5", -5),
    ("$1,000.50", Fraction(2001, 2)),
    ("12.", 12),
    ("12.\n", 12),
    ("3/4.", Fraction(3, 4)),
    ("5%", 5),
    ("-3", -3),
    ("- 3", -3),
    ("\u22123", -3),
    ("\u20133", -3),
    ("\uff0d3", -3),
    ("2.50", Fraction(5, 2)),
    (".5", Fraction(1, 2)),
    ("-.5", Fraction(-1, 2)),
    ("0.1", Fraction(1, 10)),
    ("3/4", Fraction(3, 4)),
    ("-6/8", Fraction(-3, 4)),
    ("3/4.5", Fraction(2, 3)),
    ("3 1/2", Fraction(7, 2)),
    ("-3 1/2 cups", Fraction(-7, 2)),
    ("1,000 3/4.", Fraction(4003, 4)),
    ("3 7/2", None),
    ("3 1/0", None),
    ("3 12 / 5", 3),
    # What may stand around a number.
    ("**42**", 42),
    (" **-42**.", -42),
    ("`42`", 42),
    ("\\boxed{42}", 42),
    ("$\\boxed{1,042}$.", 1042),
    ("\\(\\boxed{42}\\)", 42),
    ("£42", 42),
    ("\u20ac 42", 42),
    ("-£42", -42),
    ("42€", 42),
    ("\\boxed{}", None),
    ("**", None),
    # Digits are 0 to 9. A number with others is none, and its beginning is not taken for one.
    ("\u0661\u0662", None),
    ("\uff11\uff12", None),
    ("12\u0663", None),
    ("1.\u0665", None),
    ("1/\u0662", None),
    ("3\u00bd", None),
    ("1,000/4", 250),
    ("1/0", None),
    ("1/0.0", None),
    ("0/0", None),
    ("0/5", 0),
    ("", None),
    ("  ", None),
    ("x", None),
    ("x 5", None),
    (".", None),
    ("-", None),
    ("$", None),
    ("/2", None),
    ("--5", None),
    # Never evaluated: an expression is the number it starts with, whatever follows.
    ("9**9**9", 9),
    ("2+3", 2),
    ("1e999999999", 1),
    ("1e5", 1),
    ("1E-3", 1),
    ("0x10", 0),
    ("nan", None),
    ("inf", None),
    ("True", None),
    ("__import__('os')", None),
]


@pytest.mark.parametrize("text, value", PARSED)
def test_the_number_that_directly_follows_the_marker(text, value):
    assert number_after("some 99 words ####" + text, "####") == value


def test_the_last_marker_counts_and_one_must_be_there():
    assert number_after("#1 no, #2", "#") == 2
    # The last one is empty, and the reader does not go back to the first.
    assert number_after("#1 no, #", "#") is None
    assert number_after("12", "#") is None
    assert number_after("", "#") is None


@pytest.mark.parametrize(
    "text, value",
    [
        ("7-5", 5),
        ("7 - 5", 5),
        ("(3+4)-5", 5),
        ("7\u22125", 5),
        ("= -5", -5),
        ("-5", -5),
        ("is \u22125", -5),
        ("so 3 and -2", -2),
        ("from 7 to $1,234.50.", Fraction(2469, 2)),
        ("3/4.", Fraction(3, 4)),
        ("1, 2, 3", 3),
        ("2 of 1/0", None),
        ("it takes 3 1/2 hours", Fraction(7, 2)),
        ("4, 3 1/2", Fraction(7, 2)),
        ("so **£42**", 42),
        ("12 or \u0661\u0662", None),
        ("none", None),
        ("", None),
    ],
)
def test_the_last_number(text, value):
    assert last_number(text) == value


@pytest.mark.parametrize(
    "digits",
    [
        "9" * 10_000,
        "1" + ",111" * 2_000,
        "0." + "3" * 10_000,
        "1/" + "7" * 10_000,
        "1" + "0" * 200 + "42",
    ],
)
def test_huge_input_is_no_number_and_its_tail_is_not_taken_for_one(digits):
    # Python refuses to convert so many digits by an exception, which must not end a training run.
    for text in (digits, "-" + digits, digits + "."):
        assert number_after("#" + text, "#") is None
        assert last_number(text) is None


def test_closeness_is_exact_and_none_is_never_close():
    total = number_after("#0.1", "#") + number_after("#0.2", "#")
    assert is_close(total, "0.3")  # in floats it is not
    assert not is_close(Fraction(10**20 + 1), str(10**20))  # in floats it is
    assert is_close(12, 12) and is_close(Fraction(3, 4), "3/4") and not is_close(12, "13")
    assert is_close(Fraction("3.15"), "3.1", "5e-2")
    assert not is_close(Fraction("3.151"), "3.1", "5e-2")
    assert not is_close(None, "0")


def test_no_text_makes_it_raise():
    rng = random.Random(0)
    pieces = list("0123456789.,/-+$#% \n*eE()") + [
        "\u2212",
        "\u0663",
        "\u00b2",
        "\u2460",
        "\u00bd",
        "\u0bf0",
        "\u4e94",
        "\uff11",
        "\x00",
        "\ud800",
        "####",
        "1,234",
        "00",
        "9" * 50,
        "🙂",
        "nan",
        "\u00a0",
    ]
    found = 0
    for _ in range(2000):
        text = "".join(rng.choices(pieces, k=rng.randrange(30)))
        for value in (number_after(text, "#"), last_number(text)):
            assert value is None or isinstance(value, Fraction)
            found += is_close(value, "0", 10**9)
    assert found > 500  # it is not that nothing is parsed at all
