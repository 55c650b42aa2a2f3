"""Model families in Flax NNX; see `registry.py` for how one is found and added."""
