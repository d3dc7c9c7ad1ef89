"""Recorded functions: the same results for each shape, also after others, and arguments that stay as they are."""

import torch
from torch import Tensor

from miniawq.compiled import Recorded


def mixed(x_RC: Tensor, y_C: Tensor) -> tuple[Tensor, Tensor]:
    return x_RC @ x_RC.t() + y_C.sum(), x_RC.mul(2).add_(y_C)


def test_what_is_recorded_computes_what_the_function_does(device: torch.device) -> None:
    recorded, draw = Recorded(mixed), torch.Generator().manual_seed(0)
    for rows in (3, 5, 3, 5, 3, 3, 5):
        x_RC = torch.randn(4, rows, generator=draw).to(device).t()  # not contiguous
        y_C = torch.randn(4, generator=draw).to(device)
        before = x_RC.clone(), y_C.clone()
        for found, expected in zip(recorded(x_RC, y_C), mixed(x_RC, y_C), strict=True):
            torch.testing.assert_close(found, expected)
        assert torch.equal(x_RC, before[0])
        assert torch.equal(y_C, before[1])
    assert len([one for one in recorded.recordings.values() if one]) == (2 if device.type == "cuda" else 0)


def test_a_recording_is_for_one_precision_of_products(device: torch.device) -> None:
    recorded, x_RC = Recorded(mixed), torch.randn(64, 64, generator=torch.Generator().manual_seed(0)).to(device)
    before = torch.get_float32_matmul_precision()
    try:
        for precision in ("highest", "high", "highest", "high", "highest"):
            torch.set_float32_matmul_precision(precision)
            found, _ = recorded(x_RC, x_RC[0])
            torch.testing.assert_close(found, mixed(x_RC, x_RC[0])[0], rtol=0, atol=1e-5)
    finally:
        torch.set_float32_matmul_precision(before)
