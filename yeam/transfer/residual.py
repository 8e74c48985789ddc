"""A change of coordinates of the residual stream: embeddings, readers, writers and norms of a whole decoder.

With a norm before each branch any rotation is a symmetry once the norm's gain is taken into the readers; under LayerNorm one
that keeps the vector of ones. With norms behind the branches (Gemma 3, OLMo 2) only signed permutations are.

Legend: D hidden width, V tokens.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from yeam.errors import CheckpointError
from yeam.transfer.body import READERS, WRITERS, Body, Parts

if TYPE_CHECKING:
    import torch
    from torch import Tensor

SMALLEST_GAIN = 1e-5  # the same where they are equal
LEAST_GAIN = 0.05  # of the median: what a reader is divided by at least, where streams are only alike

NORM_OF = {"q": "attn_norm", "k": "attn_norm", "v": "attn_norm", "gate": "mlp_norm", "up": "mlp_norm"}


def norm_of(body: Body, part: str, parts: Parts) -> str | None:
    """The norm that a reader reads through, None for one that reads the stream itself."""
    site = NORM_OF[part]
    if body.traits.parallel and site == "mlp_norm" and site not in parts:
        site = "attn_norm"
    return site if site in parts else None


def gain(weight_D: Tensor, body: Body) -> Tensor:
    """What a norm multiplies by."""
    return 1 + weight_D if body.traits.norm == "rms1p" else weight_D


def weight_of(gain_D: Tensor, body: Body) -> Tensor:
    """The stored weight of a norm with that gain."""
    return gain_D - 1 if body.traits.norm == "rms1p" else gain_D


def visible(rows_TD: Tensor, gain_D: Tensor, body: Body) -> Tensor:
    """Rows that read a norm of that gain, without what a LayerNorm hides from them: a multiple of 1 / gain."""
    if body.traits.norm != "ln" or not bool(gain_D.all()):
        return rows_TD
    return rows_TD - (rows_TD * gain_D).mean(1, keepdim=True) / gain_D


def only_permutes(body: Body) -> bool:
    """Whether the family's norms leave no other change of the residual stream than signed permutations."""
    return body.traits.placement != "pre"


@dataclass(frozen=True)
class Rotation:
    """new stream = R · old stream. `order` and `sign` are set where R is a signed permutation: new i = sign_i · old order_i.

    least_gain: the least gain of a norm, relative to their median, that readers are divided by. A reader that is off by ε has noise of ε
    over the gain there.
    """

    matrix_DD: Tensor
    order_D: Tensor | None = None
    sign_D: Tensor | None = None
    least_gain: float = LEAST_GAIN

    @classmethod
    def of(cls, matrix_DD: Tensor, gate: float = 0.0, tolerance: float = 1e-4) -> Rotation:
        """The rotation of an orthogonal matrix; one that is a signed permutation up to `tolerance` is snapped to it.

        gate: the share of the stream that it explains; an exact one divides by any gain, and comes out exactly.
        """
        import torch

        order_D = matrix_DD.abs().argmax(dim=1)
        sign_D = matrix_DD.gather(1, order_D[:, None])[:, 0].sign()
        snapped_DD = torch.zeros_like(matrix_DD)
        snapped_DD[torch.arange(len(order_D)), order_D] = sign_D
        if len(set(order_D.tolist())) == len(order_D) and float((snapped_DD - matrix_DD).abs().max()) < tolerance:
            return cls(snapped_DD, order_D, sign_D)
        return cls(matrix_DD, least_gain=min(LEAST_GAIN, max(1 - gate, 0.0) ** 0.5))

    def to(self, dtype: torch.dtype) -> Rotation:
        """The same in another dtype."""
        sign_D = None if self.sign_D is None else self.sign_D.to(dtype)
        return Rotation(self.matrix_DD.to(dtype), self.order_D, sign_D, self.least_gain)

    def turned(self, x_xD: Tensor) -> Tensor:
        """Vectors of the old stream, in the last dimension, as vectors of the new one; computed in the rotation's dtype."""
        if self.order_D is not None and self.sign_D is not None:
            return x_xD.to(self.sign_D.dtype)[..., self.order_D] * self.sign_D
        return x_xD.to(self.matrix_DD.dtype) @ self.matrix_DD.T

    def gains(self, old_D: Tensor, wanted_D: Tensor) -> Tensor:
        """The gains of a norm in the new coordinates: a permutation keeps the old ones, a rotation is free to take the
        wanted ones, and does as far as they can be divided by."""
        import torch

        if self.order_D is not None:
            return old_D[self.order_D]
        median = float(wanted_D.abs().median())
        if median == 0:
            return torch.ones_like(wanted_D)
        floor = max(self.least_gain, SMALLEST_GAIN) * median
        small_D = wanted_D.abs() < floor
        return torch.where(small_D, torch.where(wanted_D < 0, -floor, floor), wanted_D)


def rotated_layer(parts: Parts, body: Body, rotation: Rotation, wanted: Parts) -> Parts:
    """A layer's parts for the rotated stream; `wanted` holds the norms whose gains are to be taken over.

    The layer computes rotation(f(x)) from rotation(x). Computed in the rotation's dtype, part by part; the result has the parts'
    dtypes. Raises CheckpointError for a rotation that the norms do not allow.
    """
    out = dict(parts)
    for site in ("attn_norm", "mlp_norm"):
        if site in parts:
            _renorm(parts, out, site, body, rotation, wanted)
    for part in READERS:
        if part in parts:
            through = norm_of(body, part, parts)
            old, new = (None, None) if through is None else (parts[through], out[through])
            out[part] = _read_through(old, new, parts[part], body, rotation)
    for part in WRITERS:
        out[part] = rotation.turned(parts[part].T).T.to(parts[part].dtype).contiguous()
        if part + ".bias" in parts:
            out[part + ".bias"] = rotation.turned(parts[part + ".bias"]).to(parts[part].dtype)
    for site in ("attn_post_norm", "mlp_post_norm"):
        if site in parts:
            if rotation.order_D is None:
                raise CheckpointError(
                    f"{body.checkpoint.reference}: norms behind the branches allow signed permutations of the stream only"
                )
            out[site] = parts[site][rotation.order_D]
    return out


def rotated_outer(parts: Parts, body: Body, rotation: Rotation, wanted: Parts) -> Parts:
    """Embedding, positions, final norm and head for the rotated stream. A tied model gets a head of its own (`head`) where
    the rotation does not keep the tie. Computed in the rotation's dtype; the result has the parts' dtypes."""
    out = dict(parts)
    for part in ("embedding", "position"):
        if part in parts:
            out[part] = rotation.turned(parts[part]).to(parts[part].dtype)
    if "final_norm" in parts:
        _renorm(parts, out, "final_norm", body, rotation, wanted)
    head_VD = parts.get("head", parts["embedding"])
    if "head" in parts or rotation.order_D is None:
        out["head"] = _read_through(parts["final_norm"], out["final_norm"], head_VD, body, rotation)
    return out


def _read_through(old: Tensor | None, new: Tensor | None, rows_TD: Tensor, body: Body, rotation: Rotation) -> Tensor:
    """Readers of the rotated stream, behind the norm `new` where they were behind `old`."""
    kind = rotation.matrix_DD.dtype
    if old is None or new is None:
        return rotation.turned(rows_TD).to(rows_TD.dtype)
    folded_TD = rows_TD.to(kind) * gain(old.to(kind), body)
    return (rotation.turned(folded_TD) / gain(new.to(kind), body)).to(rows_TD.dtype)


def _renorm(old: Parts, out: Parts, site: str, body: Body, rotation: Rotation, wanted: Parts) -> None:
    dtype, kind = old[site].dtype, rotation.matrix_DD.dtype
    gain_D = gain(old[site].to(kind), body)
    new_D = rotation.gains(gain_D, gain(wanted[site].to(kind), body) if site in wanted else gain_D)
    out[site] = weight_of(new_D, body).to(dtype)
    if site + ".bias" not in old:
        return
    # LN(x) = g ⊙ (n + β/g): the shift turns with the stream
    shift_D = old[site + ".bias"].to(kind) / gain_D.where(gain_D != 0, 1.0)
    if bool(((gain_D == 0) & (old[site + ".bias"] != 0)).any()):
        raise CheckpointError(
            f"{body.checkpoint.reference}: {site} has a gain of 0 beside a bias, which cannot be rotated"
        )
    out[site + ".bias"] = (new_D * rotation.turned(shift_D)).to(dtype)
