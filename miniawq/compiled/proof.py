"""Every form shows once in a process that it is right on this device, or is left out.

The example is small and exact: weights, activations and all sums are small integers times a power of two, so the right
result has one representation, whatever the order of the sum. What is compared is what the compiler made, new or found
on the disk, so a damaged cache, a compiler's defect and a device that treats subnormals otherwise all show here.
"""

from pathlib import Path

import torch
from torch import Tensor

from miniawq.compiled.compiler import Kept
from miniawq.compiled.prepacked import prepack
from miniawq.compiled.products import (
    DOT,
    EXPAND,
    REDUCE,
    WEIGHTS,
    WORDS,
    Form,
    Product,
    Tensors,
    compile_with_forms,
    int4_tensors,
    multiply,
    prepare,
)
from miniawq.compiled.workshop import WORKSHOP
from miniawq.packing import CODES_PER_WORD, Quantized, dequantize

OUTPUTS, INPUTS, GROUP_SIZE = 64, 512, 128
# Rows for which each form is tried: those of its smallest tile, but one too few for forms that fill tiles up.
ROWS_TRIED = {"dot": 7, "tiled": 7, "weights": 255, "expand": 16}
OF_INT4 = (REDUCE, DOT, WEIGHTS, EXPAND, WORDS)


def check(form: Form, device: torch.device, dtype: torch.dtype, directory: Path | None = None) -> bool:
    """Whether a form is right, and can be built, for activations of `dtype` on a device. What is built is kept."""
    return WORKSHOP.knows_torch and WORKSHOP.accepts(
        (form.name, device, dtype), lambda *_: problem_of(form, device, dtype, directory)
    )


def problem_of(form: Form, device: torch.device, dtype: torch.dtype, directory: Path | None) -> str:
    """What is wrong with a form; empty if nothing is."""
    rows = ROWS_TRIED.get(form.name, 1)
    x_TI, weight_OI, tensors = example(form, device, dtype, rows)
    compiled = compile_with_forms(multiply_alone, [form])
    product = compiled if directory is None else Kept(compiled, directory / f"proof-{form.name}.aot")
    found_TO = product(Product(form, tensors), x_TI)
    right_TO = (x_TI.double() @ weight_OI.double().t()).to(dtype)
    wrong = int((found_TO != right_TO).sum())
    return f"{wrong} of {right_TO.numel()} numbers of an example are wrong" if wrong else ""


def example(form: Form, device: torch.device, dtype: torch.dtype, rows: int) -> tuple[Tensor, Tensor, Tensors]:
    """Activations, a weight and the tensors of the weight for a form. Every code occurs in every nibble."""
    generator = torch.Generator().manual_seed(0)
    # Few activations are not 0, so that one wrong code shows in a result rounded to 8 bits.
    x_TI = torch.randint(-1, 2, (rows, INPUTS), generator=generator).float()
    x_TI *= torch.rand(rows, INPUTS, generator=generator) < 1 / CODES_PER_WORD
    codes_OI = (torch.arange(OUTPUTS * INPUTS) % 17 % 16).to(torch.uint8).view(OUTPUTS, INPUTS)
    groups = INPUTS // GROUP_SIZE
    zeros_OG = (torch.arange(OUTPUTS * groups) % 16).to(torch.uint8).view(OUTPUTS, groups)
    scales_OG = 2.0 ** -(torch.arange(OUTPUTS * groups) % 3).half().view(OUTPUTS, groups)
    quantized = Quantized(codes_OI.to(device), scales_OG.to(device), zeros_OG.to(device))
    weight_OI = dequantize(quantized, dtype)
    if form in OF_INT4:
        return x_TI.to(device, dtype), weight_OI, int4_tensors(form, prepack(quantized), None)
    return x_TI.to(device, dtype), weight_OI, (weight_OI, None)


def multiply_alone(product: Product, x_TI: Tensor) -> Tensor:
    """y_TO, to be compiled."""
    return multiply([product], prepare([product], x_TI))
