"""The INT4 number: golden words, round trips, and the half-scale bound on every kind of group."""

import math

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from miniawq.errors import InvalidInput
from miniawq.packing import (
    AWQ_ORDER,
    SEQUENTIAL,
    Quantized,
    asymmetric_grid,
    dequantize,
    pack,
    quantize,
    round_up,
    unpack,
)
from miniawq.quantize.grids import autoawq_grid, symmetric_grid

HALF_DTYPES = (torch.float16, torch.bfloat16)
INT32 = st.integers(-(2**31), 2**31 - 1)

# Kinds of groups: name -> (shape) -> weights. Each is a way in which a real or hostile weight differs from Gaussian.
KINDS = {
    "normal": lambda shape: torch.randn(shape),
    "heavy-tailed": lambda shape: torch.randn(shape) / torch.rand(shape).clamp(min=1e-3),
    "positive": lambda shape: 1 + torch.rand(shape) * 0.1,
    "negative": lambda shape: -5 - torch.rand(shape),
    "constant": lambda shape: torch.full(shape, 0.5),
    "negative constant": lambda shape: torch.full(shape, -0.3),
    "zero": lambda shape: torch.zeros(shape),
    "tiny": lambda shape: torch.randn(shape) * 1e-7,
    "subnormal": lambda shape: torch.randn(shape) * 1e-40,
    "huge": lambda shape: torch.randn(shape).clamp(-1.2, 1.2) * 5e4,
    "one outlier": lambda shape: torch.randn(shape) * 1e-3 + (torch.arange(shape[-1]) == 3) * 100.0,
    "tie-rich": lambda shape: torch.randint(-15, 16, shape) / 2.0,
    "two values": lambda shape: torch.randint(0, 2, shape) * 15.0 - 7.5,
}


@pytest.mark.parametrize(
    ("codes", "word"),
    [
        ([0, 1, 2, 3, 4, 5, 6, 7], 0x75316420),
        ([1, 2, 3, 4, 5, 6, 7, 8], 0x86427531),
        ([15, 14, 13, 12, 11, 10, 9, 8], 0x8ACE9BDF),
    ],
)
def test_golden_awq_words(codes, word):
    assert pack(torch.tensor([codes])).item() & 0xFFFFFFFF == word


def test_golden_sequential_word():
    assert pack(torch.arange(8)[None], SEQUENTIAL).item() == 0x76543210


@pytest.mark.parametrize("order", [AWQ_ORDER, SEQUENTIAL])
@pytest.mark.parametrize("code", range(16))
@pytest.mark.parametrize("column", range(8))
def test_each_code_in_each_column_lands_in_its_own_nibble(order, code, column):
    codes = torch.zeros(1, 8, dtype=torch.uint8)
    codes[0, column] = code
    assert pack(codes, order).item() & 0xFFFFFFFF == code << 4 * order.index(column)


@pytest.mark.parametrize("order", [AWQ_ORDER, SEQUENTIAL])
@given(codes=st.lists(st.integers(0, 15), min_size=16, max_size=16))
def test_unpack_inverts_pack(order, codes):
    codes_RC = torch.tensor(codes, dtype=torch.uint8).view(2, 8)
    assert torch.equal(unpack(pack(codes_RC, order), order), codes_RC)


@pytest.mark.parametrize("order", [AWQ_ORDER, SEQUENTIAL])
@given(words=st.lists(INT32, min_size=1, max_size=6))
def test_pack_inverts_unpack_on_every_bit_pattern(order, words):
    words_RW = torch.tensor([words], dtype=torch.int32)
    assert torch.equal(pack(unpack(words_RW, order), order), words_RW)


def test_pack_takes_any_strides_and_leading_dimensions():
    codes = torch.randint(0, 16, (3, 16, 4), dtype=torch.uint8)
    strided = codes.transpose(1, 2)
    words = pack(strided)
    assert words.is_contiguous()
    assert torch.equal(words, pack(strided.contiguous()))
    assert torch.equal(unpack(words), strided)


@pytest.mark.parametrize(
    "codes",
    [torch.full((1, 8), 16), torch.full((1, 8), -1), torch.zeros(1, 12, dtype=torch.uint8), torch.full((1, 8), 1.5)],
)
def test_pack_refuses_what_would_not_come_back(codes):
    with pytest.raises(InvalidInput):
        pack(codes)


def worst_error_in_scales(weight_OI: torch.Tensor, quantized: Quantized) -> float:
    """max |w - w'| / scale, exactly: every number here is a float64 without rounding but the last quotient."""
    error_OI = (weight_OI.double() - dequantize(quantized, torch.float64)).abs()
    return (
        (error_OI.unflatten(1, (quantized.scales_OG.shape[1], -1)) / quantized.scales_OG.double()[..., None])
        .max()
        .item()
    )


@pytest.mark.parametrize("scale_dtype", HALF_DTYPES)
@pytest.mark.parametrize("grid", [asymmetric_grid, symmetric_grid])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_no_weight_is_off_by_more_than_half_a_scale(kind, grid, scale_dtype, dtype, device):
    for group_size in (8, 32, -1):
        weight_OI = KINDS[kind]((24, 64)).to(device, dtype)
        quantized = quantize(weight_OI, group_size, grid, scale_dtype)
        assert quantized.codes_OI.max() <= 15
        assert quantized.zeros_OG.max() <= 15
        assert (quantized.scales_OG > 0).all()
        assert worst_error_in_scales(weight_OI, quantized) <= 0.5 * (1 + 1e-12)


@given(
    values=st.lists(st.floats(-1e5, 1e5, width=32), min_size=8, max_size=8),
    grid=st.sampled_from([asymmetric_grid, symmetric_grid]),
    scale_dtype=st.sampled_from(HALF_DTYPES),
)
def test_the_bound_holds_on_any_finite_group(values, grid, scale_dtype):
    weight_OI = torch.tensor([values])
    quantized = quantize(weight_OI, 8, grid, scale_dtype)
    assert worst_error_in_scales(weight_OI, quantized) <= 0.5 * (1 + 1e-12)


@given(values=st.lists(st.floats(-100, 100, width=16), min_size=8, max_size=8))
def test_quantizing_again_a_group_that_reaches_both_ends_changes_nothing(values):
    once = quantize(torch.tensor([values]), 8)
    assume(once.codes_OI.min() == 0 and once.codes_OI.max() == 15)
    twice = quantize(dequantize(once, torch.float32), 8)
    assert all(torch.equal(a, b) for a, b in zip(once, twice, strict=True))


def test_the_scale_is_the_smallest_that_covers_the_range():
    weight_OI = torch.randn(200, 32)
    scales_OG, _ = asymmetric_grid(weight_OI.unflatten(1, (-1, 32)), torch.float16)
    needed_OG = (weight_OI.amax(1, True).double() - weight_OI.amin(1, True).double()) / 15
    assert (scales_OG.double() >= needed_OG).all()
    assert ((scales_OG.view(torch.int16) - 1).view(torch.float16).double() < needed_OG).all()


def test_zero_is_represented_exactly():
    for grid in (asymmetric_grid, symmetric_grid):
        for kind in KINDS.values():
            weight_OI = kind((4, 32))
            weight_OI[:, 5] = 0
            assert (dequantize(quantize(weight_OI, 32, grid, torch.bfloat16))[:, 5] == 0).all()


def test_every_code_is_used_by_an_even_ramp():
    quantized = quantize(torch.arange(16.0)[None] - 4, 16)
    assert quantized.codes_OI.tolist() == [list(range(16))]
    assert quantized.zeros_OG.item() == 4


def test_groups_and_rows_are_independent():
    weight_OI = torch.randn(6, 64)
    whole = quantize(weight_OI, 32)
    for row in range(6):
        for group in range(2):
            alone = quantize(weight_OI[row : row + 1, 32 * group : 32 * (group + 1)], 32)
            assert torch.equal(whole.codes_OI[row, 32 * group : 32 * (group + 1)], alone.codes_OI[0])
            assert whole.scales_OG[row, group] == alone.scales_OG[0, 0]
            assert whole.zeros_OG[row, group] == alone.zeros_OG[0, 0]


def test_large_weights_are_rounded_in_slices_like_small_ones(monkeypatch):
    weight_OI = torch.randn(10, 64)
    whole = quantize(weight_OI, 32)
    monkeypatch.setattr("miniawq.packing.WEIGHTS_AT_ONCE", 3 * 64)
    sliced = quantize(weight_OI, 32)
    assert all(torch.equal(a, b) for a, b in zip(whole, sliced, strict=True))
    assert torch.equal(dequantize(whole), dequantize(sliced))


def test_autoawq_breaks_the_bound_on_one_signed_groups_and_ours_does_not():
    weight_OI = 1 + torch.rand(4, 32) * 0.1
    assert worst_error_in_scales(weight_OI, quantize(weight_OI, 32, autoawq_grid)) > 100
    assert worst_error_in_scales(weight_OI, quantize(weight_OI, 32, asymmetric_grid)) <= 0.5


def test_autoawq_grid_is_its_formula_in_half():
    weight_OI = torch.randn(8, 64).half()
    low, high = weight_OI.unflatten(1, (2, 32)).aminmax(dim=2)
    scales = (high - low).clamp(min=1e-5) / 15
    got_scales, got_zeros = autoawq_grid(weight_OI.float().unflatten(1, (2, 32)), torch.float16)
    assert torch.equal(got_scales, scales)
    assert torch.equal(got_zeros, (-torch.round(low / scales)).clamp(0, 15).to(torch.uint8))


@given(value=st.floats(0, 60000), dtype=st.sampled_from(HALF_DTYPES))
def test_round_up_is_the_next_number_that_is_not_below(value, dtype):
    rounded = round_up(torch.tensor([value], dtype=torch.float64), dtype)
    assert rounded.double().item() >= value
    below = (rounded.view(torch.int16) - 1).view(dtype).double().item()
    assert below < value or (value == 0 and below == 0)


def test_a_scale_beyond_float16_is_refused_and_fits_bfloat16():
    weight_OI = torch.linspace(-1e6, 1e6, 32)[None]
    with pytest.raises(InvalidInput, match="store the scales in bfloat16"):
        quantize(weight_OI, 32)
    assert worst_error_in_scales(weight_OI, quantize(weight_OI, 32, scale_dtype=torch.bfloat16)) <= 0.5


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_is_refused_by_name(bad):
    weight_OI = torch.randn(4, 32)
    weight_OI[2, 7] = bad
    with pytest.raises(InvalidInput) as caught:
        quantize(weight_OI, 32, name="model.layers.3.mlp.up_proj.weight")
    assert "model.layers.3.mlp.up_proj.weight holds NaN or infinity" in str(caught.value)
    assert "1 of 128 values" in str(caught.value)


@pytest.mark.parametrize("group_size", [0, 48, -2])
def test_inputs_that_do_not_divide_into_groups_are_refused(group_size):
    with pytest.raises(InvalidInput, match="64 input features are not a multiple"):
        quantize(torch.randn(4, 64), group_size)
