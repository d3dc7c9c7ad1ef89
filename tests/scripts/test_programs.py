"""Programs in `scripts/` follow the package, whose names they use: each can be imported and says what it does."""

import sys

import pytest
import torch

from tests.planted.fault import Fault
from tests.scripts import script

PROGRAMS = (
    "bench", "bench_batch", "bench_products", "bench_quantize", "memory_table", "planted_faults", "random_checkpoint",
    "train_demo", "worked_example", "draw_terminal", "gate", "reasoning", "study_quality", "confidence",
    "peers/awq_peers", "peers/checkpoints", "peers/llama_cpp", "peers/real_model", "peers/serve",
)  # fmt: skip


@pytest.mark.parametrize("name", PROGRAMS)
def test_programs_answer_help(name, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [name, "--help"])
    with pytest.raises(SystemExit) as exit_:
        script(name).main()
    assert exit_.value.code == 0
    assert "usage: " in capsys.readouterr().out


def test_steps_that_are_timed_are_there():
    for owner, name, _ in script("bench_quantize").STEPS:
        assert callable(getattr(owner, name))


def test_a_wrong_product_is_seen():
    products = script("bench_products")
    case = products.Case(64, 256, torch.device("cpu"))
    for name in ("eager", "bfloat16", "torch_int4", "float32"):
        candidate = products.PEERS["cpu"][name](case)(3)
        y_TO = candidate.call(*candidate.sets[0])
        assert case.error(y_TO) < products.LARGEST_ERROR[candidate.dtype]
        y_TO[1, 5] += case.magnitude_TO[1, 5] / 50
        assert case.error(y_TO) > products.LARGEST_ERROR[candidate.dtype]


def test_bytes_of_a_product_are_counted_as_kernelbench_counts_them():
    """M*K*2 + (K/2)*N + (K/128)*N*2 + (K/128)*N*2 + M*N*2, its problem.yaml."""
    m, n, k = 16, 14336, 4096
    expected = m * k * 2 + k // 2 * n + k // 128 * n * 2 + k // 128 * n * 2 + m * n * 2
    assert script("bench_products").bytes_moved(f"{n}x{k}", m) == expected


def test_a_text_of_the_dense_model_itself_has_no_rest():
    """All next tokens of one place, weighted by their probability."""
    p_V, q_V = torch.tensor([0.5, 0.2, 0.2, 0.05, 0.03, 0.02]), torch.tensor([0.3, 0.3, 0.1, 0.1, 0.1, 0.1])
    found_V4 = script("confidence").compared(*(x.log().expand(6, -1) for x in (p_V, q_V)), torch.arange(6))
    loss, divergence, _, unlikely = (p_V.double() @ found_V4).tolist()
    change = loss + float((p_V * p_V.log()).sum())
    assert change == pytest.approx(divergence, rel=1e-6)
    assert unlikely == pytest.approx(0, abs=1e-8)
    assert found_V4[3:, 3].sum() < -1  # the text has more of the unlikely ones than was expected


@pytest.mark.parametrize(("body", "told"), [("pass", ""), ("assert 0", "test_it"), ("time.sleep(99)", "test_it hangs")])
def test_a_fault_that_lets_a_test_wait_for_ever_is_caught(body, told, tmp_path, monkeypatch):
    planted = script("planted_faults")
    monkeypatch.setattr(planted, "SECONDS", 1)
    (tmp_path / "tests").mkdir()
    (tmp_path / "tests/test_it.py").write_text(f"import time\n\ndef test_it():\n    {body}\n")
    assert planted.first_failure(tmp_path, "test_it") == told


@pytest.mark.parametrize(
    ("pattern", "replacement", "problem"),
    [
        ("a = 1", "a = 2", ""),
        ("^(b = )1", r"\g<1>2", ""),
        ("= 1", "= 2", "matches 2 times"),
        ("c", "d", "matches 0 times"),
        ("a = 1", "a = 1", "changes nothing"),
        ("a = 1", "a =", "invalid syntax"),
    ],
)
def test_a_fault_is_planted_once_or_is_stale(pattern, replacement, problem, tmp_path):
    for file in ("file.py", "test_it.py"):
        (tmp_path / file).write_text("a = 1\nb = 1\n")
    assert problem in Fault("file.py", pattern, replacement, "test_it").problem(tmp_path, tmp_path)
    assert Fault("none.py", pattern, replacement, "test_it").problem(tmp_path, tmp_path) == "matches 0 times"
    if not problem:
        assert (
            Fault("file.py", pattern, replacement, "none").problem(tmp_path, tmp_path) == "there is no test file none"
        )
