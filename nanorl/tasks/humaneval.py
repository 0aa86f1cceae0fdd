"""HumanEval: Python functions to write, judged by hidden tests (Chen et al. 2021).

A problem shows a function's signature and docstring.
"""

import re
import textwrap

from nanorl.tasks.files import load_rows
from nanorl.tasks.problem import Problem, judged, one_of
from nanorl.tasks.sandbox import run

# Settings come from the command line as words.
YES = ("true", "yes", "1")
NO = ("false", "no", "0")


class HumanEval:
    """The only split is `test`. A function that passes the tests earns 1, anything else 0.

    allow_code: the code that the model writes may run; without it ValueError is raised. Parts of a
    reward: format (the code is in a fence), answered (there is code), correct.
    """

    # Rewards run in worker processes, side by side. Each run's own limit is sandbox.run's 10
    # seconds.
    timeout = 30.0

    def __init__(self, split="test", allow_code=False):
        if split != "test":
            raise ValueError(f"split is {split!r}: humaneval has one split, --split=test")
        allowed = str(allow_code).lower()
        one_of("allow_code", allowed, YES + NO)
        if allowed in NO:
            raise ValueError(
                "humaneval runs code that the model writes: --allow_code in eval.py "
                "(elsewhere --task_args='allow_code=true') permits it, "
                "inside nanorl/tasks/sandbox.py, which is a guard and not a jail"
            )
        self.rows = load_rows("humaneval", "test", "openai/openai_humaneval")

    def __len__(self):
        return len(self.rows)

    def problem(self, index):
        row = self.rows[index]
        question = (
            "Complete this Python function. Answer with the whole function in a ```python block.\n"
            f"\n```python\n{row['prompt'].strip()}\n```"
        )
        prompt = [{"role": "user", "content": question}]
        meta = {key: row[key] for key in ("prompt", "canonical_solution", "test")}
        return Problem(prompt, row["entry_point"], meta)

    def solution(self, problem):
        whole = problem.meta["prompt"] + problem.meta["canonical_solution"]
        return f"```python\n{whole.strip()}\n```"

    def reward(self, problem, completion):
        code, fenced = find_code(completion, problem.answer)
        correct = bool(code) and self._passes(problem, code)
        return judged(correct, format=fenced, answered=bool(code))

    def _passes(self, problem, code):
        # The prompt comes first: its imports and helper functions are the program's, and the tests
        # may use them too.
        prompt = problem.meta["prompt"]
        program = f"{prompt}\n{code}\n"
        return run(program, problem.answer, problem.meta["test"], helpers=prompt).passed


# ---- a completion -> its code --------------------------------------------------------------------

FENCED = re.compile(r"^[ \t]*```[^\n`]*\n(.*?)(?:^[ \t]*```|\Z)", re.DOTALL | re.MULTILINE)


def find_code(text, name):
    """A completion -> (what to put after the prompt, whether it was in a fence).

    It is the last fenced block that defines the function `name`: an outline or the question may
    come before it. Of a text without a fence it is the code, without the words around it.

    Code that does not define the function counts as the rest of the prompt's function. It is then
    the first block, or the whole text without a fence.
    """
    blocks = FENCED.findall(text)
    definition = re.compile(rf"^def {re.escape(name)}\b", re.MULTILINE)

    for block in reversed(blocks):
        code = textwrap.dedent(block)
        if definition.search(code):
            return code, True

    if blocks:
        first = blocks[0]
        if re.search(r"^return\b", first, re.MULTILINE):
            # The function's body alone, at column 0.
            return textwrap.indent(first, "    "), True
        return body(first), True

    if definition.search(text):
        return without_words(text), False
    return body(text), False


# How code begins that imports or defines something, and how any line of code begins at column 0.
BEGINNING = re.compile(r"(import|from|def|class)\b|@")
CODE = re.compile(
    r"(import|from|def|async|class|if|elif|else|for|while|try|except|finally|with)\b"
    r"|[@#)\]}]"
    r"|\w+\s*[=(\[.]"
)


def without_words(text):
    """The code in a text, from the first line that imports or defines something.

    It ends before the next line at column 0 that does not begin as code does.
    """
    code = []
    for line in text.split("\n"):
        has_begun = code or BEGINNING.match(line)
        if not has_begun:
            continue
        at_column_0 = re.match(r"\S", line)
        if at_column_0 and not CODE.match(line):
            break
        code.append(line)
    return "\n".join(code)


def body(code):
    """The lines before the first at column 0 that is not a closing bracket.

    There a base model has gone on to something else.
    """
    kept = []
    for line in code.strip("\n").split("\n"):
        if re.match(r"[^\s)\]}]", line):
            break
        kept.append(line)
    return "\n".join(kept).rstrip()
