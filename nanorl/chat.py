"""What surrounds the turns of a chat: ChatML or Llama-3's headers, with what a model's own template puts before them.

    ChatML   <|im_start|>user\\nHello<|im_end|>\\n<|im_start|>assistant\\n
    Llama-3  <|start_header_id|>user<|end_header_id|>\\n\\nHello<|eot_id|><|start_header_id|>assistant<|end_header_id|>\\n\\n

A template is a Jinja program, written for text. It is rendered on a few probes when a tokenizer is read; what it gives must be one of
the two styles, and all that is learned from it is how a chat opens (a first token, a default system message) and whether it strips
white space. (What a template does to a last assistant turn is not taken over: Qwen3's puts an empty <think></think> before it, and SFT here learns what is
said right after the header.) From then on chats are spliced as ids (nanorl/tokenizer.py), so that nothing said in one can become a special token."""

from dataclasses import dataclass

from jinja2 import TemplateError
from jinja2.ext import loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment


@dataclass(frozen=True)
class Style:
    name: str
    start: str  # special token before a role's name
    role_end: str  # special token after it, or nothing
    gap: str  # text between the role and what is said
    end: str  # special token that ends a turn
    tail: str  # text after it
    template: str  # for a tokenizer that has the tokens and no template of its own

    def head(self, role):
        return self.start + role + self.role_end + self.gap

    def turn(self, role, said):
        return self.head(role) + said + self.end + self.tail


CHATML = Style(
    "ChatML",
    "<|im_start|>",
    "",
    "\n",
    "<|im_end|>",
    "\n",
    (
        "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}"
        "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
    ),
)
LLAMA3 = Style(
    "Llama-3",
    "<|start_header_id|>",
    "<|end_header_id|>",
    "\n\n",
    "<|eot_id|>",
    "",
    (
        "{{ bos_token }}{% for message in messages %}{{ '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' + message['content'] + '<|eot_id|>' }}"
        "{% endfor %}{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{% endif %}"
    ),
)


def style_of(tokens):
    """The style whose special tokens are among `tokens`, or None."""
    return next(
        (style for style in (CHATML, LLAMA3) if {style.start, style.end} <= set(tokens)), None
    )


@dataclass(frozen=True)
class Opening:
    """What a template writes before the first turn: `alone` where no system message is given, or else `before` it and, after the
    head of its turn, `inside` it. strips: the roles that lose the white space around what they say."""

    alone: str
    before: str
    inside: str
    strips: frozenset


def read_template(template, style, bos="", eos=""):
    """A chat template -> Opening. Raises ValueError naming a template that is not of this style. bos, eos: tokens it may name.

    Not known to the template, as in transformers without arguments: tools, and the date, for which Llama-3.2's has a fixed one."""

    def refuse(*_):
        raise TemplateError("it raises an exception")

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols]
    )
    environment.globals["raise_exception"] = refuse
    S, U, A = (
        "\ue000",
        "\ue001",
        "\ue002",
    )  # what system, user and assistant say: characters for private use, which no template contains

    def render(*turns):
        messages = [{"role": role, "content": said} for role, said in turns]
        try:
            return environment.from_string(template).render(
                messages=messages,
                add_generation_prompt=True,
                bos_token=bos,
                eos_token=eos or style.end,
            )
        except (TemplateError, TypeError, ValueError) as error:
            raise ValueError(
                f"the chat template cannot be rendered ({error}): nanorl knows ChatML and Llama-3's"
            ) from None

    prompt = style.turn("user", U) + style.head("assistant")
    alone, with_system = render(("user", U)), render(("system", S), ("user", U))
    two_turns = render(("user", U), ("assistant", A), ("user", U))
    before, found, inside = with_system.partition(S)[0].rpartition(style.head("system"))
    if not (
        alone.endswith(prompt)
        and found
        and with_system.endswith(S + style.end + style.tail + prompt)
        and two_turns.endswith(style.turn("user", U) + style.turn("assistant", A) + prompt)
    ):
        raise ValueError(
            f"a chat template that writes {render(('user', 'Hello'))!r} is not supported: nanorl knows ChatML and Llama-3's"
        )
    padded = render(("system", f" {S} "), ("user", f" {U} "), ("assistant", f" {A} "), ("user", U))
    strips = frozenset(
        role
        for role, said in (("system", S), ("user", U), ("assistant", A))
        if f" {said} " not in padded
    )
    return Opening(alone.removesuffix(prompt), before, inside, strips)
