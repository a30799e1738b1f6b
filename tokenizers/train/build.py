"""From a config to the parts of a run: model, objective, adversary, the first state, and what is said about them."""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Callable, Mapping
from typing import Any, Protocol

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from .. import api, errors, loading, registry
from ..data import settings
from ..data.latents import LatentPipeline
from ..data.pipeline import Pipeline
from ..discriminators import blur, dino, patchgan, phenaki, stylegan, tats
from ..losses import adversarial, balance, equivariance
from ..networks import clip, foundation
from ..parallel import platform, rules
from ..parallel.mesh import batch_parts, replicated
from . import matching, objective, optim, pretraining_config, preview, schedules
from .adversary import Adversary
from .autoencoder import CAPTIONS, Recipe
from .frames import FRAMES
from .state import TrainState
from .step import Trainable

_NO_DISCRIMINATOR = (None, "", "None")  # the last is what --config.discriminator.name=None gives


def _trained(make: Callable) -> Callable:
    """A discriminator without frozen parts."""
    return lambda part, dtype: (make(part["channels"], part["layers"], norm=part["norm"], dtype=dtype), None)


def _dino(part: Mapping, dtype) -> tuple[dino.DinoDiscriminator, Any]:
    network, variables = foundation.load(part["network"], part["path"] or None, dtype)
    shape = {"width": part["channels"], "layers": part["layers"], "norm": part["norm"]}
    return dino.dino_2d(network, **shape, dtype=dtype), {"weights": variables}


# (config.discriminator, compute dtype) -> (module, variables of its frozen network or None)
_DISCRIMINATORS = {
    "patchgan_2d": _trained(patchgan.patchgan_2d),
    "patchgan_3d": _trained(patchgan.patchgan_3d),
    "blur_2d": _trained(blur.blur_2d),
    "maskbit_2d": _trained(blur.maskbit_2d),
    "phenaki_2d": _trained(phenaki.phenaki_2d),
    "stylegan_2d": _trained(stylegan.stylegan_2d),
    "stylegan_3d": _trained(stylegan.stylegan_3d),
    "tats_2d": _trained(tats.tats_2d),
    "tats_3d": _trained(tats.tats_3d),
    "dino_2d": _dino,
}


class HeldOut(Protocol):
    """Judges a state while training goes on."""

    def __call__(self, state: TrainState) -> tuple[float, dict[str, float], dict[str, Any], dict[str, Any]]:
        """(score, more is better; scores by name; pictures by name; clips by name)."""


def _checked(config: Mapping) -> Mapping:
    settings.resolve(config["data"])
    return config


@dataclasses.dataclass(frozen=True)
class Kind:
    """What can be trained: what a run of it is made of, from its config.

    Attributes:
      recipe: of the step.
      weights: variables of ``config.init_from``.
      data: its batches.
      held_out: who judges it while it is trained, if anybody does.
      resolve: the config with what its data decide; refuses wrong settings before anything is set up.
    """

    recipe: Callable[[Mapping], Trainable]
    weights: Callable[[Mapping], Mapping[str, Any]]
    data: Callable[..., Any] = Pipeline
    held_out: Callable[[Mapping, Trainable, Mesh], HeldOut] | None = preview.HeldOut
    resolve: Callable[[Mapping], Mapping] = _checked


def kind(config: Mapping) -> Kind:
    """Of ``config.recipe``."""
    return errors.pick("recipe", config["recipe"], KINDS)


def recipe(config: Mapping) -> Trainable:
    """All parts of a step.

    Raises:
      ValueError: for unknown names and fields.
    """
    return kind(config).recipe(config)


def data(config: Mapping, process_index: int, process_count: int) -> Any:
    """The batches of this process."""
    return kind(config).data(
        config["data"], seed=config["seed"], process_index=process_index, process_count=process_count
    )


def held_out(config: Mapping, parts: Trainable, mesh: Mesh) -> HeldOut:
    """What judges the run."""
    return kind(config).held_out(config, parts, mesh)


def _autoencoder(config: Mapping) -> Recipe:
    dtype = platform.compute_dtype(config["precision"])
    name, fields = model_fields(config)
    optimizer, rate = optim.make(config["optimizer"], config["steps"])
    model = registry.build(name, dtype=dtype, **fields)
    minimised = objective.build(config["loss"], model.spec)
    adversary, network = _adversary(config, dtype)
    transformations = _transformations(config["loss"], model)
    if minimised.method != "__call__" and (adversary is not None or config["loss"]["equivariance"]["probability"]):
        raise ValueError(
            f"config.loss.reconstruction={config['loss']['reconstruction']!r} has no pixels that a discriminator or "
            "transformations could see: leave them out."
        )
    if adversary is not None and adversary.against == "perceptual" and not any(t.perceptual for t in minimised.terms):
        raise ValueError(
            "config.discriminator.against='perceptual' needs a perceptual loss: config.loss has none of perceptual, "
            "convnext_weight, vgg_hidden_weight, content_weight, gram_weight."
        )
    reader, variables = _captions(config["captions"], model, dtype)
    if reader is not None:
        if minimised.method != "__call__" or transformations is not None:
            raise ValueError("config.captions goes neither with tokens as reconstruction nor with transformed latents.")
        minimised = dataclasses.replace(minimised, frozen=dict(minimised.frozen) | {CAPTIONS: variables})
    if network is not None:  # the step takes all frozen networks as one argument
        frozen = dict(minimised.frozen) | {adversary.network: network}
        minimised = dataclasses.replace(minimised, frozen=frozen)
    return Recipe(
        model=model,
        objective=minimised,
        optimizer=optimizer,
        learning_rate=rate,
        adversary=adversary,
        seed=config["seed"],
        ema_decay=config["ema_decay"],
        ema_warmup=config["ema_warmup"],
        accumulate=config["accumulate"],
        schedules=schedules.build(config["schedules"], model, config["loss"]["bottleneck"]),
        frozen=tuple(config["optimizer"]["frozen"]),
        equivariance=transformations,
        captions=reader,
    )


def _pretraining(config: Mapping) -> Trainable:
    dtype = platform.compute_dtype(config["precision"])
    name, fields = model_fields(config)
    model = registry.build(name, dtype=dtype, **fields)
    _captions(config["captions"], model, dtype)
    return pretraining_config.recipe(config, model, objective.build(config["loss"], model.spec), dtype)


def _tokenizer_weights(config: Mapping) -> Mapping[str, Any]:
    """Of another run, saved folder or official weight file."""
    source = config["init_from"]
    if pathlib.Path(source).expanduser().is_file():  # it does not say of which model it is
        name, fields = model_fields(config)
        return loading.load(source, model=name, **fields).variables
    return loading.load(source).variables


KINDS = {
    "autoencoder": Kind(_autoencoder, _tokenizer_weights),
    "pretraining": Kind(_pretraining, _tokenizer_weights),
    "generator": Kind(matching.build, matching.weights, data=LatentPipeline, held_out=None, resolve=matching.resolve),
}


def _captions(config: Mapping, model, dtype) -> tuple[Any, Any]:
    """What reads captions for the decoder, and its variables; ``(None, None)`` for decoders that read none."""
    wanted = getattr(model, "text", None)
    if config["network"] is None:
        if wanted is not None:
            raise ValueError(
                f"the decoder reads features of captions {tuple(wanted)}: set config.captions.network (Accepted: "
                f"{', '.join(clip.TEXT)}), or config.model.text=None for a decoder of the tokens alone."
            )
        return None, None
    if wanted is None:
        raise ValueError(
            f"config.captions.network={config['network']!r}, but this tokenizer's decoder reads no captions (that of "
            "TA-TiTok does, by its field text)."
        )
    module, variables = clip.load(config["network"], config["path"] or None, dtype)
    if tuple(wanted) != (module.context, module.width):
        raise ValueError(
            f"config.model.text={tuple(wanted)} must be the features of {config['network']!r}: "
            f"{(module.context, module.width)}."
        )
    return module, variables


def _transformations(config: Mapping, model) -> equivariance.Equivariance | equivariance.Resolutions | None:
    scales, found = tuple(config["resolutions"]), _equivariance(config["equivariance"], model)
    if not scales:
        return found
    if found is not None:
        raise ValueError("config.loss.resolutions and config.loss.equivariance exclude each other.")
    return equivariance.Resolutions(scales)


def _equivariance(config: Mapping, model) -> equivariance.Equivariance | None:
    if not config["probability"] and not config["smaller"]:
        return None
    shape, variables = registry.example_shape(model), registry.abstract_variables(model)
    latents = jax.eval_shape(
        lambda v, x: model.apply(v, x, method="encode"), variables, jax.ShapeDtypeStruct(shape, jnp.float32)
    ).latents.shape
    sides = model.spec.compression[1:]
    if len(latents) != len(shape) or latents[-3:-1] != (shape[-3] // sides[0], shape[-2] // sides[1]):
        raise ValueError(
            f"config.loss.equivariance transforms maps of latents (.., H, W, D); this tokenizer has latents {latents} "
            f"of pixels {shape}."
        )
    return equivariance.Equivariance(**(dict(config) | {"scales": tuple(config["scales"])}))


def model_fields(config: Mapping) -> tuple[str, dict[str, Any]]:
    fields = dict(config["model"])
    return fields.pop("name"), fields


def _example(streams: Mapping, frames: str) -> tuple[int, ...]:
    """Shape of pixels that a discriminator's parameters are made for."""
    height, width = next(iter(streams.values()))["resolutions"][0]
    longest = max(stream["frames"] for stream in streams.values())
    return (1, 1 if frames == "one" else longest, height, width, 3)


def _adversary(config: Mapping, dtype) -> tuple[Adversary | None, Any]:
    """The adversary, and the variables of the frozen network it looks through, if any."""
    part = config["discriminator"]
    if part["name"] in _NO_DISCRIMINATOR:
        return None, None
    make = errors.pick("discriminator", part["name"], _DISCRIMINATORS)
    weighting = balance.constant_weight(part["weight"])
    if part["adaptive"]:
        weighting = balance.adaptive_weight(part["weight"], maximum=part["adaptive_max"])
    if part["leads"] and part["fresh_forward"]:
        raise ValueError("discriminator.leads and discriminator.fresh_forward exclude each other: first or second.")
    if part["generator_start"] < part["start"]:
        raise ValueError(
            f"discriminator.generator_start={part['generator_start']} lies before discriminator.start={part['start']}: "
            "the generator would learn from a discriminator that does not run yet."
        )
    module, network = make(part, dtype)
    adversary = Adversary(
        module=module,
        generator_loss=errors.pick("generator loss", part["generator_loss"], dict(adversarial.GENERATOR)),
        discriminator_loss=errors.pick(
            "discriminator loss", part["discriminator_loss"], dict(adversarial.DISCRIMINATOR)
        ),
        optimizer=optim.make(part["optimizer"], max(config["steps"] - part["start"], 1))[0],  # its steps begin there
        weight=weighting,
        factor=part["factor"],
        start=part["start"],
        generator_start=part["generator_start"],
        lecam_weight=part["lecam_weight"],
        lecam_decay=part["lecam_decay"],
        lecam=errors.pick("LeCam form", part["lecam"], dict(adversarial.LECAM)),
        feature_matching_weight=part["feature_matching_weight"],
        r1_weight=part["r1_weight"],
        r1_every=part["r1_every"],
        ema_decay=part["ema_decay"],
        fresh_forward=part["fresh_forward"],
        leads=part["leads"],
        ramp=part["ramp"],
        network="" if network is None else "discriminator",
        clips_only=part["clips_only"],
        example=_example(config["data"]["streams"], part["frames"]),
        frames=errors.pick("frames of a clip", part["frames"], FRAMES),
        against=part["against"],
        r1_norm=part["r1_norm"],
    )
    return adversary, network


def abstract_state(config: Mapping, parts: Trainable, mesh: Mesh) -> TrainState:
    """Shapes and shardings of the state, without computing it.

    Raises:
      ValueError: for sharding rules that match nothing or do not fit.
    """
    shapes = jax.eval_shape(parts.initialize)
    given = placements(config)
    rules.check_used(given, shapes)
    return jax.tree.map(
        lambda leaf, place: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place),
        shapes,
        rules.shardings(shapes, mesh, given, config["mesh"]["smallest"]),
    )


def placements(config: Mapping) -> tuple[rules.Rule, ...]:
    for entry in config["mesh"]["rules"]:
        if not isinstance(entry, (list, tuple)) or len(entry) != 2:
            raise ValueError(f"config.mesh.rules holds {entry!r}; each rule is a pair (expression, placement).")
    return tuple((str(pattern), place) for pattern, place in config["mesh"]["rules"])


def check_batches(shapes, parts: Trainable, mesh: Mesh) -> None:
    """Refuses batches that the model, the mesh or the accumulation cannot take, before anything is compiled.

    Args:
      shapes: (stream, global shape, of pixels ``(B, T, H, W, C)``) of all batches.
      parts: of the run.
      mesh: devices.

    Raises:
      ValueError: names the stream and what would fit.
    """
    pieces = batch_parts(mesh)
    for stream, shape in shapes:
        if shape[0] % pieces or shape[0] % parts.accumulate:
            raise ValueError(
                f"stream {stream!r}: batch_size={shape[0]} must be a multiple of the {pieces} parts over which mesh "
                f"{dict(mesh.shape)} splits a batch, and of accumulate={parts.accumulate}."
            )
        try:
            parts.check(shape)
        except ValueError as error:
            raise ValueError(f"stream {stream!r}: {error}") from error


def initial_state(config: Mapping, parts: Trainable, mesh: Mesh) -> TrainState:
    """The state before the first step, laid out over the mesh; each device computes its own part."""
    places = jax.tree.map(lambda leaf: leaf.sharding, abstract_state(config, parts, mesh))
    state = jax.jit(parts.initialize, out_shardings=places, compiler_options=platform.run_once_options())()
    if config["init_from"] is not None:
        state = _with_weights(state, config, places)
    others = config.get("init_parts", {})
    for name, part in others.items():
        state = _with_part(state, part, f"config.init_parts.{name}")
    if config["init_from"] is not None or others:
        state = parts.settled(state)
    return state


def _with_weights(state: TrainState, config: Mapping, places: TrainState) -> TrainState:
    """The state with the parameters (and codebook statistics) of ``config.init_from``."""
    source, variables = config["init_from"], dict(kind(config).weights(config))
    params = variables.pop("params")
    wanted = _shapes({"params": state.params["model"], **state.model_state})
    found = _shapes({"params": params, **variables})
    wrong = [name for name in sorted(wanted | found) if wanted.get(name) != found.get(name)]
    if wrong:
        lines = [f"{name}: config.model has {wanted.get(name)}, found {found.get(name)}" for name in wrong[:10]]
        raise ValueError(
            f"config.init_from={source!r} holds another model; {len(wrong)} arrays do not fit:\n  " + "\n  ".join(lines)
        )
    params, variables = jax.device_get((params, variables))  # plain arrays go onto any mesh
    return state.replace(
        params=state.params | {"model": jax.device_put(params, places.params["model"])},
        ema=jax.device_put(params, places.ema),
        model_state=jax.device_put(variables, places.model_state),
    )


def _with_part(state: TrainState, part: Mapping, where: str) -> TrainState:
    """The state with some parameters of another tokenizer, in the model and in its average."""
    source = objective.another(part, where).params
    for theirs, ours in part["take"]:
        wanted, found = _below(state.params["model"], ours, where), _below(source, theirs, where)
        if _shapes(wanted) != _shapes(found):
            raise ValueError(f"{where}: {theirs!r} does not fit {ours!r}: {_shapes(found)} -> {_shapes(wanted)}")
        placed = jax.tree.map(lambda old, new: jax.device_put(jax.device_get(new), old.sharding), wanted, found)
        copied = jax.tree.map(jnp.copy, placed)  # nothing of the state is in it twice: it is donated
        state = state.replace(
            params=state.params | {"model": _replaced(state.params["model"], ours.split("/"), placed)},
            ema=_replaced(state.ema, ours.split("/"), copied),
        )
    return state


def _below(tree: Mapping, path: str, where: str) -> Any:
    for name in path.split("/"):
        tree = errors.pick(f"part of {path!r} in {where}.take", name, tree)
    return tree


def _replaced(tree: Mapping, path: list[str], value: Any) -> dict[str, Any]:
    first, *rest = path
    return dict(tree) | {first: _replaced(tree[first], rest, value) if rest else value}


def _shapes(tree: Any) -> dict[str, tuple[int, ...]]:
    return {rules.path_name(path): leaf.shape for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def out_shardings(state: TrainState, mesh: Mesh) -> tuple[Any, Any]:
    """The state comes out of a step where it went in; metrics are on every device."""
    return jax.tree.map(lambda leaf: leaf.sharding, state), replicated(mesh)


def as_tokenizer(config: Mapping, parts: Trainable, state: TrainState) -> api.Tokenizer:
    """The run's EMA weights behind the public methods, in the run's compute precision."""
    name, fields = model_fields(config)
    return api.Tokenizer(parts.model, {"params": state.ema, **state.model_state}, name, fields)
