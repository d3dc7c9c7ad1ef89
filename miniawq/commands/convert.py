"""`miniawq convert SOURCE DESTINATION --format FORMAT`: one INT4 layout to another, losslessly, or to dense weights.

Codes, scales and zeros are moved, not computed again: the weights stay equal bit for bit, and the way back gives the
same bytes. One layer is in memory at a time. Only llama.cpp's blocks, whose zeros have 16 bits together with the scale,
may move weights a little (`gguf_file.py`).
"""

import argparse
import json
import logging
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from miniawq import cli
from miniawq.checkpoint.background import ahead
from miniawq.checkpoint.blocks import place_stored, read_stored
from miniawq.checkpoint.hub import add_hub_flags, hub_options
from miniawq.checkpoint.layouts import LAYOUTS, part_shapes
from miniawq.checkpoint.opening import Checkpoint, open_checkpoint
from miniawq.checkpoint.publishing import check_disk, published, published_file
from miniawq.checkpoint.quant_config import CONFIG_KEYS, PACKED_HEADS, awq_block, compressed_tensors_block
from miniawq.checkpoint.shards import SHARD_BYTES, ShardWriter, Spec, write_json
from miniawq.checkpoint.unchanged import check_side_files, copy_side_files, side_digests
from miniawq.commands.gguf_file import require_gguf, write_gguf
from miniawq.errors import InvalidInput, UsageError
from miniawq.hardware import pick_device, roomiest
from miniawq.packing import CODES_PER_WORD, SYMMETRIC_ZERO, Quantized, dequantize
from miniawq.quantize.verify import check_digests, has_tokenizer
from miniawq.text.tokenizer import Tokenizer

log = logging.getLogger("miniawq.convert")

FORMATS = ("awq", "compressed-tensors", "dense", "gguf")
EXAMPLES = (
    "miniawq convert my-awq my-ct --format compressed-tensors",
    "miniawq convert Qwen/Qwen3-8B-AWQ qwen3-dense --format dense",
    "miniawq convert my-awq my-model.gguf",
)
BYTES_A_WEIGHT = 4  # that unpacking and packing a layer take at most


@dataclass(frozen=True)
class Conversion:
    """What `convert_checkpoint` did."""

    source_layout: str
    layout: str
    packed_linears: int
    unpacked_linears: list[str]
    tensors: int
    nbytes: int
    seconds: float
    largest_move: float  # of a weight, in scales of its group; 0 but for llama.cpp's blocks


def convert_checkpoint(
    source: str | Path | Checkpoint | None,
    destination: str | Path,
    format: str,
    *,
    shard_bytes: int = SHARD_BYTES,
    device: torch.device | str = "cpu",
) -> Conversion:
    """Write `source` to the new directory `destination` as "awq", "compressed-tensors" or "dense", or to a file "gguf".

    It appears when it is complete. AutoAWQ words hold eight outputs, llama.cpp's blocks 32 inputs of one group: other
    layers become dense in these formats. InvalidInput if the source is not quantized, or the format cannot hold its
    group sizes; UsageError without the package `gguf`.
    """
    started = time.monotonic()
    checkpoint = source if isinstance(source, Checkpoint) else open_checkpoint(source)
    if not checkpoint.quantized:
        raise InvalidInput(
            f"{checkpoint.directory} is not quantized", "convert moves INT4 codes", "run miniawq quantize on it"
        )
    device, largest_move = torch.device(device), 0.0
    if format == "gguf":
        require_gguf()
        with published_file(destination) as path:
            checkpoint = checkpoint.fetched()
            layout = "Q4_0" if _is_symmetric(checkpoint) else "Q4_1"
            packed, sizes, largest_move = write_gguf(checkpoint, path, layout, list(_pieces(checkpoint)), device)
    else:
        with published(destination) as directory:
            checkpoint = checkpoint.fetched()
            layout = _layout(checkpoint, format)
            packed = _packed_linears(checkpoint, layout)
            sizes = [spec.nbytes for spec in _write(checkpoint, directory, layout, packed, shard_bytes, device)]
    return Conversion(
        source_layout=next(iter(checkpoint.quantized.values())).layout,
        layout=layout,
        packed_linears=len(packed),
        unpacked_linears=sorted(checkpoint.quantized.keys() - packed),
        tensors=len(sizes),
        nbytes=sum(sizes),
        seconds=time.monotonic() - started,
        largest_move=largest_move,
    )


def _write(
    checkpoint: Checkpoint, directory: Path, layout: str, packed: set[str], shard_bytes: int, device: torch.device
) -> list[Spec]:
    """Write the whole checkpoint and read it again; returns what tensors it has."""
    sides, readable = side_digests(checkpoint), has_tokenizer(checkpoint.directory)
    copy_side_files(checkpoint, directory)
    pieces = list(_pieces(checkpoint))
    specs = [spec for name, leaf in pieces for spec in _specs(checkpoint, name, leaf, layout, packed)]
    check_disk(directory, sum(spec.nbytes for spec in specs))
    with ShardWriter(directory, specs, shard_bytes) as writer:
        tensors = (
            pair
            for name, leaf in tqdm(pieces, desc="converting", unit="tensor", disable=None)
            for pair in _tensors(checkpoint, name, leaf, layout, packed, device)
        )
        for name, tensor in ahead(tensors):
            writer.write(name, tensor)
        writer.finish()
    write_json(directory / "config.json", _config(checkpoint, layout, packed))
    check_digests(open_checkpoint(directory), writer.digests)
    check_side_files(checkpoint, directory, sides)
    if readable:
        Tokenizer(directory)
    return specs


def _layout(checkpoint: Checkpoint, format: str) -> str:
    """The name in LAYOUTS: compressed-tensors has a layout without zeros for checkpoints whose zeros are all 8."""
    if format not in FORMATS:
        raise InvalidInput(f"there is no format {format!r}", f"known: {', '.join(FORMATS)}")
    return f"{format}-symmetric" if format == "compressed-tensors" and _is_symmetric(checkpoint) else format


def _is_symmetric(checkpoint: Checkpoint) -> bool:
    """Whether the zeros of all layers are 8."""
    return all(_has_only_eights(checkpoint, name) for name in checkpoint.quantized)


def _has_only_eights(checkpoint: Checkpoint, name: str) -> bool:
    if checkpoint.quantized[name].symmetric:
        return True
    quantized = checkpoint.read_linear(name)
    assert isinstance(quantized, Quantized)
    return bool((quantized.zeros_OG == SYMMETRIC_ZERO).all())


def _packed_linears(checkpoint: Checkpoint, layout: str) -> set[str]:
    if layout == "dense":
        return set()
    fitting = {"awq": lambda outputs: outputs % CODES_PER_WORD == 0}.get(layout, lambda outputs: True)
    return {name for name, linear in checkpoint.quantized.items() if fitting(linear.out_features)}


def _pieces(checkpoint: Checkpoint) -> Iterator[tuple[str, str]]:
    """(module, leaf) of everything stored, in the order of the model, whatever the source's layout is."""
    for name, _ in checkpoint.skeleton.named_modules():
        if name in checkpoint.quantized:
            yield name, "packed"
        for leaf in ("weight", "bias"):
            if f"{name}.{leaf}" in checkpoint.tensors:
                yield name, leaf


def _specs(checkpoint: Checkpoint, name: str, leaf: str, layout: str, packed: set[str]) -> list[Spec]:
    """Names, dtypes and shapes of the tensors that `_tensors` will yield, without reading values."""
    if leaf != "packed":
        info = checkpoint.tensors[f"{name}.{leaf}"]
        return [Spec(f"{name}.{leaf}", info.dtype, info.shape)]
    linear = checkpoint.quantized[name]
    scales = linear.tensors.get("scales") or linear.tensors["weight_scale"]
    dtype = checkpoint.tensors[scales].dtype
    if name not in packed:
        return [Spec(f"{name}.weight", dtype, (linear.out_features, linear.in_features))]
    groups = linear.in_features // linear.group_size
    parts = part_shapes(layout, linear.in_features, linear.out_features, groups, dtype)
    return [Spec(f"{name}.{part}", dtype, shape) for part, (dtype, shape) in parts.items()]


def _tensors(
    checkpoint: Checkpoint, name: str, leaf: str, layout: str, packed: set[str], device: torch.device
) -> Iterator[tuple[str, Tensor]]:
    if leaf != "packed":
        yield f"{name}.{leaf}", checkpoint.read(f"{name}.{leaf}")
        return
    quantized = place_stored(checkpoint, name, read_stored(checkpoint, f"{name}.weight", device), device)
    assert isinstance(quantized, Quantized)
    if name not in packed:
        yield f"{name}.weight", dequantize(quantized)
        return
    for part, tensor in LAYOUTS[layout].encode(quantized).items():
        yield f"{name}.{part}", tensor


def _config(checkpoint: Checkpoint, layout: str, packed: set[str]) -> dict[str, Any]:
    config = {key: value for key, value in checkpoint.config.items() if key != "compression_config"}
    if layout == "dense":
        return {key: value for key, value in config.items() if key not in CONFIG_KEYS}
    dense = [name for name in checkpoint.linears if name not in packed]
    group_size = _common_group_size(checkpoint, packed)
    if layout == "awq":
        block = awq_block(group_size, dense)
    else:
        block = compressed_tensors_block(group_size, layout.endswith("symmetric"), dense)
    return config | {"quantization_config": block}


def _common_group_size(checkpoint: Checkpoint, packed: set[str]) -> int:
    """The group size that the config states; -1 if every row of every layer is one group."""
    linears = [checkpoint.quantized[name] for name in sorted(packed)]
    sizes = {linear.group_size for linear in linears}
    if len(sizes) == 1:
        return sizes.pop()
    if all(linear.group_size == linear.in_features for linear in linears):
        return -1
    raise InvalidInput(
        "these layers have different group sizes",
        f"{checkpoint.directory} has {sorted(sizes)}, and the format states one for all",
        "convert to dense and quantize again",
    )


def build_parser() -> argparse.ArgumentParser:
    parser = cli.parser(
        "convert",
        "Write a quantized checkpoint in another layout, or as a file of llama.cpp.",
        usage="SOURCE DESTINATION [--format NAME] [flags]",
        examples=EXAMPLES,
        page="docs/checkpoints.md",
    )
    parser.add_argument("source", help="directory or Hub id of an INT4 checkpoint (AutoAWQ or compressed-tensors)")
    parser.add_argument("destination", help="directory to make, or FILE.gguf")
    parser.add_argument(
        "--format",
        choices=FORMATS,
        metavar="NAME",
        help=f"layout to write: {', '.join(FORMATS)} (FILE.gguf says it itself)",
    )
    where = "where to unpack and pack: cuda, cuda:1, cpu (cuda if there is one with room)"
    parser.add_argument("--device", metavar="NAME", help=where)
    parser.add_argument("--json", action="store_true", help="print the report as JSON")
    add_hub_flags(parser)
    return parser


def device_for(checkpoint: Checkpoint, wanted: str | None) -> torch.device:
    """The device asked for; if none is, a GPU with room for the largest layer, else the CPU."""
    if wanted or not torch.cuda.is_available():
        return pick_device(wanted or "cpu")
    largest = max((layer.in_features * layer.out_features for layer in checkpoint.quantized.values()), default=0)
    return roomiest(BYTES_A_WEIGHT * largest, torch.device("cuda"))


def _convert(arguments: argparse.Namespace) -> None:
    format = arguments.format or ("gguf" if arguments.destination.endswith(".gguf") else None)
    if format is None:
        why = f"{arguments.destination} is no name of a .gguf file"
        raise UsageError("convert needs a layout to write", why, f"give --format {'|'.join(FORMATS)}")
    checkpoint = open_checkpoint(arguments.source, **hub_options(arguments))
    device = device_for(checkpoint, arguments.device)
    report = convert_checkpoint(checkpoint, arguments.destination, format, device=device)
    if "lm_head" in checkpoint.quantized.keys() - report.unpacked_linears and format in PACKED_HEADS:
        log.warning("%s", PACKED_HEADS[format])
    if arguments.json:
        print(json.dumps(asdict(report)))
        return
    unpacked = f", {len(report.unpacked_linears)} layers became dense" if report.unpacked_linears else ""
    moved = f", weights moved by {report.largest_move:.4f} of a scale at most" if report.largest_move else ""
    print(
        f"{arguments.destination}: {report.source_layout} to {report.layout}, {report.packed_linears} packed layers"
        f"{unpacked}{moved}, {report.nbytes / 1e9:.3f} GB in {report.seconds:.1f} s"
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code."""
    return cli.run(_convert, build_parser(), argv)


if __name__ == "__main__":
    sys.exit(main())
