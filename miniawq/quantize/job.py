"""A dense checkpoint in, an AWQ INT4 checkpoint out, one decoder block at a time.

    embed the calibration text
    for each block: read it, run the text through it, search, fold and round (awq.py), write it, note it in the journal
                    (a recipe that learns codes runs the text through what is rounded, too: streams.py)
    round the head, where it is asked for (head.py), and write the rest; re-open the files and check every group
    move the files from `unfinished` into the destination, config.json last

One block is in memory at a time, whatever their number. The hidden states between blocks are never saved: a run that
goes on after a kill computes them again from the blocks it has finished, without their searches.
"""

import logging
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from miniawq import __version__, awq
from miniawq.awq import QuantizedLayer
from miniawq.checkpoint.background import Background
from miniawq.checkpoint.blocks import BlockStream, to_host
from miniawq.checkpoint.layouts import LAYOUTS, part_shapes
from miniawq.checkpoint.opening import Checkpoint, open_checkpoint
from miniawq.checkpoint.publishing import UNFINISHED, check_disk, locked, publish, recall
from miniawq.checkpoint.quant_config import awq_block, compressed_tensors_block
from miniawq.checkpoint.shards import SHARD_BYTES, ShardWriter, Spec, write_json
from miniawq.checkpoint.unchanged import check_side_files, copy_side_files, fingerprint, side_digests
from miniawq.errors import InvalidInput, UnsupportedCheckpoint
from miniawq.hardware import peak_memory
from miniawq.model import DecoderBlock
from miniawq.packing import CODES_PER_WORD, dequantize
from miniawq.quantize.calibration import Calibration, check_text
from miniawq.quantize.head import quantize_head
from miniawq.quantize.journal import NAME as JOURNAL
from miniawq.quantize.journal import Journal, interruptible, refuse_others
from miniawq.quantize.memory import hidden_states, plan_memory
from miniawq.quantize.moments import SymmetricStatistics
from miniawq.quantize.packable import is_packable, packable_folds
from miniawq.quantize.recipes import DEFAULT, Recipe
from miniawq.quantize.records import PRIVATE, decode_factors, encode_factors, note_on, record_of, record_problem
from miniawq.quantize.report import QuantizationReport, write_report
from miniawq.quantize.streams import Streams
from miniawq.quantize.verify import has_tokenizer, verify
from miniawq.text.tokenizer import Tokenizer

log = logging.getLogger(__name__)

LONG_START = 1.5  # times the second block
HALF_LIMIT = torch.finfo(torch.float16).max  # activations beyond it overflow in float16


@dataclass(frozen=True)
class Settings:
    """What decides the bytes of the result, beside the model and the calibration text.

    Statistics come from the whole text; modules' outputs are compared on about `compared_tokens` of it. `lm_head` says
    whether the head is packed too.
    """

    recipe: Recipe = DEFAULT
    layout: str = "awq"
    dtype: torch.dtype = torch.float16
    compared_tokens: int = 4096
    shard_bytes: int = SHARD_BYTES
    lm_head: bool = False

    def described(self) -> dict[str, Any]:
        settings = asdict(self) | {"recipe": self.recipe.described(), "dtype": str(self.dtype).removeprefix("torch.")}
        return settings | {"miniawq": __version__}


class Quantizer:
    """The work on one checkpoint: what tensors the result has, and how each block is quantized."""

    def __init__(self, checkpoint: Checkpoint, settings: Settings, device: torch.device) -> None:
        if checkpoint.quantized:
            raise UnsupportedCheckpoint(
                f"{checkpoint.directory} is quantized already",
                f"{next(iter(checkpoint.quantized))} is packed",
                "quantize the dense model that it was made from",
            )
        checkpoint = checkpoint.untied() if settings.lm_head else checkpoint  # the embedding stays as it is
        self.checkpoint, self.settings, self.device = checkpoint, settings, device
        self.stream = BlockStream(checkpoint, device)
        self.folds = packable_folds(checkpoint.model_config, checkpoint.linears, settings.recipe.group_size)
        if not self.folds:
            raise InvalidInput(
                f"no layer of {checkpoint.directory} can be packed",
                f"groups of {settings.recipe.group_size} inputs and words of {CODES_PER_WORD} outputs do not fit any",
                "try --group-size 64 or 32",
            )
        if settings.lm_head and not is_packable(checkpoint.linears["lm_head"], settings.recipe.group_size):
            inputs, outputs = checkpoint.linears["lm_head"]
            raise InvalidInput(
                f"the head of {checkpoint.directory} cannot be packed",
                f"it has {inputs} inputs for groups of {settings.recipe.group_size}, "
                f"and {outputs} outputs for words of {CODES_PER_WORD}",
                "leave out --lm-head, or try --group-size 64 or 32",
            )
        self.blocks = checkpoint.model_config.num_hidden_layers
        names = [name for fold in self.folds for name in fold.balance_layers]
        self.packed = {f"model.layers.{layer}.{name}" for layer in range(self.blocks) for name in names}
        self.packed |= {"lm_head"} if settings.lm_head else set()
        self.dense = [name for name in checkpoint.linears if name not in self.packed]
        self.streams: Streams | None = None  # for recipes that look at the text again, once there is memory for it

    def specs(self) -> list[Spec]:
        """Every tensor of the result, in the order of the model."""
        specs = []
        for name, parameter in self.checkpoint.skeleton.named_parameters():
            layer = name.removesuffix(".weight")
            if layer in self.packed:
                outputs, inputs = parameter.shape
                size = self.settings.recipe.group_size
                groups = 1 if size == -1 else inputs // size
                parts = part_shapes(self.settings.layout, inputs, outputs, groups, self.settings.recipe.scale_dtype)
                specs += [Spec(f"{layer}.{part}", dtype, shape) for part, (dtype, shape) in parts.items()]
            else:
                specs.append(Spec(name, self.settings.dtype, tuple(parameter.shape)))
        return specs

    @torch.inference_mode()
    def process(self, layer: int, hidden_BLD: Tensor) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Quantize one block; the hidden states move on to its full-precision outputs.

        Returns the block's tensors in writing order, and what the journal and the report say about it.
        """
        started = time.monotonic()
        block = self.stream.block(layer)
        if layer == 0:
            awq.check_folds(block, self.folds, lambda: next(self.stream.run(block, layer, hidden_BLD[:1]))[1])
        if self.streams:
            self.streams.begin(hidden_BLD)
        stride = max(1, hidden_BLD.shape[:2].numel() // self.settings.compared_tokens)
        with awq.observe(block, self.folds, stride, SymmetricStatistics) as statistics:
            largest = self.advance(block, layer, hidden_BLD)
        notes = {fold: note_on(fold, seen) for fold, seen in statistics.items()}
        recipe = self.settings.recipe
        look = partial(self.streams.aims, block, layer) if self.streams else None
        searches, layers = awq.quantize_block(
            block, statistics, recipe.rounding, recipe.method, self.settings.dtype, look
        )
        record = {
            "layer": layer,
            "largest_activation": largest,
            "folds": [record_of(search, notes[search.fold]) for search in searches],
            "layers": {name: {"plain_loss": done.plain_loss, "loss": done.loss} for name, done in layers.items()},
            "scales": encode_factors(
                {found.fold.smooth_layer: found.factors_P for found in searches if found.fold.smooth_layer}
            ),
        }
        tensors = dict(self._tensors(block, layer, layers))
        if self.streams:
            self.streams.follow(block, layer)
        return tensors, record | {"seconds": round(time.monotonic() - started, 3)}

    def process_head(self, hidden_BLD: Tensor) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Quantize the head, when the hidden states are the outputs of the last block.

        Returns its tensors in writing order, and what the report says about it. The journal does not hold it: a run
        that goes on does it again.
        """
        started = time.monotonic()
        read_BLD = self.streams.quantized_BLD if self.streams else hidden_BLD
        found = quantize_head(self.stream, read_BLD, self.settings.recipe)
        parts = LAYOUTS[self.settings.layout].encode(found.quantized)
        record = {"plain_loss": found.plain_loss, "loss": found.loss, "seconds": round(time.monotonic() - started, 3)}
        return {f"lm_head.{part}": to_host(tensor) for part, tensor in parts.items()}, record

    def advance(self, block: DecoderBlock, layer: int, hidden_BLD: Tensor) -> float:
        """Replace hidden states by the block's outputs; returns the largest magnitude among them."""
        largest = []
        for rows, output_BLD in self.stream.run(block, layer, hidden_BLD):
            hidden_BLD[rows] = output_BLD.to(hidden_BLD.device)
            largest.append(output_BLD.abs().max())
        return float(torch.stack(largest).max())

    def _tensors(self, block: nn.Module, layer: int, layers: dict[str, QuantizedLayer]) -> Iterator[tuple[str, Tensor]]:
        for name, parameter in block.named_parameters(prefix=f"model.layers.{layer}"):
            module = name.removesuffix(".weight")
            if module in self.packed:
                quantized = layers[module.removeprefix(f"model.layers.{layer}.")].quantized
                for part, tensor in LAYOUTS[self.settings.layout].encode(quantized).items():
                    yield f"{module}.{part}", to_host(tensor)
            else:
                yield name, to_host(self.stored(name, parameter.data))

    def as_written(self, block: DecoderBlock, layer: int, tensors: Mapping[str, Tensor]) -> DecoderBlock:
        """The block with the numbers that its tensors in the file stand for."""
        for name, parameter in block.named_parameters(prefix=f"model.layers.{layer}"):
            module = name.removesuffix(".weight")
            if module in self.packed:
                parts = {
                    part.removeprefix(f"{module}."): tensor.to(self.device)
                    for part, tensor in tensors.items()
                    if part.startswith(f"{module}.")
                }
                quantized = LAYOUTS[self.settings.layout].decode(parts, self.settings.recipe.group_size)
                parameter.data = dequantize(quantized, torch.float32)
            else:
                parameter.data = tensors[name].to(self.device).float()
        return block

    def settle(self, block: DecoderBlock, layer: int) -> None:
        """Round what stays dense of a block as its file will hold it."""
        for name, parameter in block.named_parameters(prefix=f"model.layers.{layer}"):
            if name.removesuffix(".weight") not in self.packed:
                parameter.data = self.stored(name, parameter.data).float()

    def stored(self, name: str, tensor: Tensor) -> Tensor:
        """A dense tensor in the dtype of the result; InvalidInput when that cannot hold it."""
        converted = tensor.to(self.settings.dtype)
        if not converted.isfinite().all():
            raise InvalidInput(
                f"{name} does not fit in {self.settings.dtype}",
                f"its values reach {tensor.abs().max().item():.3g}",
                "use --dtype bfloat16, or look for a damaged tensor if they are not finite",
            )
        return converted

    def smooth(self, factors: list[dict[str, Tensor]], name: str, weight_OI: Tensor) -> Tensor:
        """A layer's weight as it was when it was rounded: after all folds."""
        if name == "lm_head":
            return weight_OI
        number, _, local = name.removeprefix("model.layers.").partition(".")
        for fold in self.folds:
            if fold.smooth_layer is None:
                continue
            factors_P = factors[int(number)][fold.smooth_layer].to(weight_OI.device)
            if local == fold.smooth_layer:
                weight_OI = weight_OI / awq.last_of(len(weight_OI), factors_P)[:, None]
            if local in fold.balance_layers:
                weight_OI = weight_OI * fold.spread(factors_P)
        return weight_OI

    def config(self) -> dict[str, Any]:
        """The new config.json."""
        size = self.settings.recipe.group_size
        if self.settings.layout == "awq":
            block = awq_block(size, self.dense)
        else:
            block = compressed_tensors_block(size, self.settings.layout.endswith("symmetric"), self.dense)
        dtype = str(self.settings.dtype).removeprefix("torch.")
        key = "dtype" if "dtype" in self.checkpoint.config else "torch_dtype"
        return self.checkpoint.config | {key: dtype, "quantization_config": block}


@contextmanager
def tensor_cores() -> Iterator[None]:
    """Let a GPU multiply float32 matrices in TF32, which keeps as many digits as float16 and more range."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


@torch.inference_mode()
def _write_model(
    job: Quantizer, writer: ShardWriter, journal: Journal, tokens_BL: Tensor, hidden_BLD: Tensor
) -> dict[str, Any] | None:
    """Write every tensor that is not written yet; a block's tensors are written while the next block is searched.

    Returns what the report says about the head, if that is packed.
    """
    finished, seconds = len(journal.blocks), list[float]()
    with interruptible() as stop, Background() as disk, tqdm(total=job.blocks, unit="block", disable=None) as bar:
        job.stream.embed(tokens_BL, hidden_BLD)
        if job.streams:
            job.streams.quantized_BLD.copy_(hidden_BLD.to(job.settings.dtype))  # as the file holds the embedding
        if not finished:
            disk.run(_write_dense, job, writer, writer.specs[:1])
        for layer in range(job.blocks):
            if layer < finished:
                block = job.stream.block(layer)
                job.stream.advance(block, layer, hidden_BLD)
                if job.streams:
                    written = writer.written(f"model.layers.{layer}.")
                    job.streams.follow(job.as_written(block, layer, written), layer)
            else:
                tensors, record = job.process(layer, hidden_BLD)
                disk.run(_write_block, writer, journal, tensors, record)
                _warn(record)
                bar.set_postfix_str(_gains(record))
                seconds.append(record["seconds"])
                if layer + 1 < job.blocks:
                    _say_time(seconds, job.blocks - layer - 1)
            bar.update()
            if stop.is_set() and (layer + 1 < job.blocks or job.settings.lm_head):
                disk.wait()
                log.warning("stopped after block %d of %d: run the same command to go on", layer + 1, job.blocks)
                raise KeyboardInterrupt
    parts: dict[str, Tensor] = {}
    found: dict[str, Any] | None = None
    if job.settings.lm_head:
        log.info("now the head, %d outputs of %d inputs each", *reversed(job.checkpoint.linears["lm_head"]))
        parts, found = job.process_head(hidden_BLD)
    _write_dense(job, writer, [spec for spec in writer.specs[writer.done :] if spec.name not in parts])
    for name, tensor in parts.items():
        writer.write(name, tensor)
    writer.finish()
    return found


def _write_block(writer: ShardWriter, journal: Journal, tensors: dict[str, Tensor], record: dict[str, Any]) -> None:
    for name, tensor in tensors.items():
        writer.write(name, tensor)
    writer.flush()
    noted = {name for block in journal.blocks for name in block["digests"]}
    digests = {name: digest for name, digest in writer.digests.items() if name not in noted}
    journal.add(record | {"tensors": writer.done, "digests": digests})


def _write_dense(job: Quantizer, writer: ShardWriter, specs: Sequence[Spec]) -> None:
    for spec in specs:
        writer.write(spec.name, job.stored(spec.name, job.checkpoint.read(spec.name)))


def _warn(record: dict[str, Any]) -> None:
    """Log what a user has to know about a block."""
    for fold in record["folds"]:
        if fold["note"]:
            log.warning("block %d, %s: %s", record["layer"], fold["previous"], fold["note"])
    if not record["largest_activation"] <= HALF_LIMIT:
        told = "block %d: activations reach %.3g, and float16 holds 65504: run the model in bfloat16"
        log.warning(told, record["layer"], record["largest_activation"])


def _say_time(seconds: Sequence[float], left: int) -> None:
    """Log what the other blocks will take if they are like this one; a bar says it on a terminal only.

    After the first block, which also loads libraries and compiles on a GPU; where that took long, after the second too.
    """
    if len(seconds) == 1 or (len(seconds) == 2 and seconds[0] > LONG_START * seconds[1]):
        told = "the %s block took %.1f s: about %s for the other %d"
        which = ("first", "second")[len(seconds) - 1]
        log.info(told, which, seconds[-1], tqdm.format_interval(seconds[-1] * left), left)


def _gains(record: dict[str, Any]) -> str:
    """Each fold's loss as a part of plain rounding's."""
    parts = [(fold["compared"].rpartition(".")[2], fold["loss"], fold["plain_loss"]) for fold in record["folds"]]
    return " ".join(f"{name} {loss / plain:.2f}" for name, loss, plain in parts if plain > 0)


def quantize_checkpoint(
    source: str | Path | Checkpoint,
    destination: str | Path,
    calibration: Calibration,
    settings: Settings = Settings(),
    *,
    device: torch.device | str = "cpu",
    offload_directory: Path | None = None,
) -> QuantizationReport:
    """Quantize `source` into the directory `destination`, or go on with an interrupted run of the same arguments.

    Raises UnsupportedCheckpoint and DoesNotFit before anything is written, UsageError when `destination` holds
    something else or another run is writing to it, KeyboardInterrupt after the current block when the user asked to
    stop.
    """
    started = time.monotonic()
    checkpoint = source if isinstance(source, Checkpoint) else open_checkpoint(source)
    device, destination = torch.device(device), Path(destination)
    job = Quantizer(checkpoint, settings, device)
    samples, length = calibration.tokens_BL.shape
    offload = offload_directory is not None
    learns, head = settings.recipe.learns, settings.lm_head
    plan = plan_memory(checkpoint, job.folds, samples, length, settings.compared_tokens, device, offload, learns, head)
    log.info("%s", plan.describe())
    plan.check(device)
    job = Quantizer(checkpoint.fetched(), settings, device)
    check_text(job.checkpoint, calibration)
    with locked(destination):
        return _quantize(job, plan.hidden_on_device, destination, calibration, offload_directory, started)


def check_destination(job: Quantizer, directory: Path) -> None:
    """What `quantize_checkpoint` refuses of a destination, and of the disk of a new one, while there is no text yet."""
    with locked(directory):
        if not (directory / JOURNAL).exists():
            refuse_others(directory)
            check_disk(directory, sum(spec.nbytes for spec in job.specs()))


def _quantize(
    job: Quantizer,
    hidden_on_device: bool,
    destination: Path,
    calibration: Calibration,
    offload_directory: Path | None,
    started: float,
) -> QuantizationReport:
    checkpoint, settings, device = job.checkpoint, job.settings, job.device
    work, specs, sides = destination / UNFINISHED, job.specs(), side_digests(checkpoint)
    readable = has_tokenizer(checkpoint.directory)
    run = settings.described() | {"model": fingerprint(checkpoint), "text": calibration.sha256}
    run |= {f"file {name}": digest for name, digest in sides.items() if not name.endswith(".md")}
    journal = Journal(destination, run, partial(record_problem, specs=specs, folds=job.folds))
    home = device if hidden_on_device else torch.device("cpu")
    shape = (*calibration.tokens_BL.shape, checkpoint.model_config.hidden_size)
    hidden_BLD = hidden_states(shape, home, offload_directory)
    if settings.recipe.learns:
        dense_BLD, quantized_BLD = (hidden_states(shape, home, offload_directory) for _ in range(2))
        job.streams = Streams(job.stream, dense_BLD, quantized_BLD, job.settle)
    done = journal.blocks[-1]["tensors"] if journal.blocks else 0
    seconds_before = sum(block["seconds"] for block in journal.blocks)
    check_disk(destination, sum(spec.nbytes for spec in specs[done:]))
    journal.begin()
    recall(journal.published, work)
    copy_side_files(checkpoint, work)
    with ShardWriter(work, specs, settings.shard_bytes) as writer, tensor_cores():
        writer.resume(done)
        writer.digests |= {name: digest for block in journal.blocks for name, digest in block["digests"].items()}
        head = _write_model(job, writer, journal, calibration.tokens_BL, hidden_BLD)
    write_json(work / "config.json", job.config())
    factors = [decode_factors(block["scales"]) for block in journal.blocks]
    written, smooth = open_checkpoint(work), partial(job.smooth, factors)
    verification = verify(checkpoint, written, set(job.dense), smooth, device, settings.recipe.reach, writer.digests)
    check_side_files(checkpoint, work, sides)
    if readable:
        Tokenizer(work)
    report = QuantizationReport(
        source=str(checkpoint.directory),
        settings=settings.described(),
        calibration=calibration.summary(),
        dense_linears=job.dense,
        blocks=[{key: value for key, value in block.items() if key not in PRIVATE} for block in journal.blocks],
        head=head,
        verification=verification,
        source_bytes=sum(info.nbytes for info in {*checkpoint.tensors.values()}),  # a head may be the embedding
        written_bytes=sum(spec.nbytes for spec in specs),
        peak_memory_bytes=peak_memory(),
        peak_device_bytes=None if device.type == "cpu" else peak_memory(device),
        seconds=round(seconds_before + time.monotonic() - started, 3),
    )
    write_report(work, destination.name, report)
    journal.publishing([path.name for path in sorted(work.iterdir())])
    publish(work)
    journal.remove()
    return report
