"""State, for all eight functions: a result depends on the arguments alone, and stays what it was.

Each function has a few small problems and a judgement of their results. The problems are asked for again and again, in
another order each time: a result kept from the last call of the same shape, an output buffer that is returned twice, a
weight cached by its address, and an answer that is wrong once in 200 calls all break one of the rules here.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from random import Random
from typing import Any

import torch
from torch import Tensor

import miniawq.oracle.cases as cases
import miniawq.oracle.truth as truth
from miniawq.oracle.cases import smallest
from miniawq.oracle.check import Check, rule
from miniawq.oracle.combinations import exact_activations, expect_decoded, expect_product
from miniawq.oracle.contract import Limits
from miniawq.oracle.multiplication import dtypes_taken
from miniawq.oracle.rounding import expect_bound
from miniawq.oracle.search import Problem, expect_clip_no_worse, expect_no_worse, problem
from miniawq.oracle.storage import expect_packed, expect_unpacked
from miniawq.oracle.subject import Broken, Call, Subject, comparable, twin

CALLS = 420  # of a cheap function: one wrong result in 200 is seen with a chance of 7 in 8, one every 200th surely
FEW_CALLS = 210  # of a search
KEPT = 32  # results of first calls that are looked at again after the last

Arguments = tuple[Any, ...]


@dataclass(frozen=True)
class Small:
    """Problems of one function: two of one shape, a third of another, and how a result is judged."""

    id: str
    function: str
    make: Callable[[Subject, int], Arguments]
    judge: Callable[..., None]
    calls: int = CALLS


def codes_and_words(limits: Limits, seed: int) -> Tensor:
    """Codes; seed 2 has another shape."""
    return cases.codes(Random(seed), 3 + seed // 2, 2 * limits.multiple_of_n)


def words(target: Subject, seed: int) -> tuple[Tensor, Tensor, Tensor, int]:
    """A layer of exact scales; seed 2 has another shape."""
    return cases.random_layer(seed, *smallest(target.limits, 2 + seed // 2, 2), cases.exact_scales).packed


def factors(rows: int) -> Callable[[Subject, int], Arguments]:
    """A function that makes x of so many rows, a layer and a bias."""

    def make(target: Subject, seed: int) -> Arguments:
        layer, dtype = words(target, seed), dtypes_taken(target)[0]
        x = exact_activations(Random(seed), min(rows, target.limits.max_rows), len(layer[0]), layer[3], dtype)
        return (x, *layer, (torch.arange(layer[2].shape[1]) % (5 + seed) / 8).to(dtype))

    return make


def weight(target: Subject, seed: int) -> Arguments:
    """A weight and its group size."""
    k, n, group_size = smallest(target.limits, 1 + seed // 2)
    return cases.random_weight(seed, n, k), group_size


def searched(target: Subject, seed: int) -> Problem:
    """A small search, with loud channels of its own."""
    weight, x, group_size = problem(target.limits, seed + 50, groups=1, outliers=2)
    return weight[: target.limits.multiple_of_n], x[: 8 + seed // 2], group_size


SMALL = [
    Small("L0.pack.state", "pack", lambda t, seed: (codes_and_words(t.limits, seed),), expect_packed),
    Small("L0.unpack.state", "unpack", lambda t, seed: (truth.pack(codes_and_words(t.limits, seed)),), expect_unpacked),
    Small("L1.state", "dequantize", words, expect_decoded),
    Small("L2.state", "quantize", weight, expect_bound),
    Small("L3.state", "matmul", factors(3), expect_product),
    Small("L3.state-of-one-row", "matmul", factors(1), expect_product, FEW_CALLS),
    Small("L3.state-of-more-rows", "matmul", factors(17), expect_product, FEW_CALLS),
    Small("L5.scales.state", "search_scales", searched, expect_no_worse, FEW_CALLS),
    Small("L5.clip.state", "search_clip", searched, expect_clip_no_worse, FEW_CALLS),
]


def result_of(target: Subject, function: str, arguments: Arguments) -> list[Tensor]:
    """The tensors a call gives, copied."""
    return [tensor.clone() for tensor in listed(target.call(function, *arguments))]


def listed(result: Any) -> list[Tensor]:
    """The tensors of a result, however many."""
    if isinstance(result, dict):
        return [result[name] for name in sorted(result)]
    return list(result) if isinstance(result, tuple) else [result]


def expect_same(got: Any, expected: list[Tensor], when: str) -> None:
    """The same tensors, bit for bit."""
    tensors = listed(got)
    same = len(tensors) == len(expected) and all(
        a.dtype == b.dtype and torch.equal(a.nan_to_num(), b.nan_to_num())
        for a, b in zip(tensors, expected, strict=True)
    )
    if not same:
        raise Broken(f"the result of the first call with these arguments {when}", "another result")


def state_of(small: Small) -> Check:
    """The check of one function."""

    def body(target: Subject) -> None:
        problems = [small.make(target, seed) for seed in (0, 1, 2)]
        for arguments in problems:
            target.judge(small.judge, *arguments)
        firsts = [result_of(target, small.function, arguments) for arguments in problems]
        expect_kept(target, small, problems)
        expect_repeated(target, small, problems, firsts)
        expect_fresh(target, small)

    told = f"{small.calls} calls in changing order"
    body.__doc__ = (
        f"Results of {small.function} depend on its arguments alone and stay as they are: {told} give the same."
    )
    return rule(small.id, small.function)(body)


def expect_kept(target: Subject, small: Small, problems: list[Arguments]) -> None:
    """A result is not overwritten by a later call."""
    kept = target.answer(small.function, *problems[0])
    first = target.last
    before = [tensor.clone() for tensor in listed(comparable(kept))]
    for arguments in (problems[1], problems[2], problems[1]):
        target.answer(small.function, *arguments)
        with after(target, first):
            expect_same(comparable(kept), before, "to stay as it was when the function is called again")


def expect_repeated(target: Subject, small: Small, problems: list[Arguments], firsts: list[list[Tensor]]) -> None:
    """Calls in any order give the first results; those of the first calls stay, however many buffers are in turn."""
    random, kept = Random(7), []
    for count in range(small.calls):
        chosen, before = random.randrange(3), target.last
        answer = target.answer(small.function, *problems[chosen])
        kept += [(answer, chosen, target.last)] if count < KEPT else []
        with after(target, before):
            expect_same(comparable(answer), firsts[chosen], f"in call {count + 1} of {small.calls}")
    for answer, chosen, call in kept:
        with after(target, call):
            expect_same(comparable(answer), firsts[chosen], f"to stay as it was through {small.calls} calls")


@contextmanager
def after(target: Subject, before: Call | None) -> Iterator[None]:
    """A failure in here is one of the last call, made after another one."""
    try:
        yield
    except Broken as broken:
        assert target.last is not None
        broken.call = replace(target.last, before=before)
        raise


def expect_fresh(target: Subject, small: Small) -> None:
    """An argument whose content was changed in place gives the result of the new content."""
    for part in range(sum(isinstance(a, Tensor) for a in small.make(target, 0))):
        arguments = tuple(twin(a) if isinstance(a, Tensor) else a for a in small.make(target, 0))
        tensors = [a for a in arguments if isinstance(a, Tensor)]
        target.answer(small.function, *arguments)
        tensors[part].copy_(tensors[part].flip(0))
        target.judge(small.judge, *arguments)
        last_half = tensors[part].view(-1)[tensors[part].numel() // 2 :]
        last_half.copy_(last_half.flip(0))  # the sum, and what a cache might look at first, stay as they were
        target.judge(small.judge, *arguments)


CHECKS = [state_of(small) for small in SMALL]
