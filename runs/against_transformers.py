"""The same model, problems and prompts, greedy, by nanorl's engine and by transformers' generate: problem by problem.

    NANORL_DATA=... python runs/against_transformers.py --model=<a directory or hub id>

transformers tokenizes and renders the chats, generates in padded batches, decodes; both texts are judged by nanorl's task. In fp32 two correct
programs may still part where two tokens are within rounding of each other; such a pair of logits is shown. Ends with one JSON line."""

import json
import os
import sys
import time

import torch

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
from nanorl.engine import Engine  # noqa: E402
from nanorl.hf import load_model, local_model  # noqa: E402
from nanorl.runtime.config import configure  # noqa: E402
from nanorl.tasks import (  # noqa: E402
    get_task,
    is_correct,  # noqa: E402
    parse_settings,
)
from nanorl.tokenizer import Tokenizer  # noqa: E402

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
    judge = lambda problem, text, finished: finished and is_correct(source.reward(problem, text))

    tokenizer, net = Tokenizer.from_pretrained(path), load_model(path)
    begun = time.time()
    prompts = [tokenizer.render_prompt(p.prompt) for p in todo]
    ours = [
        group[0]
        for group in Engine(net).generate(prompts, 1, max_new_tokens, 0.0, tokenizer.stop_ids)
    ]
    our_seconds = time.time() - begun
    texts = [tokenizer.decode(c.ids[:-1] if c.finished else c.ids) for c in ours]

    theirs, their_tokenizer = (
        transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32),
        transformers.AutoTokenizer.from_pretrained(path),
    )
    their_prompts = [
        their_tokenizer.apply_chat_template(p.prompt, add_generation_prompt=True, return_dict=False)
        for p in todo
    ]
    same_prompts = sum(list(a) == b for a, b in zip(their_prompts, prompts))
    their_ids, begun = [None] * len(todo), time.time()
    order = sorted(range(len(todo)), key=lambda i: len(prompts[i]))
    for some in (order[i : i + batch] for i in range(0, len(order), batch)):
        longest = max(len(their_prompts[i]) for i in some)
        ids = torch.tensor(
            [[0] * (longest - len(their_prompts[i])) + list(their_prompts[i]) for i in some]
        )  # (batch, longest), padded on the left
        seen = torch.tensor(
            [[0] * (longest - len(their_prompts[i])) + [1] * len(their_prompts[i]) for i in some]
        )
        said = theirs.generate(
            ids,
            attention_mask=seen,
            max_new_tokens=max_new_tokens,
            do_sample=False,
            eos_token_id=tokenizer.stop_ids,
            pad_token_id=tokenizer.document_end,
        )
        for i, row in zip(some, said[:, longest:].tolist()):
            end = next((n + 1 for n, id in enumerate(row) if id in tokenizer.stop_ids), len(row))
            their_ids[i] = row[:end]
        print(
            f"transformers: {sum(x is not None for x in their_ids)} of {len(todo)}, {time.time() - begun:.0f} s",
            flush=True,
        )
    their_seconds = time.time() - begun

    right = {"nanorl": [], "transformers": []}
    for i, problem in enumerate(todo):
        finished = their_ids[i][-1] in tokenizer.stop_ids
        their_text = their_tokenizer.decode(their_ids[i][:-1] if finished else their_ids[i])
        right["nanorl"].append(judge(problem, texts[i], ours[i].finished))
        right["transformers"].append(judge(problem, their_text, finished))
        if their_ids[i] != ours[i].ids:
            at = next(n for n, (a, b) in enumerate(zip(ours[i].ids, their_ids[i])) if a != b)
            ids = torch.tensor([prompts[i] + ours[i].ids[:at]])
            with torch.no_grad():
                pair = [ours[i].ids[at], their_ids[i][at]]
                gaps = [
                    float(z[pair[0]] - z[pair[1]])
                    for z in (net(ids)[0, -1], theirs(ids).logits[0, -1])
                ]
            print(
                f"problem {i}: other tokens from place {at} on, where the two logits differ by {gaps[0]:.1e} (nanorl) and {gaps[1]:.1e} (transformers, without padding)"
            )
    differ = [i for i in range(len(todo)) if right["nanorl"][i] != right["transformers"][i]]
    print(
        json.dumps(
            dict(
                problems=len(todo),
                same_prompts=same_prompts,
                same_completions=sum(c.ids == t for c, t in zip(ours, their_ids)),
                correct={name: sum(found) for name, found in right.items()},
                judged_differently=differ,
                seconds=dict(nanorl=round(our_seconds, 1), transformers=round(their_seconds, 1)),
            )
        )
    )


if __name__ == "__main__":
    main()
