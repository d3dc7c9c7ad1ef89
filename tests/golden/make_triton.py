"""What Inductor writes for the kernels of products, before `with_matrices`: the stored sources of `test_matrices.py`.

    python tests/golden/make_triton.py

writes torch-X.Y/NAME.py.txt for the torch that it runs under. There need be no GPU: Inductor is told that there is one,
and generates Triton code for tensors that do not exist (`helpers/inductor_counts.py`).
"""

import sys
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from tests.helpers.inductor_counts import GROUP, pretend_gpu, triton_sources  # noqa: I001  (torch._inductor after it)
from miniawq.compiled import gpu_forms, launch, products
from miniawq.compiled.inductor import BlockSizes, V

LAYER, HEAD = (4096, 4096), (32_768, 4096)
SCALES = torch.float16


class Planes(NamedTuple):
    """A call of `dot_planes`. As many splits as `splits_for` says, if not said here."""

    rows: int
    dtype: torch.dtype = torch.bfloat16
    splits: int | None = None
    bias: bool = False
    factors: bool = False
    size: tuple[int, int] = LAYER

    def sources(self):
        outputs, inputs = self.size
        columns, groups, planes = launch.columns_for(self.rows), inputs // GROUP, GROUP // 8
        rows = -(-self.rows // columns) * columns
        tensors = {
            "words_OPG": ((outputs, planes, groups), torch.int32),
            "grid_OG": ((outputs, groups), torch.int32),
            "x_NTPG": ((8, rows, planes, groups), self.dtype),
            "exponents_2O": (tuple(gpu_forms.magic_exponents(torch.device("cpu"), outputs).shape), torch.int32),
        }
        tensors |= {"bias_O": ((outputs,), SCALES)} if self.bias else {}
        tensors |= {"factors_T1": ((rows, 1), torch.float32)} if self.factors else {}
        product = partial(gpu_forms.dot_planes, scale_dtype=SCALES, splits=self.splits)
        return generated(product, tensors)


class Tiled(NamedTuple):
    """A call of `multiply_tiled`."""

    rows: int
    dtype: torch.dtype = torch.bfloat16
    bias: bool = False
    size: tuple[int, int] = HEAD

    def sources(self):
        outputs, inputs = self.size
        tensors = {"x_TI": ((self.rows, inputs), self.dtype), "weight_OI": ((outputs, inputs), self.dtype)}
        tensors |= {"bias_O": ((outputs,), self.dtype)} if self.bias else {}

        def product(x_TI, weight_OI, bias_O=None):
            return products.multiply_tiled(x_TI, None, self.dtype, weight_OI, bias_O)

        return generated(product, tensors)


# The smallest of each kind: batched and not, masks of every dimension, all that may follow the sums.
STORED = {
    "planes-4": Planes(4, splits=1),
    "planes-16-splits": Planes(16, splits=2),
    "planes-16-masks": Planes(16, bias=True, size=(4100, 11 * GROUP)),
    "planes-64-bias-factors": Planes(64, torch.float16, splits=1, bias=True, factors=True),
    "planes-128-splits-factors": Planes(128, torch.float16, factors=True),
    "tiled-1": Tiled(1),
    "tiled-64-bias": Tiled(64, torch.float16, bias=True),
}


def generated(function, tensors):
    """The sources of the kernels with products that a function of named tensors, given as (shape, dtype), becomes."""

    def of_positions(*values):
        return function(**dict(zip(tensors, values, strict=True)))

    # Without `inductor.chosen_by`, which would rewrite them.
    with V.set_choices_handler(BlockSizes(launch.block_sizes)):
        return [source for _, source in triton_sources(of_positions, list(tensors.values())) if "tl.dot(" in source]


def main():
    pretend_gpu()
    folder = Path(__file__).parent / "triton" / ("torch-" + ".".join(torch.__version__.split(".")[:2]))
    folder.mkdir(parents=True, exist_ok=True)
    for name, call in STORED.items():
        (source,) = call.sources()
        (folder / f"{name}.py.txt").write_text(source)


if __name__ == "__main__":
    main()
