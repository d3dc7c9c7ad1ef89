"""Attention of each row's new token over a cache of a fixed size. Numbers on the device say which positions it sees.

by        where                          kernels
blocks    CUDA, compiled                 FlexAttention: one; the kernel that reads its parts adds them
a mask    elsewhere                      `model.attention` of the beginning of the cache
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, flex_attention
from torch.nn.functional import pad

BLOCK = 64  # keys of a block of FlexAttention's table
SMALLEST_HEAD = 16  # channels that FlexAttention's kernel can multiply
# The keys of a row are read in parts, each by one program for every key head: as many as an H200 runs at once, which
# are so many where a key and its value have so many bytes.
PROGRAMS, BYTES_OF_A_KEY, MOST_PARTS = 256, 512, 16
# A program loads blocks ahead into shared memory. That of the smallest cards has 99 KiB.
LOADED_AHEAD, MOST_STAGES = 96 * 1024, 4


def first_seen(position_B: Tensor, padding_B: Tensor, window: int | None) -> Tensor:
    """The first position that the new token of each row sees: after the padding, and of the last `window`."""
    return padding_B if window is None else torch.maximum(padding_B, position_B + 1 - window)


def mask_of(position_B: Tensor, first_B: Tensor, end: int) -> Tensor:
    """What is seen among the first `end` positions of the cache, bool [B, 1, 1, M]."""
    key_M = torch.arange(end, device=first_B.device)
    return ((key_M <= position_B[:, None]) & (key_M >= first_B[:, None]))[:, None, None]


class Blocks(NamedTuple):
    """What is seen, as FlexAttention takes it: positions, and a table of the blocks of the cache that hold them."""

    position_B: Tensor
    first_B: Tensor
    block_count: Tensor
    block_index: Tensor


def blocks_of(position_B: Tensor, first_B: Tensor, room: int) -> Blocks:
    """From the first position of each row to its new token's, in a cache with room for `room`."""
    first_block_B = first_B // BLOCK
    count_B = position_B // BLOCK + 1 - first_block_B
    # At least two blocks, because a dimension of size 1 would be compiled in.
    blocks_of_rows = first_block_B[:, None] + torch.arange(room // BLOCK + 2, device=first_B.device)
    return Blocks(position_B, first_B, count_B[:, None, None].int(), blocks_of_rows[:, None, None].int())


def block_attention(
    q_BHE: Tensor,
    keys_XMJE: Tensor,
    values_XMJE: Tensor,
    blocks: Blocks,
    scale: float | None = None,
) -> Tensor:
    """[B, H, E], of rows with keys of their own or all with the same. Programs read parts of a row's blocks, each key
    once for the heads that share it.

    FlexAttention has a kernel for one query only where a power of two heads share a key, so heads of zeros are added.
    To be compiled with what follows it: with `layer.SUM_WHERE_READ`, the kernel that reads the parts sums them.
    """

    def sees(row: Tensor, _head: Tensor, _query: Tensor, position: Tensor) -> Tensor:
        return (position <= blocks.position_B[row]) & (position >= blocks.first_B[row])

    rows, (_, room, kv_heads, _) = len(q_BHE), keys_XMJE.shape
    mask = BlockMask.from_kv_blocks(
        blocks.block_count,
        blocks.block_index,
        BLOCK_SIZE=(128, BLOCK),
        mask_mod=sees,
        seq_lengths=(1, room),
        compute_q_blocks=False,
    )
    bytes_of_a_key = 2 * keys_XMJE.shape[3] * keys_XMJE.itemsize
    options: Any = {"num_warps": 4, "BLOCKS_ARE_CONTIGUOUS": True, **cut_keys(rows * kv_heads, bytes_of_a_key)}
    keys_XJME, values_XJME = keys_XMJE.transpose(1, 2), values_XMJE.transpose(1, 2)
    shared = q_BHE.shape[1] // kv_heads
    extra = (1 << (shared - 1).bit_length()) - shared
    if extra:
        q_BHE = pad(q_BHE.unflatten(1, (kv_heads, shared)), (0, 0, 0, extra)).flatten(1, 2)
    y_BHE = flex_attention(
        q_BHE.unsqueeze(2),
        keys_XJME,
        values_XJME,
        block_mask=mask,
        scale=scale,
        enable_gqa=True,
        kernel_options=options,
    ).squeeze(2)
    return y_BHE.unflatten(1, (kv_heads, -1))[:, :, :shared].flatten(1, 2) if extra else y_BHE


def cut_keys(programs: int, bytes_of_a_key: int) -> dict[str, int]:
    """How keys are read, with so many programs for each part: in how many parts, keys of a step, and steps ahead.

    More programs than run at once take smaller steps, so that more of them fit a multiprocessor.
    """
    at_once = PROGRAMS * BYTES_OF_A_KEY // bytes_of_a_key
    keys = BLOCK if programs <= at_once else BLOCK // 2
    return {
        "SPLIT_KV": min(MOST_PARTS, max(1, at_once // programs)),
        "BLOCK_N": keys,
        "num_stages": min(MOST_STAGES, max(1, LOADED_AHEAD // (keys * bytes_of_a_key))),
    }
