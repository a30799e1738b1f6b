"""``config.pretraining`` as the parts of `pretraining.Recipe`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import flax.linen as nn

from .. import errors
from ..nn.heads import PrototypeHead
from . import optim, schedules
from .objective import Objective
from .pretraining import Contrast, Distillation, Recipe, Reconstruction
from .views import Crops, Masks


def recipe(config: Mapping, model: nn.Module, objective: Objective, dtype: Any) -> Recipe:
    """The recipe of a whole config.

    Raises:
      ValueError: for fields that do not fit each other, and for those of other recipes that would be ignored.
    """
    _check(config, model, objective)
    given = config["pretraining"]
    optimizer, rate = optim.make(config["optimizer"], config["steps"])
    return Recipe(
        model=model,
        objective=objective,
        optimizer=optimizer,
        learning_rate=rate,
        contrast=Contrast(**_tuples(given["contrast"])),
        reconstruction=Reconstruction(**given["reconstruction"]),
        distillation=_distillation(given["distillation"], model.patch, dtype),
        seed=config["seed"],
        ema_decay=config["ema_decay"],
        ema_warmup=config["ema_warmup"],
    )


def _distillation(given: Mapping, patch: int, dtype: Any) -> Distillation:
    whole, parts, masks, head = (dict(given[name]) for name in ("whole", "parts", "masks", "head"))
    for name, crops in (("whole", whole), ("parts", parts)):
        if crops["size"] % patch:
            raise ValueError(f"config.pretraining.distillation.{name}.size={crops['size']} is no multiple of {patch}.")
    side = whole["size"] // patch
    plain = ("weight", "every", "targets", "student_temperature", "koleo", "frozen", "drop")
    return Distillation(
        whole=Crops(count=2, **_tuples(whole)),
        parts=Crops(**_tuples(parts)),
        masks=Masks(grid=(side, side), **_tuples(masks)),
        head=PrototypeHead(**head, dtype=dtype),
        teacher_temperature=schedules.schedule(given["teacher_temperature"]),
        momentum=schedules.schedule(given["momentum"]),
        **{name: given[name] for name in plain},
    )


def _tuples(fields: Mapping[str, Any]) -> dict[str, Any]:
    return {name: tuple(value) if isinstance(value, list) else value for name, value in fields.items()}


# Fields of the one schema that other recipes read, and their values that mean nothing.
_OTHERS = {
    ("accumulate",): 1,
    ("discriminator", "name"): None,
    ("loss", "equivariance", "probability"): 0.0,
    ("loss", "equivariance", "smaller"): 0.0,
    ("loss", "alignment", "network"): None,
    ("loss", "consistency", "weight"): 0.0,
    ("loss", "bottleneck"): {},
    ("schedules", "loss"): {},
    ("schedules", "model"): {},
    ("optimizer", "frozen"): [],
}


def _check(config: Mapping, model: nn.Module, objective: Objective) -> None:
    for path, nothing in _OTHERS.items():
        value = config
        for name in path:
            value = value[name]
        if value != nothing and value not in ((), "", "None"):
            raise ValueError(
                f"config.{'.'.join(path)}={value!r} is not read by recipe 'pretraining'; leave it at {nothing!r}."
            )
    if objective.method != "__call__":
        raise ValueError("recipe 'pretraining' reconstructs pixels; config.loss.reconstruction='tokens' does not.")
    given = config["pretraining"]
    wanted = ("features", "image_features", "text_features")
    missing = [name for name in wanted if not hasattr(model, name)]
    if missing:
        raise ValueError(
            f"recipe 'pretraining' needs a model that understands, such as vtp-small-f16d64; "
            f"{config['model']['name']!r} has no {', '.join(missing)}."
        )
    if given["contrast"]["weight"] and not model.clip:
        raise ValueError("config.pretraining.contrast.weight > 0 needs config.model.clip=True: a text tower.")
    if not given["contrast"]["weight"] and model.clip:
        raise ValueError(
            "config.pretraining.contrast.weight=0 leaves the text tower untrained; set config.model.clip=False."
        )
    if given["contrast"]["loss"] == "siglip" and model.clip_bias is None:
        raise ValueError("config.pretraining.contrast.loss='siglip' needs config.model.clip_bias, e.g. -10.0.")
    errors.pick("contrastive loss", given["contrast"]["loss"], {"clip": None, "siglip": None})
    errors.pick("targets of the teacher", given["distillation"]["targets"], {"sinkhorn": None, "centering": None})
    if given["reconstruction"]["weight"] and model.decoder is None:
        raise ValueError("config.pretraining.reconstruction.weight > 0 needs config.model.decoder.")
    if not any(given[name]["weight"] for name in ("contrast", "reconstruction", "distillation")):
        raise ValueError("config.pretraining gives no objective a weight.")
    for name, stream in config["data"]["streams"].items():
        if stream["frames"] != 1:
            raise ValueError(f"config.data.streams.{name}.frames={stream['frames']}: it takes images.")
        batch, distilled = stream["batch_size"], given["distillation"]
        for part in ("reconstruction", "distillation"):
            if given[part]["weight"] and batch % given[part]["every"]:
                raise ValueError(
                    f"config.data.streams.{name}.batch_size={batch} is no multiple of "
                    f"config.pretraining.{part}.every={given[part]['every']}."
                )
        if distilled["weight"] and 2 * batch // distilled["every"] % distilled["masks"]["group"]:
            raise ValueError(
                f"config.pretraining.distillation.masks.group={distilled['masks']['group']} must divide the "
                f"{2 * batch // distilled['every']} whole views of a batch of stream {name!r}."
            )
