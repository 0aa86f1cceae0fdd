"""Both doors, with transformers as the oracle."""

import copy
import json
import os
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file

from conftest import ROOT, toy_model
from nanorl.engine import Engine
from nanorl.gpt import GPT, GPTConfig
from nanorl.hf import load_model, local_model, save_model, write_config
from nanorl.runtime import checkpoint
from nanorl.tokenizer import Tokenizer

transformers = pytest.importorskip("transformers")
KINDS = {
    "Llama": dict(qk_norm=False),
    "Llama tied": dict(qk_norm=False, tie_embeddings=True, n_kv_head=4),
    "Qwen2": dict(qk_norm=False, qkv_bias=True, head_dim=8),
    "Qwen3": dict(),
    "Qwen3 tied, wide heads": dict(tie_embeddings=True, head_dim=16),
}


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
        # Without a mask transformers guesses that a sampled pad token is padding.
        everything = torch.ones_like(prompt)
        greedy = theirs.generate(
            prompt,
            attention_mask=everything,
            max_new_tokens=20,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
        )[0, 8:].tolist()
    (completion,) = Engine(load_model(tmp_path)).generate(prompt.tolist(), 1, 20, 0.0)[0]
    assert completion.ids == greedy
    ours = load_model(tmp_path)
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), ours.parameters()))


LLAMA3_ROPE = dict(
    rope_type="llama3",
    rope_theta=5e5,
    factor=8.0,
    low_freq_factor=1.0,
    high_freq_factor=4.0,
    original_max_position_embeddings=64,
)
THEIRS = {
    "Llama": dict(),
    "Llama tied": dict(tie_word_embeddings=True, num_key_value_heads=1),
    "Llama with its RoPE scaling": dict(rope_parameters=LLAMA3_ROPE),
    "Qwen2": dict(),
    "Qwen2 tied": dict(tie_word_embeddings=True),
    "Qwen3": dict(head_dim=32),
}


def published(kind, path, max_shard_size="5GB", **settings):
    """A random model of transformers' own making, saved."""
    name = kind.split()[0]
    config = getattr(transformers, name + "Config")(
        vocab_size=96,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=1300,
        **{"num_key_value_heads": 2, "head_dim": 16, **THEIRS[kind], **settings},
    )
    torch.manual_seed(0)
    theirs = getattr(transformers, name + "ForCausalLM")(config).eval()
    # Their initial weights are too small to tell mistakes apart.
    for p in theirs.parameters():
        p.data = torch.randn_like(p) * 0.2 + (p.dim() == 1)
    theirs.tie_weights()
    theirs.save_pretrained(path, max_shard_size=max_shard_size)
    return theirs


def check_against(theirs, ours, ids, greedy=200):
    """Bounds in fp32: logits, log-probs of the text, and what is sampled greedily."""
    with torch.no_grad():
        a, b = ours(ids), theirs(ids).logits
        assert (a - b).abs().max() <= 5e-4
        targets = ids[:, 1:, None]
        a_text = a[:, :-1].log_softmax(-1).gather(-1, targets)
        b_text = b[:, :-1].log_softmax(-1).gather(-1, targets)
        assert (a_text - b_text).abs().max() <= 1e-4
        prompt = ids[:1, :20]
        said = theirs.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            max_new_tokens=greedy,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
        )
    (completion,) = Engine(ours).generate(prompt.tolist(), 1, greedy, 0.0)[0]
    assert completion.ids == said[0, 20:].tolist()


@pytest.mark.parametrize("kind", THEIRS)
def test_what_transformers_writes_we_read(kind, tmp_path):
    theirs = published(kind, tmp_path)
    ids = torch.randint(0, 96, (1, 1000), generator=torch.Generator().manual_seed(0))
    check_against(theirs, load_model(tmp_path), ids)


@pytest.mark.parametrize("kind", ["Llama", "Qwen3"])
def test_the_norms_eps_is_the_files(kind, tmp_path):
    """Models of the same family have 1e-5 or 1e-6: here 1e-3, so that it shows, in both doors."""
    theirs = published(kind, tmp_path / "in", rms_norm_eps=1e-3)
    ids = torch.randint(0, 96, (1, 100), generator=torch.Generator().manual_seed(0))
    ours = load_model(tmp_path / "in")
    check_against(theirs, ours, ids, greedy=20)
    other = load_model(tmp_path / "in")
    for norm in (m for m in other.modules() if hasattr(m, "eps")):
        norm.eps = 1e-6
    assert (ours(ids) - other(ids)).abs().max() > 1e-2
    write_config(ours.config, tmp_path, torch.float32)
    assert transformers.AutoConfig.from_pretrained(tmp_path).rms_norm_eps == 1e-3


def test_all_stop_ids_are_in_the_generation_config(tmp_path, tokenizer):
    """A turn may end with either: who generates with one of them alone runs on past the other."""
    assert len(tokenizer.stop_ids) > 1
    model = toy_model(vocab=tokenizer.n_tokens, dtype=torch.float32)
    save_model(model, tokenizer, tmp_path)
    config = transformers.GenerationConfig.from_pretrained(tmp_path)
    assert config.eos_token_id == tokenizer.stop_ids
    assert config.pad_token_id == tokenizer.document_end


@pytest.mark.parametrize("kind", ["Llama", "Qwen3"])
def test_shards(kind, tmp_path):
    theirs = published(kind, tmp_path, max_shard_size="50KB")
    assert len([f for f in os.listdir(tmp_path) if f.endswith(".safetensors")]) > 2
    expected = theirs.state_dict()
    for name, p in load_model(tmp_path).named_parameters():
        assert torch.equal(p, expected[name])


def test_llama3s_rope_scaling_goes_out_as_it_came_in(tmp_path, tokenizer):
    kinds = dict(rope_scaling=(8.0, 1.0, 4.0, 64), rope_theta=5e5, qk_norm=False, head_dim=16)
    model = toy_model(vocab=tokenizer.n_tokens, dtype=torch.float32, **kinds)
    unscaled = {**kinds, "rope_scaling": None}
    plain = toy_model(vocab=tokenizer.n_tokens, dtype=torch.float32, **unscaled)
    save_model(model, tokenizer, tmp_path)
    assert load_model(tmp_path).config == model.config
    ids = torch.randint(0, 70, (1, 200))
    assert (model(ids) - plain(ids)).abs().max() > 0.1  # it matters
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    check_against(theirs, load_model(tmp_path), ids, greedy=50)


def test_rows_that_only_pad_a_published_embedding_get_no_probability(tmp_path, tokenizer):
    """As in every Qwen, whose table is longer than its vocabulary."""
    config = transformers.Qwen2Config(
        vocab_size=tokenizer.n_tokens + 30,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=128,
    )
    theirs = transformers.Qwen2ForCausalLM(config).eval()
    theirs.save_pretrained(tmp_path / "in")
    tokenizer.save(tmp_path / "in")
    ours = load_model(tmp_path / "in")
    ids = torch.randint(0, tokenizer.n_tokens, (1, 30))
    with torch.no_grad():
        expected = theirs(ids).logits[..., : tokenizer.n_tokens]
        assert (ours(ids) - expected).abs().max() <= 5e-4
    assert ours(ids).size(-1) == tokenizer.n_tokens == ours.config.vocab_size - 30
    save_model(ours, tokenizer, tmp_path / "out")
    assert load_model(tmp_path / "out").config == ours.config
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    assert torch.equal(again.lm_head.weight, theirs.lm_head.weight)  # padding and all


def change_weights(path, **changes):
    """Write the model's file again, with other tensors. "__" in a name stands for a dot."""
    weights = load_file(path / "model.safetensors")
    weights.update({name.replace("__", "."): tensor for name, tensor in changes.items()})
    save_file(weights, path / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize("kind", ["Llama tied", "Qwen2 tied"])
def test_a_head_of_its_own_counts_whatever_the_config_says(kind, tmp_path, tokenizer):
    published(kind, tmp_path / "in")
    head = torch.randn(96, 64, generator=torch.Generator().manual_seed(1)) * 0.2
    change_weights(tmp_path / "in", lm_head__weight=head)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "in")
    ours = load_model(tmp_path / "in")
    ids = torch.randint(0, 96, (1, 100), generator=torch.Generator().manual_seed(0))
    check_against(theirs, ours, ids, greedy=20)
    assert torch.equal(ours.lm_head.weight, head)

    # A second copy of the embedding is the embedding, and goes out once.
    embedding = ours.model.embed_tokens.weight.detach()
    change_weights(tmp_path / "in", lm_head__weight=embedding.clone())
    tied = load_model(tmp_path / "in")
    assert tied.lm_head.weight is tied.model.embed_tokens.weight

    # A head that stands in the embedding's place is both.
    weights = load_file(tmp_path / "in" / "model.safetensors")
    del weights["model.embed_tokens.weight"]
    save_file(weights, tmp_path / "in" / "model.safetensors", metadata={"format": "pt"})
    assert torch.equal(load_model(tmp_path / "in").model.embed_tokens.weight, embedding)


def test_a_whole_file_comes_before_a_stale_index(tmp_path):
    theirs = published("Llama", tmp_path, max_shard_size="50KB")
    for shard in tmp_path.glob("*.safetensors"):
        stale = {name: torch.zeros_like(tensor) for name, tensor in load_file(shard).items()}
        save_file(stale, shard, metadata={"format": "pt"})
    save_file(theirs.state_dict(), tmp_path / "model.safetensors", metadata={"format": "pt"})
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(again.lm_head.weight, theirs.lm_head.weight)
    assert torch.equal(load_model(tmp_path).lm_head.weight, theirs.lm_head.weight)


def test_an_index_without_a_map_is_named(tmp_path):
    published("Llama", tmp_path, max_shard_size="50KB")
    (tmp_path / "model.safetensors.index.json").write_text("{}")
    with pytest.raises(ValueError, match="index.json has no weight_map"):
        load_model(tmp_path)


@pytest.mark.parametrize("kind", ["Llama", "Qwen2", "Qwen3"])
def test_what_a_config_leaves_out_is_transformers_default(kind, tmp_path):
    """Missing entries, nulls, and a stored table of RoPE, as older files have them."""
    published(kind, tmp_path, num_key_value_heads=4)
    table = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.rand(8)}
    change_weights(tmp_path, **table)
    file = tmp_path / "config.json"
    config = json.loads(file.read_text())
    del config["architectures"], config["rms_norm_eps"]
    config.update(rope_parameters=None, num_key_value_heads=None, partial_rotary_factor=None)
    file.write_text(json.dumps(config))
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    ids = torch.randint(0, 96, (1, 100), generator=torch.Generator().manual_seed(0))
    check_against(theirs, load_model(tmp_path), ids, greedy=20)
    options = ("hidden_act", "attention_bias", "mlp_bias", "use_sliding_window", "rope_theta")
    file.write_text(json.dumps({**config, **dict.fromkeys(options)}))
    load_model(tmp_path)


def test_an_adapter_is_no_model(tmp_path):
    adapter = {"base_model_name_or_path": "some/base", "peft_type": "LORA"}
    (tmp_path / "adapter_config.json").write_text(json.dumps(adapter))
    for find in (load_model, local_model):
        with pytest.raises(ValueError, match="is a LoRA adapter of some/base, not a model: merge"):
            find(str(tmp_path))
    # One that lies beside a whole model is not in the way.
    published("Llama", tmp_path)
    load_model(tmp_path)


def test_a_model_may_be_named_from_home(tmp_path, monkeypatch):
    published("Llama", tmp_path / "some")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert local_model("~/some") == checkpoint.resolve("~/some") == str(tmp_path / "some")


def test_the_config_names_the_special_ids(tmp_path, tokenizer):
    """A reader of config.json alone would take a Llama's own default, 1 and 2."""
    model = toy_model(vocab=tokenizer.n_tokens, dtype=torch.float32, qk_norm=False)
    save_model(model, tokenizer, tmp_path)
    config = transformers.AutoConfig.from_pretrained(tmp_path)
    assert config.eos_token_id == tokenizer.stop_ids
    assert config.pad_token_id == tokenizer.document_end
    assert config.bos_token_id is None


def test_what_no_architecture_has_or_is_not_finite_is_not_written(tmp_path, tokenizer):
    both = toy_model(vocab=tokenizer.n_tokens, qk_norm=True, qkv_bias=True)
    with pytest.raises(ValueError, match="both qk_norm and qkv_bias"):
        save_model(both, tokenizer, tmp_path)
    model = toy_model(vocab=tokenizer.n_tokens)
    model.model.norm.weight.data[3] = torch.nan
    with pytest.raises(FloatingPointError, match="model.norm.weight holds values that are not"):
        save_model(model, tokenizer, tmp_path / "nan")
    assert not (tmp_path / "nan" / "model.safetensors").exists()


@pytest.mark.slow
def test_a_real_model(real_model, real_data, tmp_path):
    """1,000 tokens of text and 200 greedy tokens against transformers, in and out again."""
    tokenizer = Tokenizer.from_pretrained(real_model)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(real_model, dtype=torch.float32)
    with open(os.path.join(real_data, "text", "brown.txt"), encoding="utf-8") as f:
        ids = torch.tensor([tokenizer.encode(f.read(10_000))[:1000]])
    ours = load_model(real_model)
    check_against(theirs, ours, ids)
    save_model(ours, tokenizer, tmp_path)
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    assert all(torch.equal(p, q) for p, q in zip(theirs.parameters(), again.parameters()))
    with open(os.path.join(real_data, "gsm8k", "train.jsonl"), encoding="utf-8") as f:
        questions = [json.loads(line)["question"] for line, _ in zip(f, range(50))]
    options = dict(add_generation_prompt=True, return_dict=False)
    for directory in (real_model, str(tmp_path)):
        their_tokenizer = transformers.AutoTokenizer.from_pretrained(directory)
        for question in questions:
            chat = [{"role": "user", "content": question}]
            expected = list(their_tokenizer.apply_chat_template(chat, **options))
            assert expected == tokenizer.render_prompt(chat)


# ---- the hub -------------------------------------------------------------------------------------


def evaluate_offline(name, home, out):
    """eval.py on a hub id, without a network -> (exit status, output)."""
    environment = {
        **os.environ,
        "HF_HOME": str(home),
        "HF_HUB_OFFLINE": "1",
        "NANORL_OUT": str(out),
    }
    environment.pop("HF_HUB_CACHE", None)
    command = [
        sys.executable,
        os.path.join(ROOT, "eval.py"),
        f"--model={name}",
        "--task=0-20",
        "--problems=3",
        "--samples=0",
        "--max_new_tokens=4",
    ]
    run = subprocess.run(command, env=environment, capture_output=True, text=True)
    return run.returncode, run.stdout + run.stderr


def test_a_hub_id_comes_from_the_hubs_cache(tmp_path, tokenizer):
    hub = tmp_path / "home" / "hub" / "models--some--model"
    commit = "0123456789abcdef0123456789abcdef01234567"
    (hub / "refs").mkdir(parents=True)
    (hub / "refs" / "main").write_text(commit)
    model = toy_model(vocab=tokenizer.n_tokens, dtype=torch.float32)
    save_model(model, tokenizer, hub / "snapshots" / commit)
    status, said = evaluate_offline("some/model", tmp_path / "home", tmp_path / "out")
    assert status == 0 and "greedy" in said
    # Nothing is written into the cache.
    assert (tmp_path / "out" / "some--model" / "eval" / "summary.json").exists()
    assert not (hub / "snapshots" / commit / "eval").exists()


def test_no_network_gets_one_line_that_says_how_to_get_the_files(tmp_path):
    status, said = evaluate_offline("some/model", tmp_path, tmp_path)
    assert status == 1 and len(said.strip().splitlines()) == 1
    assert said.startswith(
        "error: no model 'some/model': there is no such directory, and the hub cannot be reached ("
    )
    assert "hf download some/model --local-dir model" in said


def test_what_is_no_hub_id_is_a_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "out").mkdir()
    # A run that does not exist: the hub is not asked.
    assert local_model("out/typo") == "out/typo"
    for name in ("out/d4/rl", "./some/model", "../some", "nothing", str(tmp_path), ""):
        assert local_model(name) == name


def test_a_reloaded_from_scratch_model_is_the_same_and_stays_tied(tmp_path, tokenizer):
    model = GPT(GPTConfig.from_depth(2, tokenizer.n_tokens))
    model.init_weights(torch.Generator().manual_seed(0))
    save_model(model, tokenizer, tmp_path)
    again = load_model(tmp_path)
    assert again.config == model.config
    assert again.lm_head.weight is again.model.embed_tokens.weight
    ids = torch.randint(0, tokenizer.n_tokens, (1, 30))
    assert torch.equal(model(ids), again(ids))
    # safetensors refuses shared tensors.
    assert "lm_head.weight" not in load_file(tmp_path / "model.safetensors")


def test_damage_and_strangers_are_named(tmp_path, tokenizer):
    with pytest.raises(ValueError, match="no model in"):
        load_model(tmp_path)
    model = toy_model(vocab=tokenizer.n_tokens, dtype=torch.float32)
    save_model(model, tokenizer, tmp_path)
    good = load_file(tmp_path / "model.safetensors")
    for change, word in [
        ({"model.norm.weight": torch.zeros(5)}, "model.norm.weight is"),
        ({"extra": torch.zeros(1)}, "extra"),
        ({"model.norm.weight": torch.full((32,), torch.nan)}, "model.norm.weight.*not finite"),
        (
            {"model.norm.weight": torch.tensor([1.0] * 31 + [torch.inf])},
            "model.norm.weight.*not finite",
        ),
    ]:
        save_file({**good, **change}, tmp_path / "model.safetensors")
        with pytest.raises(ValueError, match=word):
            load_model(tmp_path)
    incomplete = {name: p for name, p in good.items() if name != "model.norm.weight"}
    save_file(incomplete, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match="lacks 1 weights.*model.norm.weight"):
        load_model(tmp_path)
    save_file(good, tmp_path / "model.safetensors")
    size = (tmp_path / "model.safetensors").stat().st_size
    with open(tmp_path / "model.safetensors", "r+b") as f:
        f.truncate(size // 2)
    with pytest.raises(ValueError, match="cut short"):
        load_model(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    for change, word in [
        ({"architectures": ["MambaForCausalLM"]}, "Mamba"),
        ({"architectures": None, "model_type": "gpt2"}, "Gpt2ForCausalLM"),
        ({"architectures": None, "model_type": None}, "neither architectures nor a model_type"),
        ({"rope_scaling": {"rope_type": "yarn"}}, "yarn"),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "linear"),  # the older name
        ({"hidden_act": "gelu"}, "hidden_act='gelu'"),
        ({"attention_bias": True}, "attention_bias=True"),
        ({"hidden_size": None}, "lacks hidden_size"),
        ({"head_dim": None}, "lacks head_dim"),
        (
            {"rope_scaling": {"rope_type": "llama3", "factor": 8}},
            "lacks low_freq_factor, high_freq_factor, original",
        ),
        ({"use_sliding_window": True}, "use_sliding_window=True"),
        ({"quantization_config": {"bits": 4}}, "quantization_config"),
    ]:
        (tmp_path / "config.json").write_text(json.dumps({**config, **change}))
        with pytest.raises(ValueError, match=word):
            load_model(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(config)[:-20])
    with pytest.raises(ValueError, match="config.json cannot be read"):
        load_model(tmp_path)


@pytest.mark.parametrize("special", [True, False])
def test_a_pad_token_needs_no_row(tmp_path, tokenizer, special):
    """One id more than the table has rows is taken where it is a pad token that no text has."""
    n = tokenizer.n_tokens
    save_model(toy_model(vocab=n, dtype=torch.float32), tokenizer, tmp_path)
    spec = copy.deepcopy(tokenizer.spec)
    pad = {**spec["added_tokens"][0], "id": n, "content": "[PAD]", "special": special}
    spec["added_tokens"].append(pad)
    padded = Tokenizer(spec)
    padded.config["pad_token"] = "[PAD]"
    padded.save(tmp_path)
    if not special:  # then "[PAD]" in a text is this id
        with pytest.raises(ValueError, match="do not belong together"):
            load_model(tmp_path)
        return
    model = load_model(tmp_path)
    assert model.config.n_tokens == n
    save_model(model, Tokenizer.from_pretrained(tmp_path), tmp_path)
    assert load_model(tmp_path).config.n_tokens == n


def test_a_tokenizer_of_another_model_is_refused(tmp_path, tokenizer):
    """Too many tokens have no rows. Other tokens would be noise to the model."""
    save_model(toy_model(vocab=tokenizer.n_tokens, dtype=torch.float32), tokenizer, tmp_path)
    load_model(tmp_path)
    text = [
        "Calculate: 12 + 34 = #46 the cat sat on the mat",
        "so many other words live around here, unseen before",
    ] * 20
    for size in (265, 600):
        Tokenizer.train(text, size).save(tmp_path)
        with pytest.raises(ValueError, match="they do not belong together"):
            load_model(tmp_path)
