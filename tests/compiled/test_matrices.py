"""`with_matrices` and `with_wide_loads` on what Inductor really writes, of the torch of `golden/make_inductor.py`."""

import ast
import re

import pytest
import torch

from miniawq.compiled import sources
from tests.helpers import GOLDEN

STORED = sorted((GOLDEN / "inductor").rglob("*.py.txt"))
SOURCES = [path for path in STORED if "vectors" not in path.name]
ROWS, COLUMNS, SUMMED, CODES, PARTS = "YBLOCK", "XBLOCK", "R0_BLOCK", "8 * R0_BLOCK", "16"


class Shapes:
    """The shapes of what a kernel computes, by its source, whose loop is read once."""

    def __init__(self, source):
        # What is given a name; the operands of products; what is reshaped, before and after; what is stored.
        self.names, self.products, self.reshaped, self.stored = {}, [], [], []
        (kernel,) = (node for node in ast.parse(source).body if isinstance(node, ast.FunctionDef))
        self.blocks = ast.literal_eval(kernel.decorator_list[0].keywords[0].value)
        self.read(kernel.body)

    def read(self, statements):
        for statement in statements:
            match statement:
                case ast.For(body=body):
                    self.read(body)
                case ast.Assign([ast.Name(name)], value) | ast.AnnAssign(ast.Name(name), _, value):
                    self.names[name] = self.of(value)
                case ast.Expr(value):
                    self.of(value)
                case _:
                    raise NotImplementedError(ast.unparse(statement))

    def of(self, node):
        match node:
            case ast.Name(name):
                return self.names.get(name, ())
            case ast.BinOp(left, _, right) | ast.Compare(left, _, [right]):
                return broadcast(self.of(left), self.of(right))
            case ast.UnaryOp(_, operand):
                return self.of(operand)
            case ast.Subscript(value, ast.Tuple(places)):
                sizes = iter(self.of(value))
                return tuple(next(sizes) if isinstance(place, ast.Slice) else "1" for place in places)
            case ast.Call(ast.Attribute(ast.Name("tl"), name), arguments):
                return self.called(name, arguments)
            case ast.Call(ast.Attribute(value, "to")):
                return self.of(value)
            case ast.Constant():
                return ()
        raise NotImplementedError(ast.unparse(node))

    def called(self, name, arguments):
        match name, arguments:
            case "program_id", _:
                return ()
            case "arange", [_, size]:
                return self.sizes([size])
            case "full", [ast.List(sizes), *_]:
                return self.sizes(sizes)
            case "reshape" | "broadcast_to", [value, ast.List(sizes)]:
                shape = self.sizes(sizes)
                self.reshaped.append((self.of(value), shape))
                return shape
            case "join", [value, _]:
                return *self.of(value), "2"
            case "permute", [value, ast.Tuple(places)]:
                shape = self.of(value)
                return tuple(shape[place.value] for place in places)
            case "trans", [value]:
                return self.of(value)[::-1]
            case "dot", operands:
                self.products.append([self.of(operand) for operand in operands])
                return self.products[-1][0][0], self.products[-1][1][1]
            case "load" | "where", _:
                return broadcast(*(self.of(argument) for argument in arguments))
            case "store", _:
                self.stored.append(broadcast(*(self.of(argument) for argument in arguments)))
                return ()
        raise NotImplementedError(name)

    def sizes(self, nodes):
        """As named in the source; a block of one is as good as 1."""
        names = [ast.unparse(node) for node in nodes]
        return tuple("1" if self.blocks.get(name) == 1 else name for name in names)


def broadcast(*shapes):
    """Triton's rule: shapes are aligned at their ends."""
    rank = max(map(len, shapes))
    sizes = zip(*(("1",) * (rank - len(shape)) + shape for shape in shapes), strict=True)
    alike = [set(of_a_dimension) - {"1"} or {"1"} for of_a_dimension in sizes]
    assert all(len(size) == 1 for size in alike), shapes
    return tuple(size for (size,) in alike)


@pytest.fixture(params=SOURCES, ids=[f"{path.parent.name}-{path.name.removesuffix('.py.txt')}" for path in SOURCES])
def source(request):
    return request.param.read_text()


def test_the_same_kernels_are_stored_of_both_versions():
    of_versions = {}
    for path in STORED:
        of_versions.setdefault(path.parent.name, []).append(path.name)
    assert sorted(of_versions) == ["torch-2.11", "torch-2.13"]
    assert of_versions["torch-2.11"] == of_versions["torch-2.13"]


@pytest.mark.parametrize("source", [path for path in SOURCES if "tiled" in path.name], ids=str, indirect=True)
def test_what_inductor_writes_has_more_dimensions_and_sums_afterwards(source):
    shapes = Shapes(source)
    assert max(map(len, shapes.names.values())) > 2
    assert shapes.products
    assert all(len(operands) == 2 for operands in shapes.products)


def test_all_tiles_become_matrices(source):
    source = sources.with_matrices(source)
    indices = [node.slice for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Subscript)]
    assert {len(index.elts) for index in indices if isinstance(index, ast.Tuple)} == {2}
    shapes = Shapes(source)
    assert max(map(len, shapes.names.values())) == 2
    assert shapes.stored == [(ROWS, COLUMNS)]
    # Operands are loaded in the shape in which they are multiplied, or are the pairs of a word, two codes in each, or a
    # zero for all parts of a sum.
    pairs = (ROWS, "2", "2", SUMMED), (ROWS, "4 * R0_BLOCK")
    codes = (*pairs[1], "2"), (ROWS, CODES)
    zeros = (ROWS, "1"), (ROWS, PARTS)
    assert all(before == after or (before, after) in (pairs, codes, zeros) for before, after in shapes.reshaped)


@pytest.mark.parametrize("source", [path for path in SOURCES if "tiled" in path.name], ids=str, indirect=True)
def test_sums_begin_with_what_is_summed(source):
    """Triton itself lets every further product of a step begin with the one before."""
    first, *others = Shapes(sources.with_matrices(source)).products
    assert first == [(ROWS, SUMMED), (SUMMED, COLUMNS), (ROWS, COLUMNS)]
    assert all(operands == first[:2] for operands in others)


@pytest.mark.parametrize("source", [path for path in SOURCES if "pairs" in path.name], ids=str, indirect=True)
def test_what_belongs_to_a_group_is_loaded_once_for_each_row_and_column(source):
    """Inductor loads it for each summand, a tile of [rows, summands] or [columns, summands]."""
    shapes = Shapes(sources.with_matrices(source))
    of_codes, of_zeros = [(ROWS, CODES), (CODES, COLUMNS)], [(ROWS, PARTS), (PARTS, COLUMNS)]
    assert shapes.products == [of_codes, of_zeros] * (source.count("tl.dot(") // 2)
    scaled = re.findall(r"(tmp\d+) = tmp\d+ \+ tmp\d+\n.*?tmp\d+ = (tmp\d+) \* \1\n", source, re.S)
    assert scaled
    for products, scales in scaled:
        assert (shapes.names[products], shapes.names[scales]) == ((ROWS, COLUMNS), (ROWS, "1"))


@pytest.mark.parametrize("source", [path for path in SOURCES if "weights" in path.name], ids=str, indirect=True)
def test_weights_are_made_of_whole_groups_and_multiplied_at_once(source):
    shapes = Shapes(sources.with_matrices(source))
    assert shapes.products == [[(ROWS, CODES), (CODES, COLUMNS)]]
    ((codes, scales),) = re.findall(r"tmp\d+ = (tmp\d+) \* (tmp\d+)\n", source)
    assert (shapes.names[codes], shapes.names[scales]) == ((ROWS, CODES), (ROWS, "1"))


def test_a_second_time_changes_nothing(source):
    once = sources.with_matrices(source)
    assert once != source
    assert sources.with_matrices(once) == once


class Addresses:
    """Triton's operations on indices, of which a load gives those that it reads."""

    def __init__(self):
        self.loads = 0

    def load(self, indices, mask, eviction_policy, other=0.0):
        self.loads += 1
        return torch.where(torch.as_tensor(mask is None or mask), indices, -1)

    def arange(self, first, end):
        return torch.arange(first, end)

    def reshape(self, indices, sizes):
        return indices.reshape(sizes)

    def split(self, indices):
        return indices.unbind(-1)


def addresses_of(source):
    """What each name of a load reads in the second step of the second program, and the number of loads."""
    config = ast.literal_eval(re.search(r"config=(\{.*?\})", source)[1])
    sizes = {name: int(size) for name, size in re.findall(r"(\w+numel) = (\d+)", source)}
    tl, rows = Addresses(), torch.arange(config["XBLOCK"]).unsqueeze(1) + config["XBLOCK"]
    summands = torch.arange(config["R0_BLOCK"]).unsqueeze(0) + config["R0_BLOCK"]
    names = config | sizes | {"tl": tl, "x0": rows, "xmask": rows < sizes["xnumel"], "r0_offset": config["R0_BLOCK"]}
    names |= {f"r0_{number}": summands for number in range(9)} | {"r0_mask": summands < sizes["r0_numel"]}
    names |= dict.fromkeys(set(re.findall(r"in_ptr\d+", source)), 0)
    for line in source.splitlines():
        if re.search(r" = tl\.(load|split)|r0_wide = ", line) and "for " not in line:
            exec(line.strip(), {}, names)
    return {name: value for name, value in names.items() if re.fullmatch(r"tmp\d+", name)}, tl.loads


@pytest.mark.parametrize("path", [path for path in STORED if "vectors" in path.name], ids=str)
def test_neighbours_that_are_loaded_at_once_are_the_same_numbers(path):
    source = path.read_text()
    (before, loads), (after, fewer) = addresses_of(source), addresses_of(sources.with_wide_loads(source))
    assert before.keys() == after.keys()
    for name, read in before.items():
        assert torch.equal(read.expand_as(after[name]), after[name].expand_as(read)), name
    assert fewer < loads / 3
    assert sources.with_wide_loads(sources.with_wide_loads(source)) == sources.with_wide_loads(source)


def test_neighbours_of_which_one_is_missing_stay_as_they_are():
    source = next(path for path in STORED if "vectors-1" in path.name).read_text()
    lines = source.splitlines(keepends=True)
    (first, *_) = (line for line in lines if "(1 + 4*r0_" in line)
    lacking = source.replace(first, first.replace("(1 + 4*", "(6 + 4*"))
    assert addresses_of(sources.with_wide_loads(lacking))[1] == addresses_of(sources.with_wide_loads(source))[1] + 3
