"""The forms that are compiled for decoding keep the oracle's rules for the product, as expressions and compiled."""

import pytest
import torch

from miniawq.kernel import QuantLinear
from miniawq.oracle.door import CHECKS, conformance
from miniawq.oracle.report import as_text
from miniawq.products import lower, multiply, prepare, products_of

PRODUCT_CHECKS = [
    check for check in CHECKS if check.level == "L3" and check.id not in ("L3.refuses-short-input", "L3.no-rows")
]


class Form:
    """`products_of` one layer, in the contract's names; the layer itself has checked the shapes when it was loaded."""

    def __init__(self, compiled=False):
        self.compiled = compiled
        if compiled:
            self.dtypes = ("float32",)  # each dtype and shape is compiled anew

    def matmul(self, x, qweight, qzeros, scales, group_size, bias=None):
        layer = QuantLinear(qweight.shape[0], scales.shape[1], bias is not None, group_size)
        layer.qweight, layer.qzeros, layer.scales, layer.bias = qweight, qzeros, scales, bias
        x_TI = x.reshape(-1, x.shape[-1])
        products = products_of([layer], len(x_TI))

        def product(x_TI, products):
            return multiply(products, prepare(products, x_TI))

        compiled = lower(product, [form for form, _ in products]) if self.compiled else product
        y_TO = compiled(x_TI, products)
        return y_TO.reshape(*x.shape[:-1], -1)


@pytest.mark.parametrize("check", PRODUCT_CHECKS, ids=lambda check: check.id)
def test_expressions_conform(check):
    report = conformance(Form(), [check])
    assert report.ok, as_text(report)


def test_compiled_form_conforms(device):
    (check,) = (check for check in CHECKS if check.id == "L3.bias")
    torch.compiler.reset()
    report = conformance(Form(compiled=True), [check], device=str(device))
    assert report.ok, as_text(report)
