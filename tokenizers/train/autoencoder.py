"""The recipe of an autoencoder with a bottleneck, with or without a discriminator: its step as one pure function.

The generator's gradient takes a single pass back through decoder and encoder: losses are differentiated at the
reconstruction, the adaptive weight combines those two cotangents (`losses.balance`), and their combination is pulled
back once.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

from .. import captions, registry
from .. import pixels as pixel_values
from ..losses import alignment, balance
from ..losses.equivariance import Draw, Equivariance, Resolutions, Transform
from ..parallel.constrain import constrain, whole
from . import adversary as adversaries
from . import optim
from .adversary import Adversary
from .objective import Metrics, Objective
from .schedules import Schedules
from .state import TrainState, new_state
from .step import OfPixels, mean_over_micro_batches, micro_batches

CAPTIONS = "captions"  # the name of the frozen network that reads them


@dataclasses.dataclass(frozen=True)
class Recipe(OfPixels):
    """All that a step needs to know and that never changes during a run."""

    model: nn.Module
    objective: Objective
    optimizer: optax.GradientTransformation
    learning_rate: optax.Schedule
    adversary: Adversary | None
    seed: int
    ema_decay: float
    ema_warmup: bool
    accumulate: int
    schedules: Schedules = Schedules()
    frozen: tuple[str, ...] = ()  # regular expressions over parameter paths, as in the optimizer
    equivariance: Equivariance | Resolutions | None = None  # how often latents and pixels are transformed
    # Of this program: the generator's pass, and the one before the discriminator's turn (``fresh_forward``).
    draws: tuple[Draw, Draw] = (Draw(), Draw())
    # Features of captions that the decoder reads: token ids (B, L) -> (B, L, E), its variables the network "captions".
    captions: nn.Module | None = None

    @property
    def networks(self) -> Mapping[str, Any]:
        return self.objective.frozen

    @property
    def program(self) -> Any:
        return self.adversary is not None and self.adversary.runs, self.draws

    def initialize(self) -> TrainState:
        model_key, adversary_key = jax.random.split(jax.random.key(self.seed))
        variables = dict(self.model.init(model_key, jnp.zeros(registry.example_shape(self.model))))
        params = {"model": variables.pop("params"), "objective": dict(self.objective.params)}
        ema = jax.tree.map(jnp.copy, params["model"])
        opponent = None if self.adversary is None else adversaries.initialize(self.adversary, adversary_key)
        return new_state(params, variables, ema, self.optimizer.init(params), opponent)

    def settled(self, state: TrainState) -> TrainState:
        return state

    def summary(self) -> list[str]:
        adversary = self.adversary
        if adversary is None:
            return []
        return [
            f"discriminator {type(adversary.module).__name__}: trained from step {adversary.start}, seen by the "
            f"generator from step {adversary.generator_start}"
        ]

    def told(self) -> list[str]:
        told = ["with the discriminator"] if self.program[0] else []
        return told + ([] if self.equivariance is None else [str(self.draws[0])])

    def check(self, shape: tuple[int, ...]) -> None:
        super().check(shape)
        for scale in self.equivariance.scales if isinstance(self.equivariance, Resolutions) else ():
            scaled = (*shape[:2], *(int(side * scale) for side in shape[2:4]), shape[4])
            try:
                super().check(scaled)
            except ValueError as error:
                raise ValueError(f"config.loss.resolutions has {scale}: {error}") from error

    def inputs(self, batch: Mapping[str, Any]) -> dict[str, np.ndarray]:
        found = {"pixels": np.ascontiguousarray(batch["pixels"])}
        if self.captions is None:
            return found
        if "caption" not in batch:
            raise ValueError(
                "config.captions.network reads captions: set config.data.source to captions, "
                "parquet or tar with texts, or shapes."
            )
        return found | {"texts": captions.token_ids(batch["caption"], self.captions.context)}

    @property
    def reads(self) -> tuple[str, ...]:
        return () if self.captions is None else (CAPTIONS,)

    def shown(self, batch: Mapping[str, Any]) -> dict[str, np.ndarray]:
        return self.inputs(batch)

    def inputs_of(self, shape: tuple[int, ...]) -> dict[str, jax.ShapeDtypeStruct]:
        found = {"pixels": jax.ShapeDtypeStruct(shape, jnp.uint8)}
        if self.captions is None:
            return found
        return found | {"texts": jax.ShapeDtypeStruct((shape[0], self.captions.context), jnp.int32)}

    def text(self, networks: Mapping[str, Any], inputs: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
        """``{"text": features of the captions (B, L, E)}``, or nothing."""
        if self.captions is None:
            return {}
        return {"text": jax.lax.stop_gradient(self.captions.apply(whole(networks[CAPTIONS]), inputs["texts"]))}

    def at(self, step: int) -> Recipe:
        """The recipe of the program for that step: before ``adversary.start`` the discriminator costs nothing.

        Two programs instead of one with a conditional: XLA runs convolutions inside conditionals on a single CPU
        thread (16 times slower for the quickstart's discriminator). Transformations change the sizes of arrays: each
        one that is drawn makes a program of its own.
        """
        recipe = self
        if self.equivariance is not None:
            rng = np.random.default_rng((self.seed, step))
            recipe = dataclasses.replace(recipe, draws=(self.equivariance.draw(rng),) * 2)
        if self.adversary is not None:
            adversary = dataclasses.replace(self.adversary, runs=step >= self.adversary.start)
            recipe = dataclasses.replace(recipe, adversary=adversary)
        return recipe

    def update(
        self, state: TrainState, networks: Mapping[str, Any], inputs: Mapping[str, jax.Array], key: jax.Array
    ) -> tuple[TrainState, Metrics]:
        """``inputs["pixels"]`` are uint8 or float ``(B, T, H, W, C)``, ``inputs["texts"]`` token ids ``(B, L)``."""
        recipe = _for_frames(self, inputs["pixels"].shape[1])
        batch = {"pixels": inputs["pixels"], **self.text(networks, inputs)}
        micro = micro_batches(batch, recipe.accumulate)
        new, metrics = _update(recipe, state, networks, micro, key)
        return new, metrics | recipe.schedules.metrics(state.step)


def _for_frames(recipe: Recipe, frames: int) -> Recipe:
    """The recipe of the program for batches of that many frames."""
    adversary = recipe.adversary
    if adversary is None or frames > 1 or not adversary.clips_only:
        return recipe
    return dataclasses.replace(recipe, adversary=dataclasses.replace(adversary, runs=False))


def _update(
    recipe: Recipe, state: TrainState, frozen, micro: Mapping[str, jax.Array], key
) -> tuple[TrainState, Metrics]:
    adversary, opponent, led = recipe.adversary, state.adversary, {}
    shared = adversary is not None and not adversary.fresh_forward and not adversary.leads
    if adversary is not None and adversary.leads:  # the forward pass is the generator's: compiled, it is one
        options = {"key": key, "draw": recipe.draws[0]}
        first = state.params["model"], state.model_state, opponent
        _, opponent, led = _own_turn(recipe, state, first, frozen, micro, {}, **options)

    def generate(carry, inputs):
        """Gradients of one micro-batch; the discriminator's too where both learn from the same reconstruction."""
        model_state, opponent = carry
        batch, index = inputs
        grads, model_state, opponent, (reconstruction, target), metrics = _generator_pass(
            recipe, state, model_state, opponent, frozen, batch, jax.random.fold_in(key, index)
        )
        opponent_grads = ()
        if shared:
            opponent_grads, opponent, more = adversaries.learn(
                adversary, opponent, frozen, state.step, reconstruction, target
            )
            metrics |= more
        return (model_state, opponent), (grads, opponent_grads, metrics)

    carry, (grads, opponent_grads, metrics) = mean_over_micro_batches(generate, (state.model_state, opponent), micro)
    model_state, opponent = carry
    metrics |= led | {"grad_norm/generator": optim.global_norm(grads)}
    if shared:
        metrics["grad_norm/discriminator"] = optim.global_norm(opponent_grads)
    elif adversary is not None and adversary.fresh_forward:
        moved, _ = optim.descend(recipe.optimizer, grads, state.optimizer, state.params)
        second = moved["model"], model_state, opponent
        options = {"key": key, "first_key": recipe.accumulate, "draw": recipe.draws[1]}
        model_state, opponent, metrics = _own_turn(recipe, state, second, frozen, micro, metrics, **options)

    # Once more where the discriminator saw the new parameters, as only then it is known whether they count.
    finite = optim.finite(metrics)
    params, optimizer = optim.descend(recipe.optimizer, grads, state.optimizer, state.params, finite)
    if shared:
        opponent = adversaries.update(
            adversary, state.adversary, opponent, opponent_grads, state.step, recipe.ema_warmup, finite
        )
    elif adversary is not None and adversary.leads:
        opponent = optim.held(finite, opponent, state.adversary)
    ema = optim.ema_update(state.ema, params["model"], recipe.ema_decay, state.step, recipe.ema_warmup, finite)
    model_state = optim.held(finite, model_state, state.model_state)
    new = {"params": params, "model_state": model_state, "ema": ema, "optimizer": optimizer, "adversary": opponent}
    return state.replace(**new), metrics


def _own_turn(recipe: Recipe, state: TrainState, now, frozen, micro, metrics: Metrics, *, key, draw, first_key=0):
    """(model state, adversary state, metrics and more): the discriminator learns from a forward pass of its own.

    ``now`` is what has changed in the state, or not: the model's parameters and state, the adversary's state.
    """
    adversary, step, (params, model_state, opponent) = recipe.adversary, state.step, now

    def oppose(carry, inputs):
        model_state, opponent = carry
        batch, index = inputs
        own_key = jax.random.fold_in(key, first_key + index)
        rngs = _rngs(own_key)
        seen = draw.pixels(pixel_values.to_float(batch["pixels"]))
        target = reconstruction = draw.latents(seen)
        if adversary.runs:
            (reconstruction, _), model_state = _forward(
                recipe, params, model_state, seen, rngs, step, draw.latents, batch.get("text")
            )
        view = adversary.frames(_frames_key(own_key), target.shape)
        grads, opponent, metrics = adversaries.learn(
            adversary, opponent, frozen, step, view(reconstruction), view(target)
        )
        return (model_state, opponent), (grads, metrics)

    (model_state, opponent), (grads, more) = mean_over_micro_batches(oppose, (model_state, opponent), micro)
    metrics = metrics | more | {"grad_norm/discriminator": optim.global_norm(grads)}
    finite = optim.finite(metrics)
    opponent = adversaries.update(adversary, state.adversary, opponent, grads, step, recipe.ema_warmup, finite)
    return model_state, opponent, metrics


def _rngs(key) -> dict[str, jax.Array]:
    bottleneck, dropout = jax.random.split(key)
    return {"bottleneck": bottleneck, "dropout": dropout}


def _frames_key(key) -> jax.Array:
    return jax.random.fold_in(key, 2)  # beside the two of `_rngs`


def apply_to_clips(model: nn.Module, variables: Mapping, pixels: jax.Array, **options):
    """``model.apply`` on clips ``(B, T, H, W, C)``; a model of images sees the frames as a batch of B * T.

    ``text=`` are features of the captions of the clips ``(B, L, E)``, for decoders that read them.

    Returns:
      What ``model.apply`` returns, with a reconstruction that has the batch and time axes of ``pixels``.
    """
    shape = pixels.shape
    inputs = pixels if model.spec.video else pixels.reshape(-1, *shape[2:])
    if options.get("text") is not None:
        options["text"] = jnp.repeat(options["text"], inputs.shape[0] // shape[0], axis=0)
    result = model.apply(whole(variables), inputs, **options)
    if "mutable" not in options:
        reconstruction, encoding = result
        return reconstruction.reshape(*shape[:2], *reconstruction.shape[-3:]), encoding
    (reconstruction, encoding), state = result
    return (reconstruction.reshape(*shape[:2], *reconstruction.shape[-3:]), encoding), state


def _forward(recipe: Recipe, params, model_state: Mapping, pixels: jax.Array, rngs, step, transform, text=None):
    """((reconstruction, encoding), new model state); what is decoded are the transformed latents."""
    variables = {"params": params, **model_state, **recipe.schedules.variables(step)}
    options = {"train": True, "rngs": rngs, "mutable": list(model_state), "method": recipe.objective.method}
    if transform != Transform():
        options["method"] = functools.partial(_decode_transformed, transform=transform)
    if text is not None:
        options["text"] = text
    windows = recipe.objective.windows
    if windows is None:
        return apply_to_clips(recipe.model, variables, pixels, **options)
    (parts, encoding), state = apply_to_clips(recipe.model, variables, windows.cut(pixels), **options)
    reconstruction, disagreement = windows.join(parts, encoding.latents, pixels.shape[0])
    return (reconstruction, encoding.replace(losses=encoding.losses | disagreement)), state


def _decode_transformed(model: nn.Module, pixels: jax.Array, train: bool, transform: Transform):
    """Of continuous latents the codes are transformed. Interpolated codes are none of a codebook: of discrete ones it
    is what the bottleneck reads.
    """
    if model.spec.codebook_size is None:
        encoding = model.encode(pixels, train)
        return model.decode(transform(encoding.latents), train), encoding

    def before(call, arguments, options, context):
        if context.module.path == model.bottleneck.path and context.method_name == "__call__":
            arguments = (transform(arguments[0]), *arguments[1:])
        return call(*arguments, **options)

    with nn.intercept_methods(before):
        encoding = model.encode(pixels, train)
    return model.decode(encoding.latents, train), encoding


def _generator_pass(recipe: Recipe, state: TrainState, model_state, opponent, frozen, batch, key):
    """(gradients, model state, adversary state, (reconstruction, target), metrics) of one micro-batch.

    Reconstruction and target are what the discriminator sees of them.
    """
    names = ("batch", "time", "height", "width", "channel")
    draw, objective = recipe.draws[0], recipe.objective
    seen = constrain(draw.pixels(pixel_values.to_float(batch["pixels"])), *names)
    target = constrain(draw.latents(seen), *names)

    def model(params):
        params = optim.hold(params, recipe.frozen)
        (reconstruction, encoding), new_state = _forward(
            recipe, params["model"], model_state, seen, _rngs(key), state.step, draw.latents, batch.get("text")
        )
        regularization, parts = objective.regularization(encoding.losses, recipe.schedules.weights(state.step))
        aligned = jnp.zeros((), jnp.float32)
        if objective.alignment is not None:
            aligned, more = objective.alignment(encoding.latents, seen, frozen, params["objective"])
            parts = parts | more
        return (constrain(reconstruction, *names), regularization, aligned), (new_state, parts)

    (reconstruction, regularization, aligned), pull, (model_state, bottleneck) = jax.vjp(
        model, state.params, has_aux=True
    )
    view = objective.frames(_frames_key(key), target.shape)
    (value, parts), (cotangent, objective_grads) = jax.value_and_grad(
        lambda y, own: objective.reconstruction(y, target, frozen, own, view), argnums=(0, 1), has_aux=True
    )(reconstruction, state.params["objective"])
    weight = _alignment_weight(objective.alignment, pull, cotangent)
    metrics = {f"loss/{name}": part for name, part in (parts | bottleneck).items()}
    metrics["loss/generator"] = value + regularization + weight * aligned
    metrics |= objective.quality(reconstruction, target, frozen)
    if objective.alignment is not None:
        metrics |= {"loss/alignment": aligned, "alignment_weight": weight}

    def pull_both(cotangents):  # of the reconstruction, and of regularization and alignment together
        return pull((*cotangents, weight * cotangents[1]))

    adversary = recipe.adversary
    if adversary is not None:
        look, reference = adversary.frames(_frames_key(key), target.shape), None
        seen_target, (seen_reconstruction, pull_seen) = look(target), jax.vjp(look, reconstruction)
        fooling, cotangent_gan, opponent = adversaries.fool(
            adversary, opponent, frozen, seen_reconstruction, seen_target
        )
        (cotangent_gan,) = pull_seen(cotangent_gan)
        if adversary.against == "perceptual":
            reference = jax.grad(lambda y: objective.perception(y, target, frozen, view))(reconstruction)
        grads, weight_state = balance.balanced_pull(
            pull_both,
            adversary.weight,
            opponent.balance,
            reconstruction=cotangent,
            gan=cotangent_gan,
            last_layer=f"model/{recipe.model.spec.last_layer}",
            active=adversary.factor * adversary.seen(state.step),
            auxiliary=regularization,
            reference=reference,
        )
        reconstruction, target = seen_reconstruction, seen_target
        opponent = opponent.replace(balance=weight_state)
        metrics |= {"loss/fooling": fooling, "adaptive_weight": weight_state.weight}
    else:
        (grads,) = pull_both((cotangent, jnp.ones_like(regularization)))
    grads = grads | {"objective": jax.tree.map(jnp.add, grads["objective"], objective_grads)}
    return grads, model_state, opponent, (reconstruction, target), metrics


def _alignment_weight(aligner, pull, cotangent) -> jax.Array | float:
    """Weight of the alignment loss; as for the adversarial one, only the kernels that are read cost anything."""
    if aligner is None:
        return 0.0
    if not aligner.layer:
        return aligner.weight
    zero, one = jnp.zeros((), jnp.float32), jnp.ones((), jnp.float32)
    gradients = (
        balance.parameter(pull(cotangents)[0], f"model/{aligner.layer}")
        for cotangents in ((cotangent, zero, zero), (jnp.zeros_like(cotangent), zero, one))
    )
    return aligner.weight * alignment.adaptive_weight(*gradients)
