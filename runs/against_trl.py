"""One on-policy step of nanorl and of TRL's GRPOTrainer, in turns.

    pip install trl accelerate
    NANORL_DATA=... python runs/against_trl.py --model=<a Llama or Qwen directory>

Both have the same model, prompts, numbers and reward. A step is rollout, reward, learner and
update. nanorl takes it in each precision of --dtypes, one after another. A line of JSON a step, and
a last one with the medians.
"""

import json
import os
import sys
import tempfile
import time
from statistics import median_high

import datasets
import torch
import transformers
import trl

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
from nanorl import grpo
from nanorl.engine import Engine
from nanorl.hf import load_model
from nanorl.optim import make_optimizers, update
from nanorl.report.cost import causal_sampling_flops
from nanorl.report.rates import matrix_rate
from nanorl.rollout import Rollout
from nanorl.runtime.config import configure
from nanorl.tasks import get_task
from nanorl.tools import bench

model = "out/smollm2"  # a Hugging Face model directory with a chat template
prompts = 4  # GSM8K training problems
samples = 8  # of each
new_tokens = 64  # most tokens of a completion
device_tokens = 16384  # nanorl: tokens of one forward
dtypes = "fp32,bf16"  # of nanorl's activations; TRL runs in fp32
steps = 3  # of each, after one to warm up
lr = 1e-6  # AdamW

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def main():
    configure(globals())
    tokenizer = transformers.AutoTokenizer.from_pretrained(model)
    task = get_task("gsm8k", split="train")
    messages = [task.problem(i).prompt for i in range(prompts)]
    trainers = {kind: Ours(kind, tokenizer, messages) for kind in dtypes.split(",")}

    turns = InTurns(trainers)
    net = transformers.AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    data = [dict(prompt=message) for message in messages] * (steps + 1)
    with tempfile.TemporaryDirectory() as out:
        trl.GRPOTrainer(
            net,
            reward_funcs=lambda completions, **_: [reward(c[0]["content"]) for c in completions],
            args=trl_config(out),
            train_dataset=datasets.Dataset.from_list(data),
            processing_class=tokenizer,
            callbacks=[turns],
        ).train()

    rows = turns.rows[1:]  # the first was to warm up
    medians = dict(
        torch=torch.__version__,
        trl=trl.__version__,
        transformers=transformers.__version__,
        trl_s=median_high([row["trl"] for row in rows]),
    )
    for kind in trainers:
        medians[f"{kind}_s"] = median_high([row[kind]["seconds"] for row in rows])
    for kind in trainers:
        medians[f"{kind}_rollout_s"] = median_high([row[kind]["rollout_s"] for row in rows])
    medians["ratio"] = {}
    for kind in trainers:
        medians["ratio"][kind] = median_high([row["ratio"][kind] for row in rows])
    print(json.dumps(medians))


def reward(text):
    """Something to compare samples by: the share of digits."""
    return sum(c.isdigit() for c in text) / max(len(text), 1)


# ---- nanorl --------------------------------------------------------------------------------------


class Ours:
    """nanorl's model, engine and optimizer in one precision, and its step."""

    def __init__(self, kind, tokenizer, messages):
        self.net = load_weights()
        self.net.compute_dtype = DTYPES[kind]
        self.engine = Engine(self.net)
        self.params = list(self.net.parameters())
        self.optimizers = make_optimizers(self.net, lr, lr, muon=False)
        self.tokenizer = tokenizer
        options = dict(add_generation_prompt=True, return_dict=False)
        self.prompt_ids = [tokenizer.apply_chat_template(m, **options) for m in messages]

    def step(self, number):
        """Step `number` -> what it took."""
        # Rollout.
        begun = time.perf_counter()
        groups = self.engine.generate(
            self.prompt_ids,
            samples,
            new_tokens,
            stop_ids={self.tokenizer.eos_token_id},
            keys=[prompts * number + i for i in range(prompts)],
        )
        rollout_s = time.perf_counter() - begun

        # Reward.
        rewards, rollouts = [], []
        for prompt, group in zip(self.prompt_ids, groups):
            texts = [self.tokenizer.decode(completion.ids) for completion in group]
            rewards.append([reward(text) for text in texts])
            rollouts.append(Rollout(None, prompt, group, None, None, None))
        advantages = grpo.advantages(torch.tensor(rewards, dtype=torch.float64))  # (P, G)

        # Learner and update.
        learnt = bench.learn(self.net, rollouts, advantages, device_tokens)
        flops = causal_sampling_flops(self.engine) + learnt.flops
        update(self.optimizers, self.params, 1.0, 1.0)
        self.engine.refresh()
        seconds = time.perf_counter() - begun
        return dict(
            seconds=seconds,
            rollout_s=rollout_s,
            tokens=learnt.tokens,
            tflop=flops / 1e12,
        )


def load_weights():
    """The model without its tokenizer. The ids are transformers', so nanorl need not know that."""
    with tempfile.TemporaryDirectory() as directory:
        for name in ("config.json", "model.safetensors"):
            source = os.path.abspath(os.path.join(model, name))
            os.symlink(source, os.path.join(directory, name))
        return load_model(directory)


# ---- TRL -----------------------------------------------------------------------------------------


class InTurns(transformers.TrainerCallback):
    """Takes the time of TRL's step, and then a step of each of ours."""

    def __init__(self, trainers):
        self.trainers = trainers
        self.rows = []

    def on_step_begin(self, *_args, **_kwargs):
        self.begun = time.perf_counter()

    def on_step_end(self, _args, state, _control, **_kwargs):
        row = dict(trl=time.perf_counter() - self.begun)
        for kind, trainer in self.trainers.items():
            row[kind] = trainer.step(state.global_step)
        row["rates"] = {}
        for name, dtype in (("float32", torch.float32), ("bfloat16", torch.bfloat16)):
            row["rates"][name] = matrix_rate(dtype) / 1e9
        row["ratio"] = {kind: row[kind]["seconds"] / row["trl"] for kind in self.trainers}
        self.rows.append(row)
        print(json.dumps(row), flush=True)


def trl_config(directory):
    """TRL's settings for the same step."""
    return trl.GRPOConfig(
        output_dir=directory,
        use_cpu=True,
        bf16=False,
        fp16=False,
        gradient_checkpointing=False,
        per_device_train_batch_size=prompts * samples,
        num_generations=samples,
        max_completion_length=new_tokens,
        temperature=1.0,
        top_k=0,
        top_p=1.0,
        beta=0.0,
        num_iterations=1,
        learning_rate=lr,
        max_steps=steps + 1,
        save_strategy="no",
        report_to="none",
        logging_steps=1,
        scale_rewards="none",
        loss_type="dapo",
        disable_tqdm=True,
    )


if __name__ == "__main__":
    main()
