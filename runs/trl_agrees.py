"""Does nanorl compute what TRL's GRPOTrainer computes? TRL takes one step; its own completions are then given to nanorl, and advantages, loss and
gradient are compared, for several settings of both.

    pip install trl accelerate
    NANORL_DATA=... python runs/trl_agrees.py --model=<a Llama or Qwen directory>

All in fp32. The loss compared is PPO's clipped one, whose value TRL reports; nanorl's default form, -A log pi, has another value and the same gradient,
which is compared too.

transformers does not train the embedding of the pad token as an input (nn.Embedding's padding_idx), also where, as in SmolLM2, that is the token that ends
every turn of the prompt. nanorl has no pad token and does. `gradient_off` leaves that one row out, `gradient_off_with_pad_row` does not. One JSON line a
setting."""

import json
import os
import sys
import tempfile

import torch

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
from nanorl import grpo  # noqa: E402
from nanorl.batch import pack  # noqa: E402
from nanorl.hf import load_model, local_model  # noqa: E402
from nanorl.learner import forward  # noqa: E402
from nanorl.rollout import Rollout, length_table  # noqa: E402
from nanorl.runtime.config import configure  # noqa: E402
from nanorl.sampling import Completion  # noqa: E402
from nanorl.tasks import get_task  # noqa: E402

model = ""  # a model directory or hub id with a chat template
prompts = 4  # GSM8K training problems
samples = 4  # of each
new_tokens = 48  # most tokens of a completion
# ours: advantage, loss_norm, temperature -> TRL's names for them
SETTINGS = {
    ("mean", "token", 1.0): dict(scale_rewards="none", loss_type="dapo"),
    ("zscore", "sequence", 1.0): dict(scale_rewards="group", loss_type="grpo"),
    ("mean", "constant", 0.8): dict(scale_rewards="none", loss_type="dr_grpo"),
}


def reward(text):
    """Something to compare samples by: the share of digits, coarsely, so that some are equal."""
    return round(sum(c.isdigit() for c in text) / max(len(text), 1), 1)


def main():
    configure(globals())
    import datasets
    import transformers
    import trl

    path = local_model(model)
    tokenizer = transformers.AutoTokenizer.from_pretrained(path)
    task = get_task("gsm8k", split="train")
    data = datasets.Dataset.from_list([dict(prompt=task.problem(i).prompt) for i in range(prompts)])
    seen = {}

    class Watched(trl.GRPOTrainer):
        def compute_loss(self, net, inputs, *args, **kwargs):
            loss = super().compute_loss(net, inputs, *args, **kwargs)
            seen.update(
                {
                    name: inputs[name].clone()
                    for name in (
                        "prompt_ids",
                        "prompt_mask",
                        "completion_ids",
                        "completion_mask",
                        "advantages",
                    )
                },
                loss=float(loss),
            )
            return loss

    class Gradients(transformers.TrainerCallback):
        def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
            seen["gradient"] = {name: p.grad.clone() for name, p in model.named_parameters()}

    for (advantage, loss_norm, temperature), named in SETTINGS.items():
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
                temperature=temperature,
                top_k=0,
                top_p=1.0,
                beta=0.0,
                num_iterations=1,
                learning_rate=1e-6,
                max_steps=1,
                max_grad_norm=0.0,
                save_strategy="no",
                report_to="none",
                disable_tqdm=True,
                **named,
            )
            Watched(
                transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32),
                reward_funcs=lambda completions, **_: [
                    reward(c[0]["content"]) for c in completions
                ],
                args=config,
                train_dataset=data,
                processing_class=tokenizer,
                callbacks=[Gradients()],
            ).train()

        # ---- the same completions, by nanorl: TRL's rows are shuffled, so they are put together by their prompt
        groups = {}
        for prompt, p_mask, ids, c_mask, a in zip(
            *(
                seen[name].tolist()
                for name in (
                    "prompt_ids",
                    "prompt_mask",
                    "completion_ids",
                    "completion_mask",
                    "advantages",
                )
            )
        ):
            prompt, ids = (
                [i for i, m in zip(prompt, p_mask) if m],
                [i for i, m in zip(ids, c_mask) if m],
            )
            groups.setdefault(tuple(prompt), []).append(
                (Completion(ids, [0.0] * len(ids), True), a)
            )
        rollouts = [
            Rollout(None, list(prompt), [c for c, _ in group], None, None, None)
            for prompt, group in groups.items()
        ]
        rewards = torch.tensor(
            [
                [reward(tokenizer.decode(c.ids, skip_special_tokens=True)) for c in r.completions]
                for r in rollouts
            ],
            dtype=torch.float64,
        )
        theirs = torch.tensor(
            [[a for _, a in group] for group in groups.values()], dtype=torch.float64
        )  # (P, G)
        advantages = grpo.advantages(rewards, advantage)  # (P, G)
        lengths = length_table(rollouts, samples)
        weights, denominator = (
            grpo.token_weights(lengths, loss_norm, new_tokens),
            grpo.denominator(lengths, loss_norm),
        )
        net, row = (
            load_model(path),
            dict(
                advantage=advantage,
                loss_norm=loss_norm,
                temperature=temperature,
                trl=trl.__version__,
                tokens=int(lengths.sum()),
            ),
        )
        table, pad_row = (
            "model.embed_tokens.weight",
            transformers.AutoConfig.from_pretrained(path).pad_token_id,
        )
        off = lambda a, b: float(
            (
                sum((a[name] - b[name]).double().square().sum() for name in b)
                / sum(b[name].double().square().sum() for name in b)
            ).sqrt()
        )
        for form in ("clipped", "reinforce"):
            loss = 0.0
            for batch in pack(rollouts, advantages, weights, 16384, "cpu"):
                logprobs = forward(net, batch, temperature).logprobs
                objective = (
                    grpo.clipped(logprobs, logprobs.detach(), batch.advantages)
                    if form == "clipped"
                    else grpo.reinforce(logprobs, batch.advantages)
                )
                part = grpo.policy_loss(objective, batch.token_weights, denominator)
                part.backward()
                loss += float(part.detach())
            found, expected = (
                {name: p.grad for name, p in net.named_parameters()},
                dict(seen["gradient"]),
            )
            row[form] = dict(loss=loss, gradient_off_with_pad_row=off(found, expected))
            if pad_row is not None:
                expected[table] = expected[table].index_copy(
                    0, torch.tensor([pad_row]), found[table][[pad_row]]
                )
            row[form]["gradient_off"] = off(found, expected)
            for p in net.parameters():
                p.grad = None
        row.update(
            loss_of_trl=seen["loss"],
            advantages_off=float((advantages - theirs).abs().max()),
            groups_without_signal=int(grpo.no_signal(rewards).sum()),
        )
        print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
