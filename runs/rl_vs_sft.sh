#!/usr/bin/env bash
# RL or more SFT? From one SFT model two ways on, for as many FLOPs: A by RL, B by SFT on the same task. Six benchmarks before and after, a report with a verdict.
#   bash runs/rl_vs_sft.sh [--depth=3] [--task=sum3] [--task_args='demonstrations=worked'] [--seeds=0,1,2] [--name=sum3] [--start=out/d20/sft]
#                          [--problems=1000] [--bench=300] [--base='--steps=150 ...'] [--sft='...'] [--rl='...'] [--new_tokens=64]
# --start: an SFT or published model, in place of a base and SFT of each seed. --bench: problems of a benchmark, 0: all. --base, --sft and --rl: constants of
# that stage, with spaces between, in place of those below, which are a laptop's. What is done is not done again; humaneval's code is run. runs/stages.sh names what
# the environment sets: AFTER_SAVE, NPROC. runs/rl_vs_sft_gsm8k.sh asks it at depth 20 on GSM8K.
set -euo pipefail
depth=3 task=sum3 task_args= seeds=0,1,2 name= start= problems=1000 bench=300 new_tokens=64
base="--documents=12000 --steps=150 --batch_tokens=2048 --seq_len=128" sft="--steps=300 --batch_tokens=2048 --seq_len=128" rl="--steps=40 --device_tokens=8192"
for argument in "$@"; do
    case $argument in
    --depth=* | --task=* | --task_args=* | --seeds=* | --name=* | --start=* | --problems=* | --bench=* | --new_tokens=* | --base=* | --sft=* | --rl=*)
        option=${argument%%=*}; printf -v "${option#--}" %s "${argument#*=}" ;;
    *) echo "error: $argument: the first lines of $0 name what it takes" >&2; exit 1 ;;
    esac
done
[ ! -d "$start" ] || start=$(cd "$start" && pwd)
extras="[plot]"
. "$(dirname "$0")/stages.sh"
name=${name:-$task${task_args:+-$task_args}}
name=${name//[^A-Za-z0-9._-]/_}
folder=versus/$name

judge() {  # a stage's folder, or a model: its newest checkpoint on the six benchmarks and on the task, once
    local newest mark
    newest=$(ls -d "$1"/step_* 2>/dev/null | tail -1) || true
    mark=$out/$folder/judged-$(echo "$1 $newest $problems $bench $new_tokens ${NANORL_DATA:-}" | cksum | tr " " -)
    [ ! -e "$mark" ] || return 0
    everywhere eval.py --model="$1" --task=benchmarks --how=likelihood,greedy --problems="$bench" --allow_code
    everywhere eval.py --model="$1" --task="$task" --task_args="$task_args" --problems="$problems" --samples=8 --max_new_tokens="$new_tokens" --examples=0
    mkdir -p "$out/$folder"
    touch "$mark"
}

for seed in ${seeds//,/ }; do
    run=$folder/seed$seed
    common=(--run_name="$run" --depth="$depth" --task="$task" --task_args="$task_args" --seed="$seed")
    from=${start:-$out/$run/sft}
    if [ -z "$start" ]; then
        once "$out/$run/base" train_base.py "${common[@]}" $base
        once "$out/$run/sft" train_sft.py "${common[@]}" $sft
    fi
    judge "$from"
    once "$out/$run/rl" train_rl.py "${common[@]}" --model="$from" --eval_every=5 --max_new_tokens="$new_tokens" $rl
    judge "$out/$run/rl"
    once "$out/$run/sft_more" train_sft.py --match_flops="$out/$run/rl" --eval_problems=400 --eval_every=40 --eval_new_tokens="$new_tokens"
    judge "$out/$run/sft_more"
done
python -m nanorl.tools.versus "$out/$folder" "$seeds"
send "$folder"
