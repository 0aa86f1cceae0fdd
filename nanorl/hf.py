"""Hugging Face model directories: read one into a GPT, and write one.

The parameters of nanorl.gpt have Hugging Face's names, and their shapes are the same, so there is
no table of weight names. What remains is config.json, the tied head, dtypes and files.
"""

import json
import os
import re
from contextlib import contextmanager
from functools import partial

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from nanorl.gpt import GPT, GPTConfig, rope_table
from nanorl.tokenizer import Tokenizer, read_json

# The files of a hub repository that are fetched. tokenizer.model is not read: nanorl only says so.
FILES = ["*.json", "*.jinja", "*.safetensors", "tokenizer.model"]

# GPTConfig's flags for each architecture. Everything else is in config.json.
ARCHITECTURES = {
    "LlamaForCausalLM": {},
    "Qwen2ForCausalLM": {"qkv_bias": True},
    "Qwen3ForCausalLM": {"qk_norm": True},
}

# The names of a tied pair.
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"

# GPTConfig's sizes, and their names in config.json.
SIZES = {
    "vocab_size": "vocab_size",
    "n_layer": "num_hidden_layers",
    "n_embd": "hidden_size",
    "n_head": "num_attention_heads",
    "n_kv_head": "num_key_value_heads",
    "head_dim": "head_dim",
    "n_inner": "intermediate_size",
    "context": "max_position_embeddings",
}

# GPTConfig.rope_scaling is a tuple of these four, as config.json names them.
LLAMA3_ROPE = (
    "factor",
    "low_freq_factor",
    "high_freq_factor",
    "original_max_position_embeddings",
)

# What a config.json must have, and what it must have besides for each architecture.
REQUIRED = [
    "vocab_size",
    "num_hidden_layers",
    "hidden_size",
    "num_attention_heads",
    "intermediate_size",
    "max_position_embeddings",
]
ALSO_REQUIRED = {
    "LlamaForCausalLM": [],
    "Qwen2ForCausalLM": ["num_key_value_heads"],
    "Qwen3ForCausalLM": ["num_key_value_heads", "head_dim"],
}

# Options of config.json with the one value that nanorl implements. It is the default as well.
IMPLEMENTED = {
    "hidden_act": "silu",
    "attention_bias": False,
    "mlp_bias": False,
    "use_sliding_window": False,
    "partial_rotary_factor": 1.0,
    "quantization_config": None,
}


# ---- where a model is ----------------------------------------------------------------------------


def local_model(name):
    """A directory, or a hub id such as Qwen/Qwen2.5-0.5B -> a directory.

    Files that are on this machine or in the hub's cache are not fetched again. Raises ValueError
    that says how to get the files when the hub cannot be reached, and for an adapter.
    """
    path = _directory_of(os.path.expanduser(name))
    _refuse_adapter(path)
    return path


def _directory_of(name):
    """local_model, whatever the directory holds."""
    if os.path.exists(name):
        return name
    # A hub id is owner/model. Where the owner is a folder, as in out/typo, it is a path.
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", name):
        return name
    owner, model = name.split("/")
    if os.path.isdir(owner):
        return name

    # huggingface_hub comes with `datasets`. It takes a second to import.
    import huggingface_hub
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
            f"no model {name!r}: there is no such directory, and the hub has no such model that is "
            "open to you (`hf auth login` for gated ones)"
        ) from None
    except (LocalEntryNotFoundError, OfflineModeIsEnabled, HfHubHTTPError, OSError) as error:
        raise ValueError(
            f"no model {name!r}: there is no such directory, and the hub cannot be reached "
            f"({type(error).__name__}): where there is a network run "
            f"`hf download {name} --local-dir {model}`, bring that folder here and give it with "
            "--model="
        ) from None


def _refuse_adapter(path):
    """Raises ValueError for a directory that holds a LoRA adapter in place of a model."""
    file = os.path.join(path, "adapter_config.json")
    if not os.path.exists(file) or any(os.path.exists(f) for f in _candidates(path)):
        return
    base = read_json(file).get("base_model_name_or_path")
    path = path.rstrip("/")
    merge = (
        "from peft import AutoPeftModelForCausalLM as Model; "
        f"Model.from_pretrained('{path}').merge_and_unload().save_pretrained('{path}-merged')"
    )
    raise ValueError(
        f"{path} is a LoRA adapter of {base}, not a model: merge the two with "
        f'`python -c "{merge}"`, copy the tokenizer\'s files of {base} beside them, and give '
        f"--model={path}-merged"
    )


# ---- config.json ---------------------------------------------------------------------------------


def read_config(path):
    """`path`/config.json -> GPTConfig.

    Raises ValueError that names what nanorl does not implement, or what the file lacks.
    """
    stated = read_json(os.path.join(path, "config.json"))
    # null says that the default holds, as a missing entry does.
    settings = _without_nulls(stated)

    # Refuse what would be computed wrongly.
    architecture = _architecture_of(path, settings)
    # RoPE's settings have two names, and so has their type: files differ in age.
    rope = _without_nulls(settings.get("rope_parameters") or settings.get("rope_scaling") or {})
    rope_type = rope.get("rope_type", rope.get("type", "default"))
    if rope_type not in ("default", "llama3"):
        raise ValueError(
            f"RoPE scaling {rope_type!r} is not supported: nanorl knows llama3's, or none"
        )
    for option, implemented in IMPLEMENTED.items():
        value = settings.get(option, implemented)
        if value != implemented:
            raise ValueError(f"{path}: {option}={value!r} is not supported")

    # One size has another default where it is missing: of a Qwen 32, which no small one has.
    if "num_key_value_heads" in stated:
        settings.setdefault("num_key_value_heads", settings.get("num_attention_heads"))

    # Refuse a file with gaps.
    required = REQUIRED + ALSO_REQUIRED[architecture]
    lacking = [name for name in required if settings.get(name) is None]
    if rope_type == "llama3":
        lacking += [name for name in LLAMA3_ROPE if name not in rope]
    if lacking:
        raise ValueError(f"{path}: config.json lacks {', '.join(lacking)}")

    # A Llama may leave two sizes out: then no heads share a kv head, and all heads together are as
    # wide as the model.
    sizes = {field: settings.get(name) for field, name in SIZES.items()}
    if not sizes["n_kv_head"]:
        sizes["n_kv_head"] = sizes["n_head"]
    if not sizes["head_dim"]:
        sizes["head_dim"] = sizes["n_embd"] // sizes["n_head"]

    rope_scaling = None
    if rope_type == "llama3":
        rope_scaling = tuple(rope[name] for name in LLAMA3_ROPE)
    return GPTConfig(
        **sizes,
        tie_embeddings=settings.get("tie_word_embeddings", False),
        rope_theta=rope.get("rope_theta", settings.get("rope_theta", 10000.0)),
        rope_scaling=rope_scaling,
        norm_eps=settings.get("rms_norm_eps", 1e-6),
        n_tokens=settings.get("n_tokens", 0),
        **ARCHITECTURES[architecture],
    )


def _without_nulls(settings):
    return {name: value for name, value in settings.items() if value is not None}


def _architecture_of(path, settings):
    """The architecture that a config.json names, or that its model_type stands for.

    Raises ValueError where nanorl does not implement it, or where there is neither.
    """
    kind = settings.get("model_type")
    if settings.get("architectures"):
        architecture = settings["architectures"][0]
    elif kind:
        # As transformers does: "qwen2" stands for Qwen2ForCausalLM.
        architecture = f"{kind.capitalize()}ForCausalLM"
    else:
        raise ValueError(f"{path}: config.json has neither architectures nor a model_type")
    if architecture not in ARCHITECTURES:
        supported = ", ".join(ARCHITECTURES)
        raise ValueError(f"architecture {architecture} is not supported: nanorl reads {supported}")
    return architecture


def write_config(c, path, dtype, ids=None):
    """Write `path`/config.json for a GPTConfig, the dtype of the weights and the special ids.

    Raises ValueError for a model of no architecture that others know.
    """
    if c.qk_norm and c.qkv_bias:
        raise ValueError("no Hugging Face architecture has both qk_norm and qkv_bias: drop one")
    if c.qk_norm:
        architecture = "Qwen3ForCausalLM"
    elif c.qkv_bias:
        architecture = "Qwen2ForCausalLM"
    else:
        architecture = "LlamaForCausalLM"

    settings = {}
    settings["architectures"] = [architecture]
    settings["model_type"] = architecture.removesuffix("ForCausalLM").lower()
    for field, name in SIZES.items():
        settings[name] = getattr(c, field)
    settings["hidden_act"] = "silu"
    settings["tie_word_embeddings"] = c.tie_embeddings
    settings["rope_theta"] = c.rope_theta
    settings["rms_norm_eps"] = c.norm_eps
    settings["dtype"] = str(dtype).removeprefix("torch.")
    # Where config.json names no ids, readers take those of their own default: 1 and 2 in a Llama.
    settings.update(ids or {})
    settings["n_tokens"] = c.n_tokens  # nanorl's own: transformers does not know it
    if c.rope_scaling:
        values = zip(LLAMA3_ROPE, c.rope_scaling)
        settings["rope_scaling"] = {"rope_type": "llama3", **dict(values)}
    _write_json(settings, os.path.join(path, "config.json"))


def _write_json(value, file):
    with open(file, "w", encoding="utf-8") as f:
        json.dump(value, f, indent=2, allow_nan=False)


# ---- a whole model -------------------------------------------------------------------------------


def load_model(path, dtype=None, device=None):
    """A model directory or hub id -> GPT in `dtype` (default fp32) on `device` (default CPU).

    Tensors are copied in one by one, so there is no second copy of the weights. Raises ValueError
    when files are missing or damaged, when names or shapes do not fit, or when a weight is not
    finite.
    """
    path = local_model(path)
    if not os.path.exists(os.path.join(path, "config.json")):
        raise ValueError(f"no model in {path!r}: there is no config.json")
    config = read_config(path)
    if os.path.exists(os.path.join(path, "tokenizer.json")):
        # Published embeddings are often padded: the tokenizer knows how many rows are in use.
        config.n_tokens = _count_tokens(path, config)
    files = _weight_files(path)
    if config.tie_embeddings and _has_own_head(files):
        config.tie_embeddings = False

    # On the meta device a model has shapes and no memory. Then it gets memory, without values.
    with torch.device("meta"):
        model = GPT(config)
    model = model.to_empty(device=device or "cpu").to(dtype or torch.float32)
    # to_empty has made the tied head a tensor of its own, and has lost RoPE's table.
    model.tie()
    rope = config.head_dim, config.rope_theta, config.rope_scaling
    cos, sin = rope_table(config.context, *rope)
    model.cos = cos.to(model.cos)
    model.sin = sin.to(model.sin)

    # A tied head is one parameter, under the embedding's name.
    parameters = dict(model.named_parameters())
    missing = set(parameters)
    for file in files:
        missing -= _copy_weights(file, parameters, config.tie_embeddings)
    if missing:
        raise ValueError(f"{path} lacks {len(missing)} weights, the first is {min(missing)}")
    return model


def _count_tokens(path, config):
    """How many tokens tokenizer.json has. Raises ValueError when it is not the model's own."""
    tokenizer = Tokenizer.from_pretrained(path)
    n_tokens = tokenizer.n_tokens
    if n_tokens == config.vocab_size + 1 and tokenizer.pads_last():
        # A pad token was added, and no row for it: the model never sees one.
        n_tokens -= 1
    # Only the models that nanorl writes say how many tokens they were trained with.
    trained_with = read_json(os.path.join(path, "config.json")).get("n_tokens")
    too_many = n_tokens > config.vocab_size
    if too_many or trained_with not in (None, n_tokens):
        raise ValueError(
            f"{path}: tokenizer.json has {n_tokens:,} tokens and the model was trained with "
            f"{config.n_tokens:,}: they do not belong together"
        )
    return n_tokens


def _candidates(path):
    """Where weights may be: one file, which comes first as in transformers, or an index."""
    names = ("model.safetensors", "model.safetensors.index.json")
    return [os.path.join(path, name) for name in names]


def _weight_files(path):
    """The paths of the weights: one file, or those that the index names.

    Raises ValueError where one of them is missing.
    """
    whole, index = _candidates(path)
    files = [whole]
    if os.path.exists(index) and not os.path.exists(whole):
        file_of_weight = read_json(index).get("weight_map")
        if not file_of_weight:
            raise ValueError(f"{index} has no weight_map: the file is damaged, fetch it again")
        files = sorted({os.path.join(path, name) for name in file_of_weight.values()})
    for file in files:
        if not os.path.exists(file):
            raise ValueError(
                f"{path} has a config.json and no {os.path.basename(file)}: the weights are missing"
            )
    return files


@contextmanager
def _opened(file):
    """An open safetensors file. Raises ValueError that names the file when it is damaged."""
    try:
        with safe_open(file, framework="pt") as weights:
            yield weights
    except SafetensorError as error:
        raise ValueError(
            f"{file} cannot be read ({error}): the file is damaged or cut short"
        ) from None


def _has_own_head(files):
    """Whether the files hold a head that is not the embedding.

    Then it is the model's head, as in transformers, also where config.json calls the two tied.
    """
    file_of = {}
    for file in files:
        with _opened(file) as weights:
            file_of.update(dict.fromkeys(weights.keys(), file))
    if not {EMBEDDING, HEAD} <= file_of.keys():
        return False
    with _opened(file_of[EMBEDDING]) as one, _opened(file_of[HEAD]) as other:
        return not torch.equal(one.get_tensor(EMBEDDING), other.get_tensor(HEAD))


def _copy_weights(file, parameters, tied):
    """Copy the file's tensors into parameters {name: parameter}, and return their names.

    Raises ValueError for a damaged file, a strange name, a wrong shape, or a value not finite.
    """
    copied = set()
    with _opened(file) as weights:
        for stored_name in weights.keys():
            # Older files hold RoPE's table, which follows from config.json.
            if stored_name.endswith(".rotary_emb.inv_freq"):
                continue
            # Some files hold a tied head a second time, or in the embedding's place.
            name = EMBEDDING if tied and stored_name == HEAD else stored_name
            if name not in parameters:
                raise ValueError(f"{file} holds {name}, which this architecture does not have")
            tensor, parameter = weights.get_tensor(stored_name), parameters[name]
            if tensor.shape != parameter.shape:
                found, expected = tuple(tensor.shape), tuple(parameter.shape)
                raise ValueError(f"{file}: {name} is {found}, expected {expected}")
            # copy_ converts to the parameter's dtype and device.
            parameter.data.copy_(tensor)
            if not is_finite(parameter.data):
                raise ValueError(
                    f"{file}: {name} holds values that are not finite (NaN or infinite), so the "
                    "model can answer nothing: take another checkpoint, or fetch the file again"
                )
            copied.add(name)
    return copied


def is_finite(tensor):
    """Whether no value is NaN or infinite. aminmax hands on NaN, and makes no second tensor."""
    low, high = tensor.aminmax()
    return bool(low.isfinite() & high.isfinite())


def save_model(model, tokenizer, path):
    """Write a directory that transformers' AutoModelForCausalLM and AutoTokenizer load as it is.

    Raises FloatingPointError for a model with a weight that is not finite.
    """
    model_writer(model, tokenizer)(path)


def model_writer(model, tokenizer):
    """-> write(path), which is save_model of the model as it is now.

    The weights of a GPU are copied now. Those of a CPU are not, so they must be written before
    they change.
    """
    # A tied head is written once, as the embedding.
    weights = {}
    for name, parameter in model.named_parameters():
        weights[name] = parameter.detach().cpu().contiguous()
    return partial(_write_model, weights, model.config, tokenizer)


def _write_model(weights, config, tokenizer, path):
    """See save_model. weights: {name: tensor on the CPU}."""
    os.makedirs(path, exist_ok=True)
    for name, weight in weights.items():
        if not is_finite(weight):
            raise FloatingPointError(f"{name} holds values that are not finite (NaN or infinite)")
    save_file(weights, os.path.join(path, "model.safetensors"), metadata={"format": "pt"})

    ids = {
        "bos_token_id": None,
        "eos_token_id": tokenizer.stop_ids,
        "pad_token_id": tokenizer.document_end,
        **tokenizer.bos_id,
    }
    dtype = next(iter(weights.values())).dtype
    write_config(config, path, dtype, ids)
    tokenizer.save(path)
    _write_json(ids, os.path.join(path, "generation_config.json"))
