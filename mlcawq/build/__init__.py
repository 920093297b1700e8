"""From a checkpoint to a model folder: config and tokenizer, weights, library, verification."""
