"""Where the weights of RAFT are in torchvision's files (raft_large)."""

from __future__ import annotations

from .engine import Rule

_LEAVES = r"(?:params|batch_stats)/"
_PART = {"conv": 0, "norm": 1}

TABLE = (
    *(
        rule
        for part, index in _PART.items()
        for rule in (
            Rule(rf"{_LEAVES}(\w+_encoder)/stem/{part}/\w+", rf"\1.convnormrelu.{index}.{{leaf}}"),
            Rule(
                rf"{_LEAVES}(\w+_encoder)/layer(\d)_(\d)/conv(\d)/{part}/\w+",
                rf"\1.layer\2.\3.convnormrelu\4.{index}.{{leaf}}",
            ),
            Rule(
                rf"{_LEAVES}(\w+_encoder)/layer(\d)_(\d)/shortcut/{part}/\w+",
                rf"\1.layer\2.\3.downsample.{index}.{{leaf}}",
            ),
        )
    ),
    Rule(r"params/(\w+_encoder)/out/\w+", r"\1.conv.{leaf}"),
    Rule(r"params/update/motion/(\w+\d)/\w+", r"update_block.motion_encoder.conv\1.0.{leaf}"),
    Rule(r"params/update/motion/out/\w+", r"update_block.motion_encoder.conv.0.{leaf}"),
    Rule(r"params/update/gru(\d)/(\w)/\w+", r"update_block.recurrent_block.convgru\1.conv\2.{leaf}"),
    Rule(r"params/update/flow(\d)/\w+", r"update_block.flow_head.conv\1.{leaf}"),
    Rule(r"params/mask_hidden/\w+", r"mask_predictor.convrelu.0.{leaf}"),
    Rule(r"params/mask_out/\w+", r"mask_predictor.conv.{leaf}"),
)

IGNORE = (r".*\.num_batches_tracked",)
