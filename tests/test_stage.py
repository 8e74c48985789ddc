"""The CUDA path on a machine without CUDA: the same code with a fake device whose copies are late until they are waited for.

Legend: T elements of a tile.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor

from yeam.engine.stage import CpuStage, CudaStage


class FakeEvent:
    """Knows whether what was recorded before it has happened; waiting makes it happen."""

    def __init__(self) -> None:
        self.stream: FakeStream | None = None
        self.position = 0

    def record(self, stream: FakeStream) -> None:
        self.stream, self.position = stream, len(stream.log)

    def synchronize(self) -> None:
        assert self.stream is not None, "waited for an event that was never recorded"
        self.stream.reached = max(self.stream.reached, self.position)


class FakeStream:
    def __init__(self, device: torch.device | None = None) -> None:
        self.log: list[object] = []
        self.reached = 0

    def wait_event(self, event: FakeEvent) -> None:
        self.log.append(("wait", event))


class FakeCuda:
    """Offers what `CudaStage` asks of torch.cuda, and notes which stream each copy was asked for on."""

    Event = FakeEvent

    def __init__(self) -> None:
        self.compute = FakeStream()
        self.current = self.compute
        self.made: list[FakeStream] = []

    def Stream(self, device: torch.device) -> FakeStream:
        self.made.append(FakeStream(device))
        return self.made[-1]

    def current_stream(self, device: torch.device) -> FakeStream:
        return self.current

    @contextlib.contextmanager
    def stream(self, stream: FakeStream) -> Iterator[None]:
        before, self.current = self.current, stream
        stream.log.append("work")
        yield
        self.current = before

    def synchronize(self, device: torch.device) -> None:
        for stream in self.made:
            stream.reached = len(stream.log)


def raw(dtype: torch.dtype) -> Tensor:
    return torch.arange(8, dtype=torch.float32).to(dtype)


def test_uploads_convert_and_order_the_streams() -> None:
    api = FakeCuda()
    stage = CudaStage(torch.device("cpu"), api)
    inward, _ = api.made
    out_T = torch.empty(8)
    wait = stage.upload(raw(torch.bfloat16), out_T)
    assert torch.equal(out_T, raw(torch.float32))
    waits = [entry[1] for entry in api.compute.log if isinstance(entry, tuple)]
    assert len(waits) == 1 and waits[0].stream is inward, "computing must wait for the copy"
    assert inward.reached == 0, "the upload must not block"
    wait()
    assert inward.reached > 0, "the buffer is free only after the copy"


def test_downloads_wait_for_the_computation_and_keep_its_values() -> None:
    api = FakeCuda()
    stage = CudaStage(torch.device("cpu"), api)
    _, outward = api.made
    tile_T, out_T = torch.arange(8, dtype=torch.float32), torch.empty(8, dtype=torch.bfloat16)
    wait = stage.download(tile_T, out_T)
    tile_T.zero_()  # the engine uses the tile's memory again at once
    wait()
    assert torch.equal(out_T, raw(torch.bfloat16))
    assert any(isinstance(entry, tuple) and entry[1].stream is api.compute for entry in outward.log)
    assert outward.reached > 0


def test_cpu_and_cuda_stages_move_the_same_values() -> None:
    for dtype in (torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float64):
        results = []
        for stage in (CpuStage(), CudaStage(torch.device("cpu"), FakeCuda())):
            up_T, down_T = torch.empty(8), torch.empty(8, dtype=dtype)
            stage.upload(raw(dtype), up_T)()
            stage.download(up_T, down_T)()
            results.append(down_T)
        assert torch.equal(results[0].float(), results[1].float())
