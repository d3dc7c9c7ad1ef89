"""Attention of the new token of each row over a cache of a fixed size, of which it sees what the device's numbers say.

    by        where                                     kernels
    blocks    CUDA                                      FlexAttention: one; its parts are summed in the next one
    spans     CUDA, if heads share keys oddly or        flash attention: two, and three copies for several rows
              nothing is to be compiled
    masks     elsewhere                                 `model.attention` of a beginning of the cache

Blocks are faster than spans for every number of rows and context measured on an H100 (docs/performance.md).

Shapes: B rows, M positions in the cache, H query heads, J key/value heads, E size of one head, N blocks of a row.
"""

import logging
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, flex_attention
from torch.nn.functional import pad

from miniawq.model import LlamaConfig, attention

log = logging.getLogger(__name__)

# Keys of a block of FlexAttention's table, which is one step of its kernel.
BLOCK = 64
# The keys of a row are read in parts, each by one program for every key head. An H100 wants about 512 programs, but a
# part is a load more for every thread that sums them, so only those that it cannot do without may be more than 8.
WANTED_PROGRAMS, NEEDED_PROGRAMS, FEWEST_PARTS, MANY_PARTS, MOST_PARTS = 512, 128, 2, 8, 16


# Of the new token's position, the first position that each row sees, and the room of a row.
Look = Callable[[Tensor, Tensor, int], Any]


def first_seen(position_1: Tensor, padding_B: Tensor, window: int | None) -> Tensor:
    """The first position that the new token of each row sees: behind the padding, and of the last `window`."""
    return padding_B if window is None else torch.maximum(padding_B, position_1 + 1 - window)


def mask_of(position_1: Tensor, first_B: Tensor, end: int) -> Tensor:
    """What is seen among the first `end` positions of the cache, bool [B, 1, 1, M]."""
    key_M = torch.arange(end, device=first_B.device)
    return ((key_M <= position_1) & (key_M >= first_B[:, None]))[:, None, None]


def first_position(position_1: Tensor, first_B: Tensor, room: int) -> Tensor:
    """What is seen, for masks."""
    return first_B


class Blocks(NamedTuple):
    """What is seen, as FlexAttention takes it: positions, and a table of the blocks of the cache that hold them."""

    position_1: Tensor
    first_B: Tensor
    count_B11: Tensor
    index_B11N: Tensor


def blocks_of(position_1: Tensor, first_B: Tensor, room: int) -> Blocks:
    """From the first position of each row to the new token's, in a cache with room for `room`."""
    first_block_B = first_B // BLOCK
    count_B = position_1 // BLOCK + 1 - first_block_B
    # At least two blocks, because a dimension of size 1 would be compiled in.
    index_BN = first_block_B[:, None] + torch.arange(room // BLOCK + 2, device=first_B.device)
    return Blocks(position_1, first_B, count_B[:, None, None].int(), index_BN[:, None, None].int())


def block_attention(
    q_BHE: Tensor, keys_BMJE: Tensor, values_BMJE: Tensor, blocks: Blocks, parts: int | None = None
) -> Tensor:
    """[B, H, E]. Programs read parts of a row's blocks, each key once for the heads that share it.

    To be compiled with what follows it: with `layer.SUM_WHERE_READ`, the kernel that reads the parts sums them.
    """

    def sees(row: Tensor, _head: Tensor, _query: Tensor, position: Tensor) -> Tensor:
        return (position <= blocks.position_1[0]) & (position >= blocks.first_B[row])

    rows, room, kv_heads, _ = keys_BMJE.shape
    mask = BlockMask.from_kv_blocks(
        blocks.count_B11,
        blocks.index_B11N,
        BLOCK_SIZE=(128, BLOCK),
        mask_mod=sees,
        seq_lengths=(1, room),
        compute_q_blocks=False,
    )
    parts = parts or parts_for(rows * kv_heads)
    options: Any = {"SPLIT_KV": parts, "BLOCK_N": BLOCK, "num_warps": 4, "BLOCKS_ARE_CONTIGUOUS": True}
    q_BHLE, keys_BJME, values_BJME = q_BHE.unsqueeze(2), keys_BMJE.transpose(1, 2), values_BMJE.transpose(1, 2)
    return flex_attention(
        q_BHLE, keys_BJME, values_BJME, block_mask=mask, enable_gqa=True, kernel_options=options
    ).squeeze(2)


def parts_for(programs: int) -> int:
    """In how many parts keys are read, with so many programs for each part."""
    wanted = max(NEEDED_PROGRAMS // programs, min(MANY_PARTS, WANTED_PROGRAMS // programs))
    return min(MOST_PARTS, max(FEWEST_PARTS, wanted))


class Spans(NamedTuple):
    """What is seen, as flash attention takes it: int32, in slots of all rows' positions one behind the other."""

    rows_B1: Tensor  # 0, 1, .. B: the first query of each row, and an end
    starts_B1: Tensor  # the first slot of each row, and an end
    used_B: Tensor


def spans_of(position_1: Tensor, first_B: Tensor, room: int) -> Spans:
    """From the first position of each row to the new token's, in a cache with room for `room`."""
    rows_B1 = torch.arange(len(first_B) + 1, device=first_B.device, dtype=torch.int32)
    return Spans(rows_B1, (rows_B1 * room + pad(first_B, (0, 1))).int(), (position_1 + 1 - first_B).int())


def flash_attention(q_BHE: Tensor, keys_BMJE: Tensor, values_BMJE: Tensor, spans: Spans) -> Tensor:
    """[B, H, E]. The keys of a row are split among the processors, and each is read once for the heads that share it.

    `aten::_flash_attention_forward` finds the lengths on the device; its launches depend on the size of the cache only.
    """
    return torch.ops.aten._flash_attention_forward(
        q_BHE,
        keys_BMJE.flatten(0, 1),
        values_BMJE.flatten(0, 1),
        spans.rows_B1,
        spans.starts_B1,
        1,
        keys_BMJE.shape[1],
        0.0,
        False,
        False,
        seqused_k=spans.used_B,
    )[0]


def flash_attention_works(config: LlamaConfig, device: torch.device, dtype: torch.dtype) -> bool:
    """Whether this device and this torch compute it, shown by an example with padding and an end before the cache's."""
    if device.type != "cuda":
        return False
    heads, kv_heads, size, room, end = config.num_attention_heads, config.num_key_value_heads, config.head_dim, 512, 300
    generator = torch.Generator(device).manual_seed(0)
    q_BHE = torch.randn(2, heads, size, device=device, generator=generator).to(dtype)
    keys_BMJE, values_BMJE = torch.randn(2, 2, room, kv_heads, size, device=device, generator=generator).to(dtype)
    first_B, position_1 = torch.tensor([3, 290], device=device), torch.tensor([end - 1], device=device)
    spans, mask = spans_of(position_1, first_B, room), mask_of(position_1, first_B, end)
    keys_BJME, values_BJME = (cache_BMJE[:, :end].transpose(1, 2).float() for cache_BMJE in (keys_BMJE, values_BMJE))
    expected = attention(q_BHE.unsqueeze(2).float(), keys_BJME, values_BJME, mask).squeeze(2)
    try:
        error = (flash_attention(q_BHE, keys_BMJE, values_BMJE, spans) - expected).abs().max()
    except (RuntimeError, TypeError) as problem:
        log.info("attention by masks, not by lengths: %s", str(problem).splitlines()[0])
        return False
    if not (works := bool(error < 0.02)):
        log.warning("flash attention by lengths is wrong by %.3g on this device: attention by masks instead", error)
    return works


def looking_on(device: torch.device, config: LlamaConfig, dtype: torch.dtype, compiles: bool) -> Look:
    """How the fastest way of attending on this device takes what is seen.

    FlexAttention has its kernel for one query only if a power of two heads share a key.
    """
    shared = config.num_attention_heads // config.num_key_value_heads
    if device.type == "cuda" and compiles and shared.bit_count() == 1 and config.head_dim >= 16:
        return blocks_of
    return spans_of if flash_attention_works(config, device, dtype) else first_position
