#!/usr/bin/env bash
# From text on the hub to a model that chats, does sums and is judged, on a node with eight GPUs: depth 20, 450 million parameters.
#   bash runs/speedrun.sh                    all stages; stopped or killed, the same command goes on
#   bash runs/speedrun.sh base sft           only these stages, of base sft rl
#   DEPTH=16 RUN=d16 bash runs/speedrun.sh   another size; BASE, SFT, RL, EVAL: constants besides; more is in runs/stages.sh
# The plan comes first: hours, dollars, memory. NOT RUN here as a whole (no node): every command was tried at a small size.
set -euo pipefail
. "$(dirname "$0")/stages.sh"
depth=${DEPTH:-20} run=${RUN:-speedrun}
[ $# -gt 0 ] || set -- base sft rl
common="--run_name=$run --depth=$depth"
plan --depth="$depth" --passes=2

for stage in "$@"; do
    case $stage in
    base)  # 20 tokens a parameter, streamed; then what it knows, without a chat
        once "$out/$run/base" train_base.py $common --data=hf:karpathy/climbmix-400b-shuffle --vocab_size=32768 \
            --batch_tokens=524288 --seq_len=2048 --eval_tokens=2097152 --save_every=1000 ${BASE:-}
        once "$out/$run/base" eval.py --model="$out/$run/base" --task=base --shots=5 --problems=0 ${EVAL:-} ;;
    sft)  # conversations, and what the benchmarks ask for: GSM8K's own solutions, labels, letters
        once "$out/$run/sft" train_sft.py $common --data='hf:HuggingFaceTB/smol-smoltalk=8, gsm8k=2, mmlu:auxiliary=1, spelling=1' \
            --batch_tokens=131072 --seq_len=2048 --eval_every=200 --eval_problems=200 --eval_new_tokens=256 --save_every=200 ${SFT:-} ;;
    rl)  # GSM8K, told only right or wrong
        once "$out/$run/rl" train_rl.py $common --task=gsm8k --prompts_per_step=64 --samples_per_prompt=16 --max_new_tokens=256 \
            --steps=220 --eval_every=20 --save_every=20 ${RL:-}
        # The same problems before and after. The code of humaneval is the model's, and is run.
        once "$out/$run/rl" eval.py --compare="$out/$run/sft,$out/$run/rl" --task=benchmarks --how=likelihood,greedy --problems=0 --allow_code ${EVAL:-}
        once "$out/$run/rl" eval.py --compare="$out/$run/sft,$out/$run/rl" --task=gsm8k --split=test --problems=0 --max_new_tokens=256 ${EVAL:-} ;;
    *) echo "error: no stage $stage: there are base, sft and rl" >&2; exit 1 ;;
    esac
done
report "$run"
