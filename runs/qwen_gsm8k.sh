#!/usr/bin/env bash
# GSM8K by RL from a published Qwen2.5, on one node with GPUs: R1's template, 16 problems x 16 samples a step, one update each, 64 steps.
#   bash runs/qwen_gsm8k.sh                                     all GPUs there are; on a CPU one process
#   MODEL=Qwen/Qwen2.5-0.5B-Instruct bash runs/qwen_gsm8k.sh    a smaller one
#   bash runs/qwen_gsm8k.sh --lora_rank=32 --lr=5e-5            other constants of train_rl.py, but the task's; this needs 4 bytes a parameter and not 18
# NOT RUN here with the published weights (no GPU). A published run of this recipe went from 52% to 65% on two H100s; what was measured is
# a model of the 0.5B's shape with random weights on a CPU (docs/results.md).
set -euo pipefail
. "$(dirname "$0")/stages.sh"
model=${MODEL:-Qwen/Qwen2.5-1.5B-Instruct}
run=${RUN:-qwen-gsm8k}
task="--task=gsm8k --task_args=template=r1 --max_new_tokens=512"
everywhere train_rl.py --run_name="$run" --model="$model" $task --prompts_per_step=16 --samples_per_prompt=16 --lr=2e-6 --steps=64 \
    --eval_every=16 --eval_problems=473 --save_every=16 "$@"
everywhere eval.py --compare="$model,$out/$run/rl" $task --split=test --problems=0 --samples=0
