# Sourced by the checks of GPUs: sets $python. Nothing is installed where all is there.
cd "$(dirname "${BASH_SOURCE[0]}")/.."
python=${PYTHON:-python3}
new_enough='import torch; raise SystemExit(tuple(map(int, torch.__version__.split(".")[:2])) < (2, 11))'
if "$python" -c "$new_enough" 2>/dev/null; then
    for package in numpy tiktoken tokenizers safetensors tqdm jinja2; do
        "$python" -c "import $package" 2>/dev/null || "$python" -m pip install --quiet --disable-pip-version-check "$package"
    done
else
    . runs/env.sh
    python=python
fi
