"""Tokenizers and chat templates of the inputs, and what of them the output carries."""
