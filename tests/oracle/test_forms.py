"""The forms that are compiled for decoding keep the oracle's rules for the product, as expressions and compiled."""

import pytest
import torch

from miniawq.compiled import own_copy, prepacked
from miniawq.compiled.eager import arrange_awq, multiply_prepacked
from miniawq.compiled.prepacked import prepack_awq
from miniawq.compiled.products import compile_with_forms, int4_product, multiply, prepare
from miniawq.oracle.door import CHECKS, conformance
from miniawq.oracle.report import as_text
from tests.helpers.checks import marked

PRODUCT_CHECKS = [
    check
    for check in CHECKS
    if check.level == "L3"
    and "refuses" not in check.id
    and check.id not in ("L3.no-rows", "L3.wrong-dtypes", "L3.integer-inputs")
]


class OneProduct:
    """The product that one layer is given, in the contract's names; a layer's shapes are checked when it is loaded."""

    def __init__(self, compiled=False):
        self.compiled = compiled
        if compiled:
            self.dtypes = ("float32",)  # each dtype and shape is compiled anew

    def matmul(self, x, qweight, qzeros, scales, group_size, bias=None):
        x_TI = x.reshape(-1, x.shape[-1])
        if not len(x_TI):  # a step always has a row
            return x.new_zeros(*x.shape[:-1], scales.shape[1])
        weight = prepack_awq(qweight, qzeros, scales)
        products = (int4_product(weight, bias, len(x_TI), x.dtype, lambda form: True),)

        chosen = compile_with_forms(own_copy(product), [products[0].form]) if self.compiled else product
        return chosen(x_TI, products).reshape(*x.shape[:-1], -1)


def product(x_TI, products):
    return multiply(products, prepare(products, x_TI))


class PlainProduct:
    """The product of a layer without a compiler, as its device reads the words fastest: a table on a CPU."""

    def matmul(self, x, qweight, qzeros, scales, group_size, bias=None):
        y_TO = multiply_prepacked(x.reshape(-1, x.shape[-1]), arrange_awq(qweight, qzeros, scales), bias)
        return y_TO.reshape(*x.shape[:-1], -1) if len(y_TO) else x.new_zeros(*x.shape[:-1], scales.shape[1])


@pytest.mark.parametrize("check", marked(PRODUCT_CHECKS, every=3))
def test_plain_products_conform(check):
    report = conformance(PlainProduct(), [check])
    assert report.ok, as_text(report)


@pytest.mark.parametrize("check", marked(PRODUCT_CHECKS, every=2))
def test_expressions_conform(check):
    report = conformance(OneProduct(), [check])
    assert report.ok, as_text(report)


@pytest.mark.thorough
@pytest.mark.parametrize("check", marked(PRODUCT_CHECKS))
def test_expressions_of_a_gpu_conform(check, monkeypatch):
    monkeypatch.setattr(prepacked, "wants_rows", lambda device: True)
    if check.id == "L3.ranges":
        pytest.skip(
            "a float32 has no room for all of bfloat16 times a power of two: `gpu_forms.prescale` has the bounds"
        )
    report = conformance(OneProduct(), [check])
    assert report.ok, as_text(report)


@pytest.mark.compiles
def test_compiled_form_conforms(device):
    (check,) = (check for check in CHECKS if check.id == "L3.bias")
    torch.compiler.reset()
    report = conformance(OneProduct(compiled=True), [check], device=str(device))
    assert report.ok, as_text(report)
