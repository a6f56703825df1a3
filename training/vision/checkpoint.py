"""A long fit on disk every few epochs, so that Ctrl-C or a dead machine loses little. Safetensors: weights, momenta, epochs done."""

from __future__ import annotations

import hashlib
import os
import time
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import nn

_EVERY = 60.0  # seconds between two saves


def job_id(*parts: bytes | memoryview) -> str:
    """A hash of what a fit depends on: another job's checkpoint is never gone on from."""
    digest = hashlib.sha256()
    for part in parts:
        digest.update(memoryview(part).nbytes.to_bytes(8, "little"))
        digest.update(part)
    return digest.hexdigest()


@dataclass
class Checkpoint:
    """One fit's file; `job` says what fit it is (job_id)."""

    file: Path
    job: str
    _saved: float = field(default_factory=time.monotonic)

    def resume(self, net: nn.Module, optimiser: torch.optim.Optimizer) -> int:
        """Bring net and momenta back; how many epochs are done. 0 where no file of this job is there."""
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(self.file, framework="pt") as kept:
                notes = kept.metadata() or {}
                if notes.get("job") != self.job:
                    return 0
                tensors = {name: kept.get_tensor(name) for name in kept.keys()}  # noqa: SIM118  # it is no mapping
        except (OSError, SafetensorError):
            return 0
        net.load_state_dict({name[4:]: tensor for name, tensor in tensors.items() if name.startswith("net.")})
        for name, parameter in net.named_parameters():
            if (momentum := tensors.get(f"momentum.{name}")) is not None:
                optimiser.state[parameter]["momentum_buffer"] = momentum
        return int(notes["epochs"])

    def keep(self, net: nn.Module, optimiser: torch.optim.Optimizer, epochs: int) -> None:
        """Save, where the last time is long enough ago."""
        if time.monotonic() - self._saved < _EVERY:
            return
        from safetensors.torch import save_file

        tensors = {f"net.{name}": tensor.contiguous() for name, tensor in net.state_dict().items()}
        for name, parameter in net.named_parameters():
            if (momentum := optimiser.state[parameter].get("momentum_buffer")) is not None:
                tensors[f"momentum.{name}"] = momentum.contiguous()
        self.file.parent.mkdir(parents=True, exist_ok=True)
        building = self.file.with_name(f".{os.getpid()}-{self.file.name}")  # two processes may be at one job
        save_file(tensors, building, metadata={"job": self.job, "epochs": str(epochs)})
        building.replace(self.file)
        self._saved = time.monotonic()

    def remove(self) -> None:
        """The fit is over."""
        self.file.unlink(missing_ok=True)
