# Sourced by the other recipes: a Python environment in .venv with nanorl in it. An active one is
# used as it is, and so is a torch that it already has, if nanorl can use it.
cd "$(dirname "${BASH_SOURCE[0]}")/.."
extras=${extras:-}
if [ -z "${VIRTUAL_ENV:-}" ]; then
    [ -x .venv/bin/python ] || python3 -m venv .venv || { echo "error: python3 -m venv failed (on Debian: apt-get install python3-venv)" >&2; exit 1; }
    . .venv/bin/activate
fi
has_torch() {
    python -c "
from importlib.metadata import version
major, minor = version('torch').split('.')[:2]
raise SystemExit((int(major), int(minor)) < (2, 11))" 2>/dev/null
}
pins="--constraint=runs/constraints.txt"
has_torch && pins=""
if ! python -m pip install --quiet --disable-pip-version-check $pins -e ".$extras" 2>.venv-install.log; then
    cat .venv-install.log >&2
    exit 1
fi
rm -f .venv-install.log
