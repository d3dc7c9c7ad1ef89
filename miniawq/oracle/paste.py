"""A failing call as Python text that can be pasted and run: tensors as short literals."""

from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

from miniawq.oracle.subject import Broken, Call, memory, name_of

LONGEST_LITERAL = 300  # elements: what still fits on a screen
MOST_LINES = 24  # after a constant, that set rows or elements which are not constant


def describe_call(call: Call) -> str:
    """One line: the function with the dtypes and shapes of its arguments."""
    return f"{call.function}({', '.join(f'{name}={short(value)}' for name, value in call.arguments.items())})"


def short(value: Any) -> str:
    """An argument in a few characters."""
    if isinstance(value, Path):
        return f"the directory {value.name}"
    if isinstance(value, Tensor):
        strides = "" if value.is_contiguous() else f" strides {list(value.stride())}"
        offset = f" offset {value.storage_offset()}" if value.storage_offset() else ""
        return f"{name_of(value.dtype)}{list(value.shape)}{strides}{offset}"
    return repr(value)


def snippet(import_line: str, call: Call, broken: Broken) -> str:
    """Lines that repeat the call; its arguments are literals unless they are too large."""
    paths = any(isinstance(value, Path) for value in call.arguments.values())
    lines = ["import miniawq.oracle.checkpoints" if paths else "import torch", import_line]
    if call.before and call.before.refused:
        *given, refused = call_lines(call.before, "first")
        lines += [*given, "try:", f"    {refused}", "except Exception as refusal:", "    first = refusal"]
    elif call.before:
        lines += [*call_lines(call.before, "first"), "print(first)"]
    lines += call_lines(call, "got")
    if call.before:
        lines.append("print(first, got)")
    lines.append(f"# expected {broken.expected}; got {broken.got}")
    return "\n".join(lines)


def call_lines(call: Call, result: str) -> list[str]:
    """The arguments of a call, one line or more each, and the call."""
    lines: list[str] = []
    for name, value in call.arguments.items():
        lines.extend(tensor_lines(name, value) if isinstance(value, Tensor) else [f"{name} = {literal(value)}"])
    return [*lines, f"{result} = target.{call.function}({', '.join(call.arguments)})"]


def tensor_lines(name: str, value: Tensor) -> list[str]:
    """Lines that make a tensor with its strides, its offset and its repeats."""
    repeats = any(size > 1 and stride == 0 for size, stride in zip(value.shape, value.stride(), strict=True))
    once = value
    for dim, (size, stride) in enumerate(zip(value.shape, value.stride(), strict=True)):
        once = once.narrow(dim, 0, 1) if size > 1 and stride == 0 else once
    lines = [f"{name} = {literal(once)}", *(f"{name}{place} = {value}" for place, value in exceptions(once))]
    offset = once.storage_offset()
    if once.numel() and (offset or not once.is_contiguous()) and not repeats:
        room = f"torch.zeros({offset + len(memory(once))}, dtype={once.dtype})"
        lines.append(f"{name} = {room}.as_strided({tuple(once.shape)}, {once.stride()}, {offset}).copy_({name})")
    if repeats:
        lines.append(f"{name} = {name}.expand({tuple(value.shape)})")
    return lines


def literal(value: Any) -> str:
    """A tensor as a constructor (the places of `exceptions` still to be set), anything else as its repr."""
    if isinstance(value, Path):
        return f"miniawq.oracle.checkpoints.write_case({value.name!r})"
    if not isinstance(value, Tensor):
        return repr(value)
    common = most_common(value)
    if common is not None:
        return f"torch.full({tuple(value.shape)}, {number(common)}, dtype={value.dtype})"
    if value.numel() > LONGEST_LITERAL:
        return f"...  # {short(value)}: too long to print; rerun with --only and --examples DIR to have it as a file"
    return spelled_out(value)


def spelled_out(value: Tensor) -> str:
    """Every element."""
    text = f"torch.tensor({value.tolist()}, dtype={value.dtype})"
    finite = not value.is_floating_point() or bool(value.isfinite().all())
    return text if finite else text.replace("nan", "torch.nan").replace("inf", "torch.inf")


def most_common(value: Tensor) -> Tensor | None:
    """The value of all but a few elements, or None."""
    if value.numel() == 0:
        return value.new_zeros(())
    flat = value.reshape(-1)
    flat = flat[~flat.isnan()]
    if value.numel() == 1 or not len(flat):
        return None
    common = flat.mode().values
    if value.numel() <= MOST_LINES and bool((value != common).any()):
        return None
    places = places_of(value, common)
    return common if len(places) <= MOST_LINES and sum(value[p].numel() for p in places) <= LONGEST_LITERAL else None


def places_of(value: Tensor, common: Tensor) -> list[tuple[int, ...]]:
    """Where a tensor is not constant: rows of more than a few such elements, and single ones."""
    other = value != common
    rows = other.sum(-1) > MOST_LINES // 4 if value.dim() > 1 else other.new_zeros(())
    single = other & ~rows[..., None]
    return [tuple(place) for places in (rows, single) for place in places.nonzero().tolist() if place]


def exceptions(value: Tensor) -> list[tuple[str, str]]:
    """The index and value of each element or row that is not the most common value."""
    common = most_common(value)
    if common is None or value.numel() == 0:
        return []
    parts = [(place, value[place]) for place in places_of(value, common)]
    return [(str(list(place)), spelled_out(part) if part.dim() else number(part)) for place, part in parts]


def number(value: Tensor) -> str:
    """One element as Python text."""
    text = repr(value.item())
    return f"torch.{text}" if text in ("inf", "nan") else f"-torch.{text[1:]}" if text == "-inf" else text


def save_arguments(call: Call, path: Path) -> None:
    """The tensors of a call as a PyTorch-free file: safetensors, with the other arguments in its metadata."""
    from_call = {name: value.contiguous() for name, value in call.arguments.items() if isinstance(value, Tensor)}
    others = {name: str(value) for name, value in call.arguments.items() if not isinstance(value, Tensor)}
    save_file(from_call, path, metadata={"function": call.function, **others})
