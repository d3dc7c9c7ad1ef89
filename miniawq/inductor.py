"""Fixed block sizes for Inductor's kernels. Importing this file imports Inductor, so `forms.compiled` does it late."""

from collections.abc import Callable
from typing import Any

import torch
from torch._inductor.choices import InductorChoices
from torch._inductor.codegen.triton import FixedTritonConfig
from torch._inductor.virtualized import V

__all__ = ["BlockSizes", "V"]


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
        else:
            blocks = None
        if blocks is None:
            return kernel_kwargs
        return kernel_kwargs | {"fixed_config": FixedTritonConfig(blocks), "override_persistent_reduction": False}
