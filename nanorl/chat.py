"""Chat formats: what surrounds the turns of a chat, and what a model's template puts before them.

    ChatML   <|im_start|>user\\nHello<|im_end|>\\n<|im_start|>assistant\\n
    Llama-3  <|start_header_id|>user<|end_header_id|>\\n\\nHello<|eot_id|>
             <|start_header_id|>assistant<|end_header_id|>\\n\\n   (on the same line)

A published model brings its own template, a Jinja program that writes text. It is rendered on a
few probes when a tokenizer is read. What it writes must be one of the two styles. Only two things
are learned from it: how a chat opens (a first token, a default system message), and which roles
lose the white space around what they say. From then on chats are spliced as ids
(nanorl/tokenizer.py), so nothing said in a chat can become a special token.

What a template does to a last assistant turn is not taken over. Qwen3's puts an empty
<think></think> before it, but SFT here learns what is said right after the header.
"""

from dataclasses import dataclass

from jinja2 import TemplateError
from jinja2.ext import Extension, loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment


@dataclass(frozen=True)
class Style:
    """How a turn is written: start, role, role_end, gap, what is said, end, tail."""

    name: str
    start: str  # special token before a role's name
    role_end: str  # special token after the role's name, or nothing
    gap: str  # text between the role and what is said
    end: str  # special token that ends a turn
    tail: str  # text after the end
    template: str  # for a tokenizer that has the tokens and no template of its own

    def head(self, role):
        """The text of a turn up to what is said."""
        return self.start + role + self.role_end + self.gap

    def turn(self, role, said):
        """The text of a whole turn."""
        return self.head(role) + said + self.end + self.tail


CHATML = Style(
    name="ChatML",
    start="<|im_start|>",
    role_end="",
    gap="\n",
    end="<|im_end|>",
    tail="\n",
    template=(
        "{% for message in messages %}"
        "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}"
        "{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
    ),
)
LLAMA3 = Style(
    name="Llama-3",
    start="<|start_header_id|>",
    role_end="<|end_header_id|>",
    gap="\n\n",
    end="<|eot_id|>",
    tail="",
    template=(
        "{{ bos_token }}"
        "{% for message in messages %}"
        "{{ '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n'"
        " + message['content'] + '<|eot_id|>' }}"
        "{% endfor %}"
        "{% if add_generation_prompt %}"
        "{{ '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}"
        "{% endif %}"
    ),
)


def style_of(tokens):
    """The style whose special tokens are among `tokens`, or None."""
    for style in (CHATML, LLAMA3):
        if {style.start, style.end} <= set(tokens):
            return style
    return None


@dataclass(frozen=True)
class Opening:
    """What a template writes before the first turn, and which roles it strips.

    alone: before the first turn, where the chat has no system message.
    before, inside: where it has one, before the system turn, and inside it after its head.
    strips: the roles that lose the white space around what they say.
    """

    alone: str
    before: str
    inside: str
    strips: frozenset


# What the system, the user and the assistant say in the probes. The characters are for private
# use, so no template contains them.
SYSTEM_SAYS, USER_SAYS, ASSISTANT_SAYS = "\ue000", "\ue001", "\ue002"


def read_template(template, style, bos="", eos=""):
    """Find out how a chat template opens a chat, and return it as an Opening.

    bos, eos: tokens that the template may name. The template gets no tools and no date, as in
    transformers without arguments. (Llama-3.2's template has a fixed date for that.)

    Raises ValueError when the template cannot be rendered or does not write this style.
    """
    eos = eos or style.end
    system, user = ("system", SYSTEM_SAYS), ("user", USER_SAYS)
    assistant = ("assistant", ASSISTANT_SAYS)

    # Three chats. Each must end in turns of this style and the head of the assistant's turn.
    alone = _render(template, bos, eos, [user])
    with_system = _render(template, bos, eos, [system, user])
    two_turns = _render(template, bos, eos, [user, assistant, user])
    prompt = style.turn(*user) + style.head("assistant")
    end_of_system = SYSTEM_SAYS + style.end + style.tail + prompt
    writes_style = (
        alone.endswith(prompt)
        and with_system.endswith(end_of_system)
        and two_turns.endswith(style.turn(*user) + style.turn(*assistant) + prompt)
    )

    # The head of the system turn divides what comes before the system's words.
    opening = with_system.partition(SYSTEM_SAYS)[0]
    before, system_head, inside = opening.rpartition(style.head("system"))
    if not writes_style or not system_head:
        example = _render(template, bos, eos, [("user", "Hello")])
        raise ValueError(
            f"a chat template that writes {example!r} is not supported: "
            "nanorl knows ChatML and Llama-3's"
        )

    # A role is stripped when the spaces around what it says are gone.
    strips = set()
    padded_turns = [(role, f" {said} ") for role, said in (system, user, assistant, user)]
    padded = _render(template, bos, eos, padded_turns)
    for role, said in padded_turns:
        if said not in padded:
            strips.add(role)
    return Opening(alone.removesuffix(prompt), before, inside, frozenset(strips))


class Generation(Extension):
    """{% generation %} ... {% endgeneration %}: transformers marks what is learned with it.

    It writes what stands inside. What is learned is not read from the template.
    """

    tags = {"generation"}

    def parse(self, parser):
        next(parser.stream)  # the tag's own name
        return parser.parse_statements(["name:endgeneration"], drop_needle=True)


def _render(template, bos, eos, turns):
    """The text that a template writes for turns of (role, said), up to the assistant's words.

    Raises ValueError when the template cannot be rendered.
    """
    # The settings are those of transformers. The sandbox keeps a template from running code.
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols, Generation]
    )
    environment.globals["raise_exception"] = _raise_exception
    messages = [{"role": role, "content": said} for role, said in turns]
    try:
        return environment.from_string(template).render(
            messages=messages, add_generation_prompt=True, bos_token=bos, eos_token=eos
        )
    except (TemplateError, TypeError, ValueError) as error:
        raise ValueError(
            f"the chat template cannot be rendered ({error}): nanorl knows ChatML and Llama-3's"
        ) from None


def _raise_exception(*_):
    """A template calls this to refuse a chat, for example one with a system message."""
    raise TemplateError("it raises an exception")
