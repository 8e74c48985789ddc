"""The attentions of a plan: which tensors belong together, and where q, k, v and o lie in them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from yeam.errors import ConfigError
from yeam.families import Meaning, Traits
from yeam.families.configs import Dims, at, dims
from yeam.methods.attention_parts import Circuit, Place
from yeam.planning.jobs import Input, Job, Plan
from yeam.planning.members import Member
from yeam.plugins.registry import PluginContext

FUSED = {"qkv": ("q", "k", "v"), "kv": ("k", "v")}
GAINS = ("q_norm", "k_norm")
_SITES = ("q", "k", "v", "o", *FUSED)


@dataclass
class Unit:
    """The tensors of one attention: its jobs by site, `.bias` added for a bias; norms that come in lists by number too."""

    label: str
    scope: str
    stack: str
    jobs: dict[str, Job] = field(default_factory=dict)
    meanings: dict[str, Meaning] = field(default_factory=dict)


class Unknown(Exception):
    """Why an attention is left to the recipe's method."""


def _meaning(job: Job, context: PluginContext) -> Meaning | None:
    first = job.inputs[-1]
    member: Member = context.members[first.model]
    return member.anatomy.tensors.get(first.tensor)


def units_of(plan: Plan, context: PluginContext) -> list[Unit]:
    """The attentions of the output, in order. Raises ConfigError for multi-head latent attention."""
    found: dict[tuple[str | None, int | None, str], Unit] = {}
    for job in plan.jobs:
        meaning = _meaning(job, context)
        if meaning is None or meaning.layer is None or "attention" not in meaning.roles:
            continue
        if "latent" in meaning.roles:
            raise ConfigError(
                f"{job.name} is a factor of multi-head latent attention, whose heads share a latent space and form no such circuits",
                "remove the plugin: the recipe's own method merges the factors",
            )
        scope, _, last = meaning.site.rpartition(".")
        if last not in (*_SITES, *GAINS) or (last == "o" and meaning.role == "bias"):
            continue
        label = job.name.rpartition(".")[0]
        unit = found.setdefault((meaning.stack, job.layer, scope), Unit(label, scope, str(meaning.stack)))
        site = f"{last}.bias" if meaning.role == "bias" else last
        if site in unit.jobs:  # one norm for each head
            site = f"{site}#{len(unit.jobs)}"
        unit.jobs[site], unit.meanings[site] = job, meaning
    return [*found.values()]


@dataclass(frozen=True)
class Shape:
    """What the circuits of one attention look like, and where its parts lie: tensor's site → part → place."""

    dims: Dims
    kv_heads: int
    width: int
    rotary: int
    interleaved: bool
    rigid: bool
    offset: float
    places: Mapping[str, Mapping[str, Place]]

    @classmethod
    def of(cls, unit: Unit, plan: Plan, context: PluginContext) -> Shape:
        """Raises Unknown for an attention that cannot be read as circuits."""
        places = {site: _places(site, job, unit.meanings[site]) for site, job in unit.jobs.items()}
        parts = {part: (site, place) for site, held in places.items() for part, place in held.items()}
        if missing := [part for part in "qkvo" if part not in parts]:
            raise Unknown(f"its {missing[0]} is not in this layer")
        any_job = unit.jobs[parts["q"][0]]
        member = context.members[any_job.inputs[-1].model]
        traits = member.anatomy.traits
        if traits is None or traits.attention != "heads" or not unit.stack.startswith(member.anatomy.base):
            raise Unknown(f"how it uses positions is not known (family {member.anatomy.family})")
        widths = {part: _width(unit.jobs[site], place) for part, (site, place) in parts.items() if part in "qkvo"}
        rows = {part: place.rows for part, (_, place) in parts.items()}
        if len({*widths.values()}) > 1:
            raise Unknown(f"its parts have different widths: {widths}")
        found = _dims(any_job.inputs[-1], context)
        if found is None:
            raise Unknown("config.json does not state its number of heads")
        for other in any_job.sources:
            if _dims(other, context) != found:
                raise ConfigError(
                    f"{any_job.name}: {context.members[other.model].ref} has other heads than {member.ref}, by config.json",
                    "merge models of one architecture",
                )
        kv_heads, rest = divmod(rows["k"], found.head_dim)
        whole = found.heads * found.head_dim
        if (
            rest
            or not kv_heads
            or found.heads % kv_heads
            or (rows["q"], rows["o"], rows["v"]) != (whole, whole, rows["k"])
        ):
            raise Unknown(f"{rows} rows do not fall into {found.heads} heads of {found.head_dim}")
        turns = traits.rope != "none" and "cross" not in unit.scope.split(".")
        return cls(
            dims=found,
            kv_heads=kv_heads,
            width=widths["q"],
            rotary=int(traits.rotary * found.head_dim) // 2 * 2 if turns else 0,
            interleaved=traits.rope == "interleaved",
            rigid=traits.qk_norm != "none",
            offset=_offset(traits),
            places=places,
        )

    def reads(self, site: str) -> bool:
        """Whether the tensor of a site falls into heads."""
        return all(place.rows % self.dims.head_dim == 0 for place in self.places[site].values())

    def circuit(self, own: str, wanted: Sequence[str]) -> Circuit:
        """For the job of site `own`, with the sites in `wanted` as companions."""
        places = {
            part: replace(place, key="" if site == own else site)
            for site in (own, *wanted)
            for part, place in self.places[site].items()
        }
        heads, kv_heads = self.dims.heads, self.kv_heads
        if own.startswith(GAINS):
            heads, kv_heads = (places[part].rows // self.dims.head_dim if part in places else 0 for part in GAINS)
            heads, kv_heads = heads or kv_heads, kv_heads or heads
        return Circuit(
            heads,
            kv_heads,
            self.dims.head_dim,
            self.width,
            self.rotary,
            self.interleaved,
            self.rigid,
            self.offset,
            places,
        )


def _offset(traits: Traits) -> float:
    return 1.0 if traits.norm == "rms1p" else 0.0


def _dims(source: Input, context: PluginContext) -> Dims | None:
    member = context.members[source.model]
    config = at(member.checkpoint.config, member.anatomy.text_path)
    return dims(config) if isinstance(config, Mapping) else None


def _places(site: str, job: Job, meaning: Meaning) -> dict[str, Place]:
    """The parts in the tensor of a job. `o` lies along the columns of a tensor that is stored [out, in], the others along rows."""
    name, dot, bias = site.partition("#")[0].partition(".")
    names = FUSED.get(name, (name,))
    if name.endswith("_norm") or (bias and len(names) == 1):
        rows = 1
        for side in job.shape:
            rows *= side
        return {f"{name}{dot}{bias}": Place("", 0, ((0, rows),))}
    axis = int(meaning.transposed != (name == "o")) if not bias else 0
    if len(names) == 1:
        return {name: Place("", axis, ((0, job.shape[axis]),))} if len(job.shape) == 2 else {}
    if meaning.view is None or meaning.view.experts:
        return {}
    return {f"{part}{dot}{bias}": Place("", axis, meaning.view.intervals(part)) for part in names}


def _width(job: Job, place: Place) -> int:
    return job.shape[1 - place.axis]
