"""Latents on disk: what is written is what the tokenizer says, whatever was interrupted; what is read depends on k."""

import dataclasses
import functools
import json

import jax
import numpy as np
import pytest
import toys

import tokenizers
from tokenizers import registry
from tokenizers.data import latents as stored
from tokenizers.data.pipeline import Pipeline
from tokenizers.generation.latents import Coder, extract

SIZE = (16, 16)


def pictures(batch_size=8, items=44):
    config = {"source": "shapes", "drawings": items, "streams": {"image": {"resolutions": (SIZE,)}}}
    config["streams"]["image"]["batch_size"] = batch_size
    return Pipeline(config, split="once")


@functools.cache
def coder(kind="continuous"):
    return Coder(toys.image(kind), SIZE)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return extract(coder(), pictures(), tmp_path_factory.mktemp("latents") / "made", shard_items=16)


def everything(folder, copy):
    return folder.shards.read(range(len(folder)), np.full(len(folder), copy))


def test_every_item_and_its_mirrored_copy_are_there_once(folder):
    assert folder.about["shards"] == 3  # two batches of eight each, the last with twelve of the 44 items
    assert (len(folder), folder.shape, folder.classes) == (44, (4, 4, 2), 64)
    plain = Coder(toys.image("continuous"), SIZE, "mean")
    mean = extract(plain, pictures(), folder.path.parent / "mean", shard_items=1000)
    with pictures(44).batches() as batches:
        batch = next(batches)
    shown = batch["pixels"][:, 0]
    np.testing.assert_array_equal(folder.shards.labels, batch["label"])
    # Eight devices and one: the same, up to the order of sums.
    np.testing.assert_allclose(everything(mean, 0), toys.image("continuous").encode(shown).latents, atol=1e-5)
    turned = toys.image("continuous").encode(shown[:, :, ::-1]).latents
    np.testing.assert_allclose(everything(mean, 1), turned, atol=1e-5)
    # A sample is as far from the mean as the posterior says.
    spread = np.exp(0.5 * np.asarray(toys.image("continuous").encode(shown).logvar))
    deviations = (everything(folder, 0) - everything(mean, 0)) / spread
    np.testing.assert_allclose([deviations.mean(), deviations.std()], [0, 1], atol=0.1)
    assert np.abs(everything(folder, 1) - everything(mean, 1)).min() > 0


def test_samples_do_not_depend_on_the_batch(folder, tmp_path):
    other = extract(coder(), pictures(batch_size=4), tmp_path / "other", shard_items=1000)
    for copy in (0, 1):
        np.testing.assert_allclose(everything(other, copy), everything(folder, copy), atol=1e-5)


def test_statistics_are_those_of_all_vectors(folder, tmp_path):
    vectors = everything(folder, 0).reshape(-1, 2).astype(np.float64)
    found = folder.statistics
    np.testing.assert_allclose(found.mean, vectors.mean(0), rtol=1e-5)
    np.testing.assert_allclose(found.std, vectors.std(0, ddof=1), rtol=1e-5)
    np.testing.assert_array_equal(found.low, vectors.min(0).astype(np.float32))
    np.testing.assert_array_equal(found.high, vectors.max(0).astype(np.float32))
    normal = found.normalize(vectors)
    np.testing.assert_allclose([normal.mean(), normal.std(ddof=2)], [0, 1], atol=1e-3)
    np.testing.assert_allclose(found.restore(normal), vectors, atol=1e-5)
    few = stored.Statistics.of(folder.shards, 10)
    assert np.abs(few.mean - found.mean).min() > 0


def test_an_interrupted_extraction_goes_on(folder, tmp_path):
    target = tmp_path / "latents"
    extract(coder(), pictures(), target, shard_items=16)
    about = json.loads((target / stored.ABOUT).read_text())
    for key in ("complete", "items", "classes"):
        del about[key]
    (target / stored.ABOUT).write_text(json.dumps(about))  # as it was before the last shard was there
    lost, kept = stored.shard(target, 1), stored.shard(target, 2)
    lost.unlink()
    lost.with_name(lost.name + ".partial").write_bytes(b"half a shard")
    before = kept.stat().st_mtime_ns
    with pytest.raises(ValueError, match="not complete"):
        stored.LatentFolder(target)
    again = extract(coder(), pictures(), target, shard_items=16)
    assert kept.stat().st_mtime_ns == before
    assert sorted(path.name for path in target.iterdir()) == sorted(path.name for path in folder.path.iterdir())
    for copy in (0, 1):
        np.testing.assert_array_equal(everything(again, copy), everything(folder, copy))
    assert again.digest == folder.digest
    before = lost.stat().st_mtime_ns
    extract(coder(), pictures(), target, shard_items=16)  # complete: nothing is done again
    assert lost.stat().st_mtime_ns == before


def test_a_folder_of_other_latents_is_refused(folder, tmp_path):
    variables = jax.tree.map(lambda leaf: leaf * 1.01, toys.image("continuous").variables)
    trained = Coder(type(toys.image())(toys.image("continuous").module, variables, "patches-continuous", {}), SIZE)
    for other, data, options in (
        (trained, pictures(), {}),
        (coder(), pictures(items=45), {}),
        (coder(), pictures(), {"flip": False}),
        (Coder(toys.image("continuous"), SIZE, "mean"), pictures(), {}),
    ):
        with pytest.raises(ValueError, match="made in another way.*choose a new folder"):
            extract(other, data, folder.path, shard_items=16, **options)
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match=r"not empty and holds no latents\.json"):
        extract(coder(), pictures(), tmp_path)
    with pytest.raises(ValueError, match="Extract them first"):
        stored.LatentFolder(tmp_path)


def pipeline(folder, **options):
    config = {"path": str(folder.path), "batch_size": 8} | options.pop("config", {})
    return stored.LatentPipeline(config, **options)


def test_batch_k_is_a_function_of_seed_and_k(folder):
    whole = pipeline(folder, seed=3)
    with whole.batches() as batches:
        first = [next(batches) for _ in range(9)]
    with pipeline(folder, seed=3, config={"read_threads": 0, "prefetch": 0}).batches(start=5) as batches:
        later = [next(batches) for _ in range(4)]
    for got, wanted in zip(later, first[5:], strict=True):
        np.testing.assert_array_equal(got["latents"], wanted["latents"])
        np.testing.assert_array_equal(got["label"], wanted["label"])
    parts = [pipeline(folder, seed=3, process_index=i, process_count=2).batch(5) for i in (0, 1)]
    np.testing.assert_array_equal(np.concatenate([part["latents"] for part in parts]), first[5]["latents"])
    assert np.abs(pipeline(folder, seed=4).batch(5)["latents"] - first[5]["latents"]).max() > 0
    fingerprints = {
        pipeline(folder, **options).fingerprint
        for options in ({}, {"seed": 1}, {"config": {"flip": False}}, {"config": {"batch_size": 4}})
    }
    assert len(fingerprints) == 4
    assert pipeline(folder, config={"prefetch": 1}).fingerprint == pipeline(folder).fingerprint


def test_an_epoch_has_every_item_once_mirrored_or_not(folder):
    data = pipeline(folder, config={"batch_size": 11})
    copies = [folder.statistics.normalize(everything(folder, copy)) for copy in (0, 1)]
    seen, mirrored = [], 0
    for number in range(4):
        batch = data.batch(number)
        for row, label in zip(batch["latents"], batch["label"], strict=True):
            found = [(copy, i) for copy in (0, 1) for i in np.flatnonzero((copies[copy] == row).all(axis=(1, 2, 3)))]
            ((copy, item),) = found
            assert folder.shards.labels[item] == label
            seen.append(item)
            mirrored += copy
    assert sorted(seen) == list(range(44))
    assert 10 < mirrored < 34
    plain = pipeline(folder, config={"flip": False}).batch(0)["latents"]
    assert all(any(np.array_equal(row, item) for item in copies[0]) for row in plain)


def test_bfloat16_is_half_the_size_and_without_labels_there_is_no_class(tmp_path):
    data = {"source": "embedded", "streams": {"image": {"resolutions": (SIZE,), "batch_size": 32}}}
    folders = [
        extract(coder(), Pipeline(data, split="held_out"), tmp_path / dtype, dtype=dtype, flip=False)
        for dtype in stored.DTYPES
    ]
    assert [found.classes for found in folders] == [0, 0]
    values = [everything(found, 0) for found in folders]
    np.testing.assert_allclose(values[1], values[0], rtol=2**-8)
    assert np.abs(values[1] - values[0]).max() > 0
    no_flip = {"config": {"flip": False}}
    np.testing.assert_array_equal(pipeline(folders[0], **no_flip).batch(0)["label"], np.zeros(8))
    with pytest.raises(ValueError, match="lacks; extract it with flip"):
        pipeline(folders[0])
    with pytest.raises(ValueError, match="Did you mean 'batch_size'"):
        pipeline(folders[0], config={"flip": False, "batchsize": 3})


@pytest.mark.slow
@pytest.mark.parametrize("system", sorted(registry.systems()))
def test_every_system_has_maps_of_latents(system):
    """In shapes alone: a picture becomes a map, and a map a picture."""
    name = next(iter(registry.systems()[system].VARIANTS), system)
    module = registry.build(name)
    tokenizer = tokenizers.Tokenizer(module, registry.abstract_variables(module), name, {})
    size = getattr(module, "input_size", None) or (256, 256)
    if getattr(module, "text", None) is not None:
        with pytest.raises(ValueError, match="reads captions"):
            Coder(tokenizer, size)
        return
    coded = Coder(tokenizer, size)
    assert coded.shape[-1] == module.spec.latent_channels
    latents = jax.ShapeDtypeStruct((2, *coded.shape), np.float32)

    def decode(variables, array):
        coded.tokenizer = dataclasses.replace(tokenizer, variables=variables)
        return coded.decode(array)

    assert jax.eval_shape(decode, tokenizer.variables, latents).shape == (2, *size, 3)


def test_any_tokenizer_makes_maps_and_takes_them_back():
    shown = np.random.default_rng(0).integers(0, 256, (2, *SIZE, 3), np.uint8)
    for tokenizer, shape, snaps in (
        (toys.image("grid"), (4, 4, 3), True),
        (toys.image("tokens"), (1, 16, 3), True),
        (toys.causal(), (4, 4, 3), True),
        (toys.image("continuous"), (4, 4, 2), False),
    ):
        coded = Coder(tokenizer, SIZE, "mean")
        assert (coded.shape, coded.snaps) == (shape, snaps)
        latents = coded.encode(shown, np.arange(2))
        assert latents.shape == (2, *shape)
        restored = np.asarray(coded.decode(latents))
        wanted = np.asarray(tokenizer.reconstruct(shown))
        np.testing.assert_array_equal(restored, np.round((np.clip(wanted, -1, 1) + 1) * 127.5).astype(np.uint8))
        # What is near a code becomes the code.
        moved = np.asarray(coded.decode(np.asarray(latents) * 0.98)).astype(int)
        assert (np.abs(moved - restored).max() == 0) == snaps
    with pytest.raises(ValueError, match=r"do not fit patches-grid; the nearest size is \(16, 20\)"):
        Coder(toys.image("grid"), (16, 18))
