"""Everything that makes demo/model from the text in demo/: wordings, prose, tokenizer, training."""
