"""Other forms of the same problems, for models that were not fine-tuned on nanorl's '#' answers.

--task_args='template=r1' or 'template=plain':

    r1     A system message asks for <think>2 + 2 = 4</think><answer>4</answer>, which is
           DeepSeek-R1's form (Guo et al. 2025). Between <answer> and </answer> stands the answer
           and nothing else, but for a unit or a full stop.
    plain  The question alone. The answer is the last number of what is said (comparison: the last
           yes or no).

A template only finds the answer in the text. Whether it is right is judged by the task.
"""

import re

from nanorl.tasks.answers import last_answer, only_answer
from nanorl.tasks.problem import Problem, Reward, one_of, think_and_answer

TEMPLATES = ("r1", "plain")
SYSTEM = (
    "Think before you answer. Write your reasoning between <think> and </think>, "
    "and after it nothing but the final answer between <answer> and </answer>, "
    "as in: <think>reasoning</think><answer>answer</answer>"
)


class Templated:
    """A task whose answers follow a `marker`, in the form of one of TEMPLATES.

    format_weight: with r1, the share of a right answer's reward that the form alone earns.

    A reward's parts are the task's own (answered: an answer is found; correct) and format: the form
    is kept. Raises ValueError for settings that do not fit.
    """

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
        self.task, self.template = task, template
        self.format_weight = float(format_weight) if template == "r1" else 0.0
        self.timeout = getattr(task, "timeout", 0)
        # A task that has no solutions has none in another form.
        if hasattr(task, "solution"):
            self.solution = self._solution

    def __len__(self):
        return len(self.task)

    def problem(self, index):
        problem = self.task.problem(index)
        if self.template == "plain":
            return problem
        system = {"role": "system", "content": SYSTEM}
        return Problem([system] + problem.prompt, problem.answer, problem.meta)

    def _solution(self, problem):
        working, _, answer = self.task.solution(problem).rpartition(self.task.marker)
        working, answer = working.strip(), answer.strip()
        if self.template == "r1":
            return f"<think>{working}</think><answer>{answer}</answer>"
        return f"{working}\nThe answer is {answer}.".strip()

    def reward(self, problem, completion):
        # Find the answer. A task whose answers are no numbers says which words they are.
        words = getattr(self.task, "answer_words", None)
        if self.template == "r1":
            well_formed, answer = think_and_answer(completion)
            answer = only_answer(answer or "", words)
        else:
            well_formed, answer = True, last_answer(completion, words)

        # The task judges it in its own form, after its marker.
        result = self.task.reward(problem, self.task.marker + answer if answer else "")
        total = self.format_weight * well_formed + (1 - self.format_weight) * result.total
        return Reward(total, {**result.parts, "format": float(well_formed)})
