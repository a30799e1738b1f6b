"""VQGAN (https://arxiv.org/abs/2012.09841) on faces (CelebA-HQ and FFHQ) at 256x256: 16x16 tokens out of 1,024.

    python train.py --config=configs/vqgan_faceshq_f16_1024.py --config.data.path=data/faceshq/train

The architecture and the losses of VQGAN on ImageNet; on these pictures, of which there are about 100,000, the authors
let the discriminator start earlier, at step 30,001, and take batches of 3. They do not say how long they trained; the
300,000 steps here are a guess. One GPU with 24 GB. LPIPS needs its weight files (docs/convert_weights.md).
"""

from configs import vqgan_imagenet_f16_1024


def get_config(arg=None):
    config = vqgan_imagenet_f16_1024.get_config(arg)
    config.model.name = "vqgan-faceshq-f16-1024"
    config.optimizer.lr = config.discriminator.optimizer.lr = 3 * 4.5e-6
    config.data.crop = "center"
    if arg != "smoke":
        config.steps = 300_000
        config.discriminator.start = config.discriminator.generator_start = 30_001
        config.data.update({"path": "data/faceshq/train", "held_out": "0.01"})
        config.data.streams.image.batch_size = 3
    return config
