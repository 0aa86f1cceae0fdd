"""The one parser of answers. Text is never evaluated; malformed or huge input is just no answer."""

import re
from fractions import Fraction

# 1,234.5 or 12 or .5, with an optional sign, dollar, and denominator (3/4).
_NUMBER = re.compile(
    r"(?P<sign>[-+])?\s?\$?\s?(?P<whole>\d{1,3}(?:,\d{3})+(?!\d)|\d+|(?=\.\d))"
    r"(?P<point>\.\d+)?(?:/(?P<under>\d+(?:\.\d+)?))?"
)
_LONGEST = 100  # characters of a number; a longer one is read whole, so that its tail is not taken for it, and is none
_MINUS = str.maketrans(
    {"\u2212": "-", "\u2013": "-", "\ufe63": "-", "\uff0d": "-"}
)  # other spellings of a minus


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
    tail = (
        tail.lstrip().removeprefix("$").lstrip()[: 2 * _LONGEST]
    )  # enough to see that a number is too long
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
    subtracted = last["sign"] == "-" and re.search(r"[\d)]\s*$", text[: last.start()])
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
    value = (
        _value(match) if match and re.fullmatch(r"\s*[a-zA-Z%°€£]*", text[match.end() :]) else None
    )
    return None if value is None else str(value)


def is_close(value, answer, tolerance=0):
    """Whether a parsed number (or None) equals the answer (str or int) within the tolerance."""
    return value is not None and abs(value - Fraction(answer)) <= Fraction(tolerance)


def chosen_label(text, labels):
    """The label that a text chooses, or None: the last one after 'answer' ('The answer is B.'), else the one that it starts with ('B', 'B. Paris', '(B)'), else
    the only one after words such as 'option' or 'is' ('It is B.'). Two labels side by side ('A or B') are no choice, nor is the article ('A dog')."""
    text = re.sub(r"Answer with [^\n]*", "", text)  # the question's last line, said again
    some = rf"(?<![\d.,])({'|'.join(map(re.escape, labels))})\b(?![.,]?\d)"
    either = rf"(?!\W*(?:,|or|and)\W*(?:{'|'.join(map(re.escape, labels))})\b)"
    verb = r"(?:is|was|because|since|as|would|seems|looks|must)\b"
    if whole := re.fullmatch(rf"\W*(?i:{some})\W*", text):
        return whole[1].upper()
    after = re.findall(
        rf"(?i:\banswer|\boption|\bchoice)(?i: is| would be| should be| must be)?[\s:*(\"']*{some}{either}",
        text,
    )
    start = re.match(rf"\W*{some}{either}(?:[).:,*]|\s*\n|\s+{verb})", text)
    cued = set(
        re.findall(
            rf"(?i:\b(?:is|be|choose|pick|select|say|think))[\s:*(\"']*{some}{either}(?!\s+(?!{verb}|in\b|for\b)[a-z])",
            text,
        )
    )
    return after[-1] if after else start[1] if start else cued.pop() if len(cued) == 1 else None
