"""Data: files in (readers), token shards, packing, and which data each step sees (loader)."""
