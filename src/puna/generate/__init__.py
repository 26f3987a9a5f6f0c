"""Generation: sampling, the key/value cache, the slots of a running batch, and the engine over them."""
