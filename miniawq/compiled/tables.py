"""Weights as torch's sums of embeddings read them: products on a CPU by one call of the library each, in float32.

The codes of one input, of a block of outputs, are a row of a table of INT4 embeddings, and a token's activations are
the weights of a sum of rows: one bag a group gives sum x code of each output. A group's last row is its zeros, which
are taken away times the sum of its activations. Scales come after the sum, so nothing is rounded but float32 sums.
FBGEMM writes the loop while the program runs, for the vectors of the processor; it needs no compiler, and one thread.

Shapes: K blocks of W outputs; B bytes of one input: two outputs a byte, the first in the lower half, then the row's own
scale and offset of 16 bits, which are 1 and 0, and of zeros -1 and 0; Q steps of a sum: inputs of a group, and zeros;
R rows of a table.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache, partial

import torch
from torch import Tensor

import miniawq.compiled.prepacked as prepacked
from miniawq.compiled.sharing import hand_out
from miniawq.compiled.workshop import WORKSHOP
from miniawq.hardware import threads
from miniawq.packing import CODES_PER_WORD, Quantized, decode_awq

SCALE_AND_OFFSET = 4  # bytes
# FBGEMM keeps the sums of 384 outputs in registers; longer rows are read in several passes (docs/log).
LEAST_OUTPUTS_OF_BLOCK, MOST_OUTPUTS_OF_BLOCK = 64, 320
CODES_OF_TASK = 1 << 23  # 600 us: waking a helper thread, and being woken by it, takes 150 (docs/log)
MOST_ROWS_SUMMED = 8  # more rows are multiplied by the library, with codes expanded a few blocks at a time (docs/log)
CODES_PER_SLICE = 1 << 22  # expanded in float32: 16 MiB


@dataclass(frozen=True)
class Table:
    """The weight of one layer, in the groups that lie in memory: words uint8 [K, G, Q, B], and scales as grid_KGW.

    `group_size` and `scale_dtype` are those of the file.
    """

    words: Tensor
    grid: Tensor
    group_size: int
    scale_dtype: torch.dtype

    @property
    def rows_of_group(self) -> int:
        """Inputs of a group in memory, and its zeros."""
        return self.words.shape[2]

    @property
    def outputs(self) -> int:
        """All outputs."""
        return len(self.grid) * self.grid.shape[2]

    @cached_property
    def tasks(self) -> list[tuple[Tensor, Tensor]]:
        """Views of some blocks each: words_RB and scales_KGW."""
        blocks, groups, size, _ = self.words.shape
        count = max(1, round(self.outputs * groups * size / CODES_OF_TASK))
        step = -(-blocks // count)
        words = (words_KGQB.flatten(0, 2) for words_KGQB in self.words.split(step))
        return list(zip(words, self.grid.split(step), strict=True))


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
    width = outputs_of_block(outputs)
    for block in range(len(table.words)):
        some_O = slice(block * width, (block + 1) * width)
        write_block(table, block, *(part[some_O] for part in quantized))
    return table


def table_of_awq(qweight_IW: Tensor, qzeros_GW: Tensor, scales_GO: Tensor) -> Table:
    """The same from AutoAWQ words, a block at a time, so that a large layer is never decoded as a whole."""
    inputs, (groups, outputs) = len(qweight_IW), scales_GO.shape
    table = empty_table(outputs, inputs, inputs // groups, scales_GO.dtype)
    width = outputs_of_block(outputs)
    for block in range(len(table.words)):
        some_W, some_O = (slice(block * size, (block + 1) * size) for size in (width // CODES_PER_WORD, width))
        words = {"qweight": qweight_IW[:, some_W], "qzeros": qzeros_GW[:, some_W], "scales": scales_GO[:, some_O]}
        write_block(table, block, *decode_awq(words))
    return table


def outputs_of_block(outputs: int) -> int:
    """The most that divide all outputs and are not too many or too few; else all."""
    widths = range(LEAST_OUTPUTS_OF_BLOCK, MOST_OUTPUTS_OF_BLOCK + 1, CODES_PER_WORD)
    return max((width for width in widths if outputs % width == 0), default=outputs)


def empty_table(outputs: int, inputs: int, group_size: int, scale_dtype: torch.dtype) -> Table:
    """Memory for a table."""
    size, width = prepacked.stored_group_size(group_size), outputs_of_block(outputs)
    groups, blocks = inputs // size, outputs // width
    words_KGQB = torch.empty(blocks, groups, size + 1, width // 2 + SCALE_AND_OFFSET, dtype=torch.uint8)
    for rows, scale in ((slice(-1), 1), (slice(-1, None), -1)):
        scale_and_offset = torch.tensor([scale, 0], dtype=torch.float16).view(torch.uint8)
        words_KGQB[:, :, rows, -SCALE_AND_OFFSET:] = scale_and_offset
    return Table(words_KGQB, torch.empty(blocks, groups, width), group_size, scale_dtype)


def write_block(table: Table, block: int, codes_WI: Tensor, scales_WG: Tensor, zeros_WG: Tensor) -> None:
    """Write the outputs of one block."""
    words_GQB, scales_GW = table.words[block], table.grid[block]
    repeats = len(scales_GW) // scales_WG.shape[1]
    scales_GW.copy_(scales_WG.t().repeat_interleave(repeats, 0))
    zeros_G1W = zeros_WG.t().repeat_interleave(repeats, 0).unsqueeze(1)
    for codes_GSW, rows in ((codes_WI.t().unflatten(0, (len(scales_GW), -1)), slice(-1)), (zeros_G1W, slice(-1, None))):
        codes_GSW = codes_GSW.to(torch.uint8)
        torch.bitwise_or(codes_GSW[..., ::2], codes_GSW[..., 1::2] << 4, out=words_GQB[:, rows, :-SCALE_AND_OFFSET])


def quantized_of(table: Table) -> Quantized:
    """The inverse of `table_of`."""
    bytes_KGQB = table.words[..., :-SCALE_AND_OFFSET]
    codes_KGQW = torch.stack([bytes_KGQB & 15, bytes_KGQB >> 4], -1).flatten(3)
    # One output after the other, each with its groups.
    codes_OGQ = codes_KGQW.permute(0, 3, 1, 2).flatten(0, 1)
    scales_OG = table.grid.permute(0, 2, 1).flatten(0, 1)
    repeats = table.group_size // (table.rows_of_group - 1)
    scales_OG, zeros_OG = scales_OG[:, ::repeats], codes_OGQ[:, ::repeats, -1]
    return Quantized(codes_OGQ[..., :-1].flatten(1), scales_OG.to(table.scale_dtype), zeros_OG)


def table_bytes(outputs: int, inputs: int, group_size: int) -> int:
    """Memory of a table."""
    size, width = prepacked.stored_group_size(group_size), outputs_of_block(outputs)
    bytes_of_group = (size + 1) * (width // 2 + SCALE_AND_OFFSET) + width * torch.float32.itemsize
    return outputs // width * (inputs // size) * bytes_of_group


def table_product(x_TI: Tensor, tables: Sequence[Table]) -> Tensor:
    """y_TO in float32: the outputs of one table after those of another, in the same groups."""
    x_TI = x_TI.float().contiguous()
    return summed_product(x_TI, tables) if 0 < len(x_TI) <= MOST_ROWS_SUMMED else expanded_table_product(x_TI, tables)


def summed_product(x_TI: Tensor, tables: Sequence[Table]) -> Tensor:
    """y_TO of few rows, some blocks a task."""
    x_TGS = x_TI.view(len(x_TI), -1, tables[0].rows_of_group - 1)
    weights_T1GQ = torch.cat([x_TGS, x_TGS.sum(2, keepdim=True)], 2).unsqueeze(1)
    tasks = [partial(sum_blocks, weights_T1GQ, *part) for table in tables for part in table.tasks]
    is_large = x_TI.shape[1] * sum(table.outputs for table in tables) >= 2 * CODES_OF_TASK
    parts = hand_out(tasks) if is_large else [task() for task in tasks]
    return torch.cat(parts, 1) if len(parts) > 1 else parts[0]


def sum_blocks(weights_T1GQ: Tensor, words_RB: Tensor, scales_KGW: Tensor) -> Tensor:
    """y_TO of some blocks."""
    (rows, _, groups, size), blocks = weights_T1GQ.shape, len(scales_KGW)
    weight_of = weights_T1GQ.expand(rows, blocks, groups, size).flatten()
    sums_TKGW = sum_rows(words_RB, *bags(rows, blocks * groups, size), weight_of).view(rows, *scales_KGW.shape)
    return sums_TKGW.mul_(scales_KGW).sum(2).flatten(1)


def expanded_table_product(x_TI: Tensor, tables: Sequence[Table]) -> Tensor:
    """y_TO of many rows: the weights of some blocks at a time, which are exact in float32, and the library's matmul."""
    y_TO, first = x_TI.new_empty(len(x_TI), sum(table.outputs for table in tables)), 0
    for table in tables:
        step = max(1, CODES_PER_SLICE * len(table.words) // (table.outputs * x_TI.shape[1]))
        for words_KGQB, scales_KGW in zip(table.words.split(step), table.grid.split(step), strict=True):
            # A second thread gains little before the matmul, and is waited for in each step where others use the
            # machine.
            with threads(1):
                weight_KIW = expanded(words_KGQB, scales_KGW)
            for weight_IW in weight_KIW:
                end = first + weight_IW.shape[1]
                torch.mm(x_TI, weight_IW, out=y_TO[:, first:end])
                first = end
    return y_TO


def expanded(words_KGQB: Tensor, scales_KGW: Tensor) -> Tensor:
    """weight_KIW in float32."""
    blocks, groups, size, _ = words_KGQB.shape
    # One row a bag: numbers as floats.
    codes_KGSW, minus_zeros_KG1W = (
        sum_rows(words_KGQB.flatten(0, 2), row_of, bags(1, len(row_of), 1)[1], None).view(
            blocks, groups, -1, scales_KGW.shape[2]
        )
        for row_of in codes_and_zeros(blocks * groups, size)
    )
    return codes_KGSW.add_(minus_zeros_KG1W).mul_(scales_KGW.unsqueeze(2)).flatten(1, 2)


def sum_rows(words_RB: Tensor, row_of: Tensor, first_of: Tensor, weight_of: Tensor | None) -> Tensor:
    """The sum of weighted rows of each bag, in float32, one after the other."""
    bag = torch.ops.quantized.embedding_bag_4bit_rowwise_offsets
    return bag(words_RB, row_of, first_of, False, 0, False, weight_of, None, False)


@lru_cache(maxsize=256)
def bags(times: int, groups: int, size: int) -> tuple[Tensor, Tensor]:
    """For rows of activations that each meet all groups, which row of the table meets which; and where groups begin."""
    first_of = torch.arange(0, times * groups * size, size, dtype=torch.int32)
    return torch.arange(groups * size, dtype=torch.int32).repeat(times), first_of


@lru_cache(maxsize=64)
def codes_and_zeros(groups: int, size: int) -> tuple[Tensor, Tensor]:
    """Which rows of the table are codes, and which are zeros."""
    rows_GQ = torch.arange(groups * size, dtype=torch.int32).view(groups, size)
    return rows_GQ[:, :-1].flatten(), rows_GQ[:, -1].contiguous()


def prove_table(name: str, device: torch.device) -> str:
    """Why tables are not to be used: a number of a small exact product is wrong. Empty if all are right."""
    outputs, inputs, groups = 536 + 592, 96, 3  # a block that a loop does not take at once, with a rest; two blocks
    codes_OI = (torch.arange(outputs * inputs) % 17 % 16).to(torch.uint8).view(outputs, inputs)
    zeros_OG = (torch.arange(outputs * groups) % 16).to(torch.uint8).view(outputs, groups)
    scales_OG = 2.0 ** -(torch.arange(outputs * groups) % 3).half().view(outputs, groups)
    x_TI = (torch.arange(16 * inputs) * 7 % 5 - 2).float().view(16, inputs)
    groups_OGS = (codes_OI.float().unflatten(1, (groups, -1)) - zeros_OG.unsqueeze(-1)) * scales_OG.unsqueeze(-1)
    right_TO, parts = x_TI @ groups_OGS.flatten(1).t(), (slice(536), slice(536, None))
    tables = [table_of(Quantized(codes_OI[some_O], scales_OG[some_O], zeros_OG[some_O])) for some_O in parts]
    found = summed_product(x_TI[:3], tables), expanded_table_product(x_TI, tables)
    is_right = torch.equal(found[0], right_TO[:3]) and torch.equal(found[1], right_TO)
    return "" if is_right else "its numbers are wrong"
