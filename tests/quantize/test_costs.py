"""What quantizing costs beside arithmetic: memory as planned, and no question to the device inside a search."""

import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode

from miniawq import awq, packing
from miniawq.awq import Rounding
from miniawq.checkpoint import blocks as stream
from miniawq.checkpoint.background import Background, ahead
from miniawq.checkpoint.opening import open_checkpoint
from miniawq.quantize import memory, ranges
from miniawq.quantize.job import Quantizer, Settings
from miniawq.quantize.recipes import DEFAULT, NEIGHBOURS, Recipe
from miniawq.quantize.streams import Streams
from tests.helpers.allocations import Allocations
from tests.helpers.awq_blocks import Block, layer_and_inputs, statistics_of
from tests.helpers.tiny_checkpoints import make_dense


class Questions(TorchDispatchMode):
    """How often a number was fetched from a tensor, for which a GPU would have to finish all it has to do."""

    count = 0

    def __torch_dispatch__(self, function: Any, types: Any, arguments: Any = (), keywords: Any = None) -> Any:
        self.count += function in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.is_nonzero.default)
        return function(*arguments, **(keywords or {}))


@pytest.mark.thorough
@pytest.mark.parametrize(("recipe", "scale"), [(DEFAULT, 8), (NEIGHBOURS, 16)], ids=["default", "neighbours"])
@torch.inference_mode()
def test_memory_is_what_the_plan_says(
    recipe: Recipe, scale: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The shapes of Llama-3.1-8B with everything so many times less wide and less long, as on a GPU."""
    monkeypatch.setitem(ranges.CANDIDATE_ELEMENTS, "cpu", ranges.CANDIDATE_ELEMENTS["cuda"] // scale**2)
    monkeypatch.setattr(packing, "WEIGHTS_AT_ONCE", packing.WEIGHTS_AT_ONCE // scale**2)
    for module in (stream, memory):
        monkeypatch.setattr(module, "TOKENS_PER_BATCH", 4096 // scale)
    width = 4096 // scale
    shape = {"hidden_size": width, "intermediate_size": 14_336 // scale, "head_dim": width // 4}
    source, _ = make_dense(
        tmp_path / "dense", num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=1, **shape
    )
    settings, tokens_BL = Settings(recipe, compared_tokens=4096 // scale), torch.randint(48, (16, width))
    job = Quantizer(open_checkpoint(source), settings, torch.device("cpu"))
    plan = memory.plan_memory(
        job.checkpoint, job.folds, *tokens_BL.shape, settings.compared_tokens, job.device, False, recipe.learns
    ).host
    with Allocations() as allocations, sdpa_kernel(SDPBackend.MATH):
        hidden_BLD = torch.zeros(*tokens_BL.shape, width)
        job.stream.embed(tokens_BL, hidden_BLD)
        if recipe.learns:
            job.streams = Streams(job.stream, torch.zeros_like(hidden_BLD), hidden_BLD.clone())
        job.process(0, hidden_BLD)
    planned = sum(size for purpose, size in plan.items() if purpose != "process")
    assert 0.9 * planned < allocations.peak < 1.05 * planned


def test_searching_ranges_asks_the_device_nothing() -> None:
    weight_OI, x_TI = layer_and_inputs(1)
    statistics = statistics_of(x_TI)
    with Questions() as questions:
        ranges.independent_sides("mlp.up_proj", weight_OI, statistics, Rounding(16))
        awq.search_ranges("mlp.up_proj", weight_OI, statistics, Rounding(16))
    assert questions.count == 0


def test_searching_factors_asks_the_device_once_for_all_candidates_of_a_stage() -> None:
    text = Block()
    fold, statistics = text.folds[0], text.observed()[text.folds[0]]
    asked = []
    for recipe in (Recipe(group_size=32), Recipe(group_size=32, ratios=40)):
        with Questions() as questions:
            recipe.method.factors(text.block, fold, statistics, recipe.rounding)
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


def test_leaving_does_not_wait_for_the_item_that_is_coming() -> None:
    """The garbage collector may close it where a thread begins, which holds a lock that waiting needs."""
    begins, is_closed, ends = threading.Event(), threading.Event(), threading.Event()
    was_closed: list[bool] = []

    def slow() -> Iterator[int]:
        yield 1
        begins.set()
        was_closed.append(is_closed.wait(5))
        ends.set()

    items = ahead(slow())
    assert next(items) == 1
    assert begins.wait(5)
    items.close()  # type: ignore[attr-defined]
    is_closed.set()
    assert ends.wait(5)
    assert was_closed == [True]


def test_what_runs_behind_is_done_in_order_and_its_errors_are_told() -> None:
    done: list[int] = []
    with Background() as disk:
        for number in range(5):
            disk.run(done.append, number)
    assert done == list(range(5))
    with pytest.raises(ZeroDivisionError), Background() as disk:
        disk.run(lambda: 1 // 0)  # type: ignore[arg-type]
