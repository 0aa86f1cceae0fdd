"""A task's own documents, as text for pretraining."""

VAL_ONE_IN = 50  # documents of which one validates
SURVEYED = 5000  # documents that the tokenizer is trained on, at most
CHATS = 500  # headers of chats that it sees besides, so that their words can be tokens


class TaskText:
    """At most one document a training problem. A source for tokens.tokenize.

    made_from: what the documents depend on.
    """

    def __init__(self, task, name, limit, made_from):
        if not hasattr(task, "document"):
            raise ValueError(
                f"task {name} has no document(): it cannot make text for pretraining; "
                "give it text with --data="
            )
        self.task, self.name, self.made_from = task, name, made_from
        self.n = min(limit, len(task))

    def survey(self):
        """-> (texts to train the tokenizer on, what is known of the documents)."""
        texts = [self.task.document(i) for i in range(min(self.n, SURVEYED))]
        for i in range(min(self.n, CHATS)):
            question = self.task.problem(i).prompt[-1]["content"]
            texts.append(f"user\n{question}assistant\n")
        return texts, {"name": self.name, "notes": []}

    def documents(self, _facts):
        """Yield (split, text)."""
        for i in range(self.n):
            validates = i % VAL_ONE_IN == VAL_ONE_IN - 1
            yield "val" if validates else "train", self.task.document(i)

    def first_texts(self):
        """Yield (text, share of all documents that it ends)."""
        for i in range(self.n):
            yield self.task.document(i), (i + 1) / self.n
