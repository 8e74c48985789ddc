"""Between host memory and the device: buffers to read into, uploads to the working dtype, downloads to write from.

On the CPU a buffer is plain memory and both directions are a conversion. On CUDA buffers are pinned, uploads and downloads run on
copy streams of their own, and an event guards every buffer until its copy is over.

Legend: T elements of a tile.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from yeam.errors import UserError

Wait = Callable[[], None]


def _nothing() -> None:
    return None


class CpuStage:
    """The device is the host."""

    def __init__(self) -> None:
        self.device = torch.device("cpu")

    def buffer(self, nbytes: int) -> Tensor:
        """A uint8 tensor in host memory to read into or write from."""
        return torch.empty(nbytes, dtype=torch.uint8)

    def memory(self, nbytes: int) -> Tensor:
        """A uint8 tensor in the device's memory. Raises torch.OutOfMemoryError where CUDA has too little."""
        return torch.empty(nbytes, dtype=torch.uint8, device=self.device)

    def release(self) -> None:
        """Give memory that nobody refers to any more back to the device."""

    def upload(self, raw_T: Tensor, out_T: Tensor) -> Wait:
        """Copy raw_T (host) into out_T (device, any dtype). The returned call waits until raw_T's memory may be used again."""
        out_T.copy_(raw_T)
        return _nothing

    def download(self, tile_T: Tensor, out_T: Tensor) -> Wait:
        """Copy tile_T (device) into out_T (host, any dtype). The returned call waits until out_T holds the values."""
        out_T.copy_(tile_T)
        return _nothing

    def finish(self) -> None:
        """Wait for everything under way."""


class CudaStage:
    """A CUDA device with one stream for each direction beside the computing one.

    `api` is torch.cuda, or something that offers the same `Stream`, `Event`, `stream`, `current_stream`, `synchronize` and
    `empty_cache`.
    """

    def __init__(self, device: torch.device, api: Any = torch.cuda) -> None:
        self.device = device
        self._api = api
        self._inward = api.Stream(device=device)
        self._outward = api.Stream(device=device)
        self._pin = device.type == "cuda"

    def buffer(self, nbytes: int) -> Tensor:
        return torch.empty(nbytes, dtype=torch.uint8, pin_memory=self._pin)

    def memory(self, nbytes: int) -> Tensor:
        return torch.empty(nbytes, dtype=torch.uint8, device=self.device)

    def release(self) -> None:
        self.finish()
        self._api.empty_cache()

    def upload(self, raw_T: Tensor, out_T: Tensor) -> Wait:
        compute = self._api.current_stream(self.device)
        with self._api.stream(self._inward):
            staged_T = raw_T.to(self.device, non_blocking=True)
            copied = self._api.Event()
            copied.record(self._inward)
        compute.wait_event(copied)
        if self._pin:
            staged_T.record_stream(compute)
        out_T.copy_(staged_T)
        return lambda: copied.synchronize()

    def download(self, tile_T: Tensor, out_T: Tensor) -> Wait:
        converted_T = tile_T.to(out_T.dtype, copy=True)
        computed = self._api.Event()
        computed.record(self._api.current_stream(self.device))
        with self._api.stream(self._outward):
            self._outward.wait_event(computed)
            out_T.copy_(converted_T, non_blocking=True)
            if self._pin:
                converted_T.record_stream(self._outward)
            copied = self._api.Event()
            copied.record(self._outward)
        return lambda: copied.synchronize()

    def finish(self) -> None:
        self._api.synchronize(self.device)


Stage = CpuStage | CudaStage


def stage_for(device: torch.device) -> Stage:
    """The stage of a device: CUDA with its streams, the CPU otherwise."""
    return CudaStage(device) if device.type == "cuda" else CpuStage()


def free_bytes(device: torch.device) -> int:
    """Memory of a CUDA device that nobody uses now, in bytes."""
    return int(torch.cuda.mem_get_info(device)[0])


def choose_device(name: str) -> torch.device:
    """`auto` is CUDA where there is one. Raises UserError for a device that does not exist here."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise UserError(f"unknown device {name!r}", "use auto, cpu, cuda or cuda:N") from None
    if device.type not in ("cpu", "cuda"):
        raise UserError(f"device {name!r} is not supported", "use auto, cpu, cuda or cuda:N")
    if device.type == "cuda" and (not torch.cuda.is_available() or (device.index or 0) >= torch.cuda.device_count()):
        raise UserError(f"there is no device {name!r} here", "use --device cpu, or install a CUDA build of torch")
    return device
