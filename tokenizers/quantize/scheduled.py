"""Fields of a bottleneck that may change while training."""

from __future__ import annotations

from typing import Any

import flax.linen as nn

SCHEDULE = "schedule"


def scheduled(module: nn.Module, field: str) -> Any:
    """The number that the trainer puts into the collection ``schedule`` for this step, else the field of the module.

    The module's class names the field in ``SCHEDULED``. A traced scalar costs no recompilation.
    """
    if module.has_variable(SCHEDULE, field):
        return module.get_variable(SCHEDULE, field)
    return getattr(module, field)
