"""Both doors, with transformers as the oracle."""
import json
import os

import pytest
import torch
from safetensors.torch import load_file, save_file

from conftest import toy_model
from nanorl.engine import Engine
from nanorl.gpt import GPT, GPTConfig
from nanorl.hf import load_model, save_model
from nanorl.tokenizer import Tokenizer

transformers = pytest.importorskip("transformers")
KINDS = {
    "Llama": dict(qk_norm=False), "Llama tied": dict(qk_norm=False, tie_embeddings=True, n_kv_head=4),
    "Qwen2": dict(qk_norm=False, qkv_bias=True, head_dim=8), "Qwen3": dict(), "Qwen3 tied, wide heads": dict(tie_embeddings=True, head_dim=16)}


@pytest.mark.parametrize("kind", KINDS)
def test_what_we_write_transformers_reads(kind, tmp_path, tokenizer):
    model = toy_model(vocab=tokenizer.n_tokens, dtype=torch.float32, rope_theta=5e5, **KINDS[kind])
    save_model(model, tokenizer, tmp_path)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    ids = torch.randint(0, tokenizer.n_tokens, (2, 40), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        a, b = model(ids), theirs(ids).logits
        assert (a - b).abs().max() <= 5e-4
        assert (a.log_softmax(-1) - b.log_softmax(-1)).abs().max() <= 1e-4
        prompt = ids[:1, :8]
        everything = torch.ones_like(prompt)  # or transformers guesses that a sampled pad token is padding
        greedy = theirs.generate(prompt, attention_mask=everything, max_new_tokens=20, do_sample=False, eos_token_id=None, pad_token_id=0)[0, 8:].tolist()
    assert Engine(load_model(tmp_path)).generate(prompt.tolist(), 1, 20, 0.0)[0][0].ids == greedy
    ours = load_model(tmp_path)
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), ours.parameters()))


@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("name", ["Llama", "Qwen2", "Qwen3"])
def test_what_transformers_writes_we_read(name, shards, tmp_path):
    config = getattr(transformers, name + "Config")(
        vocab_size=96, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        max_position_embeddings=128, head_dim=16 if name == "Qwen3" else 8)
    theirs = getattr(transformers, name + "ForCausalLM")(config).eval()
    for p in theirs.parameters():
        p.data = torch.randn_like(p) * 0.3  # their initial weights are too small to tell mistakes apart
    theirs.save_pretrained(tmp_path, max_shard_size="20KB" if shards > 1 else "1GB")
    assert (len([f for f in os.listdir(tmp_path) if f.endswith(".safetensors")]) > 1) == (shards > 1)
    ids = torch.randint(0, 96, (2, 50))
    with torch.no_grad():
        assert (load_model(tmp_path)(ids) - theirs(ids).logits).abs().max() <= 5e-4


def test_a_reloaded_from_scratch_model_is_the_same_and_stays_tied(tmp_path, tokenizer):
    model = GPT(GPTConfig.from_depth(2, tokenizer.n_tokens)).init_weights(torch.Generator().manual_seed(0))
    save_model(model, tokenizer, tmp_path)
    again = load_model(tmp_path)
    assert again.config == model.config
    assert again.lm_head.weight is again.model.embed_tokens.weight
    ids = torch.randint(0, tokenizer.n_tokens, (1, 30))
    assert torch.equal(model(ids), again(ids))
    assert "lm_head.weight" not in load_file(tmp_path / "model.safetensors")  # safetensors refuses shared tensors


def test_damage_and_strangers_are_named(tmp_path, tokenizer):
    with pytest.raises(ValueError, match="no model in"):
        load_model(tmp_path)
    model = toy_model(vocab=tokenizer.n_tokens, dtype=torch.float32)
    save_model(model, tokenizer, tmp_path)
    good = load_file(tmp_path / "model.safetensors")
    for change, word in [({"model.norm.weight": torch.zeros(5)}, "model.norm.weight is"), ({"extra": torch.zeros(1)}, "extra")]:
        save_file({**good, **change}, tmp_path / "model.safetensors")
        with pytest.raises(ValueError, match=word):
            load_model(tmp_path)
    save_file({k: v for k, v in good.items() if k != "model.norm.weight"}, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match="lacks 1 weights.*model.norm.weight"):
        load_model(tmp_path)
    save_file(good, tmp_path / "model.safetensors")
    size = (tmp_path / "model.safetensors").stat().st_size
    with open(tmp_path / "model.safetensors", "r+b") as f:
        f.truncate(size // 2)
    with pytest.raises(ValueError, match="cut short"):
        load_model(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    for change, word in [({"architectures": ["MambaForCausalLM"]}, "Mamba"), ({"rope_scaling": {"rope_type": "yarn"}}, "yarn")]:
        (tmp_path / "config.json").write_text(json.dumps({**config, **change}))
        with pytest.raises(ValueError, match=word):
            load_model(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(config)[:-20])
    with pytest.raises(ValueError, match="config.json cannot be read"):
        load_model(tmp_path)


def test_a_tokenizer_of_another_model_is_refused(tmp_path, tokenizer):
    """With too many tokens their rows are not there; with other ones the model would be trained on noise."""
    save_model(toy_model(vocab=tokenizer.n_tokens, dtype=torch.float32), tokenizer, tmp_path)
    load_model(tmp_path)
    for size in (265, 600):
        Tokenizer.train(["Calculate: 12 + 34 = #46 the cat sat on the mat", "so many other words live around here, unseen before"] * 20, size).save(tmp_path)
        with pytest.raises(ValueError, match="they do not belong together"):
            load_model(tmp_path)
