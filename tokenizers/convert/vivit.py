"""Names of the layers of `nn/vivit.py` in the code of C-ViViT and OmniTokenizer. Not a system of its own."""

from __future__ import annotations

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


def transformer_rules(ours: str, official: str) -> tuple[Rule, ...]:
    """A `Transformer`; its attention may be wrapped in another module."""
    here, there = rf"params/{ours}/layer(\d+)/", rf"{official}.layers.\1."
    attention = here + r"attention/(?:attention/)?"
    return (
        Rule(here + r"position/conv/\w+", there + "0.dsconv.{leaf}"),
        Rule(attention + "norm/scale", there + "1.norm.gamma"),
        Rule(attention + "query/kernel", there + "1.to_q.weight"),
        Rule(attention + "key/kernel", there + "1.to_kv.weight", part(0, 2, kernel)),
        Rule(attention + "value/kernel", there + "1.to_kv.weight", part(1, 2, kernel)),
        Rule(attention + "query_norm/scale", there + "1.q_scale"),
        Rule(attention + "key_norm/scale", there + "1.k_scale"),
        Rule(attention + "out/kernel", there + "1.to_out.weight"),
        *bias_rules(here + "attention/bias", there + "1."),
        Rule(here + r"feed_forward/norm/\w+", there + "3.0.{leaf}"),
        Rule(here + "feed_forward/hidden/kernel", there + "3.1.weight"),
        Rule(here + "feed_forward/out/kernel", there + "3.4.weight"),
        Rule(rf"params/{ours}/norm_out/scale", f"{official}.norm_out.gamma"),
    )


def bias_rules(ours: str, official: str) -> tuple[Rule, ...]:
    """A `SpatialBias`."""
    layers = (("hidden0", "0.0"), ("hidden1", "1.0"), ("out", "2"))
    return tuple(
        Rule(rf"{ours}/{name}/\w+", f"{official}spatial_rel_pos_bias.net.{number}.{{leaf}}") for name, number in layers
    )
