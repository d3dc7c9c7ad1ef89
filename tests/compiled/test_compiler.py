"""Functions that are kept in a file: found by the next one, right for other arguments, and no reason to fail."""

import pytest
import torch

from miniawq.compiled.compiler import Compiled, Kept, any_length
from miniawq.compiled.workshop import Workshop


def doubled(x_M, summand):
    return x_M * 2 + summand


def kept(path):
    return Kept(Compiled(doubled, {}, traced=lambda x_M, summand: (any_length(x_M), summand)), path)


def traced():
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    """A file that a first call has left."""
    path = tmp_path_factory.mktemp("kept") / "new" / "doubled.aot"
    assert torch.equal(kept(path)(torch.ones(5), 1.0), torch.full((5,), 3.0))
    return path


@pytest.mark.compiles
def test_a_kept_function_is_not_traced_for_any_length(path):
    before, function = traced(), kept(path)
    for length in (5, 9, 300):
        assert torch.equal(function(torch.ones(length), 1.0), torch.full((length,), 3.0))
    assert traced() == before


@pytest.mark.compiles
def test_other_arguments_are_compiled_as_usual(path):
    function = kept(path)
    assert torch.equal(function(torch.ones(5), 1.0), torch.full((5,), 3.0))
    assert torch.equal(function(torch.ones(5), 2.0), torch.full((5,), 4.0))
    assert function(torch.ones(5, dtype=torch.float64), 1.0).dtype == torch.float64
    assert torch.equal(function(torch.ones(5), 1.0), torch.full((5,), 3.0))


@pytest.mark.compiles
def test_a_damaged_file_is_made_again_and_said(path, tmp_path, caplog):
    damaged = tmp_path / "doubled.aot"
    damaged.write_bytes(path.read_bytes()[:1000])
    assert torch.equal(kept(damaged)(torch.ones(5), 1.0), torch.full((5,), 3.0))
    assert f"{damaged} cannot be read, and is made again" in caplog.text
    before = traced()
    assert torch.equal(kept(damaged)(torch.ones(7), 1.0), torch.full((7,), 3.0))
    assert traced() == before


@pytest.mark.compiles
def test_what_cannot_be_kept_is_compiled_as_usual_and_said_once(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr("miniawq.compiled.compiler.WORKSHOP", Workshop())
    monkeypatch.delattr(Compiled, "ahead")
    kept(tmp_path / "other.aot")(torch.ones(5), 1.0)
    assert torch.equal(kept(tmp_path / "doubled.aot")(torch.ones(5), 1.0), torch.full((5,), 3.0))
    assert list(tmp_path.iterdir()) == []
    (said,) = [record.getMessage() for record in caplog.records if record.name.startswith("miniawq")]
    assert said.startswith("compiled functions are not kept, so every start takes longer: ")


@pytest.mark.compiles
def test_what_is_kept_is_compiled_once_with_its_options(tmp_path, monkeypatch):
    """Without them the C++ compiler would be asked for the same source again, and make slower code of it."""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "inductor"))
    for _ in range(2):
        function = Compiled(doubled, {"cpp.enable_floating_point_contract_flag": "fast", "fx_graph_cache": False})
        assert torch.equal(Kept(function, tmp_path / "doubled.aot")(torch.ones(6), 1.0), torch.full((6,), 3.0))
    sources = [path.read_text() for path in (tmp_path / "inductor").rglob("*.main.cpp")]
    assert len(sources) == len(set(sources)) == 1


def test_an_alias_is_marked_and_the_tensor_is_not():
    x_MD = torch.ones(3, 4)
    alias = any_length(x_MD, 1)
    assert alias.data_ptr() == x_MD.data_ptr()
    assert alias._dynamo_dynamic_indices == {1}
    assert not hasattr(x_MD, "_dynamo_dynamic_indices")
