"""What a check is: a stable id, the functions it needs, a body that raises `Broken`, and how one is run.

A body gets a `Subject`. There are three kinds: bodies that run once, bodies with drawn arguments, which run under
Hypothesis, and bodies over a table of factors, which run once for each setting of a covering array. Everything a body
needs is drawn or stands in its setting, so a run can be repeated.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from typing import Any

from hypothesis import HealthCheck, Phase, Verbosity, given, settings
from hypothesis import seed as hypothesis_seed
from hypothesis.errors import UnsatisfiedAssumption
from hypothesis.strategies import SearchStrategy

from miniawq.oracle.contract import Limits
from miniawq.oracle.covering import Allowed, Factors, Setting, covering, simplified
from miniawq.oracle.subject import Broken, Lacking, Subject, message_of


def everything(setting: Setting) -> bool:
    """No setting is left out."""
    return True


@dataclass(frozen=True)
class Check:
    """One rule. `drawn` gives, for a target's limits, the strategies of the body's keyword arguments; `over` gives the
    factors of the body's argument `setting`, of which the `allowed` ones are asked for.
    """

    id: str
    rule: str
    needs: tuple[str, ...]
    flags: tuple[str, ...]
    body: Callable[..., None]
    drawn: dict[str, Callable[[Limits], SearchStrategy]]
    effort: float = 1.0
    over: Callable[[Limits], Factors] | None = None
    allowed: Allowed = everything
    arrays: int = 1

    @property
    def level(self) -> str:
        """L0 .. L5."""
        return self.id.split(".")[0]


def rule(
    id: str,
    *needs: str,
    flags: tuple[str, ...] = (),
    effort: float = 1.0,
    over: Callable[[Limits], Factors] | None = None,
    allowed: Allowed = everything,
    arrays: int = 1,
    **drawn: Any,
) -> Callable[[Callable[..., None]], Check]:
    """Make a check of a body; its docstring's first paragraph is the rule that a failure prints.

    `flags` name the legal differences (`contract.FLAGS`) that a failure may show. `effort` below 1 means fewer examples
    of a check that takes long, `arrays` above 1 more than one covering array of one that takes little: most triples of
    levels meet in three.
    """

    def decorate(body: Callable[..., None]) -> Check:
        rule = " ".join((body.__doc__ or "").split("\n\n")[0].split())
        return Check(id, rule, needs, flags, body, drawn, effort, over, allowed, arrays)

    return decorate


@dataclass(frozen=True)
class Profile:
    """How hard to look: examples of each drawn check, and a seed (None: the same examples every time)."""

    examples: int = 30
    seed: int | None = None
    shrink: bool = True


PROFILES = {"default": Profile(), "deep": Profile(examples=2000, seed=0)}


@dataclass
class Result:
    """What came of one check. `status` is passed, failed, skipped, xfailed or xpassed."""

    check: Check
    status: str
    reason: str = ""
    broken: Broken | None = None
    seconds: float = field(default=0.0, compare=False)


def run_check(check: Check, subject: Subject, profile: Profile) -> Result:
    """Run one check; no exception of the target gets past here."""
    lacking = [name for name in check.needs if not subject.has(name)]
    if lacking:
        return Result(check, "skipped", f"the target has no {', '.join(lacking)}")
    started = time.perf_counter()
    result = attempt(check, subject, profile)
    result.seconds = time.perf_counter() - started
    return result


def attempt(check: Check, subject: Subject, profile: Profile) -> Result:
    """Run the body, with drawn arguments or over its settings where it has some."""
    subject.last = None
    try:
        if check.drawn:
            search(check, subject, profile)()
        elif check.over:
            cover(check, subject, profile)
        else:
            remembering(check, subject)
    except Lacking as lack:
        return Result(check, "skipped", str(lack))
    except Broken as broken:
        return Result(check, "failed", broken=broken)
    except Exception as error:  # Hypothesis saw a target that fails now and then
        return Result(check, "failed", broken=unforeseen(subject, error))
    return Result(check, "passed")


def remembering(check: Check, subject: Subject, **arguments: Any) -> None:
    """Run the body once and tie the last call to what it raises."""
    try:
        check.body(subject, **arguments)
    except Broken as broken:
        broken.call = broken.call or subject.last
        raise
    except (Lacking, UnsatisfiedAssumption):
        raise
    except Exception as error:
        raise unforeseen(subject, error) from error


def unforeseen(subject: Subject, error: Exception) -> Broken:
    """A result that no rule expected, as a failure."""
    broken = Broken("a result that can be compared", f"{type(error).__name__}: {message_of(error)}")
    broken.call = subject.last
    return broken


def failure(check: Check, subject: Subject, setting: Setting) -> Broken | None:
    """What breaks under a setting, if anything; a lack is no failure."""
    try:
        remembering(check, subject, setting=setting)
    except Broken as broken:
        broken.setting = setting
        return broken
    except Lacking:
        return None
    return None


def cover(check: Check, subject: Subject, profile: Profile) -> None:
    """Run the body under each setting of a covering array, and simplify the first that fails.

    A target that lacks something in one setting is held to the others, and the check still counts as skipped.
    """
    assert check.over is not None
    factors, lack = check.over(subject.limits), None
    if not all(factors.values()):
        raise Lacking("nothing within the target's limits can be asked here")
    for setting in settings_of(check, factors, profile):
        try:
            remembering(check, subject, setting=setting)
        except Lacking as lacking:
            lack = lack or lacking
        except Broken as broken:
            broken.setting = setting
            if profile.shrink:
                smallest = simplified(setting, factors, check.allowed, lambda s: bool(failure(check, subject, s)))
                broken = failure(check, subject, smallest) or broken
            broken.setting = {name: level for name, level in broken.setting.items() if level != factors[name][0]}
            raise broken from None
    if lack:
        raise lack


def settings_of(check: Check, factors: Factors, profile: Profile) -> list[Setting]:
    """The check's covering arrays; some more where more examples are asked for."""
    arrays, first = check.arrays * max(1, round(profile.examples / 400)), profile.seed or 0
    known = tuple((name, tuple(levels)) for name, levels in factors.items())
    return [setting for seed in range(first, first + arrays) for setting in covered(known, check.allowed, seed)]


@cache
def covered(factors: tuple[tuple[str, tuple[Any, ...]], ...], allowed: Allowed, seed: int) -> list[Setting]:
    """A covering array, made once where one process judges many targets."""
    return covering(dict(factors), allowed, seed)


def search(check: Check, subject: Subject, profile: Profile) -> Callable[[], None]:
    """The body under Hypothesis, over everything `drawn` allows for the target's limits."""
    strategies = {name: strategy(subject.limits) for name, strategy in check.drawn.items()}

    def body(**drawn: Any) -> None:
        remembering(check, subject, **drawn)

    phases = [Phase.explicit, Phase.generate, Phase.shrink] if profile.shrink else [Phase.explicit, Phase.generate]
    test = given(**strategies)(body)
    if profile.seed is not None:
        test = hypothesis_seed(profile.seed)(test)
    return settings(
        max_examples=max(1, round(profile.examples * check.effort)),
        derandomize=profile.seed is None,
        database=None,
        deadline=None,
        phases=phases,
        suppress_health_check=list(HealthCheck),
        verbosity=Verbosity.quiet,
        report_multiple_bugs=False,
    )(test)
