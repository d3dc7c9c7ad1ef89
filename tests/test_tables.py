"""What scripts make of measurements: the tables of docs/performance.md, and the picture of a layer."""

import importlib.util
import json
from pathlib import Path
from types import ModuleType
from xml.etree import ElementTree

import pytest


def script(name: str) -> ModuleType:
    path = Path(__file__).parents[1] / "scripts" / f"{name}.py"
    specification = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module


tables, picture = script("tables"), script("picture")


def line(kind: str, rows: int, **found: float) -> dict:
    return {"shape": "8b", "kind": kind, "rows": rows, "context": 512} | found


RESULTS = [
    {"shape": "8b", "device": "H100", "torch": "2.11"},
    line("int4", 1, tokens_per_s=400.0, peak_GB=6.0, planned_GB=6.3),
    line("bfloat16", 1, tokens_per_s=160.0, peak_GB=16.0, planned_GB=15.2),
    line("int4", 64, tokens_per_s=1.0),
    line("int4", 64, tokens_per_s=6000.0),
    line("int4", 64, kernels=500),
    line("bfloat16", 64, tokens_per_s=8000.0),
    line("bfloat16", 256, fits=False),
    {"shape": "70b", "kind": "bfloat16", "fits": False},
    {"shape": "70b", "kind": "int4", "rows": 1, "context": 512, "tokens_per_s": 64.0},
]


def test_speed_beside_bfloat16():
    text = "\n".join(tables.speed_table(tables.lines_of(RESULTS)))
    assert "| 8b | 512 | 1 | 400 | 160 | 2.50 |" in text
    assert "| 8b | 512 | 64 | 6,000 | 8,000 | 0.75 |" in text
    assert "| 8b | 512 | 256 |  | does not fit |  |" in text
    assert "| 70b | 512 | 1 | 64 | does not fit |  |" in text
    assert "8b behind 512 positions: INT4 is the faster one up to 1 rows." in text


def test_memory_beside_its_plan():
    text = "\n".join(tables.memory_table(tables.lines_of(RESULTS)))
    assert "| 8b | 512 | 1 | 6.0 | 6.3 | +5.0% | 16.0 | 15.2 | -5.0% |" in text
    assert "| 8b | 512 | 256 |  |  |  | does not fit |  |  |" in text
    assert "| 64 |" not in text, "nothing is known of its memory"


def test_the_price_of_a_million_tokens():
    text = "\n".join(tables.price_table(tables.lines_of(RESULTS), 3.6))
    assert "| 8b | 512 | 1 | 2.50 | 6.25 |" in text
    assert "| 70b | 512 | 1 | 15.62 | does not fit |" in text


# What a layer launches: its name and microseconds.
LAYER = [
    ("triton_unk_norm", 2),
    ("triton_unk_product", 7),
    ("triton_poi_fused_cat", 1),
    ("triton_tem_fused_flex_attention_3", 4),
    ("triton_unk_fused_flex_attention_sum_4", 3),
    ("triton_unk_product", 5),
    ("triton_unk_norm", 2),
    ("nvjet_product", 24),
    ("triton_unk_silu", 2),
    ("triton_unk_product", 14),
]
LABELS = (
    "residual, norm, qkv, rotary, cache, attention, sum of parts, o, residual, norm, gate and up, silu(gate) * up, down"
)


@pytest.fixture
def trace(tmp_path: Path) -> Path:
    """Three layers, a microsecond between two kernels, in no order and among events of the host."""
    events, now = [], 100.0
    for name, length in LAYER * 3:
        events.append({"cat": "kernel", "name": name, "ts": now, "dur": length, "ph": "X"})
        events.append({"cat": "cuda_runtime", "name": "launch", "ts": now - 50, "dur": 900, "ph": "X"})
        now += length + 1
    path = tmp_path / "trace.json"
    path.write_text(json.dumps({"traceEvents": events[::-1]}))
    return path


def test_kernels_are_named_by_what_they_are_for(trace):
    bars = picture.layer_in_the_middle(picture.kernels_of(trace))
    assert ", ".join(bar.label for bar in bars) == LABELS
    assert [bar.length for bar in bars] == [length for _, length in LAYER]
    assert {bar.label for bar in bars if bar.kind == "product"} == set(picture.PRODUCTS)


def test_the_picture_shows_each_kernel_where_it_was(trace):
    bars = picture.layer_in_the_middle(picture.kernels_of(trace))
    tree = ElementTree.fromstring(picture.picture(bars, "8B & more"))
    assert tree[0].text == "8B & more: 10 kernels, 64.0 us in them and 9.0 us between them"
    boxes = [(float(box.get("x")), float(box.get("width"))) for box in tree.iter("{http://www.w3.org/2000/svg}rect")]
    unit = picture.SCALE_WIDTH / 73
    assert [round((x - picture.LEFT) / unit) for x, _ in boxes] == [round(bar.start - bars[0].start) for bar in bars]
    assert [round(width / unit) for _, width in boxes] == [length for _, length in LAYER]


def test_a_trace_without_attention_is_refused(tmp_path):
    (tmp_path / "trace.json").write_text('{"traceEvents": []}')
    with pytest.raises(SystemExit, match="profile"):
        picture.layer_in_the_middle(picture.kernels_of(tmp_path / "trace.json"))
