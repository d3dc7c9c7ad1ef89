"""The compiled decode step, attention of the new token, caches, sampling, memory of running."""

from tests.planted.fault import Fault

STEP, ARTIFACTS, PLAN = "engine/test_step", "compiled/test_artifacts", "commands/test_plan"
COMPLETION, SAMPLING = "engine/test_completion", "engine/test_sampling"
DELIVERY, CACHED = "engine/test_delivery", "engine/test_cached_text"
GUESSES = "engine/test_speculation"
READER = "engine/test_reader"
BATCH, MANY = "engine/test_batch", "commands/test_many"
FAULTS = [
    # Narrow kv caches.
    Fault(
        "engine/layer.py",
        r"index_put_\(places, narrowed\((.*), cache_UJE\.dtype\)\)",
        r"index_put_(places, (\1).to(cache_UJE.dtype))",
        STEP,
    ),
    Fault(
        "engine/layer.py",
        r"written\(made_BAE\[:, :heads\]\)",
        "written(made_BAE[:, :heads].to(cache_UJE.dtype).to(made_BAE.dtype))",
        STEP,
    ),
    Fault("engine/layer.py", r"slot_BA\[:, first:\]", "slot_BA[:, : len(head_A) - first]", STEP),
    Fault("engine/rows.py", r"transpose\(1, 2\)\.to\(new_BJLE\.dtype\)", "transpose(1, 2)", BATCH),
    Fault("engine/memory.py", r"config\.kv_cache_dtype or dtype", "dtype", PLAN),
    # Rows.
    Fault(
        "engine/rows.py", r"torch\.tensor\(lengths, device", "torch.tensor([max(lengths)] * len(lengths), device", BATCH
    ),
    Fault("engine/rows.py", r"max\(lengths\) \+ 1, ", "max(lengths), ", BATCH),
    Fault("engine/rows.py", r"cache\.length = past", "cache.length = 0", BATCH),
    Fault("engine/rows.py", r"\(len\(ids\) - 1\) % PREFILL_CHUNK", "-1", BATCH),
    Fault("engine/rows.py", r"left_out\), max\(", "left_out), min(", BATCH),
    Fault("engine/rows.py", r"kept_NBMJE\[:, 1:, : len\(ids\)\]", "kept_NBMJE[:, 1:2, : len(ids)]", BATCH),
    Fault("engine/rows.py", r"kept_NBMJE\[:, row, past:\] = 0", "pass", BATCH),
    Fault("engine/rows.py", r", value=min\(lengths\)", "", BATCH),
    Fault(
        "engine/batch.py", r"self\.rows\.count\(None\) \* self\.rows_for_one_free >= len\(self\.rows\)", "True", BATCH
    ),
    Fault("engine/batch.py", r"longest \* len\(lengths\) > PREFILL_CHUNK", "False", BATCH),
    Fault("engine/batch.py", r"len\(ids\) - 1 for ids in prompts", "len(ids) for ids in prompts", BATCH),
    Fault("engine/batch.py", r"self\.generators\[rows\]\)", "self.generators[0])", BATCH),
    Fault("engine/batch.py", r"kept\[row\] = new\[0\]", "pass", BATCH),
    Fault("engine/batch.py", r"^( +)self\._close_ranks\(\)\n( +if)", r"\1pass\n\2", BATCH),
    Fault("engine/batch.py", r"self\.generators\[into\], self.*$", "pass", BATCH),
    Fault("engine/batch.py", r"part_BV\[into\] = part_BV\[row\]", "pass", BATCH),
    Fault("engine/rows.py", r"kept_NBMJE\[:, into\] = kept_NBMJE\[:, row\]", "pass", BATCH),
    Fault("engine/sampling.py", r"^( +)row_K\.exponential_\(generator=own\)", r"\1row_K.exponential_()", BATCH),
    Fault("engine/memory.py", r"\.total <= free$", ".total < free", MANY),
    Fault("engine/batch.py", r"tokenizer\.stream\(request\.prompt_ids\) if stop else None", "None", BATCH),
    Fault(
        "engine/batch.py",
        r"^( +)try:\n +(logits_BV = self\._next_logits\(\))\n +finally:",
        r"\1\2\n\1if True:",
        MANY,
    ),
    Fault("engine/batch.py", r"endings \+= self\._begin_some", "endings = self._begin_some", BATCH),
    Fault("engine/completion.py", r"if not self\._is_end\(token_id\)", "if self._is_end(token_id) or True", BATCH),
    Fault("engine/completion.py", r"self\.stop_reason = token_id$", "pass", COMPLETION),
    # Prompts read by compiled and recorded functions.
    Fault("engine/reader.py", r"cache\.length == 0 and cache\.padding_B is None", "cache.length == 0", READER),
    Fault("engine/reader.py", r"cache\.length == 0 and (cache\.padding_B is None)", r"\1", READER),
    Fault("engine/reader.py", r"rows \* filled <= PREFILL_CHUNK", "True", READER),
    Fault("engine/reader.py", r"and length > 1 and", "and", READER),
    Fault("engine/reader.py", r"if self\.is_ready and rows \* length >= PREFILL_CHUNK", "if False", READER),
    Fault("engine/reader.py", r"made\.values_NBMJE\)\):", "made.keys_NBMJE)):", READER),
    Fault("engine/reader.py", r"kept_NBMJE\[:, :, :length\] = new", "kept_NBMJE[:, :, 1:length] = new", READER),
    Fault("engine/reader.py", r"cache\.length = length$", "cache.length = filled", READER),
    Fault("engine/reader.py", r"hidden_BLD\[:, :length\]", "hidden_BLD", READER),
    Fault("engine/reader.py", r"self\.recordings\.pop\(key, None\)", "self.recordings.get(key)", READER),
    Fault("engine/reader.py", r"> MOST_RECORDINGS", "> MOST_RECORDINGS + 1", READER),
    Fault("engine/reader.py", r" and self\._has_room\(rows, filled\)", "", READER),
    Fault("engine/reader.py", r"if is_met and recording is None", "if recording is None", READER),
    Fault("engine/reader.py", r"rows, filled, cache\.max_seq_len  #.*$", "filled, rows, cache.max_seq_len", READER),
    Fault("engine/reader.py", r"ropes_T\[kind\]", "ropes_T[config.rope]", READER),
    Fault("engine/reader.py", r"masks\[window\], config", "masks[None], config", READER),
    Fault("engine/reader.py", r"\(window or end\) >= end", "True", READER),
    Fault("engine/reader.py", r"if padding_B is None:$", "if True:", READER),
    Fault("engine/reader.py", r"attn_mask=seen", "is_causal=True", READER),
    Fault("engine/reader.py", r'config\.qk_norm == "turned heads"', "False", READER),
    Fault("engine/reader.py", r"norm_k\(k_TJE\), rope_T\)", "k_TJE, rope_T)", READER),
    Fault("engine/reader.py", r"rope_T\[:2\]", "rope_T", READER),
    Fault("engine/reader.py", r"gain_of\(after\), gain", "gain_of(before_mlp), gain", READER),
    Fault("engine/reader.py", r"for block in blocks\[1:\]", "for block in blocks[:-1]", READER),
    Fault("engine/reader.py", r'return "" if is_near else', 'return "" if True else', READER),
    # Guesses.
    Fault("engine/layer.py", r"row_B1 if texts == rows else torch\.zeros_like\(row_B1\)", "row_B1", GUESSES),
    Fault("engine/step.py", r'( == "cuda") or not self\.ends_together', r"\1", GUESSES),
    Fault("engine/step.py", r"torch\.arange\(length, length \+ rows\)", "torch.full((rows,), length)", GUESSES),
    Fault("engine/step.py", r"\.clamp_max\(last\)\)", ")", GUESSES),
    Fault("engine/step.py", r"history = history\.after_each\(fed_B\)", "pass", GUESSES),
    Fault("engine/verifying.py", r"cache_UJE\[MOST_GUESSES \* of_a_row :\]", "cache_UJE", GUESSES),
    Fault("engine/verifying.py", r"self\.generator, self\.history", "self.generator, self.several.history", GUESSES),
    Fault("engine/start.py", r"self\.cache\.length = length$", "pass", GUESSES),
    Fault("engine/sampling.py", r"part_LV\[place:\]", "part_LV[place : place + 1]", GUESSES),
    Fault("engine/speculation.py", r"= len\(self\.ids\)$", "= len(self.ids) - 1", GUESSES),
    Fault("engine/speculation.py", r"self\.credit \+ right - \(PRICE.*$", "CREDIT)", GUESSES),
    Fault("engine/speculation.py", r"or self\.pause else", "else", GUESSES),
    Fault("engine/speculation.py", r"chosen_L\[right : right \+ 1\]", "chosen_L[-1:]", GUESSES),
    Fault("engine/speculation.py", r"and guesses\[0\] == token_id", "", GUESSES),
    Fault(
        "engine/speculation.py",
        r"keep\(step, \[token_id, \*chosen\[:right\]\]\)",
        "keep(step, chosen[:right])",
        GUESSES,
    ),
    Fault("engine/speculation.py", r"MOST_GUESSES \+ 1, count - 1", "MOST_GUESSES + 1, count", GUESSES),
    Fault("engine/speculation.py", r"step\.history\.extend", "len", GUESSES),
    # What fits.
    Fault("engine/fitting.py", r"length \+ max_tokens > limit", "length + max_tokens >= limit", COMPLETION),
    Fault("engine/fitting.py", r"int\(padding_B\.max\(\)\) < length", "int(padding_B.max()) <= length", COMPLETION),
    # What a cache holds.
    Fault("engine/cached_text.py", r"min\(length, ", "min(", CACHED),
    Fault("engine/cached_text.py", r"shape\[1\] - 1", "shape[1]", CACHED),
    Fault("engine/cached_text.py", r"len\(before\) == len\(self\.rows\)", "bool(before)", CACHED),
    Fault("engine/cached_text.py", r"pair\[0\] == pair\[1\]", "True", CACHED),
    Fault("engine/cached_text.py", r"self\.rows = \[\]$", "pass", CACHED),
    Fault("engine/start.py", r"self\.step = None  # its memory.*$", "pass", CACHED),
    Fault("engine/start.py", r"(self\.cached = )(CachedText\(\) if)", r"\1self.cached or \2", CACHED),
    # Ids.
    Fault("engine/delivery.py", r"if left and step\.returns_early", "if step.returns_early", DELIVERY),
    Fault("engine/delivery.py", r"if left and step\.returns_early", "if False", DELIVERY),
    Fault("engine/delivery.py", r"logits_BV = step\.logits_BV", "pass", COMPLETION),
    Fault("engine/completion.py", r"first, self\._told = self\._told", "first, self._told = 0", COMPLETION),
    Fault("engine/delivery.py", r"step\.step\(ids_B\) if left else ids_B", "step.step(ids_B)", DELIVERY),
    Fault("engine/step.py", r"return bool\(self\.graphs\)", "return True", DELIVERY),
    Fault("engine/start.py", r"(?s)(def returns_early.{,200}?)return False", r"\1return True", DELIVERY),
    Fault("engine/memory.py", r" or len\(weight_OI\) < FEWEST_OUTPUTS_PACKED", "", PLAN),
    Fault("engine/memory.py", r"(weight_OI\.nbytes) if loaded_dtype\(.*\) != dtype else 0", r"\1", PLAN),
    Fault("engine/start.py", r"with self\.surroundings\(\)(:\n +self\.logits_BV)", r"with nullcontext()\1", STEP),
    Fault("engine/start.py", r"isinstance\(layer\.prepacked, Table\)", "True", STEP),
    Fault("engine/start.py", r" and layer\.weight\.dtype != dtype", "", STEP),
    # Attention.
    Fault("engine/attend.py", r" & \(key_M >= first_B\[:, None\]\)", "", STEP),
    Fault("engine/attend.py", r"position_B // BLOCK \+ 1 - first_block_B", "position_B // BLOCK - first_block_B", STEP),
    Fault(
        "engine/attend.py",
        r"first_block_B\[:, None\] \+ torch\.arange",
        "0 * first_block_B[:, None] + torch.arange",
        STEP,
    ),
    Fault("engine/attend.py", r" & \(position >= blocks\.first_B\[row\]\)", "", STEP),
    Fault("engine/attend.py", r"torch\.maximum\(padding_B, position_B \+ 1 - window\)", "padding_B", STEP),
    # One token through a layer.
    Fault("engine/layer.py", r"prepared\)\[: layer\.rows\]", "prepared)", STEP),
    Fault("engine/layer.py", r"with_rows\(attended_BHE\.flatten\(1\), len\(h_BD\)\)", "attended_BHE.flatten(1)", STEP),
    Fault("engine/step.py", r"h_BD\[: len\(self\.ids_B\)\]", "h_BD", STEP),
    Fault("engine/layer.py", r"(embedding_VD\))\.to\(dtype\)", r"\1", STEP),
    Fault("engine/layer.py", r"own_B = \(position_B - padding_B\)", "own_B = (position_B)", STEP),
    Fault("engine/layer.py", r"scaled\(y_BD, config\.residual_multiplier\)", "y_BD", STEP),
    Fault("engine/layer.py", r"fed_BD, layer\.after_mlp_D", "fed_BD, layer.after_attention_D", STEP),
    Fault("engine/layer.py", r'normed_BAE if config\.qk_norm == "turned heads" else ', "", STEP),
    Fault("engine/layer.py", r"rms_norm\(part, part\.shape\[1:\]", "rms_norm(part, part.shape[2:]", STEP),
    Fault("engine/step.py", r"rope = ropes\[kind\]", "rope = ropes[config.rope]", STEP),
    Fault("engine/layer.py", r"head_A >= heads \+ kv_heads", "head_A >= heads", STEP),
    Fault(
        "engine/layer.py", r"torch\.where\(.*, turned_BAE \* growth\[0\], turned_BAE\)", "turned_BAE * growth[0]", STEP
    ),
    Fault("engine/layer.py", r"partners\(new_BAE, config\.rope\)", "new_BAE.roll(1, -1)", STEP),
    Fault("engine/layer.py", r"text_B1 \+ texts \* is_value_A\) \* room", "text_B1 + is_value_A) * room", STEP),
    Fault("engine/layer.py", r"\* room \+ position_B\.unsqueeze\(1\)", "* room", STEP),
    Fault("engine/layer.py", r"following\.before_attention_D", "layer.before_mlp_D", STEP),
    Fault("engine/layer.py", r"\.masked_fill\(best\.amax\(-1\)\.isnan\(\), NOT_A_NUMBER\)", "", STEP),
    Fault("engine/weights.py", r" and len\(\{weight\.dtype for weight in dense\}\) == 1", "", STEP),
    Fault("engine/weights.py", r"\{\(weight\.lanes, ", "{(8, ", STEP),
    Fault("engine/weights.py", r"\(queries, heads\), \(keys, kv_heads\)", "(keys, heads), (queries, kv_heads)", STEP),
    # The step.
    Fault(
        "engine/step.py", r"following = \(\*self\.layers\[1:\], self\.layers\[-1\]\)", "following = self.layers", STEP
    ),
    Fault("engine/step.py", r"difference > max\(.*\):", "False:", STEP),
    Fault("engine/step.py", r"^        spare\._compare_with_model\(\)", "        pass", STEP),
    Fault("engine/step.py", r"if length >= room:", "if length > room:", STEP),
    Fault("engine/step.py", r"^ +rows=str\(len\(self\.ids_B\)\),\n", "", ARTIFACTS),
    Fault("engine/step.py", r"^        spare\._make_room\(.*\)", "        pass", ARTIFACTS),
    Fault("engine/start.py", r"if self\.is_warm or not self\.streams:", "if not self.streams:", ARTIFACTS),
    Fault("engine/start.py", r"if self\.is_warm or not self\.streams:", "if self.is_warm:", ARTIFACTS),
    Fault("engine/start.py", r"WORKSHOP\.reserve\(self\._thread\)", "pass", ARTIFACTS),
    Fault("engine/start.py", r"^            WORKSHOP\.reserve\(None\)", "            pass", ARTIFACTS),
    # Sampling.
    Fault("engine/sampling.py", r"mass_before_BK >= top_p", "mass_before_BK > 2 * top_p", SAMPLING),
    Fault("engine/sampling.py", r"ages_BL > length - padding_B", "ages_BL > length + padding_B", SAMPLING),
    Fault("engine/sampling.py", r"self\.ages_BV\.add_\(1\)", "self.ages_BV", SAMPLING),
    Fault("engine/sampling.py", r'ages_BL, "amin"', 'ages_BL, "amax"', SAMPLING),
    Fault("engine/sampling.py", r"history\.ages_BV <= oldest", "history.ages_BV < oldest", SAMPLING),
    Fault("engine/sampling.py", r"logits_BV < 0, logits_BV \* factor", "logits_BV < 0, logits_BV / factor", SAMPLING),
    Fault("engine/sampling.py", r"seed is None or 0 <= seed < 1 << 32", "True", COMPLETION),
    Fault("engine/sampling.py", r"object\.__setattr__\(self, name, float\(value\)\)", "pass", SAMPLING),
    # Texts.
    Fault(
        "engine/completion.py",
        r"\(end, _, self\.found\) = min|end, _, self\.found = min",
        "end, _, self.found = max",
        COMPLETION,
    ),
    # Memory.
    Fault(
        "engine/memory.py", r"loaded_dtype\(tensor\.dtype, tensor\.dim\(\), dtype\)\.itemsize", "dtype.itemsize", PLAN
    ),
    Fault("engine/memory.py", r"min\(codes, CODES_PER_EXPANDED_SLICE\)", "codes", "engine/test_memory"),
    Fault("engine/memory.py", r"masks = \(1 \+ dtype\.itemsize\)", "masks = dtype.itemsize", "engine/test_memory"),
    Fault(
        "engine/memory.py",
        r"down = \(4 \* width \+ 3 \* inner\)",
        "down = (4 * width + 2 * inner)",
        "engine/test_memory",
    ),
    Fault("engine/memory.py", r"return 2 \* config\.num_hidden_layers", "return config.num_hidden_layers", PLAN),
    Fault("engine/memory.py", r"needed\.overhead <= free$", "needed.overhead < 2 * free", PLAN),
    Fault("engine/memory.py", r"sum\(dense\) \+ sum\(packed_bytes\(.*\)$", "sum(dense)", PLAN),
    Fault(
        "engine/memory.py",
        r"max\(SMALLEST_CACHE, 1 << \(positions - 1\)\.bit_length\(\)\)",
        "max(SMALLEST_CACHE, positions)",
        "test_generate",
    ),
]
