"""Failures are told by their cause, with an example that prints; a legal difference fails what carries its flag."""

from types import SimpleNamespace

import pytest
import torch

from miniawq.oracle import truth
from miniawq.oracle.door import CHECKS, conformance
from miniawq.oracle.paste import snippet
from miniawq.oracle.planted.formats import STEPS, product
from miniawq.oracle.planted.grammar import PRODUCT, only
from miniawq.oracle.planted.numbers import quantize
from miniawq.oracle.planted.readers import CLIP_KINDS, SCALE_KINDS
from miniawq.oracle.planted.storage import both, decoding
from tests.helpers.checks import SHORT
from tests.helpers.marks import thorough_but

REFUSES_NAN = next(check for check in CHECKS if check.id == "L2.refuses-nan")
INVERTED = {"search_scales": lambda w, x, g: 1 / truth.search_scales(w, x, g)}
CAUSES = {
    "zeros are read one too high": {"dequantize": decoding(zeros=lambda z: z + 1)},
    "scales are inverted": {"dequantize": decoding(product=lambda d, s: (d / s).half())},
    "codes are packed in the order 0..7": {"pack": both(tuple(range(8)))["pack"], "unpack": truth.unpack},
    "pack and unpack do not undo each other, and it is unpack that is wrong": {
        "pack": truth.pack,
        "unpack": lambda w: truth.unpack(w).clamp(max=14),
    },
    "codes are cut off instead of rounded to nearest": quantize(round=torch.trunc),
    "zeros are cut off instead of rounded to nearest": quantize(zeros=torch.floor),
    "search_clip does not depend on x": {"search_clip": CLIP_KINDS["by the weight's error"]},
    "search_scales does not depend on x": {"search_scales": SCALE_KINDS["x ignored"]},
    "factors are inverted": INVERTED,
}


@pytest.mark.parametrize("title", thorough_but(["zeros are read one too high"], CAUSES))
def test_a_cause_is_named_and_its_first_example_prints(title):
    target = SimpleNamespace(**CAUSES[title])
    levels = {"pack": "L0", "dequantize": "L1", "quantize": "L2"}
    level = levels.get(next(iter(CAUSES[title])), "L5")
    report = conformance(target, [check for check in SHORT if check.level == level])
    assert [cause.title for cause in report.causes if cause.title == title] == [title]
    cause = next(cause for cause in report.causes if cause.title == title)
    broken = cause.failures[0].broken
    assert "too long" not in snippet("", broken.call, broken)
    assert sum(len(cause.failures) for cause in report.causes) == report.counts()["failed"]


def test_circumstances_are_told_where_no_cause_is_known():
    wrong = only("matmul", PRODUCT["a bias and 65 rows"], lambda *a: product(*a, **STEPS["bias left out"]))
    (check,) = (check for check in CHECKS if check.id == "L3.combinations")
    (cause,) = conformance(SimpleNamespace(matmul=wrong), [check]).causes
    assert cause.title == "matmul: wrong with rows 65, bias contiguous"


def test_an_exception_is_a_cause_of_its_own():
    def matmul(x, *rest):
        if x.dim() == 1:
            raise IndexError("no vectors here")
        return truth.matmul(x, *rest)

    causes = conformance(SimpleNamespace(matmul=matmul), [c for c in SHORT if c.id.startswith("L3.lead")]).causes
    assert [cause.title for cause in causes] == ["matmul raises IndexError: no vectors here"]


def test_a_smaller_refusal_is_still_one():
    """What the definition takes is no example of something that must be refused."""
    report = conformance(SimpleNamespace(quantize=lambda w, g: truth.quantize(w.nan_to_num(), g)), [REFUSES_NAN])
    call = report.results[0].broken.call
    assert call.arguments["weight"].isnan().sum() == 1
    assert (call.arguments["weight"] == 0).sum() == call.arguments["weight"].numel() - 1


def half_sums(x, qweight, qzeros, scales, group_size, bias=None):
    """Every sum in the dtype of x, one input after the other."""
    truth.matmul(x, qweight, qzeros, scales, group_size, bias)
    weight = truth.dequantize(qweight, qzeros, scales, group_size).to(x.dtype)
    total = x.new_zeros(x[..., 0].numel(), weight.shape[1])
    for k, column in enumerate(x.reshape(-1, x.shape[-1]).t()):
        total = total + column[:, None] * weight[k]
    return (total if bias is None else total + bias).reshape(*x.shape[:-1], -1 if x.numel() else weight.shape[1])


@pytest.mark.thorough
def test_half_precision_sums_fail_only_what_carries_their_flag():
    target = SimpleNamespace(matmul=half_sums, dtypes=("float16", "bfloat16"))
    report = conformance(target, [check for check in SHORT if check.level == "L3" and check.id != "L3.corners"])
    failed = [result.check for result in report.results if result.status == "failed"]
    assert failed
    assert [check.id for check in failed if "HalfAccumulation" not in check.flags] == []
