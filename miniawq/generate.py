"""Chapter 5: from a prompt to the last token, in Python and on the command line.

    model, tokenizer = load("owner/name-AWQ")
    for piece in complete(model, tokenizer, tokenizer.encode("Once upon a time"), max_tokens=100): ...
    for ids in generate(model, tokens_BL, max_tokens=100, stop_ids=tokenizer.eos_ids): ...

Shapes: B batch, L positions of the prompt, V vocabulary.
"""

import argparse
import logging
import secrets
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from miniawq import cli
from miniawq.checkpoint.hub import hub_options
from miniawq.checkpoint.loading import DTYPES, KV_DTYPES, default_dtype, load_model
from miniawq.checkpoint.opening import open_checkpoint
from miniawq.commands import prompts
from miniawq.commands.configuration import show_configuration
from miniawq.commands.context import Context
from miniawq.commands.figures import in_full, in_one_line
from miniawq.commands.flags import build_parser, check_flags, sampling_flags
from miniawq.commands.interactive import converse
from miniawq.commands.many import ManyPrompts
from miniawq.commands.samples import Samples
from miniawq.commands.talking import Talker
from miniawq.commands.telling import tell
from miniawq.engine.cached_text import CachedText
from miniawq.engine.completion import Completion
from miniawq.engine.delivery import delivered, observed
from miniawq.engine.fitting import check_decoder, check_prompt
from miniawq.engine.memory import PREFILL_CHUNK, against_plan, footprint, require_memory
from miniawq.engine.rows import clear
from miniawq.engine.sampling import NOT_A_NUMBER, SEEDS, NotedLogprobs, Sampling, fold_seed, not_a_number, sample
from miniawq.engine.speculation import Lookup, speculated
from miniawq.engine.start import Decoders, PlainStep, Step, threads_for
from miniawq.errors import InvalidInput
from miniawq.hardware import pick_device, threads
from miniawq.model import Llama
from miniawq.text.tokenizer import Tokenizer, read_object

__all__ = ["build_parser", "complete", "generate", "load", "main"]

# Not __name__, which is __main__ for those who run this file.
log = logging.getLogger("miniawq.generate")

DEMO_SEED = 0


def load(
    model: str | Path | None = None,
    *,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    kv_dtype: torch.dtype | None = None,
    revision: str | None = None,
    local_files_only: bool = False,
) -> tuple[Llama, Tokenizer]:
    """A dense or INT4 model and its tokenizer, from a directory, a Hub id, "id@revision", or (None) the demo.

    `device` defaults to CUDA where there is one, `dtype` to that of the checkpoint on a GPU and float32 on a CPU;
    `kv_dtype`, of kv caches, to `dtype`.
    """
    checkpoint = open_checkpoint(model, revision=revision, local_files_only=local_files_only).with_kv_cache(kv_dtype)
    device = pick_device(device)
    return load_model(checkpoint, device, dtype or default_dtype(checkpoint, device)), Tokenizer(checkpoint.directory)


@torch.inference_mode()
def generate(
    model: Llama,
    tokens_BL: Tensor,
    *,
    max_tokens: int,
    sampling: Sampling | None = None,
    seed: int | None = None,
    stop_ids: frozenset[int] = frozenset(),
    padding_B: Tensor | None = None,
    prefill_chunk: int = PREFILL_CHUNK,
    decoder: Step | None = None,
    cached: CachedText | None = None,
    lookup: Lookup | None = None,
    reading: Callable[[Sequence[Tensor]], Iterable[Tensor]] = iter,
    watch: Callable[[Tensor, list[int]], None] | None = None,
) -> Iterator[list[int | None]]:
    """Continue each row of tokens_BL, yielding one id a row at every step, and None for rows that have ended.

    A row ends with the first of `stop_ids`, which is still yielded; the iterator ends with the last row, or after
    `max_tokens` steps. `padding_B` counts the padding at the start of each row. The prompts run in pieces of
    `prefill_chunk` tokens, those of all rows together, to bound the memory they take. `sampling` defaults to greedy,
    `seed` to torch's global generator. A `decoder` computes each token after the first from the one before, for
    `delivered`; without one `PlainStep` runs the model. It must have the same `sampling`. `cached` says what its cache
    holds of the last text, and what it shares with this one is not computed again; for prompts without padding.
    A `lookup` that has the ids of a single prompt guesses what follows, and `speculated` keeps what is right.
    `reading` is given the pieces and gives them back one by one: a progress bar. `watch` is given the logits of every
    step, and the ids chosen from them; nothing is guessed then.
    """
    sampling = sampling or Sampling()
    check_prompt(model, tokens_BL, max_tokens, padding_B)
    batch, needed = len(tokens_BL), tokens_BL.shape[1] + max_tokens
    decoder = decoder or PlainStep(model, batch, needed, sampling)
    check_decoder(decoder, batch, needed, sampling)
    if lookup is not None and batch > 1:
        raise InvalidInput("a lookup guesses for one text", f"there are {batch} prompts", "give one, or no lookup")
    if cached is not None and padding_B is not None:
        raise InvalidInput("cached goes with no padding", "its ids stand at the positions of prompts that begin at 0")
    cached, length = cached or CachedText(), decoder.cache.length
    decoder.begin(tokens_BL, padding_B, fold_seed(seed))
    decoder.cache.length = cached.begin(tokens_BL, length)
    for chunk_BL in reading(tokens_BL[:, decoder.cache.length :].split(max(1, prefill_chunk // batch), dim=1)):
        logits_BV = model.logits(decoder.read(chunk_BL, decoder.cache)[:, -1])
    ids_B = sample(logits_BV, sampling, decoder.history, decoder.generator)
    running = [True] * batch
    if watch is not None:
        steps = observed(decoder, ids_B, max_tokens, logits_BV, watch)
    elif lookup is not None:
        steps = speculated(decoder, ids_B, max_tokens, lookup)
    else:
        steps = delivered(decoder, ids_B, max_tokens)
    for ids in steps:
        cached.add(ids)
        if NOT_A_NUMBER in ids:
            cached.forget()
            for row in range(len(decoder.cache.keys_NBMJE[0])):
                clear(decoder, row, 0)
            raise not_a_number(model, logits_BV.dtype)
        yield [token_id if is_on else None for token_id, is_on in zip(ids, running, strict=True)]
        running = [is_on and token_id not in stop_ids for token_id, is_on in zip(ids, running, strict=True)]
        if not any(running):
            return


def complete(
    model: Llama,
    tokenizer: Tokenizer,
    prompt_ids: Sequence[int],
    *,
    max_tokens: int,
    stop: Sequence[str] = (),
    stop_ids: frozenset[int] | None = None,
    cached: CachedText | None = None,
    logprobs: int | None = None,
    **options: Any,
) -> Completion:
    """The text after a prompt, in pieces as it comes; `options` go to `generate`, `stop_ids` default to `eos_ids`.

    With `logprobs` the pieces have the log-probabilities of their tokens, and of so many of the best in each place.
    """
    stop_ids = tokenizer.eos_ids if stop_ids is None else stop_ids
    if logprobs is not None:
        options["watch"] = NotedLogprobs(logprobs)
    tokens_BL = torch.tensor([list(prompt_ids)], dtype=torch.long, device=model.device)
    steps = generate(model, tokens_BL, max_tokens=max_tokens, stop_ids=stop_ids, cached=cached, **options)
    ids = (token_id for (token_id,) in steps if token_id is not None)
    return Completion(
        tokenizer, prompt_ids, ids, stop_ids=stop_ids, stop=stop, cached=cached, logprobs=options.get("watch", ())
    )


def main(argv: Sequence[str] | None = None) -> int:
    """The command line: `commands/flags.py` has the flags, `commands/prompts.py` reads what they name."""
    return cli.run(_run, build_parser(), argv)


def _run(arguments: argparse.Namespace) -> None:
    started = time.perf_counter()
    check_flags(arguments)
    checkpoint = open_checkpoint(arguments.model, **hub_options(arguments)).with_kv_cache(KV_DTYPES[arguments.kv_dtype])
    # Whatever can be refused is refused before the weights are read.
    device = pick_device(arguments.device)
    tokenizer = Tokenizer(checkpoint.directory, prompts.given_template(arguments))
    stated = read_object(checkpoint.directory / "generation_config.json")
    sampling = Sampling.choose(stated, **sampling_flags(arguments))
    prompts.check_template(arguments, tokenizer)
    dtype = DTYPES.get(arguments.dtype) or default_dtype(checkpoint, device)
    context = Context(arguments, checkpoint.model_config.max_position_embeddings)
    context.fit(checkpoint, device, dtype)
    writer = Writer(arguments, tokenizer, sampling, context, device)
    prompt = None if arguments.interactive or arguments.prompts else prompts.read_prompt(arguments, tokenizer)
    several = writer.several(prompt)
    rows, positions = several.together.fit(checkpoint, device, dtype) if several else (1, writer.positions(prompt))
    sizes = {"batch": rows, "max_seq_len": positions, "overhead": arguments.memory_margin}
    needed = footprint(checkpoint, dtype, device=device.type, **sizes)
    if arguments.show_config:
        show_configuration(writer, checkpoint, device, dtype, needed)
    if arguments.memory_check:
        require_memory(needed, checkpoint, device, dtype)
    with against_plan(needed):
        model = load_model(checkpoint, device, dtype)
    with against_plan(needed), threads(threads_for(model)):
        writer.use(model, time.perf_counter() - started)
        if several is not None:
            several.write()
        elif prompt is not None:
            tell(writer, prompt[0], *writer.begin(*prompt))
        else:
            converse(Talker(writer), prompts.system_message(arguments))
        writer.decoders.wait()


class Writer:
    """The user's settings, and then a model, writing texts to stdout and figures to stderr."""

    def __init__(
        self,
        arguments: argparse.Namespace,
        tokenizer: Tokenizer,
        sampling: Sampling,
        context: Context,
        device: torch.device,
    ) -> None:
        self.arguments, self.tokenizer, self.sampling, self.context = arguments, tokenizer, sampling, context
        self.texts_told = 0
        self.extra_ends = frozenset(map(tokenizer.id_of, arguments.extra_eos_token))
        chosen = DEMO_SEED if arguments.model is None else secrets.randbits(32)
        self.next_seed = chosen if arguments.seed is None else arguments.seed
        is_reproducible = arguments.model is None or arguments.seed is not None or sampling.temperature == 0
        wanted: bool | None = arguments.compile
        self.decoders = Decoders(
            sampling,
            context.limit,
            device,
            wanted=wanted,
            streams=not is_reproducible,
            converses=arguments.interactive,
            speculates=arguments.speculate,
        )
        self.lookup: Lookup | None = None

    def several(self, prompt: tuple[str, bool] | None) -> ManyPrompts | Samples | None:
        """What is written at once: --prompts, or --num-samples; None for one text, or a conversation."""
        if self.arguments.prompts:
            return ManyPrompts(self)
        return Samples(self, *prompt) if prompt is not None and self.arguments.num_samples > 1 else None

    def positions(self, prompt: tuple[str, bool] | None) -> int:
        """Positions that the kv cache will have: of a prompt and its answer, or of a conversation (None)."""
        return self.decoders.room(self.context.wanted(None if prompt is None else len(self.encode(*prompt))))

    def use(self, model: Llama, load_seconds: float) -> None:
        """Write with this model from now on."""
        self.model, self.load_seconds = model, load_seconds
        self.decoders.use(model)
        if self.arguments.speculate and not self.decoders.compiles:
            log.info("--speculate has no use: only where steps are compiled, checking guesses is faster than steps")

    def report(self, completion: Completion, seed: int) -> None:
        """Say on stderr how it went."""
        if completion.ids and not self.arguments.quiet:
            cli.say((in_full if self.arguments.stats else in_one_line)(self, completion, seed))

    def begin(self, prompt: str, is_chat: bool) -> tuple[Completion, int]:
        """A completion with the next seed."""
        prompts.show(self.arguments, prompt)
        prompt_ids = self.encode(prompt, is_chat)
        seed, self.next_seed = self.next_seed, (self.next_seed + 1) % SEEDS
        max_tokens, wanted = self.context.room(len(prompt_ids)), self.arguments.max_tokens
        if wanted is not None and wanted > max_tokens:
            told = "only %d new tokens fit after a prompt of %d in a context of %d"
            log.info(told, max_tokens, len(prompt_ids), self.context.limit)
        decoder = self.decoders.for_text(len(prompt_ids) + max_tokens)
        self.lookup = Lookup(prompt_ids) if self.arguments.speculate and self.decoders.compiles else None
        completion = complete(
            self.model,
            self.tokenizer,
            prompt_ids,
            max_tokens=max_tokens,
            stop=self.arguments.stop,
            stop_ids=self.ends(is_chat),
            sampling=self.sampling,
            seed=seed,
            decoder=decoder,
            cached=self.decoders.cached,
            lookup=self.lookup,
            logprobs=self.arguments.logprobs,
            reading=partial(prompts.bar, is_quiet=self.arguments.quiet),
        )
        return completion, seed

    def encode(self, prompt: str, is_chat: bool) -> list[int]:
        """The ids of a prompt; a chat template writes its own special tokens."""
        return self.tokenizer.encode(prompt, add_special_tokens=not is_chat)

    def ends(self, is_chat: bool) -> frozenset[int]:
        """The ids that end an answer; a checkpoint may name only the one that ends a document."""
        ends = self.tokenizer.eos_ids | (self.tokenizer.end_of_turn_ids() if is_chat else frozenset())
        return self.extra_ends if self.arguments.ignore_eos else self.extra_ends | ends


if __name__ == "__main__":
    sys.exit(main())
