"""VQGAN's training step on both sides, for `pytorch.py`.

L1, the bottleneck's loss, PatchGAN with hinge loss, the weight by the norms of the two gradients at the last layer,
Adam for generator and discriminator; one forward pass of the autoencoder, whose detached result the discriminator sees.
No perceptual network: both sides would need its weight file. Source: https://arxiv.org/abs/2012.09841, equation 7.
"""

import copy
import importlib

import jax
from training import Step

# The config of our recipe, by case.
RECIPES = {"kl-f8": "kl_f8", "vqgan": "vqgan_imagenet_f16_1024"}
RATE, BETAS, WEIGHT, KL, LARGEST = 1e-5, (0.5, 0.9), 0.5, 1e-6, 1e4


def _reconstruct(name, model, x):
    """(pixels, weighted loss of the bottleneck, the decoder's last kernel)."""
    if name == "kl-f8":
        posterior = model.encode(x).latent_dist
        return model.decode(posterior.sample()).sample, KL * posterior.kl().mean(), model.decoder.conv_out.weight
    codes, loss, _ = model["quantize"](model["quant_conv"](model["encoder"](x)))
    return model["decoder"](model["post_quant_conv"](codes)), loss, model["decoder"].conv_out.weight


def _discriminator():
    """PatchGAN of three layers, https://arxiv.org/abs/1611.07004, as VQGAN has it."""
    from torch import nn

    layers = [nn.Conv2d(3, 64, 4, 2, 1), nn.LeakyReLU(0.2)]
    for inputs, outputs, stride in ((64, 128, 2), (128, 256, 2), (256, 512, 1)):
        layers += [nn.Conv2d(inputs, outputs, 4, stride, 1, bias=False), nn.BatchNorm2d(outputs), nn.LeakyReLU(0.2)]
    return nn.Sequential(*layers, nn.Conv2d(512, 1, 4, 1, 1))


def _step(name, model, pixels):
    import torch
    from torch.nn import functional

    judge = _discriminator().to(pixels.device)
    generator_optimizer = torch.optim.Adam(model.parameters(), lr=RATE, betas=BETAS)
    judge_optimizer = torch.optim.Adam(judge.parameters(), lr=RATE, betas=BETAS)
    if pixels.is_contiguous(memory_format=torch.channels_last):
        judge = judge.to(memory_format=torch.channels_last)

    def run():
        restored, bottleneck, last = _reconstruct(name, model, pixels)
        reconstruction = (restored - pixels).abs().mean()
        adversarial = -judge(restored).mean()
        norms = [torch.autograd.grad(loss, last, retain_graph=True)[0].norm() for loss in (reconstruction, adversarial)]
        weight = (norms[0] / (norms[1] + 1e-4)).clamp(0, LARGEST).detach()
        generator_optimizer.zero_grad(set_to_none=True)
        (reconstruction + bottleneck + WEIGHT * weight * adversarial).backward()
        generator_optimizer.step()
        judge_optimizer.zero_grad(set_to_none=True)
        real, fake = judge(pixels), judge(restored.detach())
        (0.5 * (functional.relu(1 - real).mean() + functional.relu(1 + fake).mean())).backward()
        judge_optimizer.step()
        if pixels.is_cuda:
            torch.cuda.synchronize()

    return run


def steps(theirs, name, pixels, dtype):
    """``{mode: function that takes one step}`` of PyTorch; on a GPU in bfloat16 under autocast."""
    import torch

    device = "cuda" if torch.cuda.is_available() and jax.default_backend() == "gpu" else "cpu"
    images = 2 * torch.from_numpy(pixels[:, 0]).permute(0, 3, 1, 2).to(device, torch.float32) / 255 - 1
    found = {}
    for mode, layout in (("eager", torch.contiguous_format), ("channels last", torch.channels_last)):
        model = copy.deepcopy(theirs).to(device, memory_format=layout).train().requires_grad_(True)
        run = _step(name, model, images.contiguous(memory_format=layout))

        def automatic(run=run):
            with torch.autocast(device, torch.bfloat16, enabled=dtype == "bfloat16"):
                run()

        found[mode] = automatic
    return found


def ours(name, pixels, dtype):
    """A function that takes one step of our recipe without what the other side has not: LPIPS, moving average."""
    config = importlib.import_module(f"configs.{RECIPES[name]}").get_config()
    config.loss.update({"perceptual": None, "perceptual_weight": 0.0, "reduction": "mean"})
    config.optimizer.frozen = ()
    config.ema_decay = 0.0
    config.accumulate = 1
    config.discriminator.update({"start": 0, "generator_start": 0, "fresh_forward": False})
    config.precision = dtype
    return Step(config, lambda _: pixels.shape, pixels)
