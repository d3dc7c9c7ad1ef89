"""AWQ INT4 for Llama-family models in plain PyTorch: calibrate, quantize, pack, load and generate."""

import warnings

__version__ = "0.1.0"

# torch says so at import where NumPy is not installed; nothing here needs it.
warnings.filterwarnings("ignore", message="Failed to initialize NumPy")
