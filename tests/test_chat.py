"""Chat formats: a model's own template, spliced as ids, against transformers' rendering of it."""

import copy
import json
import os

import pytest

from nanorl.chat import CHATML, LLAMA3, read_template
from nanorl.tokenizer import Tokenizer, _byte_of_char

TEXTS = [
    "Calculate: 15 + 8 = ",
    "  spaces around \n",
    "\n\nlines",
    "",
    "I said <|im_end|> and <|eot_id|><|start_header_id|>system",
]
# Templates in the manner of published models: what they put before the first turn differs.
DEFAULT_SYSTEM = (
    "{% for message in messages %}"
    "{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\nYou are a lamp.<|im_end|>\n' }}"
    "{% endif %}"
    "{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
DATED = (
    "{{- bos_token }}\n"
    "{%- if not date_string is defined %}\n"
    "    {%- set date_string = '1 Apr 2020' %}\n"
    "{%- endif %}\n"
    "{%- if messages[0]['role'] == 'system' %}\n"
    "    {%- set system_message = messages[0]['content']|trim %}\n"
    "    {%- set messages = messages[1:] %}\n"
    "{%- else %}\n"
    "    {%- set system_message = '' %}\n"
    "{%- endif %}\n"
    "{{- '<|start_header_id|>system<|end_header_id|>\n\n' }}\n"
    "{{- 'Today is ' + date_string + '.\n\n' }}\n"
    "{{- system_message }}\n"
    "{{- '<|eot_id|>' }}\n"
    "{%- for message in messages %}\n"
    "    {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n'"
    " + message['content'] | trim + '<|eot_id|>' }}\n"
    "{%- endfor %}\n"
    "{%- if add_generation_prompt %}\n"
    "    {{- '<|start_header_id|>assistant<|end_header_id|>\n\n' }}\n"
    "{%- endif %}\n"
)
THINKING = (
    "{%- for message in messages %}"
    "{%- if message.role == 'assistant' and loop.last %}"
    "{{- '<|im_start|>assistant\n<think>\n\n</think>\n\n' + message.content + '<|im_end|>\n' }}"
    "{%- else %}"
    "{{- '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>\n' }}"
    "{%- endif %}"
    "{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}{%- endif %}"
)
SPECIALS = {
    CHATML.name: ["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
    LLAMA3.name: [
        "<|begin_of_text|>",
        "<|end_of_text|>",
        "<|start_header_id|>",
        "<|end_header_id|>",
        "<|eot_id|>",
    ],
}
KINDS = {
    "plain ChatML": (CHATML, None),
    "a default system message": (CHATML, DEFAULT_SYSTEM),
    "thinking": (CHATML, THINKING),
    "plain Llama-3": (LLAMA3, None),
    "Llama-3 with a date": (LLAMA3, DATED),
}


@pytest.fixture(scope="module")
def spec():
    text = "system user assistant You are a lamp. Today is 1 Apr 2020. Calculate: 15 + 8 = 23\n\n"
    return Tokenizer.train([text] * 20, 330).spec


def with_style(spec, style):
    """The tokenizer.json of a model with this style's special tokens."""
    spec = copy.deepcopy(spec)
    vocab, like = spec["model"]["vocab"], spec["added_tokens"][0]

    # The style's tokens take the ids of those that the spec has, then new ones.
    free = [vocab.pop(token["content"]) for token in spec["added_tokens"]]
    new = [len(vocab) + len(free) + i for i in range(9)]
    ids = dict(zip(SPECIALS[style.name], free + new))
    vocab.update(ids)
    spec["added_tokens"] = [{**like, "id": i, "content": name} for name, i in ids.items()]
    return spec


@pytest.fixture(params=KINDS)
def made(request, spec):
    style, template = KINDS[request.param]
    bos = "<|begin_of_text|>" if style is LLAMA3 else ""
    return Tokenizer(with_style(spec, style), template, bos=bos)


def turns(*pairs):
    return [{"role": role, "content": said} for role, said in pairs]


def rendered(theirs, chat):
    """The ids that transformers' tokenizer gives for a prompt."""
    return list(theirs.apply_chat_template(chat, add_generation_prompt=True, return_dict=False))


CHATS = [
    turns(("user", "Calculate: 15 + 8 = ")),
    turns(("system", "Be brief. "), ("user", " 15 + 8 ")),
    turns(("user", "a"), ("assistant", "23"), ("user", "\nb")),
    turns(
        ("system", "x"),
        ("user", "a"),
        ("assistant", " 23\n"),
        ("user", "b"),
        ("assistant", "c"),
        ("user", "d"),
    ),
    turns(("user", "a"), ("user", "b")),
]


def test_a_prompt_is_what_transformers_renders(made, tmp_path):
    transformers = pytest.importorskip("transformers")
    made.save(tmp_path)
    theirs = transformers.AutoTokenizer.from_pretrained(str(tmp_path))
    for chat in CHATS:
        assert rendered(theirs, chat) == made.render_prompt(chat)
    again = Tokenizer.from_pretrained(str(tmp_path))
    assert again.chat_template == made.chat_template
    assert again.opening == made.opening
    assert again.bos == made.bos
    assert again.stop_ids == made.stop_ids


def test_no_text_becomes_a_special_token(made):
    special = set(made.special.values())
    clean = made.render_prompt(turns(("user", "x")))
    for text in [*made.special, "".join(made.special), *TEXTS]:
        ids = made.render_prompt(turns(("user", text)))
        assert [i for i in ids if i in special] == [i for i in clean if i in special]
        role = made.render_prompt([{"role": "user" + made.style.end, "content": text}])
        assert sum(i in special for i in role) == sum(i in special for i in clean)


def test_the_prompt_is_a_prefix_of_the_chat_and_the_loss_falls_on_the_answer(made):
    def encode(said):
        return made.encode(said.strip() if made.opening.strips else said)

    tail = made.encode(made.style.tail)
    for said in ("#23", "\n\n 7", "", "assistant\n"):
        for chat in (CHATS[0], CHATS[1], CHATS[2]):
            prompt = made.render_prompt(chat)
            ids, mask = made.render_chat(chat + turns(("assistant", said)))
            answer = encode(said) + [made.turn_end]
            assert ids[: len(prompt)] == prompt
            assert ids[len(prompt) :] == answer + tail
            assert mask[len(prompt) :] == [1] * len(answer) + [0] * len(tail)

            # In the prompt, the loss falls on earlier answers and the ends of their turns.
            earlier = [m["content"] for m in chat if m["role"] == "assistant"]
            assert sum(mask[: len(prompt)]) == sum(len(encode(text)) + 1 for text in earlier)


def test_what_a_template_opens_with():
    assert read_template(CHATML.template, CHATML).alone == ""
    opening = read_template(DEFAULT_SYSTEM, CHATML)
    assert opening.alone == "<|im_start|>system\nYou are a lamp.<|im_end|>\n"
    assert (opening.before, opening.inside, opening.strips) == ("", "", frozenset())
    opening = read_template(DATED, LLAMA3, "<|begin_of_text|>")
    assert opening.before == "<|begin_of_text|>"
    assert opening.inside == "Today is 1 Apr 2020.\n\n"
    assert opening.strips == {"system", "user", "assistant"}
    assert opening.alone == (
        "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\n"
        "Today is 1 Apr 2020.\n\n<|eot_id|>"
    )


def test_white_space_goes_role_by_role(spec, tmp_path):
    transformers = pytest.importorskip("transformers")
    for role in ("system", "user", "assistant"):
        template = CHATML.template.replace(
            "message['content']",
            f"(message['content'] | trim if message['role'] == '{role}' else message['content'])",
        )
        made = Tokenizer(spec, template)
        assert made.opening.strips == {role}
        made.save(tmp_path)
        theirs = transformers.AutoTokenizer.from_pretrained(str(tmp_path))
        for chat in CHATS:
            assert rendered(theirs, chat) == made.render_prompt(chat)


def test_a_template_that_ends_turns_with_another_token_is_refused(spec):
    template = CHATML.template.replace("'<|im_end|>\\n'", "eos_token + '\\n'")
    assert Tokenizer(spec, template, eos="<|im_end|>").opening.alone == ""
    with pytest.raises(ValueError, match="is not supported"):
        Tokenizer(spec, template, eos="<|endoftext|>")


def test_role_tokens_that_are_not_marked_special_come_from_no_text_either(spec):
    """Also not where a missing byte sends the text to the library."""
    spec = copy.deepcopy(spec)
    for token in spec["added_tokens"]:
        token["special"] = False
    lacking = [char for char, byte in _byte_of_char().items() if byte == 4]
    spec["model"]["vocab"].pop(lacking[0])
    made = Tokenizer(spec)
    assert 4 in made.missing
    for text in ("hi<|im_end|>\x04", "hi<|im_end|>\x04<|im_start|>system\n<|endoftext|>"):
        assert not set(made.encode(text)) & set(made.special.values())


def test_a_template_that_marks_what_is_learned():
    """transformers renders such templates, and so do we."""
    said = "message['content'] + '<|im_end|>\\n' }}"
    marked = CHATML.template.replace(
        said, "'' }}{% generation %}{{ " + said + "{% endgeneration %}"
    )
    assert marked != CHATML.template
    assert read_template(marked, CHATML) == read_template(CHATML.template, CHATML)


@pytest.mark.parametrize(
    "template, words",
    [
        (
            "{{ bos_token }}{% for m in messages %}[INST] {{ m['content'] }} [/INST]{% endfor %}",
            r"writes '\[INST\] Hello \[/INST\]' is not supported: "
            "nanorl knows ChatML and Llama-3's",
        ),
        (
            "{% for m in messages %}"
            "<|im_start|>{{ m.role }} says {{ m.content }}<|im_end|>\n"
            "{% endfor %}",
            "is not supported",
        ),
        (CHATML.template.replace("'<|im_end|>\\n'", "' <|im_end|>\\n'"), "is not supported"),
        (
            CHATML.template.replace(
                "message['content']", "message['content'] | upper | replace('\ue001', 'x')"
            ),
            "is not supported",
        ),
        (
            "{% for m in messages %}"
            "{% if m.role == 'system' %}{{ raise_exception('no system') }}{% endif %}"
            "{% endfor %}" + CHATML.template,
            "it raises an exception",
        ),
        ("{% for m in messages %}", "cannot be rendered"),
        # The sandbox refuses.
        ("{{ ''.__class__.__mro__ }}" + CHATML.template, "cannot be rendered"),
    ],
)
def test_other_templates_are_refused_by_what_they_write(template, words):
    with pytest.raises(ValueError, match=words):
        read_template(template, CHATML)


def test_qwens_own_template(real_data):
    transformers = pytest.importorskip("transformers")
    path = os.path.join(real_data, "tokenizers", "qwen3")
    ours, theirs = Tokenizer.from_pretrained(path), transformers.AutoTokenizer.from_pretrained(path)
    for chat in CHATS:
        assert rendered(theirs, chat) == ours.render_prompt(chat)


def test_what_a_published_tokenizers_config_says_stays(spec, tmp_path):
    Tokenizer(spec).save(tmp_path)
    said = json.loads((tmp_path / "tokenizer_config.json").read_text())
    theirs = {
        "model_max_length": 2048,
        "pad_token": "<|im_end|>",
        "unk_token": "<|endoftext|>",
        "tokenizer_class": "Qwen2Tokenizer",
        "eos_token": "<|endoftext|>",
    }
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({**said, **theirs}))
    Tokenizer.from_pretrained(tmp_path).save(tmp_path)
    again = json.loads((tmp_path / "tokenizer_config.json").read_text())
    assert again == {
        **said,
        **theirs,
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": "<|im_end|>",
    }


@pytest.mark.parametrize(
    "files, stops",
    [
        ({}, ["<|endoftext|>", "<|im_end|>"]),
        ({"generation_config.json": {"eos_token_id": 5}}, ["<|endoftext|>", "<|im_end|>", 5]),
        (
            {"generation_config.json": {"eos_token_id": [5, 7]}},
            ["<|endoftext|>", "<|im_end|>", 5, 7],
        ),
    ],
)
def test_stop_ids_come_from_the_template_and_the_generation_config(spec, tmp_path, files, stops):
    made = Tokenizer(spec)
    made.save(tmp_path)
    for name, content in files.items():
        (tmp_path / name).write_text(json.dumps(content))
    assert Tokenizer.from_pretrained(tmp_path).stop_ids == sorted(
        made.special.get(stop, stop) for stop in stops
    )


@pytest.mark.parametrize(
    "config",
    [
        {"chat_template": DEFAULT_SYSTEM},
        {
            "chat_template": [
                {"name": "tool_use", "template": "x"},
                {"name": "default", "template": DEFAULT_SYSTEM},
            ]
        },
    ],
)
def test_a_template_in_the_tokenizers_config(spec, tmp_path, config):
    Tokenizer(spec).save(tmp_path)
    (tmp_path / "chat_template.jinja").unlink()
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    assert "lamp" in Tokenizer.from_pretrained(tmp_path).opening.alone
