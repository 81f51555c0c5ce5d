"""packloop: a QLoRA training engine for Llama with its own packer, loop and kernels."""

__version__ = "0.1.0"
