"""The table of tokenizers: every name builds, describes itself, and can be written down and built again."""

import jax
import jax.numpy as jnp
import pytest
import toys

import tokenizers
from tokenizers import convert, quantize, registry
from tokenizers.generators import generator

each_variant = pytest.mark.parametrize("name", registry.available())


def test_names_are_sorted_and_there_are_some():
    names = tokenizers.available()
    assert isinstance(names, tuple)
    assert names == tuple(sorted(names))
    assert names


@each_variant
def test_description_is_that_of_the_model(name):
    facts, spec = tokenizers.describe(name), registry.build(name).spec
    assert facts["compression"] == spec.compression
    assert (facts["codebook_size"], facts["latent_channels"]) == (spec.codebook_size, spec.latent_channels)
    assert facts["paper"].startswith("https://")
    assert facts["license"]
    assert facts["parameters"] > 0
    assert isinstance(facts["causal"], bool)


def test_parameters_are_counted_without_making_them():
    made = sum(leaf.size for leaf in jax.tree.leaves(toys.causal().params))
    assert registry.parameter_count(toys.causal().module) == made


@each_variant
def test_all_fields_of_a_variant_can_be_written_and_built_again(name):
    module = registry.build(name)
    assert registry.build(registry.system_of(name), **registry.fields_of(module)) == module


@pytest.mark.parametrize("bottleneck", quantize.BOTTLENECKS)
def test_all_fields_of_a_bottleneck_can_be_written_and_built_again(bottleneck):
    needed = {
        "fsq": {"levels": (5, 5, 5)},
        "vq": {"codebook_size": 8, "code_dim": 4},
        "lfq": {"bits": 4},
        "gumbel": {"codebook_size": 8},
        "gumbel_nearest": {"codebook_size": 8},
        "bsq": {"bits": 9},
        "ibq": {"codebook_size": 8, "code_dim": 4},
        "simvq": {"codebook_size": 8, "code_dim": 4},
        "residual": {"layers": ({"name": "fsq", "levels": (5, 5)}, {"name": "fsq", "levels": (3, 3)})},
        "grouped": {"groups": ({"name": "lfq", "bits": 2}, {"name": "lfq", "bits": 2})},
    }
    described = {"name": bottleneck, **needed.get(bottleneck, {})}
    module = registry.build("causal3d", bottleneck=described).bottleneck
    written = {"name": bottleneck, **registry.fields_of(module)}
    assert registry.build("causal3d", bottleneck=written).bottleneck == module


def test_a_config_file_says_the_same_as_python():
    python = registry.build("causal3d", dtype=jnp.bfloat16, **toys.CAUSAL, **toys.DISCRETE)
    lists = {key: list(value) if isinstance(value, tuple) else value for key, value in toys.CAUSAL.items()}
    read = {"dtype": "bfloat16", "bottleneck": {"name": "fsq", "levels": [5, 5, 5]}, "latent_channels": 3}
    assert registry.build("causal3d", **lists, **read) == python
    assert hash(python) == hash(registry.build("causal3d", **lists, **read))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: tokenizers.create("causal3d-fsq-488-1677721"), "unknown tokenizer .* Did you mean 'causal3d-fsq-488"),
        (lambda: tokenizers.describe("cosal"), "unknown variant 'cosal'"),
        (lambda: registry.build("causal3d", channel=(8,)), "unknown field of causal3d 'channel'. Did you mean 'chan"),
        (lambda: registry.build("causal3d", bottleneck={"levels": (5,)}), "lacks its 'name'. Accepted: fsq"),
        (lambda: registry.build("causal3d", bottleneck={"name": "fsk"}), "unknown bottleneck 'fsk'. Did you mean 'fsq"),
        (lambda: registry.build("causal3d", bottleneck={"name": "fsq", "level": 3}), "Did you mean 'levels'"),
    ],
)
def test_wrong_names_get_the_nearest_right_one(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_conversion_files_of_networks_are_no_systems():
    assert {"lpips", "inception", "i3d", "engine", "files"}.isdisjoint(convert.systems())
    assert set(convert.systems()) <= set(registry.systems()) | set(generator.systems())
