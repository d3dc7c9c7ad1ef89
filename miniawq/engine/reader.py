"""Pieces of prompts through a model on a GPU: all between the products compiled, all together launched at once.

Products of many rows are the library's. What lies between them reads and writes the activations again and again; here
it is three functions, of a kernel or two each, for any number of tokens. Up to about a thousand tokens the host needs
longer to launch all this than the device to compute it, so the beginning of texts is recorded in CUDA graphs, one for
each number of rows and about each length, and replayed.

Shapes, beside the book's: T all tokens of a piece, B x L; U numbers.
"""

from collections.abc import Callable
from functools import lru_cache
from importlib import import_module
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import rms_norm, scaled_dot_product_attention

from miniawq.compiled import WORKSHOP, any_length, compile_with_forms, own_copy
from miniawq.engine.layer import added
from miniawq.engine.memory import PREFILL_CHUNK, kv_bytes_per_token, prefill_bytes
from miniawq.hardware import device_memory
from miniawq.model import (
    ACTIVATIONS,
    Attention,
    KVCache,
    Llama,
    LlamaConfig,
    Masks,
    RMSNorm,
    Rope,
    RopeConfig,
    Ropes,
    apply_rope,
    attention,
    outputs_of,
)

# How far what is compiled may be from the model, relative to its norm: a wrong form is off by about 1.
LARGEST_DIFFERENCE = {torch.float32: 1e-3, torch.float16: 0.1, torch.bfloat16: 0.2, torch.float8_e4m3fn: 0.3}
POSITIONS_TOGETHER = 64  # a recording has a multiple of so many
MOST_RECORDINGS = 16


class Between(NamedTuple):
    """The functions between the products, compiled or not."""

    turn: Callable[..., tuple[Tensor, Tensor]]
    gate: Callable[..., Tensor]
    add: Callable[..., tuple[Tensor, Tensor]]


class Recording(NamedTuple):
    """A graph that computes hidden_BLD of tokens_BL, and leaves keys and values of all layers in `cache`.

    It reads `positions`, tables and masks, where they are.
    """

    graph: torch.cuda.CUDAGraph
    tokens_BL: Tensor
    hidden_BLD: Tensor
    cache: KVCache
    positions: tuple[Ropes, Masks]


class PromptReader:
    """`read(tokens_BL, cache)`: hidden_BLD after the final norm, good until the next call; the cache moves on.

    Until `compile` has shown that the compiled functions are right, the model reads by itself. It takes seconds, so it
    is for steps that read many prompts.
    """

    def __init__(self, model: Llama) -> None:
        self.model, self.is_ready = model, False
        self.recordings: dict[tuple[int, int, int], Recording | None] = {}
        self.memory: Any = None  # of all recordings: only one is replayed at a time
        self.kept_U = torch.empty(0)  # the keys and values of any recording

    @torch.inference_mode()
    def compile(self) -> None:
        """Read by compiled functions from now on, if they are right."""
        key = "prompts", self.model.device, self.model.dtype, self.model.config
        self.is_ready = WORKSHOP.accepts(key, lambda *_: prove(self.model))

    @torch.inference_mode()
    def __call__(self, tokens_BL: Tensor, cache: KVCache) -> Tensor:
        rows, length = tokens_BL.shape
        filled = -(-length // POSITIONS_TOGETHER) * POSITIONS_TOGETHER
        begins = cache.length == 0 and cache.padding_B is None
        if self.is_ready and begins and length > 1 and rows * filled <= PREFILL_CHUNK:
            return self._beginning(tokens_BL, filled, cache)
        # A shorter piece would wait for the host, which launches plain operations faster than compiled functions.
        if self.is_ready and rows * length >= PREFILL_CHUNK:
            return read(self.model, compiled_between(self.model.config), tokens_BL, cache)
        hidden_BLD: Tensor = self.model.model(tokens_BL, cache)
        return hidden_BLD

    def _beginning(self, tokens_BL: Tensor, filled: int, cache: KVCache) -> Tensor:
        """Of texts: recorded when it is met again, because the first time prepares what a graph may not do.

        What fills it up to the recorded length comes after all that counts, and is written over before it is seen.
        """
        rows, length = tokens_BL.shape
        key = rows, filled, cache.max_seq_len  # some rotary frequencies depend on the last
        is_met, recording = key in self.recordings, self.recordings.pop(key, None)
        if is_met and recording is None and self._has_room(rows, filled):
            recording = self._recorded(*key)
        self.recordings[key] = recording  # as the last one that was used
        if len(self.recordings) > MOST_RECORDINGS:
            del self.recordings[next(iter(self.recordings))]
        if recording is None:
            return read(self.model, compiled_between(self.model.config), tokens_BL, cache)
        recording.tokens_BL[:, :length] = tokens_BL
        recording.graph.replay()
        made = recording.cache
        for kept_NBMJE, new_NBMJE in ((cache.keys_NBMJE, made.keys_NBMJE), (cache.values_NBMJE, made.values_NBMJE)):
            kept_NBMJE[:, :, :length] = new_NBMJE[:, :, :length]
        cache.length = length
        return recording.hidden_BLD[:, :length]

    def _has_room(self, rows: int, length: int) -> bool:
        """Recordings take what is free beside the plan, which does not count them, and leave as much again."""
        model = self.model
        kept = PREFILL_CHUNK * kv_bytes_per_token(model.config, model.dtype)
        needed = kept + prefill_bytes(model, model.dtype, model.device.type, rows, length)
        return device_memory(model.device).free > 2 * needed

    def _recorded(self, rows: int, length: int, room: int) -> Recording:
        model, config = self.model, self.model.config
        cache = KVCache(config, rows, length, device="meta", dtype=model.dtype)
        shape = torch.Size((2, *cache.keys_NBMJE.transpose(2, 3).shape))
        if not self.kept_U.numel():
            most = shape.numel() // (rows * length) * PREFILL_CHUNK
            self.kept_U = torch.empty(most, device=model.device, dtype=cache.keys_NBMJE.dtype)
        cache.keys_NBMJE, cache.values_NBMJE = self.kept_U[: shape.numel()].view(shape).transpose(3, 4).unbind()
        tokens_BL = torch.zeros(rows, length, dtype=torch.long, device=model.device)
        positions = model.model.positions(0, length, room, None)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self.memory):
            hidden_BLD = through(model, compiled_between(config), tokens_BL, *positions, cache)
        self.memory = graph.pool()
        return Recording(graph, tokens_BL, hidden_BLD, cache, positions)


def relative_difference(found: Tensor, expected: Tensor) -> float:
    """The norm of the difference in parts of that of what is expected, in float32."""
    return float((found.float() - expected.float()).norm() / expected.float().norm())


def prove(model: Llama) -> str:
    """Why the compiled functions are not to be used: two pieces of two texts come out otherwise. Empty if not."""
    tokens_BL = torch.arange(8, device=model.device).view(2, 4) % model.config.vocab_size
    caches = [KVCache(model.config, *tokens_BL.shape, device=model.device, dtype=model.dtype) for _ in range(2)]
    for piece_BL in tokens_BL.split(2, dim=1):
        found_BLD = read(model, compiled_between(model.config), piece_BL, caches[0])
        expected_BLD = model.model(piece_BL, caches[1])
    difference = relative_difference(found_BLD, expected_BLD)
    is_near = difference <= LARGEST_DIFFERENCE[model.dtype]
    return "" if is_near else f"hidden states differ by {difference:.3g} of their norm"


def read(model: Llama, between: Between, tokens_BL: Tensor, cache: KVCache) -> Tensor:
    """What `model.model(tokens_BL, cache)` computes."""
    new, padding_B = tokens_BL.shape[1], cache.padding_B
    end = cache.length + new
    ropes, masks = model.model.positions(cache.length, new, cache.max_seq_len, padding_B)
    if padding_B is None:
        masks = {window: None if (window or end) >= end else mask for window, mask in masks.items()}
    hidden_BLD = through(model, between, tokens_BL, ropes, masks, cache)
    cache.length = end
    return hidden_BLD


def through(model: Llama, between: Between, tokens_BL: Tensor, ropes: Ropes, masks: Masks, cache: KVCache) -> Tensor:
    """The tokens through embedding, blocks and final norm, block after block as `model.DecoderBlock`."""
    decoder, config, names, rows = model.model, model.config, model.config.names, tokens_BL.shape
    blocks: list[Any] = list(decoder.layers)
    ropes_T = {kind: tuple(of_tokens(table, rows) for table in rope) for kind, rope in ropes.items()}
    h_TD = decoder.embed(tokens_BL).flatten(0, 1)
    x_TD = blocks[0].named(names.before_attention)(h_TD)
    following = [*(block.named(names.before_attention) for block in blocks[1:]), decoder.norm]
    for block, next_norm, kind, window in zip(blocks, following, config.layer_ropes, config.layer_windows, strict=True):
        attn, mlp = block.self_attn, block.named(names.mlp)
        q_BHLE, k_BJLE, v_BJLE = (
            y.unflatten(0, rows).transpose(1, 2) for y in heads_of(between, attn, x_TD, ropes_T[kind])
        )
        seen = cache.append(attn.layer, k_BJLE, v_BJLE)
        y_BHLE = attended(q_BHLE, *seen, masks[window], config.attention_multiplier)
        y_TD = attn.o_proj(y_BHLE.transpose(1, 2).flatten(2).flatten(0, 1))
        after, before_mlp = block.named(names.after_attention), block.named(names.before_mlp)
        h_TD, x_TD = between.add(config, h_TD, y_TD, gain_of(after), gain_of(before_mlp))
        gate_TF, up_TF = outputs_of([getattr(mlp, name) for name in names.gate_up], x_TD, mlp.widths)
        y_TD = getattr(mlp, names.down)(between.gate(config.hidden_act, gate_TF, up_TF))
        h_TD, x_TD = between.add(config, h_TD, y_TD, gain_of(block.named(names.after_mlp)), gain_of(next_norm))
    return x_TD.unflatten(0, rows)


def attended(q_BHLE: Tensor, k_BJME: Tensor, v_BJME: Tensor, mask: Tensor | None, scale: float | None) -> Tensor:
    """As `model.attention`, and with no mask also after earlier positions: the library knows which are seen."""
    if mask is not None or q_BHLE.shape[2] == k_BJME.shape[2]:
        return attention(q_BHLE, k_BJME, v_BJME, mask, scale)
    # Importing it settles where Inductor keeps what it compiles, and takes a second.
    seen = import_module("torch.nn.attention.bias").causal_lower_right(q_BHLE.shape[2], k_BJME.shape[2])
    return scaled_dot_product_attention(q_BHLE, k_BJME, v_BJME, attn_mask=seen, scale=scale, enable_gqa=True)


def of_tokens(table: Tensor, rows: torch.Size) -> Tensor:
    """A rotary table [L, E] of all rows, or [B, 1, L, E], as [T, 1, E]."""
    table_BLE = table.squeeze(1) if table.dim() == 4 else table.expand(*rows, -1)
    return table_BLE.reshape(-1, 1, table.shape[-1])


def heads_of(between: Between, attn: Attention, x_TD: Tensor, rope_T: Rope) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values, the first two normed, if the family does that, and turned."""
    config, names = attn.config, attn.config.names
    projected = outputs_of([getattr(attn, name) for name in names.qkv], x_TD, attn.widths)
    q_THE, k_TJE, v_TJE = (y_TO.unflatten(-1, (-1, config.head_dim)) for y_TO in projected)
    norm_q, norm_k = (getattr(attn, name) for name in (names.q_norm, names.k_norm))
    if config.qk_norm == "turned heads":
        q_THE, k_TJE = between.turn(config.rope, q_THE, k_TJE, rope_T)
        return norm_q(q_THE), norm_k(k_TJE), v_TJE
    return (*between.turn(config.rope, norm_q(q_THE), norm_k(k_TJE), rope_T), v_TJE)


def gain_of(norm: nn.Module) -> Tensor | None:
    """None where a family has no norm."""
    return norm.gain if isinstance(norm, RMSNorm) else None


def turn(pairs: RopeConfig, q_THE: Tensor, k_TJE: Tensor, rope_T: Rope) -> tuple[Tensor, Tensor]:
    """Queries and keys turned to their positions."""
    return apply_rope(q_THE, rope_T, pairs), apply_rope(k_TJE, rope_T[:2], pairs)


def gate(activation: str, gate_TF: Tensor, up_TF: Tensor) -> Tensor:
    """What an MLP's last product takes."""
    return ACTIVATIONS[activation](gate_TF) * up_TF


def add(
    config: LlamaConfig, h_TD: Tensor, y_TD: Tensor, after_D: Tensor | None, following_D: Tensor | None
) -> tuple[Tensor, Tensor]:
    """The residual stream with what attention or MLP adds to it, and the same normed for what follows."""
    h_TD = added(config, h_TD, y_TD, after_D)
    return h_TD, h_TD if following_D is None else rms_norm(h_TD, following_D.shape, following_D, config.rms_norm_eps)


UNCOMPILED = Between(turn, gate, add)


@lru_cache(maxsize=8)
def compiled_between(config: LlamaConfig) -> Between:
    """For models of one shape, and any number of tokens; once in a process."""

    def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
        return compile_with_forms(own_copy(function), (), of_any_tokens)

    return Between(*map(compiled, UNCOMPILED))


def of_any_tokens(*arguments: Any) -> tuple[Any, ...]:
    """The arguments, with the first dimension of all that is not a norm's gain marked."""
    return tuple(
        of_any_tokens(*part)
        if type(part) is tuple
        else any_length(part)
        if isinstance(part, Tensor) and part.dim() > 1
        else part
        for part in arguments
    )
