"""Behind the wall: words as they lie in memory, forms, what is kept, and the proofs."""

from tests.planted.fault import Fault

SOURCES = "compiled/test_matrices"
SHARING = "compiled/test_sharing"
FORMS, PROOF, STEP = "compiled/test_forms", "compiled/test_proof", "engine/test_step"
FAULTS = [
    # How words lie.
    Fault("compiled/prepacked.py", r"zeros_OG\.float\(\)\.view\(torch\.int32\) \|", "zeros_OG.int() |", FORMS),
    Fault("compiled/prepacked.py", r"% \(2 \* LANES\) == 0 else LANES", "< 0 else LANES", FORMS),
    Fault(
        "compiled/prepacked.py", r"in_blocks\(pack_grid\((.*?)\), LANES\)", r"pack_grid(\1).view_as(target.grid)", FORMS
    ),
    Fault("compiled/prepacked.py", r"movedim\(-1, 1\)", "movedim(-1, 0)", FORMS),
    Fault("compiled/prepacked.py", r"(len\(part\.words\) for part in parts)\]", r"\1[::-1]]", "test_kernel"),
    Fault("compiled/prepacked.py", r"!= ends\[:-1\]", "== ends", STEP),
    # Tables, and large dense weights on a CPU.
    Fault("compiled/tables.py", r"codes_GSW\[\.\.\., 1::2\] << 4", "codes_GSW[..., 1::2]", FORMS),
    Fault(
        "compiled/tables.py",
        r"scales_WG\.t\(\)\.repeat_interleave\(repeats, 0\)",
        "scales_WG.t().repeat(repeats, 1)",
        FORMS,
    ),
    Fault("compiled/tables.py", r"\.repeat\(times\)", "", FORMS),
    Fault("compiled/tables.py", r"\(slice\(-1, None\), -1\)", "(slice(-1, None), 1)", FORMS),
    Fault("compiled/tables.py", r"if outputs % width == 0", "if outputs >= width", FORMS),
    Fault("compiled/tables.py", r"permute\(0, 3, 1, 2\)", "permute(3, 0, 1, 2)", FORMS),
    Fault("compiled/tables.py", r" +first = end\n", "", FORMS),
    Fault("compiled/tables.py", r"\) and torch\.equal\(found\[1\], right_TO\)", ")", FORMS),
    Fault("compiled/sharing.py", r"for number in range\(len\(tasks\)\)", "for number in results", SHARING),
    Fault("compiled/sharing.py", r"            raise result", "            continue", SHARING),
    Fault("compiled/sharing.py", r"    os\.register_at_fork.*", "    pass", SHARING),
    Fault("compiled/sharing.py", r"    with torch\.inference_mode\(\):", "    if True:", SHARING),
    Fault("compiled/sharing.py", r"(with threads)\(1\)", r"\1(None)", SHARING),
    Fault("compiled/halves.py", r"2\.0\*\*-packed\.exponent", "1", FORMS),
    Fault("compiled/halves.py", r"2\.0\*\*-17", "2.0**-19", FORMS),
    Fault("compiled/halves.py", r"is_right = packed is not None and .*", "is_right = packed is not None", FORMS),
    Fault("compiled/halves.py", r"not largest\.isfinite\(\)", "False", FORMS),
    # Forms of a GPU.
    Fault("compiled/gpu_forms.py", r"product_OU - zeros_OU", "product_OU + zeros_OU", FORMS),
    Fault("compiled/gpu_forms.py", r"== copy\)", "== 0)", FORMS),
    Fault("compiled/gpu_forms.py", r"of_a_group & -of_a_group", "of_a_group", FORMS),
    Fault("compiled/gpu_forms.py", r"% \(of_a_group // shares\)", "% shares", FORMS),
    Fault("compiled/products.py", r"rows < FEWEST_ROWS_DOTTED", "rows <= FEWEST_ROWS_DOTTED", "compiled/test_products"),
    Fault("compiled/gpu_forms.py", r"permute\(0, 1, 2, 5, 3, 4\)", "permute(0, 1, 2, 5, 4, 3)", FORMS),
    Fault("compiled/gpu_forms.py", r"device\) % 2 == 0", "device) % 2 == 1", FORMS),
    Fault("compiled/gpu_forms.py", r"second\.view\(torch\.float32\)\) \* 0\.5", "second.view(torch.float32))", FORMS),
    Fault("compiled/operations.py", r"0x000F000F << place", "0x000F000E << place", FORMS),
    Fault(
        "compiled/gpu_forms.py",
        r"y_VTO if factors_T1 is None else .*, bias_O",
        "y_VTO, bias_O",
        "compiled/test_products",
    ),
    Fault("compiled/gpu_forms.py", r"permute\(0, 1, 4, 2, 3\)", "permute(0, 1, 4, 3, 2)", FORMS),
    Fault("compiled/operations.py", r"\(codes_KOQH - zeros_KOQ", "(codes_KOQH + zeros_KOQ", FORMS),
    Fault("compiled/operations.py", r"weights_KOQH\.to\(right\.dtype\)", "weights_KOQH", "compiled/test_inductor"),
    Fault("compiled/inductor.py", r"pairs\[0\]\}, \{pairs\[2\]", "pairs[0]}, {pairs[1]", "compiled/test_inductor"),
    Fault("compiled/inductor.py", r" \+ 128\.0", "", "compiled/test_inductor"),
    Fault(
        "compiled/gpu_forms.py", r"with_bias\(y_VTO\.squeeze\(0\), bias_O,", "with_bias(y_VTO.squeeze(0), None,", FORMS
    ),
    Fault("compiled/gpu_forms.py", r"(written\(y_VTO\)\.unbind\(\)\), )bias_O,", r"\1None,", FORMS),
    Fault("compiled/operations.py", r"copy::copies", "::copies", FORMS),
    Fault(
        "compiled/operations.py",
        r"return left\.float\(\) @ right\.float\(\)",
        "return (left @ right) * 2",
        "compiled/test_products",
    ),
    Fault("compiled/eager.py", r"\(first & 0xFFFF\)", "first", "test_kernel"),
    # Forms of a CPU.
    Fault("compiled/cpu_forms.py", r">> 4 if nibble % 2", ">> 4 if nibble < 7 and nibble % 2", FORMS),
    Fault("compiled/cpu_forms.py", r"(256\.0 \*\* -\(nibble // 2)\)", r"\1 % 3)", FORMS),
    Fault("compiled/cpu_forms.py", r"\(shares_CRGP / words\)", "shares_CRGP", FORMS),
    Fault("compiled/cpu_forms.py", r"words\.bit_count\(\) == 1", "True", "oracle/test_forms"),
    Fault("compiled/cpu_forms.py", r"permute\(3, 1, 0, 2, 4\)", "permute(1, 3, 0, 2, 4)", FORMS),
    Fault("compiled/cpu_forms.py", r"zeros_\w+ \* (-shares_\w+ for)", r"\1", FORMS),
    Fault(
        "compiled/cpu_forms.py",
        r"\(parts, rows\)\)(\.permute\(3, 1, 0, 2, 4\))",
        r"(rows, parts)).transpose(0, 1)\1",
        FORMS,
    ),
    Fault("compiled/cpu_forms.py", r"permute\(3, 1, 0, 2\)\.flatten", "permute(1, 3, 0, 2).flatten", FORMS),
    Fault(
        "compiled/cpu_forms.py", r"(for weight_\w+ in weights_\w+) (for x_\w+ in x_\w+\.unbind\(1\))", r"\2 \1", FORMS
    ),
    Fault("compiled/cpu_forms.py", r"tiles \* tile - len\(x_TI\)", "0", FORMS),
    Fault("compiled/operations.py", r"terms\[first::sums\]", "terms[first * sums :][:sums]", FORMS),
    # Private torch.
    Fault("compiled/sources.py", r'rf"\\1, \{accumulator\}"', r'r"\\1"', SOURCES),
    Fault("compiled/sources.py", r"in_right_operand\(line\) if SUMMANDS", "line if SUMMANDS", SOURCES),
    Fault("compiled/sources.py", r'f"r0_offset // \{step\}"', 'f"r0_index // {step}"', SOURCES),
    Fault(
        "compiled/inductor.py",
        r"to_dtype\(load\(index\), dtype, use_compute_types=False\)",
        "to_dtype(load(index), dtype)",
        "compiled/test_inductor",
    ),
    Fault("compiled/sources.py", r"if columns != of_columns:", "if False:", "compiled/test_inductor"),
    Fault("compiled/sources.py", r"names\[0\]\}, \{names\[2\]", "names[0]}, {names[1]", SOURCES),
    Fault("compiled/sources.py", r"\{first or 0\} \+ \{index\}", "{index}", SOURCES),
    Fault("compiled/sources.py", r"if len\(neighbours\) == size:", "if True:", SOURCES),
    Fault(
        "compiled/inductor.py", r"\[all_in_step, \*\((.*range\()1, sums\)\)\]", r"[\1sums)]", "compiled/test_inductor"
    ),
    Fault("compiled/inductor.py", r"loaders\[number::sums\]", "loaders[::sums]", "compiled/test_inductor"),
    Fault(
        "compiled/inductor.py",
        r"^(        )TritonScheduling\.kernel_type = before",
        r"\1pass",
        "compiled/test_inductor",
    ),
    Fault("compiled/launch.py", r" \* ceil\(rows / columns\)", "", "compiled/test_launch"),
    Fault("compiled/launch.py", r"elements //= block", "elements //= 1", "compiled/test_launch"),
    # Products.
    Fault(
        "compiled/products.py",
        r"MOST_ROWS_OF_WEIGHTS if is_largest else .*",
        "MOST_ROWS_OF_WEIGHTS",
        "compiled/test_products",
    ),
    Fault("compiled/products.py", r"\+ eps / pieces", "+ eps", "compiled/test_products"),
    Fault("compiled/products.py", r"^    h_TI = gpu_forms\.in_whole_tiles\(h_TI\)\n", "", "compiled/test_products"),
    Fault("compiled/products.py", r"fits = first\.form\.stays_float32 or", "fits = True or", "compiled/test_products"),
    Fault(
        "compiled/products.py",
        r"next\(filter\(accepts, wanted\), PLAIN\)",
        "next(iter(wanted), PLAIN)",
        "compiled/test_products",
    ),
    # What is kept.
    Fault(
        "compiled/compiler.py",
        r"self\.kept is not None and self\.kept\.guard_check\(\*arguments\)",
        "self.kept is not None",
        "compiled/test_compiler",
    ),
    Fault("compiled/compiler.py", r"torch\._dynamo\.mark_dynamic\(alias, dim\)", "pass", "compiled/test_compiler"),
    Fault("compiled/compiler.py", r"alias = x\.detach\(\)", "alias = x", "compiled/test_compiler"),
    Fault("compiled/compiler.py", r", settings\.patch\(self\.function\.options\):", ":", "compiled/test_compiler"),
    Fault(
        "compiled/artifacts.py",
        r"\{leaf\.dtype\} \{list\(leaf\.shape\)\}",
        "{list(leaf.shape)}",
        "compiled/test_artifacts",
    ),
    Fault("compiled/artifacts.py", r'not changed and seal\["decides"\] == decides', "True", "compiled/test_artifacts"),
    Fault("compiled/artifacts.py", r"\w+\.st_uid != os\.getuid\(\) or ", "", "compiled/test_artifacts"),
    Fault("compiled/artifacts.py", r"\(stat\.S_IWGRP \| stat\.S_IWOTH\)", "stat.S_IWGRP", "compiled/test_artifacts"),
    Fault("compiled/artifacts.py", r"mode=0o700, ", "", "compiled/test_artifacts"),
    Fault("compiled/artifacts.py", r"place >= MOST_DIRECTORIES or ", "", "compiled/test_artifacts"),
    Fault("compiled/artifacts.py", r" or time\.time\(\) - .* > OLDEST_SECONDS", "", "compiled/test_artifacts"),
    Fault(
        "compiled/artifacts.py",
        r"^        del os\.environ\[INDUCTOR_DIRECTORY\]",
        "        pass",
        "compiled/test_artifacts",
    ),
    # Whether the compiler may be used, and what of it.
    Fault("compiled/workshop.py", r"first <= found < end", "first <= found", PROOF),
    Fault("compiled/workshop.py", r"first <= found < end", "found < end", PROOF),
    Fault("compiled/workshop.py", r" and self\.knows_torch", "", PROOF),
    Fault("compiled/workshop.py", r"\(None, current_thread\(\)\)", "(None, self._reserved_for)", PROOF),
    Fault("compiled/workshop.py", r"if text not in self\._said", "if True", PROOF),
    Fault("compiled/workshop.py", r"^        except torch\.OutOfMemoryError:\n            raise\n", "", PROOF),
    Fault("compiled/workshop.py", r"return not problem", "return True", PROOF),
    Fault("compiled/proof.py", r"found_TO != right_TO", "right_TO != right_TO", PROOF),
    Fault("compiled/proof.py", r"WORKSHOP\.knows_torch and ", "", PROOF),
    Fault("compiled/eager.py", r'"" if torch\.equal\(', '"" if True or torch.equal(', PROOF),
    Fault("compiled/eager.py", r"WORKSHOP\.may_compile and ", "", PROOF),
]
