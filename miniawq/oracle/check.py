"""What a check is: a stable id, the functions it needs, a body that raises `Broken`, and how one is run.

A body gets a `Subject`, which calls the target and remembers the last call, so that a failure can be pasted. Checks
with drawn arguments run under Hypothesis, which shrinks them; everything a body needs is drawn, so a run can be
repeated.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from hypothesis import HealthCheck, Phase, Verbosity, given, settings
from hypothesis import seed as hypothesis_seed
from hypothesis.strategies import SearchStrategy
from torch import Tensor

from miniawq.oracle.contract import Limits


class Broken(AssertionError):
    """A rule the target broke: what was expected, what came, and the call."""

    def __init__(self, expected: str, got: str) -> None:
        super().__init__(f"expected {expected}; got {got}")
        self.expected, self.got = expected, got
        self.call: Call | None = None


class Lacking(Exception):
    """The check asks for something the target says it does not do."""


class Crash(Exception):
    """The target ended or gave no answer: never a refusal, whatever was expected."""


@dataclass(frozen=True)
class Call:
    """One call of the target, by parameter name."""

    function: str
    arguments: dict[str, Any]


PARAMETERS = {
    "pack": ("codes",),
    "unpack": ("words",),
    "dequantize": ("qweight", "qzeros", "scales", "group_size"),
    "quantize": ("weight", "group_size"),
    "matmul": ("x", "qweight", "qzeros", "scales", "group_size", "bias"),
    "load_checkpoint": ("directory",),
    "search_scales": ("weight", "x", "group_size"),
    "search_clip": ("weight", "x", "group_size"),
}


class Subject:
    """The target as the checks see it: arguments moved to the device, results as CPU tensors, calls remembered."""

    def __init__(self, target: Any, device: str = "cpu") -> None:
        self.target, self.device = target, device
        self.limits = Limits.of(target)
        self.last: Call | None = None

    def must_take(self, group_size: int) -> None:
        """Lacking when the target does not take this group size."""
        if group_size not in self.limits.group_sizes:
            raise Lacking(f"the target does not take a group_size of {group_size}")

    def has(self, function: str) -> bool:
        """Whether the target implements this function of the contract."""
        return callable(getattr(self.target, function, None))

    def raw(self, function: str, *arguments: Any) -> Any:
        """The target's own result, with its exceptions as they are."""
        self.last = Call(function, dict(zip(PARAMETERS[function], arguments, strict=False)))
        given = [moved(a, self.device) if isinstance(a, Tensor) else a for a in arguments]
        try:
            return getattr(self.target, function)(*given)
        finally:
            for mine, theirs in zip(arguments, given, strict=True):
                if mine is not theirs:
                    mine.copy_(theirs)  # what the target wrote into its argument is to be seen here

    def call(self, function: str, *arguments: Any) -> Any:
        """The result as CPU tensors; an exception of the target is a broken rule, a NotImplementedError is a lack."""
        try:
            return as_tensors(self.raw(function, *arguments))
        except NotImplementedError as lack:
            raise Lacking(f"{function}: {lack}") from lack
        except Exception as error:
            raise Broken("a result", f"{type(error).__name__}: {message_of(error)}") from error

    def tensor(self, function: str, arguments: tuple[Any, ...], dtype: torch.dtype, shape: tuple[int, ...]) -> Tensor:
        """The one tensor a function must return, with its dtype and shape compared to what they must be."""
        return expect_tensor(self.call(function, *arguments), dtype, shape)

    def refuses(self, function: str, arguments: tuple[Any, ...], why: str, error: type[Exception] = ValueError) -> str:
        """The message with which the target refuses these arguments; Broken when it takes them."""
        try:
            self.raw(function, *arguments)
        except Crash as crash:
            raise Broken(f"a refusal because of {why}", str(crash)) from crash
        except NotImplementedError as lack:
            raise Lacking(f"{function}: {lack}") from lack
        except error as refusal:
            return str(refusal)
        except Exception as other:
            got = f"{type(other).__name__}: {message_of(other)}"
            raise Broken(f"{error.__name__} because of {why}", got) from other
        name = "an exception" if error is Exception else error.__name__
        raise Broken(f"{name} because of {why}", "a result, with no error")


def moved(tensor: Tensor, device: str) -> Tensor:
    """The tensor on another device, with its strides; itself on the CPU."""
    if device == "cpu":
        return tensor
    return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=device).copy_(tensor)


def as_tensors(result: Any) -> Any:
    """Results of any array library as CPU tensors; containers keep their form."""
    if isinstance(result, tuple | list):
        return tuple(as_tensors(item) for item in result)
    if hasattr(result, "items"):
        return {name: as_tensors(item) for name, item in result.items()}
    return torch.as_tensor(result).detach().cpu()


def message_of(error: BaseException) -> str:
    """The first line of an error's message."""
    return (str(error).splitlines() or [""])[0][:200]


def expect_tensor(got: Any, dtype: torch.dtype, shape: tuple[int, ...]) -> Tensor:
    """`got` when it is a tensor of this dtype and shape; equivalent to asserting both."""
    if not isinstance(got, Tensor):
        raise Broken(f"a tensor {name_of(dtype)}{list(shape)}", type(got).__name__)
    if got.dtype != dtype or tuple(got.shape) != tuple(shape):
        raise Broken(f"{name_of(dtype)}{list(shape)}", f"{name_of(got.dtype)}{list(got.shape)}")
    return got


def name_of(dtype: torch.dtype) -> str:
    """A dtype's name without the module."""
    return str(dtype).removeprefix("torch.")


def expect_equal(got: Tensor, expected: Tensor, what: str = "") -> None:
    """Equivalent to `assert torch.equal(got, expected)`: -0.0 equals 0.0, and NaN equals NaN."""
    if got.shape != expected.shape:
        raise Broken(f"{what} of shape {list(expected.shape)}", f"shape {list(got.shape)}")
    wrong = (got != expected) & ~(got.isnan() & expected.isnan())
    if bool(wrong.any()):
        raise Broken(*first_difference(got, expected, wrong, what))


def expect_within(got: Tensor, expected: Tensor, bound: Tensor, what: str = "") -> None:
    """Equivalent to `assert (abs(got - expected) <= bound).all()`, in float64; NaN is never within."""
    error = (got.to(torch.float64) - expected.to(torch.float64)).abs()
    wrong = ~(error <= bound)
    if bool(wrong.any()):
        expected_text, got_text = first_difference(got, expected, wrong, what)
        at = tuple(int(i) for i in wrong.nonzero()[0])
        raise Broken(f"{expected_text} within {float(bound.expand_as(error)[at]):.4g}", got_text)


def first_difference(got: Tensor, expected: Tensor, wrong: Tensor, what: str) -> tuple[str, str]:
    """Both sides at the first wrong element, in words."""
    at = tuple(int(i) for i in wrong.nonzero()[0])
    place = f"{what}{list(at)}".strip()
    count = f"{int(wrong.sum())} of {wrong.numel()} differ"
    return f"{place} = {scalar(expected[at])}", f"{place} = {scalar(got[at])} ({count})"


def scalar(value: Tensor) -> str:
    """One number as it would be typed; words in hexadecimal."""
    if value.dtype == torch.int32:
        return f"0x{int(value) % 2**32:08x}"
    return repr(value.item())


@dataclass(frozen=True)
class Check:
    """One rule. `drawn` gives, for a target's limits, the strategies of the body's keyword arguments."""

    id: str
    rule: str
    needs: tuple[str, ...]
    flags: tuple[str, ...]
    body: Callable[..., None]
    drawn: dict[str, Callable[[Limits], SearchStrategy]]
    effort: float = 1.0

    @property
    def level(self) -> str:
        """L0 .. L5."""
        return self.id.split(".")[0]


def rule(
    id: str, *needs: str, flags: tuple[str, ...] = (), effort: float = 1.0, **drawn: Any
) -> Callable[[Callable[..., None]], Check]:
    """Make a check of a body; its docstring's first paragraph is the rule that a failure prints.

    `flags` name the legal differences (`contract.FLAGS`) that a failure may show. `effort` below 1 means fewer examples
    of a check that takes long.
    """

    def decorate(body: Callable[..., None]) -> Check:
        rule = " ".join((body.__doc__ or "").split("\n\n")[0].split())
        return Check(id, rule, needs, flags, body, drawn, effort)

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
    """Run the body, with drawn arguments where it has some."""
    subject.last = None
    try:
        if check.drawn:
            search(check, subject, profile)()
        else:
            remembering(check, subject)
    except Lacking as lack:
        return Result(check, "skipped", str(lack))
    except Broken as broken:
        return Result(check, "failed", broken=broken)
    except Exception as error:  # a flaky target, or a result that no rule foresaw
        unforeseen = Broken("a result that can be compared", f"{type(error).__name__}: {message_of(error)}")
        unforeseen.call = subject.last
        return Result(check, "failed", broken=unforeseen)
    return Result(check, "passed")


def remembering(check: Check, subject: Subject, **drawn: Any) -> None:
    """Run the body once and tie the last call to what it raises."""
    try:
        check.body(subject, **drawn)
    except Broken as broken:
        broken.call = subject.last
        raise


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
