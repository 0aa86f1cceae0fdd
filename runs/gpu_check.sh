#!/usr/bin/env bash
# What a first run on a GPU should tell, in two halves of at most six minutes (docs/cuda.md).
#   bash runs/gpu_check.sh              both halves
#   bash runs/gpu_check.sh 1            the first, or 2, or parts by name: decode learner
#   OUT=results bash runs/gpu_check.sh  where the results go, by default out/gpu_check
# A python3 with torch from 2.11 on is used as it is, with what it lacks of the small packages; where there is none, runs/env.sh makes an environment.
set -euo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/gpu_env.sh"
exec "$python" runs/gpu_check.py "$@"
