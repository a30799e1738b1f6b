"""What every family of tokenizers sends between devices, read from its compiled programs.

Parameters that are split come whole to where they are used, once. A split height sends the rows at its borders, sums of
statistics, and keys and values of attention; never an activation. Convolutions are compiled as accelerators get them:
what `nn/conv.py` makes of them for a CPU merges axes that the mesh splits.
"""

import importlib
import math

import jax
import jax.numpy as jnp
import pytest
import toys
from jax.sharding import PartitionSpec

from tokenizers import api, registry
from tokenizers.nn import conv
from tokenizers.parallel import mesh as meshes
from tokenizers.parallel import rules, traffic
from tokenizers.train import build, dryrun
from tokenizers.train.config import to_dict

VQ = {"name": "vq", "codebook_size": 16, "code_dim": 4}
LFQ = {"name": "lfq", "bits": 6}
FSQ = {"name": "fsq", "levels": (8, 5, 5)}
COMPVIS = {"latent_channels": 4, "widths": (8, 16), "blocks": 1, "num_groups": 4, "attention": ()}
VQGAN = {"latent_channels": 4, "z_channels": 4, "widths": (32, 32), "stem": 32, "blocks": 1, "attention": (1,)}
VIDTOK = {"bottleneck": FSQ, "latent_channels": 3, "channels": 4, "multipliers": (1, 1, 2), "blocks": 1}
VIDTOK |= {"space_down": (0, 1), "space_up": (1, 2), "time_down": (0, 1), "time_up": (1, 2)}
FIELDS = {
    "causal3d": {"bottleneck": FSQ, "latent_channels": 3, "channels": (8, 16), "patch": 2, "space_down": (True, False)},
    "cosmos": toys.COSMOS,
    "cvivit": {
        "bottleneck": LFQ | {"bit_order": "big", "entropy": "clamped"},
        "latent_channels": 6,
        "patch": (2, 4, 4),
        "width": 12,
        "spatial_depth": 1,
        "temporal_depth": 1,
        "heads": 3,
        "head_dim": 4,
    },
    "dvae": {
        "bottleneck": {"name": "gumbel", "codebook_size": 32, "code_dim": None, "project": False, "hard": False},
        "latent_channels": 32,
        "hidden": 8,
        "blocks": 1,
        "embed": 8,
    },
    "eqvae": COMPVIS,
    "flux_vae": COMPVIS,
    "ibq": VQGAN | {"bottleneck": {"name": "ibq", "codebook_size": 16, "code_dim": 4}},
    "ldm_kl": COMPVIS,
    "magvit": {
        "bottleneck": VQ,
        "latent_channels": 4,
        "widths": (32, 32),
        "time_levels": (0,),
        "encoder_blocks": 1,
        "decoder_blocks": 1,
    },
    "magvit2": {
        "family": "video-causal",
        "bottleneck": LFQ,
        "latent_channels": 6,
        "channels": 32,
        "multipliers": (1, 1),
        "blocks": 1,
        "time_levels": (0,),
    },
    "magvit2_pytorch": {
        "bottleneck": LFQ | {"bit_order": "big"},
        "latent_channels": 32,
        "layers": ("residual", "compress_space", "compress_time", "attend_space", "attend_time"),
        "channels": 8,
        "num_heads": 2,
        "head_dim": 4,
    },
    "maskgit_vqgan": {"bottleneck": VQ, "latent_channels": 4, "widths": (32, 32), "blocks": 1},
    "omnitokenizer": {
        "bottleneck": VQ,
        "latent_channels": 4,
        "patch": (2, 4, 4),
        "width": 8,
        "encoder_blocks": "tw",
        "decoder_blocks": "t",
        "temporal_depth": 1,
        "heads": 2,
        "head_dim": 4,
        "window": 2,
    },
    "titok": {
        "bottleneck": VQ,
        "latent_channels": 4,
        "tokens": 8,
        "input_size": (64, 8),
        "patch": 4,
        "encoder": (16, 1, 2),
        "decoder": (24, 2, 2),
    },
    "vavae": COMPVIS,
    "vidtok": VIDTOK | {"time": "causal"},
    "vitok": {"latent_channels": 4, "patch": (1, 4, 4), "encoder": (24, 1, 2), "decoder": (24, 2, 2)},
    "vqgan": VQGAN | {"bottleneck": VQ},
    "vqvae": {"bottleneck": VQ, "latent_channels": 4, "channels": 8, "blocks": 1, "block_channels": 4},
    "vtp": {"latent_channels": 4, "encoder": (24, 1, 2), "decoder": (24, 2, 2), "clip": False},
}

# Layers of attention over a frame in the encoder and in the decoder, and the width of their keys. Queries stay where
# they are and see every position, so each layer gathers its keys and values: two arrays (batch, frames, positions,
# width), which are the whole bill. All sit on the grid of latents here.
ATTENTION = {
    "cosmos": (1, 1, 16),
    "cvivit": (1, 1, 12),
    "eqvae": (1, 1, 16),
    "flux_vae": (1, 1, 16),
    "ibq": (2, 3, 32),
    "ldm_kl": (1, 1, 16),
    "omnitokenizer": (1, 1, 8),
    "vavae": (1, 1, 16),
    "vidtok": (1, 1, 8),
    "vqgan": (2, 3, 32),
}

# What does not follow the rule of a split height: why, and layers and width of encoder and decoder, whose tokens
# (batch, frames, positions, width) bound what is sent: twice per layer, and once before and after all of them.
EXCEPTIONS = {
    "magvit2_pytorch": ("learned keys stand before those of the frame, and all are moved by that many", (1, 8), (1, 8)),
    "titok": ("tokens of the image and of the code are one sequence, which has no height", (1, 16), (2, 24)),
    "vitok": ("its tokens are a sequence of any length: rows stay together, but a layer sees none", (1, 24), (2, 24)),
    "vtp": ("the class token makes a sequence of odd length, which nothing divides", (1, 24), (2, 24)),
}

BATCH = 4
ROWS = 16  # of latents: four per device, more than the border of any kernel here
QUICK = ("causal3d", "vqvae")
FAMILIES = [pytest.param(name, marks=() if name in QUICK else pytest.mark.slow) for name in registry.systems()]


@pytest.fixture(autouse=True)
def native(monkeypatch):
    """Convolutions as TPU and GPU get them."""
    convolve = conv.convolve
    monkeypatch.setattr(conv, "convolve", lambda *args, **options: convolve(*args, **options | {"lowering": "native"}))


def programs(module, sizes, split="height", frames=None):
    """Encoder and decoder of a tokenizer, compiled for a mesh of so many devices; variables and latents of both."""
    mesh = meshes.make_mesh(**sizes, split=split, devices=jax.devices()[: math.prod(sizes.values())])
    spec = module.spec
    time, height, width = spec.compression
    clip = (frames or (1 + 2 * time if spec.first_frame_alone else 2 * time),) if spec.video else ()
    shape = (BATCH, *clip, ROWS * height, 2 * width, 3)
    with jax.set_mesh(mesh):
        variables = registry.abstract_variables(module)
        variables = jax.tree.map(placed, variables, rules.shardings(variables, mesh, smallest=1))
        pixels = placed(jax.ShapeDtypeStruct(shape, jnp.float32), meshes.batch_sharding(mesh))
        encode = api._encode.lower(module, variables, pixels).compile()
        encoding = jax.eval_shape(lambda *args: api._encode(module, *args), variables, pixels)
        latents = placed(encoding.latents, encode.output_shardings.latents)
        decode = api._decode.lower(module, variables, None, latents).compile()
    return encode, decode, variables, encoding


def placed(leaf, sharding):
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)


def beyond_losses(compiled, encoding):
    """What a program sends; the encoder besides sums the losses of the bottleneck, one number each."""
    found = traffic.transfers(compiled)
    sums = [t for t in found if t.kind == "all-reduce" and not any(t.shapes)]
    assert sum(t.size for t in sums) <= 4 * len(encoding.losses), sums
    return [t for t in found if t not in sums]


def test_every_family_is_here():
    ours = [name for name, module in registry.systems().items() if module.__name__.startswith("tokenizers.models.")]
    assert sorted(FIELDS) == sorted(ours)
    assert not set(ATTENTION) & set(EXCEPTIONS)


@pytest.mark.parametrize("name", FAMILIES)
def test_a_split_batch_sends_nothing(name):
    encode, decode, _, encoding = programs(registry.build(name, **FIELDS[name]), {"data": 4})
    assert beyond_losses(encode, encoding) == []
    assert traffic.transfers(decode) == []


@pytest.mark.parametrize("name", FAMILIES)
def test_split_parameters_are_gathered_once_and_nothing_else(name):
    encode, decode, variables, encoding = programs(registry.build(name, **FIELDS[name]), {"data": 1, "fsdp": 4})
    total = 0
    for program in (encode, decode):
        found = beyond_losses(program, encoding)
        assert {t.kind for t in found} == {"all-gather"}, found
        total += sum(t.size * t.times for t in found)
    split = sum(4 * leaf.size for leaf in jax.tree.leaves(variables) if "fsdp" in leaf.sharding.spec)
    # Less where a parameter serves training alone, more where the decoder reads one of the encoder's.
    assert 0.95 < total / split < 1.05, (total, split)


@pytest.mark.parametrize("name", FAMILIES)
def test_a_split_height_sends_borders_and_never_activations(name):
    module = registry.build(name, **FIELDS[name])
    encode, decode, variables, encoding = programs(module, {"data": 1, "context": 4})
    positions = BATCH * ROWS * 2 * math.prod(encoding.latents.shape[1:-3])
    for program, index in ((encode, 0), (decode, 1)):
        found = beyond_losses(program, encoding)
        if name in EXCEPTIONS:
            layers, width = EXCEPTIONS[name][1 + index]
            tokens = positions + 8 * BATCH * 3  # and at most eight more per image
            gathered = sum(t.size * t.times for t in found if t.kind in ("all-gather", "all-to-all"))
            assert gathered <= 4 * tokens * width * (2 * layers + 2), (gathered, found)
        else:
            layers, width = ATTENTION.get(name, (0, 0, 0))[index], ATTENTION.get(name, (0, 0, 0))[2]
            found = borders_and_statistics(found, variables, -3)
            assert {t.kind for t in found} <= {"all-gather"}, found
            assert sum(t.size * t.times for t in found) == 2 * layers * 4 * positions * width, found
            assert any("context_height" in str(s.spec) for s in jax.tree.leaves(program.output_shardings))


def statistic(shape, largest):
    """(batch, channels) or (batch, frames, channels), with axes of one element where an activation has its grid."""
    return sum(size > 1 for size in shape) <= 3 and math.prod(shape) <= largest


def borders_and_statistics(found, variables, axis, border=3):
    """What is left of transfers without the borders of kernels and the sums of norms."""
    widest = max(leaf.shape[-1] for leaf in jax.tree.leaves(variables) if leaf.ndim)
    left = []
    for transfer in found:
        if transfer.kind == "collective-permute" and all(shape[axis] <= border for shape in transfer.shapes):
            continue
        if transfer.kind == "all-reduce" and all(statistic(shape, BATCH * 17 * widest) for shape in transfer.shapes):
            continue
        left.append(transfer)
    return left


# Without a first frame of its own, a clip has as many frames as one likes.
EVEN = {
    "magvit": FIELDS["magvit"],
    "vidtok noncausal": VIDTOK | {"time": "noncausal"},
}


@pytest.mark.slow
@pytest.mark.parametrize("name", EVEN)
def test_a_split_time_sends_borders(name):
    module = registry.build(name.split()[0], **EVEN[name])
    frames = 8 * module.spec.compression[0]
    encode, decode, variables, encoding = programs(module, {"data": 1, "context": 2}, "time", frames)
    for program in (encode, decode):
        found = borders_and_statistics(beyond_losses(program, encoding), variables, -4)
        assert found == []
        assert any("context_time" in str(s.spec) for s in jax.tree.leaves(program.output_shardings))


# Not among them: vidtok fills clips up to whole latents, and magvit2_pytorch puts zeros in front, so that some of their
# levels have an even number of frames. Those are split, and gathered again.
ODD = ("causal3d", "cosmos", "cvivit", "magvit2", "omnitokenizer")


@pytest.mark.slow
@pytest.mark.parametrize("name", ODD)
def test_an_odd_number_of_frames_is_not_split(name):
    """1 + 4 k frames: every device computes all of them, and nothing is sent."""
    module = registry.build(name, **FIELDS[name])
    encode, decode, _, encoding = programs(module, {"data": 1, "context": 2}, "time")
    assert traffic.transfers(encode) == traffic.transfers(decode) == []
    assert encode.output_shardings.latents.spec == PartitionSpec()


# --- steps of training


# Height and width of the pixels; elements of the keys of attention on a device; what a split height gathers besides.
STEPS = {
    "vqgan_imagenet_f16_1024": (
        (32, 16),
        4 * 128 * 32,
        # The discriminator's last convolutions leave an odd number of rows.
        {(4, 8, 3, 32)},
    ),
    "quickstart": ((128, 16), 0, {(20, 32, 3, 128)}),  # likewise
    "vitok_image": ((128, 16), 4 * 32 * 48, set()),
    "vqvae_imagenet": (
        (64, 16),
        0,
        # The compiler knows no split gradient of the kernel of a transposed convolution: its input and the gradient of
        # its output come whole. The moving averages of a codebook see rows of all images and places in one.
        {(4, 64, 16, 3), (4, 32, 8, 8), (4, 16, 4, 16), (4, 16, 4, 64), (4, 16, 4)},
    ),
}
QUICK_STEPS = ("vqvae_imagenet",)
ALL_STEPS = [pytest.param(name, marks=() if name in QUICK_STEPS else pytest.mark.slow) for name in STEPS]


def step(name, **mesh):
    """(compiled step of the small form of a config, what it trains)."""
    config = importlib.import_module(f"configs.{name}").get_config("smoke")
    config.precision = "float32"
    if "video" in config.data.streams:
        del config.data.streams["image"]
    for stream in config.data.streams.values():
        stream.update({"batch_size": 8, "resolutions": (STEPS[name][0],)})
    config.mesh.update({"smallest": 1, "data": 1, **mesh})
    (program,) = dryrun.compile_steps(config)
    recipe = build.recipe(dryrun.compilable(to_dict(config)))
    state = jax.eval_shape(recipe.initialize)
    return program, jax.tree.leaves((state.params, state.model_state, state.adversary and state.adversary.params))


def foreign(program, parameters):
    """Arrays that are neither parameters nor statistics, as (kind, shape)."""
    known = {tuple(sorted(size for size in leaf.shape if size > 1)) for leaf in parameters}
    known |= {tuple(sorted(size for size in leaf.shape[1:] if size > 1)) for leaf in parameters}  # of scanned layers
    widest = max(leaf.shape[-1] for leaf in parameters if leaf.ndim)
    arrays = {(transfer.kind, shape) for transfer in program.transfers for shape in transfer.shapes}

    def is_known(shape):
        small = statistic(shape, 8 * 5 * widest) and shape not in GRIDS
        return tuple(sorted(size for size in shape if size > 1)) in known or small

    return {(kind, shape) for kind, shape in arrays if kind == "collective-permute" or not is_known(shape)}


GRIDS = {(4, 16, 4)}  # of indices, as small as statistics are


@pytest.mark.slow
@pytest.mark.parametrize("name", STEPS)
def test_a_step_over_a_split_batch_sums_gradients(name):
    program, parameters = step(name, data=8)
    assert program.traffic.keys() == {"all-reduce"}
    assert foreign(program, parameters) == set()


@pytest.mark.parametrize("name", ALL_STEPS)
def test_a_step_with_split_parameters_gathers_them(name):
    program, parameters = step(name, fsdp=8)
    assert program.traffic.keys() == {"all-gather", "all-reduce"}
    assert foreign(program, parameters) == set()
    # Once, or twice where the discriminator sees a reconstruction of its own; see docs/gan_training.md.
    size = sum(4 * leaf.size for leaf in parameters)
    assert 0.9 < program.traffic["all-gather"] / size < 2


@pytest.mark.slow
@pytest.mark.parametrize("name", STEPS)
def test_a_step_over_a_split_height_sends_borders(name):
    program, parameters = step(name, data=2, context=4)
    _, keys, exceptions = STEPS[name]
    found = foreign(program, parameters)
    borders = {(kind, shape) for kind, shape in found if kind == "collective-permute" and shape[-3] <= 3}
    assert borders or name == "vitok_image"  # a sequence has none
    left = {(kind, shape) for kind, shape in found - borders if math.prod(shape) != keys}
    assert left == {("all-gather", shape) for shape in exceptions}
