"""How a layer's words lie in memory while it runs, and the way back.

One load should bring eight weights, and no arithmetic should be needed to find out which. So a group of S inputs of one
output becomes P = S / 8 words, and word p of group g holds, sequentially, the codes of inputs g S + 8 p + 0..7.

On CUDA, where neighbouring threads take neighbouring groups, the words of the same p lie together as a *plane* [O, G]
of [O, P, G]: the *storage order* of inputs is (p, g, nibble). A CPU takes the same word of W neighbouring outputs as
one vector, [K, G, P, W]: a *block* of outputs is read from front to back, and a lane of the vector sums one output.

A group of more than 128 inputs is arranged as groups of 128 that have the same scale and zero.

Shapes: O outputs, I inputs, G groups as arranged, S inputs of one, P words of one (S / 8), N nibbles of a word (8); K
blocks of W outputs (8, or 16 with AVX-512).
"""

from collections.abc import Iterator, Sequence
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

from miniawq.packing import CODES_PER_WORD, SEQUENTIAL, Quantized, unpack, words_of

LARGEST_GROUP = 128


class Arranged(NamedTuple):
    """A layer's weight, in planes: words_OPG and grid_OG; or in blocks: words_KGPW and grid_KG2W, scales and zeros.

    The words are int32, a grid in planes too, a grid in blocks float32. Several layers lie behind one another along the
    first dimension.
    """

    words: Tensor
    grid: Tensor

    @property
    def in_planes(self) -> bool:
        """Which of the two."""
        return self.grid.dtype == torch.int32

    @property
    def outputs_of_a_block(self) -> int:
        """Neighbouring outputs of a vector, 1 in planes."""
        return 1 if self.in_planes else self.words.shape[3]

    @property
    def outputs(self) -> int:
        """All outputs of all layers."""
        return len(self.words) * self.outputs_of_a_block


def sequential_words(codes_OI: Tensor, groups: int) -> Tensor:
    """The words [O, G, P] of codes 0..15, which are not checked."""
    return words_of(codes_OI, SEQUENTIAL).unflatten(1, (groups, -1))


def codes_of_words(words_OGP: Tensor) -> Tensor:
    """The inverse of `sequential_words`."""
    return unpack(words_OGP.flatten(1), SEQUENTIAL)


def pack_grid(scales_OG: Tensor, zeros_OG: Tensor) -> Tensor:
    """A group's 16-bit scale and its zero as one int32, grid_OG: the scale's bits below, above them -(2^7 + zero).

    The upper half is a bfloat16, that is, the int32 without its lower half is the float. -(2^7 + zero) is what turns a
    code under the exponent of 2^7 (`expand`) into code - zero.
    Were they tensors of 16 and 8 bits, Triton would give every thread eight or sixteen neighbouring groups of one
    output, to fill its widest load; with four (of 32 bits) a thread has several outputs to use its activations for.
    """
    offsets_OG = -(2.0**7) - zeros_OG.float()
    return offsets_OG.view(torch.int32) | (scales_OG.view(torch.int16).int() & 0xFFFF)


def unpack_grid(grid_OG: Tensor, scale_dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """The scales of `pack_grid` and its offsets, -(2^7 + zero), in float32."""
    return grid_OG.to(torch.int16).view(scale_dtype).float(), (grid_OG & -(1 << 16)).view(torch.float32)


def zeros_of(offsets: Tensor) -> Tensor:
    """The zeros of which `pack_grid` has made offsets."""
    return -(2.0**7) - offsets


def group_as_arranged(group_size: int) -> int:
    """Inputs of one group in memory."""
    return LARGEST_GROUP if group_size % LARGEST_GROUP == 0 else group_size


def wants_planes(device: torch.device) -> bool:
    """Which arrangement a device reads fastest."""
    return device.type == "cuda"


def can_arrange(device: torch.device, scale_dtype: torch.dtype) -> bool:
    """Whether its grid has room for these scales."""
    return scale_dtype.itemsize == 2 or not wants_planes(device)


def empty(outputs: int, inputs: int, group_size: int, device: torch.device) -> Arranged:
    """Memory for the words and grid of a layer, or of several."""
    size = group_as_arranged(group_size)
    groups, words = inputs // size, size // CODES_PER_WORD
    if wants_planes(device):
        grid_OG = torch.empty(outputs, groups, dtype=torch.int32, device=device)
        return Arranged(torch.empty(outputs, words, groups, dtype=torch.int32, device=device), grid_OG)
    lanes = lanes_for(outputs)
    grid_KG2W = torch.empty(outputs // lanes, groups, 2, lanes, device=device)
    return Arranged(torch.empty(outputs // lanes, groups, words, lanes, dtype=torch.int32, device=device), grid_KG2W)


def lanes_for(outputs: int) -> int:
    """How many outputs a CPU takes at a time: a whole vector, because Inductor does not make half of one.

    AWQ's words hold eight outputs, so a layer has whole blocks of 8, if not of 16.
    """
    return 16 if torch.backends.cpu.get_cpu_capability() == "AVX512" and outputs % 16 == 0 else 8


def arrange(quantized: Quantized, target: Arranged) -> None:
    """Write codes, scales and zeros, of some outputs, into `target`."""
    repeats = target.grid.shape[1] // quantized.scales_OG.shape[1]
    scales_OG, zeros_OG = (t.repeat_interleave(repeats, 1) for t in (quantized.scales_OG, quantized.zeros_OG))
    words_OGP = sequential_words(quantized.codes_OI, scales_OG.shape[1])
    if target.in_planes:
        target.words.copy_(words_OGP.transpose(1, 2))
        target.grid.copy_(pack_grid(scales_OG, zeros_OG))
    else:
        lanes = target.outputs_of_a_block
        target.words.copy_(in_blocks(words_OGP, lanes))
        target.grid.copy_(in_blocks(torch.stack([scales_OG.float(), zeros_OG.float()], -1), lanes))


def in_blocks(t: Tensor, lanes: int) -> Tensor:
    """[O, ..] to [K, .., W]: neighbouring outputs side by side."""
    return t.unflatten(0, (-1, lanes)).movedim(1, -1)


def out_of_blocks(t: Tensor) -> Tensor:
    """The inverse of `in_blocks`."""
    return t.movedim(-1, 1).flatten(0, 1)


def restore(arranged: Arranged, group_size: int, scale_dtype: torch.dtype) -> Quantized:
    """The inverse of `arrange`."""
    words = arranged.words.transpose(1, 2) if arranged.in_planes else out_of_blocks(arranged.words)
    codes_OI, (scales_OG, zeros_OG) = codes_of_words(words), scales_and_zeros(arranged, scale_dtype)
    repeats = scales_OG.shape[1] * group_size // codes_OI.shape[1]
    return Quantized(codes_OI, scales_OG[:, ::repeats].to(scale_dtype), zeros_OG[:, ::repeats].to(torch.uint8))


def scales_and_zeros(arranged: Arranged, scale_dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """scales_OG and zeros_OG in float32."""
    if arranged.in_planes:
        scales_OG, offsets_OG = unpack_grid(arranged.grid, scale_dtype)
        return scales_OG, zeros_of(offsets_OG)
    scales_OG, zeros_OG = out_of_blocks(arranged.grid).unbind(-1)
    return scales_OG, zeros_OG


def slices(arranged: Arranged, codes: int) -> Iterator[tuple[slice, Arranged]]:
    """Views of some outputs at a time, as many as have about so many codes; and which outputs."""
    outputs, size = arranged.outputs, arranged.outputs_of_a_block
    inputs, whole = arranged.words.numel() * CODES_PER_WORD // outputs, max(size, CODES_PER_WORD)
    step = max(1, codes // inputs // whole) * whole
    for first in range(0, outputs, step):
        some_O = slice(first, min(first + step, outputs))
        some = slice(some_O.start // size, some_O.stop // size)
        yield some_O, Arranged(arranged.words[some], arranged.grid[some])


def lie_together(parts: Sequence[Tensor]) -> Tensor | None:
    """All parts as one tensor, if they lie behind one another in one memory."""
    first = parts[0]
    ends = [part.data_ptr() + part.nbytes for part in parts]
    if [part.data_ptr() for part in parts[1:]] != ends[:-1]:
        return None
    if any(part.untyped_storage().data_ptr() != first.untyped_storage().data_ptr() for part in parts):
        return None
    return first.as_strided((sum(len(part) for part in parts), *first.shape[1:]), first.stride())


def lay_together(parts: Sequence[Tensor]) -> Tensor:
    """All parts as one tensor: the memory they are in if they already lie together, or a copy."""
    together = lie_together(parts)
    return torch.cat(list(parts)) if together is None else together


@cache
def magic_exponents(device: torch.device, outputs: int) -> Tensor:
    """The bits of 2^11 and 2^7 as floats for each output, int32 [2, O].

    A tensor, because one instruction takes one constant at most; and one entry for each output, because Triton brings
    words to the tensor cores' layout before it makes eight weights of each only if all that it needs for it is loaded
    in blocks. A single number would be a block that nobody loads.
    """
    bits = torch.tensor([(127 + 11) << 23, (127 + 7) << 23], dtype=torch.int32, device=device)
    return bits.unsqueeze(1).repeat(1, outputs)


def in_storage_order(x_TI: Tensor, groups: int) -> Tensor:
    """The activations in the order of words in planes: [T, (P, G, N)]."""
    return x_TI.unflatten(-1, (groups, -1, CODES_PER_WORD)).transpose(1, 2).flatten(1)


# How Inductor is to cut `expand`: into tiles of all planes of some groups, of which both are read and written together.
EXPAND_IN_TILES = {"triton.prefer_nd_tiling": True, "triton.max_tiles": 3}


def expand(words_OPG: Tensor, grid_OG: Tensor, scale_dtype: torch.dtype, dtype: torch.dtype) -> Tensor:
    """The weight [O, I], each (code - zero) * scale rounded once to `dtype`, of 16 bits: as int64, four weights each.

    A thread takes half a word and writes four neighbouring weights. The nibbles are moved under the exponent of 2^7, as
    in `forms.dot_planes`; (2^7 + zero) * scale has 19 bits, so nothing is rounded before.
    """
    scales_OG11, offsets_OG11 = unpack_grid(grid_OG.unsqueeze(-1).unsqueeze(-1), scale_dtype)
    halves = torch.arange(0, 32, 16, device=words_OPG.device, dtype=torch.int32)
    half_OGP2 = words_OPG.transpose(1, 2).unsqueeze(-1) >> halves
    bits: list[Tensor] = []
    for shift in (16, 12, 8, 4):
        magic_OGP2 = (half_OGP2 << shift) & (15 << 16) | (127 + 7) << 23
        weight_OGP2 = magic_OGP2.view(torch.float32) * scales_OG11 + offsets_OG11 * scales_OG11
        bits.append(weight_OGP2.to(dtype).view(torch.int16).to(torch.int32))
    low, high = ((second << 16) | (first & 0xFFFF) for first, second in (bits[:2], bits[2:]))
    return (high.to(torch.int64) << 32 | (low.to(torch.int64) & 0xFFFFFFFF)).flatten(1)
