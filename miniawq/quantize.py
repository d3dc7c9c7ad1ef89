"""A dense checkpoint in, an AWQ INT4 checkpoint out, one decoder block at a time.

    embed the calibration text
    for each block: read it, run the text through it, search, fold and round (awq.py), write it, note it in the journal
    write the rest, re-open the files and check every group

One block is in memory at a time, whatever their number. The hidden states between blocks are never saved: a run that
goes on after a kill computes them again from the blocks it has finished, without their searches.
"""

import argparse
import base64
import logging
import math
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor, nn
from tqdm import tqdm

from miniawq import __version__, awq, cli
from miniawq.awq import Fold, QuantizedBlock, Recipe, ScaleSearch
from miniawq.background import Behind
from miniawq.calibration import Calibration, read_calibration, sample_calibration
from miniawq.checkpoint import Checkpoint, load_model, open_checkpoint, skeleton
from miniawq.errors import InvalidInput, UnsupportedCheckpoint
from miniawq.fused import compiled_chains, tensor_cores
from miniawq.hub import add_hub_flags, hub_options
from miniawq.journal import Journal, fingerprint, interruptible
from miniawq.layouts import part_shapes
from miniawq.memory import hidden_states, peak_memory, plan_memory
from miniawq.model import DecoderBlock, LlamaConfig
from miniawq.packing import CODES_PER_WORD, GRIDS, LAYOUTS
from miniawq.quant_config import awq_block, compressed_tensors_block
from miniawq.report import Report, write_report
from miniawq.shards import SHARD_BYTES, ShardWriter, Spec, check_disk, serialize, write_json
from miniawq.stream import BlockStream, fetched, micro_batches
from miniawq.tokenizer import Tokenizer
from miniawq.verify import verify

log = logging.getLogger("miniawq.quantize")

RECIPES = {"default": awq.DEFAULT, "paper": awq.PAPER, "plain": awq.PLAIN_ROUNDING}
FORMATS = ("awq", "compressed-tensors")
HALF_LIMIT = torch.finfo(torch.float16).max
DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16}


def fold_table(config: LlamaConfig) -> list[Fold]:
    """The folds of a Llama-family block.

    Under grouped-query attention several query heads read the same value channel, and their columns of o_proj share
    its scale.
    """
    shared = config.num_attention_heads // config.num_key_value_heads
    values_JE = torch.arange(config.num_key_value_heads * config.head_dim).view(-1, config.head_dim)
    reads_I = values_JE.repeat_interleave(shared, dim=0).flatten()
    return [
        Fold("input_layernorm", ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), "self_attn"),
        Fold("self_attn.v_proj", ("self_attn.o_proj",), "self_attn.o_proj", reads_I),
        Fold("post_attention_layernorm", ("mlp.gate_proj", "mlp.up_proj"), "mlp"),
        Fold("mlp.up_proj", ("mlp.down_proj",), "mlp.down_proj"),
    ]


def packable_folds(config: LlamaConfig, shapes: dict[str, tuple[int, int]], group_size: int) -> list[Fold]:
    """The folds whose linears all fit the file format; engines read the linears of one fold as one matrix."""

    def fits(fold: Fold) -> bool:
        sizes = [shapes[f"model.layers.0.{name}"] for name in fold.linears]
        return all(inputs % max(1, group_size) == 0 and outputs % CODES_PER_WORD == 0 for inputs, outputs in sizes)

    return [fold for fold in fold_table(config) if fits(fold)]


@dataclass(frozen=True)
class Settings:
    """What decides the bytes of the result, beside the model and the calibration text.

    The modules' outputs are compared on about `compared_tokens` of the text; statistics are of all of it.
    """

    recipe: Recipe = awq.DEFAULT
    layout: str = "awq"
    dtype: torch.dtype = torch.float16
    compared_tokens: int = 4096
    shard_bytes: int = SHARD_BYTES

    def described(self) -> dict[str, Any]:
        """For the journal and the report."""
        recipe = asdict(self.recipe) | {"scale_dtype": str(self.recipe.scale_dtype).removeprefix("torch.")}
        settings = asdict(self) | {"recipe": recipe, "dtype": str(self.dtype).removeprefix("torch.")}
        return settings | {"miniawq": __version__}


class Quantizer:
    """The work on one checkpoint: which tensors there will be, and one block after the other."""

    def __init__(self, checkpoint: Checkpoint, settings: Settings, device: torch.device) -> None:
        if checkpoint.quantized:
            raise UnsupportedCheckpoint(
                f"{checkpoint.directory} is quantized already",
                f"{next(iter(checkpoint.quantized))} is packed",
                "quantize the dense model that it was made from",
            )
        self.checkpoint, self.settings, self.device = checkpoint, settings, device
        self.stream = BlockStream(checkpoint, device)
        self.folds = packable_folds(checkpoint.model_config, checkpoint.linears, settings.recipe.group_size)
        if not self.folds:
            raise InvalidInput(
                f"no layer of {checkpoint.directory} can be packed",
                f"groups of {settings.recipe.group_size} inputs and words of {CODES_PER_WORD} outputs do not fit any",
                "try --group-size 64 or 32",
            )
        self.blocks = checkpoint.model_config.num_hidden_layers
        names = [name for fold in self.folds for name in fold.linears]
        self.packed = {f"model.layers.{layer}.{name}" for layer in range(self.blocks) for name in names}
        self.dense = [name for name in checkpoint.linears if name not in self.packed]

    def specs(self) -> list[Spec]:
        """Every tensor of the result, in the order of the model."""
        specs = []
        for name, parameter in skeleton(self.checkpoint).named_parameters():
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
        batches = list(micro_batches(*hidden_BLD.shape[:2]))
        if layer == 0:
            awq.check_folds(block, self.folds, lambda: next(self.stream.run(block, layer, hidden_BLD[:1]))[1])
        stride = max(1, hidden_BLD.shape[:2].numel() // self.settings.compared_tokens)
        with awq.observe(block, self.folds, range(0, len(batches), stride)) as statistics:
            largest = self.advance(block, layer, hidden_BLD)
        result = awq.quantize_block(block, statistics, self.settings.recipe, self.settings.dtype)
        record = {
            "layer": layer,
            "largest_activation": largest,
            "folds": [_describe(search) for search in result.searches],
            "layers": {
                name: {"plain_loss": done.plain_loss, "loss": done.loss} for name, done in result.layers.items()
            },
            "scales": _encode({search.fold.previous: search.scales_P for search in result.searches}),
        }
        tensors = dict(self._tensors(block, layer, result))
        return tensors, record | {"seconds": round(time.monotonic() - started, 3)}

    def advance(self, block: DecoderBlock, layer: int, hidden_BLD: Tensor) -> float:
        """Replace hidden states by the block's outputs; returns the largest magnitude among them."""
        largest = []
        for rows, output_BLD in self.stream.run(block, layer, hidden_BLD):
            hidden_BLD[rows] = output_BLD.to(hidden_BLD.device)
            largest.append(output_BLD.abs().max())
        return float(torch.stack(largest).max())

    def _tensors(self, block: nn.Module, layer: int, result: QuantizedBlock) -> Iterator[tuple[str, Tensor]]:
        for name, parameter in block.named_parameters(prefix=f"model.layers.{layer}"):
            module = name.removesuffix(".weight")
            if module in self.packed:
                quantized = result.layers[module.removeprefix(f"model.layers.{layer}.")].quantized
                for part, tensor in LAYOUTS[self.settings.layout].encode(quantized).items():
                    yield f"{module}.{part}", fetched(tensor)
            else:
                yield name, fetched(self.stored(name, parameter.data))

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

    def smooth(self, scales: list[dict[str, Tensor]], name: str, weight_OI: Tensor) -> Tensor:
        """A layer's weight as it was when it was rounded: columns multiplied by scales, rows divided."""
        number, _, local = name.removeprefix("model.layers.").partition(".")
        found = {fold: scales[int(number)][fold.previous].to(weight_OI.device) for fold in self.folds}
        for fold, scales_P in found.items():
            if local == fold.previous:
                weight_OI = weight_OI / scales_P[:, None]
            if local in fold.linears:
                weight_OI = weight_OI * fold.spread(scales_P)
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


def _describe(search: ScaleSearch) -> dict[str, Any]:
    return {
        "previous": search.fold.previous,
        "compared": search.fold.compared,
        "formula": search.chosen.formula,
        "ratio": search.chosen.ratio,
        "loss": search.chosen.loss,
        "plain_loss": search.trials[0].loss,
        "note": search.note,
        "trials": [list(trial) for trial in search.trials],
    }


def _encode(tensors: dict[str, Tensor]) -> str:
    return base64.b64encode(serialize(tensors)).decode()


def _decode(text: str) -> dict[str, Tensor]:
    return safetensors.torch.load(base64.b64decode(text))


@torch.inference_mode()
def _write_model(job: Quantizer, writer: ShardWriter, journal: Journal, tokens_BL: Tensor, hidden_BLD: Tensor) -> None:
    """Write every tensor that is not written yet, the blocks' after their searches, each during the next one's."""
    finished = len(journal.blocks)
    with interruptible() as stop, Behind() as disk, tqdm(total=job.blocks, unit="block", disable=None) as bar:
        job.stream.embed(tokens_BL, hidden_BLD)
        if not finished:
            disk.run(_write_dense, job, writer, writer.specs[:1])
        for layer in range(job.blocks):
            if layer < finished:
                job.advance(job.stream.block(layer), layer, hidden_BLD)
            else:
                tensors, record = job.process(layer, hidden_BLD)
                disk.run(_write_block, writer, journal, tensors, record)
                _warn(record)
                bar.set_postfix_str(_losses(record))
            bar.update()
            if stop.is_set() and layer + 1 < job.blocks:
                disk.wait()
                log.warning("stopped after block %d of %d: run the same command to go on", layer + 1, job.blocks)
                raise KeyboardInterrupt
    _write_dense(job, writer, writer.specs[writer.done :])
    writer.finish()


def _write_block(writer: ShardWriter, journal: Journal, tensors: dict[str, Tensor], record: dict[str, Any]) -> None:
    for name, tensor in tensors.items():
        writer.write(name, tensor)
    writer.flush()
    journal.add(record | {"tensors": writer.done})


def _write_dense(job: Quantizer, writer: ShardWriter, specs: Sequence[Spec]) -> None:
    for spec in specs:
        writer.write(spec.name, job.stored(spec.name, job.checkpoint.read(spec.name)))


def _warn(record: dict[str, Any]) -> None:
    """Tell what a user has to know of a block."""
    for fold in record["folds"]:
        if fold["note"]:
            log.warning("block %d, %s: %s", record["layer"], fold["previous"], fold["note"])
    if not record["largest_activation"] <= HALF_LIMIT:
        told = "block %d: activations reach %.3g, and float16 holds 65504: run the model in bfloat16"
        log.warning(told, record["layer"], record["largest_activation"])


def _losses(record: dict[str, Any]) -> str:
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
) -> Report:
    """Quantize `source` into the directory `destination`, going on where an interrupted run of the same kind stopped.

    Raises UnsupportedCheckpoint, DoesNotFit before anything is written, UsageError when `destination` holds something
    else, KeyboardInterrupt after the block in work when the user asked to stop.
    """
    started = time.monotonic()
    checkpoint = source if isinstance(source, Checkpoint) else open_checkpoint(source)
    device, destination = torch.device(device), Path(destination)
    job = Quantizer(checkpoint, settings, device)
    samples, length = calibration.tokens_BL.shape
    offload = offload_directory is not None
    plan = plan_memory(checkpoint, job.folds, samples, length, settings.compared_tokens, device, offload)
    log.info("%s", plan.describe())
    plan.check(device)
    checkpoint.fetch()
    run = settings.described() | {"model": fingerprint(checkpoint), "text": calibration.sha256}
    journal = Journal(destination, run)
    home = device if plan.hidden_on_device else torch.device("cpu")
    hidden_BLD = hidden_states((samples, length, checkpoint.model_config.hidden_size), home, offload_directory)
    specs = job.specs()
    weights = sum(math.prod(checkpoint.linears[name]) for name in job.packed)
    with ShardWriter(destination, specs, settings.shard_bytes) as writer, tensor_cores(), compiled_chains(weights):
        writer.resume(journal.blocks[-1]["tensors"] if journal.blocks else 0)
        check_disk(destination, sum(spec.nbytes for spec in specs[writer.done :]))
        _write_model(job, writer, journal, calibration.tokens_BL, hidden_BLD)
    write_json(destination / "config.json", job.config())
    checkpoint.copy_side_files(destination)
    scales = [_decode(block["scales"]) for block in journal.blocks]
    smooth = lambda name, weight_OI: job.smooth(scales, name, weight_OI)  # noqa: E731
    # Compensated codes are not the nearest ones: for them there is no bound to hold, only one to report.
    limit = math.inf if settings.recipe.compensate else 1.0
    verification = verify(checkpoint, open_checkpoint(destination), set(job.dense), smooth, device, limit)
    report = Report(
        source=str(checkpoint.directory),
        settings=settings.described(),
        calibration=calibration.summary(),
        dense_linears=job.dense,
        blocks=[{key: value for key, value in block.items() if key != "scales"} for block in journal.blocks],
        verification=verification,
        source_bytes=sum(info.nbytes for info in checkpoint.tensors.values()),
        written_bytes=sum(spec.nbytes for spec in specs),
        peak_memory_bytes=peak_memory(),
        seconds=round(time.monotonic() - started, 3),
    )
    write_report(destination, report)
    journal.remove()
    return report


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = cli.parser("quantize", "Make an AWQ INT4 checkpoint from a dense one, one block in memory at a time.")
    parser.add_argument("source", help="directory or Hub id of a dense Llama-family checkpoint")
    parser.add_argument("destination", help="directory to write; an interrupted run in it goes on")
    text = parser.add_argument_group("calibration text")
    text.add_argument(
        "--calib", metavar="FILE", help=".txt, .jsonl with text or messages, or - (default: the model's own)"
    )
    text.add_argument("--num-samples", type=_positive, default=128, help="windows of text (default %(default)s)")
    text.add_argument("--sequence-length", type=_positive, default=512, help="tokens of one (default %(default)s)")
    text.add_argument("--seed", type=int, default=0, help="of text the model writes itself (default %(default)s)")
    method = parser.add_argument_group("method")
    method.add_argument("--recipe", choices=RECIPES, default="default", help="our searches, the paper's, or none")
    method.add_argument("--group-size", type=_group_size, default=128, help="inputs that share a scale; -1 is all")
    method.add_argument("--grid", choices=GRIDS, default="asymmetric", help="how a range becomes scale and zero")
    method.add_argument("--compared-tokens", type=_positive, default=4096, help="that modules' outputs are compared on")
    method.add_argument("--no-clip", action="store_true", help="leave out the search of ranges")
    method.add_argument("--compensate", action="store_true", help="GPTQ's error compensation on top; no part of AWQ")
    output = parser.add_argument_group("output")
    output.add_argument("--format", choices=FORMATS, default="awq", help="AutoAWQ GEMM, or compressed-tensors")
    output.add_argument("--dtype", choices=DTYPES, default="float16", help="of scales and dense tensors")
    output.add_argument("--shard-gigabytes", type=float, default=SHARD_BYTES / 1e9, help="largest file")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--offload-directory", type=Path, help="keep the hidden states of the text in a file there")
    add_hub_flags(parser)
    return parser


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text} is not a positive number")
    return int(text)


def _group_size(text: str) -> int:
    return -1 if text == "-1" else _positive(text)


def _body(arguments: argparse.Namespace) -> None:
    dtype = DTYPES[arguments.dtype]
    recipe = replace(
        RECIPES[arguments.recipe],
        group_size=arguments.group_size,
        grid=arguments.grid,
        scale_dtype=dtype,
        compensate=arguments.compensate,
    )
    if arguments.no_clip:
        recipe = replace(recipe, clip="none")
    symmetric = arguments.format == "compressed-tensors" and arguments.grid == "symmetric"
    layout = "compressed-tensors-symmetric" if symmetric else arguments.format
    checkpoint = open_checkpoint(arguments.source, **hub_options(arguments))
    settings = Settings(recipe, layout, dtype, arguments.compared_tokens, int(arguments.shard_gigabytes * 1e9))
    calibration = calibrate(checkpoint, arguments)
    log.info(
        "calibration: %d tokens in %d windows, of %d found in %s",
        calibration.tokens_BL.numel(), len(calibration.tokens_BL), calibration.tokens_found, calibration.source,
    )  # fmt: skip
    report = quantize_checkpoint(
        checkpoint,
        arguments.destination,
        calibration,
        settings,
        device=arguments.device,
        offload_directory=arguments.offload_directory,
    )
    log.info("%s", report.summary())


def calibrate(checkpoint: Checkpoint, arguments: argparse.Namespace) -> Calibration:
    """The text named on the command line, or text that the model writes; then the whole model has to fit once."""
    tokenizer = Tokenizer(checkpoint.directory)
    size = arguments.num_samples, arguments.sequence_length
    if arguments.calib:
        return read_calibration(arguments.calib, tokenizer, *size)
    log.info("no --calib: the model writes its own calibration text, seed %d", arguments.seed)
    dtype = torch.float32 if arguments.device == "cpu" else torch.bfloat16
    model = load_model(checkpoint, arguments.device, dtype)
    return sample_calibration(model, tokenizer, *size, arguments.seed)


def main(argv: Sequence[str] | None = None) -> int:
    """`python -m miniawq.quantize`."""
    return cli.run(_body, build_parser(), argv)


if __name__ == "__main__":
    sys.exit(main())
