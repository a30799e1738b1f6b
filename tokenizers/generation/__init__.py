"""Tokenizers judged by what a fixed generator makes of their latents: extract, train, sample, compare."""
