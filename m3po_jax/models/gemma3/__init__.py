"""Gemma 3 with images: a SigLIP tower, a projector and the Gemma 3 decoder."""
