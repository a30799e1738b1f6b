"""Names of the layers of `nn/vivit.py` in the code of C-ViViT and OmniTokenizer. Not a system of its own."""

from __future__ import annotations

import re
from collections.abc import Callable

from .engine import Rule, kernel, part

# Never read by the authors' code, or constants of it.
UNUSED = (r".*\.context_norm\.gamma", r".*\.beta", r".*\.null_kv")


def patch_rules(embed: str, pixels: str) -> tuple[Rule, ...]:
    """`PatchEmbed` and `ToPixels`, given the places of theirs."""
    rules = []
    for ours, suffix in (("first", "_first_frame"), ("rest", "")):
        for layer, number in (("norm_in", 1), ("dense", 2), ("norm_out", 3)):
            rules.append(
                Rule(rf"params/to_tokens/{ours}_{layer}/\w+", f"{embed}to_patch_emb{suffix}.{number}.{{leaf}}")
            )
        rules.append(Rule(rf"params/to_pixels/{ours}/\w+", f"{pixels}to_pixels{suffix}.0.{{leaf}}"))
    return tuple(rules)


# A layer of a `Transformer`: the first one of its run, and its place there.
LAYER = r"from(?P<start>\d+)/layers/(?P<place>\d+)/"


def layer_name(official: str) -> Callable[[re.Match], str]:
    """``official`` with the number of the layer that `LAYER` found in the place of ``{number}``."""
    return lambda match: official.replace("{number}", str(int(match["start"]) + int(match["place"])))


# A `SpatialBias`.
BIAS = tuple(
    (rf"{ours}/\w+", f"spatial_rel_pos_bias.net.{number}.{{leaf}}")
    for ours, number in (("hidden0", "0.0"), ("hidden1", "1.0"), ("out", "2"))
)


def transformer_rules(ours: str, official: str) -> tuple[Rule, ...]:
    """A `Transformer`; its attention may be wrapped in another module."""
    attention = r"attention/(?:attention/)?"
    layers = (
        (r"position/conv/\w+", "0.dsconv.{leaf}"),
        (attention + "norm/scale", "1.norm.gamma"),
        (attention + "query/kernel", "1.to_q.weight"),
        (attention + "key/kernel", "1.to_kv.weight", part(0, 2, kernel)),
        (attention + "value/kernel", "1.to_kv.weight", part(1, 2, kernel)),
        (attention + "query_norm/scale", "1.q_scale"),
        (attention + "key_norm/scale", "1.k_scale"),
        (attention + "out/kernel", "1.to_out.weight"),
        *((f"attention/bias/{bias}", f"1.{name}") for bias, name in BIAS),
        (r"feed_forward/norm/\w+", "3.0.{leaf}"),
        ("feed_forward/hidden/kernel", "3.1.weight"),
        ("feed_forward/out/kernel", "3.4.weight"),
    )
    return (
        *(
            Rule(f"params/{ours}/{LAYER}{path}", layer_name(f"{official}.layers.{{number}}.{name}"), *transform)
            for path, name, *transform in layers
        ),
        Rule(rf"params/{ours}/norm_out/scale", f"{official}.norm_out.gamma"),
    )
