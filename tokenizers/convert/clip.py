"""CLIP's text transformer in the names of OpenAI's and OpenCLIP's files."""

from __future__ import annotations

from .engine import Rule

_layer, _block = r"params/layers/(\d+)", r"transformer.resblocks.\1"
TABLE = (
    Rule("params/tokens/embedding", "token_embedding.weight"),
    Rule("params/positions", "positional_embedding"),
    Rule(r"params/norm/\w+", "ln_final.{leaf}"),
    Rule(rf"{_layer}/norm([12])/\w+", rf"{_block}.ln_\2.{{leaf}}"),
    Rule(rf"{_layer}/attention/qkv/kernel", rf"{_block}.attn.in_proj_weight"),
    Rule(rf"{_layer}/attention/qkv/bias", rf"{_block}.attn.in_proj_bias"),
    Rule(rf"{_layer}/attention/out/\w+", rf"{_block}.attn.out_proj.{{leaf}}"),
    Rule(rf"{_layer}/mlp/fc1/\w+", rf"{_block}.mlp.c_fc.{{leaf}}"),
    Rule(rf"{_layer}/mlp/fc2/\w+", rf"{_block}.mlp.c_proj.{{leaf}}"),
)
# The transformer of images, what brings both to one space, and constants of OpenAI's programs.
IGNORE = (
    r"visual\..*",
    "text_projection",
    "logit_scale",
    "attn_mask",
    "input_resolution",
    "context_length",
    "vocab_size",
)
