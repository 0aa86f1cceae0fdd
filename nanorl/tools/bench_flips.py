"""How often rounding flips a token: `python -m nanorl.tools.bench flips --model=<a trained one>`.

The last bits of the logits change with the batch's shape, and a token may flip. The same samples
are drawn twice: with all rows together, and with fewer row slots than there are rows. A flip forks
the completion: all that follows is another text.
"""

import torch

from nanorl.engine import Engine
from nanorl.hf import load_model
from nanorl.rollout import prompt_key
from nanorl.runtime import dist
from nanorl.runtime.checkpoint import resolve
from nanorl.tasks import get_task
from nanorl.tokenizer import Tokenizer

DTYPES = {"fp64": torch.float64, "fp32": torch.float32, "bf16": torch.bfloat16}


def measure_flips(options):
    """{precision: how many completions fork, after how many equal tokens, ...}.

    options: bench.py's constants.
    """
    device = dist.setup(options.device)
    directory = resolve(options.model)
    exact = load_model(directory, torch.float64, device)
    tokenizer = Tokenizer.from_pretrained(directory)
    source = get_task(options.task, split="val")
    problems = [source.problem(i) for i in range(options.prompts)]
    prompts = [tokenizer.render_prompt(problem.prompt) for problem in problems]

    found = {}
    for name, dtype in DTYPES.items():
        net = exact
        if dtype != torch.float64:
            net = load_model(directory, torch.float32, device)
        net.compute_dtype = dtype
        together = draw(net, 0, prompts, tokenizer.stop_ids, options)
        in_fewer_slots = draw(net, 3 * options.samples, prompts, tokenizer.stop_ids, options)
        found[name] = compare(together, in_fewer_slots)
    return found


def draw(net, max_rows, prompts, stop_ids, options):
    """The completions of all prompts, decoded in at most so many row slots (0: all together)."""
    keys = [prompt_key(0, "flips", i) for i in range(len(prompts))]
    groups = Engine(net, max_rows).generate(
        prompts,
        options.samples,
        options.new_tokens,
        stop_ids=stop_ids,
        keys=keys,
    )
    return [completion for group in groups for completion in group]


def compare(completions, others):
    """Where two lists of the same samples part, and how far their log-probs are apart before it."""
    forks = 0
    tokens = 0
    gaps = []
    for a, b in zip(completions, others):
        equal = equal_tokens(a.ids, b.ids)
        tokens += equal
        if equal < len(a.ids):
            forks += 1
        for x, y in zip(a.logprobs[:equal], b.logprobs):
            gaps.append(abs(x - y))
    return dict(
        completions=len(completions),
        forks=forks,
        tokens=tokens,
        per_token=forks / tokens,
        logprob_max=max(gaps),
    )


def equal_tokens(ids, others):
    """How many tokens come before the first that differs."""
    for i, (x, y) in enumerate(zip(ids, others)):
        if x != y:
            return i
    return len(ids)
