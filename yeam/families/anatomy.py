"""What the tensors of a checkpoint mean: the result of `describe`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from yeam.families.configs import Path
from yeam.families.stacks import Stack
from yeam.families.traits import Traits
from yeam.families.views import View

Shape = tuple[int, ...]
Place = Literal["pre", "layer", "post"]


@dataclass(frozen=True)
class Meaning:
    """What one tensor is.

    `role` is one of `sites.ROLES`, `roles` adds the groups of `sites.GROUPS` (and for a bias the role of its weight): a
    `role:` filter matches if its word is in `roles`. `site` is the finer place, with the scope of the block before it
    (`q`, `attn_post_norm`, `expert.gate`, `cross.k`). `layer` is set if and only if `place` is `layer`; such a tensor
    is renamed when layers are renumbered, any other keeps its name. `expert` is the index in a per-expert layout.
    `view` is None for a tensor that is one part, stored [out, in],
    or [in, out] with `inputs_first`. `vocab_axis` is the axis with one entry per token, if any.
    """

    role: str
    roles: frozenset[str]
    site: str
    stack: str | None = None
    layer: int | None = None
    place: Place = "pre"
    module: str = "default"
    expert: int | None = None
    view: View | None = None
    vocab_axis: int | None = None
    inputs_first: bool = False

    @property
    def transposed(self) -> bool:
        """Whether it is stored [in, out], or as packed experts [experts, in, out]."""
        return self.inputs_first or (self.view is not None and self.view.transposed)


@dataclass(frozen=True)
class Anatomy:
    """What a checkpoint is made of. `family` is a name of the table, or `inferred`.

    `tensors` holds every input name, in order; `stacks` are by prefix; `modules` maps the module names of recipes to
    the tensor names; `vocab_paths` are the places of `vocab_size` in config.json; `traits` is how the (text) model
    computes, None if inferred, for the config at `text_path`; `base` is the prefix under which the base model's
    tensors stand in this checkpoint; `head_prefix` what precedes its head; `ties` see `ties.py`; `is_tied` None:
    there is no head, or one cannot tell. `notes` are oddities worth showing.
    """

    family: str
    tensors: Mapping[str, Meaning]
    stacks: Mapping[str, Stack]
    modules: Mapping[str, tuple[str, ...]]
    vocab_paths: tuple[Path, ...]
    ties: tuple[tuple[str, str], ...]
    is_tied: bool | None
    traits: Traits | None = None
    text_path: Path = ()
    base: str = ""
    head_prefix: str = ""
    notes: tuple[str, ...] = ()
