"""The inference engine: TVM's runtime, numpy and tokenizers; no torch, no compiler."""
