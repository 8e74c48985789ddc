"""The plan: a pure, JSON-serialisable list of jobs, one for each output tensor, made from headers alone.

The same inputs and recipe give the same plan in every process; its hash is what makes a run resumable.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, is_dataclass, replace
from functools import cache, cached_property
from itertools import accumulate
from operator import attrgetter
from typing import Any

from yeam import indented
from yeam.checkpoint.dtypes import DTYPES
from yeam.errors import YeamError
from yeam.records import altered

PLAN_VERSION = 1


@dataclass(frozen=True)
class Input:
    """A tensor of an input model: index into `Plan.models` and the tensor's name there."""

    model: int
    tensor: str


@dataclass(frozen=True)
class Companion:
    """Another tensor that a job's method looks at: of the same sources, in the same order, and of the same base."""

    shape: tuple[int, ...]
    sources: tuple[Input, ...]
    base: Input | None = None

    @property
    def inputs(self) -> tuple[Input, ...]:
        return (*self.sources, self.base) if self.base is not None else self.sources


@dataclass(frozen=True)
class Job:
    """One output tensor.

    `dtype` is the output's safetensors code, `work` the dtype of the arithmetic, `exact` whether every operation
    rounds to it as in mergekit. `method` is a registered merge method
    or `copy`, which writes the single source's values unchanged. `parameters` are validated and resolved for this
    tensor; those that each model has its own of hold one value a source. `depth` is how many layers the model has,
    `transposed` whether it stores this matrix as [in, out].
    `companions` are further tensors that the method reads, by the name under which it knows them. `shard`, `begin`,
    `end` are the exact bytes in the output (-1 before layout).
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    role: str
    method: str
    sources: tuple[Input, ...]
    depth: int
    transposed: bool
    base: Input | None = None
    parameters: Mapping[str, Any] = field(default_factory=dict)
    work: str = "F32"
    exact: bool = False
    roles: tuple[str, ...] = ()
    layer: int | None = None
    resident: int = 0
    companions: Mapping[str, Companion] = field(default_factory=dict)
    shard: int = -1
    begin: int = -1
    end: int = -1

    @cached_property
    def numel(self) -> int:
        return math.prod(self.shape)

    @cached_property
    def nbytes(self) -> int:
        return self.numel * DTYPES[self.dtype].itemsize

    @property
    def inputs(self) -> tuple[Input, ...]:
        return (*self.sources, self.base) if self.base is not None else self.sources

    @property
    def reads(self) -> tuple[Input, ...]:
        """Every tensor that the job reads: its inputs and its companions'."""
        if not self.companions:
            return self.inputs
        return (*self.inputs, *(i for companion in self.companions.values() for i in companion.inputs))


@dataclass(frozen=True)
class Model:
    """An input model as the plan saw it: its reference, a fingerprint of its files, its name in published files.

    Of one that is an intermediate of the same recipe (`stage`) the fingerprint is the hash of that stage's plan.
    """

    reference: str
    fingerprint: str
    label: str
    stage: bool = False


@dataclass(frozen=True)
class Share:
    """A merged model's part in a new vocabulary: tokens that it `brought`, and what its view has for all of them.

    `own` rows, rows `borrowed` from another model, `averaged` over several, and `zeros`.
    """

    model: int
    brought: int
    own: int
    borrowed: int
    averaged: int
    zeros: int


@dataclass(frozen=True)
class Vocabulary:
    """The output's vocabulary, where the recipe asks for one, in short; `digest` stands for its tokens and their ids.

    `source` is `union`, `base` or a model; `tokens` are its tokens, `by_recipe` those that only the recipe names;
    `rows` are those of the embedding: with padding, and ids that no token has.
    """

    source: str
    tokens: int
    rows: int
    by_recipe: int
    shares: tuple[Share, ...]
    digest: str


@dataclass(frozen=True)
class Shard:
    """An output file: its name, its size in bytes, and its safetensors header (length field and padding included)."""

    file: str
    nbytes: int
    header: str


@dataclass(frozen=True)
class Plan:
    """What a merge will do, whole.

    `config` is the output's config.json (None where no input has one); `donor` is the model that other files are taken
    from, `tokenizer_donor` the one for tokenizer files; `chat_template` is a Jinja text or None to keep the
    tokenizer's own. `stages` are the plans of the intermediates, each after those that it needs.
    """

    method: str
    models: tuple[Model, ...]
    jobs: tuple[Job, ...] = field(repr=False)  # thousands, in a notebook
    donor: int
    tokenizer_donor: int
    config: Mapping[str, Any] | None = field(default=None, repr=False)
    chat_template: str | None = None
    vocabulary: Vocabulary | None = None
    shards: tuple[Shard, ...] = field(default=(), repr=False)
    plugins: tuple[str, ...] = ()
    allow_nan: bool = False
    notes: tuple[str, ...] = ()
    stages: tuple[StagePlan, ...] = ()
    version: int = PLAN_VERSION

    @cached_property
    def total_bytes(self) -> int:
        return sum([job.nbytes for job in self.jobs])

    @cached_property
    def total_parameters(self) -> int:
        """Learned numbers: constants and integers are not counted."""
        return sum([job.numel for job in self.jobs if DTYPES[job.dtype].is_float and job.role != "buffer"])

    def to_dict(self) -> dict[str, Any]:
        """The plan as plain JSON types."""
        plain: dict[str, Any] = json.loads(json.dumps(self, default=_plain))
        return plain

    def hash(self) -> str:
        """32 hex digits that change when anything that decides the tensors or the config of the output changes.

        Notes and labels do not decide them, nor does `allow_nan`: a run that stopped at a NaN continues with it.
        """
        from yeam._version import __version__

        models = tuple(replace(model, label="") for model in self.models)
        content = replace(self, models=models, notes=(), allow_nan=False, stages=())
        text = json.dumps([__version__, _plain(content) | {"jobs": _rows(self.jobs)}], sort_keys=True, default=_plain)
        return hashlib.sha256(text.encode()).hexdigest()[:32]


@dataclass(frozen=True)
class StagePlan:
    """An intermediate of a recipe of several documents: its name, its plan, and whether it is computed as it is read.

    One that is not `streamed` is written into a temporary folder beside the output first.
    """

    name: str
    plan: Plan
    streamed: bool


def _plain(value: Any) -> dict[str, Any]:
    """A part of a plan as a mapping. `asdict` would copy all that is in it, which for 20,000 tensors takes seconds."""
    if is_dataclass(value):
        kind: type = type(value)
        return {name: getattr(value, name) for name in _field_names(kind)}
    raise YeamError(f"a {type(value).__name__} cannot be written into a plan", "give parameters types that JSON has")


@cache
def _field_names(kind: type) -> tuple[str, ...]:
    return tuple(each.name for each in fields(kind))


_INPUT, _COMPANION, _JOB = (attrgetter(*_field_names(kind)) for kind in (Input, Companion, Job))
_SOURCES, _BASE, _COMPANIONS = (_field_names(Job).index(name) for name in ("sources", "base", "companions"))


def _rows(jobs: Sequence[Job]) -> list[list[Any]]:
    """Of what there are thousands only the values, in the order of the fields."""
    rows = []
    for job in jobs:
        row = list(_JOB(job))
        row[_SOURCES] = [_INPUT(source) for source in job.sources]
        row[_BASE] = None if job.base is None else _INPUT(job.base)
        if job.companions:
            row[_COMPANIONS] = {name: _companion_row(other) for name, other in job.companions.items()}
        rows.append(row)
    return rows


def _companion_row(companion: Companion) -> tuple[Any, ...]:
    shape, sources, base = _COMPANION(companion)
    return shape, [_INPUT(source) for source in sources], None if base is None else _INPUT(base)


# safetensors writes tensors in this order of dtypes, each sorted by name: wide types first, so that all are aligned
_FILE_ORDER = {code: place for place, code in enumerate((
    "U64", "I64", "F64", "C64", "F32", "U32", "I32", "BF16", "F16", "U16", "I16",
    "F8_E8M0", "F8_E4M3", "F8_E5M2", "I8", "U8", "BOOL",
))}  # fmt: skip


def layout(plan: Plan, shard_size: int) -> Plan:
    """The plan with every job's shard and byte range set, and the shards' headers.

    Files come out as `save_pretrained(max_shard_size=…)` of transformers writes them, byte for byte: tensors fill
    shards in order, and one larger than `shard_size` (bytes) has a shard of its own, while the shard under way goes on.
    """
    jobs = list(plan.jobs)
    sizes = [job.nbytes for job in jobs]
    groups = _shard_groups(sizes, shard_size)
    shards = []
    for number, group in enumerate(groups):
        group.sort(key=lambda i: (_FILE_ORDER[jobs[i].dtype], jobs[i].name))
        ends = list(accumulate(sizes[i] for i in group))
        header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        for i, end in zip(group, ends):
            job = jobs[i]
            header[job.name] = {"dtype": job.dtype, "shape": job.shape, "data_offsets": (end - sizes[i], end)}
        text = json.dumps(header, separators=(",", ":"), ensure_ascii=False)
        length = len(text.encode())
        padding = -length % 8
        text, first = text + " " * padding, 8 + length + padding
        for i, end in zip(group, ends):
            jobs[i] = altered(jobs[i], shard=number, begin=first + end - sizes[i], end=first + end)
        shards.append(Shard(shard_name(number, len(groups)), first + ends[-1], text))
    return replace(plan, jobs=tuple(jobs), shards=tuple(shards))


def _shard_groups(sizes: Sequence[int], shard_size: int) -> list[list[int]]:
    """Indices of the jobs in each shard, from the bytes of each."""
    groups: list[list[int]] = []
    current: list[int] = []
    filled = 0
    for index, nbytes in enumerate(sizes):
        if nbytes > shard_size:
            groups.append([index])
            continue
        if filled + nbytes > shard_size:
            groups.append(current)
            current, filled = [], 0
        current.append(index)
        filled += nbytes
    return [*groups, current] if current else groups


def shard_name(number: int, count: int) -> str:
    """`model.safetensors`, or `model-0000i-of-0000n.safetensors` counted from 1."""
    return "model.safetensors" if count == 1 else f"model-{number + 1:05d}-of-{count:05d}.safetensors"


def index_json(plan: Plan) -> str:
    """`model.safetensors.index.json` as transformers writes it."""
    files = {job.name: plan.shards[job.shard].file for job in plan.jobs}
    metadata = {"total_parameters": plan.total_parameters, "total_size": plan.total_bytes}
    return indented.dumps({"metadata": metadata, "weight_map": files}, 2, sort_keys=True) + "\n"
