"""HumanEval: Python functions to write, judged by hidden tests (Chen et al. 2021).

A problem shows a function's signature and docstring.
"""

import ast
import re
import textwrap

from nanorl.tasks.files import load_rows, need_text
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
        self.rows = load_rows("humaneval", "test", "openai/openai_humaneval", check=check_row)

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


def check_row(row):
    """Raise ValueError for a row of a file that is no problem."""
    for name in ("prompt", "canonical_solution", "test", "entry_point"):
        need_text(row, name)


# ---- a completion -> its code --------------------------------------------------------------------

# A fence may open at the end of a line of words, and close at the end of a line of code.
FENCED = re.compile(
    r"^[^\n`]*```[^\n`]*\n(.*?)(?:^[ \t]*```|```[ \t]*$|\Z)", re.DOTALL | re.MULTILINE
)
MOST_LINES = 200  # of a body that words follow


def find_code(text, name):
    """A completion -> (what to put after the prompt, whether it was in a fence).

    It is the last fenced block that defines the function `name`: an outline or the question may
    come before it. What the other blocks import and define comes with it. Of a text without a fence
    it is the code, without the words around it.

    Code that does not define the function counts as the rest of the prompt's function. It is then
    the first block that can be one, or the whole text without a fence.
    """
    # Python allows this at the top of a program alone, and there stands the prompt.
    text = re.sub(r"^from __future__ import .*$", "", text, flags=re.MULTILINE)
    definition = re.compile(rf"^def {re.escape(name)}\b", re.MULTILINE)
    text = without_closing_fence(text, definition)
    blocks = [textwrap.dedent(block) for block in FENCED.findall(text)]

    for i in reversed(range(len(blocks))):
        if definition.search(blocks[i]):
            others = blocks[:i] + blocks[i + 1 :]
            return definitions(others, name) + blocks[i], True

    for i, block in enumerate(blocks):
        rest = rest_of_function(block)
        if rest:
            # The prompt's function is still open: what the others define comes after it.
            others = blocks[:i] + blocks[i + 1 :]
            return f"{rest}\n{definitions(others, name)}", True
    if blocks:
        return "", True

    if definition.search(text):
        return without_words(text), False
    return rest_of_function(text), False


def without_closing_fence(text, definition):
    """A text that goes on in the prompt's fence -> what stands before the end of the fence."""
    fence = re.search(r"```[ \t]*$", text, re.MULTILINE)
    if fence is None or text.find("```") < fence.start():
        return text
    before = text[: fence.start()]
    is_function = definition.search(before) and parsed(without_words(before))
    if is_function or is_body(rest_of_function(before)):
        return before
    return text


def definitions(blocks, name):
    """What blocks import and define, and their constants, but not the function `name`."""
    kinds = (ast.Import, ast.ImportFrom, ast.FunctionDef, ast.ClassDef)
    found = []
    for block in blocks:
        tree = parsed(block)
        for node in tree.body if tree else []:
            calls = any(isinstance(inner, ast.Call) for inner in ast.walk(node))
            is_constant = isinstance(node, ast.Assign) and not calls
            is_other = getattr(node, "name", "") != name
            if is_other and (is_constant or isinstance(node, kinds)):
                found.append(ast.unparse(node) + "\n")
    return "".join(found)


def parsed(code):
    """The code's syntax tree, or None where it is not Python. Nothing of it runs."""
    try:
        return ast.parse(code)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return None


def is_body(code):
    """Whether indented code can be all that follows a function's first line, with a return."""
    tree = parsed("def f():\n" + code)
    return tree is not None and len(tree.body) == 1 and returns(tree.body[0])


def returns(node):
    """Whether a function returns or yields something, not counting the functions inside it."""
    todo = [node]
    while todo:
        for child in ast.iter_child_nodes(todo.pop()):
            if isinstance(child, (ast.Return, ast.Yield, ast.YieldFrom)):
                return True
            if not isinstance(child, (ast.FunctionDef, ast.ClassDef, ast.Lambda)):
                todo.append(child)
    return False


def rest_of_function(code):
    """A function's body, however far it is indented -> the same, indented by 4 or more.

    "" where it is no body. Words may follow it.
    """
    code = code.strip("\n").rstrip()
    if re.match(r" {4}|\t", code):
        return body(code)

    # It is indented by 0 to 3, or its first line alone has lost its indentation.
    indented = textwrap.indent(textwrap.dedent(code), "    ")
    first_line_indented = body("    " + code.lstrip())
    first_lines = textwrap.indent(textwrap.dedent(body(code)), "    ")
    for candidate in (indented, first_lines, first_line_indented):
        if is_body(candidate):
            return candidate

    lines = indented.split("\n")[:MOST_LINES]
    for n in range(len(lines) - 1, 0, -1):
        candidate = "\n".join(lines[:n])
        if is_body(candidate):
            return candidate.rstrip()
    # It has no return, an error, or is cut off.
    return first_lines


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
