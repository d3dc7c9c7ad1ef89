"""Which form multiplies what, and that each computes the layer it stands for."""

import pytest
import torch
from torch import nn

from miniawq.checkpoint.loading import DenseLinear
from miniawq.compiled import eager, prepacked, products
from miniawq.compiled.products import Product, compile_with_forms, dense_product, int4_product, multiply, prepare
from miniawq.kernel import QuantLinear
from miniawq.packing import quantize


def accepts_all(form):
    return True


def on_a_gpu(monkeypatch, outputs=8, groups=4, group_size=128):
    """A prepacked weight of so many groups that says it lies on a GPU."""
    monkeypatch.setattr(prepacked, "wants_rows", lambda _: True)
    weight = prepacked.empty(outputs, groups * group_size, group_size, torch.float16, "meta")
    return weight._replace(words=OnCuda(weight.words), grid=weight.grid)


class OnCuda:
    """A tensor that claims another device."""

    device = torch.device("cuda")

    def __init__(self, tensor):
        self.tensor = tensor

    def __getattr__(self, name):
        return getattr(self.tensor, name)


@pytest.mark.parametrize(("rows", "groups", "dtype", "form"), [
    (1, 112, torch.bfloat16, "REDUCE"), (2, 112, torch.bfloat16, "DOT"), (3, 64, torch.float32, "REDUCE"),
    (4, 32, torch.float16, "DOT"), (128, 32, torch.bfloat16, "DOT"), (129, 32, torch.float16, "WEIGHTS"),
    (256, 32, torch.bfloat16, "WEIGHTS"), (257, 32, torch.bfloat16, "EXPAND"), (257, 32, torch.float32, "PLAIN"),
    (129, 32, torch.float32, "PLAIN"), (4, 32, torch.float32, "PLAIN"),
])  # fmt: skip
def test_the_form_on_a_gpu_goes_by_rows_and_groups(rows, groups, dtype, form, monkeypatch):
    monkeypatch.setattr(products, "int4_tensors", lambda *_: ())
    found = int4_product(on_a_gpu(monkeypatch, groups=groups), None, rows, dtype, accepts_all)
    assert found.form is getattr(products, form)


@pytest.mark.parametrize("group_size", [32, 64])
def test_small_groups_are_expanded_sooner(group_size, monkeypatch):
    monkeypatch.setattr(products, "int4_tensors", lambda *_: ())
    weight = on_a_gpu(monkeypatch, groups=32, group_size=group_size)
    for rows, form in ((128, products.DOT), (129, products.EXPAND)):
        assert int4_product(weight, None, rows, torch.bfloat16, accepts_all).form is form


@pytest.mark.parametrize(("left_out", "form"), [((), "REDUCE"), (("reduce",), "DOT"), (("reduce", "dot"), "EXPAND"),
                                                (("reduce", "dot", "expand"), "PLAIN")])  # fmt: skip
def test_the_next_form_takes_over_from_one_that_is_left_out(left_out, form, monkeypatch):
    monkeypatch.setattr(products, "int4_tensors", lambda *_: ())
    weight = on_a_gpu(monkeypatch)
    found = int4_product(weight, None, 1, torch.bfloat16, lambda form: form.name not in left_out)
    assert found.form is getattr(products, form)


def test_a_card_without_room_for_a_tile_of_weights_expands_them(monkeypatch):
    monkeypatch.setattr(products, "int4_tensors", lambda *_: ())
    found = int4_product(on_a_gpu(monkeypatch), None, 129, torch.bfloat16, lambda form: form is not products.WEIGHTS)
    assert found.form is products.EXPAND


def test_a_cpu_has_one_form_for_few_rows_and_the_plain_product_for_many():
    weight = prepacked.prepack(quantize(torch.randn(8, 128), 128))
    for rows, form in ((1, products.WORDS), (32, products.WORDS), (33, products.PLAIN)):
        assert int4_product(weight, None, rows, torch.float32, accepts_all).form is form
    assert int4_product(weight, None, 1, torch.float32, lambda form: False).form is products.PLAIN


@pytest.mark.parametrize(("device", "outputs", "dtype", "rows", "form"), [
    ("cuda", 32768, torch.bfloat16, 1, "SUMMED"), ("cuda", 16384, torch.bfloat16, 1, "LIBRARY"),
    ("cuda", 32768, torch.bfloat16, 2, "TILED"), ("cuda", 32768, torch.float16, 64, "TILED"),
    ("cuda", 32768, torch.bfloat16, 65, "LIBRARY"), ("cuda", 32768, torch.float32, 2, "LIBRARY"),
    ("cuda", 16384, torch.bfloat16, 2, "LIBRARY"), ("cpu", 8, torch.bfloat16, 1, "ROWS"),
    ("cpu", 32768, torch.float32, 32, "ROWS"), ("cpu", 32768, torch.bfloat16, 33, "LIBRARY"),
])  # fmt: skip
def test_the_dense_form_goes_by_device_rows_and_outputs(device, outputs, dtype, rows, form):
    weight_OI = torch.empty(outputs, 8, dtype=dtype, device="meta")
    weight_OI = OnCuda(weight_OI) if device == "cuda" else weight_OI
    if device == "cuda":
        weight_OI.__class__.__len__ = lambda self: len(self.tensor)
    found = dense_product(weight_OI, None, rows, dtype, accepts_all)
    assert found.form is getattr(products, form)


def test_a_library_matmul_is_never_compiled_with_the_options_of_the_forms():
    """With them Inductor would write it itself, by the block sizes of `dot_groups`."""
    for form in (products.EXPAND, products.PLAIN, products.LIBRARY):
        options = compile_with_forms(torch.neg, [form]).options
        assert "triton.native_matmul" not in options
        assert options.keys() >= (eager.EXPAND_IN_ONE.keys() if form is products.EXPAND else set())
    written_by_inductor = ("REDUCE", "DOT", "WEIGHTS", "WORDS", "ROWS", "SUMMED", "TILED")
    for form in (getattr(products, name) for name in written_by_inductor):
        assert compile_with_forms(torch.neg, [form, products.LIBRARY]).options["triton.native_matmul"]


@pytest.mark.parametrize(("forms", "rounds"), [([], True), ([products.PLAIN], False)])
def test_what_lies_between_products_rounds_as_the_model_does(forms, rounds):
    assert compile_with_forms(torch.neg, forms).options["emulate_precision_casts"] == rounds


@pytest.mark.parametrize(("form", "rows"), [
    ("SUMMED", 1), ("TILED", 1), ("TILED", 5), ("TILED", 17), ("LIBRARY", 1), ("LIBRARY", 5), ("ROWS", 1), ("ROWS", 5),
])  # fmt: skip
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16])
def test_dense_forms_are_the_library_s_product(stored, form, rows, bias, device):
    layer, x_TI = DenseLinear(64, 24, bias, device=device), torch.randn(rows, 64, device=device)
    layer.weight.data = layer.weight.data.to(stored)
    if form == "TILED" and stored != torch.float32:
        x_TI = x_TI.to(stored)  # it is chosen only where both have one dtype
    with torch.no_grad():
        expected = layer(x_TI.float()).to(x_TI.dtype)
        found = (Product(getattr(products, form), (layer.weight.data, layer.bias)),)
        limit = 1e-5 if x_TI.dtype == torch.float32 else 2e-2
        torch.testing.assert_close(multiply(found, prepare(found, x_TI)), expected, rtol=0, atol=limit)


def int4_form(monkeypatch, form, outputs, bias=None):
    monkeypatch.setattr(prepacked, "wants_rows", lambda _: form != "WORDS")
    layer = QuantLinear.from_quantized(quantize(torch.randn(outputs, 256), 128), bias).prepare_to_compile()
    chosen = getattr(products, form)
    return layer, (Product(chosen, products.int4_tensors(chosen, layer.prepacked, layer.bias)),)


@pytest.mark.parametrize(("form", "rows"), [
    ("WORDS", 1), ("WORDS", 5), ("REDUCE", 1), ("REDUCE", 3), ("DOT", 20), ("WEIGHTS", 130), ("PLAIN", 3)
])  # fmt: skip
@pytest.mark.parametrize("bias", [False, True])
def test_forms_compute_the_layer_and_the_norm_before_it(form, rows, bias, monkeypatch):
    layer, found = int4_form(monkeypatch, form, 48, torch.randn(48) if bias else None)
    dtype = torch.bfloat16 if form in ("DOT", "WEIGHTS") else torch.float32
    h_TI, norm_I, eps = (torch.randn(rows, 256) * 3).to(dtype), (torch.rand(256) + 0.5).to(dtype), 0.5
    x_TI = nn.functional.rms_norm(h_TI, (256,), norm_I, eps)
    expected = layer(x_TI.float()).to(dtype)
    limit = (1e-5 if dtype == torch.float32 else 2e-2) * float(expected.abs().max())
    for prepared in (products.prepare_normed(found, h_TI, norm_I, eps), prepare(found, x_TI)):
        torch.testing.assert_close(multiply(found, prepared), expected, rtol=0, atol=limit)


@pytest.mark.parametrize(("form", "is_late"), [("DOT", False), ("REDUCE", True)])
def test_a_norm_after_a_product_does_not_overflow_in_float16(form, is_late, monkeypatch):
    """Products of a large residual stream with the norm's weight, which the norm itself makes small."""
    _, found = int4_form(monkeypatch, form, 32)
    h_TI, norm_I = torch.full((3, 256), 3e4).half(), torch.full((256,), 4.0).half()
    prepared = products.prepare_normed(found, h_TI, norm_I, 1e-5)
    assert (prepared.means_TC is not None) == is_late
    assert multiply(found, prepared).isfinite().all()
