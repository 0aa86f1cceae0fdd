"""Other forms of the same problems, for models that were not fine-tuned on nanorl's own '#' answers: --task_args='template=r1'.

    r1     <think>2 + 2 = 4</think><answer>4</answer>, asked for in a system message (DeepSeek-R1's form; Guo et al. 2025)
    plain  the question alone; the answer is the last number of what is said (comparison: the last yes or no)

Between <answer> and </answer> stands the answer and nothing else, but for a unit or a full stop.

What is right is judged by the task; a template only finds the answer in the text."""

import re

from nanorl.tasks.answers import last_answer, only_answer
from nanorl.tasks.problem import Problem, Reward, one_of, think_and_answer

TEMPLATES = ("r1", "plain")
SYSTEM = (
    "Think before you answer. Write your reasoning between <think> and </think>, and after it nothing but the final answer "
    "between <answer> and </answer>, as in: <think>reasoning</think><answer>answer</answer>"
)


class Templated:
    """A task whose answers follow a `marker`, in one of TEMPLATES. format_weight: with r1, the share of a right answer's reward that the form alone
    earns. Parts: format (the form is kept), answered (an answer is found), correct."""

    def __init__(self, task, template, format_weight="0.1"):
        one_of("template", template, TEMPLATES)
        if template == "plain" and format_weight != "0.1":
            raise ValueError(
                f"format_weight is {format_weight!r}: only template=r1 has a form to reward"
            )
        if not re.fullmatch(r"0|0?\.\d+", str(format_weight)):
            raise ValueError(
                f"format_weight is {format_weight!r}: it must be a share below 1, such as 0.1"
            )
        self.task, self.template, self.timeout = task, template, getattr(task, "timeout", 0)
        if hasattr(task, "solution"):
            self.solution = self._solution
        self.format_weight = float(format_weight) if template == "r1" else 0.0

    def __len__(self):
        return len(self.task)

    def problem(self, index):
        p = self.task.problem(index)
        return (
            Problem([{"role": "system", "content": SYSTEM}] + p.prompt, p.answer, p.meta)
            if self.template == "r1"
            else p
        )

    def _solution(self, problem):
        worked, _, answer = self.task.solution(problem).rpartition(self.task.marker)
        worked, answer = worked.strip(), answer.strip()
        return (
            f"<think>{worked}</think><answer>{answer}</answer>"
            if self.template == "r1"
            else f"{worked}\nThe answer is {answer}.".strip()
        )

    def reward(self, problem, completion):
        words = getattr(
            self.task, "answer_words", None
        )  # a task whose answers are no numbers says which words they are
        if self.template == "r1":
            well_formed, answer = think_and_answer(completion)
            answer = only_answer(answer or "", words)
        else:
            well_formed, answer = True, last_answer(completion, words)
        judged = self.task.reward(problem, self.task.marker + answer if answer else "")
        total = self.format_weight * well_formed + (1 - self.format_weight) * judged.total
        return Reward(total, {**judged.parts, "format": float(well_formed)})
