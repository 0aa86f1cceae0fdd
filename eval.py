"""Evaluation: greedy accuracy and unbiased pass@k on held-out problems, with 95% intervals.

    python eval.py --model=out/d4/rl                                # the newest checkpoint of a stage, or any model directory
    python eval.py --compare=out/d4/sft,out/d4/rl                   # two models on the same problems: is the second better?
    python eval.py --model=out/d4/sft --task=all                    # every built-in task: where can RL learn something?
    python eval.py --show=out/d4/rl --step=12                       # read what the model wrote in a step of RL
    torchrun --nproc_per_node=8 eval.py --model=out/d20/rl --task=gsm8k --problems=0

Writes <model>/eval/<task>.<split>.jsonl (one outcome a problem, to be judged again) and <task>.<split>.json; of two models
also compare.<task>.<split>.json, with the second; of all tasks all.<split>.json alone."""
import json
import os
import re
import time

import torch
from tqdm import tqdm

from nanorl import evaluate
from nanorl.engine import Engine
from nanorl.hf import load_model, local_model
from nanorl.runtime import checkpoint, dist
from nanorl.runtime.config import at_least, configure
from nanorl.tasks import TASKS, get_task, parse_settings
from nanorl.tasks.problem import check_split
from nanorl.tokenizer import Tokenizer
from nanorl.tools.show import lines as rollout_lines

model = ""  # a model directory, a stage's, whose newest checkpoint is meant, or a hub id; empty: out/d<depth>/rl
compare = ""  # A,B: two such directories, in place of --model
depth = 4  # names the run's folder when --model is empty
task = "sum3"  # one of nanorl/tasks, path.py:Class, or a mixture 'sum3=50,counting=50'; all: every built-in task, sampled
task_args = ""  # the task's settings, 'name=value; name=value'
split = "val"  # val to choose by, test for final numbers
problems = 1000  # the first so many, greedy; 0: all
samples = 8  # samples a problem for pass@k; 0: greedy only
sample_problems = 200  # problems that are sampled; 0: all
temperature = 1.0  # of those samples
max_new_tokens = 64  # a completion is cut off here
seed = 0  # fixes the samples
device = "auto"  # auto, cpu, cuda
dtype = "auto"  # activations: auto, fp32, bf16, fp64
device_rows = 0  # most rows decoded at once on one device; 0: what half the free memory holds
examples = 3  # completions to print
# ---- or read
show = ""  # an RL run's folder: print its rollouts, and do nothing else
step = 0  # of this step; 0: the last
prompt = -1  # and only of the prompt with this number


def main():
    settings = configure(globals())
    check_settings()
    if show:
        print(*rollout_lines(show, step, prompt), sep="\n")
        return
    place = dist.setup(device)
    names = compare.split(",") if compare else [model or checkpoint.stage_directory(f"d{depth}", "rl")]
    paths = [model_directory(name) for name in names]
    if task == "all":
        survey(paths[0], place, settings)
        return
    source = together(lambda: get_task(task, split=split, **parse_settings(task_args)))
    dist.say(evaluate.what_n_shows(min(problems or len(source), len(source)), bool(compare)))
    results = []
    for path in paths:  # one after the other: never two models in memory
        results.append(evaluate_model(path, source, place))
        if dist.is_main():
            report(path, *results[-1], settings)
    if compare and dist.is_main():
        report_difference(paths, results, settings)


def check_settings():
    at_least(globals(), 1, "max_new_tokens")
    at_least(globals(), 0, "problems samples sample_problems device_rows temperature examples step")
    at_least(globals(), -1, "prompt")
    if compare and (compare.count(",") != 1 or not all(compare.split(","))):
        raise SystemExit(f"--compare={compare}: it takes two model directories, --compare=A,B")
    if compare and (model or task == "all"):
        raise SystemExit(f"--compare={compare} with {f'--model={model}' if model else '--task=all'}: give one of the two")
    if task == "all" and task_args:
        raise SystemExit(f"--task_args={task_args}: settings are one task's, --task=all runs every task as it is")
    if task == "all" and (samples < 2 or temperature == 0):
        raise SystemExit(f"--samples={samples} --temperature={temperature:g}: --task=all needs at least 2 samples, and a temperature above 0")


def model_directory(name):
    path = local_model(checkpoint.resolve(name))
    if not checkpoint.is_model(path):
        raise ValueError(f"no model in {path}: name a model directory or a stage's with {'--compare=A,B' if compare else '--model='}")
    return path


def together(work):
    """work() on every rank -> its value. A ValueError on one rank is raised on all, so that none waits for another."""
    value, trouble = None, []
    try:
        value = work()
    except ValueError as error:
        trouble = [str(error)]
    trouble = dist.broadcast(dist.gather(trouble))
    if trouble:
        raise ValueError(trouble[0])
    return value


def load(path, place):
    """A model directory -> (Engine, Tokenizer)."""
    torch.cuda.empty_cache()  # what a model before it has left with the allocator would count as taken
    weight_dtype, compute_dtype = dist.dtypes(dtype, place)
    policy = load_model(path, weight_dtype, place)
    policy.compute_dtype = compute_dtype
    engine = Engine(policy)
    engine.max_rows = device_rows or max(samples, 1, int(dist.free_memory(place) // 2 // engine.bytes_per_row(max_new_tokens)))
    return engine, Tokenizer.from_pretrained(path)


def sample(engine, tokenizer, source, n, samples, temperature, name):
    """Outcomes of the first n problems (0: all), each rank its share; all of them on the first rank."""
    n = min(n or len(source), len(source))
    mine = range(n)[dist.share(n)]
    with tqdm(total=len(mine) * samples, desc=name, disable=None, leave=False) as bar:
        work = lambda: evaluate.outcomes(engine, tokenizer, source, mine, samples, max_new_tokens, temperature, seed, bar.update)
        return dist.gather(together(work))


def evaluate_model(path, source, place):
    """One model on one task -> greedy outcomes, sampled outcomes, seconds."""
    engine, tokenizer = load(path, place)
    begun = time.time()
    greedy = sample(engine, tokenizer, source, problems, 1, 0.0, "greedy")
    sampled = sample(engine, tokenizer, source, sample_problems, samples, temperature, "samples") if samples else []
    return greedy, sampled, time.time() - begun


def report(path, greedy, sampled, seconds, settings):
    result = dict(model=path, task=task, task_args=task_args, split=split, **evaluate.summary(greedy), seconds=seconds, settings=settings)
    print(f"{path}  {task} {split}, {seconds:.1f} s", *block("greedy", evaluate.describe(result)), sep="\n")
    if sampled:
        result["sampled"] = evaluate.summary(sampled, [k for k in (1, 2, 4, 8, 16, 32, 64) if k <= samples])
        print(*block("sampled", evaluate.describe(result["sampled"], f" at temperature {temperature:g}")), sep="\n")
    for o in greedy[:examples]:
        print(f"  {o['prompt'][-1]['content']!r} -> {o['texts'][0]!r}  (answer {o['answer']}, reward {o['rewards'][0]:g})")
    records = [{"temperature": t, **o} for t, some in ((0.0, greedy), (temperature, sampled)) for o in some]
    write(path, f"{task}.{split}.jsonl", "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records))
    write(path, f"{task}.{split}.json", json.dumps(result, indent=2))


def report_difference(paths, results, settings):
    found = dict(a=paths[0], b=paths[1], task=task, task_args=task_args, split=split)
    print(f"A {paths[0]}\nB {paths[1]}")
    (greedy_a, sampled_a, _), (greedy_b, sampled_b, _) = results
    for kind, a, b in (("greedy", greedy_a, greedy_b), ("sampled", sampled_a, sampled_b)):
        if a:
            found[kind] = evaluate.compare(a, b)
            print(*block(kind, evaluate.describe_difference(found[kind])), sep="\n")
    write(paths[1], f"compare.{task}.{split}.json", json.dumps({**found, "settings": settings}, indent=2))


def survey(path, place, settings):
    """Every built-in task, sampled: where RL has something to learn from."""
    check_split(split)
    engine, tokenizer = load(path, place)
    rows, skipped = {}, {}
    for name in [name for name in TASKS if name != "arithmetic"]:  # that is its default preset, sum3
        try:
            source = together(lambda: get_task(name, split=split))
            results = sample(engine, tokenizer, source, sample_problems, samples, temperature, name)
        except ValueError as error:  # no files, or prompts that do not fit the context
            skipped[name] = str(error)
            dist.say(f"{name}  skipped: {error}")
            continue
        if dist.is_main():
            row = dict(**evaluate.summary(results, (samples,)), dead=evaluate.dead_groups(results, samples))
            rows[name] = dict(**row, verdict=evaluate.verdict(row))
    if dist.is_main():
        rows = dict(sorted(rows.items(), key=lambda item: item[1]["dead"]))
        print(f"{path}  {split}, {sample_problems or 'all'} problems a task x {samples} at temperature {temperature:g}")
        print(*evaluate.survey_table(rows, samples), sep="\n")
        result = dict(model=path, split=split, tasks=rows, skipped=skipped, settings=settings)
        write(path, f"all.{split}.json", json.dumps(result, indent=2))


def block(label, lines):
    return [f"  {text:7}  {line}" for text, line in zip([label] + [""] * len(lines), lines)]


def write(path, name, text):
    """<model>/eval/<name>, where a task's name may hold what a file's may not. What is in the hub's cache is not ours to write in: such a model's
    results go to out/<owner>--<model>/eval."""
    cached = re.search(r"models--([^/]+)/snapshots/", path)
    folder = checkpoint.stage_directory(cached[1], "eval") if cached else os.path.join(path, "eval")
    os.makedirs(folder, exist_ok=True)
    with open(os.path.join(folder, re.sub(r"[^A-Za-z0-9._=,@-]", "_", name)), "w", encoding="utf-8") as f:
        f.write(text)


if __name__ == "__main__":
    dist.run(main)
