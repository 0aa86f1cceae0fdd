"""Evaluation: greedy accuracy and unbiased pass@k on held-out problems, with 95% intervals.

    python eval.py --model=out/d4/rl                                # the newest checkpoint of a stage, or any model directory
    torchrun --nproc_per_node=8 eval.py --model=out/d20/rl --task=gsm8k --problems=0

Writes <model>/eval/<task>.<split>.jsonl (one outcome a problem, to be judged again) and <task>.<split>.json."""
import json
import os
import time

from tqdm import tqdm

from nanorl import evaluate
from nanorl.engine import Engine
from nanorl.hf import load_model
from nanorl.runtime import checkpoint, dist
from nanorl.runtime.config import at_least, configure
from nanorl.tasks import get_task, parse_settings
from nanorl.tokenizer import Tokenizer

model = ""  # a model directory, or a stage's, whose newest checkpoint is meant; empty: out/d<depth>/rl
depth = 4  # names the run's folder when --model is empty
task = "sum3"  # arithmetic presets, gsm8k, or path.py:Class
task_args = ""  # the task's settings, 'name=value; name=value'
split = "val"  # val to choose by, test for final numbers
problems = 1000  # the first so many; 0: all
samples = 8  # samples a problem for pass@k; 0: greedy only
sample_problems = 200  # problems that are sampled
temperature = 1.0  # of those samples
max_new_tokens = 64  # a completion is cut off here
seed = 0  # fixes the samples
device = "auto"  # auto, cpu, cuda
dtype = "auto"  # activations: auto, fp32, bf16, fp64
device_rows = 0  # most rows decoded at once on one device; 0: what half the free memory holds
show = 3  # completions to print


def main():
    settings = configure(globals())
    at_least(globals(), 1, "max_new_tokens")
    at_least(globals(), 0, "problems samples sample_problems device_rows temperature show")
    place = dist.setup(device)
    weight_dtype, compute_dtype = dist.dtypes(dtype, place)
    path = checkpoint.resolve(model or checkpoint.stage_directory(f"d{depth}", "rl"))
    if not checkpoint.is_model(path):
        raise ValueError(f"no model in {path}: name a model directory or a stage's with --model=")
    policy = load_model(path, weight_dtype, place)
    policy.compute_dtype = compute_dtype
    tokenizer = Tokenizer.from_pretrained(path)
    source = get_task(task, split=split, **parse_settings(task_args))
    engine = Engine(policy)
    engine.max_rows = device_rows or max(samples, 1, int(dist.free_memory(place) // 2 // engine.bytes_per_row(max_new_tokens)))

    def run(n, samples, temperature, name):
        """Outcomes of the first n problems, each rank its share; all of them on the first rank."""
        n = min(n, len(source)) if n else len(source)
        mine = range(n)[dist.share(n)]
        begun = time.time()
        with tqdm(total=len(mine) * samples, desc=name, disable=None, leave=False) as bar:
            results = dist.gather(evaluate.outcomes(engine, tokenizer, source, mine, samples, max_new_tokens, temperature, seed, bar.update))
        return results, time.time() - begun

    greedy, seconds = run(problems, 1, 0.0, "greedy")
    sampled, sampling_seconds = run(sample_problems, samples, temperature, "samples") if samples else ([], 0.0)
    if not dist.is_main():
        return
    result = dict(model=path, task=task, task_args=task_args, split=split, **evaluate.summary(greedy),
                  seconds=seconds + sampling_seconds, settings=settings)
    print(f"{path}  {task} {split}\n"
          f"  greedy   {result['accuracy']:6.1%}  95% [{result['low']:.1%}, {result['high']:.1%}]  {result['n']} problems, "
          f"{result['length']:.1f} tokens, {result['clipped']:.1%} cut off, {seconds:.1f} s")
    if sampled:
        ks = [k for k in (1, 2, 4, 8, 16, 32, 64) if k <= samples]
        result["sampled"] = evaluate.summary(sampled, ks)
        s = result["sampled"]
        print(f"  sampled  {s['accuracy']:6.1%}  95% [{s['low']:.1%}, {s['high']:.1%}]  {s['n']} problems x {samples} at temperature {temperature:g}, "
              f"{s['length']:.1f} tokens, {sampling_seconds:.1f} s\n"
              f"  " + "  ".join(f"pass@{k} {s[f'pass@{k}']:.1%}" for k in ks))
    for outcome in greedy[:show]:
        print(f"  {outcome['prompt'][-1]['content']!r} -> {outcome['texts'][0]!r}  (answer {outcome['answer']}, reward {outcome['rewards'][0]:g})")
    name = f"{task.replace('/', '_')}.{split}"
    os.makedirs(os.path.join(path, "eval"), exist_ok=True)
    with open(os.path.join(path, "eval", name + ".jsonl"), "w", encoding="utf-8") as f:
        for outcome, t in [(o, 0.0) for o in greedy] + [(o, temperature) for o in sampled]:
            f.write(json.dumps({"temperature": t, **outcome}, ensure_ascii=False) + "\n")
    with open(os.path.join(path, "eval", name + ".json"), "w", encoding="utf-8") as f:
        json.dump(result, f, indent=2)


if __name__ == "__main__":
    dist.run(main)
