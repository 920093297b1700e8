"""The model as a TVM Relax graph: decoder, paged KV cache, logit functions, pass pipeline."""
