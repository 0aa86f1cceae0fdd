#!/usr/bin/env bash
# From nothing to a model that RL made better, in minutes on a laptop: three-digit sums.
#   bash runs/quickstart.sh [seed]
# The demonstrations come from two kinds of writers: half give the answer at once, half work it out first. SFT learns
# to do either; RL, told only right or wrong, finds out that working it out pays.
set -euo pipefail
. "$(dirname "$0")/env.sh"
seed=${1:-0}
run=quickstart
[ "$seed" = 0 ] || run=quickstart$seed
out=${NANORL_OUT:-out}/$run
rm -rf "$out"
SECONDS=0
common="--run_name=$run --depth=3 --task=sum3 --seed=$seed"
python train_base.py $common --documents=12000 --steps=150 --batch_tokens=2048 --seq_len=128 --log_every=50
python train_sft.py $common --steps=300 --batch_tokens=2048 --seq_len=128 --log_every=50
python train_rl.py $common --steps=40 --eval_every=10 --device_tokens=8192
for stage in base sft rl; do
    echo
    python eval.py --model="$out/$stage" --task=sum3 --problems=1000 --samples=8 --examples=0
done
echo
python -m nanorl.tools.summary "$out" $SECONDS
python -m nanorl.tools.report "$out"
