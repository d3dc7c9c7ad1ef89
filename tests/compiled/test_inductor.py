"""What Inductor makes of our operations, and the sources that are made into products of matrices or left alone."""

import re
from types import SimpleNamespace
from typing import NamedTuple

import pytest
import torch

from miniawq.compiled.launch import block_sizes
from miniawq.compiled.operations import round_numbers, sum_of_groups, sum_of_weights, sums_in_step
from miniawq.compiled.sources import with_matrices

BATCHED = """\
    yindex = yoffset + tl.arange(0, YBLOCK)[None, :, None, None]
    xindex = xoffset + tl.arange(0, XBLOCK)[None, None, :, None]
    xmask = xindex < xnumel
    r0_base = tl.arange(0, R0_BLOCK)[None, None, None, :]
    x2 = xindex
    _tmp9 = tl.full([YBLOCK, XBLOCK], 0, tl.float32)
    for r0_offset in tl.range(0, r0_numel, R0_BLOCK):
        r0_index = r0_offset + r0_base
        tmp0 = tl.load(in_ptr0 + (r0_index + 512*yindex), None)
        tmp1 = tl.load(in_ptr1 + (r0_index + 512*x2), xmask)
        tmp2 = tl.full([1, 1, 1, 1], 12, tl.int32)
        tmp3 = tl.reshape(tmp0 << tmp2, [YBLOCK, R0_BLOCK])
        tmp4 = tl.trans(tl.reshape(tmp1, [XBLOCK, R0_BLOCK]))
        tmp5 = tl.dot(tmp3, tmp4, input_precision="ieee")
        tmp6 = tl.dot(tmp4, tmp3, input_precision="ieee")
        tmp7 = tmp5 + tmp6
        tmp8 = _tmp9 + tmp7
        _tmp9 = tmp8
    tmp9 = _tmp9[None,:,:,None]
    tl.store(out_ptr0 + (x2 + 16*yindex), tmp9, xmask)
"""
MATRICES = """\
    yindex = yoffset + tl.arange(0, YBLOCK)[:, None]
    xindex = xoffset + tl.arange(0, XBLOCK)[None, :]
    xmask = xindex < xnumel
    r0_base = tl.arange(0, R0_BLOCK)[None, :]
    x2 = xindex
    _tmp9 = tl.full([YBLOCK, XBLOCK], 0, tl.float32)
    xindex_R = xoffset + tl.arange(0, XBLOCK)[:, None]
    xmask_R = xindex_R < xnumel
    x2_R = xindex_R
    for r0_offset in tl.range(0, r0_numel, R0_BLOCK):
        r0_index = r0_offset + r0_base
        tmp0 = tl.load(in_ptr0 + (r0_index + 512*yindex), None)
        tmp1 = tl.load(in_ptr1 + (r0_index + 512*x2_R), xmask_R)
        tmp2 = tl.full([1, 1], 12, tl.int32)
        tmp3 = tl.reshape(tmp0 << tmp2, [YBLOCK, R0_BLOCK])
        tmp4 = tl.trans(tl.reshape(tmp1, [XBLOCK, R0_BLOCK]))
        tmp5 = tl.dot(tmp3, tmp4, _tmp9, input_precision="ieee")
        tmp6 = tl.dot(tmp4, tmp3, input_precision="ieee")
        tmp7 = tmp5 + tmp6
        tmp8 = tmp7
        _tmp9 = tmp8
    tmp9 = _tmp9
    tl.store(out_ptr0 + (x2 + 16*yindex), tmp9, xmask)
"""


def test_operands_become_matrices_and_sums_begin_with_what_is_summed():
    assert with_matrices(BATCHED) == MATRICES


def test_three_dimensions_as_well_as_four():
    three = BATCHED.replace("[None, ", "[").replace("[1, 1, 1, 1]", "[1, 1, 1]").replace("[None,:,:", "[:,:")
    assert "[:, None, None]" in three
    assert with_matrices(three) == MATRICES


class Tile(NamedTuple):
    """A tensor, with what Triton calls its operations."""

    values: torch.Tensor

    def to(self, dtype, bitcast=False):
        return Tile(self.values.contiguous().view(dtype) if bitcast else self.values.to(dtype))

    __rshift__ = lambda self, other: Tile(self.values >> values_of(other))  # noqa: E731
    __and__ = lambda self, other: Tile(self.values & values_of(other))  # noqa: E731
    __or__ = lambda self, other: Tile(self.values | values_of(other))  # noqa: E731
    __add__ = lambda self, other: Tile(self.values + values_of(other))  # noqa: E731
    __sub__ = lambda self, other: Tile(self.values - values_of(other))  # noqa: E731


def values_of(other):
    return other.values if isinstance(other, Tile) else other


TRITON = SimpleNamespace(
    int16=torch.int16, bfloat16=torch.bfloat16, float16=torch.float16, float32=torch.float32,
    join=lambda a, b: Tile(torch.stack([a.values, b.values], -1)),
    permute=lambda a, places: Tile(a.values.permute(places)),
    reshape=lambda a, sizes: Tile(a.values.reshape(sizes)),
    trans=lambda a: Tile(a.values.t()),
    dot=lambda a, b: Tile(a.values.double() @ b.values.double()),
)  # fmt: skip


class Operand(NamedTuple):
    """A name in a source."""

    name: str
    dtype: torch.dtype

    def __str__(self):
        return self.name


def computed_by_text(left, right):
    """What the text of `Products.dot` computes, of tensors."""
    from miniawq.compiled.inductor import Products

    text = Products.dot(Operand("left", left.dtype), Operand("right", right.dtype))
    names = {"tl": TRITON, "left": Tile(left), "right": Tile(right), "YBLOCK": 4, "R0_BLOCK": 16}
    return eval(text, names).values


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_the_texts_of_products_are_what_the_operations_compute(dtype):
    words_OJ = torch.randint(-(2**31), 2**31, (4, 16), dtype=torch.int32)
    x_TH, scales_O1 = torch.randint(-3, 4, (5, 128)).to(dtype), torch.rand(4, 1)
    zeros_O1 = torch.tensor([[0.0], [1.0], [9.0], [15.0]]).bfloat16().view(torch.int16)
    right_KTQH, no_sums = x_TH[None, :, None], torch.zeros(1, 1, 5, 16, dtype=torch.bfloat16)
    expected_KOT = sum_of_groups(words_OJ[None], [right_KTQH], torch.ones(1, 4, 1), zeros_O1[None], no_sums)
    assert torch.equal(computed_by_text(words_OJ, x_TH).float(), expected_KOT[0])
    weights_OH = computed_by_text(words_OJ, zeros_O1) * scales_O1
    expected_KOT = sum_of_weights(words_OJ[None], right_KTQH, scales_O1[None], zeros_O1[None])
    assert torch.equal(computed_by_text(weights_OH, x_TH).float(), expected_KOT[0])


@pytest.mark.parametrize(("old", "new"), [
    ("    _tmp9 = tl", "    _tmp3 = tl.full([YBLOCK, XBLOCK], 0, tl.float32)\n    _tmp9 = tl"),
    ("    _tmp9 = tl", "    _tmp3 = tl.full([YBLOCK, XBLOCK, R0_BLOCK], 0, tl.float32)\n    _tmp9 = tl"),
    ("    x2 = xindex\n", "    x2 = xindex\n    tmp7 = tl.load(in_ptr2 + (x2), None)\n"),
    ("_tmp9 + tmp7", "tmp7 * tmp7"),
    ("tl.dot(", "tl.sum("),
    ("    tl.store", "    for r0_offset in tl.range(0, r0_numel, R0_BLOCK):\n        pass\n    tl.store"),
], ids=["two sums", "another sum", "columns loaded before", "not a sum", "no product", "two loops"])  # fmt: skip
def test_what_looks_different_stays_as_it_is(old, new):
    assert old in BATCHED
    source = BATCHED.replace(old, new)
    assert with_matrices(source) == source


@pytest.mark.thorough
def test_sums_grow_in_step_in_one_loop():
    """Which is what makes them an operation: written as sums they are computed one after the other."""
    # Imported here, because it takes seconds. The first one lowers our operations.
    from torch._inductor.utils import run_and_get_cpp_code

    import miniawq.compiled.inductor  # noqa: F401

    def function(x):
        return [total.exp2() for total in sums_in_step([x.exp(), x.sin(), x.cos(), x.tan(), x.erf(), x.sqrt()], 2)]

    x = torch.rand(64, generator=torch.Generator().manual_seed(0))
    results, source = run_and_get_cpp_code(torch.compile(function, dynamic=False, options={"fx_graph_cache": False}), x)
    loop, *others = re.findall(r"for\(int64_t .*?\.store\(out_ptr\d+ .*?\n {8}\}", source, re.DOTALL)
    assert not others
    assert re.findall(r"\.(exp|sin|cos|tan|erf|sqrt|exp2)\(\)", loop) == [
        "exp", "sin", "cos", "tan", "erf", "sqrt", "exp2", "exp2"
    ]  # fmt: skip
    torch.testing.assert_close(results, [(x.exp() + x.cos() + x.erf()).exp2(), (x.sin() + x.tan() + x.sqrt()).exp2()])


@pytest.mark.thorough
def test_numbers_are_rounded_in_the_middle_of_a_kernel():
    """Inductor itself leaves such a rounding out."""
    import miniawq.compiled.inductor  # noqa: F401

    def error(x):
        return round_numbers(x, torch.bfloat16) - x

    def left_out(x):
        return x.to(torch.bfloat16).float() - x

    x = torch.rand(64, generator=torch.Generator().manual_seed(0))
    assert error(x).count_nonzero() > 32
    assert torch.equal(torch.compile(error, options={"fx_graph_cache": False})(x), error(x))
    assert torch.compile(left_out, options={"fx_graph_cache": False})(x).count_nonzero() == 0


@pytest.mark.thorough
def test_kernels_are_ours_only_where_they_are_asked_for():
    from torch._inductor.codegen.triton import TritonKernel, TritonScheduling

    from miniawq.compiled.inductor import MatrixKernel, chosen_by

    with chosen_by(block_sizes):
        assert TritonScheduling.kernel_type is MatrixKernel
    assert TritonScheduling.kernel_type is TritonKernel
