"""Refusals as rules for `Subject.judge`, so that their examples shrink: an example that is made smaller must stay one
that the definition refuses too.
"""

from typing import Any

from torch import Tensor

import miniawq.oracle.truth as truth
from miniawq.oracle.subject import Subject


def expect_refused_codes(target: Subject, codes: Tensor, why: str) -> None:
    """`pack` raises ValueError."""
    expect_no_result(target, "pack", (codes,), why, ValueError)


def expect_refused_weight(target: Subject, weight: Tensor, group_size: int, why: str) -> None:
    """`quantize` raises ValueError."""
    expect_no_result(target, "quantize", (weight, group_size), why, ValueError)


def expect_refused_words(
    target: Subject, qweight: Tensor, qzeros: Tensor, scales: Tensor, group_size: int, why: str
) -> None:
    """`dequantize` raises."""
    expect_no_result(target, "dequantize", (qweight, qzeros, scales, group_size), why, Exception)


def expect_refused_factors(target: Subject, x: Tensor, qweight: Tensor, qzeros: Tensor, scales: Tensor, group_size: int,
                           bias: Tensor | None, why: str) -> None:  # fmt: skip
    """`matmul` raises."""
    words = (x, qweight, qzeros, scales, group_size)
    expect_no_result(target, "matmul", words if bias is None else (*words, bias), why, Exception)


def expect_no_result(
    target: Subject, function: str, arguments: tuple[Any, ...], why: str, error: type[Exception]
) -> None:
    """The target raises `error`, or the definition takes these arguments."""
    try:
        getattr(truth, function)(*arguments)
    except Exception:
        target.refuses(function, arguments, why, error)
