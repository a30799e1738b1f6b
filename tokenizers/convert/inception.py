"""Where the weights of the FID Inception network are in the published files: torchvision's names, or pytorch-fid's."""

from __future__ import annotations

import re
from collections.abc import Mapping

import numpy as np

from .engine import Rule, kernel

TABLE = (
    Rule(r"params/logits_kernel", "fc.weight", kernel),
    Rule(r"params/logits_bias", "fc.bias"),
    Rule(r"(?:params|batch_stats)/(.+)/\w+", r"\1.{leaf}"),
)

# Counters of batches, and the auxiliary classifier that some copies keep.
IGNORE = (r".*\.num_batches_tracked", r"AuxLogits\..*")

# The modules of pytorch-fid's blocks in order.
_BLOCKS = (
    ("Conv2d_1a_3x3", "Conv2d_2a_3x3", "Conv2d_2b_3x3"),
    ("Conv2d_3b_1x1", "Conv2d_4a_3x3"),
    ("Mixed_5b", "Mixed_5c", "Mixed_5d", "Mixed_6a", "Mixed_6b", "Mixed_6c", "Mixed_6d", "Mixed_6e"),
    ("Mixed_7a", "Mixed_7b", "Mixed_7c"),
)


def torchvision_names(state_dict: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """pytorch-fid's ``blocks.0.1.conv.weight`` as ``Conv2d_2a_3x3.conv.weight``; others stay."""

    def rename(match: re.Match) -> str:
        return _BLOCKS[int(match[1])][int(match[2])] + "."

    return {re.sub(r"^blocks\.([0-3])\.(\d)\.", rename, name): value for name, value in state_dict.items()}
