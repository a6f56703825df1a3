"""A GGUF file → a Hugging Face folder of safetensors, once: later loads take 2 s, not 20, and need neither gguf nor accelerate."""

from __future__ import annotations

import json
import shutil
import tempfile
from pathlib import Path
from typing import Any

from kcm.errors import ConfigError, DataError, require


def convert_gguf(gguf_path: Path, out_dir: Path) -> None:
    """Dequantise a GGUF language model to float32 safetensors with its tokenizer.

    `out_dir` appears whole or not at all; one that is already there is replaced.

    Raises:
        ConfigError: the file is missing.
        DataError: transformers can't read it.
        MissingExtraError: torch, transformers, gguf or accelerate is missing.
    """
    if not gguf_path.is_file():
        raise ConfigError(f"{gguf_path} does not exist")
    for module in ("torch", "transformers", "gguf", "accelerate"):
        require(module, "cloud")
    out_dir.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{out_dir.name}-", dir=out_dir.parent) as scratch:
        fresh = Path(scratch) / "model"
        try:
            _write_model(gguf_path, fresh)
            _write_tokenizer(gguf_path, fresh)
        except (ValueError, KeyError, RuntimeError, NotImplementedError) as error:
            raise DataError(f"{gguf_path} can't be converted: {error}") from error
        if out_dir.exists():
            shutil.rmtree(out_dir)
        fresh.rename(out_dir)


def _write_model(gguf_path: Path, out: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    loaded: Any = AutoModelForCausalLM.from_pretrained(
        str(gguf_path.parent), gguf_file=gguf_path.name, local_files_only=True, dtype=torch.float32
    )
    config = loaded.config
    if hasattr(config, "quantization_config"):
        del config.quantization_config  # else save_pretrained refuses, and every later load looks for the GGUF file
    fresh = type(loaded)(config)
    fresh.load_state_dict(loaded.state_dict())
    fresh.to(torch.float32).save_pretrained(str(out), safe_serialization=True)


def _write_tokenizer(gguf_path: Path, out: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer: Any = AutoTokenizer.from_pretrained(str(gguf_path.parent), gguf_file=gguf_path.name, local_files_only=True)
    tokenizer.save_pretrained(str(out))
    if _pre_tokenizer(gguf_path) == "smollm":
        _split_digits(out / "tokenizer.json")


def _pre_tokenizer(gguf_path: Path) -> str:
    import gguf

    field = gguf.GGUFReader(str(gguf_path)).get_field("tokenizer.ggml.pre")
    return str(field.contents()) if field is not None else ""


def _split_digits(tokenizer_json: Path) -> None:
    """SmolLM splits numbers into digits before BPE; transformers' GGUF reader drops that step."""
    content = json.loads(tokenizer_json.read_bytes())
    digits = {"type": "Digits", "individual_digits": True}
    steps = content["pre_tokenizer"]
    inner = steps["pretokenizers"] if steps["type"] == "Sequence" else [steps]
    if digits not in inner:
        content["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [digits, *inner]}
        tokenizer_json.write_text(json.dumps(content, ensure_ascii=False), "utf-8")
