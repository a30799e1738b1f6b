"""Where the weights of I3D are in the published file: the same module names on both sides."""

from __future__ import annotations

from .engine import Rule

TABLE = (
    Rule(r"params/logits_conv/\w+", "logits.conv3d.{leaf}"),
    Rule(r"(?:params|batch_stats)/(.+)/\w+", r"\1.{leaf}"),
)

IGNORE = (r".*\.num_batches_tracked",)
