"""Llama 2's decoder and the reward model on the same body."""
