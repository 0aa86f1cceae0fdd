#!/usr/bin/env bash
# What RL teaches on each generated task, from the same short base and SFT: minutes a task on a laptop.
#   bash runs/tasks.sh [task...]
set -euo pipefail
. "$(dirname "$0")/env.sh"
seed=${SEED:-0}
[ $# -gt 0 ] || set -- sum3 0-20 2-digit chain4 3x2 counting comparison binary spelling countdown
for task in "$@"; do
    case $task in  # tokens that the longest worked answer takes
        countdown) tokens=192 ;;
        3x2 | binary) tokens=128 ;;
        *) tokens=64 ;;
    esac
    run=task-$task-$seed
    common="--run=$run --depth=3 --task=$task --seed=$seed"
    python train_base.py $common --documents=12000 --steps=150 --batch_tokens=2048 --seq_len=256 --log_every=150
    python train_sft.py $common --steps=300 --batch_tokens=2048 --seq_len=256 --log_every=300
    python train_rl.py $common --steps=60 --eval_every=20 --max_new_tokens=$tokens
    python eval.py --compare="${NANORL_OUT:-out}/$run/sft,${NANORL_OUT:-out}/$run/rl" --task="$task" --max_new_tokens=$tokens
done
