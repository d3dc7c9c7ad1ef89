"""Sources, text to calibrate on, and what a run of quantize wrote, to compare with another run's."""

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from miniawq.checkpoint.shards import ShardWriter
from miniawq.quantize.calibration import Calibration
from tests.helpers import DATA
from tests.helpers.tiny_checkpoints import make_dense


def make_source(directory: Path, **changes: Any) -> Path:
    """A small dense checkpoint with the tokenizer of the demo model."""
    make_dense(directory, **{"vocab_size": 2048} | changes)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (directory / name).write_bytes((DATA / "fairytales" / name).read_bytes())
    return directory


def some_text(rows: int = 3, length: int = 9, vocabulary: int = 48) -> Calibration:
    tokens_BL = torch.randint(vocabulary, (rows, length), generator=torch.Generator().manual_seed(3))
    return Calibration(tokens_BL, "random ids", tokens_BL.numel())


class Killed(BaseException):
    """The end of a run, which nothing catches."""


@contextmanager
def killed(is_last: Callable[[ShardWriter, str], bool]) -> Iterator[None]:
    """The run in the `with` block dies when it is about to write a tensor of which `is_last` is true."""
    write = ShardWriter.write

    def dying(writer: ShardWriter, name: str, tensor: Tensor) -> None:
        if is_last(writer, name):
            raise Killed
        write(writer, name, tensor)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ShardWriter, "write", dying)
        with pytest.raises(Killed):
            yield


def contents(directory: Path) -> dict[str, Any]:
    """Every file but what a picture or a clock decides."""
    files = {path.name: path.read_bytes() for path in sorted(directory.iterdir()) if path.suffix != ".png"}
    told = json.loads(files.pop("quantization_report.json"))
    for timed in (told, *told["blocks"]):
        timed.pop("seconds")
    del told["peak_memory_bytes"], told["peak_device_bytes"]
    return files | {"report": told}
