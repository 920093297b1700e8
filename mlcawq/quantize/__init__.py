"""AWQ quantization of Hugging Face checkpoints, block by block."""
