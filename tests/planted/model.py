"""The decoder, and RoPE's mathematics."""

from tests.planted.fault import Fault

TEST = "test_model"
FAULTS = [
    Fault("model.py", r"key_M > query_L1 - \(window or total\)", "key_M >= query_L1 - (window or total)", TEST),
    Fault("model.py", r"key_M <= query_L1\)", "key_M < query_L1 + 2)", TEST),
    Fault("model.py", r"key_M >= padding_B\[:, None, None\]", "key_M >= 0 * padding_B[:, None, None]", TEST),
    Fault("model.py", r"mask\.repeat\(1, 1, (heads // kv_heads), 1\)", r"mask.repeat_interleave(\1, 2)", TEST),
    Fault("model.py", r"= None if mask is None else", "= None if True else", TEST),
    Fault("model.py", r"(embed_tokens\(tokens_BL\))\.to\(self\.norm\.weight\.dtype\)", r"\1", TEST),
    Fault("model.py", r"cache\.length \+= new", "cache.length += 1", TEST),
    Fault("model.py", r"torch\.arange\(past, past \+ new,", "torch.arange(new,", TEST),
    Fault("model.py", r"(rms_norm\(x, self\.weight\.shape, self\.gain, )self\.eps\)", r"\g<1>1e-3)", TEST),
    Fault("model.py", r'if self\.config\.qk_norm == "none":', "if True:", TEST),
    Fault("model.py", r"activation\(gate_BLF\) \* up_BLF", "activation(up_BLF) * gate_BLF", TEST),
    Fault("model.py", r"torch\.stack\(\(-sin, sin\)", "torch.stack((sin, -sin)", TEST),
    Fault("model.py", r"flip\(-1 if rope\.interleaved else -2\)", "flip(-2)", TEST),
    Fault("model.py", r"kept, value=1\.0", "kept, value=0.0", TEST),
    Fault("model.py", r"(return turned_BHLE) \* growth\[0\] if growth else turned_BHLE", r"\1", TEST),
    Fault("model.py", r"(getattr\(self, names\.k_norm\), k_BLJE, rope)\[:2\]", r"\1", TEST),
    Fault("model.py", r"contexts\.log1p\(\)", "contexts", TEST),
    Fault("model.py", r"rope\.long_factor if .* else (rope\.short_factor)", r"\1", TEST),
    Fault("model.py", r"turn_and_norm if config\.qk_norm .* else norm_and_turn", "norm_and_turn", TEST),
    Fault(
        "model.py",
        r"return AllHeadsNorm\(heads \* self\.config\.head_dim",
        "return RMSNorm(heads * self.config.head_dim",
        TEST,
    ),
    Fault("model.py", r"\(positions - padding_B\[:, None, None\]\)\.clamp\(min=0\)", "positions", TEST),
    Fault("model.py", r"(names\.after_mlp\)\(y_BLD\)), alpha=self\.config\.residual_multiplier", r"\1", TEST),
    Fault("model.py", r"(v_BJME, mask), config\.attention_multiplier", r"\1", TEST),
    Fault("model.py", r"self\.weight \+ self\.offset if self\.offset else ", "", TEST),
    Fault("model.py", r"1 / self\.config\.logits_scaling", "1.0", TEST),
    Fault("model.py", r"(rope\.factor \* ratio) - \(rope\.factor - 1\)", r"\1", TEST),
    Fault("model.py", r"keep \* plain \+ \(1 - keep\) \* plain", "plain", TEST),
    Fault("model.py", r"low, high = math\.floor\(low\), math\.ceil\(high\)", "pass", TEST),
]
