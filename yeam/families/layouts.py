"""From the name of a layout in the table to the view of one tensor, with the sizes taken from the config."""

from __future__ import annotations

from yeam.families.configs import Config, Dims, dims
from yeam.families.views import View

Shape = tuple[int, ...]


def view_of(layout: str | None, site: str, shape: Shape, config: Config, is_bias: bool) -> View | None:
    """The view of a tensor at `site`, or None: not fused, or its shape does not fit what the config says.

    Layouts: `T` (stored [in, out]), `q|k|v`, `k|v`, `gate|up` (blocks of rows; after `T ` of columns), `heads(q k v)`
    (the three repeat per head), `falcon` (one of three by config). Packed experts are known by their third dimension.
    """
    name = site.rpartition(".")[2]
    packed = site.startswith("expert.") and len(shape) == (2 if is_bias else 3)
    core = shape[1:] if packed else shape
    transposed = layout is not None and layout.startswith("T") and len(core) == 2
    if not core or (transposed and is_bias):
        return None
    length = core[-1] if transposed else core[0]
    blocks, groups = _blocks((layout or "").removeprefix("T").strip(), length, config)
    if not blocks:
        if not (packed or transposed):
            return None
        blocks = ((name, length),)
    return View(blocks, groups, transposed, shape[0] if packed else 0)


def _blocks(layout: str, length: int, config: Config) -> tuple[tuple[tuple[str, int], ...], int]:
    """Blocks and groups of a fused axis of this length; no blocks if the layout is empty or does not fit."""
    names = tuple(layout.split("|")) if "|" in layout else ()
    if names in (("gate", "up"), ("k", "v")):
        return (tuple((name, length // 2) for name in names), 1) if length % 2 == 0 else ((), 1)
    width = dims(config)
    if width is None:
        return (), 1
    if names == ("q", "k", "v"):
        sizes, groups = _qkv(width, 1, width.heads, width.kv_heads), 1
    elif layout == "heads(q k v)":
        # the head width follows from the tensor: this family has neither head_dim nor key/value heads of its own
        sizes, groups = _qkv(Dims(width.hidden, 1, 1, length // (3 * width.heads)), 1, 1, 1), width.heads
    elif layout == "falcon":
        sizes, groups = _falcon(width, config)
    else:
        return (), 1
    fits = groups * sum(size for _, size in sizes) == length and all(size > 0 for _, size in sizes)
    return (sizes, groups) if fits else ((), 1)


def _falcon(width: Dims, config: Config) -> tuple[tuple[tuple[str, int], ...], int]:
    """40B: per key/value head its query heads, k, v; 7B: all query heads, one k, one v; RW-1B: q, k, v per head."""
    head = Dims(width.hidden, width.heads, width.kv_heads, width.hidden // width.heads)
    if config.get("new_decoder_architecture") is True:
        return _qkv(head, width.kv_heads, width.heads, width.kv_heads), width.kv_heads
    if config.get("multi_query") is not False:
        return _qkv(head, 1, width.heads, 1), 1
    return _qkv(head, width.heads, width.heads, width.heads), width.heads


def _qkv(width: Dims, groups: int, heads: int, kv_heads: int) -> tuple[tuple[str, int], ...]:
    kv = kv_heads // groups * width.head_dim
    return (("q", heads // groups * width.head_dim), ("k", kv), ("v", kv))
