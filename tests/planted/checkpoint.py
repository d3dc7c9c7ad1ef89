"""Directories, configs, layouts, reading, writing, loading."""

from tests.planted.fault import Fault

OPENING, REFUSALS, SHARDS, HUB, HOSTILE = (
    f"checkpoint/test_{name}" for name in ("opening", "refusals", "shards", "hub", "hostile")
)
PUBLISHING, CONVERT = "quantize/test_publishing", "commands/test_convert"
FUZZ = "reliability/test_fuzz"
FAULTS = [
    # config.json
    Fault("checkpoint/config.py", r"layer >= first else", "layer > first else", "test_model"),
    Fault("checkpoint/config.py", r'and not config\.get\("use_sliding_window", False\)', "and False", "test_model"),
    Fault("checkpoint/config.py", r"return mscale\(1\.0\)", "return 1.0", "test_model"),
    Fault(
        "checkpoint/config.py", r'(config\["original_max_position_embeddings"\]) or longest', r"longest", "test_model"
    ),
    Fault(
        "checkpoint/config.py", r"window is not None for window in windows", "True for window in windows", "test_model"
    ),
    Fault("checkpoint/config.py", r"\[bool\(number\) for number in listed\]", "[True] * layers", "test_model"),
    Fault("checkpoint/config.py", r"math\.sqrt\(1 \+ math\.log\(factor\) .*\) if", "1.0 if", "test_model"),
    Fault(
        "checkpoint/families.py",
        r'UNSCALED = \{"attention_multiplier": 1\.0\}',
        "UNSCALED: dict[str, float] = {}",
        "test_model",
    ),
    Fault("checkpoint/config.py", r'theta \* given\["alpha"\] \*\* .*$', "theta", "test_model"),
    Fault("checkpoint/config.py", r"\*\*kept, (\"architectures\")", r"\1", "test_model"),
    Fault("checkpoint/config.py", r"if kind not in INVERSE_FREQUENCIES:", "if False:", "test_model"),
    Fault(
        "checkpoint/values.py", r" and not isinstance\(value, bool\) and self\.low <= value <= self\.high", "", HOSTILE
    ),
    Fault("checkpoint/values.py", r"if not isinstance\(given, Mapping\):", "if False:", HOSTILE),
    Fault("checkpoint/config.py", r"rope\.low_freq_factor >= rope", "rope.low_freq_factor > rope", HOSTILE),
    Fault("checkpoint/config.py", r"(is None) and \(more := .*\):$", r"\1 and (more := []):", HOSTILE),
    Fault("checkpoint/config.py", r"for value in given\.values\(\)\):", "for value in nested):", HOSTILE),
    # Layouts.
    Fault("checkpoint/layouts.py", r"1 if group_size >= 128", "1 if group_size >= 64", "test_packing"),
    Fault("checkpoint/layouts.py", r"\.t\(\)\[:outputs\]", ".t()", "test_packing"),
    Fault(
        "checkpoint/layouts.py", r"-\(-codes // CODES_PER_WORD\)", "codes // CODES_PER_WORD", "commands/test_convert"
    ),
    Fault("checkpoint/detection.py", r"s\[1\] == q\[1\] \* CODES_PER_WORD and", "", REFUSALS),
    Fault("checkpoint/detection.py", r"if group_size not in \{", "if 0 in {", REFUSALS),
    Fault("checkpoint/detection.py", r"if part in FOREIGN_PARTS:", "if False:", REFUSALS),
    Fault("checkpoint/detection.py", r'if part == "weight" and info\.dtype in FOREIGN_DTYPES:', "if False:", REFUSALS),
    Fault("checkpoint/detection.py", r"if config and config\.layout not in \(layout, None\):", "if False:", REFUSALS),
    Fault(
        "checkpoint/detection.py", r"if zeros is None and not \(config and config\.symmetric\):", "if False:", REFUSALS
    ),
    Fault("checkpoint/detection.py", r'if parts\["qweight"\]\.dtype == torch\.int16:', "if False:", REFUSALS),
    Fault(
        "checkpoint/detection.py", r"if \(linear\.in_features, linear\.out_features\) != .*:$", "if False:", REFUSALS
    ),
    Fault(
        "checkpoint/detection.py", r"if config and config\.symmetric is False and zeros is None:", "if False:", REFUSALS
    ),
    Fault("checkpoint/detection.py", r"(linear\._replace\()in_features=inputs, ", r"\1", OPENING),
    Fault("checkpoint/detection.py", r"if inputs % size == 0 and", "if", REFUSALS),
    # What the config says about the quantization.
    Fault("checkpoint/quant_config.py", r"if bits != BITS:", "if False:", REFUSALS),
    Fault("checkpoint/quant_config.py", r"if block\.get\(key\) not in \(plain, None\):", "if False:", REFUSALS),
    Fault("checkpoint/quant_config.py", r'if value and key\[:2\] != "-:"\]', "if False]", REFUSALS),
    Fault("checkpoint/quant_config.py", r"if word in REFUSED_VERSIONS:", "if False:", REFUSALS),
    Fault("checkpoint/quant_config.py", r"if value not in values:", "if False:", REFUSALS),
    Fault("checkpoint/quant_config.py", r"sizes\.add\(-1 if channel else", "sizes.add(", OPENING),
    Fault("checkpoint/quant_config.py", r"str\(block\[key\]\)\.lower\(\)", "str(block[key])", OPENING),
    Fault("checkpoint/quant_config.py", r' if name != "lm_head"\]', "]", "commands/test_convert"),
    Fault("checkpoint/quant_config.py", r'block \| \{"lm_head": True\}', "block", "quantize/test_head"),
    Fault("checkpoint/quant_config.py", r'else \["Linear", "lm_head"\]', 'else ["Linear"]', "quantize/test_head"),
    # Files.
    Fault("checkpoint/strict.py", r"if head == LFS_POINTER:", "if False:", REFUSALS),
    Fault("checkpoint/strict.py", r"if len\(made\) < len\(pairs\):", "if False:", REFUSALS),
    Fault("checkpoint/strict.py", r"first != end or last < first", "last < first", HOSTILE),
    Fault("checkpoint/strict.py", r"if values \+ end != .*:$", "if False:", HOSTILE),
    Fault("checkpoint/strict.py", r"isinstance\(dtype, str\) and all", "all", HOSTILE),
    Fault(
        "checkpoint/strict.py",
        r"        return header_unmapped\(path\)",
        "        raise",
        "checkpoint/test_opening",
    ),
    Fault("checkpoint/hub.py", r"if info\.id != self\.repo_id:", "if False:", HUB),
    Fault("checkpoint/hub.py", r"(self\.online = )not local_files_only and ", r"\1", HUB),
    Fault("checkpoint/headers.py", r"if Path\(shard\)\.name != shard or", "if", REFUSALS),
    Fault("checkpoint/headers.py", r"if absent := .*:$", "if False:", REFUSALS),
    Fault("checkpoint/headers.py", r"if name in tensors:", "if False:", REFUSALS),
    Fault("checkpoint/strict.py", r"if max\(size, len\(content\)\) > limit:", "if False:", HOSTILE),
    Fault("checkpoint/strict.py", r"if length > \(limit := .*\):$", "if False:", HOSTILE),
    Fault("checkpoint/strict.py", r"parse_constant=finite, parse_float=finite", "parse_constant=finite", HOSTILE),
    Fault("checkpoint/strict.py", r'if b"\\\\u" in content or .*:$', "if False:", HOSTILE),
    Fault("checkpoint/headers.py", r"if max\(shape, default=0\) > LARGEST:", "if False:", HOSTILE),
    Fault("checkpoint/headers.py", r"if dtype not in STORED_DTYPES:", "if False:", HOSTILE),
    Fault("checkpoint/headers.py", r"not isinstance\(weight_map, dict\) or ", "", FUZZ),
    Fault("checkpoint/values.py", r"isinstance\(value, list\) and all\(isin", "all(isin", FUZZ),
    Fault("checkpoint/strict.py", r"^    if level:", "    if False:", HOSTILE),
    Fault("checkpoint/hub.py", r"if name in self\.stamps and", "if False and", HOSTILE),
    # Reading.
    Fault("checkpoint/detection.py", r'if parts\["scales"\]\.dtype not in SCALES:', "if False:", HOSTILE),
    Fault("checkpoint/detection.py", r"if linear\.in_features != scales.*:$", "if False:", HOSTILE),
    Fault("checkpoint/opening.py", r"if held < config\.num_hidden_layers:", "if False:", HOSTILE),
    Fault("checkpoint/opening.py", r" if tensors\[name\]\.dtype not in DENSE$", " if False", HOSTILE),
    Fault("checkpoint/opening.py", r"if self\.mapped and", "if", HOSTILE),
    Fault("checkpoint/reading.py", r"low\.isfinite\(\) & high", "low", HOSTILE),
    Fault(
        "checkpoint/opening.py",
        r"(tensor = )(reading\.map_tensor\(\*place\))",
        r"\1vars(self.files).setdefault(info.key, \2)",
        OPENING,
    ),
    Fault("checkpoint/opening.py", r'(torch\.device\("meta"\)), _NoValues\(\):', r"\1:", OPENING),
    Fault("checkpoint/opening.py", r"if not finite:", "if False:", OPENING),
    Fault("checkpoint/opening.py", r"shape\.tolist\(\) != \[.*:$", "False:", REFUSALS),
    Fault("checkpoint/opening.py", r"if any\(problems\.values\(\)\):", "if False:", REFUSALS),
    Fault(
        "checkpoint/opening.py", r"if torch\.equal\(self\.read\(HEAD\), self\.read\(EMBEDDING\)\):", "if True:", OPENING
    ),
    Fault("checkpoint/opening.py", r"if tensor\.dtype == torch\.uint32 else", "if False else", OPENING),
    Fault("checkpoint/opening.py", r"torch\.full_like\((.*), SYMMETRIC_ZERO, ", r"torch.zeros_like(\1, ", OPENING),
    Fault("checkpoint/reading.py", r"\(values \+ start,", "(values - 8 + start,", OPENING),
    Fault("checkpoint/reading.py", r"^@lru_cache\(maxsize=64\)\n(def _places)", r"@lru_cache(maxsize=0)\n\1", OPENING),
    Fault("checkpoint/reading.py", r"set_\(storage\)\[start:\]", "set_(storage)[:size]", OPENING),
    Fault("checkpoint/reading.py", r" or start % dtype\.itemsize:", ":", OPENING),
    Fault("checkpoint/reading.py", r"file\.seek\(start\)", "file.seek(start + 1)", OPENING),
    # Loading.
    Fault("checkpoint/loading.py", r'for leaf in \("weight", "bias"\):', 'for leaf in ("weight",):', OPENING),
    Fault("checkpoint/loading.py", r"tensor\.to\(loaded_dtype\(.*\)\)$", "tensor.to(dtype)", OPENING),
    Fault("checkpoint/loading.py", r"dimensions == 2 and (stored in HALVES)", r"\1", "test_model"),
    Fault(
        "checkpoint/loading.py",
        r"self\.packed = None\n        super\(\)\._load",
        "super()._load",
        "test_model",
    ),
    Fault("checkpoint/loading.py", r" or not 0 < rows <= MOST_ROWS_PACKED", "", "test_model"),
    Fault("checkpoint/loading.py", r"y\[\.\.\., first : first \+ step\] =", "y[..., :step] =", "test_model"),
    Fault("checkpoint/loading.py", r"return y if bias_O is None else y \+ bias_O", "return y", "test_model"),
    Fault("checkpoint/loading.py", r"and not is_finite\(converted\):", "and False:", HOSTILE),
    # Writing.
    Fault("checkpoint/shards.py", r"self\._file\.seek\(size\)", "pass", SHARDS),
    Fault("checkpoint/shards.py", r'b" " \* \(-len\(text\) % 8\)', 'b""', SHARDS),
    Fault("checkpoint/shards.py", r"same = file\.read\(.*$", "same = True", SHARDS),
    Fault("checkpoint/shards.py", r"\(shard\.file \+ PARTIAL\)", "shard.file", SHARDS),
    Fault("checkpoint/shards.py", r"if given != planned:", "if False:", SHARDS),
    Fault("checkpoint/shards.py", r"if self\.done in self\._starts:", "if self.done + 1 in self._starts:", SHARDS),
    Fault(
        "checkpoint/shards.py",
        r"if parts\[-1\] and spec\.nbytes > room:",
        "if parts[-1] and spec.nbytes >= room:",
        SHARDS,
    ),
    Fault("checkpoint/publishing.py", r"-\{uuid\.uuid4\(\)\.hex\[:8\]\}", "", SHARDS),
    Fault("checkpoint/publishing.py", r"^(    except BaseException:\n) +_remove_whole\(partial.*\n", r"\1", SHARDS),
    Fault("checkpoint/publishing.py", r"key=lambda path: \(path\.name == LAST, ", "key=lambda path: (", PUBLISHING),
    Fault("checkpoint/publishing.py", r"key=lambda name: name != LAST", "key=lambda name: name == LAST", PUBLISHING),
    Fault(
        "checkpoint/shards.py", r"^( +)with suppress\(OSError\):(\n +self\._file\.close)", r"\1if True:\2", PUBLISHING
    ),
    Fault(
        "checkpoint/publishing.py",
        r"^    except BaseException:\n +_remove_empty.*\n",
        "    except AssertionError:\n",
        PUBLISHING,
    ),
    Fault("checkpoint/shards.py", r"mkdir\(exist_ok=True\)", "mkdir(parents=True, exist_ok=True)", PUBLISHING),
    Fault("checkpoint/publishing.py", r"^        _remove_abandoned\(destination\)\n", "", SHARDS),
    Fault("checkpoint/publishing.py", r"^ +lock\.acquire\(\)\n( +log)", r"\1", SHARDS),
    Fault("checkpoint/publishing.py", r"^    _remove_lock\(lock\)\n", "", SHARDS),
    Fault("checkpoint/publishing.py", r"^ +_remove_whole\(found.*\n", "", SHARDS),
    Fault("checkpoint/unchanged.py", r"or _sha256\(directory / name\) != digest", "", PUBLISHING),
    Fault("checkpoint/publishing.py", r"^        lock\.acquire\(\)$", "        pass", "quantize/test_job"),
]
