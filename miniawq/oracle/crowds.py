"""L5: activations whose statistics mislead a search that does not look at all of them.

Among many tokens a few that no regular sample meets, one token many times, outputs so large that half precision does
not see what rounding changes, and channels of which one is 10**13 times as loud as another.
"""

from collections.abc import Iterator
from random import Random

import torch
from torch import Tensor

import miniawq.oracle.cases as cases
from miniawq.oracle.cases import random_weight, smallest
from miniawq.oracle.check import rule
from miniawq.oracle.contract import Limits
from miniawq.oracle.search import Problem, expect_no_worse
from miniawq.oracle.searches import expect_clip_searched, expect_searched
from miniawq.oracle.subject import Subject

LOUD = (541, 547, 557)  # primes: no sample of every second, third ... token meets them, nor do the first 512
CROWDS = (700, 1100, 2100)  # tokens: more than the 512 of which searches like to take a sample


def two_kinds(limits: Limits, seed: int) -> tuple[Tensor, Tensor, Tensor, int]:
    """A weight, and a token of each of two kinds: one has other loud and silent channels than the other.

    Large weights stand on the silent channels.
    """
    k, n, group_size = smallest(limits, 1)
    random = Random(seed)
    weight, tokens = random_weight(seed, n, k) / 16, cases.normal(random, 8, k) / 4
    loud, louder, silent, still = random.sample(range(k), 4)
    tokens[:4, loud] *= 32
    tokens[4:, louder] *= 32
    weight[:, silent], weight[:, still] = 2.0 * weight.abs().amax(), 2.0 * weight.abs().amax()
    tokens[:4, silent], tokens[4:, still] = 0, 0
    return weight, tokens[:4], tokens[4:], group_size


def few_in_a_crowd(limits: Limits) -> Iterator[Problem]:
    """Three tokens of one kind among hundreds of the other, which are 512 times quieter."""
    for seed, count in enumerate(CROWDS):
        weight, few, many, group_size = two_kinds(limits, 140 + seed)
        x = many.repeat(count // 4, 1) / 512
        x[list(LOUD)] = few[:3]
        yield weight, x, group_size


def one_many_times(limits: Limits) -> Iterator[Problem]:
    """A token that is there 300 times, and three others that are loud where it is not."""
    for seed in (150, 151, 152):
        weight, often, _, group_size = two_kinds(limits, seed)
        quiet = often[0].abs() < 1
        others = torch.where(quiet, cases.normal(Random(seed), 3, len(quiet)) * 4, 0)
        yield weight, torch.cat([often[:1].expand(300, -1), others]), group_size


@rule("L5.scales.few-in-a-crowd", "search_scales", flags=("HalfArithmetic",))
def scales_of_few(target: Subject) -> None:
    """Of up to 2100 tokens all count: the three loud ones, which no regular sample meets, decide."""
    for found in few_in_a_crowd(target.limits):
        target.judge(expect_searched, *found)


@rule("L5.clip.few-in-a-crowd", "search_clip", flags=("HalfArithmetic",))
def clip_of_few(target: Subject) -> None:
    """Of up to 2100 tokens all count: the three loud ones, which no regular sample meets, decide."""
    for found in few_in_a_crowd(target.limits):
        target.judge(expect_clip_searched, *found)


@rule("L5.scales.repeated-tokens", "search_scales", flags=("HalfArithmetic",))
def scales_of_repeats(target: Subject) -> None:
    """A token that is there 300 times counts 300 times."""
    for found in one_many_times(target.limits):
        target.judge(expect_searched, *found)


@rule("L5.clip.repeated-tokens", "search_clip", flags=("HalfArithmetic",))
def clip_of_repeats(target: Subject) -> None:
    """A token that is there 300 times counts 300 times."""
    for found in one_many_times(target.limits):
        target.judge(expect_clip_searched, *found)


@rule("L5.scales.large-outputs", "search_scales", flags=("HalfArithmetic",))
def large_outputs(target: Subject) -> None:
    """Outputs that are large beside what rounding changes: the losses are differences of unrounded outputs.

    One loud channel has weights of 15 scales, which rounding keeps.
    """
    k, n, group_size = smallest(target.limits, 1)
    for seed in range(24):
        random = Random(160 + seed)
        weight = cases.raw(random, (n, k), torch.uint8).to(torch.float32) / 17
        weight[:, 0], weight[:, 1] = 15, 0
        x = cases.normal(random, 2, k)
        x[:, 0] = 24.0 + seed
        target.judge(expect_no_worse, weight, x, group_size)


@rule("L5.scales.wide-range", "search_scales")
def factors_beyond_float16(target: Subject) -> None:
    """Activations from 1e-4 to 1e9 under weights as small as they are large: factors that float16 has not are kept."""
    k, n, group_size = smallest(target.limits, 1)
    size = torch.logspace(-4, 9, k)
    target.judge(expect_no_worse, random_weight(170, n, k) / size, cases.normal(Random(171), 4, k) * size, group_size)
