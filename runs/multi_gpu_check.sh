#!/usr/bin/env bash
# What a first run on several GPUs of one machine should tell, in at most six minutes (docs/cuda.md).
#   bash runs/multi_gpu_check.sh        all GPUs there are; or parts by name: gradient reduce dead
set -euo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/gpu_env.sh"
exec "$python" runs/multi_gpu_check.py "$@"
