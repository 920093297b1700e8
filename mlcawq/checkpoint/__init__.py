"""Hugging Face folders: config in all its forms, lazy tensor reading, atomic writing."""
