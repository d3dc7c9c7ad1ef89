"""Plant each fault of a table in a copy of the project and show the test that catches it.

    python scripts/planted_faults.py [FILE ...]        only the faults in these files

A fault that no test catches is an error: then a rule of this project stands untested.
"""

import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parent.parent


class Fault(NamedTuple):
    file: str
    was: str
    becomes: str
    test: str


FAULTS = [
    Fault("packing.py", "AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)", "AWQ_ORDER = (0, 4, 1, 5, 2, 6, 3, 7)", "test_packing"),
    Fault("packing.py", "bytes_RW4[..., byte] & TOP_CODE", "bytes_RW4[..., byte]", "test_packing"),
    Fault("packing.py", "codes_RC.amax() > TOP_CODE or", "False or", "test_packing"),
    Fault("packing.py", "+ (nearest.double() < values)", "", "test_packing"),
    Fault("packing.py", "+ (nearest.double() < values)", "+ 1", "test_packing"),
    Fault("packing.py", "bits.clamp(min=1)", "bits", "test_packing"),
    Fault("packing.py", "weight_OGS.amin(-1).clamp(max=0).double()\n    highest",
          "weight_OGS.amin(-1).double()\n    highest",
          "test_packing"),
    Fault("packing.py", "highest_OG = weight_OGS.amax(-1).clamp(min=0)", "highest_OG = weight_OGS.amax(-1)",
          "test_packing"),
    Fault("packing.py", "(-lowest_OG / scales_OG.double()).round()", "(-lowest_OG / scales_OG.double()).floor()",
          "test_packing"),
    Fault("packing.py", "(steps_OGS.round() +", "(steps_OGS.floor() +", "test_packing"),
    Fault("packing.py", ".clamp(0, TOP_CODE)\n        codes_OI", ".clamp(0, TOP_CODE - 1)\n        codes_OI",
          "test_packing"),
    Fault("packing.py", "groups_OGS.double() / scales_OG[rows].double()", "groups_OGS.half() / scales_OG[rows]",
          "test_packing"),
    Fault("packing.py", "below_OG / (SYMMETRIC_ZERO + 0.5)", "below_OG / (SYMMETRIC_ZERO + 0.6)", "test_packing"),
    Fault("packing.py", "above_OG / (TOP_CODE - SYMMETRIC_ZERO + 0.5)", "above_OG / SYMMETRIC_ZERO", "test_packing"),
    Fault("packing.py", "zeros_OG[rows].unsqueeze(-1)) * scales", "zeros_OG[rows].unsqueeze(-1) - 1) * scales",
          "test_packing"),
    Fault("packing.py", "scales_OG[rows].float().unsqueeze(-1)\n        weight_OI[rows] =",
          "scales_OG[:1].float().unsqueeze(-1)\n        weight_OI[rows] =", "test_packing"),
    Fault("packing.py", "group_size < 1 or inputs % group_size", "group_size < 1", "test_packing"),
    Fault("packing.py", "if not weight_OI.sum(dtype=torch.float64).isfinite() and", "if False and", "test_packing"),
    Fault("packing.py", "multiple = 1 if group_size >= 128", "multiple = 1 if group_size >= 64", "test_packing"),
    Fault("packing.py", ".t()[:outputs]", ".t()", "test_packing"),
    Fault("arrange.py", "offsets_OG = -(2.0**7) - zeros", "offsets_OG = -(2.0**7) + zeros", "test_kernel_forms"),
    Fault("forms.py", "scales_O1G * (2.0**11 - 2.0**7)", "scales_O1G * 2.0**11", "test_kernel_forms"),
    Fault("forms.py", "WORD)).permute(3, 0, 2, 1)", "WORD)).permute(3, 0, 1, 2)", "test_kernel_forms"),
    Fault("forms.py", "y_KTO = y_KTO * factors_T1", "pass", "test_decode"),
    Fault("arrange.py", "and outputs % 16 == 0 else 8", "else 8", "test_kernel_forms"),
    Fault("arrange.py", "inputs // whole) * whole", "inputs // whole) * CODES_PER_WORD", "test_kernel_forms"),
    Fault("compiling.py", "is not None and self.kept.guard_check(*arguments)", "is not None", "test_compiling"),
    Fault("compiling.py", "torch._dynamo.mark_dynamic(alias, dim)", "pass", "test_compiling"),
    Fault("compiling.py", "alias = x.detach()", "alias = x", "test_compiling"),
    Fault("compiling.py", ", settings.patch(self.function.options):", ":", "test_compiling"),
    Fault("forms.py", "with_bias(y_KTO.squeeze(0), bias_O,", "with_bias(y_KTO.squeeze(0), None,", "test_kernel_forms"),
    Fault("forms.py", "with_bias(written(y_KTO).sum(0), bias_O,", "with_bias(written(y_KTO).sum(0), None,",
          "test_kernel_forms"),
    Fault("operations.py", "sum(others, first)", "sum(others[:-1], first)", "test_kernel_forms"),
    Fault("inductor.py", ', rf"\\1, {accumulator}", loop, count=1)', ', r"\\1", loop, count=1)', "test_inductor"),
    Fault("inductor.py", 'COLUMNS.sub(r"\\g<0>_R", loop), tail', "loop, tail", "test_inductor"),
    Fault("inductor.py", "if len(accumulators) != 1 or not all(", "if len(accumulators) != 1 or all(", "test_inductor"),
    Fault("tiles.py", "* ceil(rows / columns)", "", "test_tiles"),
    Fault("tiles.py", "elements //= block", "elements //= 1", "test_tiles"),
    Fault("cpu_forms.py", "words_K1GPW >> 4 if nibble % 2", "words_K1GPW >> 4 if nibble < 7 and nibble % 2",
          "test_kernel_forms"),
    Fault("cpu_forms.py", "256.0 ** -(nibble // 2)", "256.0 ** -(nibble // 2 % 3)", "test_kernel_forms"),
    Fault("cpu_forms.py", "(x_CRGPN.sum(-1) / x_CRGPN.shape[3])", "x_CRGPN.sum(-1)", "test_kernel_forms"),
    Fault("cpu_forms.py", "permute(3, 1, 0, 2, 4)", "permute(1, 3, 0, 2, 4)", "test_kernel_forms"),
    Fault("cpu_forms.py", "zeros_K1G1W * -means_CG11 for", "-means_CG11 for", "test_kernel_forms"),
    Fault("cpu_forms.py", "(0, (parts, rows)).permute(3, 1, 0, 2, 4)",
          "(0, (rows, parts)).transpose(0, 1).permute(3, 1, 0, 2, 4)", "test_kernel_forms"),
    Fault("cpu_forms.py", "permute(3, 1, 0, 2).flatten(2)", "permute(1, 3, 0, 2).flatten(2)", "test_kernel_forms"),
    Fault("cpu_forms.py", "for weight_O1I in weights_VO1I for x_CI in x_CRI.unbind(1)]",
          "for x_CI in x_CRI.unbind(1) for weight_O1I in weights_VO1I]", "test_kernel_forms"),
    Fault("operations.py", "terms[first::sums]", "terms[first * sums :][:sums]", "test_kernel_forms"),
    Fault("inductor.py", "[all_in_step, *(partial(one, number) for number in range(1, sums))]",
          "[partial(one, number) for number in range(sums)]", "test_inductor"),
    Fault("inductor.py", "loaders[number::sums]", "loaders[::sums]", "test_inductor"),
    Fault("cpu_forms.py", "tiles * tile - len(x_TI)", "0", "test_kernel_forms"),
    Fault("arrange.py", "t.movedim(-1, 1)", "t.movedim(-1, 0)", "test_kernel_forms"),
    Fault("kernel.py", "sizes = [len(part.words) for part in present]",
          "sizes = [len(part.words) for part in present[::-1]]", "test_kernel"),
    Fault("products.py", "h_TI.shape[1] + eps / pieces", "h_TI.shape[1] + eps", "test_decode"),
    Fault("products.py", "    h_TI = forms.in_whole_tiles(h_TI)\n", "", "test_decode"),
    Fault("products.py", "fits = first.form.stays_float32 or", "fits = True or", "test_decode"),
    Fault("products.py", "and len({layer.weight.dtype for layer in dense}) == 1", "", "test_decode"),
    Fault("layer.py", ".to(first.input_norm_D.dtype)", "", "test_decode"),
    Fault("artifacts.py", "{tensor.dtype} {list(tensor.shape)}", "{list(tensor.shape)}", "test_artifacts"),
    Fault("products.py", "layer.arranged.outputs_of_a_block for layer", "8 for layer", "test_decode"),
    Fault("layer.py", "head_K >= heads + kv_heads", "head_K >= heads", "test_decode"),
    Fault("layer.py", "place_E < size // 2, -sin_1E, sin_1E", "place_E < size // 2, sin_1E, -sin_1E", "test_decode"),
    Fault("layer.py", "(row_B1 + rows * is_value_K) * room", "(row_B1 + is_value_K) * room", "test_decode"),
    Fault("layer.py", "following.input_norm_D", "layer.post_norm_D", "test_decode"),
    Fault("decode.py", "following = (*self.layers[1:], self.layers[-1])", "following = self.layers", "test_decode"),
    Fault("kernel.py", "joined = joined_words(layers)", "joined = joined_words(layers[::-1])", "test_kernel"),
    Fault("model.py", "(key_M > query_L1 - (window or total))", "(key_M >= query_L1 - (window or total))",
          "test_model"),
    Fault("model.py", "key_M <= query_L1", "key_M < query_L1 + 2", "test_model"),
    Fault("model.py", "key_M >= padding_B[:, None, None]", "key_M >= 0 * padding_B[:, None, None]", "test_model"),
    Fault("model.py", "mask.repeat(1, 1, heads // shared, 1)", "mask.repeat_interleave(heads // shared, 2)",
          "test_model"),
    Fault("model.py", "rows = None if mask is None else mask", "rows = None if True else mask", "test_model"),
    Fault("model.py", "y[..., first : first + step] = linear(", "y[..., :step] = linear(", "test_model"),
    Fault("model.py", "dimensions == 2 and stored in HALVES and", "stored in HALVES and", "test_model"),
    Fault("model.py", "(tokens_BL).to(self.norm.weight.dtype)", "(tokens_BL)", "test_model"),
    Fault("model.py", "return y if bias_O is None else y + bias_O", "return y", "test_model"),
    Fault("checkpoint.py", "loaded_dtype(tensor.dtype, tensor.dim(), dtype)", "dtype", "test_checkpoint"),
    Fault("footprint.py", "loaded_dtype(tensor.dtype, tensor.dim(), dtype).itemsize", "dtype.itemsize", "test_plan"),
    Fault("model.py", "cache.length += tokens_BL.shape[1]", "cache.length += 1", "test_model"),
    Fault("model.py", "torch.arange(past, past + new, device=like.device)", "torch.arange(new, device=like.device)",
          "test_model"),
    Fault("model.py", "rms_norm(x, weight.shape, weight, eps)", "rms_norm(x, weight.shape, weight, 1e-3)",
          "test_model"),
    Fault("model.py", "if config.qk_norm else nn.Identity()\n        self.k_norm",
          "if False else nn.Identity()\n        self.k_norm",
          "test_model"),
    Fault("model.py", "layer >= first else None", "layer > first else None", "test_model"),
    Fault("model.py", 'or config.get("use_sliding_window", False)', "or True", "test_model"),
    Fault("model.py", "silu(gate_BLF) * up_BLF", "silu(up_BLF) * gate_BLF",
          "test_model"),
    Fault("attend.py", "& (key_M >= first_B[:, None])", "", "test_decode"),
    Fault("attend.py", "position_1 // BLOCK + 1 - first_block_B", "position_1 // BLOCK - first_block_B", "test_decode"),
    Fault("attend.py", "first_block_B[:, None] + torch.arange", "torch.arange", "test_decode"),
    Fault("attend.py", "& (position >= blocks.first_B[row])", "", "test_decode"),
    Fault("attend.py", "torch.maximum(padding_B, position_1 + 1 - window)", "padding_B", "test_decode"),
    Fault("attend.py", "rows_B1 * room + pad(first_B, (0, 1))", "rows_B1 * room", "test_decode"),
    Fault("layer.py", "* room + position_1", "* room", "test_decode"),
    Fault("layer.py", "norms = (attn.q_norm.weight.data, attn.k_norm", "norms = (attn.k_norm.weight.data, attn.q_norm",
          "test_decode"),
    Fault("rope.py", "torch.cat((-second, first), dim=-1)", "torch.cat((second, -first), dim=-1)", "test_model"),
    Fault("rope.py", "rope.factor * ratio - (rope.factor - 1)", "rope.factor * ratio", "test_model"),
    Fault("rope.py", "keep * plain + (1 - keep) * plain / rope.factor", "plain / rope.factor", "test_model"),
    Fault("rope.py", "low, high = math.floor(low), math.ceil(high)", "pass", "test_model"),
    Fault("rope.py", "return mscale(1.0)", "return 1.0", "test_model"),
    Fault("rope.py", "original or longest", "longest", "test_model"),
    Fault("rope.py", "if kind not in INVERSE_FREQUENCIES:", "if False:", "test_model"),
    Fault("layouts.py", "return s[1] == q[1] * CODES_PER_WORD and", "return", "test_refusals"),
    Fault("layouts.py", "if group_size not in {inputs if size == -1", "if 0 in {inputs if size == -1", "test_refusals"),
    Fault("layouts.py", "if part in FOREIGN_PARTS:", "if False:", "test_refusals"),
    Fault("layouts.py", 'if part == "weight" and info.dtype in FOREIGN_DTYPES:', "if False:", "test_refusals"),
    Fault("layouts.py", "if config and config.layout not in (layout, None):", "if False:", "test_refusals"),
    Fault("layouts.py", "if zeros is None and not (config and config.symmetric):", "if False:", "test_refusals"),
    Fault("layouts.py", 'if parts["qweight"].dtype == torch.int16:', "if False:", "test_refusals"),
    Fault("layouts.py", "if (linear.in_features, linear.out_features) != (padded, outputs):", "if False:",
          "test_refusals"),
    Fault("layouts.py", "if config and config.symmetric is False and zeros is None:", "if False:", "test_refusals"),
    Fault("layouts.py", "return -(-codes // CODES_PER_WORD)", "return codes // CODES_PER_WORD", "test_convert"),
    Fault("layouts.py", "return linear._replace(in_features=inputs,", "return linear._replace(", "test_checkpoint"),
    Fault("layouts.py", "for size in sizes if inputs % size == 0 and", "for size in sizes if", "test_refusals"),
    Fault("quant_config.py", "if bits != BITS:", "if False:", "test_refusals"),
    Fault("quant_config.py", "if block.get(key) not in (plain, None):", "if False:", "test_refusals"),
    Fault("quant_config.py", 'if value and key[:2] != "-:"]', "if False]", "test_refusals"),
    Fault("quant_config.py", "if word in REFUSED_VERSIONS:", "if False:", "test_refusals"),
    Fault("quant_config.py", "if value not in values:", "if False:", "test_refusals"),
    Fault("quant_config.py", "sizes.add(-1 if channel else", "sizes.add(", "test_checkpoint"),
    Fault("quant_config.py", "str(block[key]).lower()", "str(block[key])", "test_checkpoint"),
    Fault("quant_config.py", 'for name in dense_linears if name != "lm_head"]', "for name in dense_linears]",
          "test_convert"),
    Fault("hub.py", "if head == LFS_POINTER:", "if False:", "test_refusals"),
    Fault("hub.py", "if len(made) < len(pairs):", "if False:", "test_refusals"),
    Fault("hub.py", "if info.id != self.repo_id:", "if False:", "test_hub"),
    Fault("hub.py", "self.online = not local_files_only and self._list(token)", "self.online = self._list(token)",
          "test_hub"),
    Fault("shards.py", "self._file.seek(size)", "pass", "test_shards"),
    Fault("shards.py", 'b" " * (-len(text) % 8)', 'b""', "test_shards"),
    Fault("shards.py", "same = file.read(len(shard.header)) == shard.header", "same = True", "test_shards"),
    Fault("shards.py", "(shard.file + PARTIAL)", "shard.file", "test_shards"),
    Fault("shards.py", "if given != planned:", "if False:", "test_shards"),
    Fault("shards.py", "if self.done in self._starts:", "if self.done + 1 in self._starts:", "test_shards"),
    Fault("shards.py", "if parts[-1] and spec.nbytes > room:", "if parts[-1] and spec.nbytes >= room:", "test_shards"),
    Fault("checkpoint.py", "tensor = file.get_tensor(info.key)",
          "tensor = vars(self.files).setdefault(info.key, file.get_tensor(info.key))", "test_checkpoint"),
    Fault("checkpoint.py", "torch.device(\"meta\"), _NoValues():", "torch.device(\"meta\"):", "test_checkpoint"),
    Fault("checkpoint.py", "if not scales.isfinite().all():", "if False:", "test_checkpoint"),
    Fault("checkpoint.py", "shape.tolist() != [*self.linears[name]][::-1]", "False", "test_refusals"),
    Fault("checkpoint.py", "if any(problems.values()):", "if False:", "test_refusals"),
    Fault("checkpoint.py", "if Path(shard).name != shard or", "if", "test_refusals"),
    Fault("checkpoint.py", "if absent := sorted(promised - header.keys()):", "if False:", "test_refusals"),
    Fault("checkpoint.py", "return not torch.equal(checkpoint.read(head), checkpoint.read(embedding))", "return False",
          "test_checkpoint"),
    Fault("checkpoint.py", "return tensor.view(torch.int32) if tensor.dtype == torch.uint32", "return tensor if True",
          "test_checkpoint"),
    Fault("checkpoint.py", "torch.full_like(scales, SYMMETRIC_ZERO, dtype=torch.uint8)",
          "torch.zeros_like(scales, dtype=torch.uint8)",
          "test_checkpoint"),
    Fault("checkpoint.py", "if name in tensors:", "if False:", "test_refusals"),
    Fault("checkpoint.py", 'for leaf in ("weight", "bias"):', 'for leaf in ("weight",):', "test_checkpoint"),
    Fault("convert.py", "symmetric = all(", "symmetric = any(", "test_convert"),
    Fault("convert.py", 'yield name, "packed"\n        for leaf in ("weight", "bias"):',
          'yield name, "packed"\n        for leaf in ("weight",):', "test_convert"),
    Fault("convert.py", 'if key != "compression_config"}', "if key not in CONFIG_KEYS}", "test_convert"),
    Fault("convert.py", "if len(sizes) == 1:", "if sizes:", "test_convert"),
    Fault("footprint.py", "min(codes, CODES_PER_EXPANDED_SLICE)", "codes", "test_footprint"),
    Fault("footprint.py", "masks = (1 + dtype.itemsize)", "masks = dtype.itemsize", "test_footprint"),
    Fault("footprint.py", "down = (4 * width + 3 * inner)", "down = (4 * width + 2 * inner)", "test_footprint"),
    Fault("completion.py", "max(1, prefill_chunk // batch)", "prefill_chunk", "test_completion"),
    Fault("footprint.py", "return 2 * config.num_hidden_layers", "return config.num_hidden_layers", "test_plan"),
    Fault("footprint.py", "if total <= free else (low, middle - 1)", "if total < 2 * free else (low, middle - 1)",
          "test_plan"),
    Fault("footprint.py", "sum(dense) + sum(packed_bytes(layer, device) for layer in layers)", "sum(dense)",
          "test_plan"),
    Fault("packing.py", "if not scales_OG.isfinite().all():", "if False:", "test_packing"),
    Fault("rounding.py", ".clamp_(-zeros_R1, TOP_CODE - zeros_R1)", ".clamp_(-zeros_R1, TOP_CODE)", "test_awq"),
    Fault("rounding.py", ", alpha=2)", ", alpha=1)", "test_awq"),
    Fault("rounding.py", "mul_(column_reciprocals_GS)", "mul_(columns_GS)", "test_awq"),
    Fault("awq.py", "[: here.start, here] = statistics.moments_II[here, : here.start].t()",
          "[: here.start, here] *= 0.5", "test_awq"),
    Fault("fused.py", "weights >= COMPILING_PAYS", "True", "test_fused"),
    Fault("fused.py", "dynamic=True", "dynamic=False", "test_fused"),
    Fault("convert.py", "BYTES_A_WEIGHT * largest", "largest", "test_convert"),
    Fault("awq.py", "self.moments_II.diagonal().isfinite().all()", "True", "test_awq"),
    Fault("rounding.py", "ends_KR2 = candidates(", "assert weight_RS.amax() > 0\n            ends_KR2 = candidates(",
          "test_quantize_costs"),
    Fault("background.py", "if kind is None:", "if False:", "test_quantize_costs"),
    Fault("memory.py", '"one block": block,', '"one block": block // 2,', "test_quantize_costs"),
    Fault("plan.py", 'min(degree, kv_heads) if part in ("k_proj", "v_proj") else degree', "degree", "test_plan"),
    Fault("plan.py", "1 if whole_rows else linear.group_size", "1", "test_plan"),
    Fault("plan.py", "if heads % degree or", "if", "test_plan"),
    Fault("reading.py", "(8 + length + start,", "(length + start,", "test_checkpoint"),
    Fault("reading.py", "file.seek(start)", "file.seek(start + 1)", "test_checkpoint"),
    Fault("artifacts.py", 'if not changed and seal["decides"] == decides:', "if True:", "test_artifacts"),
    Fault("artifacts.py", '"rows": str(len(step.ids_B)),', "", "test_artifacts"),
    Fault("decode.py", "spare._make_room(batch, SPARE_ROOM)", "", "test_artifacts"),
    Fault("completion.py", "if self.is_warm or not self.streams:", "if not self.streams:", "test_artifacts"),
    Fault("completion.py", "if self.is_warm or not self.streams:", "if self.is_warm:", "test_artifacts"),
    Fault("completion.py", "kernel.compiler = self._thread", "pass", "test_artifacts"),
    Fault("plan.py", 'if name == "lm_head.weight" and model_config.tie_word_embeddings:', "if False:", "test_plan"),
]  # fmt: skip


def first_failure(copy: Path, test: str) -> str:
    """The name of the first test that fails, or nothing."""
    command = [sys.executable, "-m", "pytest", f"tests/{test}.py", "-x", "--no-header", "-p", "no:cacheprovider"]
    environment = os.environ | {"PYTHONPATH": str(copy), "OMP_NUM_THREADS": "1"}
    run = subprocess.run(command, cwd=copy, capture_output=True, text=True, env=environment, check=False)
    found = re.search(r"^(?:FAILED|ERROR) tests/\S+?(?:::(\S+)|$)", run.stdout, re.MULTILINE)
    return "" if run.returncode == 0 else (found.group(1) or "import" if found else "crash")


def main() -> int:
    chosen = [fault for fault in FAULTS if not sys.argv[1:] or fault.file in sys.argv[1:]]
    missed = 0
    for fault in chosen:
        with tempfile.TemporaryDirectory() as folder:
            copy = Path(folder)
            shutil.copytree(ROOT / "miniawq", copy / "miniawq", ignore=shutil.ignore_patterns("__pycache__"))
            (copy / "tests").symlink_to(ROOT / "tests")
            shutil.copy(ROOT / "pyproject.toml", copy)
            target = copy / "miniawq" / fault.file
            text = target.read_text()
            if text.count(fault.was) != 1:
                print(f"{fault.file}: the text to change stands there {text.count(fault.was)} times: {fault.was!r}")
                missed += 1
                continue
            target.write_text(text.replace(fault.was, fault.becomes))
            caught = first_failure(copy, fault.test)
        missed += not caught
        print(
            f"{fault.file:12} {' '.join(fault.becomes.split())[:60] or 'nothing':60} {caught or 'NOT CAUGHT'}",
            flush=True,
        )
    print(f"{len(chosen) - missed} of {len(chosen)} faults caught")
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
