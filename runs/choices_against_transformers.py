"""Multiple choice by likelihood: accuracy of nanorl's and of transformers' log-probs of the labels on the same prompts, and how long each takes.

    NANORL_DATA=... python runs/choices_against_transformers.py --model=<a directory or hub id>

Accuracy: transformers in fp32, a problem at a time, all problems. Time: the first `timed` problems in turns, both in `dtype`: all labels of all problems in
batched passes, and, as one would first write it, a forward pass of prompt + label for each choice. Ends with one JSON line a task."""

import json
import os
import sys
import time

import torch

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
from nanorl.engine import Engine  # noqa: E402
from nanorl.evaluate.outcomes import by_likelihood  # noqa: E402
from nanorl.evaluate.statistics import summary  # noqa: E402
from nanorl.hf import load_model, local_model  # noqa: E402
from nanorl.runtime import dist  # noqa: E402
from nanorl.runtime.config import configure  # noqa: E402
from nanorl.tasks import get_task  # noqa: E402
from nanorl.tokenizer import Tokenizer  # noqa: E402

model = ""  # a model directory or hub id with a chat template
tasks = "arc_easy,arc_challenge,mmlu"  # their val splits
problems = 0  # the first so many; 0: all
timed = 40  # problems of the timing
dtype = "auto"  # of ours, and of both in the timing


def main():
    configure(globals())
    import transformers

    path = local_model(model)
    weights, activations = dist.dtypes(dtype, torch.device("cpu"))
    net, tokenizer = load_model(path, weights), Tokenizer.from_pretrained(path)
    net.compute_dtype = activations
    engine = Engine(net)
    exact = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    alike = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=activations).eval()
    their_tokenizer = transformers.AutoTokenizer.from_pretrained(path)
    render = lambda problem: list(
        their_tokenizer.apply_chat_template(
            problem.prompt, add_generation_prompt=True, return_dict=False
        )
    )
    label_ids = lambda problem: [
        their_tokenizer.encode(label, add_special_tokens=False)[0]
        for label in problem.meta["labels"]
    ]

    @torch.inference_mode()
    def at_once(net, problem):
        """-> log-probs of the labels, one forward pass."""
        return (
            net(torch.tensor([render(problem)]))
            .logits[0, -1]
            .float()
            .log_softmax(-1)[label_ids(problem)]
            .tolist()
        )

    @torch.inference_mode()
    def one_each(net, problem):
        """-> the same, a pass for each choice."""
        prompt = render(problem)
        return [
            float(net(torch.tensor([prompt + [id]])).logits[0, -2].float().log_softmax(-1)[id])
            for id in label_ids(problem)
        ]

    for name in tasks.split(","):
        task = get_task(name, split="val")
        n = min(problems or len(task), len(task))
        begun = time.time()
        ours = by_likelihood(engine, tokenizer, task, range(n))
        our_seconds = time.time() - begun
        begun = time.time()
        theirs = [at_once(exact, task.problem(i)) for i in range(n)]
        their_seconds = time.time() - begun
        chosen = [task.problem(i).meta["labels"][p.index(max(p))] for i, p in enumerate(theirs)]
        gaps = [
            max(abs(a - b) for a, b in zip(o["logprobs"].values(), p)) for o, p in zip(ours, theirs)
        ]
        ratios = []
        for _ in range(3):
            begun = time.time()
            by_likelihood(engine, tokenizer, task, range(min(timed, n)))
            middle = time.time()
            for i in range(min(timed, n)):
                one_each(alike, task.problem(i))
            ratios.append((time.time() - middle) / (middle - begun))
        print(
            json.dumps(
                dict(
                    task=name,
                    n=n,
                    chance=round(summary(ours)["chance"], 4),
                    ours=round(sum(o["solved"][0] for o in ours) / n, 4),
                    transformers=round(sum(c == o["answer"] for c, o in zip(chosen, ours)) / n, 4),
                    same_choice=round(sum(c == o["texts"][0] for c, o in zip(chosen, ours)) / n, 4),
                    logprobs_differ_mean=round(sum(gaps) / n, 5),
                    logprobs_differ_max=round(max(gaps), 5),
                    our_seconds=round(our_seconds, 1),
                    their_seconds_a_pass_a_problem=round(their_seconds, 1),
                    times_faster_than_a_pass_a_choice=[round(r, 2) for r in ratios],
                )
            ),
            flush=True,
        )


if __name__ == "__main__":
    main()
