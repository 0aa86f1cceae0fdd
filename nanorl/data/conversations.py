"""Files that --data names -> conversations for SFT, some of them held out, by their content."""

import json

import numpy as np

from nanorl.data.corpus import val_bound
from nanorl.tasks.files import find_files, read_rows
from nanorl.tasks.problem import content_hash

ROLES = {
    "system": "system",
    "user": "user",
    "assistant": "assistant",
    "human": "user",
    "gpt": "assistant",
}  # the last two: ShareGPT


def _text(fields, *names):
    """The string under the first of `names` that is there."""
    name = next((name for name in names if fields.get(name) is not None), None)
    if name is None:
        raise ValueError(f"no {' or '.join(map(repr, names))}")
    if not isinstance(fields[name], str):
        raise ValueError(f"{name!r} is {json.dumps(fields[name], default=str)[:40]}, not a string")
    return fields[name]


def messages_of(row):
    """A row -> chat messages. It holds `messages` (role and content), `conversations` (ShareGPT: from and value), `instruction`,
    `input` (which may be empty) and `output` (Alpaca), or `prompt` and `completion`. Raises ValueError that says what is wrong."""
    turns = row.get("messages") or row.get("conversations")
    if not turns:
        if "instruction" in row:
            asked, said = _text(row, "instruction"), _text(row, "output")
            asked += "\n\n" + _text(row, "input") if row.get("input") else ""
        elif "prompt" in row:
            asked, said = _text(row, "prompt"), _text(row, "completion")
        else:
            raise ValueError(
                f"no messages, conversations, instruction or prompt in it, only {', '.join(map(str, row)) or 'nothing'}"
            )
        return [{"role": "user", "content": asked}, {"role": "assistant", "content": said}]
    if not isinstance(turns, list) or not all(isinstance(turn, dict) for turn in turns):
        raise ValueError("its messages are not a list of objects with role and content")
    messages = []
    for number, turn in enumerate(turns, 1):
        try:
            role, content = _text(turn, "role", "from"), _text(turn, "content", "value")
        except ValueError as error:
            raise ValueError(f"message {number}: {error}") from None
        if role not in ROLES:
            raise ValueError(f"message {number}: role {role!r} is none of {', '.join(ROLES)}")
        messages.append({"role": ROLES[role], "content": content})
    if messages[-1]["role"] != "assistant":
        raise ValueError(
            f"the last message is the {messages[-1]['role']}'s: a conversation ends with the assistant's"
        )
    return messages


def read_conversations(patterns, tokenizer, seq_len):
    """Files of rows -> (examples to train on, examples held out, note). An example is (ids, mask), numpy arrays, as
    tokenizer.render_chat gives them. Those that fit no row of seq_len inputs are left out; the note says how many, or is "".
    Raises ValueError for a row that is no conversation, and when there are not two that fit."""
    examples, hashes, total, longest = [], [], 0, 0
    for path in find_files(patterns):
        for place, row in read_rows(path):
            try:
                messages = messages_of(row)
                ids, mask = tokenizer.render_chat(messages)
            except ValueError as error:
                raise ValueError(f"{place}: {error}") from None
            total, longest = total + 1, max(longest, len(ids))
            if len(ids) <= seq_len + 1:
                examples.append((np.array(ids, np.int32), np.array(mask, bool)))
                hashes.append(content_hash(json.dumps(messages)))
    note = (
        ""
        if total == len(examples)
        else (
            f"{total - len(examples):,} of {total:,} conversations are longer than --seq_len={seq_len} tokens and "
            f"are left out; the longest has {longest:,}"
        )
    )
    if len(set(hashes)) < 2:
        raise ValueError(
            f"--data={patterns}: {note or f'{len(set(hashes))} different conversations'}: two or more must be left, one of which validates"
        )
    bound = val_bound(min(hashes))
    held_out = [h < bound for h in hashes]
    return (
        [e for e, out in zip(examples, held_out) if not out],
        [e for e, out in zip(examples, held_out) if out],
        note,
    )
