"""What the adapters share: single files of a peer without its package, and codes from fake-quantized weights.

AutoAWQ, GPTQModel and vLLM's Triton kernels are loaded file by file, because their packages import what needs a GPU.
"""

import ast
import importlib.util
import sys
import types
from collections.abc import Callable
from importlib.metadata import version as version_of
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

__all__ = ["codes_of", "file_module", "folder_of", "hollow_packages", "method", "size_of", "version_of"]


def folder_of(package: str) -> Path:
    """Where an installed package lies, without importing it."""
    spec = importlib.util.find_spec(package)
    assert spec is not None
    assert spec.submodule_search_locations
    return Path(spec.submodule_search_locations[0])


def file_module(path: Path) -> types.ModuleType:
    """A single file as a module, without its package."""
    spec = importlib.util.spec_from_file_location(f"peer_{path.stem}", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def hollow_packages(root: Path, *names: str) -> None:
    """Packages whose modules can be imported, but whose __init__ is not run."""
    for name in names:
        package = types.ModuleType(name)
        package.__path__ = [str(root.parent / name.replace(".", "/"))]
        sys.modules[name] = package


def method(path: Path, name: str) -> Callable[..., Any]:
    """One method of a file as a function, without importing the file."""
    tree = ast.parse(path.read_text())
    found = next(node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef) and node.name == name)
    found.decorator_list = []
    scope: dict[str, Any] = {"torch": torch}
    exec(compile(ast.Module([found], []), str(path), "exec"), scope)
    return scope[name]


def size_of(group_size: int, k: int) -> int:
    """The contract's -1 in numbers."""
    return k if group_size == -1 else group_size


def codes_of(fake: Tensor, scales: Tensor, zeros: Tensor, group_size: int) -> Tensor:
    """The integer codes behind a fake-quantized weight [N, K], which is what these quantizers return."""
    size = size_of(group_size, fake.shape[1])
    steps = fake.double() / scales.double().repeat_interleave(size, 1)
    return (steps.round() + zeros.double().repeat_interleave(size, 1)).t().to(torch.uint8)
