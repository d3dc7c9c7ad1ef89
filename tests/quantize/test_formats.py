"""The formats of others: what other implementations make of a weight, and the formulas written out."""

import pytest
import torch
from safetensors.torch import load_file

from miniawq.errors import InvalidInput
from miniawq.packing import asymmetric_grid, quantize
from miniawq.quantize import formats
from miniawq.quantize.formats import FORMATS, as_e2m1, as_e4m3, gptq_rounding, rtn
from tests.helpers import GOLDEN

BITS = {
    "bf16": 16,
    "int8": 8 + 32 / 512,
    "fp8": 8 + 32 / 512,
    "nf4": 4 + 32 / 64,
    "nvfp4": 4 + 8 / 16 + 32 / 1024,
    "mxfp4": 4 + 8 / 32,
    "q4_0": 4 + 16 / 32,
    "q4_k": 4 + (8 * 12 + 32) / 256,
}


@pytest.mark.parametrize("name", FORMATS)
def test_the_numbers_are_those_of_another_implementation(name):
    """`scripts/peers/formats.py --golden` wrote them: gguf, ggml, compressed-tensors, torchao, bitsandbytes."""
    golden = load_file(GOLDEN / "formats.safetensors")
    found, bits = FORMATS[name].approximate(golden["weight"])
    assert torch.equal(found, golden[name])
    assert bits == BITS[name] * found.numel()


@pytest.mark.parametrize("name", FORMATS)
def test_a_weight_of_zeros_stays_one(name):
    assert not FORMATS[name].approximate(torch.zeros(3, 512)).weight_OI.any()


@pytest.mark.parametrize("name", [name for name, one in FORMATS.items() if one.block > 1])
def test_inputs_that_do_not_divide_are_refused(name):
    with pytest.raises(InvalidInput, match="cannot be cut into groups"):
        FORMATS[name].approximate(torch.zeros(3, FORMATS[name].block * 3 // 2))


def test_fours_are_rounded_to_the_nearest_and_to_even_in_a_tie():
    """All midpoints, and every multiple of a 64th."""
    levels = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])
    values = torch.arange(0, 8, 1 / 64)
    distance = (values[:, None] - levels).abs()
    nearest = distance.amin(-1)
    found = as_e2m1(values)
    assert torch.equal((found - values).abs(), nearest)
    ties = (distance == nearest[:, None]).sum(-1) == 2
    even = {0.25: 0.0, 0.75: 1.0, 1.25: 1.0, 1.75: 2.0, 2.5: 2.0, 3.5: 4.0, 5.0: 4.0}
    assert dict(zip(values[ties].tolist(), found[ties].tolist(), strict=True)) == even
    assert torch.equal(as_e2m1(-values), -found)


def test_eights_do_not_overflow():
    assert as_e4m3(torch.tensor([1e9, -1e9, 448.0, 465.0])).tolist() == [448, -448, 448, 448]


def by_least_squares(weight_OI, moments_II, group_size, order_I):
    """GPTQ by its definition: after each input all later ones move to where they lose least, solved anew."""
    damped_II = moments_II.double()
    damped_II = (damped_II + torch.eye(len(damped_II)) * formats.DAMPING * damped_II.diagonal().mean())[order_I][
        :, order_I
    ]
    weight_OI = weight_OI.double()[:, order_I]
    wanted_OI = weight_OI.clone()
    for first in range(len(order_I)):
        if first % group_size == 0:
            group_OS = weight_OI[:, first : first + group_size].float()
            scales_O, zeros_O = (part[:, 0].double() for part in asymmetric_grid(group_OS[:, None], torch.float16))
        codes_O = ((weight_OI[:, first] / scales_O).round() + zeros_O).clamp(0, 15)
        weight_OI[:, first] = (codes_O - zeros_O) * scales_O
        done, rest = slice(0, first + 1), slice(first + 1, None)
        error_OI = weight_OI[:, done] - wanted_OI[:, done]
        moved = torch.linalg.solve(damped_II[rest, rest], damped_II[rest, done] @ error_OI.t())
        weight_OI[:, rest] = wanted_OI[:, rest] - moved.t()
    return weight_OI[:, order_I.argsort()]


@pytest.mark.parametrize("act_order", [False, True])
@pytest.mark.parametrize("group_size", [8, 24])
def test_gptq_leaves_each_rest_at_its_least_squares(act_order, group_size):
    generator = torch.Generator().manual_seed(4)
    weight_OI = torch.randn(6, 24, generator=generator)
    x_TI = torch.randn(50, 24, generator=generator).cumsum(1)[:, torch.randperm(24, generator=generator)]
    moments_II = x_TI.t() @ x_TI / len(x_TI)
    order_I = moments_II.diagonal().argsort(descending=True) if act_order else torch.arange(24)
    found, bits = gptq_rounding(weight_OI, moments_II, group_size, act_order)
    torch.testing.assert_close(found.double(), by_least_squares(weight_OI, moments_II, group_size, order_I))
    assert bits == 4 * 144 + 20 * 6 * (24 // group_size) + (32 * 24 if act_order else 0)
    assert torch.equal(
        gptq_rounding(weight_OI, moments_II, -1, act_order).weight_OI,
        gptq_rounding(weight_OI, moments_II, 24, act_order).weight_OI,
    )


def test_gptq_without_correlations_is_plain_rounding():
    weight_OI = torch.randn(8, 64, generator=torch.Generator().manual_seed(5))
    for act_order in (False, True):
        found = gptq_rounding(weight_OI, torch.eye(64), 16, act_order).weight_OI
        torch.testing.assert_close(found, rtn(weight_OI, 16).weight_OI)


def test_gptq_does_not_change_what_it_is_given():
    weight_OI, moments_II = torch.randn(8, 64), torch.eye(64)
    gptq_rounding(weight_OI, moments_II, 16)
    assert torch.equal(moments_II, torch.eye(64))


def test_bits_of_plain_rounding_are_those_of_the_file():
    weight_OI = torch.randn(16, 128)
    quantized = quantize(weight_OI, 32)
    held = 4 * quantized.codes_OI.numel() + 16 * quantized.scales_OG.numel() + 4 * quantized.zeros_OG.numel()
    assert rtn(weight_OI, 32).bits == held
