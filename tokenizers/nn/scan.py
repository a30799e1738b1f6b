"""Equal layers one after the other as one scanned layer: the program is compiled once, whatever the depth.

Parameters have one layout, scanned: each of a layer's arrays with a leading axis of layers. Conversion tables see them
layer by layer (`convert/engine.py`).
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import flax.linen as nn
import jax

from ..errors import pick
from .conv import STREAM

Array = jax.Array

# What a layer's backward pass finds of its forward pass: all of it, nothing but the layer's input, or that and the
# results of its matrix products, which are what is dear to compute again.
REMAT = MappingProxyType(
    {
        "none": None,
        "full": jax.checkpoint_policies.nothing_saveable,
        "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    }
)


def scan_layers(
    layer: nn.Module,
    depth: int,
    x: Array,
    *,
    each: Mapping[str, Any] = MappingProxyType({}),
    remat: str = "none",
    collect: bool = False,
    **options: Any,
) -> Array | tuple[Array, Array]:
    """``layer(layer(... layer(x)))``, every time with other parameters.

    Call it in a compact method, with a module called ``layers`` made there, whose call keeps shape and dtype.

    Args:
      layer: the module; its parameters get a leading axis of ``depth``.
      depth: number of layers.
      x: input of the first.
      each: keywords of the layers that differ between them: arrays, or pytrees of arrays (a `jax.tree_util.Partial`,
        say), with a leading axis of ``depth``.
      remat: ``none``, ``full``, ``dots``: what is computed again in the backward pass, see `REMAT`.
      collect: return what every layer gives as well.
      **options: keywords that all layers share.

    Returns:
      The last layer's result, or with ``collect`` ``(that, (depth, ...) of all)``.
    """
    policy = pick("remat", remat, dict(REMAT))

    def step(layer: nn.Module, x: Array, each: Mapping[str, Any]) -> tuple[Array, Array | None]:
        x = layer(x, **options, **each)
        return x, x if collect else None

    if policy is not None:
        step = nn.remat(step, policy=policy, prevent_cse=False)  # a scan keeps the two passes apart by itself
    run = nn.scan(
        step,
        variable_axes={"params": 0, "intermediates": 0, STREAM: 0},
        split_rngs={"params": True, "dropout": True},
        length=depth,
    )
    x, every = run(layer, x, dict(each))
    return (x, every) if collect else x
