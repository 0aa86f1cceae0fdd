"""Multiple choice by likelihood: nanorl's log-probs of the labels against transformers'.

    NANORL_DATA=... python runs/choices_against_transformers.py --model=<a directory or hub id>

Both see the same prompts. Accuracy: transformers in fp32, a problem at a time, all problems. Time:
the first `timed` problems, in turns, both in `dtype`. nanorl takes all labels of all problems in
batched passes; transformers takes what one would write first, a forward pass of prompt and label
for each choice. A line of JSON a task.
"""

import os
import sys
import time

import torch

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
from nanorl.engine import Engine
from nanorl.evaluate.outcomes import by_likelihood
from nanorl.evaluate.statistics import summary
from nanorl.hf import load_model, local_model
from nanorl.runtime import dist
from nanorl.runtime.config import configure
from nanorl.runtime.log import to_json
from nanorl.tasks import get_task
from nanorl.tokenizer import Tokenizer

model = ""  # a model directory or hub id with a chat template
tasks = "arc_easy,arc_challenge,mmlu"  # their val splits
problems = 0  # the first so many; 0: all
timed = 40  # problems of the timing
dtype = "auto"  # of ours, and of both in the timing


def main():
    configure(globals())
    import transformers

    path = local_model(model)
    weight_dtype, compute_dtype = dist.dtypes(dtype, torch.device("cpu"))
    net, tokenizer = load_model(path, weight_dtype), Tokenizer.from_pretrained(path)
    net.compute_dtype = compute_dtype
    # transformers gives a probability to the rows that only pad the embedding. So do we here.
    net.config.n_tokens = net.config.vocab_size
    engine = Engine(net)

    load = transformers.AutoModelForCausalLM.from_pretrained
    exact = load(path, dtype=torch.float32).eval()
    alike = load(path, dtype=compute_dtype).eval()
    their_tokenizer = transformers.AutoTokenizer.from_pretrained(path)

    for name in tasks.split(","):
        task = get_task(name, split="val")
        n = min(problems or len(task), len(task))
        row = dict(task=name, n=n)
        row.update(compare(engine, tokenizer, exact, their_tokenizer, task, n))
        ratios = in_turns(engine, tokenizer, alike, their_tokenizer, task, min(timed, n))
        row["times_faster_than_a_pass_a_choice"] = [round(ratio, 2) for ratio in ratios]
        print(to_json(row), flush=True)


def compare(engine, tokenizer, their_net, their_tokenizer, task, n):
    """What both choose, how far their log-probs are apart, and how long each takes."""
    begun = time.time()
    ours = by_likelihood(engine, tokenizer, task, range(n))
    our_seconds = time.time() - begun
    begun = time.time()
    theirs = [at_once(their_net, their_tokenizer, task.problem(i)) for i in range(n)]
    their_seconds = time.time() - begun

    gaps = []  # a problem's largest
    right, their_right, same = 0, 0, 0
    for i, (outcome, logprobs) in enumerate(zip(ours, theirs)):
        labels = task.problem(i).meta["labels"]
        chosen = labels[logprobs.index(max(logprobs))]
        right += outcome["solved"][0]
        their_right += chosen == outcome["answer"]
        same += chosen == outcome["texts"][0]
        pairs = zip(outcome["logprobs"].values(), logprobs)
        gaps.append(max(abs(a - b) for a, b in pairs))

    row = dict(chance=round(summary(ours)["chance"], 4))
    row["ours"] = round(right / n, 4)
    row["transformers"] = round(their_right / n, 4)
    row["same_choice"] = round(same / n, 4)
    row["logprobs_differ_mean"] = round(sum(gaps) / n, 5)
    row["logprobs_differ_max"] = round(max(gaps), 5)
    row["our_seconds"] = round(our_seconds, 1)
    row["their_seconds_a_pass_a_problem"] = round(their_seconds, 1)
    return row


def in_turns(engine, tokenizer, their_net, their_tokenizer, task, n):
    """Three times: the seconds of a pass for each choice, over ours."""
    ratios = []
    for _ in range(3):
        begun = time.time()
        by_likelihood(engine, tokenizer, task, range(n))
        middle = time.time()
        for i in range(n):
            one_each(their_net, their_tokenizer, task.problem(i))
        ratios.append((time.time() - middle) / (middle - begun))
    return ratios


# ---- by transformers -----------------------------------------------------------------------------


@torch.inference_mode()
def at_once(net, tokenizer, problem):
    """The log-probs of a problem's labels, by one forward pass."""
    ids = torch.tensor([render(tokenizer, problem)])  # (1, T)
    logits = net(ids).logits[0, -1]  # (V,)
    return logits.float().log_softmax(-1)[label_ids(tokenizer, problem)].tolist()


@torch.inference_mode()
def one_each(net, tokenizer, problem):
    """The same, by a pass for each choice."""
    prompt = render(tokenizer, problem)
    found = []
    for label in label_ids(tokenizer, problem):
        ids = torch.tensor([[*prompt, label]])  # (1, T + 1)
        logits = net(ids).logits[0, -2]  # (V,)
        found.append(float(logits.float().log_softmax(-1)[label]))
    return found


def render(tokenizer, problem):
    """A problem's prompt, a list of ids."""
    options = dict(add_generation_prompt=True, return_dict=False)
    return list(tokenizer.apply_chat_template(problem.prompt, **options))


def label_ids(tokenizer, problem):
    """The token of each label."""
    labels = problem.meta["labels"]
    return [tokenizer.encode(label, add_special_tokens=False)[0] for label in labels]


if __name__ == "__main__":
    main()
