#!/usr/bin/env bash
# All stages on a laptop's two cores, within half an hour: text, base, SFT, RL, and a table of what each can do. Depth 4, 3.3 million parameters.
#   NANORL_DATA=data bash runs/laptop.sh    on English, data/text/*.txt; with data/gsm8k/train.jsonl and data/alpaca/train.jsonl also on these
#   bash runs/laptop.sh                     without files: on what the tasks themselves write, and without GSM8K
# Stopped or killed, the same command goes on. BASE, SFT, RL, EVAL: constants of a stage besides, BASE='--steps=2000' for instance; runs/stages.sh
# names what else the environment sets; COMPILE= leaves torch.compile out. Nothing is fetched but packages. A model so small learns letters and sums, and does not solve GSM8K.
set -euo pipefail
. "$(dirname "$0")/stages.sh"
export HF_HUB_OFFLINE=1
run=${RUN:-laptop} data=${NANORL_DATA:-}
common="--run_name=$run --depth=4 ${COMPILE=$(command -v g++ >/dev/null && echo --compile || true)}"
SECONDS=0

# Letters and sums as the tasks write them: a fifth of what base reads, or all.
text=$out/$run/tasks.txt
[ -e "$text" ] || python - "$text" <<'END'
import os, sys
from nanorl.tasks import get_task
task = get_task("spelling=1,sum3=1")
os.makedirs(os.path.dirname(sys.argv[1]), exist_ok=True)
with open(sys.argv[1] + ".tmp", "w") as f:
    f.writelines(task.document(i) + "\n<|endoftext|>\n" for i in range(40000))
os.rename(f.name, sys.argv[1])
END

chats=spelling=6,sum3=6 tasks="spelling sum3"
[ -z "$(ls "$data"/text/*.txt 2>/dev/null)" ] || text="$data/text/*.txt,$text"
if [ -e "$data/gsm8k/train.jsonl" ]; then chats+=,gsm8k=1 tasks+=" gsm8k"; else echo "GSM8K is left out: there is no NANORL_DATA/gsm8k/train.jsonl"; fi
[ ! -e "$data/alpaca/train.jsonl" ] || chats+=",$data/alpaca/train.jsonl=1"

# So few tokens are little more than letters: the model can see how a word is spelled.
once "$out/$run/base" train_base.py $common --data="$text" --vocab_size=512 --steps=700 --batch_tokens=8192 --seq_len=512 \
    --log_every=50 --save_every=100 ${BASE:-}
once "$out/$run/base" eval.py --model="$out/$run/base" --task=base --problems=500 ${EVAL:-}

# Half of the demonstrations give the answer at once and half work it out: RL then chooses between the two.
once "$out/$run/sft" train_sft.py $common --data="$chats" --steps=600 --batch_tokens=8192 --seq_len=512 --log_every=50 --save_every=100 \
    --eval_problems=100 ${SFT:-}

once "$out/$run/rl" train_rl.py $common --task='spelling=1,sum3=1' --steps=100 --eval_every=20 --save_every=10 ${RL:-}
for task in $tasks; do  # the same problems before and after
    once "$out/$run/rl" eval.py --compare="$out/$run/sft,$out/$run/rl" --task="$task" --problems=300 --samples=0 \
        --max_new_tokens=$([ "$task" = gsm8k ] && echo 256 || echo 64) ${EVAL:-}
done
report "$run"
echo "this command took $((SECONDS / 60)) minutes"
