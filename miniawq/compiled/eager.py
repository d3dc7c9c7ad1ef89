"""The product of prepacked words by plain calls of torch: for any number of rows, on any device, without a compiler.

It multiplies prompts, and single tokens wherever nothing is compiled. On a GPU a prompt's weight is expanded, a slice
at a time, and multiplied by the library; there alone a compiled kernel helps, if there is one (`expansion`).
"""

from collections.abc import Callable, Sequence
from functools import lru_cache, partial

import torch
from torch import Tensor

from miniawq.compiled.compiler import inductor
from miniawq.compiled.launch import block_sizes
from miniawq.compiled.prepacked import (
    Prepacked,
    in_blocks,
    joined,
    out_of_blocks,
    pack_grid,
    prepack,
    prepack_awq,
    prepacked_bytes,
    scales_and_zeros,
    side_by_side,
    slices,
    unpack_grid,
    unprepack,
    words_in_rows,
)
from miniawq.compiled.tables import (
    Table,
    quantized_of,
    reads_tables,
    table_bytes,
    table_of,
    table_of_awq,
    table_product,
)
from miniawq.compiled.workshop import WORKSHOP
from miniawq.packing import Quantized

CODES_PER_SLICE = 1 << 20  # temporaries of a slice are float32: 4 MiB each
CODES_PER_EXPANDED_SLICE = 1 << 27  # 256 MiB of 16-bit weights; uncompiled, `expand` has ten temporaries

Arranged = Prepacked | Table
Together = Arranged | list[Table]


def together(parts: Sequence[Arranged]) -> Together | None:
    """Weights that read the same input as one: those that `join` laid so, or tables; None if they are neither."""
    tables = [part for part in parts if isinstance(part, Table)]
    if len(tables) == len(parts) and len({table.rows_of_group for table in tables}) == 1:
        return tables
    return None if tables else joined(parts)


def multiply_prepacked(x_TI: Tensor, prepacked: Together, bias_O: Tensor | None = None) -> Tensor:
    """y_TO in the dtype of x; the bias is added before the sums are rounded."""
    if isinstance(prepacked, (Table, list)):
        y_TO = table_product(x_TI, [prepacked] if isinstance(prepacked, Table) else prepacked)
    elif x_TI.is_cuda and x_TI.dtype.itemsize == 2 and prepacked.in_rows:
        return expanded_product(x_TI, prepacked, bias_O)
    else:
        y_TO = sliced_product(x_TI, prepacked)
    return (y_TO if bias_O is None else y_TO + bias_O).to(x_TI.dtype)


def arrange(quantized: Quantized) -> Arranged:
    """A weight as `multiply_prepacked` reads it fastest on its device."""
    return table_of(quantized) if reads_tables(quantized.codes_OI.device) else prepack(quantized)


def arrange_awq(qweight_IW: Tensor, qzeros_GW: Tensor, scales_GO: Tensor) -> Arranged:
    """The same from AutoAWQ words."""
    return (table_of_awq if reads_tables(qweight_IW.device) else prepack_awq)(qweight_IW, qzeros_GW, scales_GO)


def for_forms(arranged: Arranged) -> Prepacked:
    """A weight as the compiled forms read it."""
    return prepack(quantized_of(arranged)) if isinstance(arranged, Table) else arranged


def unarrange(arranged: Arranged) -> Quantized:
    """The inverse of `arrange`."""
    return quantized_of(arranged) if isinstance(arranged, Table) else unprepack(arranged)


def arranged_bytes(outputs: int, inputs: int, group_size: int, device: str) -> int:
    """Memory of what `arrange` makes on a "cuda" or "cpu" device."""
    count = table_bytes if device == "cpu" and reads_tables(device) else partial(prepacked_bytes, device=device)
    return count(outputs, inputs, group_size)


def sliced_product(x_TI: Tensor, prepacked: Prepacked) -> Tensor:
    """y_TO in float32, a slice of the outputs at a time.

    An output has B bytes. A byte holds the codes of two neighbouring inputs. Codes times scales are exact in
    float32. The zeros are taken away at the end, times the sum of each group's activations.
    """
    groups = prepacked.grid.shape[1]
    sums_GT = x_TI.float().unflatten(-1, (groups, -1)).sum(-1).t()
    # A row's activations lie together: with rows side by side the library is six times slower at 2 to 8 of them.
    even_BT, odd_BT = x_TI.float().unflatten(-1, (-1, 2)).permute(2, 0, 1).contiguous().mT
    y_OT = sums_GT.new_empty(prepacked.outputs, len(x_TI))
    for some_O, part in slices(prepacked, CODES_PER_SLICE):
        scales_OG, zeros_OG = scales_and_zeros(part)
        byte_scales = scales_OG.unsqueeze(2).unsqueeze(-1)
        bytes_ = words_in_rows(part).contiguous().unsqueeze(-1).view(torch.uint8)
        torch.mm((bytes_ & 15).float().mul_(byte_scales).flatten(1), even_BT, out=y_OT[some_O])
        y_OT[some_O].addmm_((bytes_ >> 4).float().mul_(byte_scales).flatten(1), odd_BT)
        y_OT[some_O].addmm_(scales_OG * zeros_OG, sums_GT, alpha=-1)
    return y_OT.t()


def expanded_product(x_TI: Tensor, prepacked: Prepacked, bias_O: Tensor | None) -> Tensor:
    """y_TO on a GPU, from weights in rows: a slice is rounded to the dtype of x and multiplied by the library.

    The memory of a slice is free again before the next slice is written, and serves it too.
    """
    y_TO = x_TI.new_empty(len(x_TI), prepacked.outputs)
    expanded, codes = expansion(prepacked, x_TI.dtype)
    for some_O, part in slices(prepacked, codes):
        weight_IO = expanded(part.words, part.grid).view(x_TI.dtype).t()
        if bias_O is None:
            torch.mm(x_TI, weight_IO, out=y_TO[:, some_O])
        else:
            torch.addmm(bias_O[some_O].to(x_TI.dtype), x_TI, weight_IO, out=y_TO[:, some_O])
        del weight_IO
    return y_TO


def expansion(prepacked: Prepacked, dtype: torch.dtype) -> tuple[Callable[[Tensor, Tensor], Tensor], int]:
    """`expand` for these weights, compiled if this thread may and the result is proven; and the codes for one call."""
    scale_dtype, device = prepacked.scale_dtype, prepacked.words.device
    if WORKSHOP.may_compile and WORKSHOP.accepts(("expand", device, scale_dtype, dtype), prove_expand):

        def compiled(words_KWGP: Tensor, grid_KGW: Tensor) -> Tensor:
            return compiled_expand(words_KWGP.shape, scale_dtype, dtype, device)(words_KWGP, grid_KGW)

        return compiled, CODES_PER_EXPANDED_SLICE

    def plain(words_KWGP: Tensor, grid_KGW: Tensor) -> Tensor:
        return expand(words_KWGP, grid_KGW, scale_dtype, dtype)

    return plain, CODES_PER_EXPANDED_SLICE // 8


def expand(words_KWGP: Tensor, grid_KGW: Tensor, scale_dtype: torch.dtype, dtype: torch.dtype) -> Tensor:
    """The weight [O, I], each (code - zero) * scale rounded once to `dtype`, of 16 bits: as int64, four weights each.

    A thread takes half a word and writes four neighbouring weights. A nibble n under the exponent of 2^7 is the float
    2^7 + n; (2^7 + zero) * scale has 19 bits, so nothing is rounded before the last step.
    """
    scales_OG, zeros_OG = unpack_grid(out_of_blocks(grid_KGW), scale_dtype)
    scales_OG11 = scales_OG.unsqueeze(-1).unsqueeze(-1)
    offsets_OG11 = (-(2.0**7) - zeros_OG).unsqueeze(-1).unsqueeze(-1) * scales_OG11
    halves = torch.arange(0, 32, 16, device=words_KWGP.device, dtype=torch.int32)
    half_OGP2 = words_KWGP.flatten(0, 1).unsqueeze(-1) >> halves
    bits: list[Tensor] = []
    for shift in (16, 12, 8, 4):
        magic_OGP2 = (half_OGP2 << shift) & (15 << 16) | (127 + 7) << 23
        weight_OGP2 = magic_OGP2.view(torch.float32) * scales_OG11 + offsets_OG11
        bits.append(weight_OGP2.to(dtype).view(torch.int16).to(torch.int32))
    low, high = ((second << 16) | (first & 0xFFFF) for first, second in (bits[:2], bits[2:]))
    return side_by_side(low, high).flatten(1)


# Below this threshold Inductor would cut `expand` in two, and by the order of most of what is read it would go through
# one group of all outputs after the other, and write 256 bytes here and there.
EXPAND_IN_ONE = {"realize_opcount_threshold": 1000, "pick_loop_orders": False}


@lru_cache(maxsize=64)
def compiled_expand(
    shape_KWGP: torch.Size, scale_dtype: torch.dtype, dtype: torch.dtype, device: torch.device
) -> Callable[[Tensor, Tensor], Tensor]:
    """`expand` of words of one shape as one kernel, called without Dynamo, whose guards would take as long as it."""
    blocks, lanes, groups, _ = shape_KWGP
    return inductor().lowered(
        lambda words_KWGP, grid_KGW: expand(words_KWGP, grid_KGW, scale_dtype, dtype),
        [(tuple(shape_KWGP), torch.int32), ((blocks, groups, lanes), torch.int32)],
        device,
        EXPAND_IN_ONE,
        block_sizes,
    )


def prove_expand(name: str, device: torch.device, scale_dtype: torch.dtype, dtype: torch.dtype) -> str:
    """Why compiled `expand` is not to be used: not all bits are those of the uncompiled one. Empty if they are."""
    generator = torch.Generator(device).manual_seed(0)
    words_KWGP = torch.randint(-(2**31), 2**31, (4, 8, 8, 16), device=device, generator=generator, dtype=torch.int32)
    scales_OG = torch.rand(32, 8, device=device, generator=generator).to(scale_dtype)
    grid_KGW = in_blocks(pack_grid(scales_OG, torch.arange(8, device=device).expand(32, 8)), 8).contiguous()
    found = compiled_expand(words_KWGP.shape, scale_dtype, dtype, device)(words_KWGP, grid_KGW)
    return "" if torch.equal(found, expand(words_KWGP, grid_KGW, scale_dtype, dtype)) else "its numbers are wrong"
