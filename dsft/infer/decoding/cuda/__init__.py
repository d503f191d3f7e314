"""Decoding of Llama-like models on CUDA, with kernels of our own."""
