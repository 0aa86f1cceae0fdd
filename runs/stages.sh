# Sourced by the recipes that go through all stages. A recipe may be stopped at any moment, kill -9
# included: the same command then goes on. Read from the environment:
#   AFTER_SAVE='rclone copy {dir} gdrive:runs/{run}'   results leave after every save and evaluation
#   NPROC=4       processes, one a GPU; by default one for each GPU there is
#   GPU=a100      the name by which the plan knows the GPUs, where it does not find out
#   DOLLARS=3     what a GPU costs an hour, for the plan
. "$(dirname "${BASH_SOURCE[0]}")/env.sh"
out=${NANORL_OUT:-out}

# The GPUs: how many, how many GB each, and their name.
read -r gpus gigabytes gpu_name < <(python -c "
import torch
gpus = torch.cuda.device_count()
card = torch.cuda.get_device_properties(0) if gpus else None
print(gpus, card.total_memory >> 30 if gpus else 0, card.name if gpus else 'cpu')")
NPROC=${NPROC:-$gpus}
launch=(python)
[ "$NPROC" -lt 2 ] || launch=(torchrun --nproc_per_node="$NPROC" --)

# What one GPU takes in one forward, for the plan. The scripts find it out by themselves.
device_tokens=16384
[ "$gigabytes" -lt 70 ] || device_tokens=65536

plan() {  # constants of the plan: what the stages will take, before the first begins
    local name=${GPU:-}
    [ -n "$name" ] || case ${gpu_name,,} in
        *h100*) name=h100 ;; *h200*) name=h200 ;; *b200*) name=b200 ;; *l40s*) name=l40s ;; *4090*) name=rtx4090 ;;
        *a100*) name=a100; [ "$gigabytes" -ge 70 ] || name=a100-40gb ;;
        cpu) name=cpu ;;
        *) echo "error: the plan does not know $gpu_name: GPU=a100 plans as for that one" >&2; exit 1 ;;
    esac
    local count=$NPROC
    [ "$count" -gt 0 ] || count=1
    say python -m nanorl.tools.plan --gpus="$count" --gpu="$name" --device_tokens="$device_tokens" --dollars_per_gpu_hour="${DOLLARS:-0}" "$@"
}

say() {  # a command: shown, and run
    echo; printf "$"; printf " %q" "$@"; echo
    "$@"
}

everywhere() {  # a script and its constants: on all GPUs, and what it saves leaves by AFTER_SAVE
    say "${launch[@]}" "$@" ${AFTER_SAVE:+--after_save="$AFTER_SAVE"}
}

finished() {  # a stage's folder: whether the checkpoint of its last step is there
    python - "$1" <<'END'
import json, os, sys
card = os.path.join(sys.argv[1], "run.json")
if not os.path.exists(card):
    raise SystemExit(1)
with open(card) as f:
    run = json.load(f)
last = run.get("steps") or run["settings"]["steps"]
raise SystemExit(not os.path.exists(os.path.join(sys.argv[1], f"step_{last:06d}", "DONE")))
END
}

once() {  # a stage's folder, a script and its constants: run on all GPUs, unless it has ended well with these before
    local folder=$1; shift
    local mark
    mark=$folder/done-$(echo "$*" | cksum | cut -d " " -f 1)
    if [ -e "$mark" ]; then echo "done before: $*"; return 0; fi
    everywhere "$@"
    case $1 in train_*) finished "$folder" || { echo "error: $folder stopped before its last step: the same command goes on" >&2; exit 1; } ;; esac
    touch "$mark"
}

send() {  # a folder below out/: it leaves by AFTER_SAVE, after what no script has written
    local command=${AFTER_SAVE:-}
    command=${command//"{dir}"/$(printf %q "$out/$1")}
    [ -z "$command" ] || say bash -c "${command//"{run}"/$(printf %q "$1")}" || echo "WARNING: AFTER_SAVE failed: $command"
}

report() {  # a run: its stages side by side, also in report.md, and its page
    say python -m nanorl.tools.stages "$out/$1"
    say python -m nanorl.tools.report "$out/$1"
    send "$1"
}
