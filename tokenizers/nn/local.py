"""Networks as steps that say how far they see within a frame, so that frames can be taken in tiles (`bands.py`).

A tile that is cut out of a frame is computed as if it were a frame: with zeros around it. Where its border is not that
of the frame, this is wrong, and every layer carries the error further in. `halo` follows it, from the steps themselves.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import flax.linen as nn
import jax

Array = jax.Array


@dataclasses.dataclass(frozen=True)
class Step:
    """A part of a network.

    Attributes:
      run: ``(B, T, H, W, C)`` -> ``(B, T', H', W', D)``.
      reach: how far from a position, on the finer of the two grids, its inputs lie; ``None`` is anywhere in the frame.
      down, up: factors that height and width are divided and multiplied by.
    """

    run: Callable[[Array], Array]
    reach: int | None
    down: int = 1
    up: int = 1


def halo(steps: Sequence[Step]) -> int | None:
    """Rows of the result that are wrong at a border which is not the frame's; ``None`` where a step sees all of it."""
    wrong = 0
    for step in steps:
        if step.reach is None:
            return None
        wrong = -(-(wrong * step.up + step.reach) // step.down)
    return wrong


class InSteps(nn.Module):
    """An encoder (its steps only ever go down) or a decoder (only up), as the list that its method ``steps`` makes.

    Its ``local`` part is the one at finer resolutions than the coarsest, which can take a frame tile by tile where its
    halo is a number. The rest, on the coarsest grid, is the small part, and sees whole frames.
    """

    def steps(self) -> list[Step]:
        """The network in order; every encoder and decoder has its own."""
        raise NotImplementedError

    @nn.compact
    def __call__(self, x: Array, part: str = "all") -> Array:
        for step in self.part(part):
            x = step.run(x)
        return x

    def part(self, name: str) -> list[Step]:
        """All steps, the ``local`` ones, or the ``rest``."""
        steps = self.steps()
        if name == "all":
            return steps
        downs = [number for number, step in enumerate(steps) if step.down > 1]
        if downs:
            local, rest = steps[: downs[-1] + 1], steps[downs[-1] + 1 :]
        else:
            first = next((number for number, step in enumerate(steps) if step.up > 1), len(steps))
            local, rest = steps[first:], steps[:first]
        return {"local": local, "rest": rest}[name]
