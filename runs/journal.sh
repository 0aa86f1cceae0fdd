#!/usr/bin/env bash
# Claims about GRPO on arithmetic, tried on this model: each experiment changes one constant of the defaults.
#   bash runs/journal.sh [experiment...]                 SEEDS="0 1" bash runs/journal.sh kl
# Experiments: kl temperature group problems direct advantage lr reward curriculum mixture updates control
# An RL run takes 45 s on two cores (measured for the defaults; control and updates longer). What is done is not done again; a table of each experiment comes last.
set -euo pipefail
. "$(dirname "$0")/env.sh"
[ $# -gt 0 ] || set -- kl temperature group problems direct advantage lr reward curriculum mixture updates control
out=${NANORL_OUT:-out}
quiet="--log_every=1000"

start() {  # name, seed, base steps, SFT steps, task and its settings: a model to start from, made once, in journal/start-<name>-<seed>
    local name=$1 seed=$2 base=$3 sft=$4; shift 4
    start=journal/start-$name-$seed
    [ ! -e "$out/$start/finished" ] || return 0
    local common="--run_name=$start --depth=3 --seed=$seed --batch_tokens=2048 --seq_len=128 $quiet"
    python train_base.py $common --documents=12000 --steps="$base" "$@"
    python train_sft.py $common --steps="$sft" "$@"
    touch "$out/$start/finished"
}

rl() {  # experiment, what is varied, seed, constants: one run from $start, in journal/<experiment>/<what>-<seed>
    local run=journal/$1/$2-$3 seed=$3; shift 3
    python train_rl.py --run_name="$run" --model="$out/$start/sft" --depth=3 --seed="$seed" --steps=30 --eval_every=15 --eval_problems=1000 --save_every=0 "$@" \
        | grep -E "WARNING|held-out before|/[0-9]+ .*val" || [ "${PIPESTATUS[0]}" = 0 ]
}

for experiment in "$@"; do
    for seed in ${SEEDS:-0 1 2}; do
        case $experiment in
        direct | curriculum | mixture | control) ;;
        *) start mixed $seed 150 300 --task=sum3  # the rest starts from here, and is held against the defaults
            rl baseline defaults $seed --task=sum3 ;;
        esac
        case $experiment in
        kl) for beta in 0.1 0.2; do rl kl beta=$beta $seed --task=sum3 --kl_coef=$beta; done ;;
        temperature) rl temperature T=0.7 $seed --task=sum3 --temperature=0.7 ;;
        group) for g in 4 64; do rl group G=$g $seed --task=sum3 --samples_per_prompt=$g --prompts_per_step=$((256 / g)); done ;;  # 256 rows a step
        problems) for n in 100 500; do rl problems n=$n $seed --task=sum3 --problems=$n; done ;;
        advantage) rl advantage drgrpo $seed --task=sum3 --loss_norm=constant
            rl advantage zscore-sequence $seed --task=sum3 --advantage=zscore --loss_norm=sequence ;;
        lr) for lr in 5e-5 8e-4; do rl lr lr=$lr $seed --task=sum3 --lr=$lr; done ;;
        reward) for kind in signed graded; do rl reward $kind $seed --task=sum3 --task_args=rewards=$kind; done ;;
        updates) for k in 2 4; do rl updates K=$k $seed --task=sum3 --updates_per_rollout=$k; done ;;
        direct) start direct $seed 150 140 --task=2-digit --task_args=demonstrations=direct  # no column work to find: only adding in the head, or by heart
            for n in 100 500 0; do rl direct n=$n $seed --task=2-digit --problems=$n --lr=1e-4 --steps=100 --eval_every=50 --max_new_tokens=8; done ;;
        curriculum) start three $seed 150 300 --task='0-20=25,2-digit=25,sum3=50'
            rl curriculum none $seed --task=sum3
            rl curriculum easy-first $seed --task='0-20 until 8; 2-digit until 16; sum3' ;;
        mixture) start mix $seed 150 400 --task='sum3=50,counting=25,comparison=25'
            rl mixture pure $seed --task=sum3
            rl mixture 50-25-25 $seed --task='sum3=50,counting=25,comparison=25' ;;
        control) for task in 3x2 chain4; do
            start $task $seed 300 600 --task=$task
            rl control $task $seed --task=$task --steps=60 --eval_every=20
            done ;;
        *) echo "error: no experiment $experiment (the first lines of $0 name them)" >&2; exit 1 ;;
        esac
    done
done
for experiment in "$@"; do
    echo; echo "$experiment"
    case $experiment in direct | curriculum | mixture | control) with= ;; *) with=$out/journal/baseline ;; esac
    python -m nanorl.tools.table $with "$out/journal/$experiment"
done
