"""Products and multiples of blocks of four elements, sixteen blocks at a time in vector registers, for `yeam.geometry.kernels`.

A loop over blocks leaves the compiler with every fourth element of a row, which it gathers with four times the shuffles. Here four
vectors of sixteen elements are multiplied and added up pairwise, as they lie, until one vector holds the sums of sixteen blocks: in the
order 0, 4, 8, 12, 1, 5, ..., as pairs are added inside the 128 bits that every processor shuffles cheaply. `add_multiples` undoes it.
Written for LLVM's vectors, which it cuts into the registers that the processor has.

Legend: T elements of a row, B = T/4 blocks.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import types
from numba.extending import intrinsic

BLOCKS = 16  # of a group
GROUP = 4 * BLOCKS  # elements
_VECTOR = ir.VectorType(ir.FloatType(), BLOCKS)
_LANES = range(0, BLOCKS, 4)


def _mask(picked: list[int]) -> ir.Constant:
    return ir.Constant(ir.VectorType(ir.IntType(32), BLOCKS), picked)


# of two vectors, in every 128 bits: the even elements of the first, then those of the second; and the odd ones
_EVEN = _mask([lane + i for lane in _LANES for i in (0, 2, BLOCKS, BLOCKS + 2)])
_ODD = _mask([lane + i for lane in _LANES for i in (1, 3, BLOCKS + 1, BLOCKS + 3)])
_REPEATED = [_mask([lane + i for lane in _LANES for _ in range(4)]) for i in range(4)]


def _place(context: Any, builder: Any, array_type: Any, array: Any, index: Any) -> Any:
    data = context.make_array(array_type)(context, builder, array).data
    return builder.bitcast(builder.gep(data, [index]), _VECTOR.as_pointer())


def _group(context: Any, builder: Any, array_type: Any, array: Any, index: Any) -> list[Any]:
    """The places of the four vectors of a group of blocks."""
    starts = [builder.add(builder.mul(index, index.type(GROUP)), index.type(BLOCKS * i)) for i in range(4)]
    return [_place(context, builder, array_type, array, start) for start in starts]


def _load(builder: Any, place: Any) -> Any:
    return builder.load(place, align=4)


def _pairs(builder: Any, x: Any, y: Any) -> Any:
    return builder.fadd(builder.shuffle_vector(x, y, _EVEN), builder.shuffle_vector(x, y, _ODD))


def _block_products(context: Any, x_T: Any, y_T: Any, group: Any, out_B: Any) -> Any:
    def code(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        x, y, index, out = values
        ones = _group(context, builder, signature.args[0], x, index)
        others = _group(context, builder, signature.args[1], y, index)
        parts = [builder.fmul(_load(builder, a), _load(builder, b)) for a, b in zip(ones, others)]
        halves = _pairs(builder, parts[0], parts[1]), _pairs(builder, parts[2], parts[3])
        start = builder.mul(index, index.type(BLOCKS))
        place = _place(context, builder, signature.args[3], out, start)
        builder.store(_pairs(builder, *halves), place, align=4)
        return context.get_dummy_value()

    return types.none(x_T, y_T, types.intp, out_B), code


def _multiples(added: bool) -> Any:
    def typed(context: Any, share_B: Any, x_T: Any, group: Any, out_T: Any) -> Any:
        def code(context: Any, builder: Any, signature: Any, values: Any) -> Any:
            share, x, index, out = values
            start = builder.mul(index, index.type(BLOCKS))
            factor = _load(builder, _place(context, builder, signature.args[0], share, start))
            xs = _group(context, builder, signature.args[1], x, index)
            outs = _group(context, builder, signature.args[3], out, index)
            for i, (x_place, out_place) in enumerate(zip(xs, outs)):
                repeated = builder.shuffle_vector(factor, factor, _REPEATED[i])
                product = builder.fmul(repeated, _load(builder, x_place))
                if added:
                    product = builder.fadd(_load(builder, out_place), product)
                builder.store(product, out_place, align=4)
            return context.get_dummy_value()

        return types.none(share_B, x_T, types.intp, out_T), code

    return typed


block_products: Any = intrinsic(_block_products)
"""block_products(x_T, y_T, group, out_B): the products x·y of the blocks of a group into its part of out_B (float32, whole groups)."""

multiples: Any = intrinsic(_multiples(added=False))
"""multiples(share_B, x_T, group, out_T): share · x of the blocks of a group into its part of out_T."""

add_multiples: Any = intrinsic(_multiples(added=True))
"""As `multiples`, added to what out_T holds."""
