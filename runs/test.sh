#!/usr/bin/env bash
# Environment, install, tests. Arguments go to pytest: `bash runs/test.sh -m slow`.
set -euo pipefail
extras="[dev]"
. "$(dirname "$0")/env.sh"
python -m pytest "$@"
