"""Evaluation: greedy accuracy and unbiased pass@k on held-out problems, with 95% intervals.

    python eval.py --model=out/d4/rl                                # the newest checkpoint of a stage, or any model directory
    python eval.py --compare=out/d4/sft,out/d4/rl                   # two models on the same problems: is the second better?
    python eval.py --model=out/d4/rl --task=benchmarks --allow_code # gsm8k, mmlu, arc_easy, arc_challenge, humaneval, spelling
    python eval.py --model=out/d4/sft --task=all                    # every built-in task: where can RL learn something?
    python eval.py --show=out/d4/rl --step=12                       # read what the model wrote in a step of RL
    torchrun --nproc_per_node=8 eval.py --model=out/d20/rl --task=gsm8k --problems=0

Multiple choice (mmlu, arc_easy, arc_challenge) is judged by the likelihood of the labels and by what the model says; code (humaneval) is run in
nanorl/tasks/sandbox.py.

Writes <model>/eval/<task>.jsonl (one outcome a problem, to be judged again) and summary.json, of all tasks evaluated so far; of two models also
compare.<task>.json, with the second; of all tasks all.json alone. Of another split than val <task>.<split>, with shots <task>.5shot."""
import json
import os
import time

import torch
from tqdm import tqdm

from nanorl import evaluate
from nanorl.engine import Engine
from nanorl.hf import load_model, local_model
from nanorl.runtime import checkpoint, dist
from nanorl.runtime.after import AfterSave
from nanorl.runtime.config import at_least, configure
from nanorl.tasks import TASKS, FewShot, get_task, parse_settings
from nanorl.tasks.problem import check_split
from nanorl.tokenizer import Tokenizer
from nanorl.tools.show import lines as rollout_lines

model = ""  # a model directory, a stage's, whose newest checkpoint is meant, or a hub id; empty: out/d<depth>/rl
compare = ""  # A,B: two such directories, in place of --model
depth = 4  # names the run's folder when --model is empty
task = "sum3"  # one of nanorl/tasks, path.py:Class, a mixture 'sum3=50,counting=50'; benchmarks: the six; all: every built-in task, sampled
task_args = ""  # the task's settings, 'name=value; name=value'
split = "val"  # val to choose by, test for final numbers (of humaneval there is only test)
shots = 0  # solved problems of the train split that come before each, as turns of the chat
how = "likelihood,greedy,sampled"  # how it answers: likelihood (multiple choice alone), greedy, sampled
problems = 1000  # the first so many, by likelihood and greedy; 0: all
samples = 8  # samples a problem for pass@k; 0: greedy only
sample_problems = 200  # problems that are sampled; 0: all
temperature = 1.0  # of those samples
max_new_tokens = 0  # a completion is cut off here; 0: at what the benchmarks need (gsm8k 256, humaneval 384, multiple choice 16), else at 64
allow_code = False  # run the code that a model writes (humaneval), in a sandbox that is a guard and not a jail
seed = 0  # fixes the samples
device = "auto"  # auto, cpu, cuda
dtype = "auto"  # activations: auto, fp32, bf16, fp64
device_rows = 0  # most rows decoded at once on one device; 0: what half the free memory holds
examples = 3  # completions to print
after_save = ""  # a command to run at the end, such as 'rclone copy {dir} gdrive:runs/{run}' ({dir}: out/<run>, or the model's directory)
# ---- or read
show = ""  # an RL run's folder: print its rollouts, and do nothing else
step = 0  # of this step; 0: the last
prompt = -1  # and only of the prompt with this number


WAYS = how
BENCHMARKS = {"gsm8k": 256, "mmlu": 16, "arc_easy": 16, "arc_challenge": 16, "humaneval": 384, "spelling": 64}  # and the tokens that an answer may take


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
    else:
        evaluate_all(paths, load_tasks(), place, settings)
    for path in paths:
        folder = os.path.dirname(os.path.dirname(path)) if os.path.exists(os.path.join(path, "DONE")) else path  # of a checkpoint out/<run>/<stage>/step_000040
        sent = AfterSave(after_save, folder, dist.is_main())
        sent()
        sent.finish()


def evaluate_all(paths, sources, place, settings):
    """One model, or two and their difference, on some tasks."""
    for name, source in sources.items():
        if not ways_of(source):
            raise ValueError(f"--how={how} --samples={samples}: in none of these ways {name} can be answered")
    if task != "benchmarks":
        n = len(sources[label(task)])
        dist.say(evaluate.what_n_shows(min(problems or n, n), bool(compare)))
    results = [evaluate_model(path, sources, place, settings) for path in paths]  # one after the other: never two models in memory
    if compare and dist.is_main():
        report_differences(paths, results, settings)


def check_settings():
    check_split(split)
    at_least(globals(), 0, "problems samples sample_problems device_rows temperature examples step shots max_new_tokens")
    at_least(globals(), -1, "prompt")
    if compare and (compare.count(",") != 1 or not all(compare.split(","))):
        raise SystemExit(f"--compare={compare}: it takes two model directories, --compare=A,B")
    if compare and (model or task == "all"):
        raise SystemExit(f"--compare={compare} with {f'--model={model}' if model else '--task=all'}: give one of the two")
    if task in ("all", "benchmarks") and task_args:
        raise SystemExit(f"--task_args={task_args}: settings are one task's, --task={task} runs every task as it is")
    if task == "all" and (samples < 2 or temperature == 0):
        raise SystemExit(f"--samples={samples} --temperature={temperature:g}: --task=all needs at least 2 samples, and a temperature above 0")
    if task == "all" and (shots or how != WAYS):
        raise SystemExit(f"--task=all with {f'--shots={shots}' if shots else f'--how={how}'}: it samples every task as it is")
    if not set(how.split(",")) <= set(WAYS.split(",")):
        raise SystemExit(f"--how={how}: it takes some of likelihood, greedy and sampled, with commas between")


def load_tasks():
    """-> {label: task} of --task; of the benchmarks those whose data is at hand."""
    sources = {}
    for name in BENCHMARKS if task == "benchmarks" else [task]:
        if name == "humaneval" and shots:
            dist.say(f"humaneval  without --shots={shots}: it has no train split to show problems of")
        try:
            sources[label(name)] = together(lambda: load_task(name))
        except ValueError as error:
            if task != "benchmarks":
                raise
            dist.say(f"{name}  skipped: {error}")
    if not sources:
        raise ValueError("none of the benchmarks can be run")
    return sources


def load_task(name):
    """A task as --split, --task_args, --shots and --allow_code want it."""
    its = {**parse_settings(task_args), **({"allow_code": True} if name == "humaneval" and allow_code else {})}
    source = get_task(name, split="test" if name == "humaneval" and split == "val" else split, **its)
    if shots and name != "humaneval":
        source = FewShot(source, get_task(name, split="train", **its), shots)
        source.problem(0)  # raises if there are too few to show
    return source


def ways_of(source):
    """-> {how: (problems, samples of each, temperature)}, in which a task is to be answered and can be."""
    ways = {"likelihood": (problems, 1, 0.0), "greedy": (problems, 1, 0.0), "sampled": (sample_problems, samples, temperature)}
    n = min(problems or len(source), len(source))
    if not all("labels" in source.problem(i).meta for i in range(n)):  # a mixture's may differ
        ways.pop("likelihood")
    return {kind: way for kind, way in ways.items() if kind in how.split(",") and way[1]}


def label(name):
    """What a task's results are filed under; an evaluation takes the place of the last one with the same label."""
    shown = f".{shots}shot" if shots and name != "humaneval" else ""
    return name + shown if split == "val" or name == "humaneval" else f"{name}{shown}.{split}"


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
    longest = max_new_tokens or max(BENCHMARKS.values())
    engine.max_rows = device_rows or max(samples, 1, int(dist.free_memory(place) // 2 // engine.bytes_per_row(longest)))
    return engine, Tokenizer.from_pretrained(path)


def sample(engine, tokenizer, source, n, samples, temperature, name, new_tokens, kind="sampled", leave_long=True):
    """Outcomes of the first n problems (0: all), each rank its share; all of them on the first rank."""
    n = min(n or len(source), len(source))
    mine = range(n)[dist.share(n)]
    with tqdm(total=len(mine) * samples, desc=name, disable=None, leave=False) as bar:
        if kind == "likelihood":
            work = lambda: evaluate.by_likelihood(engine, tokenizer, source, mine, bar.update)
        else:
            work = lambda: evaluate.outcomes(engine, tokenizer, source, mine, samples, new_tokens, temperature, seed, bar.update, leave_long)
        return dist.gather(together(work))


def evaluate_model(path, sources, place, settings):
    """One model on some tasks, each answered in every way that it can be -> {label: {how: outcomes}}, on the first rank; printed and written there."""
    engine, tokenizer = load(path, place)
    results, rows = {}, []
    for name, source in sources.items():
        own_name = name.removesuffix(f".{split}").removesuffix(f".{shots}shot")
        new_tokens = max_new_tokens or BENCHMARKS.get(own_name, 64)
        found, summaries = {}, {}
        for kind, (n, count, heat) in ways_of(source).items():
            begun = time.time()
            found[kind] = sample(engine, tokenizer, source, n, count, heat, f"{name} {kind}", new_tokens, kind)
            seconds, done = time.time() - begun, dist.totals(dict(flops=sum(engine.flops().values()),
                                                                  tokens=engine.stats["prompt_tokens" if kind == "likelihood" else "new_tokens"]))
            if dist.is_main():
                ks = [k for k in (1, 2, 4, 8, 16, 32, 64) if k <= count] if kind == "sampled" else ()
                summaries[kind] = dict(**evaluate.summary(found[kind], ks), seconds=seconds, tok_per_s=done["tokens"] / seconds, flops=done["flops"])
                rows.append((name, kind, summaries[kind]))
        if dist.is_main():
            report(path, name, own_name, found, summaries, {**settings, "max_new_tokens": new_tokens, "shots": 0 if own_name == "humaneval" else shots})
        results[name] = found
    if task == "benchmarks" and dist.is_main():
        print("", path, *evaluate.benchmark_table(rows), sep="\n", flush=True)
    return results


def report(path, name, own_name, found, summaries, settings):
    """A task's results: in words, unless a table of the benchmarks comes, and on disk."""
    if task != "benchmarks":
        print(f"{path}  {name}, {sum(s['seconds'] for s in summaries.values()):.1f} s")
        for kind, s in summaries.items():
            speed = f"{s['seconds']:.1f} s, {s['tok_per_s']:,.0f} tokens/s {'of prompts' if kind == 'likelihood' else 'sampled'}"
            print(*block(kind, [*evaluate.describe(s, f" at temperature {temperature:g}" if kind == "sampled" else ""), speed]), sep="\n")
        for o in next(iter(found.values()))[:examples]:
            print(f"  {o['prompt'][-1]['content']!r} -> {o['texts'][0]!r}  (answer {o['answer']}, reward {o['rewards'][0]:g})")
    records = [{"how": kind, "temperature": temperature if kind == "sampled" else 0.0, **o} for kind, some in found.items() for o in some]
    write(path, f"{name}.jsonl", "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records))
    summary, old = {}, checkpoint.eval_file(path, "summary.json")
    if os.path.exists(old):
        with open(old, encoding="utf-8") as f:
            summary = json.load(f)
    summary[name] = dict(model=path, task=own_name, task_args=task_args, split="test" if own_name == "humaneval" else split, **summaries, settings=settings)
    write(path, "summary.json", json.dumps(summary, indent=2))


def report_differences(paths, results, settings):
    print(f"A {paths[0]}\nB {paths[1]}")
    for name, ways in results[0].items():
        found = dict(a=paths[0], b=paths[1], task=name, task_args=task_args, split=split)
        for kind, outcomes in ways.items():
            found[kind] = evaluate.compare(outcomes, results[1][name][kind])
            title = [f"{name}, {kind}"] if task == "benchmarks" else []
            print(*title, *block(kind, evaluate.describe_difference(found[kind])), sep="\n")
        write(paths[1], f"compare.{name}.json", json.dumps({**found, "settings": settings}, indent=2))


def survey(path, place, settings):
    """Every built-in task, sampled: where RL has something to learn from."""
    engine, tokenizer = load(path, place)
    rows, skipped = {}, {}
    for name in [name for name in TASKS if name != "arithmetic"]:  # that is its default preset, sum3
        try:
            source = together(lambda: load_task(name))
            results = sample(engine, tokenizer, source, sample_problems, samples, temperature, name, max_new_tokens or BENCHMARKS.get(name, 64), leave_long=False)
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
        write(path, f"{label('all')}.json", json.dumps(result, indent=2))


def block(label, lines):
    return [f"  {text:10}  {line}" for text, line in zip([label] + [""] * len(lines), lines)]


def write(path, name, text):
    file = checkpoint.eval_file(path, name)
    os.makedirs(os.path.dirname(file), exist_ok=True)
    with open(file + ".tmp", "w", encoding="utf-8") as f:
        f.write(text)
    os.replace(file + ".tmp", file)


if __name__ == "__main__":
    dist.run(main)
