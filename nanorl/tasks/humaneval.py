"""HumanEval: Python functions to write from their signature and docstring, judged by hidden tests (Chen et al. 2021)."""

import re
import textwrap

from nanorl.tasks.files import load_rows
from nanorl.tasks.problem import Problem, judged, one_of
from nanorl.tasks.sandbox import run

YES, NO = ("true", "yes", "1"), ("false", "no", "0")  # settings come from the command line as words


class HumanEval:
    """Only split `test`. Reward 1 for a function that passes the tests, else 0. Parts: format (the code is in a fence), answered (there is code), correct."""

    timeout = 30.0  # rewards run in worker processes, side by side; each run's own limit is sandbox.run's 10 seconds

    def __init__(self, split="test", allow_code=False):
        if split != "test":
            raise ValueError(f"split is {split!r}: humaneval has one split, --split=test")
        one_of("allow_code", str(allow_code).lower(), YES + NO)
        if str(allow_code).lower() in NO:
            raise ValueError(
                "humaneval runs code that the model writes: --allow_code in eval.py (elsewhere --task_args='allow_code=true') permits it, inside "
                "nanorl/tasks/sandbox.py, which is a guard and not a jail"
            )
        self.rows = load_rows("humaneval", "test", "openai/openai_humaneval")

    def __len__(self):
        return len(self.rows)

    def problem(self, index):
        row = self.rows[index]
        question = f"Complete this Python function. Answer with the whole function in a ```python block.\n\n```python\n{row['prompt'].strip()}\n```"
        return Problem(
            [{"role": "user", "content": question}],
            row["entry_point"],
            {key: row[key] for key in ("prompt", "canonical_solution", "test")},
        )

    def solution(self, problem):
        return f"```python\n{(problem.meta['prompt'] + problem.meta['canonical_solution']).strip()}\n```"

    def reward(self, problem, completion):
        code, fenced = find_code(completion, problem.answer)
        prompt = problem.meta["prompt"]
        # The prompt comes first: its imports and helper functions are the program's, and the tests may use them too.
        correct = (
            bool(code)
            and run(
                f"{prompt}\n{code}\n", problem.answer, problem.meta["test"], helpers=prompt
            ).passed
        )
        return judged(correct, format=fenced, answered=bool(code))


def find_code(text, name):
    """A completion -> (what to put after the prompt, whether it was in a fence): the last fenced block that defines the function (an outline or the question may
    come before), else the first block, else the whole text. Code that does not define the function is the rest of the prompt's: see body(). Of a text
    without a fence, the words before and after the code are left out."""
    blocks = re.findall(
        r"^[ \t]*```[^\n`]*\n(.*?)(?:^[ \t]*```|\Z)", text, re.DOTALL | re.MULTILINE
    )
    defines = re.compile(rf"^def {re.escape(name)}\b", re.MULTILINE)
    code = next(
        filter(defines.search, map(textwrap.dedent, reversed(blocks))),
        blocks[0] if blocks else text,
    )
    if not defines.search(code):
        return textwrap.indent(code, "    ") if blocks and re.search(
            r"^return\b", code, re.MULTILINE
        ) else body(code), bool(blocks)
    return code if blocks else without_words(code), bool(blocks)


CODE = re.compile(
    r"(import|from|def|async|class|if|elif|else|for|while|try|except|finally|with)\b|[@#)\]}]|\w+\s*[=(\[.]"
)  # how a line of code begins at column 0


def without_words(text):
    """From the first line that imports or defines something up to the next line at column 0 that does not begin as code does."""
    lines = text.split("\n")
    lines = lines[
        next(i for i, line in enumerate(lines) if re.match(r"(import|from|def|class)\b|@", line)) :
    ]
    end = next(
        (i for i, line in enumerate(lines) if re.match(r"\S", line) and not CODE.match(line)),
        len(lines),
    )
    return "\n".join(lines[:end])


def body(code):
    """The lines up to the first at column 0 that is not a closing bracket: there a base model has gone on to something else."""
    lines = code.strip("\n").split("\n")
    end = next((i for i, line in enumerate(lines) if re.match(r"[^\s)\]}]", line)), len(lines))
    return "\n".join(lines[:end]).rstrip()
