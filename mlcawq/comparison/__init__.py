"""Several quantized models side by side: what they were made with, and what it gave."""
