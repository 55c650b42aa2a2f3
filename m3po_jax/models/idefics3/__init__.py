"""Idefics3 and SmolVLM: a SigLIP tower on tiles of an image, pixel shuffle, one linear layer and a text decoder."""
