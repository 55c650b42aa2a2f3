"""Qwen3-VL, dense: a tower whose early layers speak to the decoder's (DeepStack), positions with interleaved axes."""
