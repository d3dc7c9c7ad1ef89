"""Operations that torch does not have, and that `inductor.py` lowers."""

from collections.abc import Sequence
from functools import reduce

import torch
from torch import Tensor


@torch.library.custom_op("miniawq::sum_of_products", mutates_args=())
def sum_of_products(lefts: Sequence[Tensor], rights: Sequence[Tensor]) -> Tensor:
    """The sum [..., M, N], in float32, of several matrix products of [..., M, K] and [..., K, N].

    An operation of its own, because Inductor gives each product in a sum an accumulator, and eight of many rows do not
    fit a thread's registers. Here they share one.
    """
    first, *others = [left.float() @ right.float() for left, right in zip(lefts, rights, strict=True)]
    return sum(others, first)


@sum_of_products.register_fake
def _(lefts: Sequence[Tensor], rights: Sequence[Tensor]) -> Tensor:
    return lefts[0].new_empty((*lefts[0].shape[:-1], rights[0].shape[-1]), dtype=torch.float32)


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


SUM_OF_PRODUCTS = torch.ops.miniawq.sum_of_products.default
SUMS_IN_STEP = torch.ops.miniawq.sums_in_step.default
