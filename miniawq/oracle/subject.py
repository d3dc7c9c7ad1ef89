"""The target as the checks see it, and the comparisons they make: a rule that does not hold is `Broken`.

A `Subject` remembers its last call, so that a failure can be pasted, and tells apart a refusal, a lack and a crash.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from miniawq.oracle.contract import Limits

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


@dataclass(frozen=True)
class Call:
    """One call of the target, by parameter name; `before` is one without which it does not show what is wrong."""

    function: str
    arguments: dict[str, Any]
    before: "Call | None" = None
    refused: bool = False


class Broken(AssertionError):
    """A rule the target broke: what was expected, what came, and the call.

    `again` is a rule with the arguments that broke it (`Subject.judge`), `setting` what a covering check had chosen.
    """

    def __init__(self, expected: str, got: str) -> None:
        super().__init__(f"expected {expected}; got {got}")
        self.expected, self.got = expected, got
        self.call: Call | None = None
        self.again: tuple[Callable[..., object], tuple[Any, ...]] | None = None
        self.setting: dict[str, Any] = {}


class Lacking(Exception):
    """The check asks for something the target says it does not do."""


class Crash(Exception):
    """The target ended or gave no answer: never a refusal, whatever was expected."""


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
                    memory(mine).copy_(memory(theirs))  # what the target wrote into its argument is to be seen here

    def answer(self, function: str, *arguments: Any) -> Any:
        """The target's own result; an exception is a broken rule, a NotImplementedError is a lack."""
        try:
            return self.raw(function, *arguments)
        except NotImplementedError as lack:
            raise Lacking(f"{function}: {lack}") from lack
        except Exception as error:
            raise Broken("a result", f"{type(error).__name__}: {message_of(error)}") from error

    def call(self, function: str, *arguments: Any) -> Any:
        """The result as CPU tensors."""
        return comparable(self.answer(function, *arguments))

    def pure(self, function: str, *arguments: Any) -> Any:
        """As `call`; Broken when an argument was written into."""
        before = [memory(a).clone() if isinstance(a, Tensor) else None for a in arguments]
        result = self.call(function, *arguments)
        for name, old, new in zip(PARAMETERS[function], before, arguments, strict=False):
            if old is not None and not same_bits(old, memory(new)):
                raise Broken("the arguments as they were", f"{function} changed {name}")
        return result

    def tensor(self, function: str, arguments: tuple[Any, ...], dtype: torch.dtype, shape: tuple[int, ...]) -> Tensor:
        """The one tensor a function must return, with its dtype and shape compared to what they must be."""
        return expect_tensor(self.call(function, *arguments), dtype, shape)

    def judge(self, rule: Callable[..., object], *arguments: Any) -> None:
        """Hold the target to `rule(self, *arguments)`; a failure remembers both, so that its example can be shrunk."""
        try:
            rule(self, *arguments)
        except Broken as broken:
            broken.again = broken.again or (rule, arguments)
            raise

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

    def unless_refused(self, function: str, *arguments: Any) -> Any:
        """The result as CPU tensors, or None where the target raises; a crash is no refusal."""
        try:
            result = self.raw(function, *arguments)
        except Crash as crash:
            raise Broken("a result or a refusal", str(crash)) from crash
        except NotImplementedError as lack:
            raise Lacking(f"{function}: {lack}") from lack
        except Exception:
            assert self.last is not None
            self.last = replace(self.last, refused=True)
            return None
        return comparable(result)


def memory(tensor: Tensor) -> Tensor:
    """Everything from the first to the last element in memory, as one dimension: gaps and repeats once each."""
    if tensor.numel() == 0:
        return tensor.reshape(-1)
    length = 1 + sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return tensor.as_strided((length,), (1,), tensor.storage_offset())


def moved(tensor: Tensor, device: str) -> Tensor:
    """The tensor on another device, with its strides and its offset; itself on the CPU."""
    return tensor if device == "cpu" else twin(tensor, device)


def twin(tensor: Tensor, device: str = "cpu") -> Tensor:
    """A copy that lies as the tensor does: the same strides (also 0), the same offset."""
    if tensor.numel() == 0:
        return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=device)
    offset, flat = tensor.storage_offset(), memory(tensor)
    room = torch.zeros(offset + len(flat), dtype=tensor.dtype, device=device)
    room[offset:] = flat
    return room.as_strided(tensor.shape, tensor.stride(), offset)


def same_bits(old: Tensor, new: Tensor) -> bool:
    """Whether two tensors are equal, NaN included."""
    return torch.equal(old.contiguous().view(torch.uint8), new.contiguous().view(torch.uint8))


def comparable(result: Any) -> Any:
    """`as_tensors`; what is no array, or lies nowhere, is a broken rule."""
    try:
        return as_tensors(result)
    except Exception as error:
        raise Broken("a result that can be read", f"{type(error).__name__}: {message_of(error)}") from error


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
