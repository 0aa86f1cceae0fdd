#!/usr/bin/env bash
# The same on one GPU: depth 12, about 150 million parameters.
#   bash runs/single_gpu.sh                     stopped or killed, the same command goes on
#   DEPTH=8 RUN=d8 bash runs/single_gpu.sh      another size; BASE, SFT, RL, EVAL: constants besides; more is in runs/stages.sh
# The plan comes first. NOT RUN here as a whole (no GPU): every command was tried at a small size.
set -euo pipefail
export NPROC=1
. "$(dirname "$0")/stages.sh"
depth=${DEPTH:-12} run=${RUN:-single_gpu}
common="--run_name=$run --depth=$depth"
plan --depth="$depth" --batch_tokens=262144 --seq_len=1024 --problems=6400 --prompts_per_step=32

once "$out/$run/base" train_base.py $common --data=hf:HuggingFaceFW/fineweb-edu:sample-10BT --vocab_size=32768 \
    --batch_tokens=262144 --seq_len=1024 --eval_tokens=1048576 --save_every=500 ${BASE:-}
once "$out/$run/base" eval.py --model="$out/$run/base" --task=base --problems=0 ${EVAL:-}

once "$out/$run/sft" train_sft.py $common --data='hf:HuggingFaceTB/smol-smoltalk=8, gsm8k=2, mmlu:auxiliary=1, spelling=1' \
    --batch_tokens=65536 --seq_len=1024 --eval_every=400 --eval_problems=200 --eval_new_tokens=256 --save_every=200 ${SFT:-}

# GSM8K is hard at this size, so letters are asked with it: the report shows each by itself.
once "$out/$run/rl" train_rl.py $common --task='gsm8k=1,spelling=1' --prompts_per_step=32 --samples_per_prompt=16 --max_new_tokens=256 \
    --steps=200 --eval_every=20 --save_every=20 ${RL:-}
once "$out/$run/rl" eval.py --compare="$out/$run/sft,$out/$run/rl" --task=benchmarks --how=likelihood,greedy --problems=0 --allow_code ${EVAL:-}
report "$run"
