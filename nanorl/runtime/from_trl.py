"""TRL's names of a GRPO run's settings, and what they are called in train_rl.py.

docs/from_trl.md has the table with the defaults of both.
"""

# {TRL's name: (the constant here, or "" for none; what else to know)}
NAMES = {
    # ---- the run
    "model_name_or_path": ("model", ""),
    "output_dir": ("run_name", "a name, and the folder is out/<run_name>"),
    "dataset_name": ("task", "a task with its reward, nanorl/tasks"),
    "reward_funcs": ("task", "the reward is a method of the task"),
    "max_steps": ("steps", ""),
    "num_train_epochs": ("steps", "a pass is problems / prompts_per_step steps"),
    "bf16": ("dtype", "--dtype=bf16"),
    "fp16": ("dtype", "--dtype=bf16; fp16 there is not"),
    "report_to": ("track", ""),
    "save_steps": ("save_every", ""),
    "eval_steps": ("eval_every", ""),
    "logging_steps": ("log_every", ""),
    "resume_from_checkpoint": ("resume", "a run goes on by itself"),
    # ---- rollouts
    "num_generations": ("samples_per_prompt", ""),
    "per_device_train_batch_size": (
        "prompts_per_step",
        "problems of a step over all GPUs, each with samples_per_prompt completions",
    ),
    "generation_batch_size": ("prompts_per_step", "problems, not completions"),
    "gradient_accumulation_steps": (
        "device_tokens",
        "a step is split by itself into passes of at most so many tokens",
    ),
    "steps_per_generation": ("updates_per_rollout", "each on all of the step's samples"),
    "max_completion_length": ("max_new_tokens", ""),
    "max_prompt_length": ("", "prompts are never cut; one that does not fit is passed over"),
    "mask_truncated_completions": ("overlong", "--overlong=mask"),
    "use_vllm": ("", "nanorl has its own sampler, and needs no other"),
    "log_completions": ("", "every completion is in out/<run>/rl/rollouts"),
    # ---- objective
    "beta": ("kl_coef", ""),
    "num_iterations": ("updates_per_rollout", ""),
    "epsilon": ("clip_low", "and --clip_high"),
    "epsilon_high": ("clip_high", ""),
    "scale_rewards": ("advantage", "--advantage=zscore is 'group', --advantage=mean is 'none'"),
    "loss_type": (
        "loss_norm",
        "--loss_norm=token is 'dapo', sequence is 'grpo', constant is 'dr_grpo'",
    ),
    "importance_sampling_level": ("", "ratios are of tokens"),
    "sync_ref_model": ("", "the reference stays the model that the run starts from"),
    # ---- optimization
    "learning_rate": ("lr", ""),
    "optim": ("optimizer", ""),
    "adam_beta1": ("beta1", ""),
    "adam_beta2": ("beta2", ""),
    "lr_scheduler_type": ("lr_schedule", ""),
    "warmup_steps": ("warmup", ""),
    "warmup_ratio": ("warmup", "in steps"),
    "gradient_checkpointing": ("recompute", ""),
    "torch_compile": ("compile", ""),
    "lora_r": ("lora_rank", ""),
    "lora_target_modules": ("lora_targets", ""),
    "use_peft": ("lora_rank", "--lora_rank=32, say"),
}


def hint(name, constants):
    """What to tell a user who sets a constant by TRL's name; "" where it is none of them.

    constants: the names of the script's.
    """
    ours, more = NAMES.get(name, ("", ""))
    if ours in constants:
        return f"TRL's {name} is --{ours} here" + (f" ({more})" if more else "")
    return more if not ours else ""
