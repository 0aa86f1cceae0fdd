"""The one parser of answers. Text is never evaluated; malformed or huge input is just no answer."""

import re
from fractions import Fraction

# A number in a text: an optional sign and dollar, 1,234.5 or 12 or .5, an optional denominator.
NUMBER = re.compile(
    r"""
    (?P<sign> [-+] )?  \s?  \$?  \s?
    (?P<whole>
        \d{1,3} (?:,\d{3})+ (?!\d)          # 1,234
      | \d+                                 # 1234
      | (?=\.\d)                            # nothing, before .5
    )
    (?P<point> \.\d+ )?
    (?: / (?P<under> \d+ (?:\.\d+)? ) )?    # 3/4
    """,
    re.VERBOSE,
)
# A number may have so many characters. A longer one counts as none. It is read as a whole all the
# same, or its tail would be taken for a number.
LONGEST = 100
# Other characters that are written for a minus.
MINUS = str.maketrans({"\u2212": "-", "\u2013": "-", "\ufe63": "-", "\uff0d": "-"})


def value_of(match):
    """A match of NUMBER -> Fraction, or None where it is too long or divides by zero."""
    if len(match[0]) > LONGEST:
        return None
    whole = match["whole"].replace(",", "") or "0"
    number = Fraction(whole + (match["point"] or ""))
    if match["under"]:
        under = Fraction(match["under"])
        if not under:
            return None
        number /= under
    return -number if match["sign"] == "-" else number


# ---- after a marker ------------------------------------------------------------------------------


def number_after(text, marker):
    """The number that directly follows the last `marker`, else None.

    White space and a $ may stand between them.
    """
    _, found, tail = text.rpartition(marker)
    if not found:
        return None
    # So much of it is enough to see that a number is too long.
    tail = tail.lstrip().removeprefix("$").lstrip()[: 2 * LONGEST]
    match = NUMBER.match(tail.translate(MINUS))
    return value_of(match) if match else None


def word_after(text, marker):
    """All that follows the last `marker`, in lower case: '#Yes.' -> 'yes'.

    White space around it and a full stop are left out. More than a word stays as it is:
    '#yes or no' -> 'yes or no'. None where there is no marker, or nothing after it.
    """
    _, found, tail = text.rpartition(marker)
    if not found:
        return None
    return tail.strip().removesuffix(".").strip().lower() or None


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
    text = text.translate(MINUS).strip().removesuffix(".").strip()
    if words:
        return text.lower() if re.fullmatch(words, text.lower()) else None
    match = NUMBER.match(text)
    if match is None:
        return None
    unit = re.fullmatch(r"\s*[a-zA-Z%°€£]*", text[match.end() :])
    value = value_of(match) if unit else None
    return None if value is None else str(value)


def is_close(value, answer, tolerance=0):
    """Whether a parsed number, or None, equals the answer (str or int) within the tolerance."""
    return value is not None and abs(value - Fraction(answer)) <= Fraction(tolerance)


# ---- multiple choice -----------------------------------------------------------------------------


def chosen_label(text, labels):
    """The label that a text chooses, or None. The first of these rules that finds one counts:

    1. The text is a label and nothing else: 'B', '(b)'.
    2. The last label after 'answer', 'option' or 'choice': 'The answer is B.'
    3. The label that the text starts with: 'B. Paris', 'B is right'.
    4. The label after a word such as 'is' or 'choose', if all such words have the same: 'It is B.'

    Two labels side by side ('A or B') are no choice, nor is the article ('A dog').
    """
    # The question's last line may be said again. It chooses nothing.
    text = re.sub(r"Answer with [^\n]*", "", text)

    either = "|".join(map(re.escape, labels))
    # A label that is no part of a longer word or of a number, such as 2.5 or 1,000.
    label = rf"(?<![\d.,])({either})\b(?![.,]?\d)"
    # No other label stands beside it.
    alone = rf"(?!\W*(?:,|or|and)\W*(?:{either})\b)"
    # Words that follow a label and not an article: 'A is right', but 'A dog is'.
    verb = r"(?:is|was|because|since|as|would|seems|looks|must)\b"

    whole = re.fullmatch(rf"\W*(?i:{label})\W*", text)
    if whole:
        return whole[1].upper()

    cue = r"(?i:\banswer|\boption|\bchoice)(?i: is| would be| should be| must be)?"
    after_cue = re.findall(rf"{cue}[\s:*(\"']*{label}{alone}", text)
    if after_cue:
        return after_cue[-1]

    start = re.match(rf"\W*{label}{alone}(?:[).:,*]|\s*\n|\s+{verb})", text)
    if start:
        return start[1]

    weak_cue = r"(?i:\b(?:is|be|choose|pick|select|say|think))"
    no_noun_follows = rf"(?!\s+(?!{verb}|in\b|for\b)[a-z])"
    after_weak_cue = re.findall(rf"{weak_cue}[\s:*(\"']*{label}{alone}{no_noun_follows}", text)
    if len(set(after_weak_cue)) == 1:
        return after_weak_cue[0]
    return None
