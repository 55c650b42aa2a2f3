"""Qwen2.5-VL (Bai et al., arXiv:2502.13923): images of any size, windows in the tower, positions with three axes."""
