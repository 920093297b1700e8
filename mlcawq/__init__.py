"""mlcawq: Hugging Face checkpoint -> 4-bit AWQ -> compiled library -> chat."""

__version__ = "0.1.0"
