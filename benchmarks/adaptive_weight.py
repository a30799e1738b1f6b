"""Counts what VQGAN's adaptive weight costs: floating-point operations of the generator's gradient, compiled.

    python benchmarks/adaptive_weight.py [--size 32] [--channels 64]

Next to a weight that is known beforehand: the cotangent form of `tokenizers.losses.balance`, and the usual form with
one backward pass per loss. Operation counts do not depend on the machine.
"""

import argparse
import pathlib
import sys

import jax
import jax.numpy as jnp

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))

from tokenizers import registry  # noqa: E402
from tokenizers.discriminators.patchgan import patchgan_2d  # noqa: E402
from tokenizers.losses import adversarial, balance  # noqa: E402


def gradients(model, discriminator, judge, pixels, weighting):
    """A function of the parameters: the generator's gradient with the weight chosen by ``weighting``."""

    def run(params):
        def generate(params):
            return model.apply({"params": params}, pixels)[0], jnp.zeros(())

        def reconstruction_loss(y):
            return jnp.abs(y - pixels).mean()

        def fooling_loss(y):
            return adversarial.linear_generator(discriminator.apply(judge, y))

        if weighting is None:  # one backward pass per loss
            first = jax.grad(lambda p: reconstruction_loss(generate(p)[0]))(params)
            second = jax.grad(lambda p: fooling_loss(generate(p)[0]))(params)
            last = [balance.parameter(grads, model.spec.last_layer) for grads in (first, second)]
            ratio = jnp.linalg.norm(last[0]) / (jnp.linalg.norm(last[1]) + 1e-4)
            return jax.tree.map(lambda a, b: a + ratio * b, first, second)
        (y, auxiliary), pull = jax.vjp(generate, params)
        return balance.balanced_pull(
            pull,
            weighting,
            weighting.init(y),
            reconstruction=jax.grad(reconstruction_loss)(y),
            gan=jax.grad(fooling_loss)(y),
            last_layer=model.spec.last_layer,
            active=1.0,
            auxiliary=auxiliary,
        )[0]

    return run


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=int, default=32, help="height and width of the pixels")
    parser.add_argument("--channels", type=int, default=64, help="channels of the tokenizer's first level")
    options = parser.parse_args()
    model = registry.build("causal3d", channels=(options.channels, 2 * options.channels))
    discriminator = patchgan_2d(32, 2, norm="group")
    pixels = jnp.zeros((1, 5, options.size, options.size, 3))
    params = registry.abstract_variables(model)["params"]
    judge = discriminator.init(jax.random.key(0), pixels)

    def flops(weighting):
        run = gradients(model, discriminator, judge, pixels, weighting)
        return jax.jit(run).lower(params).compile().cost_analysis()["flops"]

    known = flops(balance.constant_weight())
    print(f"{'weight':34} {'GFLOP':>8} {'ratio':>6}")
    for name, weighting in (
        ("known beforehand", balance.constant_weight()),
        ("adaptive, cotangent form (ours)", balance.adaptive_weight()),
        ("adaptive, two backward passes", None),
    ):
        count = flops(weighting)
        print(f"{name:34} {count / 1e9:8.3f} {count / known:6.2f}")


if __name__ == "__main__":
    main()
