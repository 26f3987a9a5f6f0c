"""Corpus: what becomes of text before a model is pretrained on it."""
