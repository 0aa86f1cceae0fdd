"""Files that --data names -> conversations for SFT, some of them held out by their content."""

import json

import numpy as np

from nanorl.data.corpus import val_bound
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


def messages_of(row):
    """A row -> chat messages, dicts with role and content.

    The row holds one of these:

        messages                      a list of {role, content}
        conversations                 ShareGPT: a list of {from, value}
        instruction, input, output    Alpaca; the input may be empty or missing
        prompt, completion

    Raises ValueError that says what is wrong.
    """
    turns = row.get("messages") or row.get("conversations")
    if not turns:
        return _question_and_answer(row)
    if not isinstance(turns, list) or not all(isinstance(turn, dict) for turn in turns):
        raise ValueError("its messages are not a list of objects with role and content")
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


def _question_and_answer(row):
    """A row without a list of messages -> the user's message and the assistant's."""
    if "instruction" in row:
        question = _text(row, "instruction")
        answer = _text(row, "output")
        if row.get("input"):
            question += "\n\n" + _text(row, "input")
    elif "prompt" in row:
        question = _text(row, "prompt")
        answer = _text(row, "completion")
    else:
        fields = ", ".join(map(str, row)) or "nothing"
        raise ValueError(f"no messages, conversations, instruction or prompt in it, only {fields}")
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


def read_conversations(patterns, tokenizer, seq_len):
    """Files of rows -> (examples to train on, examples held out, note).

    An example is (ids, mask), numpy arrays, as tokenizer.render_chat gives them. A conversation
    that does not fit a row of seq_len inputs is left out. The note says how many are, and is ""
    where none is. Raises ValueError for a row that is no conversation, and where fewer than two
    different conversations fit.
    """
    examples = []
    hashes = []  # of the examples' messages
    n_conversations = 0
    longest = 0  # in tokens
    for messages, ids, mask in _rendered(patterns, tokenizer):
        n_conversations += 1
        longest = max(longest, len(ids))
        # The last token of a row is a target and never an input.
        if len(ids) <= seq_len + 1:
            examples.append((np.array(ids, np.int32), np.array(mask, bool)))
            hashes.append(content_hash(json.dumps(messages)))

    note = ""
    n_too_long = n_conversations - len(examples)
    if n_too_long:
        note = (
            f"{n_too_long:,} of {n_conversations:,} conversations are longer than "
            f"--seq_len={seq_len} tokens and are left out; the longest has {longest:,}"
        )
    n_different = len(set(hashes))
    if n_different < 2:
        reason = note or f"{n_different} different conversations"
        raise ValueError(
            f"--data={patterns}: {reason}: two or more must be left, one of which validates"
        )

    train = []
    held_out = []
    bound = val_bound(min(hashes))
    for example, example_hash in zip(examples, hashes):
        if example_hash < bound:
            held_out.append(example)
        else:
            train.append(example)
    return train, held_out, note


def _rendered(patterns, tokenizer):
    """Yield (messages, ids, mask) of every row. Raises ValueError that names the row."""
    for path in find_files(patterns):
        for row_name, row in read_rows(path):
            try:
                messages = messages_of(row)
                ids, mask = tokenizer.render_chat(messages)
            except ValueError as error:
                raise ValueError(f"{row_name}: {error}") from None
            yield messages, ids, mask
