"""Operations that torch does not have, and that `inductor.py` lowers."""

from collections.abc import Sequence
from functools import reduce
from typing import Any

import torch
from torch import Tensor


@torch.library.custom_op("miniawq::product_unrounded", mutates_args=())
def product_unrounded(left: Tensor, right: Tensor) -> Tensor:
    """The product of [M, K] and [K, N], of 16 bits, as it is summed: float32 [M, N].

    An operation of its own, because torch's rounds it to 16 bits, and would sum float32 numbers without tensor cores.
    """
    return left.float() @ right.float()


@product_unrounded.register_fake
def _(left: Tensor, right: Tensor) -> Tensor:
    return left.new_empty(len(left), right.shape[1], dtype=torch.float32)


@torch.library.custom_op("miniawq::round_numbers", mutates_args=())
def round_numbers(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Float32 numbers rounded to those of 16 bits.

    An operation of its own, because Inductor rounds only what it writes.
    """
    return x.to(dtype).float()


@round_numbers.register_fake
def _(x: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.empty_like(x)


# Where `sum_of_groups` finds nibbles i and i + 4 of a word: shift it right by the first number of pair i, then they
# begin at the second, and 16 bits above it. Up to the lowest bit of the exponent, which a bfloat16 reaches at place 4,
# the bits of a float are a multiple of the smallest one. A float16 stays at place 0, because its activations have no
# exponents to spare.
PAIR_PLACES = {
    torch.bfloat16: ((0, 0), (0, 4), (8, 0), (8, 4)),
    torch.float16: ((0, 0), (4, 0), (8, 0), (12, 0)),
}
SHIFTS = (0, 4, 8, 12)  # to the same pairs for `sum_of_weights`
SUMMED_AT_ONCE = 16  # the fewest numbers that tensor cores sum
PARTS_OF_A_SUM = 4  # in which a float32 is written as bfloat16s; three have its 24 bits


@torch.library.custom_op("miniawq::sum_of_groups", mutates_args=())
def sum_of_groups(words: Tensor, rights: Sequence[Tensor], scales: Tensor, zeros: Tensor, sums: Tensor) -> Tensor:
    """y_KOT float32: scale * (sum of code * x + zero * sum) of each group of a row, summed.

    words int32 [K, O, J]; rights of 16 bits [K, T, Q, H], the H inputs that the words of each of Q steps meet: first
    those of all words' nibbles 0 and 4, then of 1 and 5, and so on. scales float32 and zeros, the bits of bfloat16s,
    int16 [K, O, G]; sums bfloat16 [K, G, T, 16], whose sixteen parts add up to each sum. If there are C rights, a
    step has C groups, each with a right of its own, in which the inputs of the others are zeros.

    An operation of its own, because torch has no product whose sum is scaled every few summands.
    """
    dtype, copies = rights[0].dtype, len(rights)
    zeros_KOG = zeros.contiguous().view(torch.bfloat16).double()
    sums_KGT = sums.double().sum(3)
    y_KOT = torch.einsum("kog,kgt->kot", scales.double() * zeros_KOG, sums_KGT)
    words_KOQP = words.unflatten(2, (rights[0].shape[2], -1))
    pairs = [words_KOQP >> shift & (0x000F000F << place) for shift, place in PAIR_PLACES[dtype]]
    left_KOQH = torch.stack(pairs, 3).view(dtype).flatten(3).double()
    for copy, right_KTQH in enumerate(rights):
        scales_KOQ = scales[:, :, copy::copies].double()
        y_KOT += torch.einsum("koq,koqh,ktqh->kot", scales_KOQ, left_KOQH, right_KTQH.double())
    return y_KOT.float()


@sum_of_groups.register_fake
def _(words: Tensor, rights: Sequence[Tensor], scales: Tensor, zeros: Tensor, sums: Tensor) -> Tensor:
    return scales.new_empty(*words.shape[:-1], rights[0].shape[1])


@torch.library.custom_op("miniawq::sum_of_weights", mutates_args=())
def sum_of_weights(words: Tensor, right: Tensor, scales: Tensor, zeros: Tensor) -> Tensor:
    """y_KOT float32: the sum of weight * x, where a weight is (code - zero) * scale, rounded to the 16 bits of x.

    words int32 [K, O, J]; right [K, T, Q, H], the H inputs that the words of each of Q groups meet, in the order of
    `sum_of_groups`. scales float32 and zeros, the bits of bfloat16s, int16 [K, O, Q].

    An operation of its own, because Inductor would load a word again for each of its codes.
    """
    words_KOQP = words.unflatten(2, (right.shape[2], -1))
    pairs = [words_KOQP >> shift & 0x000F000F for shift in SHIFTS]
    codes_KOQH = torch.stack(pairs, 3).view(torch.int16).flatten(3).float()
    zeros_KOQ = zeros.contiguous().view(torch.bfloat16).float()
    weights_KOQH = (codes_KOQH - zeros_KOQ.unsqueeze(3)) * scales.unsqueeze(3)
    return torch.einsum("koqh,ktqh->kot", weights_KOQH.to(right.dtype).double(), right.double()).float()


@sum_of_weights.register_fake
def _(words: Tensor, right: Tensor, scales: Tensor, zeros: Tensor) -> Tensor:
    return scales.new_empty(*words.shape[:-1], right.shape[1])


# Where `sums_of_codes` finds nibble i: shift the word right by the first number, then it begins at the second. Bit 16
# is the last possible place, because bit 23 of a float begins its exponent.
SUBNORMAL_PLACES = ((0, 0), (0, 4), (0, 8), (0, 12), (0, 16), (12, 8), (12, 12), (12, 16))


@torch.library.custom_op("miniawq::sums_of_codes", mutates_args=())
def sums_of_codes(words: Tensor, x: Tensor) -> list[Tensor]:
    """The sum of code * x of each vector of words, float32 [O, U] for each of T rows.

    words int32 [O, U, C]; x float32 [T, N, U, C]. A code is a float whose bits are those of its nibble, where
    SUBNORMAL_PLACES has it.

    An operation of its own, because Dynamo and Inductor take a minute for as many operations as there are nibbles.
    """
    rows: list[Any] = [0.0] * len(x)
    for words_OU, x_TNU in zip(words.unbind(2), x.unbind(3), strict=True):
        for (shift, place), x_TU in zip(SUBNORMAL_PLACES, x_TNU.unbind(1), strict=True):
            codes_OU = (words_OU >> shift & (15 << place)).view(torch.float32)
            rows = [sum_OU + codes_OU * x_U for sum_OU, x_U in zip(rows, x_TU.unbind(), strict=True)]
    return rows


@sums_of_codes.register_fake
def _(words: Tensor, x: Tensor) -> list[Tensor]:
    return [x.new_empty(words.shape[:2]) for _ in x]


@torch.library.custom_op("miniawq::sums_in_step", mutates_args=())
def sums_in_step(terms: Sequence[Tensor], sums: int) -> list[Tensor]:
    """As many sums as asked for, of terms of one shape: the first of each sum, then the second of each, and so on.

    An operation of its own, because Inductor computes one sum after the other. Here they grow together: an addition
    does not wait for the one before it, and what the terms of a step have in common stays in a register.
    """
    return [reduce(torch.add, terms[first::sums]) for first in range(sums)]


@sums_in_step.register_fake
def _(terms: Sequence[Tensor], sums: int) -> list[Tensor]:
    return [torch.empty_like(term) for term in terms[:sums]]


@torch.library.custom_op("miniawq::sum_in_loop", mutates_args=())
def sum_in_loop(x: Tensor) -> Tensor:
    """The sum of the last dimension.

    An operation of its own, because Inductor writes out short sums, and cuts long ones into two kernels.
    """
    return x.sum(-1)


@sum_in_loop.register_fake
def _(x: Tensor) -> Tensor:
    return x.new_empty(x.shape[:-1])


ROUND_NUMBERS = torch.ops.miniawq.round_numbers.default
SUM_IN_LOOP = torch.ops.miniawq.sum_in_loop.default
SUMS_OF_CODES = torch.ops.miniawq.sums_of_codes.default
SUM_OF_GROUPS = torch.ops.miniawq.sum_of_groups.default
SUM_OF_WEIGHTS = torch.ops.miniawq.sum_of_weights.default
PRODUCT_UNROUNDED = torch.ops.miniawq.product_unrounded.default
SUMS_IN_STEP = torch.ops.miniawq.sums_in_step.default
