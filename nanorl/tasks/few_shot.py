"""Solved problems before the one that is asked (eval.py --shots)."""

from dataclasses import replace


class FewShot:
    """A task whose every prompt begins with solved problems, as turns of a chat.

    task: what is asked. source: another split of it, from which the solved problems come. shots:
    how many are shown. They are the first of the source, of the same subject where the problems
    have one, and never the problem itself.

    Raises ValueError where there is no solution() to show, and where there are too few problems.
    """

    def __init__(self, task, source, shots):
        if not hasattr(source, "solution"):
            raise ValueError(f"--shots={shots}: this task has no solution() to show")
        self.task, self.source, self.shots = task, source, shots
        self.solved = {}  # subject -> (prompt, turns) pairs

    def __len__(self):
        return len(self.task)

    def __getattr__(self, name):
        """reward, timeout and whatever else the task has."""
        return getattr(self.task, name)

    def problem(self, index):
        problem = self.task.problem(index)
        subject = problem.meta.get("subject", "")
        if subject not in self.solved:
            self.solved[subject] = self._first_solved(subject)

        others = [turns for prompt, turns in self.solved[subject] if prompt != problem.prompt]
        others = others[: self.shots]
        if len(others) < self.shots:
            of_subject = f" of {subject}" if subject else ""
            raise ValueError(
                f"--shots={self.shots}: "
                f"there are only {len(others)} solved problems to show{of_subject}"
            )
        before = [turn for turns in others for turn in turns]
        return replace(problem, prompt=before + problem.prompt)

    def _first_solved(self, subject):
        """The source's first problems of a subject, solved -> (prompt, turns) pairs.

        They are one more than is shown, since one of them may be the problem that is asked.
        """
        solved = []
        for i in range(len(self.source)):
            problem = self.source.problem(i)
            if problem.meta.get("subject", "") != subject:
                continue
            answer = {"role": "assistant", "content": self.source.solution(problem)}
            solved.append((problem.prompt, [*problem.prompt, answer]))
            if len(solved) > self.shots:
                break
        return solved
