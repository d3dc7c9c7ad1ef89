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

MOST_SHORT_SUMMANDS = 1024


class BlockSizes(InductorChoices):
    """Inductor's choices, except that `choose` knows the block sizes of all kernels of known sizes: no search.

    They are no part of the key under which Inductor keeps what it compiled; `artifacts.py` sees to that.
    """

    def __init__(self, choose: Callable[..., dict[str, int]]) -> None:
        self.choose = choose

    def triton_kernel_kwargs(self, kernel_cls: Any, features: Any, groups: Any, kernel_kwargs: Any) -> dict[str, Any]:
        """The hook that Inductor offers for fixed configurations."""
        sums = features.reduction_nodes()
        sizes = {name: size for name, size in groups[0].items() if sums or not name.startswith("r")}
        if not all(getattr(size, "is_number", True) for size in sizes.values()):
            return kernel_kwargs
        words = {name for name in features.buf_accesses() if V.graph.get_dtype(name) == torch.int32}
        if "dot" in {node.node.get_reduction_type() for node in sums}:
            kind = "dot"
        elif not sums:
            kind = "pointwise"
        else:
            kind = "planes" if len(words) >= 2 else "sum"
        # A norm's sum of squares, in the same kernel, reads no words.
        of_words = [node for node in sums if words & {read.name for read in node.read_writes.reads}]
        blocks = self.choose(kind, sizes={name: int(size) for name, size in sizes.items()}, sums=len(of_words))
        return kernel_kwargs | {"fixed_config": FixedTritonConfig(blocks), "override_persistent_reduction": False}

    @staticmethod
    def can_fuse_vertical(scheduler: Any, node1: Any, node2: Any, shared_data_score: int) -> bool:
        """The norm of a row is no part of a kernel that reads across rows.

        Such a kernel has one program a row, and one that reads the columns of a product's sums reads whole sectors of
        memory for each number. A kernel of its own has many, which share them.
        """
        on_gpu = node2.get_device().type == "cuda"
        is_norm = on_gpu and node2.is_reduction() and node2.group[1][1] > MOST_SHORT_SUMMANDS
        return not is_norm or all(read.stride1_for_last_dim() for read in node1.read_writes.reads)


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
