"""What quantizing costs beside arithmetic: memory as planned, and no question to the device inside a search."""

import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from test_awq import SMALL, Block, layer_and_inputs
from tiny_checkpoints import make_dense
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from miniawq import awq, memory, packing, rounding, stream
from miniawq.background import Behind, ahead
from miniawq.checkpoint import open_checkpoint
from miniawq.quantize import Quantizer, Settings
from miniawq.rounding import Rounding, limit_search, range_search


class Allocations(TorchDispatchMode):
    """Bytes of all tensors that operations have made, now and at most."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes: dict[int, int] = {}
        self.peak = 0

    def __torch_dispatch__(self, function: Any, types: Any, arguments: Any = (), keywords: Any = None) -> Any:
        result = function(*arguments, **(keywords or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor) and tensor.device.type != "meta":
                storage = tensor.untyped_storage()
                if storage._cdata not in self.sizes:
                    self.sizes[storage._cdata] = storage.nbytes()
                    weakref.finalize(storage, self.sizes.pop, storage._cdata, 0)
        self.peak = max(self.peak, sum(self.sizes.values()))
        return result


class Questions(TorchDispatchMode):
    """How often a number was fetched from a tensor, for which a GPU would have to finish all it has to do."""

    count = 0

    def __torch_dispatch__(self, function: Any, types: Any, arguments: Any = (), keywords: Any = None) -> Any:
        self.count += function in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.is_nonzero.default)
        return function(*arguments, **(keywords or {}))


@torch.inference_mode()
def test_memory_is_what_the_plan_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The shapes of Llama-3.1-8B with everything an eighth as wide and as long, as on a GPU."""
    scale = 8
    monkeypatch.setitem(rounding.CANDIDATE_ELEMENTS, "cpu", rounding.CANDIDATE_ELEMENTS["cuda"] // scale**2)
    monkeypatch.setattr(packing, "WEIGHTS_PER_SLICE", packing.WEIGHTS_PER_SLICE // scale**2)
    for module in (stream, memory):
        monkeypatch.setattr(module, "TOKENS_PER_BATCH", 4096 // scale)
    shape = {"hidden_size": 512, "intermediate_size": 1792, "num_attention_heads": 4, "num_key_value_heads": 1}
    source, _ = make_dense(tmp_path / "dense", num_hidden_layers=1, head_dim=128, **shape)
    settings, tokens_BL = Settings(compared_tokens=4096 // scale), torch.randint(48, (16, 512))
    job = Quantizer(open_checkpoint(source), settings, torch.device("cpu"))
    plan = memory.plan_memory(
        job.checkpoint, job.folds, *tokens_BL.shape, settings.compared_tokens, job.device, False
    ).host
    with Allocations() as allocations, sdpa_kernel(SDPBackend.MATH):
        hidden_BLD = torch.zeros(*tokens_BL.shape, 512)
        job.stream.embed(tokens_BL, hidden_BLD)
        job.process(0, hidden_BLD)
    planned = sum(size for purpose, size in plan.items() if purpose != "process")
    assert 0.9 * planned < allocations.peak < 1.05 * planned


def test_searching_ranges_asks_the_device_nothing() -> None:
    weight_OI, _, moments_II = layer_and_inputs(1)
    with Questions() as questions:
        range_search(weight_OI, moments_II, Rounding(16))
        limit_search(weight_OI, moments_II, Rounding(16))
    assert questions.count == 0


def test_searching_scales_asks_the_device_once_for_all_candidates_of_a_stage() -> None:
    text = Block()
    statistics = text.observed()
    asked = []
    for recipe in (SMALL, awq.Recipe(group_size=32, ratios=40)):
        with Questions() as questions:
            awq.search_fold(text.block, text.folds[0], statistics[text.folds[0]], recipe)
        asked.append(questions.count)
    assert asked[0] == asked[1]


def test_items_come_ahead_in_order_and_errors_where_they_belong() -> None:
    def failing() -> Any:
        yield 1
        raise ValueError("second")

    assert list(ahead(range(5))) == list(range(5))
    assert list(ahead([])) == []
    items = ahead(failing())
    assert next(items) == 1
    with pytest.raises(ValueError, match="second"):
        next(items)


def test_what_runs_behind_is_done_in_order_and_its_errors_are_told() -> None:
    done: list[int] = []
    with Behind() as disk:
        for number in range(5):
            disk.run(done.append, number)
    assert done == list(range(5))
    with pytest.raises(ZeroDivisionError), Behind() as disk:
        disk.run(lambda: 1 // 0)  # type: ignore[arg-type]
