"""Evaluation: greedy accuracy and unbiased pass@k on held-out problems, with 95% intervals.

    python eval.py --model=out/d4/rl                     # a stage's newest checkpoint, or any model
    python eval.py --compare=out/d4/sft,out/d4/rl        # the same problems: is the second better?
    python eval.py --model=out/d4/rl --task=benchmarks --allow_code     # six of them (README)
    python eval.py --model=out/d20/base --task=base --shots=5           # a base model, without chat
    python eval.py --model=out/d4/sft --task=all         # every task: where can RL learn something?
    python eval.py --show=out/d4/rl --step=12            # read what was written in a step of RL
    torchrun --nproc_per_node=8 eval.py --model=out/d20/rl --task=gsm8k --problems=0

Multiple choice (mmlu, arc_easy, arc_challenge) is judged by the likelihood of the labels and by
what the model says; code (humaneval) is run in nanorl/tasks/sandbox.py. A base model is asked in
plain text, by the likelihood of the choices' own text (nanorl/evaluate/base.py): that is what
arc_easy:text is, and --task=base all of them, with bits per byte and samples.

Writes into <model>/eval/: <task>.jsonl (an outcome a problem, which can be judged again) and
summary.json, of all tasks evaluated so far (its `base` holds bits per byte, samples and score);
of two models also compare.<task>.json, with the second; of all tasks all.json alone. Another split
than val is in the name, <task>.<split>, and so are shots, <task>.5shot. An evaluation that is
smaller than the one on disk is filed beside it, as <task>.greedy20x1 for 20 problems. A read-only
model's results go to out/<its path>/eval.
"""

import os
import time

import torch
from tqdm import tqdm

from nanorl.data.tokens import Windows, read_index
from nanorl.engine import Engine
from nanorl.evaluate import base, outcomes, statistics, words
from nanorl.evaluate.benchmarks import BENCHMARKS, WAYS
from nanorl.hf import load_model, local_model
from nanorl.report import rollouts, terminal
from nanorl.report.cost import sampling_flops
from nanorl.report.memory import bytes_per_row
from nanorl.runtime import checkpoint, dist
from nanorl.runtime import results as results_files
from nanorl.runtime.after import AfterSave
from nanorl.runtime.config import at_least, configure
from nanorl.runtime.log import RunLog
from nanorl.tasks import TASKS, FewShot, get_task, parse_settings
from nanorl.tasks.problem import check_split
from nanorl.tokenizer import Tokenizer

# ---- what is evaluated
model = ""  # a model directory, a stage's (its newest checkpoint), a hub id; empty: out/d<depth>/rl
compare = ""  # A,B: two such directories, in place of --model
depth = 4  # names the run's folder when --model is empty
task = "sum3"  # a name, path.py:Class, a mixture; benchmarks: the six; base; all: each, sampled
task_args = ""  # the task's settings, 'name=value; name=value'
split = "val"  # val to choose by, test for final numbers (of humaneval there is only test)
shots = 0  # solved problems of the train split that come before each, as turns of the chat
how = "likelihood,greedy,sampled"  # it answers: likelihood (multiple choice alone), greedy, sampled
problems = 1000  # the first so many, by likelihood and greedy; 0: all
samples = 8  # samples a problem for pass@k; 0: greedy only
sample_problems = 200  # problems that are sampled; 0: all
temperature = 1.0  # of those samples
max_new_tokens = 0  # a completion is cut off here; 0: what a benchmark needs, else 64
allow_code = False  # run the code that a model writes (humaneval): a sandbox guards, it is no jail
seed = 0  # fixes the samples
device = "auto"  # auto, cpu, cuda
dtype = "auto"  # activations: auto, fp32 (TF32 on a GPU), bf16, fp64
device_rows = 0  # most rows decoded at once on one device; 0: what half the free memory holds
text = ""  # of --task=base: a text file for bits per byte; empty: its run's validation text
examples = 3  # completions to print
after_save = ""  # a command at the end, such as 'rclone copy {dir} gdrive:runs/{run}'
# ---- or read
show = ""  # an RL run's folder: print its rollouts, and do nothing else
step = 0  # of this step; 0: the last
prompt = -1  # and only of the prompt with this number

# What --task names that is several tasks, whose results come in one table.
SEVERAL = {"benchmarks": tuple(BENCHMARKS), "base": base.DATA_SETS}


def main():
    settings = configure(globals())
    check_settings()
    if show:
        print(*rollouts.lines(show, step, prompt), sep="\n")
        return
    where = dist.setup(settings["device"])
    names = [model or checkpoint.stage_directory(f"d{depth}", "rl")]
    if compare:
        names = compared()
    paths = [model_directory(name) for name in names]
    for path in paths:
        folder = results_files.check_folder(path)
        if not folder.startswith(path):
            dist.say(f"the results of {path} go to {folder}")
    if task == "all":
        survey(paths[0], where, settings)
    else:
        evaluate_all(paths, load_tasks(), where, settings)
    for path in paths:
        send(path)


# ---- tasks, on one model or two ------------------------------------------------------------------


def evaluate_all(paths, tasks, where, settings):
    """tasks: {label: task}."""
    for name, source in tasks.items():
        if not ways_of(source):
            raise ValueError(
                f"--how={how} --samples={samples}: in none of these ways {name} can be answered"
            )
    if task not in SEVERAL:
        n = len(tasks[label(task)])
        dist.say(words.what_n_shows(min(problems or n, n), paired=bool(compare)))
    # One after the other: never two models in memory.
    results = [evaluate_model(path, tasks, where, settings) for path in paths]
    if compare and dist.is_main():
        report_differences(paths, results, settings)


def evaluate_model(path, tasks, where, settings):
    """Every task in every way that it can be answered; printed and written on the first rank.

    Returns {label: {way: outcomes}}, on the first rank.
    """
    engine, tokenizer = load(path, where)
    results, rows = {}, []
    if task == "base":
        of_text = report_text(path, engine, tokenizer)
    for name, source in tasks.items():
        results[name], summaries = {}, {}
        for way, (n, sampling) in ways_of(source, new_tokens_of(name)).items():
            begun = time.time()
            try:
                found = answer(engine, tokenizer, source, n, sampling, f"{name} {way}")
            except ValueError as error:
                raise ValueError(f"{path}, {name}: {error}") from None
            seconds = time.time() - begun
            cost = cost_of(engine, way)
            if dist.is_main():
                results[name][way] = found
                summaries[way] = summarize(found, way, seconds, cost)
                rows.append((name, way, summaries[way]))
        if dist.is_main():
            report(path, name, results[name], summaries, settings)
            for line in words.mostly_cut_off(name, summaries, new_tokens_of(name)):
                dist.say(line)
    if rows and task in SEVERAL:  # on the first rank
        print("", path, *words.benchmark_table(rows), sep="\n", flush=True)
    if task == "base" and dist.is_main():
        report_base(path, of_text, rows, settings)
    return results


def ways_of(source, new_tokens=1):
    """-> {way: (problems, Sampling)}, of those in which the task is, and can be, asked.

    By likelihood nothing is sampled, and the Sampling is None.
    """
    ways = {
        "likelihood": (problems, None),
        "greedy": (problems, outcomes.Sampling(1, new_tokens, 0.0, seed)),
    }
    if samples:
        sampling = outcomes.Sampling(samples, new_tokens, temperature, seed)
        ways["sampled"] = (sample_problems, sampling)

    n = min(problems or len(source), len(source))
    if not all("labels" in source.problem(i).meta for i in range(n)):  # a mixture's may differ
        ways.pop("likelihood")
    if task == "base":
        return {"likelihood": ways["likelihood"]}
    return {way: ways[way] for way in ways if way in how.split(",")}


def answer(engine, tokenizer, source, n, sampling, name, leave_long=True):
    """Outcomes of the first n problems (0: all), each rank its share; all on the first rank.

    Raises ValueError where the reward failed on all of them.
    """
    n = min(n or len(source), len(source))
    mine = range(n)[dist.share(n)]
    count = sampling.samples if sampling else 1
    with tqdm(total=len(mine) * count, desc=name, disable=None, leave=False) as bar:
        ask = engine, tokenizer, source, mine
        if sampling is None:
            found = together(lambda: outcomes.by_likelihood(*ask, bar.update))
        else:
            found = together(lambda: outcomes.by_sampling(*ask, sampling, bar.update, leave_long))
    found = dist.gather(found)
    together(lambda: found and statistics.check_judged(statistics.summary(found)))
    return found


def cost_of(engine, way):
    """Of the engine's last call, over all ranks: FLOPs, and the tokens that tell its speed."""
    counted = "prompt_tokens" if way == "likelihood" else "new_tokens"
    flops = sum(sampling_flops(engine).values())
    return dist.totals(dict(flops=flops, tokens=engine.stats[counted]))


def summarize(found, way, seconds, cost):
    ks = (1, 2, 4, 8, 16, 32, 64) if way == "sampled" else ()
    summary = statistics.summary(found, ks)
    summary["seconds"] = seconds
    summary["tok_per_s"] = cost["tokens"] / seconds
    summary["flops"] = cost["flops"]
    return summary


def report(path, name, found, summaries, settings):
    """A task's results: on disk, then in words, unless a table of the benchmarks comes."""
    lines = []
    for way, some in found.items():
        how_sampled = {"how": way, "temperature": temperature if way == "sampled" else 0.0}
        lines += [{**how_sampled, **outcome} for outcome in some]
    stored = results_files.read(path, "summary.json").get(name, {})
    filed = file_under(stored, name, summaries)
    results_files.write_lines(path, f"{filed}.jsonl", lines)
    own_name = task_name(name)
    about = dict(
        model=path,
        task=own_name,
        task_args=task_args,
        split=split_of(own_name),
        **summaries,
        settings={
            **settings,
            "max_new_tokens": new_tokens_of(name),
            "shots": shots_of(own_name),
        },
    )
    results_files.add_to_summary(path, filed, about)

    if task not in SEVERAL:
        seconds = sum(summary["seconds"] for summary in summaries.values())
        print(f"{path}  {name}, {seconds:.1f} s")
        for way, summary in summaries.items():
            print(*words.summary_block(way, summary, temperature), sep="\n")
        first = next(iter(found.values()))
        for outcome in first[:examples]:
            print(words.example(outcome))


def file_under(stored, name, found):
    """The label of results on disk. Says so where a larger evaluation keeps the name."""
    filed = results_files.label_beside(stored, name, found)
    if filed != name:
        print(f"{name} is on disk from a larger evaluation, which stays; this one is {filed}")
    return filed


def report_differences(paths, results, settings):
    """Two models' outcomes of the same problems: in words and on disk, beside the second."""
    first, second = results
    print(f"A {paths[0]}\nB {paths[1]}")
    for name, ways in first.items():
        found = dict(a=paths[0], b=paths[1], task=name, task_args=task_args, split=split)
        lines = []
        for way, of_first in ways.items():
            found[way] = statistics.compare(of_first, second[name][way])
            if task in SEVERAL:
                lines.append(f"{name}, {way}")
            lines += words.difference_block(way, found[way])
        compared = f"compare.{name}"
        stored = results_files.read(paths[1], f"{compared}.json")
        filed = file_under(stored, compared, found)
        results_files.write_json(paths[1], f"{filed}.json", {**found, "settings": settings})
        print(*lines, sep="\n")


# ---- a base model --------------------------------------------------------------------------------


def report_text(path, engine, tokenizer):
    """-> {bits_per_byte, samples}, printed on the first rank. Every rank takes part."""
    bits = bits_per_byte(path, engine, tokenizer)
    if not dist.is_main():
        return {}
    if bits is None:
        print("bits per byte: the model's run has no token files here: name a text with --text=")
    else:
        print(f"bits per byte  {bits:.4f}, of {text or 'the validation text of its run'}")
    found = dict(zip(base.PROMPTS, base.samples(engine, tokenizer)))
    for start, said in found.items():
        print(f"        {start} ▸{terminal.one_line(said)}", flush=True)
    return {"bits_per_byte": bits, "samples": found}


def report_base(path, of_text, rows, settings):
    """The score, in words, and all that is known of a base model on disk.

    of_text: see report_text. rows: (task, way, summary) of each data set.
    """
    summaries = {name: summary for name, _, summary in rows}
    found = dict(model=path, task="base", split=split, **of_text)
    if summaries:
        found.update(base.score(summaries.values()))
        print(base.score_line(found, summaries))
    stored = results_files.read(path, "summary.json").get(label("base"), {})
    filed = file_under(stored, label("base"), summaries)
    results_files.add_to_summary(path, filed, {**found, **summaries, "settings": settings})


def bits_per_byte(path, engine, tokenizer):
    """Of --text, else of the validation text of the model's run; None where there is neither."""
    run_base = os.path.join(os.path.dirname(os.path.dirname(path)), "base")
    card = RunLog(run_base, active=False).earlier_card()
    learnt = card.get("settings", {"seq_len": 1024, "eval_tokens": base.TEXT})
    T, model = min(learnt["seq_len"], engine.learner.config.context), engine.learner
    rank, ranks = dist.rank(), dist.world_size()
    if text:
        rows, n_bytes = base.rows_of_file(text, tokenizer, T)
        return base.bits_per_byte(dist.total(base.nats(model, rows[rank::ranks])), n_bytes)

    directory = os.path.join(run_base, "tokens")
    is_there = read_index(directory).get("whole")
    if not is_there or Tokenizer.from_pretrained(directory).spec != tokenizer.spec:
        return None
    # The windows on which train_base.py validates.
    n = max(1, min(Windows(directory, "val", T, 1).n, learnt["eval_tokens"] // T))
    val = Windows(directory, "val", T, n, 0, (rank, ranks))
    nats = dist.total(base.nats(model, [val.next()]))
    return base.bits_per_byte(nats, n * T * val.bytes_per_token)


# ---- every task ----------------------------------------------------------------------------------


def survey(path, where, settings):
    """Every built-in task, sampled: where RL has something to learn from."""
    engine, tokenizer = load(path, where)
    rows, skipped = {}, {}
    for name in TASKS:
        if name in ("arithmetic", "mmlu:auxiliary", *base.DATA_SETS):  # as sum3, mmlu and others
            continue
        sampling = outcomes.Sampling(samples, new_tokens_of(name), temperature, seed)
        try:
            source = together(lambda name=name: load_task(name))
            ask = source, sample_problems, sampling, name
            found = answer(engine, tokenizer, *ask, leave_long=False)
        except ValueError as error:  # no files, or prompts that do not fit the context
            skipped[name] = str(error)
            dist.say(f"{name}  skipped: {error}")
            continue
        if dist.is_main():
            row = statistics.summary(found, (samples,))
            row["dead"] = statistics.dead_groups(found, samples)
            row["verdict"] = words.verdict(row)
            rows[name] = row
    if dist.is_main():
        rows = dict(sorted(rows.items(), key=lambda item: item[1]["dead"]))
        result = dict(model=path, split=split, tasks=rows, skipped=skipped, settings=settings)
        stored = results_files.read(path, f"{label('all')}.json").get("tasks", {})
        filed = file_under(largest(stored), label("all"), largest(rows))
        results_files.write_json(path, f"{filed}.json", result)
        n = sample_problems or "all"
        print(f"{path}  {split}, {n} problems a task x {samples} at temperature {temperature:g}")
        print(*words.survey_table(rows, samples), sep="\n")


def largest(rows):
    """A survey's rows -> {way: the row of the most problems}, by which its size is known."""
    if not rows:
        return {}
    return {"sampled": max(rows.values(), key=lambda row: row["n"])}


# ---- tasks by name -------------------------------------------------------------------------------


def load_tasks():
    """-> {label: task} of --task; of several tasks those whose data is at hand."""
    tasks = {}
    for name in SEVERAL.get(task, [task]):
        if name == "humaneval" and shots:
            dist.say(
                f"humaneval  without --shots={shots}: it has no train split to show problems of"
            )
        try:
            tasks[label(name)] = together(lambda name=name: load_task(name))
        except ValueError as error:
            if task not in SEVERAL:
                raise
            dist.say(f"{name}  skipped: {error}")
    if not tasks and task != "base":
        raise ValueError("none of the benchmarks can be run")
    return tasks


def load_task(name):
    """A task as --split, --task_args, --shots and --allow_code want it."""
    own_settings = parse_settings(task_args)
    if name == "humaneval" and allow_code:
        own_settings["allow_code"] = True
    source = get_task(name, split=split_of(name), **own_settings)
    if shots_of(name):
        source = FewShot(source, get_task(name, split="train", **own_settings), shots)
        source.problem(0)  # raises if there are too few to show
    return source


def split_of(name):
    """humaneval has its test split alone."""
    return "test" if name == "humaneval" and split == "val" else split


def shots_of(name):
    """It has no train split to show problems of either."""
    return 0 if name == "humaneval" else shots


def label(name):
    """What a task's results are filed under, until a later evaluation that is not smaller."""
    shown = f".{shots}shot" if shots_of(name) else ""
    return name + shown if split == "val" or name == "humaneval" else f"{name}{shown}.{split}"


def task_name(label):
    """The other way round."""
    return label.removesuffix(f".{split}").removesuffix(f".{shots}shot")


def new_tokens_of(label):
    return max_new_tokens or BENCHMARKS.get(task_name(label), 64)


# ---- models --------------------------------------------------------------------------------------


def model_directory(name):
    path = local_model(checkpoint.resolve(name))
    if not checkpoint.is_model(path):
        flag = "--compare=A,B" if compare else "--model="
        raise ValueError(f"no model in {path}: name a model directory or a stage's with {flag}")
    return path


def load(path, where):
    """A model directory -> (Engine, Tokenizer)."""
    torch.cuda.empty_cache()  # what a model before it has left there would count as taken
    weight_dtype, compute_dtype = dist.dtypes(dtype, where)
    policy = load_model(path, weight_dtype, where)
    policy.compute_dtype = compute_dtype
    longest = max_new_tokens or max(BENCHMARKS.values())
    rows = int(dist.free_memory(where) // 2 // bytes_per_row(policy, longest))
    engine = Engine(policy, device_rows or max(samples, 1, rows))
    return engine, Tokenizer.from_pretrained(path)


def together(work):
    """work() on every rank -> its value. A ValueError on one rank is raised on all of them, so that
    none waits for another."""
    value, trouble = None, []
    try:
        value = work()
    except ValueError as error:
        trouble = [str(error)]
    trouble = dist.broadcast(dist.gather(trouble))
    if trouble:
        raise ValueError(trouble[0])
    return value


def send(path):
    """--after_save, of a model that was evaluated."""
    folder = path
    results = checkpoint.eval_folder(path)
    if not results.startswith(path):  # they are not with the model, which is read-only
        folder = os.path.dirname(results)
    elif os.path.exists(os.path.join(path, "DONE")):  # out/<run>/<stage>/step_000040
        folder = os.path.dirname(os.path.dirname(path))
    command = AfterSave(after_save, folder, dist.is_main())
    command()
    command.finish()


# ---- settings ------------------------------------------------------------------------------------


def check_settings():
    """Refuse what cannot work, with the value and the remedy."""
    check_split(split)
    at_least(
        globals(),
        0,
        "problems samples sample_problems device_rows temperature examples step shots "
        "max_new_tokens",
    )
    at_least(globals(), -1, "prompt")
    if not set(how.split(",")) <= set(WAYS):
        raise SystemExit(
            f"--how={how}: it takes some of likelihood, greedy and sampled, with commas between"
        )
    if compare:
        check_compare()
    if task in ("all", *SEVERAL) and task_args:
        raise SystemExit(
            f"--task_args={task_args}: settings are one task's, --task={task} runs every task as "
            "it is"
        )
    if task == "all":
        check_survey()
    if task == "base" and "likelihood" not in how.split(","):
        raise SystemExit(f"--task=base --how={how}: a base model answers by likelihood")
    if text and task != "base":
        raise SystemExit(f"--text={text} --task={task}: it is read by --task=base alone")


def compared():
    """--compare -> its names. A comma stays that is in the name of a folder that is there."""
    names = compare.split(",")
    for i in range(1, len(names)):
        first, second = ",".join(names[:i]), os.path.expanduser(",".join(names[i:]))
        if os.path.isdir(first) and os.path.isdir(second):
            return [first, second]
    return names


def check_compare():
    names = compared()
    if len(names) != 2 or not all(names):
        raise SystemExit(f"--compare={compare}: it takes two model directories, --compare=A,B")
    if model or task == "all":
        other = f"--model={model}" if model else "--task=all"
        raise SystemExit(f"--compare={compare} with {other}: give one of the two")


def check_survey():
    if samples < 2 or temperature == 0:
        raise SystemExit(
            f"--samples={samples} --temperature={temperature:g}: --task=all needs at least "
            "2 samples, and a temperature above 0"
        )
    if shots or how != ",".join(WAYS):
        other = f"--shots={shots}" if shots else f"--how={how}"
        raise SystemExit(f"--task=all with {other}: it samples every task as it is")


if __name__ == "__main__":
    dist.run(main)
