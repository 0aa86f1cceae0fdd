"""The training scripts themselves on the GPU, each run a process as a user starts it."""

import json
import os
import re
import subprocess
import sys
import tempfile
import time

import torch
from gpu_checks.common import D12, ON_GPU, TINY, VOCABULARY, Watch, randomize, start, tell
from gpu_checks.words_task import random_words

from nanorl.gpt import GPT, GPTConfig
from nanorl.hf import save_model
from nanorl.tokenizer import Tokenizer

# Where the runs and their models go. gpu_check.py makes the folder, and removes it.
WORK = os.environ.get("GPU_CHECK_WORK", tempfile.gettempdir())
OUT = os.path.join(WORK, "out")
GSM8K_STEPS = 467  # 7,473 problems, 16 a step

# Fields of the clock and the machine.
MEASURED = ("time", "tok_per_s/", "time/", "memory/", "mfu", "mbu")


# ---- scripts -------------------------------------------------------------------------------------


def launch(*arguments, **more):
    """Start Python on a script -> its process. What it says goes to a file in the work folder.

    more: of its environment.
    """
    log = tempfile.TemporaryFile("w+", dir=WORK)
    environment = {**os.environ, "NANORL_OUT": OUT, **more}
    command = [sys.executable, *arguments]
    process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, env=environment)
    process.log = log
    return process


def finish(process):
    """Wait for a script -> what it said. Raises RuntimeError with its last line if it failed."""
    code = process.wait()
    process.log.seek(0)
    said = process.log.read()
    print(said, flush=True)
    if code:
        last = (said.strip().splitlines() or ["(it said nothing)"])[-1]
        script = " ".join(process.args[1:3])
        raise RuntimeError(f"{script} ended with {code}: {last}")
    return said


def run_script(script, *arguments):
    """-> (seconds, what it said)."""
    begun = time.perf_counter()
    said = finish(launch(script, *arguments))
    return time.perf_counter() - begun, said


def rows_of(run, stage="rl"):
    """metrics.jsonl of a run, a dict a line."""
    with open(os.path.join(OUT, run, stage, "metrics.jsonl"), encoding="utf-8") as f:
        return [json.loads(line) for line in f]


# ---- quickstart ----------------------------------------------------------------------------------


def quickstart():
    """runs/quickstart.sh's stages and its greedy accuracies after SFT and after RL."""
    common = ["--run_name=quickstart", "--depth=3", "--task=sum3", "--seed=0"]
    text = [*common, "--batch_tokens=2048", "--seq_len=128", "--log_every=50"]
    base = [*text, "--documents=12000", "--steps=150"]
    sft = [*text, "--steps=300"]
    rl = [*common, "--steps=40", "--eval_every=10", "--device_tokens=8192"]
    problems = 1000
    if TINY:
        base += ["--depth=1", "--steps=3", "--documents=300"]
        sft += ["--depth=1", "--steps=3", "--examples=400"]
        rl += ["--depth=1", "--steps=1", "--max_new_tokens=8"]
        rl += ["--prompts_per_step=2", "--eval_problems=10", "--probe_prompts=2"]
        problems = 10
    for script, arguments in (
        ("train_base.py", base),
        ("train_sft.py", sft),
        ("train_rl.py", rl),
    ):
        seconds, _ = run_script(script, *arguments)
        tell("quickstart", stage=script, seconds=seconds)

    folders = [os.path.join(OUT, "quickstart", stage) for stage in ("sft", "rl")]
    asked = [f"--problems={problems}", "--samples=0", "--examples=0"]
    seconds, _ = run_script("eval.py", f"--compare={','.join(folders)}", "--task=sum3", *asked)
    accuracies = [greedy_accuracy(folder) for folder in folders]
    tell("quickstart", seconds=seconds, sft=accuracies[0], rl=accuracies[1], problems=problems)


def greedy_accuracy(folder):
    """Of a stage's newest checkpoint, as eval.py has written it."""
    steps = [name for name in os.listdir(folder) if name.startswith("step_")]
    with open(os.path.join(folder, max(steps), "eval", "summary.json"), encoding="utf-8") as f:
        return json.load(f)["sum3"]["greedy"]["accuracy"]


# ---- resume --------------------------------------------------------------------------------------


def resume():
    """A run that is killed and goes on, against two that were left alone, in fp32."""
    start_from = os.path.join(OUT, "quickstart", "sft")
    common = [f"--model={start_from}", "--task=sum3", "--seed=1", "--dtype=fp32", "--steps=6"]
    common += ["--save_every=2", "--eval_every=0", "--eval_problems=10", "--probe_prompts=2"]
    if TINY:
        common += ["--max_new_tokens=8", "--prompts_per_step=2"]
    processes = {}
    for name in ("whole", "again", "killed"):
        processes[name] = launch("train_rl.py", *common, f"--run_name={name}")

    # kill -9 as soon as the checkpoint of step 2 is whole.
    killed = processes.pop("killed")
    marker = os.path.join(OUT, "killed", "rl", "step_000002", "DONE")
    while not os.path.exists(marker) and killed.poll() is None:
        time.sleep(0.01)
    killed.kill()
    killed.wait()
    if not os.path.exists(marker):
        finish(killed)
    for process in processes.values():
        finish(process)
    said = finish(launch("train_rl.py", *common, "--run_name=killed", "--resume=must"))

    whole = rows_of("whole")
    tell(
        "resume",
        resumed="resumed" in said,
        difference=largest_difference(whole, rows_of("killed")),
        of_two_whole_runs=largest_difference(whole, rows_of("again")),
    )


def largest_difference(rows, others):
    """Of any number in two runs' metrics, relative to its size; the clock's fields apart."""
    assert [row["step"] for row in rows] == [row["step"] for row in others]
    differences = [0.0]
    for row, other in zip(rows, others, strict=True):
        for name, value in row.items():
            if not name.startswith(MEASURED) and isinstance(value, (int, float)):
                size = max(abs(value), abs(other[name]), 1e-6)
                differences.append(abs(value - other[name]) / size)
    return max(differences)


# ---- run -----------------------------------------------------------------------------------------


def run():
    """Eight steps of depth 12 on prompts like GSM8K's, 16 x 16 completions of 300 tokens."""
    model = os.path.join(WORK, "random")
    write_model(model, D12)
    task = os.path.join(os.path.dirname(os.path.abspath(__file__)), "words_task.py")
    arguments = [f"--model={model}", "--run_name=gsm8k", "--seed=0"]
    arguments += [f"--task={task}:Words", "--steps=8"]
    arguments += ["--eval_every=0", "--save_every=0", "--eval_problems=16", "--probe_prompts=16"]
    if TINY:
        arguments += ["--max_new_tokens=16", "--prompts_per_step=2", "--samples_per_prompt=2"]
        arguments += ["--steps=4", "--eval_problems=2", "--probe_prompts=2"]
    else:
        arguments += ["--max_new_tokens=300"]
    with Watch() as watch:
        seconds, said = run_script("train_rl.py", *arguments)

    # The first two steps warm up, and the last one has an evaluation in it.
    rows = [row for row in rows_of("gsm8k") if row["step"] > 0]
    usual = rows[2:-1]
    step_s = mean(usual, "time/step")
    tell(
        "run",
        seconds=seconds,
        step_s=step_s,
        rollout_s=mean(usual, "time/rollout"),
        learner_s=mean(usual, "time/learner"),
        outside=mean(usual, "time/outside"),
        minutes_of_467=step_s * GSM8K_STEPS / 60,
        length=mean(usual, "completions/mean_length"),
        mfu=mean(usual, "mfu"),
        mbu=mean(usual, "mbu"),
        logp_diff=mean(usual, "logp_diff/mean"),
    )
    peak = rows[-1]["memory/peak_gb"]
    forecast = number_in(said, r"memory: about ([\d.]+) GB")
    watched = watch.means()
    tell(
        "run",
        forecast_gb=forecast,
        peak_gb=peak,
        of_forecast=peak / forecast,
        forecast_step_s=number_in(said, r"about ([\d.]+) s a step"),
        **watched,
    )


def write_model(path, depth):
    """A random model with a tokenizer, as train_sft.py would leave them."""
    words = random_words()
    texts = [" ".join(words[i : i + 100]) for i in range(0, len(words), 100)]
    tokenizer = Tokenizer.train(texts, VOCABULARY)
    device = start()
    with device:
        model = GPT(GPTConfig.from_depth(depth, VOCABULARY))
    randomize(model)
    save_model(model, tokenizer, path)
    del model
    if ON_GPU:
        torch.cuda.empty_cache()


def mean(rows, name):
    return sum(row[name] for row in rows) / len(rows)


def number_in(text, pattern):
    """The number that a pattern finds in what a script said."""
    return float(re.search(pattern, text)[1])
