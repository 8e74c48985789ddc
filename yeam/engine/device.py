"""Where a merge computes: named and chosen without torch where there is no doubt that it is the CPU."""

from __future__ import annotations

import ctypes
import os
import sys
from dataclasses import dataclass

from yeam.errors import UserError

_DRIVERS = ("libcuda.so.1", "libcuda.so")  # what a machine with a device that CUDA can use has, containers and WSL too
_ROCM = "/dev/kfd"


@dataclass(frozen=True)
class Device:
    """A device as torch names it: `type` is cpu or cuda, `index` which of several."""

    type: str
    index: int | None = None

    def __str__(self) -> str:
        return self.type if self.index is None else f"{self.type}:{self.index}"


CPU = Device("cpu")


def choose_device(name: str) -> Device:
    """`auto` is CUDA where there is one. Raises UserError for a device that does not exist here."""
    if name == "cpu" or (name == "auto" and not _has_driver()):
        return CPU
    import torch

    if name == "auto":
        return Device("cuda") if torch.cuda.is_available() else CPU
    try:
        device = torch.device(name)
    except RuntimeError:
        raise UserError(f"unknown device {name!r}", "use auto, cpu, cuda or cuda:N") from None
    if device.type not in ("cpu", "cuda"):
        raise UserError(f"device {name!r} is not supported", "use auto, cpu, cuda or cuda:N")
    if device.type == "cuda" and (not torch.cuda.is_available() or (device.index or 0) >= torch.cuda.device_count()):
        raise UserError(f"there is no device {name!r} here", "use --device cpu, or install a CUDA build of torch")
    return Device(device.type, device.index)


def _has_driver() -> bool:
    """Whether torch might find a device: importing it to ask takes a second."""
    if not sys.platform.startswith("linux") or os.path.exists(_ROCM):
        return True
    for library in _DRIVERS:
        try:
            ctypes.CDLL(library)
        except OSError:
            continue
        return True
    return False
