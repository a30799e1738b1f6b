"""Images, clips and captions as fixed-shape uint8 RGB batches. Nothing here imports jax.

`pipeline.Pipeline` is the entry point; `sources.open_source` reads one data set; `decode`, `transforms` and `camera`
are pure functions on numpy arrays.
"""
