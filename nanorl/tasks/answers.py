"""The one parser of answers. Text is never evaluated; malformed or huge input is just no answer."""
import re
from fractions import Fraction

# 1,234.5 or 12 or .5, with an optional sign, dollar, and denominator (3/4).
_NUMBER = re.compile(r"(?P<sign>[-+])?\s?\$?\s?(?P<whole>\d{1,3}(?:,\d{3})+(?!\d)|\d+|(?=\.\d))"
                     r"(?P<point>\.\d+)?(?:/(?P<under>\d+(?:\.\d+)?))?")
_LONGEST = 100  # characters of a number; a longer one is read whole, so that its tail is not taken for it, and is none
_MINUS = str.maketrans({"\u2212": "-", "\u2013": "-", "\ufe63": "-", "\uff0d": "-"})  # other spellings of a minus


def _value(match):
    if len(match[0]) > _LONGEST:
        return None
    number = Fraction((match["whole"].replace(",", "") or "0") + (match["point"] or ""))
    if match["under"]:
        under = Fraction(match["under"])
        if not under:
            return None
        number /= under
    return -number if match["sign"] == "-" else number


def number_after(text, marker):
    """The number that directly follows the last `marker` (white space and $ may stand between), else None."""
    _, found, tail = text.rpartition(marker)
    tail = tail.lstrip().removeprefix("$").lstrip()[:2 * _LONGEST]  # enough to see that a number is too long
    match = _NUMBER.match(tail.translate(_MINUS)) if found else None
    return _value(match) if match else None


def word_after(text, marker):
    """All that follows the last `marker`, in lower case, without white space and a full stop around it; None when there
    is no marker or nothing after it. '#Yes.' -> 'yes', '#yes or no' -> 'yes or no'."""
    _, found, tail = text.rpartition(marker)
    return (tail.strip().removesuffix(".").strip().lower() or None) if found else None


def last_number(text):
    """The last number in the text, else None. A minus directly after a digit is a subtraction, not a sign."""
    text = text.translate(_MINUS)
    last = None
    for last in _NUMBER.finditer(text):
        pass
    if last is None:
        return None
    value = _value(last)
    subtracted = last["sign"] == "-" and re.search(r"[\d)]\s*$", text[:last.start()])
    return -value if subtracted and value is not None else value


def last_answer(text, words=None):
    """The last answer in a text, as text: a number, or, where `words` is a regular expression, the last word that matches it; else None."""
    if words:
        found = re.findall(rf"\b(?:{words})\b", text.lower())
        return found[-1] if found else None
    value = last_number(text)
    return None if value is None else str(value)


def only_answer(text, words=None):
    """The same where the text is the answer and nothing else, but for a unit or a full stop: '$1,200.', '18 dollars'; '5 or 6' is none."""
    text = text.translate(_MINUS).strip().removesuffix(".").strip()
    if words:
        return text.lower() if re.fullmatch(words, text.lower()) else None
    match = _NUMBER.match(text)
    value = _value(match) if match and re.fullmatch(r"\s*[a-zA-Z%°€£]*", text[match.end():]) else None
    return None if value is None else str(value)


def is_close(value, answer, tolerance=0):
    """Whether a parsed number (or None) equals the answer (str or int) within the tolerance."""
    return value is not None and abs(value - Fraction(answer)) <= Fraction(tolerance)


def chosen_label(text, labels):
    """The label that a text chooses, such as B of 'B', 'B. Paris', '(B)', 'The answer is B.': the one that it starts with, else the last one after the
    word 'answer', else the only one that stands alone in it; else None. ('A dog barks' does not start with a label.)"""
    some = rf"({'|'.join(map(re.escape, labels))})\b(?!(?<=A)[ ](?!or\b|and\b)[a-z])"  # not the article
    start = re.match(rf"\W*{some}(?:[).:,*\s]*$|[).:,]|\s*\n)", text)
    after = re.findall(rf"(?i:\banswer)(?i: is| would be| should be)?\W*\b{some}", text)
    alone = set(re.findall(rf"\b{some}", text))
    return start[1] if start else after[-1] if after else alone.pop() if len(alone) == 1 else None
