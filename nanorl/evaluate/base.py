"""What a base model can do, without a chat: bits per byte, samples, and a score of tasks.

The score is made as CORE's (Li et al. 2024, DataComp-LM): the mean over data sets of centred
accuracy, (accuracy - chance) / (1 - chance), so that guessing gets 0 and no mistake 1. It is over
the multiple choice at hand and not over CORE's 22 sets, so it is no CORE score.
"""

import math

import torch

from nanorl import learner
from nanorl.evaluate import words

# Multiple choice in plain text, the likeliest choice being the answer (continuations.py).
DATA_SETS = ("arc_easy:text", "arc_challenge:text", "mmlu:text")

# What the samples go on from: facts, a story, steps, sums.
PROMPTS = (
    "Paris is the capital of",
    "Water is made of hydrogen and",
    "Once upon a time there was a little",
    "The days of the week are Monday,",
    "She opened the door and",
    "2 + 3 =",
)
SAMPLE_TOKENS = 24

TOKENS = 16384  # of one forward
TEXT = 131_072  # characters, at most, of a text file


def rows_of_file(path, tokenizer, T):
    """A text file -> (inputs, targets) of rows of T tokens, the last one shorter, and the bytes.

    At most its first TEXT characters. Each row but the first begins with the token that the row
    before it ends with, so that every token is predicted once. Raises ValueError for no text.
    """
    try:
        with open(path, encoding="utf-8") as f:
            text = f.read(TEXT)
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"--text={path} cannot be read as UTF-8 text: {error}") from None
    if not text:
        raise ValueError(f"--text={path} is empty: name a file with text in it")
    ids = torch.tensor([[tokenizer.document_end, *tokenizer.encode(text)]])  # (1, tokens + 1)
    rows = list(zip(ids[:, :-1].split(T, 1), ids[:, 1:].split(T, 1)))  # (1, T) each
    return rows, len(text.encode())


@torch.no_grad()
def nats(model, rows):
    """The sum of - log p of the targets; rows: (inputs, targets) pairs, (rows, T) each."""
    device = model.cos.device
    total = 0.0
    for inputs, targets in rows:
        at_once = max(1, TOKENS // inputs.size(1))
        for some in zip(inputs.split(at_once), targets.split(at_once)):
            total += float(learner.text_loss(model, *(part.to(device) for part in some)))
    return total


def bits_per_byte(nats, n_bytes):
    return nats / math.log(2) / n_bytes


def samples(engine, tokenizer):
    """-> of each of PROMPTS the likeliest text that follows."""
    prompts = [[tokenizer.document_end, *tokenizer.encode(prompt)] for prompt in PROMPTS]
    stop_ids = tokenizer.stop_ids
    found = engine.generate(prompts, 1, SAMPLE_TOKENS, temperature=0.0, stop_ids=stop_ids)
    texts = []
    for [completion] in found:
        said = [i for i in completion.ids if i not in stop_ids]
        texts.append(tokenizer.decode(said))
    return texts


def score(summaries):
    """Summaries of data sets -> {score, low, high}: the mean of their centred accuracies.

    low, high: its 95% interval over problems. It is put together from those of the accuracies,
    which are Wilson's: the distances to the lower ends add up as squares, and so do those to the
    upper ends (Zou and Donner 2008).
    """
    m = len(summaries)
    mean = sum(summary["centred"] for summary in summaries) / m
    below, above = 0.0, 0.0
    for summary in summaries:
        room = 1 - summary["chance"]
        below += ((summary["accuracy"] - summary["low"]) / room) ** 2
        above += ((summary["high"] - summary["accuracy"]) / room) ** 2
    return dict(score=mean, low=mean - math.sqrt(below) / m, high=mean + math.sqrt(above) / m)


def score_line(found, names):
    """The score in words. found: see score; names: of its data sets."""
    interval = f"95% [{words.percent(found['low'])}, {words.percent(found['high'])}]"
    sets = f"the mean of centred over {', '.join(names)}"
    return f"score {words.percent(found['score'])}, {interval}: {sets}"
