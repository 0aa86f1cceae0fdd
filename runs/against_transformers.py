"""nanorl's engine against transformers' generate: the same model, problems and prompts, greedy.

    NANORL_DATA=... python runs/against_transformers.py --model=<a directory or hub id>

transformers tokenizes and renders the chats, generates in padded batches, and decodes. The texts of
both are judged by nanorl's task, problem by problem. In fp32 two correct programs may still part
where two tokens are within rounding of each other. Such a pair of logits is shown. The last line is
JSON.
"""

import os
import sys
import time

import torch

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
from nanorl.engine import Engine
from nanorl.hf import load_model, local_model
from nanorl.runtime.config import configure
from nanorl.runtime.log import to_json
from nanorl.tasks import get_task, is_correct, parse_settings
from nanorl.tokenizer import Tokenizer

model = ""  # a model directory or hub id with a chat template
task = "gsm8k"  # its val split
task_args = "template=plain"  # the task's settings
problems = 200  # the first so many
max_new_tokens = 200  # a completion is cut off here
batch = 40  # problems that transformers generates for at a time, of like length


def main():
    configure(globals())
    import transformers

    path = local_model(model)
    source = get_task(task, split="val", **parse_settings(task_args))
    todo = [source.problem(i) for i in range(min(problems, len(source)))]

    # By nanorl.
    tokenizer, net = Tokenizer.from_pretrained(path), load_model(path)
    begun = time.time()
    prompts = [tokenizer.render_prompt(problem.prompt) for problem in todo]
    groups = Engine(net).generate(prompts, 1, max_new_tokens, 0.0, tokenizer.stop_ids)
    ours = [group[0].ids for group in groups]
    our_seconds = time.time() - begun

    # By transformers.
    their_net = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    their_tokenizer = transformers.AutoTokenizer.from_pretrained(path)
    their_prompts = [render(their_tokenizer, problem) for problem in todo]
    begun = time.time()
    order = sorted(range(len(todo)), key=lambda i: len(prompts[i]))
    theirs = generate(their_net, tokenizer, their_prompts, order)
    their_seconds = time.time() - begun

    # Which are right, and where the two part.
    our_right = judge(source, todo, ours, tokenizer, tokenizer.stop_ids)
    their_right = judge(source, todo, theirs, their_tokenizer, tokenizer.stop_ids)
    forks, judged_differently = [], []
    for i in range(len(todo)):
        if ours[i] != theirs[i]:
            forks.append(i)
            show_fork(i, prompts[i], ours[i], theirs[i], net, their_net)
        if our_right[i] != their_right[i]:
            judged_differently.append(i)

    seconds = dict(nanorl=round(our_seconds, 1), transformers=round(their_seconds, 1))
    found = dict(
        problems=len(todo),
        same_prompts=sum(a == b for a, b in zip(their_prompts, prompts)),
        same_completions=len(todo) - len(forks),
        correct=dict(nanorl=sum(our_right), transformers=sum(their_right)),
        judged_differently=judged_differently,
        seconds=seconds,
    )
    print(to_json(found))


def render(tokenizer, problem):
    """A problem's prompt as transformers has it, a list of ids."""
    options = dict(add_generation_prompt=True, return_dict=False)
    return list(tokenizer.apply_chat_template(problem.prompt, **options))


def generate(net, tokenizer, prompts, order):
    """Greedy completions of the prompts (lists of ids) by transformers, lists of ids.

    `order` says which come together. A completion's stop token, if it has one, is kept.
    """
    found = [None] * len(prompts)
    begun = time.time()
    for start in range(0, len(order), batch):
        some = order[start : start + batch]

        # One rectangle, padded on the left.
        longest = max(len(prompts[i]) for i in some)
        ids, mask = [], []
        for i in some:
            padding = [0] * (longest - len(prompts[i]))
            ids.append(padding + prompts[i])
            mask.append(padding + [1] * len(prompts[i]))
        output = net.generate(
            torch.tensor(ids),  # (batch, longest)
            attention_mask=torch.tensor(mask),
            max_new_tokens=max_new_tokens,
            do_sample=False,
            eos_token_id=tokenizer.stop_ids,
            pad_token_id=tokenizer.document_end,
        )
        for i, row in zip(some, output[:, longest:].tolist()):
            found[i] = up_to_stop(row, tokenizer.stop_ids)

        done = sum(completion is not None for completion in found)
        print(f"transformers: {done} of {len(prompts)}, {time.time() - begun:.0f} s", flush=True)
    return found


def up_to_stop(ids, stop_ids):
    for n, token in enumerate(ids):
        if token in stop_ids:
            return ids[: n + 1]
    return ids


def judge(source, problems, completions, tokenizer, stop_ids):
    """A bool a problem: is its completion, a list of ids, finished and right?"""
    right = []
    for problem, ids in zip(problems, completions):
        finished = ids[-1] in stop_ids
        text = tokenizer.decode(ids[:-1] if finished else ids)
        right.append(finished and is_correct(source.reward(problem, text)))
    return right


@torch.no_grad()
def show_fork(i, prompt, ours, theirs, net, their_net):
    """Where two completions of problem i part, and how near its two tokens are in each model."""
    at = next(n for n, (a, b) in enumerate(zip(ours, theirs)) if a != b)
    ids = torch.tensor([prompt + ours[:at]])  # (1, T)
    logits = net(ids)[0, -1]  # (V,)
    their_logits = their_net(ids).logits[0, -1]  # (V,)
    gap = float(logits[ours[at]] - logits[theirs[at]])
    their_gap = float(their_logits[ours[at]] - their_logits[theirs[at]])
    print(
        f"problem {i}: other tokens from place {at} on, where the two logits differ by "
        f"{gap:.1e} (nanorl) and {their_gap:.1e} (transformers, without padding)"
    )


if __name__ == "__main__":
    main()
