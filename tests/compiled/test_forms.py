"""The compiled forms as plain functions: arrangements that can be undone, products within derived bounds."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from miniawq.compiled import cpu_forms, eager, halves, operations, prepacked, sharing, tables
from miniawq.compiled import gpu_forms as forms
from miniawq.hardware import threads
from miniawq.packing import SEQUENTIAL, Quantized, dequantize, encode_awq, unpack
from tests.helpers.marks import each_once

FLOAT32 = 2.0**-24


def random_quantized(outputs, inputs, group_size, seed=0):
    generator = torch.Generator().manual_seed(seed)
    groups = inputs // group_size
    codes_OI = torch.randint(0, 16, (outputs, inputs), generator=generator, dtype=torch.uint8)
    zeros_OG = torch.randint(0, 16, (outputs, groups), generator=generator, dtype=torch.uint8)
    scales_OG = (torch.rand(outputs, groups, generator=generator) * 0.02 + 1e-4).half()
    return Quantized(codes_OI, scales_OG, zeros_OG)


def random_rows(rows, inputs, dtype=torch.float32, seed=1):
    return torch.randn(rows, inputs, generator=torch.Generator().manual_seed(seed)).to(dtype)


def in_rows(quantized):
    """words_KWGP and grid_KGW: what lies in the memory of a GPU."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(prepacked, "wants_rows", lambda _: True)
        target = prepacked.prepack(quantized)
    return target.words, target.grid


def vectors_product(x_TI, quantized, parts=1):
    words_KWGP, grid_KGW = in_rows(quantized)
    x = forms.prescale(x_TI, forms.powers_of_places(x_TI.shape[1], "cpu"), words_KWGP.shape[3])
    return torch.stack(forms.reduce_vectors(words_KWGP, grid_KGW, quantized.scales_OG.dtype, *x, parts))


def words_product(x_TI, quantized, lanes=8):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(prepacked, "lanes_for", lambda _: lanes)
        target = prepacked.prepack(quantized)
    x = cpu_forms.prescale_words(x_TI, target.grid.shape[1])
    return cpu_forms.reduce_words(cpu_forms.as_loaded(target.words), target.grid, *x)[: len(x_TI)]


def dot_product(x_TI, quantized, splits=1, bias_O=None):
    words_KWGP, grid_KGW = in_rows(quantized)
    x = forms.spread(x_TI, words_KWGP.shape[3])
    y_TO = forms.dot_groups(words_KWGP, grid_KGW, quantized.scales_OG.dtype, *x, bias_O, splits=splits)
    return y_TO[: len(x_TI)]


def weights_product(x_TI, quantized, splits=1, bias_O=None):
    words_KWGP, grid_KGW = in_rows(quantized)
    x_TQH = forms.by_nibbles(x_TI, words_KWGP.shape[3])
    y_TO = forms.dot_weights(words_KWGP, grid_KGW, quantized.scales_OG.dtype, x_TQH, bias_O, splits=splits)
    return y_TO[: len(x_TI)]


def summed_product(x_TI, quantized):
    return tables.summed_product(x_TI, [tables.table_of(quantized)])


def expanded_product(x_TI, quantized):
    """Two blocks of eight outputs at a time."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tables, "LEAST_OUTPUTS_OF_BLOCK", 8)
        patch.setattr(tables, "MOST_OUTPUTS_OF_BLOCK", 8)
        patch.setattr(tables, "CODES_PER_SLICE", 2 * 8 * quantized.codes_OI.shape[1])
        return tables.expanded_table_product(x_TI, [tables.table_of(quantized)])


def exact(x_TI, quantized):
    return x_TI.double() @ dequantize(quantized, torch.float64).t()


def magnitude(x_TI, quantized, term):
    """sum |x| term, with term [O, G, S] a function of codes, zeros and scales as float64."""
    codes_OGS = quantized.codes_OI.double().unflatten(1, (quantized.scales_OG.shape[1], -1))
    zeros_OG1, scales_OG1 = quantized.zeros_OG.double().unsqueeze(-1), quantized.scales_OG.double().unsqueeze(-1)
    return x_TI.double().abs() @ term(codes_OGS, zeros_OG1, scales_OG1).expand(codes_OGS.shape).flatten(1).t()


def reduction_bound(x_TI, quantized):
    """`reduce_vectors`, `reduce_words` and products of tables round only sums, and their products with zero and scale.

    A group's sums, of code * x and of x, take S additions each; subtracting, scaling and adding up G groups G + 8
    more. Each is off by 2^-24 of at most the sum of (code + zero) * scale * |x|.
    """
    groups = quantized.scales_OG.shape[1]
    roundings = quantized.group_size + groups + 8
    return roundings * FLOAT32 * magnitude(x_TI, quantized, lambda code, zero, scale: (code + zero) * scale)


def dot_bound(x_TI, quantized):
    """`dot_groups` rounds no weight either, but the result to the dtype of x."""
    unit = torch.finfo(x_TI.dtype).eps / 2
    return (1 + unit) * reduction_bound(x_TI, quantized) + unit * exact(x_TI, quantized).abs()


def weights_bound(x_TI, quantized):
    """`dot_weights` rounds each weight and the result to the dtype of x."""
    unit = torch.finfo(x_TI.dtype).eps / 2
    of_weights = magnitude(x_TI, quantized, lambda code, zero, scale: (code - zero).abs() * scale)
    sums = (unit + (1 + unit) * (x_TI.shape[1] + 8) * FLOAT32) * of_weights
    return (1 + unit) * sums + unit * exact(x_TI, quantized).abs()


PRODUCTS = {
    "vectors": (vectors_product, reduction_bound, torch.float32),
    "vectors in 4": (lambda x_TI, quantized: vectors_product(x_TI, quantized, 4), reduction_bound, torch.float32),
    "words": (words_product, reduction_bound, torch.float32),
    "words of 16 outputs": (
        lambda x_TI, quantized: words_product(x_TI, quantized, 16),
        reduction_bound,
        torch.float32,
    ),
    "sums of a table": (summed_product, reduction_bound, torch.float32),
    "expanded table": (expanded_product, reduction_bound, torch.float32),
    "dot": (dot_product, dot_bound, torch.bfloat16),
    "dot in 2": (lambda x_TI, quantized: dot_product(x_TI, quantized, 2), dot_bound, torch.float16),
    "weights": (weights_product, weights_bound, torch.float16),
    "weights in 2": (lambda x_TI, quantized: weights_product(x_TI, quantized, 2), weights_bound, torch.float16),
}


@pytest.fixture(params=PRODUCTS)
def form(request):
    return PRODUCTS[request.param]


@given(st.integers(1, 9), st.integers(1, 4), st.sampled_from([32, 64, 128]), st.integers(0, 2**32))
def test_words_hold_every_code_and_give_it_back(outputs, groups, group_size, seed):
    codes_OI = random_quantized(outputs, groups * group_size, group_size, seed).codes_OI
    words_OGP = prepacked.sequential_words(codes_OI, groups)
    assert words_OGP.shape == (outputs, groups, group_size // 8)
    assert torch.equal(unpack(words_OGP.flatten(1), SEQUENTIAL), codes_OI)
    output, group, word, nibble = outputs - 1, groups - 1, group_size // 8 - 1, 5
    code = (int(words_OGP[output, group, word]) >> 4 * nibble) & 15
    assert code == codes_OI[output, group * group_size + 8 * word + nibble]


# One to nine, and both sides of every number of rows at which a tile ends or a form begins.
ROWS = (*range(1, 10), 16, 17, 31, 32, 33, 63, 64, 65, 128, 129)


@pytest.mark.parametrize(("rows", "group_size"), each_once(ROWS, (16, 32, 64, 128, 512)))
def test_forms_stay_within_their_bounds(form, rows, group_size):
    product, bound, dtype = form
    quantized = random_quantized(48, 512, group_size)
    x_TI = random_rows(rows, 512, dtype)
    error_TO = (product(x_TI, quantized).double() - exact(x_TI, quantized)).abs()
    assert (error_TO <= bound(x_TI, quantized)).all()


@pytest.mark.parametrize("vectors", range(1, 17))
def test_the_shares_of_a_group_are_exact(vectors):
    sums_TG = torch.tensor([[1 / 3, -1e3], [0.1, 7e-9]])
    shares_TV = forms.shared_out(sums_TG, 2 * vectors)
    assert torch.equal(shares_TV.double().unflatten(1, (2, vectors)).sum(2), sums_TG.double())


@pytest.mark.parametrize(("outputs", "lanes"), [(8, 8), (24, 8), (16, 16), (48, 16)])
def test_blocks_hold_every_code_and_give_it_back(outputs, lanes, monkeypatch):
    monkeypatch.setattr(prepacked, "lanes_for", lambda _: lanes)
    quantized = random_quantized(outputs, 256, 32)
    target = prepacked.prepack(quantized)
    assert target.outputs == outputs
    assert all(torch.equal(*pair) for pair in zip(prepacked.unprepack(target), quantized, strict=True))
    output, group, word, nibble = outputs - 3, 5, 2, 7
    code = (int(target.words[output // lanes, group, word, output % lanes]) >> 4 * nibble) & 15
    assert code == quantized.codes_OI[output, 32 * group + 8 * word + nibble]
    parts = list(prepacked.slices(target, 1))
    assert [part.outputs for _, part in parts] == [lanes] * (outputs // lanes)
    assert torch.equal(torch.cat([part.words for _, part in parts]), target.words)


@pytest.mark.parametrize(("outputs", "group_size", "groups"), [(8, 32, 16), (128, 256, 4), (648, 512, 4)])
def test_a_table_holds_every_code_and_gives_it_back(outputs, group_size, groups):
    """A group of more than 128 inputs lies as several: the sums of codes stay small."""
    quantized = random_quantized(outputs, 512, group_size)
    words = encode_awq(quantized)
    for table in (
        tables.table_of(quantized),
        tables.table_of_awq(*(words[n] for n in ("qweight", "qzeros", "scales"))),
    ):
        assert (table.outputs, table.group_size, table.grid.shape[1]) == (outputs, group_size, groups)
        assert table.words.nbytes + table.grid.nbytes == tables.table_bytes(outputs, 512, group_size)
        assert all(torch.equal(*pair) for pair in zip(tables.quantized_of(table), quantized, strict=True))
        block, place = divmod(outputs - 3, tables.outputs_of_block(outputs))
        group, row = divmod(77, 512 // groups)
        assert (int(table.words[block, group, row, place // 2]) >> 4) & 15 == quantized.codes_OI[outputs - 3, 77]


@pytest.mark.parametrize(
    ("outputs", "width"), [(4864, 304), (896, 224), (4096, 256), (320, 320), (328, 328), (8 * 67, 536), (40, 40)]
)
def test_blocks_of_a_table_fit_the_loop_of_the_library_where_they_can(outputs, width):
    assert tables.outputs_of_block(outputs) == width


@given(st.integers(1, 8), st.sampled_from([1, 2, 3]), st.integers(0, 2**32))
def test_shared_products_of_tables_are_the_same_bits(rows, threads_of_step, seed):
    """In tasks of a block or more, of one table and of several that read the same input."""
    layers = [random_quantized(outputs, 64, 32, seed) for outputs in (640, 8, 192)]
    together, x_TI = [tables.table_of(quantized) for quantized in layers], random_rows(rows, 64, seed=seed)
    expected_TO = torch.cat([tables.summed_product(x_TI, [table]) for table in together], 1)
    with pytest.MonkeyPatch.context() as patch, threads(threads_of_step), sharing.shared_step():
        patch.setattr(tables, "CODES_OF_TASK", 64 * 320)
        together = [tables.table_of(quantized) for quantized in layers]
        assert [len(table.tasks) for table in together] == [2, 1, 1]
        assert torch.equal(tables.summed_product(x_TI, together), expected_TO)


def test_packed_halves_say_their_product_is_wrong(monkeypatch):
    assert not halves.prove_halves("halves", torch.device("cpu"))
    product = halves.halves_product
    monkeypatch.setattr(
        halves, "halves_product", lambda *both: product(*both).index_add_(1, torch.tensor([69]), torch.ones(5, 1))
    )
    assert halves.prove_halves("halves", torch.device("cpu")) == "its numbers are wrong"


def test_a_table_says_its_product_is_wrong():
    """One code of the example, one number."""
    assert not tables.prove_table("table", torch.device("cpu"))
    for name in ("summed_product", "expanded_table_product"):
        product = getattr(tables, name)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(
                tables, name, lambda x_TI, both, product=product: product(x_TI, [*both[:-1], spoilt(both[-1])])
            )
            assert tables.prove_table("table", torch.device("cpu")) == "its numbers are wrong"


def spoilt(table):
    words = table.words.clone()
    words[-1, -1, -2, -5] ^= 1
    return replace(table, words=words)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("size", [1.0, 2.0**-20, 2.0**15])
def test_packed_halves_are_the_weight_itself(dtype, size, monkeypatch):
    """Read out with single ones, and within the bound of a dense sum."""
    monkeypatch.setattr(halves, "OUTPUTS_OF_CALL", 16)
    size = size if dtype == torch.bfloat16 or size < 1e3 else 1e3
    weight_OI = (random_rows(40, 32, seed=2) * size).to(dtype)
    packed, x_TI = halves.pack_halves(weight_OI), random_rows(3, 32)
    assert len(packed.pieces) == 3
    assert torch.equal(halves.halves_product(torch.eye(32), packed), weight_OI.float().t())
    error_TO = (halves.halves_product(x_TI, packed).double() - x_TI.double() @ weight_OI.double().t()).abs()
    assert (error_TO <= dense_bound(x_TI, weight_OI)).all()


@pytest.mark.parametrize(
    ("value", "packs"), [(2.0**-31, True), (1.5 * 2.0**-33, False), (float("nan"), False), (0.0, True)]
)
def test_weights_that_would_be_rounded_are_not_packed(value, packs):
    weight_OI = torch.ones(8, 8, dtype=torch.bfloat16)
    weight_OI[3, 5] = value
    assert (halves.pack_halves(weight_OI) is not None) == packs


@pytest.mark.parametrize(("capability", "outputs", "lanes"), [("AVX2", 32, 8), ("AVX512", 32, 16), ("AVX512", 24, 8)])
def test_a_block_fills_a_vector_where_it_can(capability, outputs, lanes, monkeypatch):
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    assert prepacked.lanes_for(outputs) == lanes


@pytest.mark.parametrize("splits", [1, 2])
@pytest.mark.parametrize("product", [dot_product, weights_product])
def test_a_bias_is_added_before_dots_are_rounded(product, splits):
    """So it may take away what was rounded, and leave the rest."""
    quantized, x_TI = random_quantized(48, 512, 128), random_rows(4, 512, torch.bfloat16)
    y_TO = product(x_TI, quantized, splits)
    rest_O = product(x_TI, quantized, splits, -y_TO[0].float())[0]
    assert (rest_O != 0).all()
    assert (rest_O.abs() <= 2**-8 * y_TO[0].abs()).all()


@pytest.mark.parametrize("wrong", ["code", "zero", "scale", "activation"])
def test_bounds_catch_the_smallest_fault(form, wrong):
    product, bound, dtype = form
    quantized, x_TI = random_quantized(32, 256, 64), random_rows(2, 256, dtype)
    codes_OI, scales_OG, zeros_OG = (tensor.clone() for tensor in quantized)
    faulty_x_TI = x_TI.clone()
    if wrong == "code":
        codes_OI[3, 77] ^= 1
    elif wrong == "zero":
        zeros_OG[3, 1] ^= 1
    elif wrong == "scale":
        scales_OG[3, 1] *= 1 + (2.0**-9 if dtype == torch.float32 else 2.0**-4)
    else:
        faulty_x_TI[0, 7] *= 1.03 if dtype == torch.float32 else 2
    faulty = Quantized(codes_OI, scales_OG, zeros_OG)
    error_TO = (product(faulty_x_TI, faulty).double() - exact(x_TI, quantized)).abs()
    assert (error_TO > bound(x_TI, quantized)).any()


def dense_product(x_TI, weight_OI):
    return cpu_forms.reduce_dense(weight_OI, cpu_forms.in_tiles(x_TI))[: len(x_TI)]


def dense_bound(x_TI, weight_OI):
    """Products and sums, rounded to float32 each: off by 2^-24 of at most the sum of |weight| * |x|."""
    return (x_TI.shape[1] + 1) * FLOAT32 * (x_TI.double().abs() @ weight_OI.double().abs().t())


@pytest.mark.parametrize(
    ("rows", "outputs", "dtype"), each_once(ROWS, (1, 6, 7, 8), (torch.float16, torch.bfloat16, torch.float32))
)
def test_dense_sums_stay_within_their_bound(rows, outputs, dtype):
    """Outputs that fill four parts, two, or none."""
    weight_OI, x_TI = random_rows(outputs, 96, dtype, seed=2), random_rows(rows, 96)
    error_TO = (dense_product(x_TI, weight_OI).double() - x_TI.double() @ weight_OI.double().t()).abs()
    assert (error_TO <= dense_bound(x_TI, weight_OI)).all()
    faulty_OI = weight_OI.clone()
    faulty_OI[-1, 5] *= 1 + 2.0**-7
    error_TO = (dense_product(x_TI, faulty_OI).double() - x_TI.double() @ weight_OI.double().t()).abs()
    assert (error_TO > dense_bound(x_TI, weight_OI)).any()


def test_a_nan_stays_in_its_row_of_a_dense_sum():
    x_TI = random_rows(6, 64)
    x_TI[4, 3] = torch.nan
    is_nan_TO = dense_product(x_TI, random_rows(10, 64)).isnan()
    assert torch.equal(is_nan_TO.all(1), is_nan_TO.any(1))
    assert is_nan_TO.any(1).tolist() == [row == 4 for row in range(6)]


@pytest.mark.parametrize(
    ("places", "name"),
    [("SUBNORMAL_PLACES", "vectors"), ("PAIR_PLACES", "dot"), ("PAIR_PLACES", "dot in 2"), ("SHIFTS", "weights")],
)
def test_bounds_catch_two_nibbles_exchanged(places, name, monkeypatch):
    product, bound, dtype = PRODUCTS[name]
    quantized, x_TI = random_quantized(48, 256, 64), random_rows(2, 256, dtype)
    good = getattr(operations, places)
    first, second, *others = good[dtype] if places == "PAIR_PLACES" else good
    exchanged = (second, first, *others)
    monkeypatch.setattr(operations, places, {dtype: exchanged} if places == "PAIR_PLACES" else exchanged)
    if places == "SUBNORMAL_PLACES":
        monkeypatch.setattr(forms, places, exchanged)
    error_TO = (product(x_TI, quantized).double() - exact(x_TI, quantized)).abs()
    assert (error_TO > bound(x_TI, quantized)).any()


def test_every_code_and_zero_in_every_nibble_is_exact(form):
    """One activation of 1 and the rest 0 read out single weights: (code - zero) * scale, with nothing to round."""
    product, _, dtype = form
    codes_OI = torch.arange(16, dtype=torch.uint8).repeat_interleave(16)[:, None].repeat(1, 256)
    zeros_OG = torch.arange(16, dtype=torch.uint8).repeat(16)[:, None].repeat(1, 2)
    quantized = Quantized(codes_OI, torch.full((256, 2), 0.25).half(), zeros_OG)
    y_IO = product(torch.eye(256, dtype=dtype), quantized)
    assert torch.equal(y_IO.double(), dequantize(quantized, torch.float64).t())


def test_the_parts_of_a_sum_are_all_of_it():
    x_T1 = torch.randn(200, 1, generator=torch.Generator().manual_seed(0)) * 2.0 ** torch.arange(-100, 100)[:, None]
    parts_TF = forms.in_parts(x_T1).flatten(1).view(torch.bfloat16)
    assert parts_TF.shape == (200, operations.SUMMED_AT_ONCE)
    assert torch.equal(parts_TF.double().sum(1, keepdim=True), x_T1.double())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("group_size", [32, 128])
def test_expand_rounds_like_the_definition(dtype, group_size):
    quantized = random_quantized(48, 384, group_size)
    weight_OI = eager.expand(*in_rows(quantized), quantized.scales_OG.dtype, dtype).view(dtype)
    assert torch.equal(weight_OI, dequantize(quantized, dtype))


@pytest.mark.parametrize("scale_dtype", [torch.float16, torch.bfloat16])
def test_a_grid_keeps_scale_and_zero(scale_dtype):
    scales_OG = torch.arange(2**15).to(torch.int16).view(scale_dtype).unflatten(0, (-1, 16)).nan_to_num()
    zeros_OG = (torch.arange(2**15) % 16).to(torch.uint8).unflatten(0, (-1, 16))
    grid = prepacked.unpack_grid(prepacked.pack_grid(scales_OG, zeros_OG), scale_dtype)
    assert torch.equal(grid[0], scales_OG.float())
    assert torch.equal(grid[1], zeros_OG.float())


@pytest.mark.parametrize("value", [2.0**40, 2.0**-60, 6e4, 0.0])
def test_activations_of_any_size_keep_the_bound(form, value):
    product, bound, dtype = form
    if value > torch.finfo(dtype).max:
        pytest.skip("no number of this dtype")
    quantized, x_TI = random_quantized(48, 256, 64), random_rows(2, 256, dtype)
    x_TI[0] *= min(value, 2.0**12) if dtype == torch.float16 else value
    x_TI[1, 9] = value
    error_TO = (product(x_TI, quantized).double() - exact(x_TI, quantized)).abs()
    assert (error_TO <= bound(x_TI, quantized) + 2.0**-70).all()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_stays_in_its_row(form, value):
    product, _, dtype = form
    quantized, x_TI = random_quantized(48, 256, 64), random_rows(3, 256, dtype)
    x_TI[1, 9] = value
    assert product(x_TI, quantized).isfinite().all(1).tolist() == [True, False, True]
