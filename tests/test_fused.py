"""Chains of operations become kernels that give the same bits, once for all sizes, and do without a compiler."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from miniawq.fused import Fused, compiled_chains
from miniawq.rounding import COARSE, Rounding, best_candidate, moves, scaled_ends, scaled_nearest, shrunk


def layer(outputs: int, inputs: int, device: torch.device) -> tuple[Tensor, Tensor]:
    x_TI = torch.randn(2 * inputs, inputs, device=device)
    return torch.randn(outputs, inputs, device=device), x_TI.t() @ x_TI / len(x_TI)


@torch.inference_mode()
def test_compiled_chains_give_the_same_bits_at_any_size(device: torch.device) -> None:
    recipe = Rounding(64)
    torch._dynamo.utils.counters.clear()
    for outputs, inputs in ((24, 256), (9, 512), (40, 256)):
        weight_OI, moments_II = layer(outputs, inputs, device)
        weight_OGS, columns_GS = recipe.grouped(weight_OI), torch.rand(inputs // 64, 64, device=device) + 0.5
        ends = scaled_ends.lowered(weight_OGS, columns_GS)
        assert all(map(torch.equal, ends, scaled_ends.function(weight_OGS, columns_GS)))
        scaling = (weight_OGS, *recipe.levels(torch.stack(ends, -1)), columns_GS, columns_GS.reciprocal())
        assert torch.equal(scaled_nearest.lowered(*scaling), scaled_nearest.function(*scaling))
        plain_R2 = recipe.ends(weight_OI)[:, 1]
        ends_KR2 = moves(COARSE, device)(plain_R2, plain_R2)
        pull_RS, moments_SS = torch.randn(outputs, 64, device=device), shrunk(moments_II[:64, :64])
        search = weight_OGS[:, 1].contiguous(), ends_KR2, *recipe.levels(ends_KR2), pull_RS, moments_SS
        assert all(map(torch.equal, best_candidate.lowered(*search), best_candidate.function(*search)))
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 3


def test_a_gpu_compiles_chains_where_that_pays_and_does_without_a_compiler(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    asked = []

    def refused(function: Any, **_: Any) -> Any:
        asked.append(function)
        raise RuntimeError("no compiler\nand more")

    monkeypatch.setattr(torch, "compile", refused)
    double: Any = Fused(lambda tensor: tensor.value * 2)
    on_gpu, elsewhere = (SimpleNamespace(is_cuda=is_cuda, value=4) for is_cuda in (True, False))
    with compiled_chains(10**9):
        assert double(on_gpu) == 8
    with compiled_chains(10**12):
        assert double(elsewhere) == 8
        assert not asked, "8B: compiling takes longer than it saves"
        assert double(on_gpu) == 8
    assert asked
    assert double(on_gpu) == 8
    assert [record.getMessage() for record in caplog.records] == [
        "no compiled kernels, so searches take longer: no compiler"
    ]
