"""How a layer's words lie in memory while it runs, and the way back.

One load should bring eight weights of one output, and no arithmetic should be needed to tell which. So a group of S
inputs becomes P = S / 8 words, and word p of group g holds the codes of inputs g S + 8 p + 0..7, lowest nibble first.

A GPU reads *rows*: the words of one output follow one another, so neighbouring threads take neighbouring words of it,
or the tensor cores all words of a group. A CPU reads *blocks* [K, G, P, W]: the same word of W neighbouring outputs is
one vector, a block is read from front to back, and each lane of the vector sums one output. Scales and zeros of a group
lie in blocks for both: a GPU loads those of all outputs of a thread at once.

A group of more than 128 inputs is stored as groups of 128 with the same scale and zero.
"""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from miniawq.packing import CODES_PER_WORD, SEQUENTIAL, Quantized, decode_awq, unpack, words_of

LARGEST_GROUP = 128
LANES = 8  # AWQ's words hold eight outputs, so a layer divides into blocks of eight
CODES_AT_ONCE = {"cuda": 1 << 24, "cpu": 1 << 22}  # decoded while a layer is prepacked; a GPU waits for each launch
GRID_BYTES = {"cuda": 4, "cpu": 8}  # of one group's scale and zero


class Prepacked(NamedTuple):
    """The weight of one layer, or of several whose outputs follow one another.

    In rows: `words` int32 [K, W, G, P], W outputs after one another, and `grid` int32 [K, G, W] (`pack_grid`). In
    blocks: `words` int32 [K, G, P, W] and `grid` float32 [K, G, 2, W], scales and zeros. `group_size` and `scale_dtype`
    are those of the file.
    """

    words: Tensor
    grid: Tensor
    group_size: int
    scale_dtype: torch.dtype

    @property
    def in_rows(self) -> bool:
        """Rows or blocks."""
        return self.grid.dtype == torch.int32

    @property
    def lanes(self) -> int:
        """Outputs of a block."""
        return self.grid.shape[-1]

    @property
    def outputs(self) -> int:
        """All outputs of all layers."""
        return len(self.words) * self.lanes

    @property
    def inputs(self) -> int:
        """All inputs."""
        return self.words.numel() * CODES_PER_WORD // self.outputs


def can_prepack(device: torch.device, scale_dtype: torch.dtype) -> bool:
    """Whether the grid has room for these scales: on a GPU they have 16 bits."""
    return scale_dtype.itemsize == 2 or not wants_rows(device)


def wants_rows(device: torch.device | str) -> bool:
    """Which of the two a device reads fastest."""
    return torch.device(device).type == "cuda"


def prepack(quantized: Quantized) -> Prepacked:
    """A weight as its device reads it fastest."""
    (outputs, inputs), scales_OG = quantized.codes_OI.shape, quantized.scales_OG
    target = empty(outputs, inputs, quantized.group_size, scales_OG.dtype, scales_OG.device)
    write(quantized, target)
    return target


def prepack_awq(qweight_IW: Tensor, qzeros_GW: Tensor, scales_GO: Tensor) -> Prepacked:
    """The same from AutoAWQ words, some outputs at a time, so that a large layer is never decoded as a whole."""
    inputs, outputs = len(qweight_IW), scales_GO.shape[1]
    target = empty(outputs, inputs, inputs // len(scales_GO), scales_GO.dtype, qweight_IW.device)
    for some_O, part in slices(target, CODES_AT_ONCE["cuda" if target.in_rows else "cpu"]):
        some_W = slice(some_O.start // CODES_PER_WORD, some_O.stop // CODES_PER_WORD)
        words = {"qweight": qweight_IW[:, some_W], "qzeros": qzeros_GW[:, some_W], "scales": scales_GO[:, some_O]}
        write(decode_awq(words), part)
    return target


def prepacked_bytes(outputs: int, inputs: int, group_size: int, device: str) -> int:
    """Memory of a prepacked weight on a "cuda" or "cpu" device."""
    return outputs * (inputs // 2 + inputs // stored_group_size(group_size) * GRID_BYTES[device])


def empty(
    outputs: int, inputs: int, group_size: int, scale_dtype: torch.dtype, device: torch.device | str
) -> Prepacked:
    """Memory for a prepacked weight."""
    size = stored_group_size(group_size)
    groups, words = inputs // size, size // CODES_PER_WORD
    if wants_rows(device):
        words_KWGP = torch.empty(outputs // LANES, LANES, groups, words, dtype=torch.int32, device=device)
        grid_KGW = torch.empty(outputs // LANES, groups, LANES, dtype=torch.int32, device=device)
        return Prepacked(words_KWGP, grid_KGW, group_size, scale_dtype)
    lanes = lanes_for(outputs)
    words_KGPW = torch.empty(outputs // lanes, groups, words, lanes, dtype=torch.int32, device=device)
    grid_KG2W = torch.empty(outputs // lanes, groups, 2, lanes, device=device)
    return Prepacked(words_KGPW, grid_KG2W, group_size, scale_dtype)


def stored_group_size(group_size: int) -> int:
    """Inputs of one group in memory."""
    return LARGEST_GROUP if group_size % LARGEST_GROUP == 0 else group_size


def lanes_for(outputs: int) -> int:
    """How many outputs a CPU takes at a time: a whole vector, because Inductor does not vectorize half of one."""
    return 2 * LANES if torch.backends.cpu.get_cpu_capability() == "AVX512" and outputs % (2 * LANES) == 0 else LANES


def write(quantized: Quantized, target: Prepacked) -> None:
    """Write the codes, scales and zeros of some outputs into `target`."""
    repeats = target.grid.shape[1] // quantized.scales_OG.shape[1]
    scales_OG, zeros_OG = (t.repeat_interleave(repeats, 1) for t in (quantized.scales_OG, quantized.zeros_OG))
    words_OGP = sequential_words(quantized.codes_OI, scales_OG.shape[1])
    if target.in_rows:
        target.words.copy_(words_OGP.unflatten(0, (-1, LANES)))
        target.grid.copy_(in_blocks(pack_grid(scales_OG, zeros_OG), LANES))
    else:
        target.words.copy_(in_blocks(words_OGP, target.lanes))
        target.grid.copy_(in_blocks(torch.stack([scales_OG.float(), zeros_OG.float()], -1), target.lanes))


def unprepack(prepacked: Prepacked) -> Quantized:
    """The inverse of `prepack`."""
    codes_OI = unpack(words_in_rows(prepacked).flatten(1), SEQUENTIAL)
    scales_OG, zeros_OG = scales_and_zeros(prepacked)
    repeats = scales_OG.shape[1] * prepacked.group_size // codes_OI.shape[1]
    scales_OG, zeros_OG = scales_OG[:, ::repeats], zeros_OG[:, ::repeats]
    return Quantized(codes_OI, scales_OG.to(prepacked.scale_dtype), zeros_OG.to(torch.uint8))


def sequential_words(codes_OI: Tensor, groups: int) -> Tensor:
    """The words [O, G, P] of codes 0..15, which are not checked."""
    return words_of(codes_OI, SEQUENTIAL).unflatten(1, (groups, -1))


def pack_grid(scales_OG: Tensor, zeros_OG: Tensor) -> Tensor:
    """A group's 16-bit scale and its zero as one int32: the bits of the scale below, above them the zero, a bfloat16.

    The int32 without its lower half is the zero as a float.
    """
    return zeros_OG.float().view(torch.int32) | (scales_OG.view(torch.int16).int() & 0xFFFF)


def unpack_grid(grid: Tensor, scale_dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """The scales and zeros of `pack_grid` in float32 and the shape of `grid`."""
    return grid.to(torch.int16).view(scale_dtype).float(), (grid & -(1 << 16)).view(torch.float32)


def bits_of_zeros(grid: Tensor) -> Tensor:
    """The zeros of `pack_grid` as the bits of bfloat16s, int16."""
    return (grid >> 16).to(torch.int16)


def side_by_side(low: Tensor, high: Tensor) -> Tensor:
    """Two int32 as one int64, the first in its lower half: what one thread writes at once."""
    return high.to(torch.int64) << 32 | (low.to(torch.int64) & 0xFFFFFFFF)


def words_in_rows(prepacked: Prepacked) -> Tensor:
    """words_OGP."""
    return prepacked.words.flatten(0, 1) if prepacked.in_rows else out_of_blocks(prepacked.words)


def scales_and_zeros(prepacked: Prepacked) -> tuple[Tensor, Tensor]:
    """scales_OG and zeros_OG in float32."""
    if prepacked.in_rows:
        return unpack_grid(out_of_blocks(prepacked.grid), prepacked.scale_dtype)
    scales_OG, zeros_OG = out_of_blocks(prepacked.grid).unbind(-1)
    return scales_OG, zeros_OG


def in_blocks(t: Tensor, lanes: int) -> Tensor:
    """[O, ..] to [K, .., W]: neighbouring outputs side by side."""
    return t.unflatten(0, (-1, lanes)).movedim(1, -1)


def out_of_blocks(t: Tensor) -> Tensor:
    """The inverse of `in_blocks`."""
    return t.movedim(-1, 1).flatten(0, 1)


def slices(prepacked: Prepacked, codes: int) -> Iterator[tuple[slice, Prepacked]]:
    """Pairs of outputs and a view of them, about `codes` codes at a time."""
    outputs, lanes = prepacked.outputs, prepacked.lanes
    step = max(1, codes // prepacked.inputs // lanes) * lanes
    for first in range(0, outputs, step):
        some_O = slice(first, min(first + step, outputs))
        some = slice(some_O.start // lanes, some_O.stop // lanes)
        yield some_O, prepacked._replace(words=prepacked.words[some], grid=prepacked.grid[some])


def join(parts: Sequence[Prepacked]) -> list[Prepacked]:
    """Weights that read the same input, laid after one another in one memory; each is a view of it."""
    words, grid = (lay_together(tensors) for tensors in _tensors_of(parts))
    sizes = [len(part.words) for part in parts]
    return [
        part._replace(words=own_words, grid=own_grid)
        for part, own_words, own_grid in zip(parts, words.split(sizes), grid.split(sizes), strict=True)
    ]


def joined(parts: Sequence[Any]) -> Prepacked | None:
    """Weights that `join` laid together, as one; None if they do not lie together."""
    words, grid = (lie_together(tensors) for tensors in _tensors_of(parts))
    return None if words is None or grid is None else parts[0]._replace(words=words, grid=grid)


def _tensors_of(parts: Sequence[Any]) -> tuple[list[Tensor], list[Tensor]]:
    return [part.words for part in parts], [part.grid for part in parts]


def lie_together(parts: Sequence[Tensor]) -> Tensor | None:
    """All parts as one tensor, if each begins where the one before ends; else None."""
    first = parts[0]
    ends = [part.data_ptr() + part.nbytes for part in parts]
    if [part.data_ptr() for part in parts[1:]] != ends[:-1]:
        return None
    if any(part.untyped_storage().data_ptr() != first.untyped_storage().data_ptr() for part in parts):
        return None
    return first.as_strided((sum(len(part) for part in parts), *first.shape[1:]), first.stride())


def lay_together(parts: Sequence[Tensor]) -> Tensor:
    """All parts as one tensor: the memory they are in if they already lie together, else a copy."""
    together = lie_together(parts)
    return torch.cat(list(parts)) if together is None else together
