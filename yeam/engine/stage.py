"""Between host memory and the device: buffers to read into, uploads to the working dtype, downloads to write from.

On the CPU a buffer is plain memory and both directions are a conversion. On CUDA buffers are pinned, uploads and downloads run on
copy streams of their own, and an event guards every buffer until its copy is over.

Host memory is an array, so that work which compiled loops do alone needs no torch; it is imported where a tensor is made.

Legend: T elements of a tile.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np

from yeam.compiled import Array
from yeam.engine.device import CPU, Device

if TYPE_CHECKING:
    import torch
    from torch import Tensor

Wait = Callable[[], None]

LINE = 64  # bytes: host memory begins at a multiple of these, where every type may lie


def _nothing() -> None:
    return None


class CpuStage:
    """The device is the host."""

    def __init__(self) -> None:
        self.device = CPU

    def buffer(self, nbytes: int) -> Array:
        """A uint8 array in host memory to read into or write from."""
        memory = np.empty(nbytes + LINE, np.uint8)
        start = -memory.ctypes.data % LINE
        return memory[start : start + nbytes]

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

    def __init__(self, device: torch.device, api: Any = None) -> None:
        import torch

        self.device = device
        self._api = torch.cuda if api is None else api
        self._inward = self._api.Stream(device=device)
        self._outward = self._api.Stream(device=device)
        self._pin = device.type == "cuda"

    def buffer(self, nbytes: int) -> Array:
        import torch

        found: Array = torch.empty(nbytes, dtype=torch.uint8, pin_memory=self._pin).numpy()  # which keeps it alive
        return found

    def memory(self, nbytes: int) -> Tensor:
        """A uint8 tensor in the device's memory. Raises torch.OutOfMemoryError where there is too little."""
        import torch

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


def stage_for(device: Device) -> Stage:
    """The stage of a device: CUDA with its streams, the CPU otherwise."""
    if device.type != "cuda":
        return CpuStage()
    import torch

    return CudaStage(torch.device(str(device)))


def free_bytes(device: Device) -> int:
    """Memory of a CUDA device that nobody uses now, in bytes."""
    import torch

    return int(torch.cuda.mem_get_info(torch.device(str(device)))[0])
