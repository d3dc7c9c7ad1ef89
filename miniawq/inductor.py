"""Inductor, asked for kernels. Importing this file imports it, which takes seconds: those who compile do it late."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch._inductor
from torch._inductor.choices import InductorChoices
from torch._inductor.codegen.triton import FixedTritonConfig
from torch._inductor.virtualized import V
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

__all__ = ["BlockSizes", "V", "lowered"]


class BlockSizes(InductorChoices):
    """Inductor's choices, except that `choose` knows the block sizes of the kernels in `forms.py`: no search.

    They are no part of the key under which Inductor keeps what it compiled; `artifacts.py` sees to that.
    """

    def __init__(self, choose: Callable[..., dict[str, int] | None]) -> None:
        self.choose = choose

    def triton_kernel_kwargs(self, kernel_cls: Any, features: Any, groups: Any, kernel_kwargs: Any) -> dict[str, Any]:
        """The hook that Inductor offers for fixed configurations."""
        sums = features.reduction_nodes()
        words = {name for name in features.buf_accesses() if V.graph.get_dtype(name) == torch.int32}
        if "dot" in {node.node.get_reduction_type() for node in sums}:
            blocks = self.choose("dot", sizes={name: int(size) for name, size in groups[0].items()})
        elif sums and len(words) >= 2:
            sizes = {"x": int(features.numel), "r0_": int(features.reduction_numel)}
            # A norm's sum of squares, in the same kernel, reads no words.
            of_words = [node for node in sums if words & {read.name for read in node.read_writes.reads}]
            blocks = self.choose("planes", sizes=sizes, sums=len(of_words))
        elif sums and features.reduction_numel.is_number:
            blocks = self.choose("sum", sizes={"x": int(features.numel), "r0_": int(features.reduction_numel)})
        else:
            blocks = None
        if blocks is None:
            return kernel_kwargs
        return kernel_kwargs | {"fixed_config": FixedTritonConfig(blocks), "override_persistent_reduction": False}


def lowered(
    function: Callable[..., Any],
    inputs: Sequence[tuple[tuple[int, ...], torch.dtype]],
    device: torch.device,
    options: dict[str, Any],
) -> Callable[..., Any]:
    """A function of tensors of exactly these shapes and dtypes, compiled without Dynamo."""
    with FakeTensorMode():
        examples: list[Any] = [torch.empty(shape, dtype=dtype, device=device) for shape, dtype in inputs]
        graph = make_fx(function)(*examples)
    return torch._inductor.compile(graph, examples, options)
