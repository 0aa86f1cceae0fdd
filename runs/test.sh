#!/usr/bin/env bash
# Environment, install, tests in two processes. Arguments go to pytest: `bash runs/test.sh -m slow`.
set -euo pipefail
extras="[dev]"
. "$(dirname "$0")/env.sh"
python -m pytest -n 2 --dist worksteal "$@"
