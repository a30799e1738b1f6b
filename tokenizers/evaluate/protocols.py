"""The evaluation protocols of the papers, as values: what is compared, how it is averaged, on which crop of the data.

Numbers of two papers can be compared only when the whole protocol agrees; `Protocol.departures` says where the data
at hand does not.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from types import MappingProxyType

import jax
import jax.numpy as jnp

from . import pixel_metrics


@dataclasses.dataclass(frozen=True)
class Protocol:
    """How reconstructions are scored.

    Attributes:
      name: key in `PROTOCOLS`.
      source: where the facts come from.
      pixels: the reconstruction in pixel metrics: ``round`` or ``truncate`` to 8 bits, or ``float``; clipped first.
      data_range: peak of the values that are compared, 255 or 1.
      psnr_over: ``item`` or ``frame``, see `pixel_metrics.psnr`.
      mse_epsilon, root_epsilon: see `pixel_metrics.psnr`.
      ssim_window: ``uniform`` or ``gaussian``, see `pixel_metrics.ssim`.
      ssim_pool_to: average pooling by round(shorter side / this) before SSIM; ``None`` for none.
      weighting: the data set's score is the mean over ``item``s or over ``frame``s.
      lpips: trunk, ``vgg`` or ``alex``.
      fid: resizing and normalisation in front of Inception, ``torch-fidelity``, ``pytorch-fid`` or ``clean``.
      fid_pixels: the pictures that Inception sees, as ``pixels``.
      fvd: preprocessing in front of I3D, ``styleganv``, ``videogpt`` or ``omnitokenizer``.
      short_side, crop, interpolation, frames, fps: the geometry of the published numbers, for the data pipeline;
        ``None`` leaves it as it is.
      note: what else a reader should know.
    """

    name: str
    source: str
    pixels: str = "round"
    data_range: float = 255.0
    psnr_over: str = "item"
    mse_epsilon: float = 0.0
    root_epsilon: float = pixel_metrics.FLOAT32_EPSILON
    ssim_window: str = "uniform"
    ssim_pool_to: int | None = None
    weighting: str = "item"
    lpips: str = "vgg"
    fid: str = "torch-fidelity"
    fid_pixels: str = "round"
    fvd: str = "styleganv"
    short_side: int | None = None
    crop: int | None = None
    interpolation: str | None = None
    frames: int | None = None
    fps: float | None = None
    note: str = ""

    def psnr(self, reference: jax.Array, reconstruction: jax.Array) -> jax.Array:
        """PSNR of arrays in ``[0, data_range]`` (see `prepare`), ``(B,)``."""
        return pixel_metrics.psnr(
            reference,
            reconstruction,
            data_range=self.data_range,
            over=self.psnr_over,
            mse_epsilon=self.mse_epsilon,
            root_epsilon=self.root_epsilon,
        )

    def ssim(self, reference: jax.Array, reconstruction: jax.Array) -> jax.Array:
        """SSIM of arrays in ``[0, data_range]`` (see `prepare`), ``(B,)``."""
        side = min(reference.shape[-3:-1])
        pool = 1 if self.ssim_pool_to is None else max(1, round(side / self.ssim_pool_to))
        window = self.ssim_window
        return pixel_metrics.ssim(reference, reconstruction, data_range=self.data_range, window=window, pool=pool)

    def prepare(self, reference: jax.Array, reconstruction: jax.Array) -> tuple[jax.Array, jax.Array]:
        """uint8 reference and float [-1, 1] reconstruction (any shape) as float32 in ``[0, data_range]``."""
        scale = self.data_range / 255
        return jnp.asarray(reference, jnp.float32) * scale, levels(reconstruction, self.pixels) * scale

    def departures(self, shape: tuple[int, int, int]) -> list[str]:
        """Where clips of ``(T, H, W)`` differ from the published geometry; empty when they agree."""
        frames, height, width = shape
        found = []
        if self.crop is not None and (height, width) != (self.crop, self.crop):
            found.append(f"{height}x{width} pixels instead of {self.crop}x{self.crop}")
        if self.frames is not None and frames not in (1, self.frames):
            found.append(f"{frames} frames instead of {self.frames}")
        return found


def levels(pixels: jax.Array, how: str) -> jax.Array:
    """Float pixels in [-1, 1] as float32 in [0, 255], clipped; ``how`` is ``round``, ``truncate`` or ``float``."""
    values = (jnp.clip(jnp.asarray(pixels, jnp.float32), -1.0, 1.0) + 1.0) * 127.5
    if how == "round":
        return jnp.floor(values + 0.5)
    return jnp.floor(values) if how == "truncate" else values


PROTOCOLS: Mapping[str, Protocol] = MappingProxyType(
    {
        protocol.name: protocol
        for protocol in (
            Protocol(
                name="tokenbench",
                source="NVlabs/TokenBench, token_bench/metrics_cli.py and fvd.py",
                frames=None,
                note="Whole videos of at most 300 frames, the short side reduced to 1080 only when larger (Lanczos), "
                "one sample of FVD per video. The published numbers compare files that were re-encoded as mp4.",
            ),
            Protocol(
                name="predict1",
                source="nvidia-cosmos/cosmos-predict1, cosmos_predict1/tokenizer/training/metrics.py",
                psnr_over="frame",
                mse_epsilon=pixel_metrics.FLOAT32_EPSILON,
                root_epsilon=0.0,
                note="Validation metrics of the training code, which does not clip before the conversion to 8 bits: "
                "values outside [-1, 1] wrap around there and are clipped here.",
            ),
            Protocol(
                name="vidtok",
                source="microsoft/VidTok, scripts/inference_evaluate.py and vidtok/modules/util.py",
                pixels="float",
                data_range=1.0,
                psnr_over="frame",
                mse_epsilon=1e-8,
                root_epsilon=0.0,
                ssim_window="gaussian",
                ssim_pool_to=256,
                weighting="frame",
                short_side=256,
                crop=256,
                interpolation="bilinear",
                frames=17,
                fps=30.0,
                note="MCL-JCV. Non-causal models use clips of 16 frames. The authors' FVD code is not public.",
            ),
            Protocol(
                name="imagenet256",
                source="MiniMax-AI/VTP, tools (ImageNet validation, ADM centre crop)",
                pixels="float",
                data_range=255.0,
                ssim_window="gaussian",
                fid="pytorch-fid",
                fid_pixels="truncate",
                short_side=256,
                crop=256,
                interpolation="adm",
                note="rFID between folders of PNG files.",
            ),
            Protocol(
                name="titok",
                source="bytedance/1d-tokenizer, evaluator/evaluator.py",
                short_side=256,
                crop=256,
                interpolation="bicubic",
                note="The paper reports rFID, inception score and codebook usage.",
            ),
            Protocol(
                name="open-magvit2",
                source="TencentARC/SEED-Voken, evaluation_image.py",
                pixels="truncate",
                lpips="alex",
                fid="pytorch-fid",
                fid_pixels="float",
                fvd="videogpt",
                short_side=256,
                crop=256,
                note="LPIPS is reported with both trunks.",
            ),
        )
    }
)
