"""The INT4 product on a GPU, as expressions that Inductor makes one kernel of each.

    rows      form                                                       arithmetic
    1         `reduce_vectors`: multiply and sum                         float32
    2..128    `dot_groups`: a tensor-core product of each group          16 bits, summed and scaled in float32
    129..256  `dot_weights`: weights made where they are multiplied      the dtype of x, summed in float32
    more      `eager.expand`, then the library's matmul                  the dtype of x, summed in float32

Neither of the first two rounds a weight; the others round each once. For those two, a nibble that is masked out of its
word, and read as a float, is a code times a power of two. Nearly all are subnormal numbers, with a zero exponent. The
activation that a code meets was multiplied by another power of two before, so that the product is a normal number, and
one power of two at the end gives code * x. A device that flushes subnormals to zero gets these forms wrong, and
`proof.py` leaves them out there.

A form is a pure function of tensors that lie as `prepacked.py` says, to be called inside a larger compiled function.
"""

from functools import reduce
from math import gcd
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from miniawq.compiled.launch import WORDS_OF_A_STEP, WORDS_OF_A_SUM, columns_for, splits_for
from miniawq.compiled.operations import (
    PAIR_PLACES,
    PARTS_OF_A_SUM,
    SUBNORMAL_PLACES,
    SUMMED_AT_ONCE,
    round_numbers,
    sum_in_loop,
    sum_of_groups,
    sum_of_weights,
    sums_of_codes,
)
from miniawq.compiled.prepacked import bits_of_zeros, out_of_blocks, side_by_side, unpack_grid
from miniawq.packing import CODES_PER_WORD

PRESCALE = 80  # the exponent of 2 that activations are multiplied by, less the nibble's place
WORDS_OF_A_LOAD = 4

# For `dot_groups`: the exponents of 2 of a code as the smallest numbers of 16 bits, and of the activations it meets.
OF_CODES = {torch.float16: -24, torch.bfloat16: -133}
OF_ACTIVATIONS = {torch.float16: 0, torch.bfloat16: PRESCALE}


def vector_words(words_of_a_group: int) -> int:
    """How many neighbouring words of one group a thread of `reduce_vectors` loads at once."""
    return gcd(words_of_a_group, WORDS_OF_A_LOAD)


def prescale(x_TI: Tensor, powers_I: Tensor, words_of_a_group: int) -> tuple[Tensor, Tensor]:
    """Activations as `reduce_vectors` wants them: x_TNJ float32, each times its nibble's power of two; sums_TG.

    Powers of two are exact as long as |x| < 2^48. Products with |x| < 2^-57 lose up to 2^-81 of a scale each. The sums
    are in units of 2^(149 - PRESCALE). The powers are a tensor (`powers_of_places`) as long as a row: Inductor goes
    through the inputs in the order of most of what it reads, and then it writes and sums them by one kernel.
    """
    x_TNJ = (x_TI.float() * powers_I).unflatten(1, (-1, CODES_PER_WORD)).transpose(1, 2)
    sums_TG = x_TI.float().unflatten(1, (-1, words_of_a_group * CODES_PER_WORD)).sum(2)
    return x_TNJ, sums_TG * 2.0 ** (PRESCALE - 149)


def powers_of_places(inputs: int, device: torch.device) -> Tensor:
    """The power of two that each activation is multiplied by, for the nibble it meets."""
    powers_N = torch.tensor([2.0 ** (PRESCALE - place) for _, place in SUBNORMAL_PLACES], device=device)
    return powers_N.repeat(inputs // CODES_PER_WORD)


def shared_out(x_TG: Tensor, vectors: int) -> Tensor:
    """Exact shares of its group's number for the vectors of a group, [T, V]: equal ones, or 0 for some vectors."""
    of_a_group = vectors // x_TG.shape[1]
    shares = of_a_group & -of_a_group
    share_TG1 = (x_TG / shares).unsqueeze(2)
    if shares < of_a_group:
        takes_one = torch.arange(of_a_group, device=x_TG.device) % (of_a_group // shares) == 0
        share_TG1 = torch.where(takes_one, share_TG1, 0.0)
    return share_TG1.expand(-1, -1, of_a_group).flatten(1)


def reduce_vectors(
    words_KWGP: Tensor, grid_KGW: Tensor, scale_dtype: torch.dtype, x_TNJ: Tensor, sums_TG: Tensor, parts: int = 1
) -> list[Tensor]:
    """y_O of each of a few rows in float32.

    That is the sum of scale * (sum of code * x - zero * sum of x) over vectors of words, in equal parts of a row:

        (word & (15 << b)) as float * (x * 2^(80 - b)) = code * x * 2^-69

    A fused multiply-add takes subnormal inputs at full speed and rounds its result, which is a normal number, once. So
    a weight costs two instructions, an AND and a multiply-add. The words of a vector lie together, so one load brings
    them (`sources.with_wide_loads`). More parts mean more loads on their way at the same time.
    """
    words_OJ, vector = words_KWGP.flatten(2).flatten(0, 1), vector_words(words_KWGP.shape[3])
    vectors_of_a_group = words_KWGP.shape[3] // vector
    grid_OV = out_of_blocks(grid_KGW).unsqueeze(2).expand(-1, -1, vectors_of_a_group).flatten(1)
    sums_TV = shared_out(sums_TG, grid_OV.shape[1])
    in_parts = (
        words_OJ.unflatten(1, (parts, -1, vector)).unbind(1),
        x_TNJ.unflatten(2, (parts, -1, vector)).unbind(2),
        grid_OV.unflatten(1, (parts, -1)).unbind(1),
        sums_TV.unflatten(1, (parts, -1)).unbind(1),
    )
    rows: list[Any] = [0.0] * len(x_TNJ)
    for words_OUC, x_TNUC, grid_OU, sums_TU in zip(*in_parts, strict=True):
        scales_OU, zeros_OU = unpack_grid(grid_OU, scale_dtype)
        products = sums_of_codes(words_OUC, x_TNUC)
        rows = [
            row + scales_OU * (product_OU - zeros_OU * sums_U)
            for row, product_OU, sums_U in zip(rows, products, sums_TU.unbind(), strict=True)
        ]
    return [sum_in_loop(row_OU) * 2.0 ** (149 - PRESCALE) for row_OU in rows]


def whole_rows(rows: int) -> int:
    """The rows that `dot_groups` or `dot_weights` computes of so many: whole tiles."""
    return rows + -rows % columns_for(rows)


def in_whole_tiles(x_TI: Tensor) -> Tensor:
    """With rows of zeros, as many as `whole_rows` says."""
    return with_rows(x_TI, whole_rows(len(x_TI)))


def with_rows(x_TI: Tensor, rows: int) -> Tensor:
    """x with so many rows; those it does not have are zeros."""
    return x_TI if len(x_TI) == rows else pad(x_TI, (0, 0, 0, rows - len(x_TI)))


def steps_fit(words_KWGP: Tensor) -> bool:
    """Whether tensor cores can go through a row of words in steps of whole groups, as many words as a power of two."""
    *_, groups, words = words_KWGP.shape
    return words & (words - 1) == 0 and groups * words % WORDS_OF_A_SUM == 0


def spread(x_TI: Tensor, words_of_a_group: int) -> tuple[Tensor, Tensor]:
    """Activations as `dot_groups` wants them: x_CTQNH of whole tiles, and minus the sums of groups, sums_TG4.

    The sum goes in Q steps of one group, or of a few small ones. The inputs of a step lie in the order in which
    `sum_of_groups` takes codes out of words, each times the power of two that makes up for its code's place. Each of C
    small groups in a step has a copy, with zeros for the inputs of the others. What is summed is what is multiplied,
    rounded, and the sums are `in_parts`. A bfloat16 has to be below 2^48.
    """
    dtype, pairs, words_of_a_step = x_TI.dtype, CODES_PER_WORD // 2, max(words_of_a_group, WORDS_OF_A_STEP)
    x_TI = in_whole_tiles(round_numbers(x_TI.float(), dtype))
    x_TQP2N = x_TI.unflatten(1, (-1, words_of_a_step, 2, pairs))
    group_of_P = torch.arange(words_of_a_step, device=x_TI.device) // words_of_a_group
    copies = words_of_a_step // words_of_a_group
    of_copies = [
        x_TQP2N if copies == 1 else torch.where((group_of_P == copy).unsqueeze(1).unsqueeze(1), x_TQP2N, 0.0)
        for copy in range(copies)
    ]
    x_CTQNH = torch.stack(of_copies).permute(0, 1, 2, 5, 3, 4).flatten(4)
    sums_TG = x_CTQNH.sum((3, 4)).permute(1, 2, 0).flatten(1) * -(2.0 ** (OF_CODES[dtype] + OF_ACTIVATIONS[dtype]))
    # The places of pairs alternate.
    of_even, of_odd = (x_CTQNH * 2.0 ** (OF_ACTIVATIONS[dtype] - place) for _, place in PAIR_PLACES[dtype][:2])
    is_even_N1 = (torch.arange(pairs, device=x_TI.device) % 2 == 0).unsqueeze(1)
    return torch.where(is_even_N1, of_even, of_odd).to(dtype), in_parts(sums_TG)


def in_parts(x: Tensor) -> Tensor:
    """Float32 numbers as sixteen bfloat16s each, whose sum they are, four in each int64 [.., 4].

    Of a quarter of the number the first 8 of 24 bits, the next 8, and twice half of the last; and these four times, so
    that a load brings 16 bytes and the tensor cores have what they sum at once.
    """

    def first_bits(x: Tensor) -> Tensor:
        return x.view(torch.int32) & -(1 << 16)

    quarter = x * 0.25
    first = first_bits(quarter)
    second = first_bits(rest := quarter - first.view(torch.float32))
    half = first_bits((rest - second.view(torch.float32)) * 0.5)
    low, high = ((left >> 16) & 0xFFFF | right for left, right in ((first, second), (half, half)))
    return torch.stack([side_by_side(low, high)] * (SUMMED_AT_ONCE // PARTS_OF_A_SUM), -1)


def dot_groups(
    words_KWGP: Tensor,
    grid_KGW: Tensor,
    scale_dtype: torch.dtype,
    x_CTQNH: Tensor,
    sums_TG4: Tensor,
    bias_O: Tensor | None = None,
    factors_T1: Tensor | None = None,
    splits: int | None = None,
) -> Tensor:
    """y [T, O] for a few to 128 rows: tensor cores multiply a group's codes by activations, then it is scaled.

    The codes of a word are floats of 16 bits after two masks and a shift, and zeros are bfloat16 already, so the tensor
    cores also take the zero's share away. A scale follows once for each group, output and row. `splits` cuts the groups
    into parts summed by different programs, for matrices with few outputs (`splits_for`). The sums of a row are
    multiplied by its factor, and the bias is added, before they are rounded to the dtype of x.
    """
    splits = splits or splits_for(words_KWGP.shape, x_CTQNH.shape[1])
    words_VOJ, scales_VOU, zeros_VOU = in_splits(words_KWGP, grid_KGW, scale_dtype, splits)
    x_CVTYS = x_CTQNH.unflatten(2, (splits, -1)).transpose(1, 2).flatten(4)
    sums_VUTF = sums_TG4.view(torch.bfloat16).transpose(0, 1).unflatten(0, (splits, -1))
    y_VOT = sum_of_groups(words_VOJ, x_CVTYS.unbind(), scales_VOU, zeros_VOU, sums_VUTF)
    dtype = x_CTQNH.dtype
    y_VTO = y_VOT.transpose(1, 2) * 2.0 ** -(OF_CODES[dtype] + OF_ACTIVATIONS[dtype])
    return splits_added(y_VTO if factors_T1 is None else y_VTO * factors_T1, bias_O, dtype)


def by_nibbles(x_TI: Tensor, words_of_a_group: int) -> Tensor:
    """Activations as `dot_weights` wants them, x_TQH of whole tiles: of each group those of nibbles 0 and 4 of all its
    words, then of 1 and 5, and so on.
    """
    x_TI = in_whole_tiles(x_TI)
    x_TQP2N = x_TI.unflatten(1, (-1, words_of_a_group, 2, CODES_PER_WORD // 2))
    return x_TQP2N.permute(0, 1, 4, 2, 3).flatten(2)


def dot_weights(
    words_KWGP: Tensor,
    grid_KGW: Tensor,
    scale_dtype: torch.dtype,
    x_TQH: Tensor,
    bias_O: Tensor | None = None,
    splits: int | None = None,
) -> Tensor:
    """y [T, O] for 129 to 256 rows: weights are rounded to the dtype of x, and meet all rows of a tile.

    A scale costs an instruction for each weight here, and one for each row and output of a group in `dot_groups`. The
    tensor cores never wait for one, as they go on adding to the same sums while the next weights are made.
    """
    splits = splits or splits_for(words_KWGP.shape, len(x_TQH))
    x_VTUH = x_TQH.unflatten(1, (splits, -1)).transpose(0, 1)
    words_VOJ, scales_VOU, zeros_VOU = in_splits(words_KWGP, grid_KGW, scale_dtype, splits)
    y_VOT = sum_of_weights(words_VOJ, x_VTUH, scales_VOU, zeros_VOU)
    return splits_added(y_VOT.transpose(1, 2), bias_O, x_TQH.dtype)


def in_splits(
    words_KWGP: Tensor, grid_KGW: Tensor, scale_dtype: torch.dtype, splits: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Words [V, O, J], scales in float32 and the bits of zeros [V, O, U] of each of V parts of the groups."""
    words_VOJ = words_KWGP.flatten(0, 1).unflatten(1, (splits, -1)).flatten(2).transpose(0, 1)
    grid_VOU = out_of_blocks(grid_KGW).unflatten(1, (splits, -1)).transpose(0, 1)
    scales_VOU, _ = unpack_grid(grid_VOU, scale_dtype)
    return words_VOJ, scales_VOU, bits_of_zeros(grid_VOU)


def splits_added(y_VTO: Tensor, bias_O: Tensor | None, dtype: torch.dtype) -> Tensor:
    """y_TO of its parts. The kernel that reads partial sums adds them."""
    if len(y_VTO) == 1:
        return written(with_bias(y_VTO.squeeze(0), bias_O, dtype))
    return with_bias(reduce(torch.add, written(y_VTO).unbind()), bias_O, dtype)


def with_bias(y: Tensor, bias_O: Tensor | None, dtype: torch.dtype) -> Tensor:
    """y [..., O] with the bias, if there is one, added before the one rounding to `dtype`."""
    return (y if bias_O is None else y + bias_O).to(dtype)


def written(x: Tensor) -> Tensor:
    """x, written to memory by one kernel, rows first; otherwise Inductor would compute it again in each reader."""
    x = x.flatten().unflatten(0, x.shape)
    return x.as_strided(x.shape, x.stride())
