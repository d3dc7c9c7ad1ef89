"""Where private torch is touched: Inductor's block sizes, lowerings and sources of kernels.

Importing this file imports Inductor, which takes seconds, so it is imported when something is compiled.
"""

import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial, reduce
from typing import Any

import torch
import torch._inductor
from torch._inductor.choices import InductorChoices
from torch._inductor.codegen.triton import FixedTritonConfig, TritonKernel, TritonScheduling
from torch._inductor.ir import Pointwise
from torch._inductor.lowering import make_reduction, register_lowering
from torch._inductor.virtualized import V, ops
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

from miniawq.compiled.operations import SUM_OF_PRODUCTS, SUMS_IN_STEP
from miniawq.compiled.workshop import WORKSHOP


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
            kind = "planes" if len(words) >= 2 else "sum"
        # A norm's sum of squares, in the same kernel, reads no words.
        of_words = [node for node in sums if words & {read.name for read in node.read_writes.reads}]
        blocks = self.choose(kind, sizes={name: int(size) for name, size in sizes.items()}, sums=len(of_words))
        return kernel_kwargs | {"fixed_config": FixedTritonConfig(blocks), "override_persistent_reduction": False}


class MatrixKernel(TritonKernel):
    """Inductor's kernels; in those that multiply, operands become matrices (`with_matrices`)."""

    def codegen_kernel(self, name: str | None = None) -> str:
        """The whole source of a kernel."""
        source = super().codegen_kernel(name)
        if not self.is_native_matmul:
            return source
        matrices = with_matrices(source)
        if matrices == source:
            WORKSHOP.warn_once(
                "Inductor writes products in a way unknown to miniawq: right, and slower (please report)"
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


# Inductor's dimensions, counted from the last: sums, columns, rows.
INTO_TWO_DIMENSIONS = (
    (re.compile(r"\[(?:None, )*:, None, None\]"), "[:, None]"),
    (re.compile(r"\[(?:None, )+:, None\]|\[(?:None, )+:\]"), "[None, :]"),
    (re.compile(r"\[1(?:, 1)+\]"), "[1, 1]"),
    (re.compile(r"\[(?:None,)?:,:,None\]"), ""),
)
ACCUMULATOR = re.compile(r"(_tmp\d+) = tl\.full\((\[.*?\])")
COLUMNS = re.compile(r"\bx(?:index|mask|\d+)\b")
LOOP = re.compile(r"    for r0_offset in .*\n(?:        .*\n|\n)+")


def with_matrices(source: str) -> str:
    """The source of a kernel of products, with operands that are matrices, and sums that stay in the accumulator.

    Inductor loads operands with a dimension for each of the result's, [Y, 1, R] and [1, X, R], and reshapes them before
    the product. Then Triton does not know how the tensor cores read a tile, and lays it into shared memory row by row:
    eight rows of 32 words begin in the same bank. It also adds the products of a step to the accumulator afterwards,
    where they might have begun with it. A source that looks different stays as it is, which is right and slower.
    """
    flat = source
    for pattern, replacement in INTO_TWO_DIMENSIONS:
        flat = pattern.sub(replacement, flat)
    loops = list(LOOP.finditer(flat))
    if len(loops) != 1:
        return source
    head, loop, tail = flat[: loops[0].start()], loops[0][0], flat[loops[0].end() :]
    columns = [line for line in head.splitlines(keepends=True) if COLUMNS.search(line)]
    accumulators = ACCUMULATOR.findall(head)
    if len(accumulators) != 1 or not all(COLUMNS.match(line.strip()) for line in columns):
        return source
    ((accumulator, shape),) = accumulators
    loop, begun = re.subn(r"(tl\.dot\(tmp\d+, tmp\d+)", rf"\1, {accumulator}", loop, count=1)
    loop, kept = re.subn(rf"= {accumulator} \+ (tmp\d+)", r"= \1", loop)
    if shape != "[YBLOCK, XBLOCK]" or begun != 1 or kept != 1:
        return source
    # The right operand's tile has the columns as its rows.
    renamed = (COLUMNS.sub(r"\g<0>_R", line.replace("[None, :]", "[:, None]")) for line in columns)
    return "".join([head, *renamed, COLUMNS.sub(r"\g<0>_R", loop), tail])


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


@register_lowering(SUM_OF_PRODUCTS, type_promotion_kind=None)
def lowered_sum_of_products(lefts: Sequence[Any], rights: Sequence[Any]) -> Any:
    """As Inductor lowers one product, by its operation `dot` and a reduction of those; here of the sum of several."""
    (*sizes, summands), dtype = lefts[0].get_size(), lefts[0].get_dtype()
    loaders = [(left.make_loader(), right.make_loader()) for left, right in zip(lefts, rights, strict=True)]

    def value(index: Sequence[Any]) -> Any:
        *batch, row, summand, column = index
        # All are ready before the first product: with each right after its own operands kernels took up to 3 % longer.
        # Loading made numbers of 16 bits float32.
        loaded = [(left([*batch, row, summand]), right([*batch, summand, column])) for left, right in loaders]
        rounded = [[ops.to_dtype(x, dtype, use_compute_types=False) for x in operands] for operands in loaded]
        return reduce(ops.add, (ops.dot(*operands) for operands in rounded))

    sums = Pointwise.create(
        device=lefts[0].get_device(),
        dtype=torch.float32,
        inner_fn=value,
        ranges=[*sizes, summands, rights[0].get_size()[-1]],
    )
    return make_reduction("dot")(sums, len(sizes))


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
