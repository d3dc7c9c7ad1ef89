"""Operations that torch does not have, and that `inductor.py` lowers."""

from collections.abc import Sequence

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


SUM_OF_PRODUCTS = torch.ops.miniawq.sum_of_products.default
