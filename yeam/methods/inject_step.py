"""The step of an injection: sources resolved into one update, spread over frames, kept off what the target uses; and how far it goes.

Legend: K sources, T elements of a panel, M rows and N columns of it, B blocks of four weights, S weights of a block.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from yeam.methods.yeam import Frames

if TYPE_CHECKING:
    from torch import Tensor

Policy = Literal["consensus", "union", "priority"]
Protect = Literal["space", "rays", "none"]

# no direction is moved further than SHARE · e^(3/2) times what the resolved update moves its own strongest one
SHARE = 0.52
STEPS = 4
REACH_WITHOUT_BASE = 0.04  # lengths of the resolved update: such updates undo the target's own


@dataclass(frozen=True)
class How:
    """The options of an injection."""

    policy: Policy
    strength: float
    budget: float
    protect: Protect
    softness: float
    frames: Frames
    rounds: int
    seed: int


def reach(resolved: float, shaped: float, target: float, depth: int) -> float:
    """The factor on what was shaped that gives it SHARE · e^(3/2) of the resolved update's spectral norm.

    resolved, shaped, target: spectral norms. e = min(0.78/(ρ · depth)^⅖, 2.7) with ρ = resolved/target: gentle updates are followed
    further (`geometry.length`). In spectral norms, as these tell what a layer's outputs change by (Yang, Simon & Bernstein 2023), in few
    axes or many.
    """
    from yeam.geometry.length import beyond

    return (
        SHARE * beyond(resolved / target, depth) ** 1.5 * resolved / shaped
        if min(resolved, shaped, target) > 0
        else 0.0
    )


def top(x_T: Tensor, sides: tuple[int, int] | None, seed: int) -> float:
    """The spectral norm of a matrix by a few steps of subspace iteration (Halko et al. 2011), from below; of anything else its norm."""
    import torch

    if sides is None:
        return float(torch.linalg.vector_norm(x_T))
    x_MN = x_T.view(sides)
    generator = torch.Generator().manual_seed(seed)
    q_Nw = torch.randn(sides[1], min(8, *sides), generator=generator).to(x_T)
    for _ in range(STEPS):
        q_Nw, _ = torch.linalg.qr(x_MN.T @ (x_MN @ q_Nw))
    return float(torch.linalg.matrix_norm(x_MN @ q_Nw, 2))


def resolve(delta_KT: Tensor, policy: Policy, softness: float) -> Tensor:
    """Updates [K, T] in blocks of four weights → [T]: the rays' point (union), the mean (consensus), or one after the other (priority).

    By priority a later update adds, in each block, what lies across the point so far, and along it only what goes beyond it.
    """
    import torch

    from yeam.geometry.rays import SIDE, ray_point

    if policy == "union":
        return ray_point(delta_KT, softness)
    if policy == "consensus":
        return delta_KT.mean(dim=0)
    T = delta_KT.shape[1]
    padded_KBS = torch.nn.functional.pad(delta_KT, (0, -T % SIDE)).view(len(delta_KT), -1, SIDE)
    point_BS = padded_KBS[0].clone()
    tiny = torch.finfo(point_BS.dtype).tiny
    for delta_BS in padded_KBS[1:]:
        square_B1 = point_BS.square().sum(dim=1, keepdim=True).clamp_(min=tiny)
        along_B1 = ((delta_BS * point_BS).sum(dim=1, keepdim=True) / square_B1).clamp_(max=1)
        point_BS = point_BS + delta_BS - along_B1 * point_BS
    return point_BS.view(-1)[:T]


def gate_(point_T: Tensor, coherence_B: Tensor, policy: Policy, K: int) -> float:
    """Blocks by their agreement: what is shared (consensus), what is not opposed (union); by priority nothing is taken back.

    Returns the squared length of what was taken.
    """
    from yeam.geometry.agreement import shared, unopposed
    from yeam.geometry.rays import SIDE

    if policy == "priority" or K == 1:
        return 0.0
    factor_B = shared(coherence_B, K) if policy == "consensus" else unopposed(coherence_B, K)
    whole = point_T.numel() // SIDE
    lost = 0.0
    for x_BS, kept_B in (
        (point_T[: whole * SIDE].view(whole, SIDE), factor_B[:whole]),
        (point_T[whole * SIDE :].view(1, -1), factor_B[-1:]),
    ):
        square_B = x_BS.square().sum(dim=1)
        lost += float(square_B @ (1 - kept_B).square())
        x_BS.mul_(kept_B[:, None])
    return lost


def shape_(
    point_T: Tensor,
    own_T: Tensor,
    target_T: Tensor,
    sides: tuple[int, int] | None,
    how: How,
    agreement: float,
    rounding: float,
    departure: float,
    transposed: bool,
) -> float:
    """Spread the point over frames and keep it off what the target uses; its length is set afterwards.

    Returns the share of its length that is off that. sides: (M, N) where the panel is a matrix. rounding, departure: squared lengths of
    what in the point is noise (`Moments`); axes that hold no more than that are not raised.
    """
    import torch

    from yeam.geometry.frames import flatten_
    from yeam.geometry.protect import off_rays_, protect_

    if sides is not None:
        point_MN = point_T.view(sides)
        alpha = 1 - agreement / 2  # a single direction is spread by half: a target is touched more gently so
        flatten_(
            point_MN, how.frames, alpha=alpha, rounds=how.rounds, seed=how.seed, rounding=rounding,
            departure=departure, square_rows=transposed,
        )  # fmt: skip
    whole = float(torch.linalg.vector_norm(point_T))
    if sides is not None and how.protect == "space":
        protect_(point_T.view(sides), [own_T.view(sides), target_T.view(sides)])
    if how.protect == "rays" or (how.protect == "space" and sides is None):
        off_rays_(point_T, own_T)
    return float(torch.linalg.vector_norm(point_T)) / whole if whole > 0 else 0.0
