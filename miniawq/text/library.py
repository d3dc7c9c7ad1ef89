"""The `tokenizers` library, held: its panics are errors, and what a tokenizer.json makes of a text is bounded.

A tokenizer.json is a small program from a stranger: a chain of replacements can double a text forty times, and an
expression can look at it for hours. So before a text goes in, its length times the growth that the file's parts state
has a limit; a call has a limit of time (a thread that takes longer is left behind); and the text of one id has a limit
of length.
"""

import base64
import json
import math
import mmap
import os
import re
import threading
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import tokenizers

from miniawq.checkpoint.strict import limit_of, read_small
from miniawq.errors import DoesNotFit, InvalidInput, MiniawqError, UnsupportedCheckpoint

MAX_CHARACTERS = 1 << 28  # of a text, as far as the normalizer may make it grow
MAX_GROWTH = 1024
MAX_DECODED_GROWTH = 16
MAX_CHARACTERS_PER_ID = 1 << 14
MAX_POST_PROCESSOR_BYTES = 1 << 14
MAX_AFFIX = 64
SECONDS, CHARACTERS_PER_SECOND = 10.0, 20_000
BYTES_PER_FILE_BYTE = 16  # of memory, while a tokenizer.json is read
STDERR = 2
FIX = "take tokenizer.json from the original model"
# A prefix that is not empty, or letters written as escapes, which could spell one.
PREFIXED = re.compile(rb'"continuing_subword_prefix"\s*:\s*(?!null|"")|\\u00[4-7]')


class HeldTokenizer:
    """A `tokenizers.Tokenizer` read from a file. What only a damaged or hostile one does is UnsupportedCheckpoint."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._require_memory(BYTES_PER_FILE_BYTE * min(path.stat().st_size, limit_of(path.name)))
        content = read_small(path)
        self._check_prefix(content)
        self.raw = self._guarded(lambda: tokenizers.Tokenizer.from_buffer(content))
        # Some checkpoints keep the length limits of their training script, which would cut a prompt silently.
        self.raw.no_truncation()
        self.raw.no_padding()
        if getattr(self.raw.model, "dropout", None):
            self.raw.model.dropout = None  # also of training: a text would be cut at random
        self.growth = self._guarded(self._check_parts)

    def _require_memory(self, wanted: int) -> None:
        """DoesNotFit if the system does not give so much memory; the library would end the process."""
        try:
            mmap.mmap(-1, wanted + 1).close()  # address space alone: nothing is written
        except (OSError, OverflowError) as error:
            why = f"{self.path} takes {wanted >> 20} MiB of memory while it is read"
            raise DoesNotFit("the tokenizer does not fit", why, "raise the limit of memory (ulimit -v)") from error

    def _check_prefix(self, content: bytes) -> None:
        """Refuse a prefix of continued words: where it cuts a character of a merge, the library ends the process.

        The models that are read here have none.
        """
        found: list[Any] = []
        if PREFIXED.search(content):
            take = lambda pairs: found.extend(value for key, value in pairs if key == "continuing_subword_prefix")  # noqa: E731
            self._guarded(lambda: json.loads(content, object_pairs_hook=take))
        if any(found):
            raise self._refusal("it has a continuing_subword_prefix, which no tokenizer of this family has")

    def _check_parts(self) -> float:
        """How many times as long a text can become on its way in."""
        raw = self.raw
        processor = raw.post_processor
        if processor is not None and len(processor.__getstate__()) > MAX_POST_PROCESSOR_BYTES:
            raise self._refusal("what its post_processor puts around a text is too long")
        for name in ("continuing_subword_prefix", "end_of_word_suffix", "prefix", "suffix"):
            if len(getattr(raw.model, name, None) or "") > MAX_AFFIX:
                raise self._refusal(f"its {name} has more than {MAX_AFFIX} characters")
        self._has_expression = b'"Regex"' in (raw.decoder.__getstate__() if raw.decoder else b"")
        coming, going = growth_of(raw.normalizer) * growth_of(raw.pre_tokenizer), growth_of(raw.decoder)
        if coming > MAX_GROWTH or going > MAX_DECODED_GROWTH:
            raise self._refusal(f"it can make a text {max(coming, going):.0f} times as long")
        return coming

    def encode(self, text: str, add_special_tokens: bool = False) -> tokenizers.Encoding:
        """The encoding of a text. Raises InvalidInput on text that is not Unicode, or too long."""
        if len(text) * self.growth > MAX_CHARACTERS:
            why = f"it has {len(text)} characters; the limit is {int(MAX_CHARACTERS / self.growth)}"
            raise InvalidInput("the text is too long for the tokenizer", why, "give it in parts")
        # The fast call leaves out the place of each id in the text, which takes longer to find than the ids.
        call = self.raw.encode_batch if add_special_tokens else self.raw.encode_batch_fast
        seconds = SECONDS + len(text) * self.growth / CHARACTERS_PER_SECOND
        try:
            return self._timed(lambda: call([text], add_special_tokens=add_special_tokens)[0], seconds)
        except TypeError as error:
            raise InvalidInput("the text is not valid Unicode", "it holds half of a surrogate pair") from error

    def decode(self, ids: Sequence[int], skip_special_tokens: bool) -> str:
        """The text of ids. Raises InvalidInput on numbers that are no ids."""
        try:
            if self._has_expression:
                work = lambda: self.raw.decode_batch([list(ids)], skip_special_tokens)[0]  # noqa: E731
                text = self._timed(work, SECONDS + len(ids) / CHARACTERS_PER_SECOND)
            else:
                text = self._guarded(lambda: self.raw.decode(list(ids), skip_special_tokens))
        except (OverflowError, TypeError) as error:
            raise InvalidInput("these are not the ids of tokens", str(error)) from error
        if len(text) > MAX_CHARACTERS_PER_ID * len(ids):
            raise self._refusal(f"its tokens have more than {MAX_CHARACTERS_PER_ID} characters")
        return text

    def _timed(self, work: Callable[[], Any], seconds: float) -> Any:
        """What `work` gives, in another thread so that we can go on without it."""
        given: list[Any] = []
        failed: list[BaseException] = []

        def body() -> None:
            try:
                given.append(work())
            except BaseException as error:
                failed.append(error)

        thread = threading.Thread(target=body, daemon=True)
        with silence:
            thread.start()
            thread.join(seconds)
        if thread.is_alive():
            raise self._refusal(f"it takes longer than {seconds:.0f} seconds for a text")
        return self._guarded(lambda: given[0] if given else _raise(failed[0]))

    def _guarded(self, work: Callable[[], Any]) -> Any:
        """What `work` gives; a panic of the library, which is not even an Exception, becomes a refusal."""
        try:
            with silence:
                return work()
        except (MiniawqError, MemoryError, TypeError, OverflowError):
            raise
        except Exception as error:  # the library raises plain Exception
            raise self._refusal(str(error)) from error
        except BaseException as error:
            if isinstance(error, KeyboardInterrupt | SystemExit | GeneratorExit):
                raise
            raise self._refusal(f"{type(error).__name__}: {error}") from error

    def _refusal(self, why: str) -> UnsupportedCheckpoint:
        return UnsupportedCheckpoint(f"cannot read {self.path}", why, FIX)


class Silence:
    """Turns stderr away: when the library panics it writes pages to it, and the error is told by us.

    The stream is that of the whole process. The first thread within turns it away, the last one turns it back.
    """

    def __init__(self) -> None:
        self._lock, self._within, self._stderr = threading.Lock(), 0, -1

    def __enter__(self) -> None:
        with self._lock:
            if self._within == 0:
                with suppress(OSError):  # a process may have no stderr
                    self._stderr = os.dup(STDERR)
                    nowhere = os.open(os.devnull, os.O_WRONLY)
                    os.dup2(nowhere, STDERR)
                    os.close(nowhere)
            self._within += 1

    def __exit__(self, *_: object) -> None:
        with self._lock:
            self._within -= 1
            if self._within == 0 and self._stderr >= 0:
                os.dup2(self._stderr, STDERR)
                os.close(self._stderr)
                self._stderr = -1


silence = Silence()


def _raise(error: BaseException) -> Any:
    raise error


def growth_of(part: Any) -> float:
    """How many times as long a text can become in a normalizer, pre-tokenizer or decoder, at most.

    Unicode's normal forms, lower case and the like count as 1: nothing grows by them twice.
    """
    return 1.0 if part is None else _growth(json.loads(part.__getstate__()))


def _growth(part: Any) -> float:
    match part:
        case {"type": "Replace", "pattern": {"String": str(old)}, "content": str(new)} if old:
            return max(1.0, len(new) / len(old))
        case {"type": "Replace", "content": str(new)}:
            return 1.0 + len(new)  # An expression can match between characters.
        case {"type": "Prepend", "prepend": str(new)}:
            return 1.0 + len(new)
        case {"type": "Precompiled", "precompiled_charsmap": str(encoded)}:
            packed = base64.b64decode(encoded)
            texts = packed[4 + int.from_bytes(packed[:4], "little") :].split(b"\0")
            return float(max(1, *map(len, texts))) if len(texts) > 1 else 1.0
        case {"type": "ByteLevel"}:
            return 2.0
        case dict():
            return math.prod(map(_growth, part.values()))
        case list():
            return math.prod(map(_growth, part))
    return 1.0
