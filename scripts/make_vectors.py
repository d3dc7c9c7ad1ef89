"""Write miniawq/oracle/vectors: the oracle's cases as files, for implementations in any language.

    python scripts/make_vectors.py [DIRECTORY]

One JSON and one safetensors file a level, and L4.tar.xz with the checkpoint directories. vectors/README.md explains
them. The contents are reproducible: tests/oracle/test_vectors.py makes them again and compares.
"""

import hashlib
import io
import json
import sys
import tarfile
import tempfile
from pathlib import Path
from random import Random
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from miniawq.oracle import cases, checkpoints, combinations, ranges, storage, truth
from miniawq.oracle.adversarial import double_ties, just_above
from miniawq.oracle.cases import PackedCase, exact_rows, exact_scales, half_scales, normal, random_layer, random_weight
from miniawq.oracle.contract import CONTRACT, FLAGS
from miniawq.oracle.deep_checkpoints import DEEP
from miniawq.oracle.dequantization import counting_codes
from miniawq.oracle.multiplication import error_bound, product
from miniawq.oracle.rounding import BOUND_IN_SCALES, BOUND_SUBNORMAL

DESTINATION = Path(__file__).parent.parent / "miniawq" / "oracle" / "vectors"
GROUP_SIZES = (32, 64, 128, -1)


class Vectors:
    """The cases and tensors of one level."""

    def __init__(self, level: str, about: str) -> None:
        self.level, self.about = level, about
        self.cases: list[dict[str, Any]] = []
        self.tensors: dict[str, Tensor] = {}

    def add(
        self,
        check: str,
        function: str,
        comment: str,
        inputs: dict[str, Tensor],
        expected: dict[str, Tensor] | None = None,
        *,
        result: str = "valid",
        compare: str = "bits",
        flags: tuple[str, ...] = (),
        **parameters: int,
    ) -> None:
        """One case; its tensors get keys that begin with its id."""
        case_id = f"{check}/{sum(case['check'] == check for case in self.cases) + 1}"
        expected = expected or {}
        keys = {name: f"{case_id}/{name}" for name in (*inputs, *expected)}
        for name, tensor in (inputs | expected).items():
            self.tensors[keys[name]] = tensor.clone().contiguous()
        case = {"id": case_id, "check": check, "function": function, "comment": comment, "result": result}
        case |= {"flags": list(flags), "parameters": parameters, "inputs": {name: keys[name] for name in inputs}}
        if expected:
            case |= {"compare": compare, "expected": {name: keys[name] for name in expected}}
        self.cases.append(case)

    def write(self, directory: Path) -> None:
        """Both files."""
        path = directory / f"{self.level}.safetensors"
        save_file(self.tensors, path)
        named = sorted({flag for case in self.cases for flag in case["flags"]})
        header = {
            "schema": "schema.json",
            "contract": CONTRACT,
            "level": self.level,
            "about": self.about,
            "tensors": path.name,
            "sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
            "notes": {flag: FLAGS[flag] for flag in named},
        }
        text = json.dumps(header | {"cases": self.cases}, indent=1)
        (directory / f"{self.level}.json").write_text(text + "\n")


def storage_vectors() -> Vectors:
    """L0."""
    made = Vectors("L0", "Packing and unpacking of eight codes in a word. Comparisons are exact.")
    known = torch.tensor(list(storage.KNOWN_WORDS.values()), dtype=torch.uint8)
    one_hot = torch.zeros(128, 8, dtype=torch.uint8)
    one_hot[torch.arange(128), torch.arange(128) // 16] = (torch.arange(128) % 16).to(torch.uint8)
    for name, comment, codes in (
        ("known-words", "row 0 is 0x75316420; rows 1 to 4 have the sign bit set or all nibbles equal", known),
        ("every-slot", "each code in each column, alone", one_hot),
        ("random", "16 rows of 8 words", cases.codes(Random(1), 16, 64)),
        ("wide", "one row of 5120 columns", cases.codes(Random(2), 1, 5120)),
        ("combinations", "65 rows of 3 words", cases.codes(Random(3), 65, 24)),
        ("combinations", "1000 rows of one word", cases.codes(Random(4), 1000, 8)),
        ("combinations", "3 rows of 321 words", cases.codes(Random(5), 3, 2568)),
    ):
        words = truth.pack(codes)
        made.add(f"L0.pack.{name}", "pack", comment, {"codes": codes}, {"words": words})
        made.add(f"L0.unpack.{name}", "unpack", comment, {"words": words}, {"codes": codes})
    for code, column in ((16, 0), (17, 5), (255, 7)):
        codes = torch.zeros(2, 8, dtype=torch.uint8)
        codes[1, column] = code
        made.add(
            "L0.pack.refuses-large-codes",
            "pack",
            f"code {code} in column {column}",
            {"codes": codes},
            result="invalid",
            flags=("NoRangeCheck",),
        )
    for code, row, column in ((16, 33, 12), (128, 64, 23)):
        codes = cases.codes(Random(code), 65, 24)
        codes[row, column] = code
        made.add(
            "L0.pack.refuses-large-codes-anywhere",
            "pack",
            f"code {code} in row {row} of 65",
            {"codes": codes},
            result="invalid",
            flags=("NoRangeCheck",),
        )
    for columns in (7, 12):
        made.add(
            "L0.pack.refuses-part-words",
            "pack",
            f"{columns} columns",
            {"codes": torch.zeros(2, columns, dtype=torch.uint8)},
            result="invalid",
            flags=("NoShapeCheck",),
        )
    halves = {"codes": torch.full((2, 8), 1.5)}
    made.add("L0.pack.fractions", "pack", "codes of 1.5", halves, result="invalid", flags=("NoTypeCheck",))
    return made


def add_layer(made: Vectors, check: str, comment: str, layer: PackedCase, flags: tuple[str, ...] = ()) -> None:
    """A case of L1."""
    qweight, qzeros, scales, group_size = layer.packed
    inputs = {"qweight": qweight, "qzeros": qzeros, "scales": scales}
    made.add(
        check,
        "dequantize",
        comment,
        inputs,
        {"weight": truth.dequantize(*layer.packed)},
        group_size=group_size,
        flags=flags,
    )


def dequantization_vectors() -> Vectors:
    """L1."""
    made = Vectors("L1", "(code - zero) * scale, rounded once to float16. Comparisons are exact but for the sign of 0.")
    zeros = torch.arange(16, dtype=torch.uint8)[None]
    ones = torch.ones(1, 16, dtype=torch.float16)
    add_layer(made, "L1.all-pairs", "16 codes against 16 zeros", PackedCase(counting_codes(32, 16), zeros, ones, 32))
    spread = torch.arange(0, cases.LARGEST_HALF_BITS, 31)[:1016] + 1
    scales = spread.to(torch.int16).view(torch.float16)[None]
    layer = PackedCase(counting_codes(32, 1016), cases.codes(Random(3), 1, 1016), scales, 32)
    add_layer(made, "L1.all-scales", "1016 scales over all exponents", layer, ("TwoRoundings", "FlushedSubnormals"))
    tiny = torch.tensor([[1, 2, 3, 0x200, 0x3FF, 0x400, 0x401, 0x7FF]], dtype=torch.int16).view(torch.float16)
    layer = PackedCase(counting_codes(32, 8), torch.full((1, 8), 3, dtype=torch.uint8), tiny, 32)
    add_layer(made, "L1.subnormals", "scales at and below 2**-14", layer, ("FlushedSubnormals",))
    large = torch.full((1, 8), 60000.0, dtype=torch.float16)
    layer = PackedCase(counting_codes(32, 8), torch.ones(1, 8, dtype=torch.uint8), large, 32)
    add_layer(made, "L1.overflow", "products beyond 65504 are infinite", layer)
    for group_size in GROUP_SIZES:
        k = 128 if group_size == -1 else 3 * group_size
        groups = cases.groups_of(k, group_size)
        scales = torch.arange(1, groups * 16 + 1).reshape(groups, 16).to(torch.float16)
        zeros = ((torch.arange(groups)[:, None] + torch.arange(16)) % 15).to(torch.uint8)
        layer = PackedCase(torch.full((k, 16), 15, dtype=torch.uint8), zeros, scales, group_size)
        add_layer(made, "L1.group-boundaries", f"all scales differ, groups of {group_size}", layer)
        add_layer(made, "L1.random", f"groups of {group_size}", random_layer(group_size, k, 24, group_size))
    add_layer(made, "L1.random-scales", "any scales", random_layer(9, 96, 24, 32, half_scales), ("TwoRoundings",))
    for groups, n in ((5, 72), (9, 264), (16, 8)):
        comment = f"{groups} groups of 32 and {n} outputs"
        add_layer(made, "L1.combinations", comment, random_layer(groups, 32 * groups, n, 32, exact_scales))
        add_layer(
            made, "L1.combinations-of-scales", comment, random_layer(groups, 32 * groups, n, 32), ("TwoRoundings",)
        )
    qweight, qzeros, scales, _ = random_layer(7, 64, 16, 32, count=2).packed
    for comment, z, s in (
        ("a group of zeros too many", torch.cat([qzeros, qzeros[:1]]), scales),
        ("zeros too wide", torch.cat([qzeros, qzeros[:, :1]], 1), scales),
        ("scales too wide", qzeros, torch.cat([scales, scales[:, :8]], 1)),
    ):
        inputs = {"qweight": qweight, "qzeros": z, "scales": s}
        made.add("L1.refuses-misfits", "dequantize", comment, inputs, result="invalid", flags=("NoShapeCheck",),
                 group_size=32)  # fmt: skip
    for comment, z, s in (
        ("a group of scales missing", qzeros, scales[:1]),
        ("a group of zeros missing", qzeros[:1], scales),
        ("columns of scales missing", qzeros, scales[:, :8]),
    ):
        made.add(
            "L1.refuses-wrong-shapes",
            "dequantize",
            comment,
            {"qweight": qweight, "qzeros": z, "scales": s},
            result="invalid",
            flags=("NoShapeCheck",),
            group_size=32,
        )
    return made


def group_steps(weight: Tensor, group_size: int) -> Tensor:
    """(M - m) / 15 of every group, float64 [G, N]."""
    groups = weight.double().t().reshape(cases.groups_of(weight.shape[1], group_size), -1, weight.shape[0])
    return (groups.amax(1).clamp(min=0) - groups.amin(1).clamp(max=0)) / 15


def rounding_vectors() -> Vectors:
    """L2."""
    made = Vectors(
        "L2",
        "Plain rounding of weight [N, K]. Codes are not compared: for your codes, zeros and scales, every weight must "
        f"keep |weight[n, k] - (code - zero) * scale| <= {BOUND_IN_SCALES!r} * scale + {BOUND_SUBNORMAL!r}, and every "
        "scale must be `step` within 2**-10 of it (2**-24 at least). The derivation is in miniawq/oracle/rounding.py. "
        "`half scale`: |weight[n, k] - (code - zero) * scale| <= (0.5 + 2**-19) * scale (adversarial.py beside it).",
    )

    def add(check: str, comment: str, weight: Tensor, group_size: int, *flags: str, result: str = "valid") -> None:
        made.add(
            check,
            "quantize",
            comment,
            {"weight": weight},
            {"step": group_steps(weight, group_size)},
            compare="rounding bound",
            result=result,
            flags=flags,
            group_size=group_size,
        )

    for seed, kind in enumerate(cases.WEIGHT_KINDS[:3]):
        for group_size in GROUP_SIZES:
            k = 128 if group_size == -1 else 2 * group_size
            add("L2.bound", f"{kind}, groups of {group_size}", random_weight(seed, 8, k, kind), group_size)
    for kind, build in (("both ends between two codes", double_ties), ("just above 15 scales", just_above)):
        weight = build(Random(6), 16, 32).t().float().contiguous()
        made.add("L2.half-scale", "quantize", kind, {"weight": weight}, {"step": group_steps(weight, 32)},
                 compare="half scale", result="acceptable", flags=("ScaleToNearest",), group_size=32)  # fmt: skip
    plain = random_weight(5, 8, 64)
    for spread in (-17, -23, -30):
        add("L2.tiny", f"weights times 2**{spread}", plain * 2.0**spread, 32, "ScaleFloor")
    zero_group = plain.clone()
    zero_group[:, :32] = 0
    add("L2.zero-group", "the first group is all zeros, and comes back as zeros", zero_group, 32)
    outlier = plain.clone()
    outlier[0, 3], outlier[1, 40] = 1000.0, -1000.0
    add("L2.outlier", "one large weight on either side", outlier, 32)
    for comment, weight in (
        ("all above 0", plain.abs() / 8 + 1),
        ("all below 0", -plain.abs() / 8 - 1),
        ("one repeated value", torch.full_like(plain, 0.5)),
        ("one repeated negative value", torch.full_like(plain, -0.5)),
    ):
        add("L2.one-signed", comment, weight, 32, "ZeroNotInRange", result="acceptable")
    for value in ("nan", "inf", "-inf"):
        broken = plain.clone()
        broken[-1, -1] = float(value)
        made.add(
            "L2.refuses-nan",
            "quantize",
            f"the last weight is {value}",
            {"weight": broken},
            result="invalid",
            flags=("NoRangeCheck",),
            group_size=32,
        )
    made.add(
        "L2.refuses-part-groups",
        "quantize",
        "48 inputs in groups of 32",
        {"weight": plain[:, :48]},
        result="invalid",
        flags=("NoShapeCheck",),
        group_size=32,
    )
    made.add(
        "L2.refuses-large-weights",
        "quantize",
        "a scale beyond 65504",
        {"weight": plain * 1e7},
        result="invalid",
        flags=("NoRangeCheck",),
        group_size=32,
    )
    return made


def multiplication_vectors() -> Vectors:
    """L3."""
    made = Vectors(
        "L3",
        "x @ weight + bias in the dtype of x. `bits`: every partial sum is representable, so any order and accumulator "
        "gives these bits. `within`: |y - expected| <= bound, elementwise (miniawq/oracle/multiplication.py).",
    )

    def add(
        check: str, comment: str, x: Tensor, layer: PackedCase, bias: Tensor | None = None, flags: tuple[str, ...] = ()
    ) -> None:
        qweight, qzeros, scales, group_size = layer.packed
        inputs = {"x": x, "qweight": qweight, "qzeros": qzeros, "scales": scales}
        inputs |= {} if bias is None else {"bias": bias}
        y = product(x, layer, bias)
        if check in ("L3.random", "L3.long-sums"):
            made.add(
                check,
                "matmul",
                comment,
                inputs,
                {"y": y, "bound": error_bound(x, layer, bias)},
                compare="within",
                result="acceptable",
                flags=("HalfAccumulation", "TwoRoundings"),
                group_size=group_size,
            )
        else:
            made.add(check, "matmul", comment, inputs, {"y": y.to(x.dtype)}, flags=flags, group_size=group_size,
                     result="acceptable" if flags else "valid")  # fmt: skip

    for dtype in (torch.float16, torch.bfloat16, torch.float32):
        name = str(dtype).removeprefix("torch.")
        for group_size in GROUP_SIZES:
            k = 128 if group_size == -1 else 2 * group_size
            layer = random_layer(k, k, 24, group_size, exact_scales)
            add("L3.exact", f"{name}, groups of {group_size}", exact_rows(Random(k), 5, k, dtype), layer)
        layer = random_layer(4, 96, 16, 32)
        x = normal(Random(4), 3, 96)
        x[:, 7] *= 16
        bias = normal(Random(5), 16).to(dtype)
        add("L3.random", f"{name} with a bias and a loud channel", x.to(dtype), layer, bias)
        biased = torch.zeros(2, 64, dtype=dtype)
        biased[1, -1] = 1
        add(
            "L3.bias",
            f"{name}: a row of zeros gives the bias",
            biased,
            random_layer(6, 64, 16, 32, exact_scales),
            ((torch.arange(16) % 13 - 6) / 64).to(dtype),
        )
        layer = PackedCase(layer.codes, layer.zeros, torch.ones_like(layer.scales), 32)
        x = torch.zeros(4, 96, dtype=torch.float64)
        x[:, ::16] = ranges.integers(Random(8), 127, 4, 6)
        whole = ranges.integers(Random(9), 255, 16).to(dtype)
        flags = ("HalfAccumulation", "TwoRoundings")
        add("L3.result-rounding", f"{name}: product and bias are added, then rounded", x.to(dtype), layer, whole, flags)
        layer = random_layer(11, 160, 72, 32, exact_scales)
        x = combinations.exact_activations(Random(11), 65, 160, 32, dtype)
        add(
            "L3.combinations",
            f"{name}: 65 rows, 5 groups and a bias",
            x,
            layer,
            combinations.bias_of("plain", 72, dtype),
        )
    layer = random_layer(12, 4224, 8, 128, exact_scales)
    x = combinations.exact_activations(Random(12), 65, 4224, 128, torch.float16)
    add("L3.corners", "65 rows and 4224 inputs", x, layer)
    half = torch.float16
    add(
        "L3.rows",
        "64 rows; fewer rows are its first ones",
        exact_rows(Random(7), 64, 64, half),
        random_layer(7, 64, 16, 32, exact_scales),
    )
    add(
        "L3.past-tiles",
        "K of 160 and N of 136",
        exact_rows(Random(8), 5, 160, half),
        random_layer(8, 160, 136, 32, exact_scales),
    )
    layer = random_layer(9, 64, 16, 32, exact_scales)
    add("L3.one-hot", "one row for each input feature", torch.eye(64, dtype=half), layer)
    layer = random_layer(10, 2048, 8, 128)
    layer.zeros.zero_()
    add("L3.long-sums", "2048 products of one sign", (normal(Random(10), 2, 2048).abs() / 16).half(), layer)
    refused = {
        ("L3.integer-inputs", "an x of int32", "NoTypeCheck"): {"x": torch.ones(2, 64, dtype=torch.int32)},
        ("L3.refuses-wrong-lengths", "x of 56 features", "NoShapeCheck"): {"x": torch.ones(2, 56, dtype=half)},
        ("L3.refuses-wrong-lengths", "a bias of length 1", "NoShapeCheck"): {
            "x": torch.ones(2, 64, dtype=half),
            "bias": torch.ones(1, dtype=half),
        },
    }
    qweight, qzeros, scales, group_size = random_layer(13, 64, 16, 32, exact_scales).packed
    words = {"qweight": qweight, "qzeros": qzeros, "scales": scales}
    for (check, comment, flag), inputs in refused.items():
        made.add(check, "matmul", comment, inputs | words, result="invalid", flags=(flag,), group_size=group_size)
    return made


def checkpoint_vectors(directory: Path) -> Vectors:
    """L4: the directories go into a tar file, what they hold into the safetensors file."""
    made = Vectors("L4", "Directories in L4.tar.xz, by id. `expected` has every tensor of the model, by its name.")
    known: dict[bytes, str] = {}
    with tarfile.open(directory / "L4.tar.xz", "w:xz") as archive, tempfile.TemporaryDirectory() as folder:
        for case in (*checkpoints.CASES, *DEEP):
            place = Path(folder) / case.id
            model = case.write(place)
            for path in sorted(place.iterdir()):
                member = tarfile.TarInfo(f"{case.id}/{path.name}")
                member.size = path.stat().st_size
                archive.addfile(member, io.BytesIO(path.read_bytes()))
            record = {"id": f"L4.{case.id}", "check": f"L4.{case.id}", "function": "load_checkpoint", "inputs": {}}
            record |= {"comment": case.comment, "result": case.kind, "flags": [], "parameters": {"directory": case.id}}
            if case.kind == "invalid":
                record["message"] = list(case.words)
            else:
                record |= {"compare": "bits", "expected": {}}
                for name, tensor in model.expected.items():
                    content = tensor.contiguous().view(torch.uint8).numpy().tobytes() + str(tensor.shape).encode()
                    key = known.setdefault(content, f"{case.id}/{name}")
                    made.tensors.setdefault(key, tensor.clone().contiguous())
                    record["expected"][name] = key
            made.cases.append(record)
    return made


def write(directory: Path) -> None:
    """All vectors."""
    directory.mkdir(parents=True, exist_ok=True)
    for made in (
        storage_vectors(),
        dequantization_vectors(),
        rounding_vectors(),
        multiplication_vectors(),
        checkpoint_vectors(directory),
    ):
        made.write(directory)


if __name__ == "__main__":
    write(Path(sys.argv[1]) if len(sys.argv) > 1 else DESTINATION)
