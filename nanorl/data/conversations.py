"""What --data names -> conversations for SFT, some of them held out by their content."""

import json
from collections import Counter

import numpy as np

from nanorl.data.corpus import val_bound
from nanorl.data.stream import Stream, is_stream
from nanorl.tasks.files import find_files, read_rows
from nanorl.tasks.problem import content_hash

ROLES = {
    "system": "system",
    "user": "user",
    "assistant": "assistant",
    # ShareGPT's names:
    "human": "user",
    "gpt": "assistant",
}


# What a row may hold -> the columns that are read of it.
COLUMNS = {
    "messages": ("messages", "system"),
    "conversations": ("conversations", "system"),
    "instruction": ("instruction", "input", "output", "system", "history"),
    "prompt": ("prompt", "completion", "system", "history"),
}
TURN = ("role", "content", "from", "value")  # what is read of a message
MOST_READ = 100_000  # rows of a data set on the hub, unless the user names a number


def messages_of(row):
    """A row -> chat messages, dicts with role and content.

    The row holds one of these:

        messages                      a list of {role, content}
        conversations                 ShareGPT: a list of {from, value}
        instruction, input, output    Alpaca; the input may be empty or missing
        prompt, completion

    and may hold besides

        system                        what the system says first
        history                       with the last two: earlier turns, a list of [question, answer]

    Raises ValueError that says what is wrong.
    """
    form = _form_of(row)
    if form in ("messages", "conversations"):
        messages = _read_turns(row[form], form)
        if row.get("history"):
            raise ValueError(f"it has both {form} and history: put the history into {form}")
    else:
        messages = _read_history(row.get("history") or []) + _question_and_answer(row, form)

    if row.get("system"):
        if messages[0]["role"] == "system":
            raise ValueError(f"it has a system, and its {form} begin with another: keep one")
        messages.insert(0, {"role": "system", "content": _text(row, "system")})
    return messages


def _form_of(row):
    """Which of COLUMNS the row holds. Raises ValueError where it is none."""
    for form in COLUMNS:
        if row.get(form) is not None:
            return form
    fields = ", ".join(map(str, row)) or "nothing"
    raise ValueError(f"no messages, conversations, instruction or prompt in it, only {fields}")


def unread(row):
    """The names of a row's columns that hold text and are not read, sorted.

    What its messages have besides role and content is among them, as 'messages.weight'.
    """
    form = _form_of(row)
    names = set()
    for name, value in row.items():
        if name not in COLUMNS[form] and value and isinstance(value, (str, list, dict)):
            names.add(name)
    turns = row[form] if isinstance(row[form], list) else []
    for turn in turns:
        others = [name for name in turn if name not in TURN and turn[name] is not None]
        names.update(f"{form}.{name}" for name in others)
    return sorted(names)


def _read_turns(turns, form):
    """A list of {role, content} or of {from, value} -> messages."""
    if not isinstance(turns, list) or not all(isinstance(turn, dict) for turn in turns):
        raise ValueError(f"its {form} are not a list of objects with role and content")
    if not turns:
        raise ValueError(f"its {form} are empty")
    messages = []
    for number, turn in enumerate(turns, 1):
        try:
            role = _text(turn, "role", "from")
            content = _text(turn, "content", "value")
        except ValueError as error:
            raise ValueError(f"message {number}: {error}") from None
        if role not in ROLES:
            raise ValueError(f"message {number}: role {role!r} is none of {', '.join(ROLES)}")
        messages.append({"role": ROLES[role], "content": content})
    last_role = messages[-1]["role"]
    if last_role != "assistant":
        raise ValueError(
            f"the last message is the {last_role}'s: a conversation ends with the assistant's"
        )
    return messages


def _read_history(history):
    """A list of [question, answer] -> messages."""
    shape = "'history' is not a list of [question, answer], all of them strings"
    if not isinstance(history, list):
        raise ValueError(shape)
    messages = []
    for pair in history:
        if not isinstance(pair, list) or [type(text) for text in pair] != [str, str]:
            raise ValueError(shape)
        messages.append({"role": "user", "content": pair[0]})
        messages.append({"role": "assistant", "content": pair[1]})
    return messages


def _question_and_answer(row, form):
    """A row without a list of messages -> the user's message and the assistant's."""
    question = _text(row, form)
    if form == "instruction":
        answer = _text(row, "output")
        if row.get("input"):
            question += "\n\n" + _text(row, "input")
    else:
        answer = _text(row, "completion")
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


def _text(fields, *names):
    """The string under the first of `names` that is in `fields` and not None.

    Raises ValueError where there is none, or no string.
    """
    for name in names:
        value = fields.get(name)
        if isinstance(value, str):
            return value
        if value is not None:
            shown = json.dumps(value, default=str)[:40]
            raise ValueError(f"{name!r} is {shown}, not a string")
    raise ValueError(f"no {' or '.join(map(repr, names))}")


def fits(ids, seq_len):
    """Whether a row of seq_len inputs holds the tokens: its last one is a target and no input."""
    return len(ids) <= seq_len + 1


def read_conversations(patterns, tokenizer, seq_len, most=0):
    """Files of rows, or a data set hf:<name> -> (examples to train on, examples held out, note).

    An example is (ids, mask), numpy arrays, as tokenizer.render_chat gives them. A conversation
    that does not fit a row of seq_len inputs is left out. The note says how many are, how many come
    again, how many held-out ones ask what a training one asks, and what columns are not read; it is
    "" where there is none of these.

    Of a data set at most `most` rows are read (0: MOST_READ), and the note counts those that are no
    conversations. Raises ValueError for such rows in files, and where fewer than two different
    conversations fit.
    """
    examples = []
    hashes = []  # of the examples' messages
    questions = []  # hashes of all but their last message, the assistant's
    n_conversations = 0
    longest = 0  # in tokens
    n_unread = Counter()  # {column: its rows}
    # The rows of a data set are not the user's to mend: those that are broken are left out.
    skipped = [] if is_stream(patterns) else None
    rows = _rows(patterns, most)
    for messages, ids, mask in _rendered(rows, tokenizer, n_unread, skipped):
        n_conversations += 1
        longest = max(longest, len(ids))
        if fits(ids, seq_len):
            examples.append((np.array(ids, np.int32), np.array(mask, bool)))
            hashes.append(content_hash(json.dumps(messages)))
            questions.append(content_hash(json.dumps(messages[:-1])))

    note = ""
    n_too_long = n_conversations - len(examples)
    if n_too_long:
        note = (
            f"{n_too_long:,} of {n_conversations:,} conversations are longer than "
            f"--seq_len={seq_len} tokens and are left out; the longest has {longest:,}"
        )
    if skipped:
        broken = (
            f"{len(skipped):,} rows are no conversations and are left out, such as {skipped[0]}"
        )
        note = f"{broken}\n      {note}" if note else broken
    n_different = len(set(hashes))
    if n_different < 2:
        reason = note or f"{n_different} different conversations"
        raise ValueError(
            f"--data={patterns}: {reason}: two or more must be left, one of which validates"
        )

    train, held_out, notes = _split(examples, hashes, questions)
    if n_unread:
        columns = ", ".join(f"{name} ({rows:,} rows)" for name, rows in n_unread.items())
        notes.append(f"not read: {columns}")
    if skipped is not None and not most and n_conversations + len(skipped) == MOST_READ:
        notes.append(
            f"the first {MOST_READ:,} rows of {patterns} are read; "
            "--examples=<number> reads so many"
        )
    return train, held_out, "\n      ".join(filter(None, [note, *notes]))


def _split(examples, hashes, questions):
    """-> (train, held_out, notes): what validates by its hash, and what to know of the two.

    hashes: of the examples' messages. questions: hashes of all but their last message.
    """
    train, held_out = [], []
    asked_in_train, asked_in_held_out = set(), []
    bound = val_bound(min(hashes))
    for example, example_hash, question in zip(examples, hashes, questions):
        if example_hash < bound:
            held_out.append(example)
            asked_in_held_out.append(question)
        else:
            train.append(example)
            asked_in_train.add(question)

    # A conversation is on one side only. Its question with another answer may be on the other.
    notes = []
    copies = len(hashes) - len(set(hashes))
    if copies:
        notes.append(f"{copies:,} of {len(hashes):,} conversations are copies of others")
    shared = sum(question in asked_in_train for question in asked_in_held_out)
    if shared:
        notes.append(
            f"WARNING: {shared:,} of the {len(held_out):,} held-out conversations differ from a "
            "training one in the last answer alone, so val/loss is not of unseen questions: keep "
            "one answer of each"
        )
    return train, held_out, notes


def _rows(patterns, most):
    """Yield (name, row) of all files, or of a data set's first rows."""
    if is_stream(patterns):
        yield from Stream(patterns, text_field=None).first_rows(most or MOST_READ)
    else:
        for path in find_files(patterns):
            yield from read_rows(path)


def _rendered(rows, tokenizer, n_unread, skipped):
    """Yield (messages, ids, mask) of every (name, row). Counts in n_unread what is not read.

    skipped: a list that gets what is wrong with rows that are no conversations. Without a list they
    raise ValueError, once all have been seen: it names the first and says how many there are.
    """
    broken = [] if skipped is None else skipped
    for row_name, row in rows:
        try:
            messages = messages_of(row)
        except ValueError as error:
            broken.append(f"{row_name}: {error}")
            continue
        n_unread.update(unread(row))
        if not broken or skipped is not None:
            yield messages, *tokenizer.render_chat(messages)
    if skipped is not None:
        return
    if len(broken) > 1:
        raise ValueError(f"{broken[0]}; {len(broken):,} rows are no conversations: mend them all")
    if broken:
        raise ValueError(broken[0])
