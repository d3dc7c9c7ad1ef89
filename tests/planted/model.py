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
    Fault("model.py", r"cache\.length \+= tokens_BL\.shape\[1\]", "cache.length += 1", TEST),
    Fault("model.py", r"torch\.arange\(past, past \+ new,", "torch.arange(new,", TEST),
    Fault("model.py", r"(\.rms_norm\(x, weight\.shape, weight, )eps\)", r"\g<1>1e-3)", TEST),
    Fault("model.py", r"(self\.q_norm = .* if )config\.qk_norm", r"\1False", TEST),
    Fault("model.py", r"silu\(gate_BLF\) \* up_BLF", "silu(up_BLF) * gate_BLF", TEST),
    Fault("model.py", r"torch\.cat\(\(-second, first\)", "torch.cat((second, -first)", TEST),
    Fault("model.py", r"(rope\.factor \* ratio) - \(rope\.factor - 1\)", r"\1", TEST),
    Fault("model.py", r"keep \* plain \+ \(1 - keep\) \* plain", "plain", TEST),
    Fault("model.py", r"low, high = math\.floor\(low\), math\.ceil\(high\)", "pass", TEST),
]
