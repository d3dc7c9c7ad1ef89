"""Where private torch is touched: Inductor's block sizes, lowerings and kernels.

Importing this file imports Inductor, which takes seconds, so it is imported when something is compiled.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial, reduce
from typing import Any

import torch
import torch._inductor
from torch._inductor import config
from torch._inductor.choices import InductorChoices
from torch._inductor.codegen.triton import FixedTritonConfig, TritonKernel, TritonKernelOverrides, TritonScheduling
from torch._inductor.ir import Pointwise
from torch._inductor.lowering import make_reduction, register_lowering
from torch._inductor.virtualized import V, ops
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._sympy.functions import FloorDiv, ModularIndexing

from miniawq.compiled.operations import (
    PAIR_PLACES,
    PARTS_OF_A_SUM,
    PRODUCT_UNROUNDED,
    ROUND_NUMBERS,
    SHIFTS,
    SUBNORMAL_PLACES,
    SUM_IN_LOOP,
    SUM_OF_GROUPS,
    SUM_OF_WEIGHTS,
    SUMMED_AT_ONCE,
    SUMS_IN_STEP,
    SUMS_OF_CODES,
)
from miniawq.compiled.sources import with_matrices, with_wide_loads
from miniawq.compiled.workshop import WORKSHOP
from miniawq.packing import CODES_PER_WORD


class BlockSizes(InductorChoices):
    """Inductor's choices, except that `choose` knows the block sizes of all kernels of known sizes: no search.

    They are not part of the key under which Inductor keeps what it compiled, so `artifacts.identity` names them.
    """

    def __init__(self, choose: Callable[..., dict[str, int]]) -> None:
        self.choose = choose

    def triton_kernel_kwargs(self, kernel_cls: Any, features: Any, groups: Any, kernel_kwargs: Any) -> dict[str, Any]:
        """The hook that Inductor offers for fixed configurations."""
        sums = features.reduction_nodes()
        sizes = {name: size for name, size in groups[0].items() if sums or not name.startswith("r")}
        if not all(getattr(size, "is_number", True) for size in sizes.values()):
            return kernel_kwargs
        words = {name for name in features.buf_accesses() if V.graph.get_dtype(name) == torch.int32}
        if "dot" in {node.node.get_reduction_type() for node in sums}:
            kind = "dot" if words else "dense dot"
        elif not sums:
            kind = "pointwise"
        else:
            kind = "vectors" if len(words) >= 2 else "sum"
        # A norm's sum of squares, in the same kernel, reads no words.
        of_words = [node for node in sums if words & {read.name for read in node.read_writes.reads}]
        sizes_of_words = [V.graph.get_buffer(name).get_size() for name in words]
        words_of_a_group = max((int(size[-1]) for size in sizes_of_words if len(size) == len("KWGP")), default=0)
        numbers = {name: int(size) for name, size in sizes.items()}
        blocks = self.choose(kind, sizes=numbers, sums=len(of_words), words=words_of_a_group)
        return kernel_kwargs | {"fixed_config": FixedTritonConfig(blocks), "override_persistent_reduction": False}


class Products(TritonKernelOverrides):
    """Inductor's operations, whose `dot` also takes codes, zeros and weights, and tells what a step has of a group.

    A left operand int32 has words of codes, one int16 the bits of zeros, one for each row, and one float32 weights. The
    other operand of an integer 1 is a number of a group: one for each row, because a step is not longer than a group;
    that of words may be zeros, to be taken away from their codes.
    """

    @staticmethod
    def dot(a: Any, b: Any) -> Any:
        """The text of one product."""
        if b.dtype == torch.int32:
            return f"{a}"
        if b.dtype == torch.int16:
            # 128 more than a code or a zero is a bfloat16 whose last bits are those of the number.
            codes = codes_in_order(
                [f"({a} >> {shift} & {0x000F000F} | {0x43004300})" for shift in SHIFTS], torch.bfloat16
            )
            return f"({codes} - ({b}.to(tl.bfloat16, bitcast=True) + 128.0)).to(tl.float32)"
        if a.dtype == torch.int16:
            zeros = f"tl.broadcast_to({a}.to(tl.bfloat16, bitcast=True), [YBLOCK, {SUMMED_AT_ONCE}])"
            return f"tl.dot({zeros}, tl.trans({b}))"
        if a.dtype == torch.int32:
            pairs = [f"({a} >> {shift} & {0x000F000F << place})" for shift, place in PAIR_PLACES[b.dtype]]
            return f"tl.dot({codes_in_order(pairs, b.dtype)}, tl.trans({b}))"
        if a.dtype == torch.float32:
            return f"tl.dot({a}.to({triton_name(b.dtype)}), tl.trans({b}))"
        return TritonKernelOverrides.dot(a, b)


def codes_in_order(pairs: Sequence[str], dtype: torch.dtype) -> str:
    """The text of all codes of words as floats, in the order of `sum_of_groups`; what is repeated is one value."""
    joined = f"tl.join(tl.join({pairs[0]}, {pairs[2]}), tl.join({pairs[1]}, {pairs[3]}))"
    rows = f"tl.reshape(tl.permute({joined}, (0, 2, 3, 1)), [YBLOCK, 4 * R0_BLOCK])"
    halves = f"tl.join({rows}.to(tl.int16), ({rows} >> 16).to(tl.int16))"
    return f"tl.reshape({halves}, [YBLOCK, 8 * R0_BLOCK]).to({triton_name(dtype)}, bitcast=True)"


def triton_name(dtype: torch.dtype) -> str:
    """Of a dtype in a source."""
    return str(dtype).replace("torch", "tl")


class MatrixKernel(TritonKernel):
    """Inductor's kernels. In those that multiply, operands become matrices; in others, neighbouring loads one."""

    overrides = Products

    def codegen_kernel(self, name: str | None = None) -> str:
        """The whole source of a kernel."""
        source = super().codegen_kernel(name)
        if not self.is_native_matmul:
            return with_wide_loads(source)
        matrices = with_matrices(source)
        if matrices == source:
            # As it is, a product of pairs cannot be built, and others are right and slower.
            WORKSHOP.warn_once(
                "Inductor writes products in a way unknown to miniawq, so some are slower (please report)"
            )
        return matrices


@contextmanager
def chosen_by(choose: Callable[..., dict[str, int]]) -> Iterator[None]:
    """Compile with these block sizes and with `MatrixKernel`, here and nowhere else."""
    before = TritonScheduling.kernel_type
    TritonScheduling.kernel_type = MatrixKernel
    try:
        with V.set_choices_handler(BlockSizes(choose)):
            yield
    finally:
        TritonScheduling.kernel_type = before


def lowered(
    function: Callable[..., Any],
    inputs: Sequence[tuple[tuple[int, ...], torch.dtype]],
    device: torch.device,
    options: dict[str, Any],
    choose: Callable[..., dict[str, int]],
) -> Callable[..., Any]:
    """A function of tensors of exactly these shapes and dtypes, compiled without Dynamo."""
    with FakeTensorMode():
        examples: list[Any] = [torch.empty(shape, dtype=dtype, device=device) for shape, dtype in inputs]
        graph = make_fx(function)(*examples)
    with chosen_by(choose):
        return torch._inductor.compile(graph, examples, options)


@register_lowering(ROUND_NUMBERS, type_promotion_kind=None)
def lowered_round_numbers(x: Any, dtype: torch.dtype) -> Any:
    """There and back again."""
    load = x.make_loader()

    def value(index: Sequence[Any]) -> Any:
        return ops.to_dtype(ops.to_dtype(load(index), dtype, use_compute_types=False), torch.float32)

    return Pointwise.create(device=x.get_device(), dtype=torch.float32, inner_fn=value, ranges=list(x.get_size()))


@register_lowering(PRODUCT_UNROUNDED, type_promotion_kind=None)
def lowered_product_unrounded(left: Any, right: Any) -> Any:
    """As Inductor lowers a product, by its operation `dot` and a reduction of those; here without rounding the sums."""
    (rows, summands), columns, dtype = left.get_size(), right.get_size()[-1], left.get_dtype()
    left_at, right_at = left.make_loader(), right.make_loader()

    def value(index: Sequence[Any]) -> Any:
        row, summand, column = index
        # Loading made numbers of 16 bits float32.
        loaded = left_at([row, summand]), right_at([summand, column])
        return ops.dot(*(ops.to_dtype(x, dtype, use_compute_types=False) for x in loaded))

    return summed_products(left, value, [rows, summands, columns])


@register_lowering(SUMS_OF_CODES, type_promotion_kind=None)
def lowered_sums_of_codes(words: Any, x: Any) -> list[Any]:
    """As Inductor lowers the operations that it stands for."""
    outputs, vectors, words_of_a_vector = words.get_size()
    word_at, x_at = words.make_loader(), x.make_loader()

    def products(row: int, index: Sequence[Any]) -> Iterator[Any]:
        output, vector = index
        for place_of_word in range(words_of_a_vector):
            word = word_at([output, vector, place_of_word])
            for nibble, (shift, place) in enumerate(SUBNORMAL_PLACES):
                shifted = ops.bitwise_right_shift(word, ops.constant(shift, torch.int32)) if shift else word
                code = ops.bitwise_and(shifted, ops.constant(15 << place, torch.int32))
                code = ops.to_dtype_bitcast(code, torch.float32, torch.int32)
                yield ops.mul(code, x_at([row, nibble, vector, place_of_word]))

    functions = [lambda index, row=row: reduce(ops.add, products(row, index)) for row in range(x.get_size()[0])]
    return [
        Pointwise.create(device=x.get_device(), dtype=torch.float32, inner_fn=function, ranges=[outputs, vectors])
        for function in functions
    ]


@register_lowering(SUM_OF_GROUPS, type_promotion_kind=None)
def lowered_sum_of_groups(words: Any, rights: Sequence[Any], scales: Any, zeros: Any, sums: Any) -> Any:
    """Also by `dot` and a reduction of those, of words. A step is one group of each of the copies of activations."""
    *sizes, summands = words.get_size()
    word_at, scale_at, zero_at, sum_at = (x.make_loader() for x in (words, scales, zeros, sums))
    dtype, words_of_a_step = rights[0].get_dtype(), rights[0].get_size()[-1] // CODES_PER_WORD

    def value(index: Sequence[Any]) -> Any:
        *batch, row, word, column = index
        one, step = ops.constant(1, torch.int32), FloorDiv(word, words_of_a_step)
        first_code = CODES_PER_WORD * ModularIndexing(word, 1, words_of_a_step)
        part = ModularIndexing(word, 1, PARTS_OF_A_SUM)
        scaled = []
        for copy, right in enumerate(rights):
            group = step * len(rights) + copy
            right_of = right.make_loader()([*batch, column, step, first_code])
            products = ops.dot(word_at([*batch, row, word]), ops.to_dtype(right_of, dtype, use_compute_types=False))
            sum_of = ops.to_dtype(sum_at([*batch, group, column, part]), torch.bfloat16, use_compute_types=False)
            products = ops.add(ops.dot(zero_at([*batch, row, group]), sum_of), products)
            scaled.append(ops.mul(ops.dot(scale_at([*batch, row, group]), one), products))
        return reduce(ops.add, scaled)

    return summed_products(scales, value, [*sizes, summands, rights[0].get_size()[1]])


@register_lowering(SUM_OF_WEIGHTS, type_promotion_kind=None)
def lowered_sum_of_weights(words: Any, right: Any, scales: Any, zeros: Any) -> Any:
    """The same of weights, whose products are summed as they are."""
    *sizes, summands = words.get_size()
    word_at, right_at, scale_at, zero_at = (x.make_loader() for x in (words, right, scales, zeros))
    dtype, words_of_a_group = right.get_dtype(), right.get_size()[-1] // CODES_PER_WORD

    def value(index: Sequence[Any]) -> Any:
        *batch, row, word, column = index
        group = FloorDiv(word, words_of_a_group)
        first_code = CODES_PER_WORD * ModularIndexing(word, 1, words_of_a_group)
        differences = ops.dot(word_at([*batch, row, word]), zero_at([*batch, row, group]))
        scale = ops.dot(scale_at([*batch, row, group]), ops.constant(1, torch.int32))
        right_of = right_at([*batch, column, group, first_code])
        return ops.dot(ops.mul(differences, scale), ops.to_dtype(right_of, dtype, use_compute_types=False))

    return summed_products(scales, value, [*sizes, summands, right.get_size()[1]])


def summed_products(like: Any, value: Callable[..., Any], ranges: Sequence[Any]) -> Any:
    """The reduction of products over the summand, which is the last but one of their ranges."""
    sums = Pointwise.create(device=like.get_device(), dtype=torch.float32, inner_fn=value, ranges=list(ranges))
    return make_reduction("dot")(sums, len(ranges) - 2)


@register_lowering(SUM_IN_LOOP, type_promotion_kind=None)
def lowered_sum_in_loop(x: Any) -> Any:
    """As Inductor lowers a sum."""
    with config.patch(unroll_reductions_threshold=1, split_reductions=False):
        return make_reduction("sum")(x, [len(x.get_size()) - 1])


@register_lowering(SUMS_IN_STEP, type_promotion_kind=None)
def lowered_sums_in_step(terms: Sequence[Any], sums: int) -> list[Any]:
    """The first sum computes the others too, in step. Where these follow in the same loop, all they need is there."""
    loaders = [term.make_loader() for term in terms]

    def one(number: int, index: Sequence[Any]) -> Any:
        return reduce(ops.add, (load(index) for load in loaders[number::sums]))

    def all_in_step(index: Sequence[Any]) -> Any:
        totals = [load(index) for load in loaders[:sums]]
        for step in range(sums, len(loaders), sums):
            totals = [ops.add(total, load(index)) for total, load in zip(totals, loaders[step:], strict=False)]
        return totals[0]

    device, dtype, size = terms[0].get_device(), terms[0].get_dtype(), list(terms[0].get_size())
    functions = [all_in_step, *(partial(one, number) for number in range(1, sums))]
    return [Pointwise.create(device=device, dtype=dtype, inner_fn=function, ranges=size) for function in functions]
