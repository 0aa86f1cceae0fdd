"""One on-policy step of nanorl and of TRL's GRPOTrainer in turns: the same model, prompts, numbers and reward.

    pip install trl accelerate
    NANORL_DATA=... python runs/against_trl.py --model=<a Llama or Qwen directory>

A step is rollout, reward, learner and update. nanorl's is taken in the precision of --dtypes, one after another. Ends with one JSON line."""

import json
import os
import sys
import tempfile
import time

import torch

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
from nanorl import grpo  # noqa: E402
from nanorl.batch import pack  # noqa: E402
from nanorl.engine import Engine  # noqa: E402
from nanorl.hf import load_model  # noqa: E402
from nanorl.learner import forward  # noqa: E402
from nanorl.optim import make_optimizers, update  # noqa: E402
from nanorl.report.cost import causal_sampling_flops, forward_flops  # noqa: E402
from nanorl.rollout import Rollout, length_table  # noqa: E402
from nanorl.runtime.config import configure  # noqa: E402
from nanorl.tasks import get_task  # noqa: E402
from nanorl.tools import bench  # noqa: E402

model = "out/smollm2"  # a Hugging Face model directory with a chat template
prompts = 4  # GSM8K training problems
samples = 8  # of each
new_tokens = 64  # most tokens of a completion
device_tokens = 16384  # nanorl: tokens of one forward
dtypes = "fp32,bf16"  # of nanorl's activations; TRL runs in fp32
steps = 3  # of each, after one to warm up
lr = 1e-6  # AdamW


def reward(text):
    """Something to compare samples by: the share of digits."""
    return sum(c.isdigit() for c in text) / max(len(text), 1)


def main():
    configure(globals())
    import transformers
    import trl

    tokenizer = transformers.AutoTokenizer.from_pretrained(model)
    task = get_task("gsm8k", split="train")
    messages = [task.problem(i).prompt for i in range(prompts)]
    ids = [
        tokenizer.apply_chat_template(m, add_generation_prompt=True, return_dict=False)
        for m in messages
    ]
    stops = {tokenizer.eos_token_id}

    with (
        tempfile.TemporaryDirectory() as weights
    ):  # the ids come from transformers' tokenizer, so nanorl's need not know it
        for name in ("config.json", "model.safetensors"):
            os.symlink(os.path.abspath(os.path.join(model, name)), os.path.join(weights, name))
        nets = {kind: load_model(weights) for kind in dtypes.split(",")}
    ours = {kind: [] for kind in nets}
    made = {}
    for kind, net in nets.items():
        net.compute_dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[kind]
        made[kind] = Engine(net), list(net.parameters()), make_optimizers(net, lr, lr, muon=False)

    def our_step(kind, number):
        net, (engine, params, optimizers) = nets[kind], made[kind]
        begun = time.perf_counter()
        groups = engine.generate(
            ids,
            samples,
            new_tokens,
            stop_ids=stops,
            keys=[prompts * number + i for i in range(prompts)],
        )
        rollout_s = time.perf_counter() - begun
        rewards = torch.tensor(
            [[reward(tokenizer.decode(c.ids)) for c in group] for group in groups],
            dtype=torch.float64,
        )
        rollouts = [
            Rollout(None, prompt, group, None, None, None) for prompt, group in zip(ids, groups)
        ]
        lengths = length_table(rollouts, samples)
        flops = causal_sampling_flops(engine)
        for batch in pack(
            rollouts, grpo.advantages(rewards), grpo.token_weights(lengths), device_tokens, "cpu"
        ):
            gain = grpo.reinforce(
                forward(net, batch, with_entropy=True).logprobs, batch.advantages
            )  # (S,)
            grpo.policy_loss(gain, batch.token_weights, lengths.sum()).backward()
            flops += 3 * forward_flops(
                net.config, batch.ids.numel(), batch.visible_pairs, len(gain)
            )
        update(optimizers, params, 1.0, 1.0)
        engine.refresh()
        return dict(
            seconds=time.perf_counter() - begun,
            rollout_s=rollout_s,
            tokens=int(lengths.sum()),
            tflop=flops / 1e12,
        )

    rounds = []

    class InTurns(transformers.TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            self.begun = time.perf_counter()

        def on_step_end(self, args, state, control, **kwargs):
            row = dict(
                trl=time.perf_counter() - self.begun,
                **{kind: our_step(kind, state.global_step) for kind in nets},
                rates={
                    str(kind)[6:]: bench.matrix_rate(kind) / 1e9
                    for kind in (torch.float32, torch.bfloat16)
                },
            )
            row["ratio"] = {kind: row[kind]["seconds"] / row["trl"] for kind in nets}
            rounds.append(row)
            print(json.dumps(row), flush=True)

    data = [dict(prompt=m) for m in messages] * (steps + 1)
    import datasets

    with tempfile.TemporaryDirectory() as out:
        config = trl.GRPOConfig(
            output_dir=out,
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
        policy = transformers.AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
        trl.GRPOTrainer(
            policy,
            reward_funcs=lambda completions, **_: [reward(c[0]["content"]) for c in completions],
            args=config,
            train_dataset=datasets.Dataset.from_list(data),
            processing_class=tokenizer,
            callbacks=[InTurns()],
        ).train()
    kept = rounds[1:]
    middle = lambda values: sorted(values)[len(values) // 2]
    print(
        json.dumps(
            dict(
                torch=torch.__version__,
                trl=trl.__version__,
                transformers=transformers.__version__,
                trl_s=middle([r["trl"] for r in kept]),
                **{f"{kind}_s": middle([r[kind]["seconds"] for r in kept]) for kind in nets},
                **{
                    f"{kind}_rollout_s": middle([r[kind]["rollout_s"] for r in kept])
                    for kind in nets
                },
                ratio={kind: middle([r["ratio"][kind] for r in kept]) for kind in nets},
            )
        )
    )


if __name__ == "__main__":
    main()
