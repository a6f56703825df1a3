from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import cloud_kit
import gguf
import numpy as np
import pytest
import safetensors.numpy
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from cloud_server.models.convert import convert_gguf
from kcm.errors import ConfigError, DataError

# Hugging Face's name of a Llama tensor → GGUF's.
NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def write_gguf(folder: Path, out: Path) -> None:
    """A Hugging Face Llama folder as a float32 GGUF file with SmolLM's kind of tokenizer."""
    config = json.loads((folder / "config.json").read_text())
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    writer = gguf.GGUFWriter(str(out), "llama")
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(config["vocab_size"])
    vocabulary = sorted(tokenizer["model"]["vocab"], key=tokenizer["model"]["vocab"].get)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(vocabulary)
    writer.add_token_types([3 if token.startswith("<|") else 1 for token in vocabulary])
    writer.add_token_merges([" ".join(pair) for pair in tokenizer["model"]["merges"]])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(1)
    heads = {"attn_q": config["num_attention_heads"], "attn_k": config["num_key_value_heads"]}
    for name, values in safetensors.numpy.load_file(str(folder / "model.safetensors")).items():
        stem = name.removesuffix(".weight")
        prefix = ""
        if stem.startswith("model.layers."):
            layer, stem = stem.removeprefix("model.layers.").split(".", 1)
            prefix = f"blk.{layer}."
        short = NAMES[stem]
        if short in heads:  # llama.cpp keeps the two halves of a rotary pair side by side
            values = values.reshape(heads[short], 2, -1, values.shape[1]).swapaxes(1, 2).reshape(values.shape)
        writer.add_tensor(f"{prefix}{short}.weight", np.ascontiguousarray(values, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return cloud_kit.tiny_llama(tmp_path_factory.mktemp("llama") / "hf")


def logits(folder: Path, ids: list[int]) -> Any:
    model = AutoModelForCausalLM.from_pretrained(str(folder), local_files_only=True).eval()
    with torch.no_grad():
        return model(input_ids=torch.tensor([ids])).logits[0].numpy()


def test_a_converted_model_is_the_model(llama: Path, tmp_path: Path) -> None:
    write_gguf(llama, tmp_path / "tiny.gguf")
    out = tmp_path / "models" / "tiny"
    out.mkdir(parents=True)
    (out / "stale").write_text("from an earlier, broken run")
    convert_gguf(tmp_path / "tiny.gguf", out)
    assert not (out / "stale").exists() and [path.name for path in out.parent.iterdir()] == ["tiny"]
    assert "quantization_config" not in json.loads((out / "config.json").read_text())
    assert (out / "model.safetensors").is_file() and not list(out.glob("*.gguf"))
    ours, theirs = AutoTokenizer.from_pretrained(str(out)), AutoTokenizer.from_pretrained(str(llama))
    text = "the price of oil rose"
    assert ours.tokenize(text) == theirs.tokenize(text)
    np.testing.assert_allclose(logits(out, ours(text)["input_ids"]), logits(llama, theirs(text)["input_ids"]), atol=1e-4)


def test_numbers_are_split_into_digits_as_smollm_does(llama: Path, tmp_path: Path) -> None:
    write_gguf(llama, tmp_path / "tiny.gguf")
    convert_gguf(tmp_path / "tiny.gguf", tmp_path / "out")
    steps = json.loads((tmp_path / "out" / "tokenizer.json").read_text())["pre_tokenizer"]["pretokenizers"]
    assert steps[0] == {"type": "Digits", "individual_digits": True}


def test_a_file_that_is_missing_or_no_gguf_is_refused_and_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="does not exist"):
        convert_gguf(tmp_path / "no.gguf", tmp_path / "out")
    (tmp_path / "bad.gguf").write_bytes(b"not a model at all")
    with pytest.raises(DataError, match="can't be converted"):
        convert_gguf(tmp_path / "bad.gguf", tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["bad.gguf"]
