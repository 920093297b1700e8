"""Small language models of several families, trained on real text, for comparing quantizers."""
