"""From logits to the next token, in functions that a captured step can hold: no host synchronisation, no global state.

The order is that of Hugging Face transformers: penalties, temperature, top-k, top-p, min-p, draw. Filters work on
logits in descending order, so that each of them is one comparison.

Shapes: B batch, V vocabulary, K candidates, the best first, L positions of a prompt.
"""

import hashlib
import logging
import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from miniawq.errors import InvalidInput, MiniawqError, UnsupportedCheckpoint

log = logging.getLogger(__name__)

NOT_A_NUMBER = -1
SEEDS = 1 << 64

OLDEST = 1 << 24  # float32 counts every token up to here, and then stands still
TINY, HUGE = math.nextafter(0, 1), sys.float_info.max
RANGES = {
    "temperature": ("a number, 0 or more", 0, HUGE),
    "top_k": ("a whole number, 0 or more", 0, HUGE),
    "top_p": ("a number above 0 and at most 1", TINY, 1),
    "min_p": ("a number from 0 to 1", 0, 1),
    # Beyond these a float32 logit becomes infinite, or not a number.
    "repetition_penalty": ("a number above 0, from 1e-6 to 1e6", 1e-6, 1e6),
    "presence_penalty": ("a number from -1e30 to 1e30", -1e30, 1e30),
    "frequency_penalty": ("a number from -1e30 to 1e30", -1e30, 1e30),
    "repeat_last_n": ("a whole number from -1 to 2**24", -1, OLDEST),
}
WHOLE = {"top_k", "repeat_last_n"}
# Keys of generation_config.json that are read elsewhere, or choose no token; and what turns other ones off.
OTHER_KEYS = set(
    """do_sample bos_token_id eos_token_id pad_token_id decoder_start_token_id transformers_version _from_model_config
    max_length max_new_tokens use_cache cache_implementation chat_format max_window_size trust_remote_code""".split()
)
OFF: tuple[Any, ...] = (None, False, 0, 1, [], {})


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How the next token is chosen. The defaults choose the most probable one.

    `temperature` 0 is greedy; `top_k` 0, `top_p` 1, `min_p` 0 and penalties of 1, 0 and 0 are off. `repetition_penalty`
    (Keskar et al., arXiv 1909.05858) counts the last `repeat_last_n` tokens of prompt and answer (-1: all of them);
    presence and frequency penalties (OpenAI's definitions) count what was generated. Raises InvalidInput out of range.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repeat_last_n: int = -1

    def __post_init__(self) -> None:
        for name, (allowed, lowest, highest) in RANGES.items():
            value = getattr(self, name)
            is_number = isinstance(value, int if name in WHOLE else int | float) and not isinstance(value, bool)
            if not is_number or not lowest <= value <= highest:
                raise InvalidInput(f"{name} = {value!r} makes no sense", f"it must be {allowed}")
            if name not in WHOLE:
                object.__setattr__(self, name, float(value))  # torch takes no integer beyond 64 bits

    @property
    def has_penalties(self) -> bool:
        """Whether earlier tokens matter."""
        return (self.repetition_penalty, self.presence_penalty, self.frequency_penalty) != (1.0, 0.0, 0.0)

    @classmethod
    def choose(cls, generation_config: Mapping[str, Any], **wanted: Any) -> "Sampling":
        """The checkpoint's own settings with what the user `wanted` (None: nothing) in their place.

        A generation_config counts if it says both `do_sample` and a temperature: AutoAWQ's saver sets the first alone
        in every file. A user who asks for any filter asks for sampling; temperature 0 asks for nothing but itself.
        Keys that are not known here and would choose tokens are told, and left out.
        """
        wanted = {name: value for name, value in wanted.items() if value is not None}
        unused = [
            key for key in generation_config.keys() - RANGES.keys() - OTHER_KEYS if generation_config[key] not in OFF
        ]
        if unused:
            log.info("generation_config.json: %s: not used here", ", ".join(sorted(unused)))
        stated = {name: generation_config[name] for name in RANGES if generation_config.get(name) is not None}
        samples = generation_config.get("do_sample")
        if not isinstance(samples, bool | None):
            why, fix = "it must be true or false", "correct it, or take the file of the original model"
            raise UnsupportedCheckpoint(f"generation_config.json: do_sample = {samples!r} makes no sense", why, fix)
        if wanted.get("temperature") == 0:
            return cls(**wanted)
        if not (samples and "temperature" in stated):
            filters = wanted.keys() & {"top_k", "top_p", "min_p"}
            stated = {"temperature": 1.0} if filters else {}
        try:
            cls(**{name: value for name, value in stated.items() if name not in wanted})
        except InvalidInput as error:
            fix = f"correct it, or give --{error.what.split()[0].replace('_', '-')}"
            raise UnsupportedCheckpoint(f"generation_config.json: {error.what}", error.why, fix) from error
        return cls(**(stated | wanted))


def fold_seed(seed: int | None) -> int | None:
    """What to seed a torch generator with. On a CPU only 32 bits of it count, so a larger seed is mixed into them."""
    if seed is None or 0 <= seed < 1 << 32:
        return seed
    if not 0 <= seed < SEEDS:
        raise InvalidInput(f"seed = {seed} makes no sense", "it must be a whole number from 0 to 2**64 - 1")
    return int.from_bytes(hashlib.sha256(seed.to_bytes(8, "little")).digest()[:7], "little")


def not_a_number(model: nn.Module, dtype: torch.dtype) -> MiniawqError:
    """Why logits of this dtype hold one: the weights do, or the dtype is too narrow for what is between."""
    what = "the model computed something that is not a number"
    for name, value in (*model.named_parameters(), *model.named_buffers()):
        if value.is_floating_point() and not value.isfinite().all():
            return UnsupportedCheckpoint(what, f"{name} holds values that are not finite", "download the weights again")
    if dtype == torch.float32:
        return MiniawqError(what, "its weights are finite, and too large to compute with", "download the weights again")
    return MiniawqError(what, f"{dtype} may be too narrow for this model", "try --dtype bfloat16 or float32")


class History(NamedTuple):
    """The tokens that each row has had, in float32. ages_BV: how many tokens ago each was last there, in prompt or
    answer; 1 for the latest, and infinity for those that never were. counts_BV: how often each was generated.
    """

    ages_BV: Tensor
    counts_BV: Tensor

    @classmethod
    def of_prompt(cls, tokens_BL: Tensor, vocab_size: int, padding_B: Tensor | None = None) -> "History":
        """Begin with a prompt, not counting the `padding_B` positions at the start of each row."""
        length, device = tokens_BL.shape[1], tokens_BL.device
        ages_BL = torch.arange(length, 0, -1, device=device).expand(tokens_BL.shape).float()
        if padding_B is not None:
            ages_BL = ages_BL.masked_fill(ages_BL > length - padding_B[:, None], torch.inf)
        counts_BV = torch.zeros(len(tokens_BL), vocab_size, device=device)
        ages_BV = torch.full_like(counts_BV, torch.inf).scatter_reduce(1, tokens_BL, ages_BL, "amin")
        return cls(ages_BV, counts_BV)

    def add(self, ids_B: Tensor) -> None:
        """Count one generated token in each row, in place."""
        self.ages_BV.add_(1).scatter_(1, ids_B[:, None], 1.0)
        self.counts_BV.scatter_add_(1, ids_B[:, None], torch.ones_like(ids_B[:, None], dtype=torch.float32))

    def extend(self, ids_L: Tensor) -> None:
        """Count several generated tokens of the only row, in place."""
        for token_id in ids_L:
            self.add(token_id[None])

    def after_each(self, ids_L: Tensor) -> "History":
        """That of the only row after each of several more tokens, one row each."""
        rows = History(*(part_BV.repeat(len(ids_L), 1) for part_BV in self))
        for place, token_id in enumerate(ids_L):
            later = History(*(part_LV[place:] for part_LV in rows))
            later.add(token_id.expand(len(later.counts_BV)))
        return rows


def penalize(logits_BV: Tensor, sampling: Sampling, history: History) -> Tensor:
    """Lower the logits of tokens that have been there."""
    oldest = OLDEST if sampling.repeat_last_n < 0 else sampling.repeat_last_n
    repeated_BV = history.ages_BV <= oldest
    factor = sampling.repetition_penalty
    weakened_BV = torch.where(logits_BV < 0, logits_BV * factor, logits_BV / factor)
    logits_BV = torch.where(repeated_BV, weakened_BV, logits_BV)
    present_BV = (history.counts_BV > 0).float()
    return logits_BV - sampling.presence_penalty * present_BV - sampling.frequency_penalty * history.counts_BV


def keep_top_p(logits_BK: Tensor, top_p: float) -> Tensor:
    """Drop (to -inf) what comes after the candidates whose probabilities reach `top_p`; the best always stays."""
    probability_BK = logits_BK.softmax(-1)
    mass_before_BK = probability_BK.cumsum(-1) - probability_BK
    return logits_BK.masked_fill(mass_before_BK >= top_p, -torch.inf)


def keep_min_p(logits_BK: Tensor, min_p: float) -> Tensor:
    """Drop (to -inf) candidates less than `min_p` times as probable as the best (arXiv 2407.01082)."""
    return logits_BK.masked_fill(logits_BK < logits_BK[:, :1] + math.log(min_p), -torch.inf)


# One for all rows, or one for each, which then has the random numbers of a text alone.
Generators = torch.Generator | Sequence[torch.Generator] | None


def draw(logits_BK: Tensor, generator: Generators = None) -> Tensor:
    """Index [B, 1] drawn from softmax(logits_BK): the largest of logits plus Gumbel noise (-log of an exponential)."""
    exponential_BK = torch.empty_like(logits_BK)
    if isinstance(generator, Sequence):
        for row_K, own in zip(exponential_BK, generator, strict=True):
            row_K.exponential_(generator=own)
    else:
        exponential_BK.exponential_(generator=generator)
    tiniest = torch.finfo(logits_BK.dtype).tiny
    return (logits_BK - exponential_BK.clamp_min_(tiniest).log()).argmax(-1, keepdim=True)


def candidates(logits_BV: Tensor, sampling: Sampling) -> tuple[Tensor, Tensor]:
    """logits_BK of the tokens that may be drawn, the best first, -inf for those filtered out; and their ids_BK."""
    vocab_size = logits_BV.shape[-1]
    # The best stays 0 however small the temperature is.
    scaled_BV = (logits_BV - logits_BV.amax(-1, keepdim=True)) / sampling.temperature
    logits_BK, ids_BK = scaled_BV.topk(min(sampling.top_k or vocab_size, vocab_size))
    if sampling.top_p < 1:
        logits_BK = keep_top_p(logits_BK, sampling.top_p)
    if sampling.min_p > 0:
        logits_BK = keep_min_p(logits_BK, sampling.min_p)
    return logits_BK, ids_BK


class TokenLogprobs(NamedTuple):
    """An id that was chosen with its log-probability, and the most probable ones of its place with theirs."""

    chosen: tuple[int, float]
    best: list[tuple[int, float]]


def logprobs_of(logits_BV: Tensor, ids: Sequence[int], count: int) -> list[TokenLogprobs]:
    """Those of chosen ids, and of the `count` best, as the model has them: before penalties, temperature and filters.

    An id that is none (NOT_A_NUMBER) counts as 0.
    """
    logprobs_BV = logits_BV.float().log_softmax(-1)
    chosen_B = logprobs_BV[torch.arange(len(ids)), torch.tensor(ids).clamp_min(0)]
    best_BK, ids_BK = logprobs_BV.topk(min(count, logits_BV.shape[-1]))
    rows = zip(ids, chosen_B.tolist(), ids_BK.tolist(), best_BK.tolist(), strict=True)
    return [TokenLogprobs((chosen, logprob), list(zip(*best, strict=True))) for chosen, logprob, *best in rows]


class NotedLogprobs(list[TokenLogprobs]):
    """Those of the ids of one text as they are chosen, with so many of the best: what `generate` takes as `watch`."""

    def __init__(self, most: int) -> None:
        super().__init__()
        self.most = most

    def __call__(self, logits_BV: Tensor, ids: Sequence[int]) -> None:
        self += logprobs_of(logits_BV, ids, self.most)


def sample(
    logits_BV: Tensor, sampling: Sampling, history: History | None = None, generator: Generators = None
) -> Tensor:
    """The next token of each row, int64 ids_B; NOT_A_NUMBER for a row whose logits hold a NaN.

    `history` is for penalties only, and is not changed.
    """
    logits_BV = logits_BV.float()
    broken_B = logits_BV.amax(-1).isnan()
    if sampling.has_penalties:
        if history is None:
            raise InvalidInput("penalties need the history of each row", "history is None")
        logits_BV = penalize(logits_BV, sampling, history)
    if sampling.temperature == 0:
        return logits_BV.argmax(-1).masked_fill(broken_B, NOT_A_NUMBER)
    logits_BK, ids_BK = candidates(logits_BV, sampling)
    ids_B = ids_BK.gather(-1, draw(logits_BK, generator)).squeeze(-1)
    return ids_B.masked_fill(broken_B, NOT_A_NUMBER)
