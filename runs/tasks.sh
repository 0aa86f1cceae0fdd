#!/usr/bin/env bash
# What RL teaches on each generated task, from a short base and SFT: a few minutes a task on a laptop.
#   bash runs/tasks.sh [task...]        SEED=1 bash runs/tasks.sh counting
set -euo pipefail
. "$(dirname "$0")/env.sh"
seed=${SEED:-0}
[ $# -gt 0 ] || set -- counting comparison binary spelling countdown sum3 0-20 2-digit
for task in "$@"; do
    base=150 sft=300 lr=0 tokens=64  # steps of base and SFT; RL's learning rate; tokens that the longest worked answer takes
    case $task in
        comparison) sft=150 lr=7e-5 ;;  # it is nearly solved by SFT, and the default rate harms it (docs/log.md)
        spelling) sft=150 ;;
        binary) tokens=128 ;;
        countdown) base=400 sft=800 tokens=160 ;;  # it has arithmetic to learn first
    esac
    run=task-$task-$seed
    common="--run_name=$run --depth=3 --task=$task --seed=$seed"
    python train_base.py $common --documents=12000 --steps=$base --batch_tokens=2048 --seq_len=256 --log_every=150
    python train_sft.py $common --steps=$sft --batch_tokens=2048 --seq_len=256 --log_every=150
    python train_rl.py $common --steps=60 --lr=$lr --eval_every=20 --max_new_tokens=$tokens
    python eval.py --compare="${NANORL_OUT:-out}/$run/sft,${NANORL_OUT:-out}/$run/rl" --task="$task" --max_new_tokens=$tokens
done
