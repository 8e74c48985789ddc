"""Where the processes of one merge meet: their places in the environment, and the store that they talk through."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from concurrent.futures import TimeoutError as Late
from dataclasses import dataclass
from datetime import timedelta
from itertools import count
from queue import SimpleQueue
from threading import Thread
from typing import Any

from yeam.errors import UserError

CONNECTING = 300  # seconds
# torchrun's and accelerate's names, then those that mpirun sets (Open MPI, MPICH and Intel MPI, MVAPICH)
_RANK = ("RANK", "OMPI_COMM_WORLD_RANK", "PMI_RANK", "MV2_COMM_WORLD_RANK")
_SIZE = ("WORLD_SIZE", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "MV2_COMM_WORLD_SIZE")
_LOCAL = ("LOCAL_RANK", "OMPI_COMM_WORLD_LOCAL_RANK", "MPI_LOCALRANKID", "MV2_COMM_WORLD_LOCAL_RANK")

_tcp: Any = None  # one connection a process: rank 0 may be the store's server
_merges = count()


class NoStore(Exception):
    """The store does not answer."""


@dataclass(frozen=True)
class Place:
    """This process among those that a launcher has started."""

    rank: int
    size: int
    local: int
    address: str
    port: int


def place_here(environment: Mapping[str, str] | None = None) -> Place | None:
    """What the environment says; None where one process is all. Raises UserError where it contradicts itself."""
    found = os.environ if environment is None else environment
    remedy = "start with torchrun or accelerate launch; unset WORLD_SIZE to merge in one process"
    size = _number(found, _SIZE)
    if size is None or size == 1:
        return None
    if size < 1:
        raise UserError(f"WORLD_SIZE is {size}, which is no number of processes", remedy)
    rank = _number(found, _RANK)
    address, port = found.get("MASTER_ADDR"), _number(found, ("MASTER_PORT",))
    missing = [
        n for n, value in (("RANK", rank), ("MASTER_ADDR", address), ("MASTER_PORT", port)) if value in (None, "")
    ]
    if missing or rank is None or port is None or not address:
        raise UserError(f"WORLD_SIZE is {size}, but {', '.join(missing)} is not set", remedy)
    if not 0 <= rank < size:
        raise UserError(f"RANK is {rank}, but WORLD_SIZE is {size}", remedy)
    if not 0 < port < 1 << 16:
        raise UserError(f"MASTER_PORT is {port}, which is no port: these are 1 to 65535", remedy)
    return Place(rank, size, _number(found, _LOCAL) or 0, address, port)


def rank_here() -> int:
    """This process's rank; 0 where one process is all, or the environment is not whole, which is said later."""
    try:
        place = place_here()
    except UserError:
        return 0
    return 0 if place is None else place.rank


def _number(found: Mapping[str, str], names: tuple[str, ...]) -> int | None:
    for name in names:
        if found.get(name):
            try:
                return int(found[name])
            except ValueError:
                raise UserError(
                    f"the environment variable {name} is {found[name]!r}, which is no number", "unset it"
                ) from None
    return None


class Store:
    """The store of one merge. Calls are made on a thread: one that a dead machine leaves without an answer blocks nobody for good."""

    def __init__(self, store: Any) -> None:
        self._store = store
        self._queue: SimpleQueue[tuple[Callable[[Any], Any], Future[Any]] | None] = SimpleQueue()
        Thread(target=self._work, name="yeam-store", daemon=True).start()

    def call(self, call: Callable[[Any], Any], patience: float) -> Any:
        """call(store). Raises NoStore after `patience` seconds, or where the connection is lost."""
        future: Future[Any] = Future()
        self._queue.put((call, future))
        try:
            return future.result(timeout=patience)
        except Late:
            raise NoStore(f"no answer in {patience:.0f} s") from None
        except RuntimeError as error:  # torch's errors of the network are of this kind
            raise NoStore(str(error).partition("\n")[0]) from error

    def close(self) -> None:
        """Let the thread end. No more calls."""
        self._queue.put(None)

    def _work(self) -> None:
        while (found := self._queue.get()) is not None:
            call, future = found
            try:
                future.set_result(call(self._store))
            except BaseException as error:
                future.set_exception(error)


def connected() -> tuple[Place, Store] | None:
    """This process's place and the store for its next merge; None where one process is all.

    Raises UserError where the environment is not whole or the store cannot be reached.
    """
    global _tcp
    place = place_here()
    if place is None:
        return None
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # or a lost connection prints a stack trace, beside the error
    import torch.distributed as dist

    if not dist.is_available():
        raise UserError("this build of torch has no torch.distributed", "merge in one process: unset WORLD_SIZE")
    hosted = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"  # torchrun's agent is the server
    if _tcp is None:
        try:
            _tcp = dist.TCPStore(  # type: ignore[attr-defined]
                place.address,
                place.port,
                is_master=place.rank == 0 and not hosted,
                wait_for_workers=False,
                multi_tenant=True,
                timeout=timedelta(seconds=CONNECTING),
            )
        except RuntimeError as error:
            reason = str(error).partition("\n")[0]
            raise UserError(
                f"rank {place.rank} cannot meet the others at {place.address}:{place.port} (MASTER_ADDR, MASTER_PORT): {reason}",
                "check that rank 0's machine can be reached there, or choose another port",
            ) from error
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    prefix = f"yeam/{attempt}/{next(_merges)}"
    return place, Store(dist.PrefixStore(prefix, _tcp))  # type: ignore[attr-defined]
