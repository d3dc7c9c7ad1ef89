"""Weights as torch's sums of embeddings read them: products on a CPU by one call of the library each, in float32.

The codes of one input, of all outputs, are a row of a table of INT4 embeddings, and a token's activations are the
weights of a sum of rows: one bag a group gives sum x code of each output. Scales and zeros come after the sum, so
nothing is rounded but float32 sums. FBGEMM writes the loop while the program runs, for the vectors of the processor; it
needs no compiler, and one thread, so no neighbour makes a token wait.

Shapes: B bytes of one input: two outputs a byte, the first in the lower half, then the row's own scale and offset of 16
bits, which are 1 and 0.
"""

from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

import miniawq.compiled.prepacked as prepacked
from miniawq.compiled.workshop import WORKSHOP
from miniawq.hardware import threads
from miniawq.packing import CODES_PER_WORD, Quantized, decode_awq

ONE_AND_ZERO = 4  # bytes
MOST_ROWS_SUMMED = 8  # more rows are multiplied by the library, with codes expanded a few groups at a time (docs/log)
CODES_PER_SLICE = 1 << 22  # expanded in float32: 16 MiB


class Table(NamedTuple):
    """The weight of one layer: words_IB uint8, scales and zeros grid_2GO float32, in the groups that lie in memory.

    `group_size` and `scale_dtype` are those of the file.
    """

    words: Tensor
    grid: Tensor
    group_size: int
    scale_dtype: torch.dtype

    @property
    def inputs_of_group(self) -> int:
        """Inputs of a group in memory."""
        return len(self.words) // self.grid.shape[1]

    @property
    def outputs(self) -> int:
        """All outputs."""
        return self.grid.shape[2]


def reads_tables(device: torch.device | str) -> bool:
    """Whether a device multiplies tables fast and right."""
    device = torch.device(device)
    if (
        device.type != "cpu"
        or prepacked.wants_rows(device)
        or "fbgemm" not in torch.backends.quantized.supported_engines
    ):
        return False
    return WORKSHOP.accepts(("table", device), prove_table)


def table_of(quantized: Quantized) -> Table:
    """A weight as a table."""
    outputs, inputs = quantized.codes_OI.shape
    table = empty_table(outputs, inputs, quantized.group_size, quantized.scales_OG.dtype)
    write_outputs(table, 0, quantized)
    return table


def table_of_awq(qweight_IW: Tensor, qzeros_GW: Tensor, scales_GO: Tensor) -> Table:
    """The same from AutoAWQ words, some outputs at a time, so that a large layer is never decoded as a whole."""
    inputs, (groups, outputs) = len(qweight_IW), scales_GO.shape
    table = empty_table(outputs, inputs, inputs // groups, scales_GO.dtype)
    step = max(1, prepacked.CODES_AT_ONCE["cpu"] // (inputs * CODES_PER_WORD))
    for first in range(0, qweight_IW.shape[1], step):
        some_W = slice(first, first + step)
        some_O = slice(first * CODES_PER_WORD, (first + step) * CODES_PER_WORD)
        words = {"qweight": qweight_IW[:, some_W], "qzeros": qzeros_GW[:, some_W], "scales": scales_GO[:, some_O]}
        write_outputs(table, some_O.start, decode_awq(words))
    return table


def empty_table(outputs: int, inputs: int, group_size: int, scale_dtype: torch.dtype) -> Table:
    """Memory for a table."""
    words_IB = torch.empty(inputs, outputs // 2 + ONE_AND_ZERO, dtype=torch.uint8)
    words_IB[:, -ONE_AND_ZERO:] = torch.tensor([1, 0], dtype=torch.float16).view(torch.uint8)
    grid_2GO = torch.empty(2, inputs // prepacked.stored_group_size(group_size), outputs)
    return Table(words_IB, grid_2GO, group_size, scale_dtype)


def write_outputs(table: Table, first: int, quantized: Quantized) -> None:
    """Write some outputs, from `first` on."""
    codes_IO, end = quantized.codes_OI.t(), first + len(quantized.codes_OI)
    torch.bitwise_or(codes_IO[:, ::2], codes_IO[:, 1::2] << 4, out=table.words[:, first // 2 : end // 2])
    repeats = table.group_size // table.inputs_of_group
    for values_OG, target_GO in zip((quantized.scales_OG, quantized.zeros_OG), table.grid, strict=True):
        target_GO[:, first:end] = values_OG.t().repeat_interleave(repeats, 0)


def quantized_of(table: Table) -> Quantized:
    """The inverse of `table_of`."""
    bytes_IB = table.words[:, :-ONE_AND_ZERO]
    codes_IO = torch.stack([bytes_IB & 15, bytes_IB >> 4], -1).flatten(1)
    scales_GO, zeros_GO = table.grid[:, :: table.group_size // table.inputs_of_group]
    return Quantized(codes_IO.t(), scales_GO.t().to(table.scale_dtype), zeros_GO.t().to(torch.uint8))


def table_bytes(outputs: int, inputs: int, group_size: int) -> int:
    """Memory of a table."""
    groups = inputs // prepacked.stored_group_size(group_size)
    return inputs * (outputs // 2 + ONE_AND_ZERO) + groups * outputs * 2 * torch.float32.itemsize


def table_product(x_TI: Tensor, table: Table) -> Tensor:
    """y_TO in float32."""
    x_TI = x_TI.float().contiguous()
    return summed_product(x_TI, table) if 0 < len(x_TI) <= MOST_ROWS_SUMMED else expanded_table_product(x_TI, table)


def summed_product(x_TI: Tensor, table: Table) -> Tensor:
    """y_TO of few rows: the zeros are taken away from each group's sum, times the sum of its activations."""
    (rows, inputs), (scales_GO, zeros_GO) = x_TI.shape, table.grid
    sums_TGO = sum_rows(table.words, *bags(rows, inputs, table.inputs_of_group), x_TI.flatten())
    sums_TGO = sums_TGO.unflatten(0, (rows, -1))
    sums_TG1 = x_TI.unflatten(1, (-1, table.inputs_of_group)).sum(2, keepdim=True)
    return sums_TGO.addcmul_(zeros_GO, sums_TG1, value=-1).mul_(scales_GO).sum(1)


def expanded_table_product(x_TI: Tensor, table: Table) -> Tensor:
    """y_TO of many rows: the weights of some groups at a time, which are exact in float32, and the library's matmul."""
    y_TO, inputs = x_TI.new_zeros(len(x_TI), table.outputs), table.inputs_of_group
    step = max(1, CODES_PER_SLICE // (table.outputs * inputs))
    for first, (scales_GO, zeros_GO) in enumerate(zip(*(part.split(step) for part in table.grid), strict=True)):
        some_I = slice(first * step * inputs, (first * step + len(scales_GO)) * inputs)
        words_IB = table.words[some_I]
        # A second thread gains little before the matmul, and is waited for in each step where others use the machine.
        with threads(1):
            # One row a bag: the codes as floats.
            codes_IO = sum_rows(words_IB, *bags(1, len(words_IB), 1), None)
            weight_GSO = codes_IO.unflatten(0, (-1, inputs)).sub_(zeros_GO.unsqueeze(1)).mul_(scales_GO.unsqueeze(1))
        y_TO.addmm_(x_TI[:, some_I], weight_GSO.flatten(0, 1))
    return y_TO


def sum_rows(words_IB: Tensor, row_of: Tensor, first_of: Tensor, weight_of: Tensor | None) -> Tensor:
    """The sum of weighted rows of each bag, in float32, one after the other."""
    bag = torch.ops.quantized.embedding_bag_4bit_rowwise_offsets
    return bag(words_IB, row_of, first_of, False, 0, False, weight_of, None, False)


@lru_cache(maxsize=256)
def bags(rows: int, inputs: int, group_size: int) -> tuple[Tensor, Tensor]:
    """For rows of activations, which row of the table each one meets; and where each group begins."""
    first_of = torch.arange(0, rows * inputs, group_size, dtype=torch.int32)
    return torch.arange(inputs, dtype=torch.int32).repeat(rows), first_of


def prove_table(name: str, device: torch.device) -> str:
    """Why tables are not to be used: a number of a small exact product is wrong. Empty if all are right."""
    outputs, inputs, groups = 536, 96, 3  # more outputs than a loop takes at once, and a rest
    codes_OI = (torch.arange(outputs * inputs) % 17 % 16).to(torch.uint8).view(outputs, inputs)
    zeros_OG = (torch.arange(outputs * groups) % 16).to(torch.uint8).view(outputs, groups)
    scales_OG = 2.0 ** -(torch.arange(outputs * groups) % 3).half().view(outputs, groups)
    x_TI = (torch.arange(16 * inputs) * 7 % 5 - 2).float().view(16, inputs)
    groups_OGS = (codes_OI.float().unflatten(1, (groups, -1)) - zeros_OG.unsqueeze(-1)) * scales_OG.unsqueeze(-1)
    right_TO, table = x_TI @ groups_OGS.flatten(1).t(), table_of(Quantized(codes_OI, scales_OG, zeros_OG))
    found = summed_product(x_TI[:3], table), expanded_table_product(x_TI, table)
    is_right = torch.equal(found[0], right_TO[:3]) and torch.equal(found[1], right_TO)
    return "" if is_right else "its numbers are wrong"
