"""AWQ INT4 for Llama-family models in plain PyTorch: calibrate, quantize, pack, load and generate."""

__version__ = "0.1.0"
