"""One token after another by llama.cpp, in Q4_0 and Q4_K, of the model `tinyllama-1.1b` of `scripts/bench.py`.

    pip install numpy gguf                                        # in an environment of its own
    cmake --build build --target llama-bench llama-quantize       # as in `llama_cpp.py`
    python scripts/peers/llama_cpp_model.py --programs build/bin --threads 1

TinyLlama-1.1B's shapes with random weights, one row, behind 64 positions. llama.cpp chooses what each tensor becomes:
with Q4_0 and Q4_K the head gets six bits a weight. `llama-bench` prints tokens a second, of five runs.
"""

import argparse
import subprocess
from pathlib import Path

import gguf
import numpy as np

VOCABULARY, WIDTH, INNER, LAYERS, HEADS, KV_HEADS = 32000, 2048, 5632, 22, 32, 4
KV_WIDTH = WIDTH // HEADS * KV_HEADS
OF_A_LAYER = {
    "attn_q": (WIDTH, WIDTH),
    "attn_k": (KV_WIDTH, WIDTH),
    "attn_v": (KV_WIDTH, WIDTH),
    "attn_output": (WIDTH, WIDTH),
    "ffn_gate": (INNER, WIDTH),
    "ffn_up": (INNER, WIDTH),
    "ffn_down": (WIDTH, INNER),
}


def write_model(path: Path) -> None:
    """A GGUF file in float16, without a vocabulary."""
    writer, random = gguf.GGUFWriter(path, "llama"), np.random.default_rng(0)
    writer.add_context_length(2048)
    writer.add_embedding_length(WIDTH)
    writer.add_feed_forward_length(INNER)
    writer.add_block_count(LAYERS)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_dimension_count(WIDTH // HEADS)
    writer.add_vocab_size(VOCABULARY)
    writer.add_tokenizer_model("no_vocab")
    shapes = {"token_embd": (VOCABULARY, WIDTH), "output": (VOCABULARY, WIDTH)}
    shapes |= {f"blk.{layer}.{name}": shape for layer in range(LAYERS) for name, shape in OF_A_LAYER.items()}
    for name, shape in shapes.items():
        weight = random.standard_normal(shape, dtype=np.float32) * shape[1] ** -0.5
        writer.add_tensor(f"{name}.weight", weight.astype(np.float16))
    norms = [f"blk.{layer}.{name}" for layer in range(LAYERS) for name in ("attn_norm", "ffn_norm")]
    for name in (*norms, "output_norm"):
        writer.add_tensor(f"{name}.weight", np.ones(WIDTH, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def main() -> None:
    """Make the files that are missing, and time each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--programs", type=Path, required=True, help="folder of llama-bench and llama-quantize")
    parser.add_argument("--folder", type=Path, default=Path("."), help="where the files go: 3.5 GB (here)")
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    wide = arguments.folder / "tinyllama-random-f16.gguf"
    if not wide.exists():
        write_model(wide)
    files = {kind: arguments.folder / f"tinyllama-random-{kind}.gguf" for kind in ("Q4_0", "Q4_K_M")}
    for kind, file in files.items():
        if not file.exists():
            subprocess.run([arguments.programs / "llama-quantize", wide, file, kind], check=True, capture_output=True)
    models = [part for file in files.values() for part in ("-m", file)]
    command = [arguments.programs / "llama-bench", *models, "-t", str(arguments.threads), "-p", "0", "-n", "24"]
    subprocess.run([*command, "-d", "64"], check=True)


if __name__ == "__main__":
    main()
