"""The public object: a tokenizer is a Linen module, its variables and a few facts."""

from __future__ import annotations

import dataclasses
import functools
import json
import pathlib
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from . import captions, convert, registry, streaming, tiling
from . import pixels as pixel_values
from .parallel import mesh as meshes
from .parallel import platform, rules
from .parallel.constrain import constrain, whole
from .types import Array, Encoding, Spec

SAVED_CONFIG, SAVED_WEIGHTS = "tokenizer.json", "weights.safetensors"


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Tokenizer:
    """A tokenizer with its weights.

    Attributes:
      module: the Linen module.
      variables: ``{"params": ...}`` and, where the bottleneck keeps statistics, ``"codebook"``.
      name: variant or system it was built from.
      fields: fields given besides; ``registry.build(name, **fields)`` is ``module``, up to its compute dtype.
      mesh: devices it is laid out over, ``None`` for one device.
    """

    module: nn.Module
    variables: Mapping[str, Any]
    name: str
    fields: Mapping[str, Any]
    mesh: Mesh | None = None

    def __repr__(self) -> str:
        spec = self.spec
        codes = f"{spec.codebook_size} codes" if spec.codebook_size else f"{spec.latent_channels} channels, continuous"
        count = sum(leaf.size for leaf in jax.tree.leaves(self.params))
        return f"<Tokenizer {self.name}: compression {spec.compression}, {codes}, {count / 1e6:.2f} M parameters>"

    @property
    def spec(self) -> Spec:
        """Compression, channels, codebook size, causality."""
        return self.module.spec

    @property
    def params(self) -> Any:
        """The parameters: ``module.apply({"params": params}, x, method="encode")``."""
        return self.variables["params"]

    def encode(self, pixels, strict: bool = False) -> Encoding:
        """Pixels to latents and indices.

        Args:
          pixels: ``(B, H, W, C)`` images or ``(B, T, H, W, C)`` videos, uint8 in [0, 255] or float in [-1, 1] (not
            clipped). A video tokenizer takes an image as one frame, an image tokenizer a video frame by frame.
          strict: refuse a frame count or size that does not fit, instead of padding it by repeating the last frame, row
            and column.

        Returns:
          `Encoding` whose grids have a time axis where the pixels have one.
        """
        pixels = _as_array(pixels)
        pixel_values.check(pixels, self.spec.channels)
        pixel_values.fitted(self.spec, _input_size(self.module), tuple(pixels.shape), strict)
        return self._run(_encode, pixels)

    def decode(self, latents, text=None) -> Array:
        """Latents to float32 pixels around [-1, 1], not clipped.

        Args:
          latents: as `encode` returns them: ``(B, T', H', W', D)`` gives a video, ``(B, H', W', D)`` an image; those of
            tokenizers without a grid are ``(B, N, D)``, or ``(B, T, N, D)`` for the frames of a video.
          text: features of captions ``(B, L, E)``, for decoders that read them (TA-TiTok), and for these only.

        Returns:
          The frames of the clip and what filled it up: behind it, or, with ``spec.fills_front``, before it.
        """
        latents = _as_array(latents)
        if latents.ndim < 2 or latents.shape[-1] != self.spec.latent_channels:
            raise ValueError(
                f"latents of {self.name} end in {self.spec.latent_channels} channels; got shape {tuple(latents.shape)}."
            )
        _extra_axes(self.spec, "latents", latents.shape, latents.ndim - 1)
        return self._run(_decode, self._text(text, latents.shape[0]), latents)

    def _text(self, text, batch: int) -> Array | None:
        """Features of captions, refused where their shape is not what the decoder reads."""
        wanted = getattr(self.module, "text", None)
        if text is None and wanted is None:
            return None
        found = None if text is None else tuple(_as_array(text).shape)
        if wanted is None or found != (batch, *wanted):
            reads = "no text" if wanted is None else f"text of shape {(batch, *wanted)}"
            raise ValueError(f"the decoder of {self.name} reads {reads}; got {found}.")
        return _as_array(text)

    def decode_indices(self, indices, text=None) -> Array:
        """Token ids to pixels; the shape rules of `decode` without the channel axis."""
        return self.decode(self.indices_to_latents(indices), text)

    def indices_to_latents(self, indices) -> Array:
        """Token ids to the codes that `decode` reads."""
        indices = _as_array(indices)
        streaming.check_indices(self.spec, self.name, indices)
        _extra_axes(self.spec, "indices", indices.shape, indices.ndim - (self.spec.codebooks > 1))
        return self._run(_indices_to_latents, indices)

    def reconstruct(self, pixels, text=None) -> Array:
        """``decode(encode(pixels), text)`` with the rank, frame count and size of the input."""
        pixels = _as_array(pixels)
        return pixel_values.cropped(self.spec, self.decode(self.encode(pixels).latents, text), tuple(pixels.shape))

    def encode_stream(self, chunks: Iterable[Any], tile: int | tuple[int, int] | None = None) -> Iterator[Encoding]:
        """Encodes a video of any length in constant memory; together the results are `encode` of the whole video.

        Only for causal video tokenizers. Chunks may have any lengths: frames wait until ``compression[0]`` of them make
        a latent frame (fewer than that are ever held back), so a short chunk may give no result of its own, and an
        incomplete last group is filled by repeating the last frame, as in `encode`. Lengths ``1 + k * t`` first and
        ``k * t`` after, with one k, compile two programs in all.

        Args:
          chunks: consecutive pixels ``(B, t, H, W, C)``, as in `encode`.
          tile: at most so high and wide, in pixels, or one number for both, is the part of a frame that the device
            computes at a time; histories of all others wait in the memory of the host. The results are the same. For
            models that are local above their coarsest grid (VidTok). Larger tiles lose less to their borders.

        Yields:
          `Encoding` of the latent frames that have become complete, in order.
        """
        return streaming.encode(self.module, self.name, self._run, chunks, self._tile(tile))

    def decode_stream(self, chunks: Iterable[Any], tile: int | tuple[int, int] | None = None) -> Iterator[Array]:
        """Decodes a video of any length in constant memory; together the results are `decode` of the whole.

        Only for causal video tokenizers.

        Args:
          chunks: consecutive latents ``(B, t', H', W', D)``, indices ``(B, t', H', W')``, or what `encode_stream`
            yields.
          tile: as in `encode_stream`.

        Yields:
          float32 pixels of every chunk: ``compression[0]`` frames per latent frame, but one for the first of all. What
          `encode_stream` has filled up is decoded too: cut the end to the frames that went in. With
          ``spec.fills_front`` the first latent frame gives ``compression[0]`` frames as well, of which only the last
          one went in. With ``spec.lookahead`` pixels come that many latent frames later, and the rest at the end.
        """
        return streaming.decode(self.module, self.name, self._run, chunks, self._tile(tile))

    def _tile(self, tile: int | tuple[int, int] | None) -> tuple[int, int] | None:
        if tile is not None and self.mesh is not None:
            raise ValueError(
                f"tile={tile} is for one device; {self.name} is laid out over a mesh, which splits frames."
            )
        return (tile, tile) if isinstance(tile, int) else tile and tuple(tile)

    def features(self, pixels, layers: Sequence[int] = (-1,), bottleneck: bool = False) -> list[tuple[Array, Array]]:
        """What an encoder that understands (VTP) has found behind some of its layers, float32.

        Args:
          pixels: images ``(B, H, W, 3)`` as in `encode`, of sizes that fit.
          layers: their numbers, from 0 or back from -1. Each passes the encoder's final norm.
          bottleneck: in the channels of the latents instead of the encoder's own.

        Returns:
          ``[(class token (B, D), patch tokens (B, h, w, D)), ...]``, one pair per layer.
        """
        return self._run(_features, tuple(layers), bool(bottleneck), self._understood(pixels))

    def image_embedding(self, pixels) -> Array:
        """Images ``(B, H, W, 3)`` in the space that they share with texts: ``(B, E)``, of length 1 (VTP)."""
        return self._run(_image_embedding, self._understood(pixels))

    def text_embedding(self, texts) -> Array:
        """Texts, strings or token ids ``(B, L)``, in the space that they share with images: ``(B, E)``, of length 1."""
        self._check_understands()
        if hasattr(texts, "shape"):
            ids = _as_array(texts)
        else:
            texts = [texts] if isinstance(texts, str) else list(texts)
            ids = captions.token_ids(texts, self.module.text_length) if isinstance(texts[0], str) else np.asarray(texts)
        if not jnp.issubdtype(ids.dtype, jnp.integer) or ids.ndim != 2:
            raise ValueError(f"texts are strings, or integer token ids (B, L); got {ids.dtype} of shape {ids.shape}.")
        return self._run(_text_embedding, ids)

    def _understood(self, pixels) -> Array:
        self._check_understands()
        pixels = _as_array(pixels)
        pixel_values.check(pixels, self.spec.channels)
        if len(pixels.shape) != 4:
            raise ValueError(f"features are those of images (B, H, W, 3); got shape {tuple(pixels.shape)}.")
        pixel_values.fitted(self.spec, _input_size(self.module), tuple(pixels.shape), strict=True)
        return pixels

    def _check_understands(self) -> None:
        if not hasattr(self.module, "image_features"):
            raise ValueError(f"{self.name} has latents alone; features and embeddings are those of VTP models.")

    def shard(self, mesh: Mesh) -> Tokenizer:
        """The same tokenizer over a mesh: large parameters over fsdp, inputs over batch and the context axis."""
        variables = dict(self.variables)
        placed = jax.tree.map(_on_devices, variables, rules.shardings(variables, mesh))
        return dataclasses.replace(self, variables=placed, mesh=mesh)

    def tiled(self, tile: int | tuple[int, int], overlap: int = 64) -> tiling.TiledTokenizer:
        """The same methods tile by tile, for pictures and frames that do not fit the memory; approximate.

        Args:
          tile: height and width of a tile in pixels, or one number for both.
          overlap: pixels that neighbours share at least. See `tiling`.
        """
        return tiling.TiledTokenizer(self, (tile, tile) if isinstance(tile, int) else tuple(tile), overlap)

    def cast(self, dtype) -> Tokenizer:
        """The same tokenizer computing in another dtype (float32, bfloat16); parameters stay float32."""
        return dataclasses.replace(self, module=self.module.clone(dtype=dtype))

    def digest(self) -> str:
        """A checksum of all weights, which tells two trainings of one tokenizer apart."""
        found = 0
        for leaf in jax.tree.leaves(dict(self.variables)):
            found = zlib.crc32(np.ascontiguousarray(jax.device_get(leaf)).tobytes(), found)
        return f"{found:08x}"

    def save(self, folder: str | pathlib.Path) -> None:
        """Writes weights and config into a new or empty folder that `load` reads."""
        from safetensors.numpy import save_file

        folder = pathlib.Path(folder).expanduser()
        if folder.is_file() or (folder.exists() and any(folder.iterdir())):
            raise ValueError(f"{folder} is not empty; choose a new folder.")
        # All fields, so that the folder stays what it is should defaults or the table of variants change; but the
        # compute dtype is a matter of where it runs.
        fields = {key: value for key, value in registry.fields_of(self.module).items() if key != "dtype"}
        config = {"name": self.name, "system": registry.system_of(self.name), "fields": fields}
        flat = traverse_util.flatten_dict(jax.device_get(dict(self.variables)), sep="/")
        folder.mkdir(parents=True, exist_ok=True)
        save_file({name: np.asarray(value, order="C") for name, value in flat.items()}, folder / SAVED_WEIGHTS)
        (folder / SAVED_CONFIG).write_text(json.dumps(config, indent=2) + "\n")

    def export_official(self, path: str | pathlib.Path | None = None) -> dict[str, np.ndarray]:
        """The weights under the authors' names and in their layout, for the authors' code to load.

        The inverse of `from_official`. Buffers that the authors' code computes itself are not among them.

        Args:
          path: a new ``.safetensors`` file to write them to as well.

        Returns:
          ``{official name: float32 array}``.
        """
        from .convert import engine

        rules_ = convert.rules(convert.system(registry.system_of(self.name)), self.module)
        state = engine.to_official(rules_, jax.device_get(convert.settled(self.variables)))
        if path is not None:
            _write_official(pathlib.Path(path).expanduser(), state)
        return state

    def _run(self, function: Callable, *values: Any) -> Any:
        """A compiled function of (module, variables, ..., value), on the devices of the tokenizer."""
        if self.mesh is None or isinstance(values[-1], jax.core.Tracer):
            return function(self.module, self.variables, *values)
        with jax.set_mesh(self.mesh):
            return function(self.module, self.variables, *values[:-1], self._placed(values[-1]))

    def _placed(self, value) -> Array:
        sharding = getattr(value, "sharding", None)
        if isinstance(sharding, NamedSharding) and sharding.mesh == self.mesh:
            return value
        fits = value.shape[0] % meshes.batch_parts(self.mesh) == 0
        spec = PartitionSpec(meshes.batch_axes(self.mesh)) if fits else PartitionSpec()
        return _on_devices(value, NamedSharding(self.mesh, spec))


# One program per module and input shape. Padding and changes of rank are part of it.


@functools.partial(platform.jit, static_argnums=0)
def _encode(module: nn.Module, variables, pixels) -> Encoding:
    spec = module.spec
    extra = pixels.ndim - (5 if spec.video else 4)
    native = _folded(pixel_values.to_float(pixels), extra)
    native = pixel_values.pad(native, pixel_values.fitted(spec, _input_size(module), native.shape, strict=False))
    encoding = module.apply(whole(variables), _constrained(native), method="encode")
    if spec.video and spec.tokens_per_item is not None:  # a clip of one frame has as many tokens as any
        return encoding
    return jax.tree.map(lambda leaf: _unfolded(leaf, extra, pixels.shape) if leaf.ndim else leaf, encoding)


@functools.partial(platform.jit, static_argnums=0)
def _decode(module: nn.Module, variables, text, latents) -> Array:
    extra = _extra_axes(module.spec, "latents", latents.shape, latents.ndim - 1)
    native = _folded(latents, extra)
    native = _constrained(native) if module.spec.tokens_per_item is None else native
    options = {} if text is None else {"text": jnp.repeat(text, native.shape[0] // text.shape[0], axis=0)}
    decoded = module.apply(whole(variables), native, method="decode", **options)
    if extra < 0 and module.spec.fills_front:
        decoded = decoded[:, -1:]
    return _unfolded(decoded, extra, latents.shape).astype(jnp.float32)


@functools.partial(platform.jit, static_argnums=(0, 2, 3))
def _features(module: nn.Module, variables, layers, bottleneck, pixels) -> list[tuple[Array, Array]]:
    return module.apply(whole(variables), pixel_values.to_float(pixels), layers, bottleneck, method="features")


@functools.partial(platform.jit, static_argnums=0)
def _image_embedding(module: nn.Module, variables, pixels) -> Array:
    return _unit_length(module.apply(whole(variables), pixel_values.to_float(pixels), method="image_features"))


@functools.partial(platform.jit, static_argnums=0)
def _text_embedding(module: nn.Module, variables, ids) -> Array:
    return _unit_length(module.apply(whole(variables), ids, method="text_features"))


def _unit_length(x: Array) -> Array:
    return x / jnp.maximum(jnp.linalg.norm(x, axis=-1, keepdims=True), 1e-12)


@functools.partial(platform.jit, static_argnums=0)
def _indices_to_latents(module: nn.Module, variables, indices) -> Array:
    return module.apply(whole(variables), indices, method="indices_to_latents")


def _constrained(x: Array) -> Array:
    names = ("batch", "time", "height", "width", "channel")
    return constrain(x, *(names if x.ndim == 5 else names[:1] + names[2:]))


def _folded(x, extra: int):
    """To the module's own rank: an image (extra -1) is one frame, the frames of a video (extra 1) are a batch."""
    if extra < 0:
        return x[:, None]
    return x.reshape(-1, *x.shape[2:]) if extra else x


def _unfolded(x, extra: int, shape: tuple[int, ...]):
    """Back from the module's rank to that of the input, whose shape is given."""
    if extra < 0:
        return x[:, 0]
    return x.reshape(*shape[:2], *x.shape[1:]) if extra else x


def _extra_axes(spec: Spec, what: str, shape: tuple[int, ...], rank: int) -> int:
    """How many axes (-1, 0, 1) indices, or latents without their channels, have more than the module's own."""
    if spec.tokens_per_item is not None:
        accepted = {2: "(B, N)"} | ({} if spec.video else {3: "(B, T, N)"})
    else:
        accepted = {3: "(B, H', W')", 4: "(B, T', H', W')"}
    if rank not in accepted or 0 in shape:
        channels = ", each with channels last" if what == "latents" else ""
        raise ValueError(f"{what} have shape {tuple(shape)}; accepted: {' or '.join(accepted.values())}{channels}.")
    if spec.tokens_per_item is not None:
        return rank - 2
    return rank - (4 if spec.video else 3)


def _input_size(module: nn.Module) -> tuple[int, int] | None:
    return getattr(module, "input_size", None)


def _on_devices(value, sharding: NamedSharding) -> Array:
    """An array that every process has whole, laid out over devices that may belong to several processes."""
    if sharding.is_fully_addressable or not getattr(value, "is_fully_addressable", True):
        return jax.device_put(value, sharding)
    host = np.asarray(value)
    return jax.make_array_from_callback(host.shape, sharding, lambda index: host[index])


def _as_array(value):
    return value if hasattr(value, "shape") else np.asarray(value)


def _write_official(path: pathlib.Path, state: Mapping[str, np.ndarray]) -> None:
    from safetensors.numpy import save_file

    if path.suffix != ".safetensors":
        raise ValueError(f"{path}: official weights are written to files that end in .safetensors.")
    if path.exists():
        raise ValueError(f"{path} exists; choose a new file.")
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(dict(state), path)
