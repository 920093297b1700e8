"""Judging a model: perplexity, divergence from another model, questions answered."""
