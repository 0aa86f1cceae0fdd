"""Hugging Face model directories, read and written. The parameter names already match; this is config, tying,
dtypes and files."""

import json
import os
import re

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from nanorl.gpt import GPT, GPTConfig, rope_table
from nanorl.tokenizer import Tokenizer, read_json

LLAMA3_ROPE = (
    "factor",
    "low_freq_factor",
    "high_freq_factor",
    "original_max_position_embeddings",
)  # GPTConfig.rope_scaling, as config.json names it
# Each architecture's own flags; everything else is in config.json.
ARCHITECTURES = {
    "LlamaForCausalLM": {},
    "Qwen2ForCausalLM": {"qkv_bias": True},
    "Qwen3ForCausalLM": {"qk_norm": True},
}


FILES = [
    "*.json",
    "*.jinja",
    "*.safetensors",
    "tokenizer.model",
]  # of a hub repository, what is read (the last only to say that it is not)


def local_model(name):
    """A directory, or a hub id such as Qwen/Qwen2.5-0.5B -> a directory: what is on this machine, or in the hub's cache, is not fetched
    again. Raises ValueError saying how to get the files where the hub cannot be reached."""
    if (
        os.path.exists(name)
        or not re.fullmatch(r"[\w.-]+/[\w.-]+", name)
        or os.path.isdir(name.split("/")[0])
    ):  # out/typo is none
        return name
    import huggingface_hub  # comes with `datasets`; it takes a second to import
    from huggingface_hub.errors import (
        HfHubHTTPError,
        LocalEntryNotFoundError,
        OfflineModeIsEnabled,
        RepositoryNotFoundError,
    )

    try:
        return huggingface_hub.snapshot_download(name, allow_patterns=FILES)
    except RepositoryNotFoundError:
        raise ValueError(
            f"no model {name!r}: there is no such directory, and the hub has no such model that is open to you (`hf auth login` for gated ones)"
        ) from None
    except (LocalEntryNotFoundError, OfflineModeIsEnabled, HfHubHTTPError, OSError) as error:
        raise ValueError(
            f"no model {name!r}: there is no such directory, and the hub cannot be reached ({type(error).__name__}): where there is a network "
            f"run `hf download {name} --local-dir {name.split('/')[1]}`, bring that folder here and give it with --model="
        ) from None


def read_config(path):
    """`path`/config.json -> GPTConfig. Raises ValueError naming what nanorl does not implement."""
    c = read_json(os.path.join(path, "config.json"))
    architecture = (c.get("architectures") or ["none"])[0]
    if architecture not in ARCHITECTURES:
        raise ValueError(
            f"architecture {architecture} is not supported: nanorl reads {', '.join(ARCHITECTURES)}"
        )
    rope = c.get("rope_parameters") or c.get("rope_scaling") or {}
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind not in ("default", "llama3"):
        raise ValueError(f"RoPE scaling {kind!r} is not supported: nanorl knows llama3's, or none")
    others = {
        "hidden_act": ("silu", "silu"),
        "attention_bias": (False, False),
        "mlp_bias": (False, False),
        "use_sliding_window": (False, False),
        "partial_rotary_factor": (1.0, 1.0),
        "quantization_config": (None, None),
    }
    for key, (default, known) in others.items():
        if c.get(key, default) != known:
            raise ValueError(f"{path}: {key}={c[key]!r} is not supported")
    needed = [
        "vocab_size",
        "num_hidden_layers",
        "hidden_size",
        "num_attention_heads",
        "intermediate_size",
        "max_position_embeddings",
        "rms_norm_eps",
    ]
    needed += ["num_key_value_heads"] * (architecture != "LlamaForCausalLM") + ["head_dim"] * (
        architecture == "Qwen3ForCausalLM"
    )
    lacking = [name for name in needed if c.get(name) is None] + [
        name for name in LLAMA3_ROPE if kind == "llama3" and name not in rope
    ]
    if lacking:
        raise ValueError(f"{path}: config.json lacks {', '.join(lacking)}")
    heads = c["num_attention_heads"]
    return GPTConfig(
        vocab_size=c["vocab_size"],
        n_layer=c["num_hidden_layers"],
        n_embd=c["hidden_size"],
        n_head=heads,
        n_kv_head=c.get("num_key_value_heads") or heads,
        head_dim=c.get("head_dim") or c["hidden_size"] // heads,
        n_inner=c["intermediate_size"],
        context=c["max_position_embeddings"],
        tie_embeddings=c.get("tie_word_embeddings", False),
        rope_theta=rope.get("rope_theta", c.get("rope_theta", 10000.0)),
        rope_scaling=tuple(rope[name] for name in LLAMA3_ROPE) if kind == "llama3" else None,
        norm_eps=c["rms_norm_eps"],
        n_tokens=c.get("n_tokens", 0),
        **ARCHITECTURES[architecture],
    )


def write_config(c, path, dtype):
    architecture = (
        "Qwen3ForCausalLM"
        if c.qk_norm
        else "Qwen2ForCausalLM"
        if c.qkv_bias
        else "LlamaForCausalLM"
    )
    config = dict(
        architectures=[architecture],
        model_type=architecture.removesuffix("ForCausalLM").lower(),
        vocab_size=c.vocab_size,
        num_hidden_layers=c.n_layer,
        hidden_size=c.n_embd,
        num_attention_heads=c.n_head,
        num_key_value_heads=c.n_kv_head,
        head_dim=c.head_dim,
        intermediate_size=c.n_inner,
        max_position_embeddings=c.context,
        hidden_act="silu",
        tie_word_embeddings=c.tie_embeddings,
        rope_theta=c.rope_theta,
        rms_norm_eps=c.norm_eps,
        dtype=str(dtype).removeprefix("torch."),
        n_tokens=c.n_tokens,
    )
    if c.rope_scaling:
        config["rope_scaling"] = dict(rope_type="llama3", **dict(zip(LLAMA3_ROPE, c.rope_scaling)))
    with open(os.path.join(path, "config.json"), "w", encoding="utf-8") as f:
        json.dump(config, f, indent=2)


def _weight_files(path):
    index = os.path.join(path, "model.safetensors.index.json")
    if os.path.exists(index):
        return sorted(
            {os.path.join(path, name) for name in read_json(index)["weight_map"].values()}
        )
    return [os.path.join(path, "model.safetensors")]


def load_model(path, dtype=None, device=None):
    """A model directory or hub id -> GPT in `dtype` (default fp32) on `device`. Tensors are copied in one by one, so there is
    no second copy of the weights. Raises ValueError when names or shapes do not fit."""
    path = local_model(path)
    if not os.path.exists(os.path.join(path, "config.json")):
        raise ValueError(f"no model in {path!r}: there is no config.json")
    config = read_config(path)
    if os.path.exists(
        os.path.join(path, "tokenizer.json")
    ):  # published embeddings are often padded
        n_tokens, trained_with = (
            Tokenizer.from_pretrained(path).n_tokens,
            read_json(os.path.join(path, "config.json")).get("n_tokens"),
        )  # the latter is ours
        if n_tokens > config.vocab_size or trained_with not in (None, n_tokens):
            raise ValueError(
                f"{path}: tokenizer.json has {n_tokens:,} tokens and the model was trained with {config.n_tokens:,}: "
                "they do not belong together"
            )
        config.n_tokens = n_tokens
    with torch.device("meta"):
        model = GPT(config)
    model = model.to_empty(device=device or "cpu").to(dtype or torch.float32)
    model.tie()  # to_empty has made two of the one tensor
    model.cos, model.sin = (
        t.to(model.cos)
        for t in rope_table(config.context, config.head_dim, config.rope_theta, config.rope_scaling)
    )
    ours = dict(model.named_parameters())  # a tied head appears once, under the embedding's name
    missing = set(ours)
    for file in _weight_files(path):
        if not os.path.exists(file):
            raise ValueError(
                f"{path} has a config.json and no {os.path.basename(file)}: the weights are missing"
            )
        try:
            with safe_open(file, framework="pt") as weights:
                for name in weights.keys():
                    if name == "lm_head.weight" and config.tie_embeddings:
                        continue
                    if name not in ours:
                        raise ValueError(f"{file} holds {name}, which this architecture has not")
                    tensor = weights.get_tensor(name)
                    if tensor.shape != ours[name].shape:
                        raise ValueError(
                            f"{file}: {name} is {tuple(tensor.shape)}, expected {tuple(ours[name].shape)}"
                        )
                    ours[name].data.copy_(tensor)
                    missing.discard(name)
        except SafetensorError as error:
            raise ValueError(
                f"{file} cannot be read ({error}): the file is damaged or cut short"
            ) from None
    if missing:
        raise ValueError(f"{path} lacks {len(missing)} weights, the first is {sorted(missing)[0]}")
    return model


def save_model(model, tokenizer, path):
    """Write a directory that transformers' AutoModelForCausalLM and AutoTokenizer load as it is."""
    os.makedirs(path, exist_ok=True)
    weights = {
        name: p.detach().cpu().contiguous() for name, p in model.named_parameters()
    }  # a tied head once
    save_file(weights, os.path.join(path, "model.safetensors"), metadata={"format": "pt"})
    write_config(model.config, path, next(iter(weights.values())).dtype)
    tokenizer.save(path)
    with open(os.path.join(path, "generation_config.json"), "w", encoding="utf-8") as f:
        json.dump(
            {
                "eos_token_id": tokenizer.stop_ids,
                "pad_token_id": tokenizer.document_end,
                **tokenizer.bos_id,
            },
            f,
            indent=2,
        )
