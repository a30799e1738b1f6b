"""Networks that generate a tokenizer's latents or tokens, one file per paper, and how they are sampled."""
