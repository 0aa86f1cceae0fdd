# Sourced by the other recipes: a Python environment in .venv with nanorl in it. An active one is used as it is.
cd "$(dirname "${BASH_SOURCE[0]}")/.."
extras=${extras:-}
if [ -z "${VIRTUAL_ENV:-}" ]; then
    [ -x .venv/bin/python ] || python3 -m venv .venv || { echo "error: python3 -m venv failed (on Debian: apt-get install python3-venv)" >&2; exit 1; }
    . .venv/bin/activate
fi
if ! python -m pip install --quiet --disable-pip-version-check -e ".$extras" 2>.venv-install.log; then
    cat .venv-install.log >&2
    exit 1
fi
rm -f .venv-install.log
