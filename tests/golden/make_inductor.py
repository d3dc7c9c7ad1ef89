"""What Inductor writes for the kernels of products, before `with_matrices`: the stored sources of `test_matrices.py`.

    python tests/golden/make_inductor.py

writes torch-X.Y/NAME.py.txt for the torch that it runs under. There need be no GPU: Inductor is told that there is one,
and generates Triton code for tensors that do not exist (`helpers/inductor_counts.py`).
"""

import sys
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from tests.helpers.inductor_counts import GROUP, pretend_gpu, triton_sources  # noqa: I001  (torch._inductor after it)
from miniawq.compiled import gpu_forms, launch, products
from miniawq.compiled import inductor
from miniawq.compiled.inductor import chosen_by
from miniawq.compiled.prepacked import LANES

LAYER, HEAD = (4096, 4096), (32_768, 4096)
SCALES = torch.float16


class Pairs(NamedTuple):
    """A call of `dot_groups`. As many splits as `splits_for` says, if not said here."""

    rows: int
    dtype: torch.dtype = torch.bfloat16
    splits: int | None = None
    bias: bool = False
    factors: bool = False
    size: tuple[int, int] = LAYER
    group: int = GROUP

    def sources(self):
        outputs, inputs = self.size
        columns, groups, words = launch.columns_for(self.rows), inputs // self.group, self.group // 8
        rows, step = -(-self.rows // columns) * columns, max(words, launch.WORDS_OF_A_STEP)
        tensors = {
            "words_KWGP": ((outputs // LANES, LANES, groups, words), torch.int32),
            "grid_KGW": ((outputs // LANES, groups, LANES), torch.int32),
            "x_CTQNH": ((step // words, rows, inputs // 8 // step, 4, 2 * step), self.dtype),
            "sums_TG4": ((rows, groups, 4), torch.int64),
        }
        tensors |= {"bias_O": ((outputs,), SCALES)} if self.bias else {}
        tensors |= {"factors_T1": ((rows, 1), torch.float32)} if self.factors else {}
        product = partial(gpu_forms.dot_groups, scale_dtype=SCALES, splits=self.splits)
        return generated(product, tensors)


class Weights(NamedTuple):
    """A call of `dot_weights` for whole tiles of rows."""

    rows: int
    dtype: torch.dtype = torch.bfloat16
    splits: int = 1
    bias: bool = False
    size: tuple[int, int] = LAYER

    def sources(self):
        outputs, groups = self.size[0], self.size[1] // GROUP
        tensors = {
            "words_KWGP": ((outputs // LANES, LANES, groups, GROUP // 8), torch.int32),
            "grid_KGW": ((outputs // LANES, groups, LANES), torch.int32),
            "x_TQH": ((self.rows, groups, GROUP), self.dtype),
        }
        tensors |= {"bias_O": ((outputs,), SCALES)} if self.bias else {}
        return generated(partial(gpu_forms.dot_weights, scale_dtype=SCALES, splits=self.splits), tensors)


class Vectors(NamedTuple):
    """A call of `reduce_vectors`."""

    rows: int
    size: tuple[int, int] = LAYER

    def sources(self):
        (outputs, inputs), words = self.size, GROUP // 8
        groups = inputs // GROUP
        parts = launch.parts_for(inputs // 8 // gpu_forms.vector_words(words), self.rows)
        tensors = {
            "words_KWGP": ((outputs // LANES, LANES, groups, words), torch.int32),
            "grid_KGW": ((outputs // LANES, groups, LANES), torch.int32),
            "x_TNJ": ((self.rows, 8, inputs // 8), torch.float32),
            "sums_TG": ((self.rows, groups), torch.float32),
        }
        return generated(partial(gpu_forms.reduce_vectors, scale_dtype=SCALES, parts=parts), tensors)


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
    "pairs-4": Pairs(4, splits=1),
    "pairs-16-splits": Pairs(16, splits=2),
    "pairs-16-masks": Pairs(16, bias=True, size=(4104, 11 * GROUP)),
    "pairs-64-bias-factors": Pairs(64, torch.float16, splits=1, bias=True, factors=True),
    "pairs-128-splits-factors": Pairs(128, torch.float16, factors=True),
    "pairs-8-small-groups": Pairs(8, splits=1, group=32),
    "pairs-8-one-step": Pairs(8, splits=4, size=(64, 4 * GROUP)),
    "weights-256-splits": Weights(256, splits=4),
    "weights-256-bias-masks": Weights(256, torch.float16, bias=True, size=(4104, 11 * GROUP)),
    "vectors-1": Vectors(1),
    "vectors-2-masks": Vectors(2, size=(4104, 11 * GROUP)),
    "tiled-1": Tiled(1),
    "tiled-64-bias": Tiled(64, torch.float16, bias=True),
}


@contextmanager
def unchanged():
    """As with `inductor.chosen_by`, but sources stay as Inductor writes them."""
    with chosen_by(launch.block_sizes), pytest.MonkeyPatch.context() as patch:
        for name in ("with_matrices", "with_wide_loads"):
            patch.setattr(inductor, name, lambda source: source)
        yield


def generated(function, tensors):
    """The sources of the kernels with a loop that a function of named tensors, given as (shape, dtype), becomes."""

    def of_positions(*values):
        return function(**dict(zip(tensors, values, strict=True)))

    with unchanged():
        return [source for _, source in triton_sources(of_positions, list(tensors.values())) if "for r0_" in source]


def main():
    pretend_gpu()
    folder = Path(__file__).parent / "inductor" / ("torch-" + ".".join(torch.__version__.split(".")[:2]))
    folder.mkdir(parents=True, exist_ok=True)
    for name, call in STORED.items():
        (source,) = call.sources()
        (folder / f"{name}.py.txt").write_text(source)


if __name__ == "__main__":
    main()
