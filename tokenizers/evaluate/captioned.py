"""Features of captions for tokenizers whose decoder reads them (TA-TiTok)."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from .. import captions
from ..networks import clip
from ..parallel import platform


@dataclasses.dataclass(frozen=True)
class Captions:
    """Texts of batches, and what a frozen network makes of them.

    Attributes:
      module: ``networks.clip.TextFeatures``.
      variables: of it.
      template: a sentence with ``{}`` for the name of an item's class, in place of captions; "" takes these. TA-TiTok
        is evaluated with "A photo of a {}.".
      classes: their names.
    """

    module: clip.TextFeatures
    variables: Any
    template: str = ""
    classes: tuple[str, ...] = ()

    def __post_init__(self):
        if self.template and ("{}" not in self.template or not self.classes):
            raise ValueError(
                f"captions.template={self.template!r} needs {{}} where a class's name belongs, and data with classes "
                f"(config.data.labels=True); these have {len(self.classes)} classes."
            )
        object.__setattr__(self, "_read", platform.jit(self.module.apply))

    def ids(self, batch: Mapping[str, Any]) -> np.ndarray:
        """Token ids ``(B, L)`` of a batch's texts."""
        if self.template:
            texts = [self.template.format(self.classes[i]) if i >= 0 else "" for i in np.asarray(batch["label"])]
        elif "caption" in batch:
            texts = batch["caption"]
        else:
            raise ValueError(
                "the tokenizer's decoder reads captions and these data have none: set config.data.source to captions, "
                "parquet or tar with texts, or shapes, or config.captions.template for the names of classes."
            )
        return captions.token_ids(texts, self.module.context)

    def __call__(self, ids: jax.Array) -> jax.Array:  # (b l) -> (b l e)
        return self._read(self.variables, ids)


def of(module: Any, config: Mapping[str, Any], classes: tuple[str, ...]) -> Captions | None:
    """What the decoder of a tokenizer's module reads, ``None`` for one that reads no captions."""
    if getattr(module, "text", None) is None:
        return None
    if config["network"] is None:
        raise ValueError(
            f"the tokenizer's decoder reads captions: set config.captions.network (Accepted: {', '.join(clip.TEXT)})."
        )
    network, variables = clip.load(config["network"], config["path"] or None)
    return Captions(network, variables, config["template"], classes)
