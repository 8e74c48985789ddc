"""`yeam verify OUT`: is a model folder whole, is it what its report says, and does transformers load it?"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from yeam.checkpoint import Checkpoint, open_checkpoint
from yeam.checkpoint.beside import MODULES
from yeam.checkpoint.folder import listed, read_any_json, read_config, read_json
from yeam.engine.memory import cores
from yeam.errors import CheckpointError, UserError
from yeam.families import Anatomy, describe
from yeam.families.ties import resolve_ties
from yeam.report.companions import companion_problems
from yeam.report.finite import not_finite_in
from yeam.report.layers import layer_problems, layers_detail

if TYPE_CHECKING:
    from yeam.checkpoint.base import TensorInfo

REPORT = "yeam_report.json"
_INDEX = "model.safetensors.index.json"
_SHARD = re.compile(r"model(-\d+-of-\d+)?\.safetensors")
_TILE = 1 << 24  # bytes at a time
Listener = Callable[[int, int], None]


@dataclass(frozen=True)
class Check:
    """One thing that was looked at: `problems` are sentences for the user, none where all is well; `detail` says what was seen."""

    name: str
    detail: str
    problems: tuple[str, ...] = ()

    @property
    def ok(self) -> bool:
        return not self.problems


@dataclass(frozen=True)
class Verification:
    """The result of `yeam.verify`: every check that was made, in order. `ok` where none found a problem."""

    folder: Path
    checks: tuple[Check, ...]
    seconds: float

    @property
    def ok(self) -> bool:
        return all(check.ok for check in self.checks)

    @property
    def problems(self) -> list[str]:
        return [problem for check in self.checks for problem in check.problems]

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON."""
        checks = [{**asdict(check), "problems": list(check.problems), "ok": check.ok} for check in self.checks]
        return {
            "folder": str(self.folder),
            "ok": self.ok,
            "checks": checks,
            "problems": self.problems,
            "seconds": self.seconds,
        }

    def to_text(self) -> str:
        """One line a check, and below it what is wrong."""
        width = max(len(check.name) for check in self.checks)
        lines = []
        for check in self.checks:
            lines.append(f"{'ok  ' if check.ok else 'FAIL'}  {check.name.ljust(width)}  {check.detail}")
            lines += [f"      {' ' * width}  {problem}" for problem in check.problems]
        return "\n".join(lines)


def verify_folder(
    folder: Path, *, load: bool = False, trust_remote_code: bool = False, listener: Listener | None = None
) -> Verification:
    """Check a model folder; see `yeam.verify`. `listener` is called with (bytes read, bytes in all).

    Raises UserError where there is no such folder. What is wrong inside of it is in the result.
    """
    started = time.monotonic()
    if not folder.is_dir():
        raise UserError(f"{folder}: is not a folder", "name the folder that a merge wrote")
    checks = list(_checks(folder, load, trust_remote_code, listener))
    return Verification(folder, tuple(checks), round(time.monotonic() - started, 3))


def _checks(folder: Path, load: bool, trust_remote_code: bool, listener: Listener | None) -> Iterator[Check]:
    yield _json_files(folder)
    try:
        checkpoint = open_checkpoint(str(folder))
    except CheckpointError as error:
        yield Check("shards", "the weights cannot be opened", (error.message,))
        return
    with closing(checkpoint):
        yield _shards(folder, checkpoint)
        report = _report(folder)
        if report is not None:
            yield _described(report, checkpoint)
        contents = _Contents(checkpoint, listener)
        if report is None:
            yield Check("checksums", f"there is no {REPORT} to compare with")
        else:
            yield contents.checksums(report)
        yield contents.numbers()
        yield _ties(folder, checkpoint, contents.digests)
        yield _layers(folder, checkpoint)
        if load:
            yield from _loads(folder, checkpoint, trust_remote_code)


def _json_files(folder: Path) -> Check:
    problems = []
    names = sorted(path.name for path in folder.glob("*.json"))
    for name in names:
        try:
            read_any_json(folder / name) if name == MODULES else read_json(folder / name)
        except CheckpointError as error:
            problems.append(error.message)
    if "config.json" not in names:
        problems.append(f"{folder / 'config.json'}: is missing, so nothing can load the model by its folder")
    return Check("files", f"{len(names)} JSON files", (*problems, *companion_problems(folder)))


def _shards(folder: Path, checkpoint: Checkpoint) -> Check:
    """Index and shards agree, and no other file claims to belong to them."""
    used = {extent.path.name for name in checkpoint.tensors if (extent := checkpoint.extent(name)) is not None}
    total = sum(info.nbytes for info in checkpoint.tensors.values())
    problems = [note for note in checkpoint.notes if not (checkpoint.apart and note.startswith("config.json ties"))]
    merged = (folder / REPORT).exists()  # models of others may bring more: Mistral's have consolidated.safetensors
    stray = sorted(
        path.name
        for path in folder.glob("*.safetensors")
        if path.name not in used and (merged or _SHARD.fullmatch(path.name))
    )
    if stray and used:
        verb = "belongs" if len(stray) == 1 else "belong"
        problems.append(f"{listed(stray)} {verb} to no tensor of the model: remove what is left over")
    if (folder / _INDEX).is_file():
        metadata = read_json(folder / _INDEX).get("metadata")
        size = metadata.get("total_size") if isinstance(metadata, dict) else None
        if size is not None and size != total:
            problems.append(f"{_INDEX} says total_size {size}, the shards hold {total} bytes")
    files = f"{len(used)} file{'s' * (len(used) != 1)}"
    return Check("shards", f"{len(checkpoint.tensors):,} tensors, {total:,} bytes in {files}", tuple(problems))


def _report(folder: Path) -> dict[str, dict[str, Any]] | None:
    """The tensors of the report by name, {} for a report that is none, None where there is none."""
    path = folder / REPORT
    if not path.exists():
        return None
    try:
        tensors = read_json(path).get("tensors")
    except CheckpointError:  # said by the check of the files
        return {}
    entries = tensors if isinstance(tensors, list) else []
    return {str(e["name"]): e for e in entries if isinstance(e, dict) and "name" in e}


def _described(report: Mapping[str, Mapping[str, Any]], checkpoint: Checkpoint) -> Check:
    """The tensors that are there are those of the report, with its shapes, dtypes and files."""
    problems = []
    if missing := report.keys() - checkpoint.tensors.keys():
        problems.append(f"{REPORT} lists {listed(missing)}, which the shards do not hold")
    if extra := checkpoint.tensors.keys() - report.keys():
        problems.append(f"the shards hold {listed(extra)}, which {REPORT} does not list")
    for name, info in checkpoint.tensors.items():
        entry, extent = report.get(name), checkpoint.extent(name)
        if entry is None:
            continue
        there = {"shape": list(info.shape), "dtype": info.dtype, "file": extent.path.name if extent else None}
        for key, value in there.items():
            if entry.get(key) != value:
                problems.append(f"{name}: {key} is {value}, {REPORT} says {entry.get(key)}")
    return Check("report", f"{len(report):,} tensors in {REPORT}", tuple(problems))


@dataclass
class _Contents:
    """One pass over all bytes: the XXH3-128 of every tensor in `digests`, and where it holds NaN or Inf."""

    checkpoint: Checkpoint
    listener: Listener | None
    digests: dict[str, str] = field(default_factory=dict)
    bad: dict[str, str] = field(default_factory=dict)
    unreadable: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        infos = list(self.checkpoint.tensors.values())
        total, done = sum(info.nbytes for info in infos), 0
        with ThreadPoolExecutor(cores(), "yeam-verify") as pool:
            for info, found in zip(infos, pool.map(self._read, infos)):
                done += info.nbytes
                digest, where, error = found
                if error:
                    self.unreadable[info.name] = error
                else:
                    self.digests[info.name] = digest
                if where:
                    self.bad[info.name] = where
                if self.listener is not None:
                    self.listener(done, total)

    def _read(self, info: TensorInfo) -> tuple[str, str, str]:
        """(digest, where it is not finite, why it cannot be read)."""
        import torch
        import xxhash

        digest, where = xxhash.xxh3_128(), ""
        row = info.shape[-1] if len(info.shape) > 1 else 1
        step = max(1, _TILE // max(1, row * info.storage.itemsize)) * max(row, 1)
        try:
            for start in range(0, info.numel, step):
                tile_T = self.checkpoint.read(info.name, start, min(start + step, info.numel))
                digest.update(tile_T.view(torch.uint8).numpy().data)
                if info.storage.is_float and not where and (found := not_finite_in(tile_T)) is not None:
                    where = f"{found[1]} at element {start + found[0]}"
        except CheckpointError as error:
            return "", where, error.message
        return digest.hexdigest(), where, ""

    def checksums(self, report: Mapping[str, Mapping[str, Any]]) -> Check:
        """Every tensor's bytes are those that the merge wrote."""
        problems = list(self.unreadable.values())
        known = [name for name in self.digests if name in report]
        for name in known:
            if self.digests[name] != report[name].get("xxh3"):
                problems.append(f"{name}: its bytes are not those that the merge wrote (checksum {REPORT})")
        return Check("checksums", f"{len(known):,} tensors", tuple(problems))

    def numbers(self) -> Check:
        """No NaN, no Inf."""
        count = sum(info.storage.is_float for info in self.checkpoint.tensors.values())
        problems = [f"{name}: holds {where}" for name, where in self.bad.items()]
        return Check("numbers", f"NaN or Inf in {len(self.bad)} of {count:,} tensors", tuple(problems))


def _ties(folder: Path, checkpoint: Checkpoint, digests: Mapping[str, str]) -> Check:
    """What config.json ties is stored once or equal, and what it does not tie is there."""
    shapes = {name: info.shape for name, info in checkpoint.tensors.items()}
    try:
        config = read_config(folder)
    except CheckpointError:  # said by the check of the files
        return Check("ties", "config.json cannot be read")
    anatomy: Anatomy = describe(config, shapes)
    problems = []
    note = resolve_ties(config, shapes, anatomy)[2]
    if note:
        problems.append(f"{note}: transformers would make one up")
    flag = "tie_word_embeddings"
    can_say_so = checkpoint.config.get(flag) != config.get(flag)  # of some families the flag is about other ties, too
    for duplicate, kept in anatomy.ties:
        if kept not in shapes:
            problems.append(f"config.json ties {duplicate} to {kept}, which is not stored")
            continue
        known = not can_say_so and {duplicate, kept} & checkpoint.apart
        if duplicate in shapes and digests.get(duplicate) != digests.get(kept) and not known:
            problems.append(f"config.json ties {duplicate} to {kept}, but both are stored and differ")
    pairs = ", ".join(f"{duplicate} = {kept}" for duplicate, kept in anatomy.ties)
    return Check("ties", pairs or "none", tuple(problems))


def _layers(folder: Path, checkpoint: Checkpoint) -> Check:
    """config.json tells of the layers that are there."""
    shared = {
        name: checkpoint.tensors[kept].shape for name, kept in checkpoint.aliases.items() if kept in checkpoint.tensors
    }
    anatomy = describe(checkpoint.config, {name: info.shape for name, info in checkpoint.tensors.items()} | shared)
    return Check("layers", layers_detail(anatomy), tuple(layer_problems(folder, checkpoint.config, anatomy)))


def _loads(folder: Path, checkpoint: Checkpoint, trust_remote_code: bool) -> Iterator[Check]:
    """transformers' own word: model and tokenizer load, and every weight has a place."""
    import tempfile

    from yeam.evaluation.folders import Source
    from yeam.evaluation.loading import architecture, load_tokenizer, load_with_info, place

    source = Source(str(folder), folder, checkpoint)
    problems: list[str] = []
    detail, model = "transformers refuses it", None
    with tempfile.TemporaryDirectory(prefix="yeam-verify-") as scratch:
        try:
            stored = checkpoint.config.get("dtype") or checkpoint.config.get("torch_dtype") or "float32"
            [placement] = place([source], str(stored) if isinstance(stored, str) else "float32", "cpu", None)
            model, info = load_with_info(
                architecture(checkpoint.config),
                folder,
                str(folder),
                placement,
                scratch,
                trust_remote_code=trust_remote_code,
            )
            detail = type(model).__name__
            for key in ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs"):
                if info.get(key):
                    words = sorted(str(item[0] if isinstance(item, tuple) else item) for item in info[key])
                    problems.append(f"{key.replace('_', ' ')}: {listed(words)}")
        except UserError as error:
            problems.append(error.message)
        yield Check("model loads", detail, tuple(problems))
        try:
            tokenizer = load_tokenizer(source, trust_remote_code)
        except UserError as error:
            yield Check("tokenizer loads", "transformers refuses it", (error.message,))
            return
        yield _tokenizer(tokenizer, model)


def _tokenizer(tokenizer: Any, model: Any) -> Check:
    if tokenizer is None:
        return Check("tokenizer loads", "there is none")
    problems = []
    embedding = model.get_input_embeddings() if model is not None else None
    rows = getattr(getattr(embedding, "weight", None), "shape", (None,))[0]
    if rows is not None and len(tokenizer) > rows:
        problems.append(f"the tokenizer has {len(tokenizer)} tokens, the embedding {rows} rows")
    return Check("tokenizer loads", f"{type(tokenizer).__name__}, {len(tokenizer):,} tokens", tuple(problems))
