"""A form that is wrong, or cannot be built, is left out with one warning: never a wrong number, never a traceback."""

import pytest
import torch

from miniawq.compiled import eager, gpu_forms, prepacked, products, proof, workshop
from miniawq.compiled.workshop import Workshop

FORMS = [
    products.REDUCE,
    products.DOT,
    products.WEIGHTS,
    products.WORDS,
    products.ROWS,
    products.TILED,
    products.EXPAND,
]
CPU = torch.device("cpu")


def plainly(function, forms):
    """In place of the compiler: what the forms compute is the same."""
    return function


OF_16_BITS = (products.DOT, products.WEIGHTS, products.EXPAND)
IN_ROWS = (products.REDUCE, *OF_16_BITS)


@pytest.fixture
def shop(monkeypatch):
    monkeypatch.setattr(proof, "WORKSHOP", Workshop())
    monkeypatch.setattr(proof, "compile_with_forms", plainly)
    return proof.WORKSHOP


@pytest.fixture
def arranged(monkeypatch):
    def choose(form):
        monkeypatch.setattr(prepacked, "wants_rows", lambda _: form in IN_ROWS)

    return choose


@pytest.mark.parametrize("form", FORMS, ids=lambda form: form.name)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_right_forms_pass(form, dtype, shop, arranged, caplog):
    if form in OF_16_BITS and dtype == torch.float32:
        pytest.skip("it multiplies numbers of 16 bits")
    arranged(form)
    assert proof.check(form, CPU, dtype)
    assert not caplog.text


@pytest.mark.parametrize("form", FORMS, ids=lambda form: form.name)
def test_a_form_that_is_wrong_in_one_number_is_left_out_and_said_once(form, shop, arranged, caplog, monkeypatch):
    arranged(form)

    def wrong(function, forms):
        def computed(*arguments):
            y_TO = function(*arguments).clone()
            y_TO[-1, -1] += 1
            return y_TO

        return computed

    monkeypatch.setattr(proof, "compile_with_forms", wrong)
    assert not proof.check(form, CPU, torch.float16 if form in OF_16_BITS else torch.float32)
    assert not proof.check(form, CPU, torch.float16 if form in OF_16_BITS else torch.float32)
    (record,) = caplog.records
    assert f"the compiled product '{form.name}' is left out on cpu" in record.getMessage()
    assert "1 of" in record.getMessage()


@pytest.mark.parametrize("form", FORMS[:3], ids=lambda form: form.name)
@pytest.mark.parametrize("nibble", range(8))
def test_one_wrong_nibble_is_found(form, nibble, shop, arranged, monkeypatch):
    """The example reads every nibble: a form that gets one of the eight wrong does not pass."""
    arranged(form)
    example = proof.example

    def spoilt(*arguments):
        x_TI, weight_OI, (words, *others) = example(*arguments)
        flip = lambda t: (t.view(torch.int32) ^ (1 << 4 * nibble)).view(t.dtype)  # noqa: E731
        return x_TI, weight_OI, (flip(words), *others)

    monkeypatch.setattr(proof, "example", spoilt)
    assert not proof.check(form, CPU, torch.bfloat16)


def test_a_device_that_flushes_subnormals_does_without_the_form_that_needs_them(shop, arranged, caplog):
    arranged(products.REDUCE)
    if not torch.set_flush_denormal(True):
        pytest.skip("this processor cannot flush subnormals")
    try:
        assert not proof.check(products.REDUCE, CPU, torch.float32)
        assert proof.check(products.EXPAND, CPU, torch.float16)
    finally:
        torch.set_flush_denormal(False)
    assert "'reduce' is left out" in caplog.text


def test_a_form_that_cannot_be_built_is_left_out(shop, caplog, monkeypatch):
    def refused(function, forms):
        raise RuntimeError("no C compiler\nand a long story")

    monkeypatch.setattr(proof, "compile_with_forms", refused)
    assert not proof.check(products.WORDS, CPU, torch.float32)
    assert caplog.messages == [
        "the compiled product 'words' is left out on cpu, which is slower: it cannot be built: no C compiler"
    ]


def test_full_memory_is_not_taken_for_a_broken_compiler(shop, monkeypatch):
    def full(function, forms):
        raise torch.OutOfMemoryError("full")

    monkeypatch.setattr(proof, "compile_with_forms", full)
    with pytest.raises(torch.OutOfMemoryError):
        proof.check(products.WORDS, CPU, torch.float32)


@pytest.mark.parametrize(("version", "known"), [
    ("2.10.1", False), ("2.11.0", True), ("2.13.0+cpu", True), ("2.14.0a0", False), ("3.0", False)
])  # fmt: skip
def test_nothing_is_compiled_with_a_torch_that_was_not_tried(version, known, shop, caplog, monkeypatch):
    monkeypatch.setattr(torch, "__version__", version)
    assert shop.may_compile == known
    assert proof.check(products.WORDS, CPU, torch.float32) == known
    assert len(caplog.messages) == (not known)


def test_the_window_is_that_of_the_package():
    from importlib.metadata import requires

    first, end = (".".join(map(str, version)) for version in workshop.TORCH_VERSIONS)
    (torch_,) = (line for line in requires("miniawq") if line.startswith("torch") and "extra" not in line)
    assert {f">={first}", f"<{end}"} == set(torch_.removeprefix("torch").split(","))


def test_only_the_thread_it_is_reserved_for_may_compile(shop):
    from threading import Thread, current_thread

    assert shop.may_compile
    shop.reserve(Thread())
    assert not shop.may_compile
    shop.reserve(current_thread())
    assert shop.may_compile
    shop.reserve(None)


def test_without_a_compiler_weights_are_expanded_all_the_same(monkeypatch, caplog):
    """On a GPU without Triton or a C compiler, `--no-compile` and prompts go on."""
    monkeypatch.setattr(eager, "WORKSHOP", Workshop())
    monkeypatch.setattr(prepacked, "wants_rows", lambda _: True)

    def refused(*_):
        raise RuntimeError("no Triton")

    monkeypatch.setattr(eager, "compiled_expand", refused)
    weight = prepacked.empty(16, 256, 128, torch.float16, CPU)
    function, codes = eager.expansion(weight, torch.bfloat16)
    assert function(weight.words, weight.grid).dtype == torch.int64
    assert codes < eager.CODES_PER_EXPANDED_SLICE
    assert eager.expansion(weight, torch.bfloat16)[1] == codes
    assert len(caplog.messages) == 1
    assert "'expand' is left out on cpu" in caplog.text


def test_the_proof_of_expand_compares_all_bits(monkeypatch):
    right = lambda *key: lambda words, grid: eager.expand(words, grid, *key[1:3])  # noqa: E731
    wrong = lambda *key: lambda words, grid: eager.expand(words ^ (1 << 12), grid, *key[1:3])  # noqa: E731
    for make, found in ((right, ""), (wrong, "its numbers are wrong")):
        monkeypatch.setattr(eager, "compiled_expand", make)
        assert eager.prove_expand("expand", CPU, torch.float16, torch.bfloat16) == found


def test_the_flushed_places_are_those_of_the_form():
    assert len(gpu_forms.SUBNORMAL_PLACES) == 8
