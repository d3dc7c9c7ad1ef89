"""Command lines of the verbs that open a checkpoint."""

from pathlib import Path

# What each verb that opens a checkpoint takes beside the checkpoint; TEXT and OUT become paths.
ARGUMENTS = {
    "generate": ["--prompt", "Once"],
    "quantize": ["OUT", "--calib", "TEXT"],
    "evaluate": ["--text", "TEXT"],
    "bench": ["--context", "8", "-n", "2", "--repeats", "1"],
    "plan": [],
    "convert": ["OUT", "--format", "compressed-tensors"],
}


def command(verb: str, model: str | Path, tmp_path: Path, *more: str) -> list[str]:
    text = tmp_path / "text.txt"
    text.write_text("Once upon a time")
    paths = {"TEXT": str(text), "OUT": str(tmp_path / "out")}
    return [verb, str(model), *(paths.get(word, word) for word in ARGUMENTS[verb]), *more]
