"""Several processes for one merge: who takes part, what they tell each other, and noticing at once that one is gone.

`torchrun` or `accelerate launch` starts the processes and names them in the environment (RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR,
MASTER_PORT). They talk through torch's TCPStore, a few small keys; weights go through the output folder alone, which all of them share.
Every rank beats twice a second. One that is killed is noticed through its process descriptor by the ranks of its machine, and by its
silence elsewhere; one that fails says why. Then all the others end with that error.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import socket
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from threading import Event, Thread
from typing import TYPE_CHECKING, Any

from yeam.engine.ranks_store import NoStore, Store, connected
from yeam.errors import UserError, YeamError

if TYPE_CHECKING:
    from yeam.engine.ranks_store import Place

BEAT = 0.5  # seconds
SILENCE = 20.0  # seconds without a beat after which a rank of another machine counts as lost
JOINING = 300.0  # seconds for all ranks to appear
TELLING = 60.0  # seconds for rank 0 to hear of an error that it is to print
AGAIN = "run again, with any number of processes: the work continues"

Meanwhile = Callable[[], None]


class RankError(YeamError):
    """Another process of the same merge failed, or is gone (`silent`); the exit status is that process's."""

    def __init__(self, message: str, remedy: str, status: int = 1, *, rank: int = 0, silent: bool = True) -> None:
        super().__init__(message, remedy)
        self.exit_status = status
        self.rank, self.silent = rank, silent


class Alone:
    """The only process of a merge; what `Ranks` is for several, without anything to do."""

    rank, size, neighbours, machines = 0, 1, 1, 1
    token = ""
    is_first = True

    def wait(self, name: str, meanwhile: Meanwhile | None = None) -> None:
        """Wait until every rank has come here."""

    def check(self) -> None:
        """Raise RankError if another rank failed or is gone."""

    def device(self, name: str) -> str:
        """The device for this process: of `auto` and `cuda`, the one of its local rank."""
        return name


@dataclass
class _Peer:
    """Another rank: where it runs, its process descriptor where that is here, its last beat and when it came."""

    rank: int
    host: str
    descriptor: int | None = None
    said: bytes = b""
    since: float = 0.0
    left: bool = False


class Ranks(Alone):
    """The processes of one merge. Each makes the same calls in the same order; every wait ends when a rank is lost.

    `neighbours` is how many of them share this machine, `machines` how many machines there are, `token` the same text in all of them
    and in no other merge. Raises RankError wherever it waits.
    """

    def __init__(self, place: Place, store: Store) -> None:
        self.rank, self.size, self.local = place.rank, place.size, place.local
        self.is_first = place.rank == 0
        self._store = store
        self._peers: list[_Peer] = []
        self._lost: RankError | None = None
        self._over = Event()
        self._beat: tuple[int, int, int] = (0, 0, 0)
        self._done: dict[int, tuple[int, int]] = {}
        self._join()
        self._thread = Thread(target=self._watch, name="yeam-ranks", daemon=True)
        self._thread.start()

    # --- what the ranks tell each other

    def wait(self, name: str, meanwhile: Meanwhile | None = None) -> None:
        self._set(f"{name}/{self.rank}", None)
        self._await([f"{name}/{rank}" for rank in range(self.size)], meanwhile)

    def tell(self, name: str, value: Any) -> None:
        """Say something of JSON types, once, that others `hear`."""
        self._set(name, value)

    def hear(self, name: str) -> Any:
        """Wait for what a rank tells under this name."""
        self._await([name])
        return self._get(name)

    def agree(self, facts: Mapping[str, Any]) -> None:
        """Raise an error in every rank unless all of them come with the same facts (name → JSON type)."""
        self._set(f"facts/{self.rank}", dict(facts))
        if self.is_first:
            self._await([f"facts/{rank}" for rank in range(self.size)])
            ours = json.loads(json.dumps(dict(facts)))
            for peer in self._peers:
                theirs = self._get(f"facts/{peer.rank}")
                for name in (name for name in ours if ours[name] != theirs.get(name)):
                    raise UserError(
                        f"rank {peer.rank} on {peer.host} has another {name} than rank 0 on {socket.gethostname()}: "
                        f"{theirs.get(name)} and {ours[name]}",
                        "start every process with the same command, versions, models and plugins",
                    )
            self._set("agreed", None)
        self._await(["agreed"])

    def next(self, name: str) -> int:
        """0, 1, 2, …: each number to one caller of all ranks."""
        return int(self._call(lambda store: store.add(name, 1))) - 1

    def put(self, name: str, value: Any) -> None:
        """Leave something of JSON types for `collect`."""
        self._set(name, value)

    def collect(self, names: Sequence[str]) -> list[Any] | None:
        """What was left under these names; None unless all is there."""
        if not self._said(*names):
            return None
        return [json.loads(text) for text in self._call(lambda store: store.multi_get(list(names)))]

    def progress(self, tensors: int, nbytes: int) -> tuple[int, int]:
        """Note what this rank has done; returns what the others have, in tensors and bytes."""
        self._beat = (self._beat[0], tensors, nbytes)
        done = list(self._done.values())
        return sum(tensors for tensors, _ in done), sum(nbytes for _, nbytes in done)

    def device(self, name: str) -> str:
        if name not in ("auto", "cuda"):
            return name
        import torch

        return f"cuda:{self.local % torch.cuda.device_count()}" if torch.cuda.is_available() else name

    # --- losses and the end

    def check(self) -> None:
        if self._lost is not None:
            raise self._lost

    def fail(self, error: BaseException) -> None:
        """Tell the others why this rank ends. In a YeamError `told` says afterwards that rank 0 prints it."""
        said = {"rank": self.rank, "host": socket.gethostname(), "remedy": "", "status": 1}
        if isinstance(error, YeamError):
            said |= {"message": error.message, "remedy": error.remedy, "status": error.exit_status}
        else:
            said |= {"message": f"{type(error).__name__}: {error}".rstrip(": ")}
        with contextlib.suppress(RankError):
            if not isinstance(error, RankError):
                self._report(said)
            if self.is_first:  # it may hold the store, so it stays until the others know
                self._set("ending", None)
                self._patiently([f"known/{peer.rank}" for peer in self._peers], 4 * BEAT)
            elif self._patiently(["ending"], TELLING):
                if isinstance(error, YeamError):
                    error.told = True
                self._set(f"known/{self.rank}", None)
                # a launcher ends all processes when the first one has ended: rank 0 has to have the time to say why
                limit = time.monotonic() + 6 * BEAT
                while time.monotonic() < limit and not self._gone(self._peers[0]):
                    time.sleep(0.02)
        self._quiet()
        self._release()

    def leave(self) -> None:
        """The end of a merge that went well: no loss counts from here on. Rank 0, which may hold the store, goes last."""
        self._quiet()
        with contextlib.suppress(RankError):
            self._set(f"left/{self.rank}", None)
            if self.is_first:
                self._patiently([f"left/{peer.rank}" for peer in self._peers], SILENCE)
        self._release()

    def _quiet(self) -> None:
        """No longer look after the others."""
        self._over.set()
        self._thread.join(timeout=SILENCE)

    def _release(self) -> None:
        self._store.close()
        for peer in self._peers:
            if peer.descriptor is not None:
                os.close(peer.descriptor)
                peer.descriptor = None

    # --- inside

    def _join(self) -> None:
        here = {"host": socket.gethostname(), "machine": _machine(), "pid": os.getpid()}
        if self.is_first:
            here["token"] = os.urandom(16).hex()
        self._set(f"beat/{self.rank}", self._beat)
        self._set(f"hello/{self.rank}", here)
        limit = time.monotonic() + JOINING
        while not self._said(*(f"hello/{rank}" for rank in range(self.size))):
            if time.monotonic() > limit:
                missing = [rank for rank in range(self.size) if not self._said(f"hello/{rank}")]
                raise UserError(
                    f"of {self.size} processes (WORLD_SIZE) rank {missing[0]} has not appeared in {JOINING:.0f} s",
                    "start all of them with torchrun or accelerate launch; unset WORLD_SIZE to merge in one process",
                )
            time.sleep(0.02)
        found = [self._get(f"hello/{rank}") for rank in range(self.size)]
        self.token = found[0]["token"]
        self.machines = len({each["machine"] for each in found})
        self.neighbours = sum(each["machine"] == here["machine"] for each in found)
        for rank, each in enumerate(found):
            if rank != self.rank:
                local = each["machine"] == here["machine"]
                descriptor = _descriptor(each["pid"]) if local else None
                self._peers.append(_Peer(rank, each["host"], descriptor, since=time.monotonic()))

    def _watch(self) -> None:
        try:
            while not self._over.wait(BEAT * max(1.0, self.size / 32)):
                self._look()
        except RankError as error:
            self._lost = self._lost or error

    def _look(self) -> None:
        count, tensors, nbytes = self._beat
        self._beat = (count + 1, tensors, nbytes)
        self._set(f"beat/{self.rank}", self._beat)
        if self._said("failed"):
            self._lose(self._get("failed"))
            return
        beats = self._call(lambda store: store.multi_get([f"beat/{peer.rank}" for peer in self._peers]))
        now = time.monotonic()
        for peer, beat in zip(self._peers, beats):
            if beat != peer.said:
                peer.said, peer.since = beat, now
                _, *done = json.loads(beat)
                self._done[peer.rank] = (done[0], done[1])
            silent = peer.descriptor is None and now - peer.since > SILENCE * max(1.0, self.size / 32)
            if not peer.left and (silent or self._gone(peer)):
                peer.left = self._said(f"left/{peer.rank}")
                if not peer.left:
                    self._lose(self._report({"rank": peer.rank, "host": peer.host}))
                    return

    def _report(self, failure: dict[str, Any]) -> dict[str, Any]:
        """Tell everybody of a failure; returns the first that was told."""
        text = json.dumps(failure)
        told: dict[str, Any] = json.loads(self._call(lambda store: store.compare_set("failed", "", text)))
        return told

    def _lose(self, failure: Mapping[str, Any]) -> None:
        rank, host = failure["rank"], failure["host"]
        if "message" in failure:
            message = f"rank {rank} of {self.size} on {host} failed: {failure['message']}"
            self._lost = RankError(message, failure["remedy"] or AGAIN, failure["status"], rank=rank, silent=False)
        else:
            message = (
                f"rank {rank} of {self.size} on {host} is gone: it was killed, ran out of memory, or lost its machine"
            )
            self._lost = RankError(message, AGAIN, rank=rank)

    def _gone(self, peer: _Peer) -> bool:
        """Whether the process has ended, as far as this machine knows."""
        if peer.descriptor is None:
            return False
        poll = select.poll()
        poll.register(peer.descriptor, select.POLLIN)
        return bool(poll.poll(0))

    def _patiently(self, names: Sequence[str], patience: float) -> bool:
        """Whether all of this is said, within so many seconds and before all who would say it have gone."""
        limit = time.monotonic() + patience
        speakers = self._peers if self.is_first else self._peers[:1]
        while not self._said(*names):
            silent = self._lost is not None and self._lost.silent and self._lost.rank == 0
            if silent or time.monotonic() > limit or all(self._gone(peer) for peer in speakers):
                return False
            time.sleep(0.02)
        return True

    def _await(self, names: Sequence[str], meanwhile: Meanwhile | None = None) -> None:
        pause = 0.002
        while not self._said(*names):
            self.check()
            if meanwhile is not None:
                meanwhile()
            time.sleep(pause)
            pause = min(2 * pause, 0.1)

    def _said(self, *names: str) -> bool:
        return bool(self._call(lambda store: store.check(list(names))))

    def _set(self, name: str, value: Any) -> None:
        text = json.dumps(value)
        self._call(lambda store: store.set(name, text))

    def _get(self, name: str) -> Any:
        return json.loads(self._call(lambda store: store.get(name)))

    def _call(self, call: Callable[[Any], Any]) -> Any:
        """The result of a call with the store. Raises RankError where it does not answer."""
        try:
            return self._store.call(call, SILENCE)
        except NoStore as error:
            if self._lost is None:
                who = "rank 0 or its launcher"
                self._lost = RankError(f"rank {self.rank} of {self.size} cannot reach {who} any more: {error}", AGAIN)
            raise self._lost from error


@contextlib.contextmanager
def joined(wanted: bool) -> Iterator[Alone | Ranks]:
    """The processes that share this merge, if several were started and `wanted`; this one alone otherwise.

    An error inside is told to the other ranks. Raises UserError for an environment that names no usable rank.
    """
    found = connected() if wanted else None
    if found is None:
        yield Alone()
        return
    ranks = Ranks(*found)
    try:
        yield ranks
    except BaseException as error:
        ranks.fail(error)
        raise
    ranks.leave()


def _machine() -> str:
    """A text that is the same for processes that see each other's process ids."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {os.stat('/proc/self/ns/pid').st_ino}"
    except OSError:
        return socket.gethostname()


def _descriptor(pid: int) -> int | None:
    """A descriptor that tells when the process ends; None where the system has none."""
    try:
        return os.pidfd_open(pid)
    except (AttributeError, OSError):
        return None
