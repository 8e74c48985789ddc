"""The models that take part in a merge: opened once each, described, and asked for tensors by the output's names."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

from yeam.checkpoint import Checkpoint, TensorInfo, open_checkpoint, with_adapter
from yeam.errors import CheckpointError, UserError, suggest
from yeam.families import Anatomy, Meaning, Stack, aliases_of, describe
from yeam.families.counts import contradictions, in_words
from yeam.plugins import plugin_references
from yeam.recipe import LoadedRecipe, ModelRef, StageRef
from yeam.recipe.globs import training_step

_NOT_OF_THE_ANATOMY = ("_name_or_path", "transformers_version", "dtype", "torch_dtype", "use_cache")


@dataclass(eq=False)
class Member:
    """One input model: its reference, its index in the plan, its checkpoint, and what its tensors mean.

    `peers` are members whose anatomy is this one's, too, where they have the same tensors and config.
    """

    ref: ModelRef
    index: int
    checkpoint: Checkpoint
    peers: Sequence[Member] = field(default=(), repr=False)

    @cached_property
    def anatomy(self) -> Anatomy:
        """What the tensors mean.

        A head that only shares storage with the embedding counts as a tensor of its own where the config says that the
        two are not tied: a loader would miss it. What is stored apart is not tied, whatever the config says.
        """
        # fine-tunes of one model are described once: a name takes 50 µs, and there may be 20,000
        for peer in self.peers:
            if peer is not self and "anatomy" in vars(peer) and peer._stated == self._stated:
                return peer.anatomy
        return self._described()

    @cached_property
    def _stated(self) -> tuple[object, ...]:
        """All that the anatomy follows from; the order of the tensors is part of it."""
        checkpoint = self.checkpoint
        config = {key: value for key, value in checkpoint.config.items() if key not in _NOT_OF_THE_ANATOMY}
        shapes = [(name, info.shape) for name, info in checkpoint.tensors.items()]
        return config, shapes, dict(checkpoint.aliases), checkpoint.apart

    def _described(self) -> Anatomy:
        shapes = {name: info.shape for name, info in self.checkpoint.tensors.items()}
        aliases = {name: shapes[kept] for name, kept in self.checkpoint.aliases.items() if kept in shapes}
        if aliases:
            everything = describe(self.checkpoint.config, {**shapes, **aliases})
            if everything.is_tied is False:
                shapes |= {name: aliases[name] for name in aliases if everything.tensors[name].role == "head"}
        anatomy = describe(self.checkpoint.config, shapes)
        apart = self.checkpoint.apart
        if not apart.intersection(name for pair in anatomy.ties for name in pair):
            return anatomy
        ties = tuple(pair for pair in anatomy.ties if not apart.intersection(pair))
        return replace(anatomy, ties=ties, is_tied=False)

    @cached_property
    def duplicates(self) -> Mapping[str, str]:
        """Names of what is the same tensor as another, by the config's ties or by shared storage → that one's name."""
        shared = {name: kept for name, kept in self.checkpoint.aliases.items() if name not in self.anatomy.tensors}
        pairs = {**shared, **dict(self.anatomy.ties)}
        return {name: kept for name, kept in pairs.items() if kept in self.checkpoint.tensors}

    @cached_property
    def step(self) -> int | None:
        """The training step that the model's name, state or revision tells."""
        return training_step(self.ref)

    @property
    def notes(self) -> list[str]:
        """What was decided about this model, for the user."""
        twice = [name for name in self.duplicates if name in self.checkpoint.tensors]
        tied = [f"{name} is stored, but the config ties it to {self.duplicates[name]}, which is used" for name in twice]
        counted = [
            f"config.json: {in_words(found, self.anatomy)}"
            for found in contradictions(self.checkpoint.config, self.anatomy)
        ]
        return [f"{self.ref.label}: {note}" for note in (*self.checkpoint.notes, *tied, *counted)]

    def find(self, name: str, owner: Member) -> str | None:
        """This model's name of `owner`'s tensor: the same, another spelling of its prefix, or what it is tied to."""
        if name in self.checkpoint.tensors and name not in self.duplicates:
            return name
        for candidate in self._spellings(name, owner):
            stored = self.duplicates.get(candidate, self.checkpoint.aliases.get(candidate, candidate))
            if stored in self.checkpoint.tensors:
                return stored
        return None

    def owns(self, name: str, owner: Member) -> bool:
        """Whether `owner`'s tensor `name` is a tensor of its own here, not tied to another one."""
        return any(
            candidate in self.anatomy.tensors and candidate not in self.duplicates
            for candidate in self._spellings(name, owner)
        )

    def _spellings(self, name: str, owner: Member) -> Iterator[str]:
        yield name
        if name not in self.checkpoint.tensors:
            yield from aliases_of(name, owner.anatomy)

    def similar(self, stack: Stack) -> Stack:
        """This model's stack that corresponds to another's: of the same prefix, or the only one of the same last word.

        Where several have that word, only those of the same module count. A stack of no layers where there is none.
        """
        if stack.prefix in self.anatomy.stacks:
            return self.anatomy.stacks[stack.prefix]
        last = stack.prefix.rpartition(".")[2]
        found = [s for s in self.anatomy.stacks.values() if s.prefix.rpartition(".")[2] == last]
        if len(found) > 1:
            found = [s for s in found if s.module == stack.module]
        return found[0] if len(found) == 1 else Stack(stack.prefix, 0)

    def layer_tensors(self, stack: Stack, layer: int) -> list[tuple[str, Meaning]]:
        """(rest of the name, meaning) of the tensors in a layer of this model's stack that corresponds to `stack`."""
        return self._layers.get((self.similar(stack).prefix, layer), [])

    @cached_property
    def _layers(self) -> dict[tuple[str, int], list[tuple[str, Meaning]]]:
        found: dict[tuple[str, int], list[tuple[str, Meaning]]] = {}
        for name, meaning in self.anatomy.tensors.items():
            split = self.anatomy.stacks[meaning.stack].split(name) if meaning.stack is not None else None
            if meaning.stack is not None and split is not None and name not in self.duplicates:
                found.setdefault((meaning.stack, split[0]), []).append((split[1], meaning))
        return found

    def info(self, name: str) -> TensorInfo:
        return self.checkpoint.tensors[name]

    @cached_property
    def depth(self) -> int:
        """Layers of the tallest stack, at least 1."""
        return max((stack.count for stack in self.anatomy.stacks.values()), default=1)

    def kind(self, name: str) -> tuple[str, tuple[int, ...], str]:
        """A tensor's dtype as it is read, its shape, and its `natural_dtype`."""
        checkpoint = self.checkpoint
        info = checkpoint.tensors[name]
        return info.dtype, info.shape, info.dtype if checkpoint.as_stored else checkpoint.natural_dtype(name)

    def natural_dtype(self, name: str) -> str:
        """The safetensors code in which the model has a tensor: as stored, or what an adapter or scales hide."""
        return self.checkpoint.natural_dtype(name)


class Members(Sequence[Member]):
    """The models of a recipe in the order in which it names them, each opened once.

    `stages` are what the names of other documents of the recipe stand for.
    """

    def __init__(
        self,
        loaded: LoadedRecipe,
        opener: Callable[..., Checkpoint] = open_checkpoint,
        stages: Mapping[str, Checkpoint] | None = None,
    ) -> None:
        self._members: list[Member] = []
        self._by_ref: dict[ModelRef, Member] = {}
        self._opened: dict[int, Checkpoint] = {}
        try:
            for path, ref in (*loaded.recipe.references(), *plugin_references(loaded)):
                if ref in self._by_ref:
                    continue
                try:
                    if isinstance(ref, StageRef):
                        checkpoint = (stages or {})[ref.path]
                        checkpoint = checkpoint if ref.adapter is None else with_adapter(checkpoint, *ref.adapter)
                    else:
                        checkpoint = opener(ref.path, ref.revision, ref.adapter, reference=str(ref))
                except UserError as error:
                    meant = suggest(ref.path, loaded.stage_names)
                    remedy = f"{error.remedy}; or name a stage{meant}" if meant else error.remedy
                    raise type(error)(f"{loaded.locate(path)}: {error.message}", remedy) from error
                if not checkpoint.tensors:
                    raise CheckpointError(f"{loaded.locate(path)}: {ref} holds no tensors", "check the model")
                self._by_ref[ref] = Member(ref, len(self._members), checkpoint, self._members)
                self._members.append(self._by_ref[ref])
        except BaseException:
            self.close()
            raise

    def __getitem__(self, index):  # type: ignore[no-untyped-def]
        return self._members[index]

    def __len__(self) -> int:
        return len(self._members)

    def add(self, ref: ModelRef, checkpoint: Checkpoint) -> Member:
        """Take in a model that is computed from others; its checkpoint is closed with the rest."""
        member = Member(ref, len(self._members), checkpoint, self._members)
        self._members.append(member)
        return member

    def of(self, ref: ModelRef) -> Member:
        return self._by_ref[ref]

    def show(self, views: Mapping[int, Checkpoint]) -> None:
        """Put views of models in their place, by index; every other model is again as it was opened."""
        for index, member in enumerate(self._members):
            opened = self._opened.setdefault(index, member.checkpoint)
            shown = views.get(index, opened)
            if member.checkpoint is not shown:  # a new member, whose tensors are described anew
                self._members[index] = Member(member.ref, index, shown, self._members)
        self._by_ref = {ref: self._members[member.index] for ref, member in self._by_ref.items()}

    @property
    def checkpoints(self) -> list[Checkpoint]:
        return [member.checkpoint for member in self._members]

    def close(self) -> None:
        for member in self._members:
            member.checkpoint.close()
