"""Hugging Face model directories, read and written. The parameter names already match; this is config, tying,
dtypes and files."""
import json
import os

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from nanorl.gpt import GPT, GPTConfig, rope_table
from nanorl.tokenizer import Tokenizer, read_json

# Each architecture's own flags; everything else is in config.json.
ARCHITECTURES = {"LlamaForCausalLM": {}, "Qwen2ForCausalLM": {"qkv_bias": True}, "Qwen3ForCausalLM": {"qk_norm": True}}


def read_config(path):
    """`path`/config.json -> GPTConfig. Raises ValueError naming what nanorl does not implement."""
    c = read_json(os.path.join(path, "config.json"))
    architecture = (c.get("architectures") or ["none"])[0]
    if architecture not in ARCHITECTURES:
        raise ValueError(f"architecture {architecture} is not supported: nanorl reads {', '.join(ARCHITECTURES)}")
    rope = c.get("rope_parameters") or c.get("rope_scaling") or {}
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind != "default":
        raise ValueError(f"RoPE scaling {kind!r} is not supported")
    heads = c["num_attention_heads"]
    return GPTConfig(
        vocab_size=c["vocab_size"], n_layer=c["num_hidden_layers"], n_embd=c["hidden_size"], n_head=heads,
        n_kv_head=c.get("num_key_value_heads") or heads, head_dim=c.get("head_dim") or c["hidden_size"] // heads,
        n_inner=c["intermediate_size"], context=c["max_position_embeddings"],
        tie_embeddings=c.get("tie_word_embeddings", False), rope_theta=rope.get("rope_theta", c.get("rope_theta", 10000.0)),
        norm_eps=c["rms_norm_eps"], n_tokens=c.get("n_tokens", 0), **ARCHITECTURES[architecture])


def write_config(c, path, dtype):
    architecture = "Qwen3ForCausalLM" if c.qk_norm else "Qwen2ForCausalLM" if c.qkv_bias else "LlamaForCausalLM"
    config = dict(
        architectures=[architecture], model_type=architecture.removesuffix("ForCausalLM").lower(), vocab_size=c.vocab_size,
        num_hidden_layers=c.n_layer, hidden_size=c.n_embd, num_attention_heads=c.n_head, num_key_value_heads=c.n_kv_head,
        head_dim=c.head_dim, intermediate_size=c.n_inner, max_position_embeddings=c.context, hidden_act="silu",
        tie_word_embeddings=c.tie_embeddings, rope_theta=c.rope_theta, rms_norm_eps=c.norm_eps,
        dtype=str(dtype).removeprefix("torch."), n_tokens=c.n_tokens)
    with open(os.path.join(path, "config.json"), "w", encoding="utf-8") as f:
        json.dump(config, f, indent=2)


def _weight_files(path):
    index = os.path.join(path, "model.safetensors.index.json")
    if os.path.exists(index):
        return sorted({os.path.join(path, name) for name in read_json(index)["weight_map"].values()})
    return [os.path.join(path, "model.safetensors")]


def load_model(path, dtype=None, device=None):
    """A model directory -> GPT in `dtype` (default fp32) on `device`. Tensors are copied in one by one, so there is
    no second copy of the weights. Raises ValueError when names or shapes do not fit."""
    if not os.path.exists(os.path.join(path, "config.json")):
        raise ValueError(f"no model in {path!r}: there is no config.json")
    config = read_config(path)
    if os.path.exists(os.path.join(path, "tokenizer.json")):  # published embeddings are often padded
        n_tokens = Tokenizer.from_pretrained(path).n_tokens
        if n_tokens > config.vocab_size or config.n_tokens not in (0, n_tokens):
            raise ValueError(f"{path}: tokenizer.json has {n_tokens:,} tokens and the model was trained with {config.n_tokens or config.vocab_size:,}: "
                             "they do not belong together")
        config.n_tokens = n_tokens
    with torch.device("meta"):
        model = GPT(config)
    model = model.to_empty(device=device or "cpu").to(dtype or torch.float32)
    model.tie()  # to_empty has made two of the one tensor
    model.cos, model.sin = (t.to(model.cos) for t in rope_table(config.context, config.head_dim, config.rope_theta))
    ours = dict(model.named_parameters())  # a tied head appears once, under the embedding's name
    missing = set(ours)
    for file in _weight_files(path):
        if not os.path.exists(file):
            raise ValueError(f"{path} has a config.json and no {os.path.basename(file)}: the weights are missing")
        try:
            with safe_open(file, framework="pt") as weights:
                for name in weights.keys():
                    if name == "lm_head.weight" and config.tie_embeddings:
                        continue
                    if name not in ours:
                        raise ValueError(f"{file} holds {name}, which this architecture has not")
                    tensor = weights.get_tensor(name)
                    if tensor.shape != ours[name].shape:
                        raise ValueError(f"{file}: {name} is {tuple(tensor.shape)}, expected {tuple(ours[name].shape)}")
                    ours[name].data.copy_(tensor)
                    missing.discard(name)
        except SafetensorError as error:
            raise ValueError(f"{file} cannot be read ({error}): the file is damaged or cut short") from None
    if missing:
        raise ValueError(f"{path} lacks {len(missing)} weights, the first is {sorted(missing)[0]}")
    return model


def save_model(model, tokenizer, path):
    """Write a directory that transformers' AutoModelForCausalLM and AutoTokenizer load as it is."""
    os.makedirs(path, exist_ok=True)
    weights = {name: p.detach().cpu().contiguous() for name, p in model.named_parameters()}  # a tied head once
    save_file(weights, os.path.join(path, "model.safetensors"), metadata={"format": "pt"})
    write_config(model.config, path, next(iter(weights.values())).dtype)
    tokenizer.save(path)
    with open(os.path.join(path, "generation_config.json"), "w", encoding="utf-8") as f:
        json.dump({"eos_token_id": tokenizer.stop_ids, "pad_token_id": tokenizer.document_end}, f, indent=2)
