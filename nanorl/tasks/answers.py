"""The one parser of answers. Text is never evaluated; malformed or huge input is just no answer.

One rule for numbers in all tasks: they are of the digits 0 to 9. With other digits (other scripts',
a ½) a number counts as none. A currency, bold type, code ticks or \\boxed{} may stand around it.
"""

import re
import string
from fractions import Fraction

# A number in a text: an optional sign and currency, 1,234.5 or 12 or .5 or 3 1/2, an optional
# denominator. Other digits are found too, or those next to them would be taken for a number.
NUMBER = re.compile(
    r"""
    (?P<sign> [-+] )?  \s?  [$£€¥]?  \s?
    (?P<whole>
        \d{1,3} (?:,\d{3})+ (?!\d)          # 1,234
      | \d+                                 # 1234
      | (?=\.\d)                            # nothing, before .5
    )
    (?:
        [ ] (?P<part> \d+ / \d+ ) (?![\d/.])  # 3 1/2
      | (?P<point> \.\d+ )?
        (?: / (?P<under> \d+ (?:\.\d+)? ) )?  # 3/4
    )
    (?P<other> [\u00bc-\u00be\u2150-\u215e]? )   # 3½
    """,
    re.VERBOSE,
)
# A number may have so many characters. A longer one counts as none. It is read as a whole all the
# same, or its tail would be taken for a number.
LONGEST = 100
# Other characters that are written for a minus.
# What may stand around an answer and is no part of it: '**42**', '$\\boxed{42}$', '`yes`'.
AROUND = string.whitespace + "*_`$£€¥"
BRACKETS = (("\\(", "\\)"), ("\\[", "\\]"), ("\\boxed{", "}"))
MINUS = str.maketrans({"\u2212": "-", "\u2013": "-", "\ufe63": "-", "\uff0d": "-"})


def value_of(match):
    """A match of NUMBER -> Fraction.

    None where it is too long, has other digits than 0 to 9, or divides by zero.
    """
    if len(match[0]) > LONGEST or not re.sub(r"[\s£€¥]", "", match[0]).isascii():
        return None
    whole = match["whole"].replace(",", "") or "0"
    number = Fraction(whole + (match["point"] or ""))
    if match["part"]:
        over, under = map(int, match["part"].split("/"))
        # 3 1/2 is a number, 3 7/2 is none.
        if over >= under:
            return None
        number += Fraction(over, under)
    if match["under"]:
        under = Fraction(match["under"])
        if not under:
            return None
        number /= under
    return -number if match["sign"] == "-" else number


def unwrapped(text):
    """'**42**.' or '$\\boxed{42}$' -> '42': without what may stand around an answer."""
    text = text.strip().strip(AROUND).removesuffix(".").strip(AROUND)
    for opening, closing in BRACKETS:
        if text.startswith(opening):
            text = text.removeprefix(opening).removesuffix(closing).strip(AROUND)
    return text


# ---- after a marker ------------------------------------------------------------------------------


def number_after(text, marker):
    """The number that directly follows the last `marker`, else None.

    White space, a currency, bold type or \\boxed{ may stand between them.
    """
    _, found, tail = text.rpartition(marker)
    if not found:
        return None
    # So much of it is enough to see that a number is too long.
    tail = unwrapped(tail)[: 2 * LONGEST]
    match = NUMBER.match(tail.translate(MINUS))
    return value_of(match) if match else None


def word_after(text, marker):
    """All that follows the last `marker`, in lower case: '#Yes.' -> 'yes'.

    A full stop and what may stand around an answer are left out. More than a word stays as it is:
    '#yes or no' -> 'yes or no'. None where there is no marker, or nothing after it.
    """
    _, found, tail = text.rpartition(marker)
    if not found:
        return None
    return unwrapped(tail).lower() or None


# ---- anywhere in a text --------------------------------------------------------------------------


def last_number(text):
    """The last number in a text, else None.

    A minus directly after a digit or a bracket is a subtraction and no sign: '7-5' -> 5.
    """
    text = text.translate(MINUS)
    last = None
    for match in NUMBER.finditer(text):
        last = match
    if last is None:
        return None
    value = value_of(last)
    if value is not None and last["sign"] == "-":
        subtracted = re.search(r"[\d)]\s*$", text[: last.start()])
        if subtracted:
            value = -value
    return value


def last_answer(text, words=None):
    """The last answer in a text, as text, else None.

    It is a number or, where `words` is a regular expression, the last word that matches it.
    """
    if words:
        found = re.findall(rf"\b(?:{words})\b", text.lower())
        return found[-1] if found else None
    value = last_number(text)
    return None if value is None else str(value)


def only_answer(text, words=None):
    """The answer, as text, where the whole text is an answer and nothing else; otherwise None.

    It may have a unit and a full stop: '$1,200.', '18 dollars'. But '5 or 6' is no answer. words:
    as for last_answer.
    """
    text = unwrapped(text.translate(MINUS))
    if words:
        return text.lower() if re.fullmatch(words, text.lower()) else None
    match = NUMBER.match(text)
    if match is None:
        return None
    unit = re.fullmatch(r"\s*[a-zA-Z%°€£¥]*", text[match.end() :])
    value = value_of(match) if unit else None
    return None if value is None else str(value)


def is_close(value, answer, tolerance=0):
    """Whether a parsed number, or None, equals the answer (str or int) within the tolerance."""
    return value is not None and abs(value - Fraction(answer)) <= Fraction(tolerance)


# ---- multiple choice -----------------------------------------------------------------------------

# 'B is the right answer', and what denies it: 'A is not right', 'A is incorrect'.
RIGHT = r"is (?:the |most )*(?:correct|right|best)\b"
DENIED = (
    r"(?:isn't|cannot|can't|(?:is|was|would be|seems|looks) (?:not|never|incorrect|wrong|false))"
)
# Words that follow a label and not an article: 'A is right', but 'A dog is'.
VERB = r"(?:is|was|because|since|as|would|seems|looks|must)\b"
MARKS = r"[\s:=>*(\"'`_$\[-]*"


def chosen_label(text, labels):
    """The label that a text chooses, or None. The first of these rules that finds one counts:

    1. The text is a label and nothing else: 'B', '(b)', '`B`'.
    2. What is in \\boxed{} or <answer></answer>.
    3. What is stated: 'The answer is B', 'so B is correct'.
    4. The label that the text starts with: 'B. Paris', 'B is right'.
    5. The label after 'option' or 'choice': 'A good choice is B', but not 'Option A is wrong'.
    6. The label after a word such as 'is' or 'choose': 'It is B.'

    Where the findings of a rule differ the text chooses nothing, so naming several never pays. Two
    labels side by side ('A or B') are no choice, nor is the list of the choices said again, nor the
    article ('A dog').
    """
    # The question's last line may be said again. It chooses nothing.
    text = re.sub(r"Answer with [^\n]*", "", text)
    text = re.sub(r"\\(?:text|textbf|mathrm|mathbf) ?\{([^{}]*)\}", r"\1", text)

    either = "|".join(map(re.escape, labels))
    # A label that is no part of a longer word or of a number, such as 2.5, 1,000 or -2.
    label = rf"(?<![\d.,\-\u2212\u2013])({either})\b(?![.,]?\d)"
    whole = re.fullmatch(rf"\s*[^\w\-\u2212\u2013]*(?i:{label})\W*", text)
    if whole:
        return whole[1].upper()

    framed = re.findall(r"\\boxed ?\{([^{}]*)\}|<answer>([^<]*)</answer>", text)
    if framed:
        return same([chosen_label(box or tag, labels) for box, tag in framed])

    # No other label stands beside it, and nothing denies it.
    beside = rf"\W{{0,9}}(?:[,/&|+;]|\b(?i:or|and)\b)\W{{0,9}}(?:{either})\b(?! {DENIED})"
    clear = rf"(?!{beside}|[ \t]+(?:{either})\b|,? (?:which )?{DENIED})"
    names = "answer|(?:best|correct|right) (?:option|choice)"
    verb = "(?i: is| would be| should be| must be)?"
    answer = rf"(?i:\b(?:{names})(?: (?:to|for) [^.\n]{{1,80}}?)?){verb}"
    option = rf"(?i:\boption|\bchoice){verb}"
    noun = r"(?:(?i:option|choice|letter) \W{0,3})?"
    stated = re.findall(rf"{answer}{MARKS}{noun}{label}{clear}", text)
    stated += re.findall(rf"{label}[)*`\"']* {RIGHT}", text)
    if stated:
        return same(stated)

    start = re.match(rf"\W*{label}{clear}(?:[).:,*`]|\s*\n|\s+{VERB})(?!\W*incorrect)", text)
    if start and not is_list(text, label, labels):
        return start[1]
    after_option = re.findall(rf"{option}{MARKS}{label}{clear}", text)
    if after_option:
        return same(after_option)

    weak_cue = r"(?i:\b(?:is|be|choose|pick|select|say|think))"
    no_noun_follows = rf"(?!\s+(?!{VERB}|in\b|for\b)[a-z])"
    return same(re.findall(rf"{weak_cue}{MARKS}{label}{clear}{no_noun_follows}", text))


def same(found):
    """The one value that all of them are, or None."""
    return found[0] if len(set(found)) == 1 else None


def is_list(text, label, labels):
    """Whether a text says the choices again: 'A. red B. dog ...', or one a line."""
    at_lines = re.findall(rf"^[ \t*(-]*{label}(?:[).:]|\s*$)", text, re.MULTILINE)
    marked = re.findall(rf"{label}[).:]", text)
    return at_lines[:2] == labels[:2] or marked[:3] == labels[:3] or set(marked) == set(labels)
