"""A task's worked answers, as conversations for SFT."""


class Demonstrations:
    """examples[i] -> (ids, mask) of training problem i and its solution, by render_chat."""

    def __init__(self, task, tokenizer, name):
        if not hasattr(task, "solution"):
            raise ValueError(
                f"task {name} has no solution(): it cannot make demonstrations; "
                "give it conversations with --data="
            )
        self.task, self.tokenizer = task, tokenizer

    def __len__(self):
        return len(self.task)

    def __getitem__(self, i):
        problem = self.task.problem(i)
        answer = {"role": "assistant", "content": self.task.solution(problem)}
        return self.tokenizer.render_chat(problem.prompt + [answer])
