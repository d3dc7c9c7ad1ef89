"""Every layout holds the same numbers, in the shapes that its readers expect."""

import pytest
import torch

from miniawq.checkpoint.layouts import LAYOUTS
from miniawq.errors import InvalidInput
from miniawq.packing import Quantized, quantize
from miniawq.quantize.grids import GRIDS


@pytest.mark.parametrize(
    ("layout", "grid"),
    [(layout, grid) for layout in LAYOUTS for grid in GRIDS if "symmetric" not in layout or grid == "symmetric"],
)
@pytest.mark.parametrize(
    ("outputs", "inputs", "group_size"), [(16, 64, 32), (8, 128, 128), (24, 192, 64), (16, 96, -1)]
)
def test_every_layout_gives_back_the_same_numbers(layout, outputs, inputs, group_size, grid):
    quantized = quantize(torch.randn(outputs, inputs), group_size, GRIDS[grid])
    encode, decode = LAYOUTS[layout]
    tensors = encode(quantized)
    assert all(tensor.is_contiguous() for tensor in tensors.values())
    again = decode(tensors, group_size)
    assert all(torch.equal(a, b) and a.dtype == b.dtype for a, b in zip(quantized, again, strict=True))
    assert all(torch.equal(tensor, encode(again)[name]) for name, tensor in tensors.items())


def test_compressed_tensors_pads_odd_shapes():
    quantized = quantize(torch.randn(5, 20), 4)
    tensors = LAYOUTS["compressed-tensors"].encode(quantized)
    assert tensors["weight_packed"].shape == (5, 3)
    assert tensors["weight_zero_point"].shape == (1, 5)
    assert tensors["weight_shape"].tolist() == [5, 20]
    again = LAYOUTS["compressed-tensors"].decode(tensors, 4)
    assert all(torch.equal(a, b) for a, b in zip(quantized, again, strict=True))


def test_published_shapes():
    quantized = quantize(torch.randn(16, 256), 64)
    awq, gemv = LAYOUTS["awq"].encode(quantized), LAYOUTS["gemv"].encode(quantized)
    assert {name: tuple(tensor.shape) for name, tensor in awq.items()} == {
        "qweight": (256, 2),
        "qzeros": (4, 2),
        "scales": (4, 16),
    }
    assert {name: tuple(tensor.shape) for name, tensor in gemv.items()} == {
        "qweight": (16, 32),
        "qzeros": (16, 2),
        "scales": (16, 16),
    }


@pytest.mark.parametrize(
    ("inputs", "group_size", "words"),
    [(4096, 128, 4), (11008, 128, 11), (14336, 128, 14), (4096, 64, 8), (896, 64, 2), (896, 128, 1), (1536, 128, 2),
     (8960, 128, 9), (4096, 32, 16)],
)  # fmt: skip
def test_gemv_padding_is_autoawqs(inputs, group_size, words):
    quantized = Quantized(
        torch.zeros(8, inputs, dtype=torch.uint8),
        torch.ones(8, inputs // group_size, dtype=torch.float16),
        torch.zeros(8, inputs // group_size, dtype=torch.uint8),
    )
    assert LAYOUTS["gemv"].encode(quantized)["qzeros"].shape == (8, words)


def test_the_symmetric_layout_refuses_other_zeros():
    with pytest.raises(InvalidInput, match="not symmetric"):
        LAYOUTS["compressed-tensors-symmetric"].encode(quantize(torch.rand(8, 32), 32))
