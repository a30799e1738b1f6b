"""The evaluation loop: right numbers, padding that does not count, and the same result on any number of devices."""

import csv
import dataclasses
import functools
import json
import os
import pathlib
import socket
import subprocess
import sys

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import refweights

from tokenizers.evaluate import report, run
from tokenizers.evaluate.pictures import Sample, preview_grid, side_by_side, write_mp4
from tokenizers.networks import weights
from tokenizers.parallel.mesh import make_mesh
from tokenizers.types import Encoding, Spec


@dataclasses.dataclass(frozen=True)
class PatchTokenizer:
    """Patch means rounded to a lattice of colours: all that `evaluate` needs of a tokenizer, in thirty lines."""

    levels: int = 8
    discrete: bool = True
    name: str = "patches"

    @property
    def spec(self):
        size = self.levels**3 if self.discrete else None
        return Spec((2, 4, 4), 3, size, causal=True, video=True, last_layer="", first_frame_alone=True)

    def shard(self, mesh):
        return self

    @functools.partial(jax.jit, static_argnums=0)
    def encode(self, pixels):
        x = jnp.asarray(pixels, jnp.float32) / 127.5 - 1
        video = x if x.ndim == 5 else x[:, None]
        b, t, h, w, _ = video.shape
        video = jnp.pad(video, ((0, 0), (0, 0), (0, -h % 4), (0, -w % 4), (0, 0)), mode="edge")
        x = video.reshape(b, t, -(-h // 4), 4, -(-w // 4), 4, 3).mean((3, 5))
        x = jnp.concatenate([x[:, :1], x[:, 1:].reshape(b, t // 2, 2, *x.shape[2:]).mean(2)], axis=1)
        if not self.discrete:
            return Encoding(x if pixels.ndim == 5 else x[:, 0])
        cell = jnp.clip(jnp.floor((x + 1) / 2 * self.levels), 0, self.levels - 1)
        indices = (cell * self.levels ** jnp.arange(3)).sum(-1).astype(jnp.int32)
        codes = (cell + 0.5) / self.levels * 2 - 1
        return Encoding(codes, indices) if pixels.ndim == 5 else Encoding(codes[:, 0], indices[:, 0])

    @functools.partial(jax.jit, static_argnums=0)
    def decode(self, latents):
        x = latents if latents.ndim == 5 else latents[:, None]
        x = jnp.concatenate([x[:, :1], jnp.repeat(x[:, 1:], 2, axis=1)], axis=1)
        x = jnp.repeat(jnp.repeat(x, 4, axis=2), 4, axis=3)
        return x if latents.ndim == 5 else x[:, 0]


def pixels(name, shape):
    return np.floor((refweights.image_like(name, shape) + 1) * 127.5 + 0.5).astype(np.uint8)


IMAGES = pixels("images", (6, 1, 24, 32, 3))
CLIPS = pixels("clips", (5, 3, 16, 24, 3))
FAST = ("psnr", "ssim", "ms_ssim", "codebook", "bits", "latents")


def batches(size, process=0, processes=1):
    """Both streams, each process with its part of every batch, the last one filled up with rows that are not valid."""
    for name, data in (("images", IMAGES), ("clips", CLIPS)):
        for start in range(0, len(data), size * processes):
            indices = start + process * size + np.arange(size)
            valid = indices < len(data)
            filled = np.where(valid[:, None, None, None, None], data[np.minimum(indices, len(data) - 1)], np.uint8(77))
            yield {"pixels": filled, "valid": valid, "stream": name, "name": [f"{name}/{i}.png" for i in indices]}


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    folder = tmp_path_factory.mktemp("report")
    log = folder / "training.jsonl"
    log.write_text("".join(json.dumps({"step": s, "loss/total": 1 / s}) + "\n" for s in range(1, 9)))
    results = run.evaluate(
        PatchTokenizer(), batches(2), out_dir=folder, metrics=run.METRICS, training_log=log, title="A <test>"
    )
    return results, folder


def items(folder):
    return list(csv.DictReader((folder / "items.csv").read_text().splitlines()))


def comparable(results):
    """Everything but the clock, the devices and their number."""
    streams = {
        name: {
            key: value
            for key, value in found.items()
            if "per_second" not in key and key not in ("rfid", "lpips", "fvd")
        }
        for name, found in (results["streams"] | {"overall": results["overall"]}).items()
    }
    return {"streams": streams, "baselines": results["baselines"]}


def assert_same(actual, expected):
    # Other layouts sum float32 in another order.
    chex.assert_trees_all_equal_structs(actual, expected)
    for (path, a), (_, b) in zip(
        *(jax.tree_util.tree_leaves_with_path(tree) for tree in (actual, expected)), strict=True
    ):
        if isinstance(a, str):
            assert a == b, path
        else:
            np.testing.assert_allclose(a, b, rtol=2e-6, atol=1e-6, err_msg=str(path))


def test_numbers_are_those_of_a_direct_computation(alone):
    results, _ = alone
    tokenizer = PatchTokenizer()
    encoding = tokenizer.encode(IMAGES[:, 0])
    restored = np.floor((np.clip(tokenizer.decode(encoding.latents), -1, 1) + 1) * 127.5 + 0.5)
    mse = np.mean((restored - IMAGES[:, 0].astype(np.float64)) ** 2, axis=(1, 2, 3))
    images = results["streams"]["images"]
    np.testing.assert_allclose(images["psnr"], np.mean(20 * np.log10(255 / np.sqrt(mse))), atol=1e-4)
    assert images["items"] == 6
    assert images["bits_per_token"] == 9
    assert images["bits_per_pixel"] == 9 / 16
    counts = np.bincount(np.asarray(encoding.indices).ravel(), minlength=512)
    assert images["codebook_usage"] == np.mean(counts > 0)
    p = counts[counts > 0] / counts.sum()
    np.testing.assert_allclose(images["codebook_entropy"], -np.sum(p * np.log2(p)), rtol=1e-6)
    np.testing.assert_allclose(images["latents"]["std"], np.std(encoding.latents), rtol=1e-4)


def test_streams_and_overall_agree(alone):
    results, _ = alone
    assert list(results["streams"]) == ["images", "clips"]
    items = {name: found["items"] for name, found in results["streams"].items()}
    assert results["overall"]["items"] == sum(items.values()) == 11
    expected = np.average([found["psnr"] for found in results["streams"].values()], weights=list(items.values()))
    np.testing.assert_allclose(results["overall"]["psnr"], expected, rtol=1e-9)
    # a clip of 3 frames has 1 + 1 slices of tokens
    assert results["streams"]["clips"]["tokens"] == 5 * 2 * 4 * 6
    assert results["streams"]["clips"]["encode_frames_per_second"] > 0


def test_what_lacks_something_says_so(monkeypatch):
    monkeypatch.delenv(weights.VARIABLE, raising=False)
    results = run.evaluate(PatchTokenizer(), batches(3), baseline_items=0)
    images = results["streams"]["images"]
    assert images["ms_ssim"] == "not computed: needs at least 161 pixels on the shorter side, got 24x32"
    for metric in ("lpips", "rfid", "fvd", "inception_score"):
        assert images[metric].startswith("not computed: needs ")
    assert results["baselines"] == {"images": results["baselines"]["images"], "clips": results["baselines"]["clips"]}
    assert [row["name"] for row in results["baselines"]["images"]] == ["tokenizer"]
    assert "not computed: needs" in report.format_table(results)


def test_continuous_tokenizers_have_no_codebook_but_a_rate():
    results = run.evaluate(PatchTokenizer(discrete=False), batches(3), metrics=FAST, baseline_items=1)
    images = results["streams"]["images"]
    assert images["codebook_usage"] == "not computed: needs a codebook; the latents are continuous"
    assert images["bits_per_token"] == 48
    assert images["bits_note"] == "continuous latents, counted as 16 bits a channel"
    # All rows of the comparison are over the one item that the baselines coded.
    assert {row["items"] for row in results["baselines"]["images"]} == {1}


def test_batch_size_and_filling_do_not_matter(alone):
    other = run.evaluate(PatchTokenizer(), batches(4), metrics=FAST)
    expected = run.evaluate(PatchTokenizer(), batches(1), metrics=FAST)
    assert_same(comparable(other), comparable(expected))
    np.testing.assert_allclose(other["overall"]["psnr"], alone[0]["overall"]["psnr"], rtol=1e-6)


def test_eight_devices_give_the_numbers_of_one(tmp_path):
    folders = [tmp_path / "one", tmp_path / "eight"]
    options = {"metrics": FAST, "baseline_items": 2, "preview_items": 0}
    one = run.evaluate(PatchTokenizer(), batches(8), out_dir=folders[0], **options)
    mesh = make_mesh(data=4, fsdp=2)
    eight = run.evaluate(PatchTokenizer(), batches(3), mesh=mesh, out_dir=folders[1], **options)
    assert_same(comparable(eight), comparable(one))
    rows = [items(folder) for folder in folders]
    assert [row["item"] for row in rows[0]] == [row["item"] for row in rows[1]]
    for a, b in zip(*rows, strict=True):
        np.testing.assert_allclose(float(a["psnr"]), float(b["psnr"]), rtol=2e-6)


def test_sizes_that_do_not_fit_the_patches_are_scored_on_the_input(alone):
    odd = pixels("odd", (2, 1, 18, 21, 3))
    results = run.evaluate(PatchTokenizer(), [{"pixels": odd[:, 0]}], metrics=("psnr", "ssim", "bits"))
    assert results["streams"]["images"]["shapes"] == ["1x18x21"]
    assert results["streams"]["images"]["tokens"] == 2 * 5 * 6
    assert results["streams"]["images"]["psnr"] > 15


def test_the_report_has_all_its_files(alone):
    import av
    from PIL import Image

    results, folder = alone
    stored = json.loads((folder / "metrics.json").read_text())
    assert stored["streams"]["images"]["psnr"] == results["streams"]["images"]["psnr"]
    rows = items(folder)
    assert [(row["item"], row["name"]) for row in rows][4:7] == [
        ("4", "images/4.png"),
        ("5", "images/5.png"),
        ("0", "clips/0.png"),
    ]
    with Image.open(folder / "preview.png") as picture:
        assert picture.width > 500
    with av.open(str(folder / "reconstruction.mp4")) as video:
        assert sum(1 for _ in video.decode(video=0)) == 5 * 3
    page = (folder / "report.html").read_text()
    assert "A &lt;test&gt;" in page
    assert page.count("<img") == 1 + 6  # preview; two rate plots, PSNR, codes, spectrum, training
    for part in ("bicubic", "JPEG", "WebP", "reconstruction.mp4", "not computed: needs"):
        assert part in page


def test_the_table_shows_the_tokenizer_beside_the_baselines(alone):
    table = report.format_table(alone[0])
    lines = [line.split("  ")[0].strip() for line in table.splitlines()]
    assert lines[2:6] == ["tokenizer", "bicubic", "JPEG", "WebP"]
    assert "codebook usage" in table
    assert "0.5625" in table  # 9 bits over 16 pixels


def test_baselines_spend_no_more_bits_than_the_tokenizer(alone):
    for rows in alone[0]["baselines"].values():
        budget = rows[0]["bits_per_pixel"]
        for row in rows[1:]:
            assert row["bits_per_pixel"] <= budget * (1 + 1e-6) or "over the budget" in row["note"]


class FrontFilled(PatchTokenizer):
    """Pairs of frames, as they are; copies of the first frame go in front of an odd clip, and come out there."""

    @property
    def spec(self):
        return Spec((2, 1, 1), 6, None, causal=True, video=True, last_layer="", fills_front=True)

    def encode(self, pixels):
        clip = jnp.asarray(pixels, jnp.float32) / 127.5 - 1
        clip = jnp.concatenate([clip[:, :1]] * (clip.shape[1] % 2) + [clip], axis=1)
        return Encoding(jnp.concatenate([clip[:, ::2], clip[:, 1::2]], axis=-1))

    def decode(self, latents):
        return jnp.stack(jnp.split(latents, 2, axis=-1), axis=2).reshape(len(latents), -1, *latents.shape[2:-1], 3)


def test_frames_that_fill_the_front_are_not_scored():
    results = run.evaluate(FrontFilled(), [{"pixels": CLIPS}], metrics=("psnr",), baseline_items=0)
    assert results["overall"]["psnr"] > 100
    blocks = np.repeat(np.repeat(CLIPS, 2, axis=2), 2, axis=3)
    results = run.evaluate(FrontFilled(), [{"pixels": blocks}], metrics=("scale_equivariance",), baseline_items=0)
    assert results["overall"]["scale_psnr"] > 100


def test_wrong_requests_are_refused():
    with pytest.raises(ValueError, match="Did you mean 'tokenbench'"):
        run.evaluate(PatchTokenizer(), [], protocol="tokenbnch")
    with pytest.raises(ValueError, match="Did you mean 'psnr'"):
        run.evaluate(PatchTokenizer(), [], metrics=("psnrs",))
    with pytest.raises(ValueError, match=r"got float32 \(1, 8, 8, 3\)"):
        run.evaluate(PatchTokenizer(), [{"pixels": np.zeros((1, 8, 8, 3), np.float32)}])


def test_an_empty_data_set_is_no_error(tmp_path):
    results = run.evaluate(PatchTokenizer(), [], out_dir=tmp_path, metrics=("psnr", "bits"))
    assert results["overall"]["psnr"] == "not computed: needs at least one item"
    assert (tmp_path / "report.html").exists()


def test_pictures_keep_small_pixels_square_and_clips_even(tmp_path):
    row = {"item": 3, "tokens": 4, "bits_per_token": 8.0, "psnr": 20.0}
    sample = Sample("clips", row, CLIPS[0], CLIPS[1], {})
    assert preview_grid([sample], cell=40).height > 32  # 16 rows of pixels, doubled
    frames = side_by_side(sample, height=17)
    assert frames.shape == (3, 16 + 26, 24 * 2 + 4, 3)
    write_mp4(tmp_path / "odd.mp4", frames[:, :-1, :-1])
    assert (tmp_path / "odd.mp4").stat().st_size > 0


WORKER = """
import json, pathlib, sys
import jax
process, port, folder = int(sys.argv[1]), sys.argv[2], pathlib.Path(sys.argv[3])
jax.distributed.initialize(f"localhost:{port}", 2, process)
import test_evaluate_run as test
from tokenizers.evaluate import run
from tokenizers.parallel.mesh import make_mesh
results = run.evaluate(test.PatchTokenizer(), test.batches(2, process, 2), metrics=test.FAST,
                       baseline_items=3, mesh=make_mesh(data=2, fsdp=2), out_dir=folder / "report")
(folder / f"{process}.json").write_text(json.dumps(test.comparable(results)))
"""


def test_two_processes_give_the_numbers_of_one(tmp_path):
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    here = pathlib.Path(__file__).resolve().parent
    environment = os.environ | {
        "PYTHONPATH": f"{here.parent}{os.pathsep}{here}",
        "XLA_FLAGS": "--xla_force_host_platform_device_count=2 --xla_backend_optimization_level=0",
        "JAX_PLATFORMS": "cpu",
    }
    command = [sys.executable, "-c", WORKER]
    workers = [
        subprocess.Popen(
            [*command, str(i), str(port), str(tmp_path)], env=environment, stderr=subprocess.PIPE, text=True
        )
        for i in range(2)
    ]
    for worker in workers:
        _, errors = worker.communicate(timeout=240)
        assert worker.returncode == 0, errors[-3000:]
    found = [json.loads((tmp_path / f"{i}.json").read_text()) for i in range(2)]
    expected = comparable(run.evaluate(PatchTokenizer(), batches(2), metrics=FAST, baseline_items=3))
    for actual in found:
        assert_same(actual, json.loads(json.dumps(expected)))
    assert [row["name"] for row in items(tmp_path / "report")[:6]] == [f"images/{i}.png" for i in range(6)]
