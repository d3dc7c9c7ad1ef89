"""Calibration text: read from a file, packed into windows of equal length, or sampled from the model itself."""

import hashlib
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from miniawq.checkpoint.opening import Checkpoint
from miniawq.errors import InvalidInput
from miniawq.model import KVCache, Llama
from miniawq.quantize.memory import SAMPLED_ROWS
from miniawq.text.plain import read_text
from miniawq.text.tokenizer import Tokenizer

BEGINNING = 64  # tokens of a given text that the model goes on from; of a short window half
TEMPERATURE = 1.2  # at which it writes: at 1 it leaves out what is rare (docs/log/own-text.md)


@dataclass(frozen=True)
class Calibration:
    """Windows of token ids [B, L] (int64), their source, and how many tokens were found there."""

    tokens_BL: Tensor
    source: str
    tokens_found: int

    @property
    def sha256(self) -> str:
        """A hash of the ids and their shape; reports and journals name the text by it."""
        return hashlib.sha256(f"{tuple(self.tokens_BL.shape)}{self.tokens_BL.tolist()}".encode()).hexdigest()

    def summary(self) -> dict[str, Any]:
        return {
            "source": self.source,
            "samples": self.tokens_BL.shape[0],
            "sequence_length": self.tokens_BL.shape[1],
            "tokens_used": self.tokens_BL.numel(),
            "tokens_found": self.tokens_found,
            "sha256": self.sha256,
        }


def read_calibration(path: str, tokenizer: Tokenizer, num_samples: int, sequence_length: int) -> Calibration:
    """Windows from a `.txt` file, a `.jsonl` file, or `-` for plain text on stdin.

    A line of a `.jsonl` file holds `text`, or `messages` that go through the model's chat template. All texts are
    joined and cut into windows; when there are more tokens than asked for, the windows are spread evenly over them.
    InvalidInput names the line that cannot be read; NotFound when there is no such file.
    """
    _check_file(path)
    texts = list(_texts(path, tokenizer))
    # A text of nothing but blanks would be calibrated on its BOS.
    some = texts if any(text.strip() for text, _ in texts) else []
    ids = [token for text, special in some for token in tokenizer.encode(text, special)]
    return Calibration(windows(ids, num_samples, sequence_length, path), path, len(ids))


def _check_file(path: str) -> None:
    """InvalidInput on what may have no end, or wait for one forever.

    What a shell puts in the place of `<(command)` is a pipe below /dev/fd, and has an end.
    """
    if path == "-" or path.startswith(("/dev/fd/", "/proc/self/fd/")) or not os.path.exists(path):
        return
    if not os.path.isfile(path) and not os.path.isdir(path):
        raise InvalidInput(f"{path} is no file", "it is a pipe or a device", "write the text into a file, or give -")


def windows(ids: list[int], num_samples: int, sequence_length: int, source: str = "the text") -> Tensor:
    """At most `num_samples` windows [B, L] of `sequence_length` ids, spread evenly from the first id to the last.

    Where there are fewer ids than asked for, the windows overlap so that every id is in one; a text shorter than one
    window gives one shorter window. They are shuffled, always in the same way, so that the first few are a sample of
    the whole text.
    InvalidInput on an empty text.
    """
    if not ids:
        raise InvalidInput(
            f"{source} holds no calibration text", "it has no tokens", "give some paragraphs like the model's daily use"
        )
    length = min(sequence_length, len(ids))
    count = min(num_samples, -(-len(ids) // length))
    last = len(ids) - length
    starts = [round(last * index / max(1, count - 1)) for index in range(count)]
    order = torch.randperm(count, generator=torch.Generator().manual_seed(0))
    return torch.tensor([ids[start : start + length] for start in starts])[order]


def check_text(checkpoint: Checkpoint, calibration: Calibration) -> None:
    """InvalidInput when the model cannot read the text: ids beyond its vocabulary, windows beyond its context."""
    config, tokens_BL = checkpoint.model_config, calibration.tokens_BL
    if not 0 <= int(tokens_BL.min()) <= int(tokens_BL.max()) < config.vocab_size:
        worst = int(tokens_BL.max()) if int(tokens_BL.min()) >= 0 else int(tokens_BL.min())
        why, fix = f"config.json: vocab_size = {config.vocab_size}", "the tokenizer belongs to another model"
        raise InvalidInput(f"token id {worst} is outside the model's vocabulary", why, fix)
    check_length(checkpoint, tokens_BL.shape[1])


def check_length(checkpoint: Checkpoint, length: int) -> None:
    """InvalidInput when a window of text is longer than the model's context."""
    longest = checkpoint.model_config.max_position_embeddings
    if length > longest:
        raise InvalidInput(
            f"windows of {length} tokens are longer than the model's context",
            f"config.json: max_position_embeddings = {longest}",
            f"give --sequence-length {longest} or less",
        )


def _texts(path: str, tokenizer: Tokenizer) -> Iterator[tuple[str, bool]]:
    """Pairs of a text and whether the tokenizer adds its special tokens (a chat template writes its own)."""
    if not path.endswith(".jsonl"):
        yield read_text(path), True
        return
    for number, line in enumerate(read_text(path).split("\n"), start=1):
        if line.strip():
            yield _text_of(line, f"{path}, line {number}", tokenizer)


def _text_of(line: str, where: str, tokenizer: Tokenizer) -> tuple[str, bool]:
    try:
        record = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise InvalidInput(
            f"{where} is not JSON", str(error), "a .jsonl file has one JSON object on each line"
        ) from error
    match record:
        case {"text": str(text)}:
            return text, True
        case {"messages": list(messages)}:
            return tokenizer.render_chat(messages, add_generation_prompt=False), False
    raise InvalidInput(
        f"{where} has neither a `text` nor a `messages` key",
        "calibration reads these two",
        'write lines such as {"text": "..."}',
    )


def sample_calibration(
    model: Llama, tokenizer: Tokenizer, num_samples: int, sequence_length: int, seed: int = 0
) -> Calibration:
    """Windows that the model writes itself, at `TEMPERATURE` from its first token on.

    Every window begins with the BOS token, or with any token of the vocabulary for a model that has none.
    """
    generator = torch.Generator().manual_seed(seed)
    if tokenizer.bos_id is None:
        first_B1 = torch.randint(model.config.vocab_size, (num_samples, 1), generator=generator)
    else:
        first_B1 = torch.full((num_samples, 1), tokenizer.bos_id)
    tokens_BL = _continued(model, first_B1, sequence_length, generator)
    return Calibration(tokens_BL, f"sampled from the model, seed {seed}", tokens_BL.numel())


def add_own_windows(given: Calibration, model: Llama, count: int, seed: int = 0) -> Calibration:
    """The windows given, and `count` more, in each of which the model goes on from a piece of a given one."""
    generator = torch.Generator().manual_seed(seed)
    rows, length = given.tokens_BL.shape
    size = min(BEGINNING, max(1, length // 2))
    places = torch.randint(length - size + 1, (count,), generator=generator).tolist()
    pieces_BL = torch.stack(
        [given.tokens_BL[number % rows, place : place + size] for number, place in enumerate(places)]
    )
    own_BL = _continued(model, pieces_BL, length, generator)
    source = f"{given.source}, and {count} windows sampled from the model, seed {seed}"
    return Calibration(torch.cat((given.tokens_BL, own_BL)), source, given.tokens_found)


def _continued(model: Llama, tokens_BL: Tensor, length: int, generator: torch.Generator) -> Tensor:
    rows = tokens_BL.split(SAMPLED_ROWS)
    return torch.cat([_continue(model, some_BL, length, generator) for some_BL in rows])


@torch.inference_mode()
def _continue(model: Llama, tokens_BL: Tensor, length: int, generator: torch.Generator) -> Tensor:
    cache = KVCache(model.config, len(tokens_BL), length, device=model.device, dtype=model.dtype)
    unread_BL = tokens_BL
    while tokens_BL.shape[1] < length:
        logits_BV = model.last_logits(unread_BL.to(model.device), cache).float().cpu() / TEMPERATURE
        if not logits_BV.isfinite().all():
            why = "its next token cannot be drawn from NaN or infinity"
            raise InvalidInput("the model cannot write calibration text", why, "give a text with --calib FILE")
        # Drawn on the CPU, so that a seed means the same text on every device up to rounding.
        unread_BL = torch.multinomial(logits_BV.softmax(-1), 1, generator=generator)
        tokens_BL = torch.cat((tokens_BL, unread_BL), dim=1)
    return tokens_BL
