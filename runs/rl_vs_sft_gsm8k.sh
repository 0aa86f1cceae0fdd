#!/usr/bin/env bash
# RL or more SFT on GSM8K at depth 20? The start is runs/speedrun.sh's SFT model, which has had GSM8K's solutions twice among its conversations;
# from there one arm goes on by RL, the other by SFT on the same problems, for as many FLOPs, with three seeds.
#   bash runs/rl_vs_sft_gsm8k.sh                        base and SFT too, where they are not done yet
#   SEEDS=0 DEPTH=16 RUN=d16 bash runs/rl_vs_sft_gsm8k.sh
# NOT RUN here as a whole (no node): every command was tried at a small size.
set -euo pipefail
export DEPTH=${DEPTH:-20} RUN=${RUN:-speedrun}
cd "$(dirname "$0")/.."
bash runs/speedrun.sh base sft
bash runs/rl_vs_sft.sh --depth="$DEPTH" --task=gsm8k --name="gsm8k-d$DEPTH" --seeds="${SEEDS:-0,1,2}" --start="${NANORL_OUT:-out}/$RUN/sft" \
    --problems=0 --bench=0 --new_tokens=256 --rl="--prompts_per_step=64 --samples_per_prompt=16 --steps=110 --eval_every=10 --save_every=20"
