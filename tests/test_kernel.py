"""The INT4 product against its definition, with bounds that follow from how numbers are rounded."""

import pytest
import torch

from miniawq import kernel
from miniawq.compiled import WORKSHOP, eager, prepacked
from miniawq.errors import InvalidInput
from miniawq.kernel import QuantLinear, dequantize_words, matmul, matmul_reference
from miniawq.packing import Quantized, encode_awq
from miniawq.packing import dequantize as dequantize_codes

DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def random_quantized(outputs, inputs, group_size, seed=0, device="cpu", scale_dtype=torch.float16):
    generator = torch.Generator().manual_seed(seed)
    groups = inputs // group_size
    codes_OI = torch.randint(0, 16, (outputs, inputs), generator=generator, dtype=torch.uint8)
    zeros_OG = torch.randint(0, 16, (outputs, groups), generator=generator, dtype=torch.uint8)
    scales_OG = (torch.rand(outputs, groups, generator=generator) * 0.02 + 1e-4).to(scale_dtype)
    return Quantized(codes_OI.to(device), scales_OG.to(device), zeros_OG.to(device))


def awq_tensors(quantized):
    return tuple(encode_awq(quantized)[name] for name in ("qweight", "qzeros", "scales"))


def bound(x_TI, quantized, rounded_weights=True, bias_O=None):
    """How far a product may be from the exact one, per element: three kinds of rounding, each with its unit.

    With u the unit roundoff of x's dtype and S = sum |x| |w| of that element: every weight rounded once is off by
    u |w| (u S in all); a float32 sum of I terms in any order is off by at most I 2^-24 S to first order; the result
    rounded once to the dtype is off by u |y| <= u S (and half the smallest subnormal).
    """
    dtype = x_TI.dtype
    magnitude_TO = x_TI.double().abs() @ dequantize_codes(quantized, torch.float64).abs().t()
    if bias_O is not None:
        magnitude_TO = magnitude_TO + bias_O.double().abs()
    unit = torch.finfo(dtype).eps / 2
    roundings = (1 + rounded_weights) * unit + (x_TI.shape[-1] + 2) * 2.0**-24
    return 1.01 * roundings * magnitude_TO + torch.finfo(dtype).smallest_normal


def exact(x_TI, quantized, bias_O=None):
    y_TO = x_TI.double() @ dequantize_codes(quantized, torch.float64).t()
    return y_TO if bias_O is None else y_TO + bias_O.double()


@pytest.mark.parametrize("group_size", [32, 64, 128, -1])
def test_dequantize_is_the_packed_weight_transposed(group_size, device):
    quantized = random_quantized(24, 256, 256 if group_size == -1 else group_size, device=device)
    weight_IO = dequantize_words(*awq_tensors(quantized), group_size)
    assert torch.equal(weight_IO.t(), dequantize_codes(quantized))


def test_dequantize_rounds_once(device):
    quantized = random_quantized(16, 64, 32, device=device)
    exact_IO = dequantize_words(*awq_tensors(quantized), 32, torch.float64)
    for dtype in DTYPES:
        assert torch.equal(dequantize_words(*awq_tensors(quantized), 32, dtype), exact_IO.to(dtype))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [1, 2, 3, 4, 17, 64])
@pytest.mark.parametrize("with_bias", [False, True])
def test_matmul_stays_within_its_bound(dtype, rows, with_bias, device):
    quantized = random_quantized(40, 256, 64, device=device)
    x_TI = torch.randn(rows, 256, generator=torch.Generator().manual_seed(1)).to(device, dtype)
    bias_O = torch.linspace(-1, 1, 40, device=device).to(dtype) if with_bias else None
    allowed_TO = bound(x_TI, quantized, bias_O=bias_O)
    for product in (matmul, matmul_reference):
        y_TO = product(x_TI, *awq_tensors(quantized), 64, bias_O)
        assert y_TO.dtype == dtype
        assert ((y_TO.double() - exact(x_TI, quantized, bias_O)).abs() <= allowed_TO).all()


def test_matmul_refuses_an_x_of_integers(device):
    quantized = random_quantized(8, 64, 64, device=device)
    with pytest.raises(InvalidInput, match="rounded to whole numbers"):
        matmul(torch.ones(1, 64, dtype=torch.int64, device=device), *awq_tensors(quantized), 64)


def test_matmul_does_not_broadcast_a_bias(device):
    quantized = random_quantized(8, 64, 64, device=device)
    with pytest.raises(InvalidInput, match="there are 8 outputs"):
        matmul(torch.ones(1, 64, device=device), *awq_tensors(quantized), 64, torch.ones(1, device=device))


def test_the_bound_catches_one_wrong_code(device):
    quantized = random_quantized(40, 256, 64, device=device)
    x_TI = torch.randn(2, 256, generator=torch.Generator().manual_seed(1)).to(device)
    wrong = quantized._replace(codes_OI=quantized.codes_OI.clone())
    wrong.codes_OI[3, 77] ^= 1
    error_TO = (matmul(x_TI, *awq_tensors(wrong), 64).double() - exact(x_TI, quantized)).abs()
    assert (error_TO > bound(x_TI, quantized)).nonzero()[:, 1].unique().tolist() == [3]


def test_matmul_never_holds_more_than_a_slice(monkeypatch, device):
    quantized = random_quantized(64, 128, 32, device=device)
    x_TI = torch.randn(3, 128, device=device)
    whole_TO = matmul(x_TI, *awq_tensors(quantized), 32)
    sizes = []

    def recording(*arguments):
        weight_IO = dequantize_words(*arguments)
        sizes.append(weight_IO.numel())
        return weight_IO

    monkeypatch.setattr(kernel, "WEIGHTS_AT_ONCE", 128 * 24)
    monkeypatch.setattr(kernel, "dequantize_words", recording)
    assert torch.allclose(matmul(x_TI, *awq_tensors(quantized), 32), whole_TO, atol=1e-5)
    assert max(sizes) == 128 * 24
    assert sum(sizes) == 128 * 64


@pytest.mark.parametrize("shape", [(64,), (1, 64), (2, 3, 64), (0, 64), (2, 0, 64)])
def test_leading_dimensions_pass_through(shape, device):
    quantized = random_quantized(16, 64, 32, device=device)
    x = torch.randn(shape, device=device)
    assert matmul(x, *awq_tensors(quantized), 32).shape == (*shape[:-1], 16)


def test_strides_of_the_activations_do_not_matter(device):
    quantized = random_quantized(16, 64, 32, device=device)
    x_TI = torch.randn(64, 5, device=device).t()
    strided_y = matmul(x_TI, *awq_tensors(quantized), 32)
    assert torch.allclose(strided_y, matmul(x_TI.contiguous(), *awq_tensors(quantized), 32), atol=1e-6)


@pytest.mark.parametrize("rows", [2, 5])
def test_nan_stays_in_its_row(rows, device):
    quantized = random_quantized(16, 64, 32, device=device)
    x_TI = torch.randn(rows, 64, device=device)
    x_TI[1, 7] = float("nan")
    assert matmul(x_TI, *awq_tensors(quantized), 32).isnan().any(1).tolist() == [row == 1 for row in range(rows)]


@pytest.mark.parametrize("group_size", [32, 128])
@pytest.mark.parametrize("scale_dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_layer_keeps_its_codes_under_the_published_names(group_size, scale_dtype, device):
    quantized = random_quantized(32, 128, group_size, device=device, scale_dtype=scale_dtype)
    bias_O = torch.randn(32, device=device).to(scale_dtype)
    layer = QuantLinear.from_quantized(quantized, bias_O).publish()
    state = layer.state_dict()
    assert set(state) == {"qweight", "qzeros", "scales", "bias"}
    for name, tensor in encode_awq(quantized).items():
        assert torch.equal(state[name], tensor)
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(layer.to_quantized(), quantized, strict=True))

    fresh = QuantLinear(128, 32, True, group_size, scale_dtype).to(device)
    fresh.load_state_dict(state)
    x_TI = torch.randn(3, 128, device=device)
    assert torch.equal(fresh(x_TI), layer(x_TI))


@pytest.fixture(params=["rows", "blocks", "table"])
def arrangement(request, monkeypatch):
    monkeypatch.setattr(prepacked, "wants_rows", lambda _: request.param == "rows")
    if request.param == "blocks":
        monkeypatch.setattr(eager, "reads_tables", lambda _: False)
    return request.param


# Inputs, group size: several groups, one group of all inputs, groups of more than 128, one of no multiple of 128.
GROUPINGS = [(256, 32), (256, 128), (384, 384), (512, 256), (320, 320)]


def prepared_bound(x_TI, quantized, bias_O=None):
    """Codes and zeros are summed apart: float32 sums of at most 15 |x| scale each, twice."""
    apart = Quantized(torch.full_like(quantized.codes_OI, 15), quantized.scales_OG, 0 * quantized.zeros_OG)
    return bound(x_TI, quantized, bias_O=bias_O) + 2 * bound(x_TI.double(), apart)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [1, 40])
@pytest.mark.parametrize(("inputs", "group_size"), GROUPINGS)
@pytest.mark.parametrize("with_bias", [False, True])
def test_prepared_layer_stays_within_its_bound(dtype, rows, inputs, group_size, with_bias, arrangement, device):
    quantized = random_quantized(40, inputs, group_size, device=device)
    x_TI = torch.randn(rows, inputs, generator=torch.Generator().manual_seed(1)).to(device, dtype)
    bias_O = torch.linspace(-1, 1, 40, device=device).to(dtype) if with_bias else None
    layer = QuantLinear.from_quantized(quantized, bias_O).prepare()
    y_TO = layer(x_TI)
    assert y_TO.dtype == dtype
    allowed_TO = prepared_bound(x_TI, quantized, bias_O)
    error_TO = (y_TO.double() - exact(x_TI, quantized, bias_O)).abs()
    assert (error_TO <= allowed_TO).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("with_bias", [False, True])
def test_expanded_product_rounds_sums_and_bias_once(dtype, with_bias, monkeypatch, device):
    monkeypatch.setattr(prepacked, "wants_rows", lambda _: True)
    monkeypatch.setattr(WORKSHOP, "accepts", lambda *_: False)
    monkeypatch.setattr(eager, "CODES_PER_EXPANDED_SLICE", 8 * 16 * 256)
    quantized = random_quantized(40, 256, 64, device=device)
    x_TI = torch.randn(5, 256, generator=torch.Generator().manual_seed(1)).to(device, dtype)
    bias_O = torch.linspace(-9, 9, 40, device=device).to(dtype) if with_bias else None
    y_TO = eager.expanded_product(x_TI, prepacked.prepack(quantized), bias_O)
    assert y_TO.dtype == dtype
    assert ((y_TO.double() - exact(x_TI, quantized, bias_O)).abs() <= bound(x_TI, quantized, bias_O=bias_O)).all()


def test_the_prepared_bound_catches_one_wrong_code(device):
    quantized = random_quantized(40, 256, 64, device=device)
    wrong = quantized._replace(codes_OI=quantized.codes_OI.clone())
    wrong.codes_OI[3, 77] ^= 1
    x_TI = torch.randn(2, 256, generator=torch.Generator().manual_seed(1)).to(device)
    error_TO = (QuantLinear.from_quantized(wrong).prepare()(x_TI) - exact(x_TI, quantized)).abs()
    assert (error_TO > prepared_bound(x_TI, quantized)).nonzero()[:, 1].unique().tolist() == [3]


@pytest.mark.parametrize(("inputs", "group_size"), GROUPINGS)
@pytest.mark.parametrize("scale_dtype", DTYPES)
def test_a_layer_holds_one_form_of_its_weight_and_publishes_when_asked(
    inputs, group_size, scale_dtype, arrangement, monkeypatch, device
):
    monkeypatch.setattr(prepacked, "CODES_AT_ONCE", {"cuda": 16 * inputs, "cpu": 16 * inputs})
    quantized = random_quantized(48, inputs, group_size, device=device, scale_dtype=scale_dtype)
    published = encode_awq(quantized)
    layer = QuantLinear(inputs, 48, False, group_size, scale_dtype).to(device)
    layer.load_state_dict(published)
    layer.prepare()
    fits = prepacked.can_prepack(device, scale_dtype)
    assert (layer.prepacked is not None) == fits
    assert (layer.qweight is None) == fits
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(layer.to_quantized(), quantized, strict=True))
    direct = QuantLinear.from_quantized(quantized).prepacked
    if fits:
        assert torch.equal(layer.prepacked.words, direct.words)
        assert torch.equal(layer.prepacked.grid, direct.grid)
    state = layer.publish().state_dict()
    assert layer.prepacked is None
    assert state.keys() == published.keys()
    assert all(torch.equal(state[name], tensor) for name, tensor in published.items())


def test_a_prepared_layer_is_neither_saved_nor_loaded_into(device):
    """Its words are gone: a state dict without them would be a checkpoint without weights."""
    layer = QuantLinear.from_quantized(random_quantized(16, 64, 32, device=device))
    with pytest.raises(InvalidInput, match=r"cannot be saved\n.*\n  call publish"):
        torch.nn.Sequential(layer).state_dict()
    with pytest.raises(InvalidInput, match="cannot be loaded into"):
        layer.load_state_dict({})


def test_preparing_keeps_no_second_copy(device):
    layer = QuantLinear.from_quantized(random_quantized(64, 512, 128, device=device)).publish().prepare()
    assert not list(layer.buffers())
    assert layer.prepacked.words.nbytes <= (512 + 4) * (64 // 2 + 4)  # a table: a row an input, and one a group


def test_joined_layers_share_one_memory(arrangement, device):
    layers = [
        QuantLinear.from_quantized(random_quantized(outputs, 256, 64, outputs, device=device)).prepare_to_compile()
        for outputs in (32, 16)
    ]
    x_TI = torch.randn(3, 256, device=device)
    apart = [layer(x_TI) for layer in layers]
    for layer, part in zip(layers, prepacked.join([layer.prepacked for layer in layers]), strict=True):
        layer.prepacked = part
    whole = prepacked.joined([layer.prepacked for layer in layers])
    assert whole.outputs == 48
    assert len(whole.words) == len(whole.grid)
    assert {layer.prepacked.words.untyped_storage().data_ptr() for layer in layers} == {whole.words.data_ptr()}
    assert all(torch.equal(layer(x_TI), alone) for layer, alone in zip(layers, apart, strict=True))
    again = prepacked.join([layer.prepacked for layer in layers])
    assert again[0].words.data_ptr() == whole.words.data_ptr()


def test_moving_a_prepared_layer_prepacks_it_again(arrangement, device):
    quantized = random_quantized(16, 128, 32)
    layer = QuantLinear.from_quantized(quantized).to(device).half()
    assert layer.prepacked is not None
    assert torch.equal(layer.to_quantized().codes_OI.cpu(), quantized.codes_OI)


def test_layers_that_lie_together_are_multiplied_at_once(monkeypatch, device):
    layers = [
        QuantLinear.from_quantized(random_quantized(n, 256, 64, seed, device)).prepare_to_compile()
        for seed, n in enumerate((24, 8))
    ]
    x_BLI = torch.randn(2, 3, 256, device=device)
    apart = [layer(x_BLI) for layer in layers]
    calls = []
    product = kernel.multiply_prepacked
    monkeypatch.setattr(kernel, "multiply_prepacked", lambda *arguments: calls.append(1) or product(*arguments))
    QuantLinear.together(x_BLI, layers)
    assert len(calls) == 2
    for layer, part in zip(layers, prepacked.join([layer.prepacked for layer in layers]), strict=True):
        layer.prepacked = part
    at_once = QuantLinear.together(x_BLI, layers)
    assert len(calls) == 3
    for y, expected in zip(at_once, apart, strict=True):
        torch.testing.assert_close(y, expected)
