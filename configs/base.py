"""The schema of every training config, with defaults. Each config file starts from `get_base` and changes fields.

All fields can be overridden on the command line: ``--config.optimizer.lr=1e-4``.
"""

from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder


def _changed(config: ConfigDict, changes: dict) -> ConfigDict:
    """The config with some fields changed; a field it does not have is refused, now and later."""
    config.lock()
    config.update(changes)
    return config


def optimizer(**changes) -> ConfigDict:
    """Fields of an optimizer (tokenizers/train/optim.py)."""
    config = ConfigDict()
    config.name = "adam"  # adam, adamw
    config.lr = 1e-4
    config.schedule = "constant"  # constant, cosine, linear, steps; cosine_all: warm-up is part of it (timm)
    config.warmup = 0  # steps of linear warm-up
    config.warmup_from = placeholder(float)  # fraction of lr at its first step; None = 1 / (warmup + 1)
    config.flat = 0  # steps between warm-up and fall (cosine, linear)
    config.drops = ()  # steps at which lr falls to a tenth (steps)
    config.end = 0.0  # fraction of lr at the last step (cosine, linear)
    config.b1 = 0.9
    config.b2 = 0.999
    config.eps = 1e-8
    config.weight_decay = 0.0
    config.decay = "kernels"  # what weight_decay acts on: kernels, all
    config.undecayed = ()  # regular expressions over parameter paths: of these, what it leaves alone
    config.clip = 1.0  # largest global gradient norm; 0 = no clipping
    config.frozen = ()  # regular expressions over parameter paths that stay as they are
    return _changed(config, changes)


def schedule(**changes) -> ConfigDict:
    """A number that changes with the step (tokenizers/train/schedules.py), an entry of ``config.schedules``."""
    config = ConfigDict()
    config.kind = "cosine"  # cosine, linear, exponential: from start to end; piecewise: straight lines between points
    config.start = 0.0
    config.end = 1.0
    config.steps = 1  # from start to end
    config.begin = 0  # steps before that
    config.points = ()  # (step, value) pairs of a piecewise one, or of what another one does before `begin`
    return _changed(config, changes)


def part(**changes) -> ConfigDict:
    """Parameters that come from another tokenizer at the start, an entry of ``config.init_parts``."""
    config = ConfigDict({"model": {"name": ""}})  # name and fields of that tokenizer
    config.path = ""  # its run or weight file; "" looks in $TOKENIZERS_WEIGHTS
    config.take = ()  # pairs (path of parameters there, path of parameters here)
    config.model.update(changes.pop("model"))
    return _changed(config, changes)


def stream(**changes) -> ConfigDict:
    """One kind of batch: fixed frame count and one or several fixed sizes (buckets)."""
    config = ConfigDict()
    config.frames = 1
    config.resolutions = ((64, 64),)  # (height, width) of each bucket
    config.batch_size = 16  # global
    config.weight = 1.0  # share of the steps
    config.source = ""  # of its own; "" = those above
    config.path = ""
    config.fps = 0.0  # 0 = the clip's own
    config.stride = 1
    config.sampling = "time"  # which frames: time (nearest in time), spread (VidTok's rule, tokenizers/data/decode.py)
    return _changed(config, changes)


def undamped(discriminator: ConfigDict) -> None:
    """What VQGAN and most papers after it have in place of the defaults that damp the discriminator's part."""
    discriminator.update({"norm": "batch", "ramp": 0, "weight": 0.8, "adaptive_max": 1e4, "lecam_weight": 0.0})


def data(**changes) -> ConfigDict:
    """Where batches come from (tokenizers/data/settings.py); each entry of ``streams`` is a `stream`."""
    config = ConfigDict()
    # embedded, shapes, images, videos, array_record, parquet, tar, captions, auto; "" = embedded unless path
    config.source = "auto"
    config.path = ""  # file or folder
    config.sources = ConfigDict()  # in place of source and path, a mixture: {name: {source, path, weight, held_out}}
    config.held_out = "0.02"  # for evaluation: a fraction of the above, or the path of another set; "" = none
    config.drawings = 10_000  # of source "shapes", for training; held_out says how many others there are
    config.labels = False  # classes of the items: the folders of images, or the labels in shards ("shapes" has them)
    config.virtual_camera = False  # make clips from photographs where a stream asks for several frames
    config.crop = "random"  # random, center; adm: ImageNet's for generators (tokenizers/data/transforms.py)
    config.zoom = (1.0, 1.0)  # range of random enlargement before the crop
    config.flip = True
    config.resample = "lanczos"
    config.workers = 0  # processes that decode; 0 = threads of this one
    config.read_threads = 2
    config.prefetch = 4
    config.streams = ConfigDict()
    config = _changed(config, changes)
    for free in (config.streams, config.sources):
        free.unlock()  # their names are free
    return config


def _locked(config: ConfigDict) -> ConfigDict:
    """From here on a misspelt field is refused, where fields are not free."""
    config.lock()
    schedules = (config.schedules.loss, config.schedules.model)
    models = (config.model, config.loss.tokens.model, config.init_parts)
    for free in (*models, config.loss.bottleneck, config.data.streams, config.data.sources, *schedules):
        free.unlock()
    return config


def get_pretraining_base() -> ConfigDict:
    """`get_base` for models that understand (tokenizers/train/pretraining.py), with VTP's objectives and weights.

    VTP is https://arxiv.org/abs/2512.13687; what it leaves open is ours, mostly after DINOv2
    (https://arxiv.org/abs/2304.07193) and OpenCLIP.
    """
    config = get_base()
    config.unlock()
    config.recipe = "pretraining"
    config.loss.reconstruction = "l1_imagenet"  # VTP: L1; of which values is open
    config.loss.perceptual = "lpips_vgg"  # VTP: "a perceptual loss"
    part = config.pretraining = ConfigDict()
    # VTP, section 3: all pairs of a batch, 16k of them. loss: clip, siglip
    part.contrast = ConfigDict({"weight": 1.0, "loss": "clip", "drop": 0.0})
    part.contrast.scales = (1.0, 100.0)  # the factor of similarities stays between; OpenCLIP
    # VTP, section 3: 2k images of the 16k; a small weight, for the sake of generation.
    part.reconstruction = ConfigDict({"weight": 0.1, "every": 8, "drop": 0.0})
    ssl = part.distillation = ConfigDict()
    ssl.weight = 1.0  # VTP, section 3
    ssl.every = 4  # VTP, section 3: 4k images of the 16k
    ssl.targets = "sinkhorn"  # open; DINOv2's: sinkhorn, centering
    ssl.student_temperature = 0.1  # open; DINOv2
    ssl.teacher_temperature = schedule(kind="piecewise", points=((0, 0.04), (30_000, 0.07)))  # open; DINOv2: 30 epochs
    ssl.momentum = schedule(kind="cosine", start=0.994, end=1.0, steps=100_000)  # open; DINOv2's ViT-L
    ssl.koleo = 0.0  # not named in VTP; DINOv2: 0.1
    ssl.frozen = 0  # steps in which the prototypes stay; open; DINOv2: the first epoch
    ssl.drop = 0.0  # open; the authors' code has a rate of its own for each objective
    ssl.head = ConfigDict({"prototypes": 65_536, "hidden": 2_048, "bottleneck": 256, "layers": 3})  # open; DINOv2
    # Two views of an image that the teacher sees as well. Sizes and colours are open; DINOv2's.
    colours = {"ratio": (3 / 4, 4 / 3), "flip": 0.5, "jitter": 0.8, "strength": (0.4, 0.4, 0.2, 0.1), "gray": 0.2}
    colours["sigma"] = (0.1, 2.0)
    ssl.whole = ConfigDict({"size": 224, "scale": (0.32, 1.0), **colours, "blur": (1.0, 0.1), "solarize": (0.0, 0.2)})
    ssl.parts = ConfigDict({"size": 96, "scale": (0.05, 0.32), **colours, "blur": (0.5,), "solarize": (0.0,)})
    ssl.parts.count = 8
    # Of a group of views, a share is masked, by ratios from the smallest to the largest. Open; DINOv2's.
    ssl.masks = ConfigDict({"group": 16, "share": 0.5, "ratios": (0.1, 0.5), "aspect": 0.3, "smallest": 4})
    return _locked(config)


def get_base() -> ConfigDict:
    """A config with every field that train.py reads, except the fields of the model."""
    config = ConfigDict()
    config.recipe = "autoencoder"  # what is trained, and so which fields count (tokenizers/train/build.py)
    config.seed = 0
    config.steps = 1000
    config.precision = "auto"  # float32, bfloat16, auto = bfloat16 on TPU and GPU
    config.ema_decay = 0.999
    config.ema_warmup = True
    config.accumulate = 1  # micro-batches per step
    config.stop_after_skipped = 20  # steps in a row with a NaN or infinite loss
    config.compilation_cache = "~/.cache/tokenizers/compiled"
    config.init_from = placeholder(str)  # a run, saved folder, or official weight file whose weights are the start

    # After that, parameters of other tokenizers: {name: part(...)}.
    config.init_parts = ConfigDict()

    config.model = ConfigDict({"name": ""})  # a variant or system, then its fields
    config.optimizer = optimizer()

    config.loss = ConfigDict()
    config.loss.reconstruction = "l1"  # l1, l2, charbonnier; tokens: not pixels are compared, see loss.tokens
    config.loss.reconstruction_weight = 1.0
    # A frozen tokenizer whose tokens the model guesses (TiTok, stage 1): its name and fields, and its run or weight
    # file. "" looks in $TOKENIZERS_WEIGHTS; "random" has random weights.
    config.loss.tokens = ConfigDict({"model": {"name": "maskgit-vqgan-imagenet256-f16-1024"}, "path": ""})
    config.loss.perceptual = placeholder(str)  # lpips_vgg, lpips_alex; None = no perceptual loss
    config.loss.perceptual_weight = 1.0
    config.loss.perceptual_path = ""  # weight file; default: $TOKENIZERS_WEIGHTS
    config.loss.convnext_weight = 0.0  # squared difference of ConvNeXt-S logits (MaskBit, TiTok)
    config.loss.convnext_path = ""  # its weight file; default: $TOKENIZERS_WEIGHTS
    config.loss.vgg_hidden_weight = 0.0  # squared difference of VGG16's last hidden layer (phenaki-pytorch)
    config.loss.content_weight = 0.0  # difference of VGG16 features (Cosmos)
    config.loss.gram_weight = 0.0  # difference of their Gram matrices: texture, style
    # Of VGG16's relu1_2, relu2_2, relu3_3, relu4_3, relu5_3 in these two (Cosmos's); 0 leaves a layer out.
    config.loss.vgg_layers = (1 / 2.6, 1 / 4.8, 1 / 3.7, 1 / 5.6, 10 / 1.5)
    config.loss.vgg_path = ""  # VGG16 weight file for these three; default: $TOKENIZERS_WEIGHTS
    config.loss.frames = "all"  # of a clip, for the losses above: all, or one of each clip, drawn anew: one
    config.loss.flow_weight = 0.0  # difference of optical flow in clips of at least 256 x 256 pixels (Cosmos)
    config.loss.flow_path = ""  # RAFT weight file for it; default: $TOKENIZERS_WEIGHTS
    config.loss.consistency = ConfigDict()  # clips as overlapping windows whose reconstructions should agree (Cosmos)
    config.loss.consistency.weight = 0.0
    config.loss.consistency.frames = 9  # of a window; a clip has frames + n * step
    config.loss.consistency.step = 4
    config.loss.reduction = "mean"  # mean, logvar
    config.loss.logvar = 0.0  # start of the learned log-variance
    config.loss.bottleneck = ConfigDict()  # weight of each loss term the bottleneck returns
    config.loss.alignment = ConfigDict()  # of latents with the features of a frozen network (VA-VAE)
    config.loss.alignment.network = placeholder(str)  # dinov2_large(_registers), mae_large; None = no alignment
    config.loss.alignment.path = ""  # weight file; default: $TOKENIZERS_WEIGHTS
    config.loss.alignment.weight = 0.1
    config.loss.alignment.layer = "encoder/conv_out/kernel"  # weight relative to the gradients there; "" = as it is
    config.loss.alignment.project = "latents"  # latents to the features' channels, or features to the latents'
    config.loss.alignment.cosine_weight = 1.0
    config.loss.alignment.cosine_margin = 0.0
    config.loss.alignment.distance_weight = 1.0
    config.loss.alignment.distance_margin = 0.0
    # Transformed latents decode to the transformed image (EQ-VAE). Of a codebook: features before quantization.
    config.loss.equivariance = ConfigDict()
    config.loss.equivariance.probability = 0.0  # of a step that scales and turns latents and target
    config.loss.equivariance.smaller = 0.0  # of the other steps, the share that sees smaller images
    config.loss.equivariance.scales = (0.25, 0.5, 0.75)  # each must lead to whole latents; each is compiled once
    config.loss.equivariance.anisotropic = False  # height and width scaled independently
    # Each step sees its pixels at one of these scales (OmniTokenizer); each is compiled once.
    config.loss.resolutions = ()

    # A frozen network whose features of captions the decoder reads (TA-TiTok): clip_vitl14_336, and its weight file, by
    # default in $TOKENIZERS_WEIGHTS.
    config.captions = ConfigDict({"network": placeholder(str), "path": ""})

    config.schedules = ConfigDict({"loss": {}, "model": {}})  # by term of loss.bottleneck; by field, e.g. temperature

    # What holds when it starts (docs/gan_training.md); configs of papers begin with `undamped`.
    config.discriminator = ConfigDict()
    # patchgan_2d, patchgan_3d, blur_2d, maskbit_2d, phenaki_2d, stylegan_2d, stylegan_3d, tats_2d, tats_3d, dino_2d
    # (channels=0: those of the network); None = no adversarial loss
    config.discriminator.name = placeholder(str)
    config.discriminator.network = (
        "dinov2_small"  # frozen, of dino_2d: dinov2_small, dinov2_base, dinov2_large; also .._registers
    )
    config.discriminator.path = ""  # its weight file; default: $TOKENIZERS_WEIGHTS
    config.discriminator.channels = 64
    config.discriminator.layers = 3
    config.discriminator.norm = "group"  # batch, actnorm, group, none
    config.discriminator.generator_loss = "hinge"  # hinge, vanilla, non_saturating
    config.discriminator.discriminator_loss = "hinge"
    config.discriminator.frames = "all"  # of a clip: all, one (drawn as for config.loss.frames)
    config.discriminator.clips_only = False  # True: batches of images do not see it (OmniTokenizer)
    config.discriminator.start = 0  # first step that trains it
    config.discriminator.generator_start = 0  # first step whose generator sees it
    config.discriminator.ramp = 1_000  # steps from there on over which its part in the generator's loss grows
    config.discriminator.weight = 0.1
    config.discriminator.adaptive = True  # lambda from the gradients at the decoder's last layer (VQGAN)
    config.discriminator.adaptive_max = 10.0
    config.discriminator.against = "reconstruction"  # whose gradients: reconstruction, or its perceptual terms alone
    config.discriminator.factor = 1.0
    config.discriminator.lecam_weight = 0.001
    config.discriminator.lecam_decay = 0.999
    config.discriminator.lecam = "patches"  # patches: of each logit, anchors move first; means: of mean logits, TiTok
    config.discriminator.r1_weight = 0.0
    config.discriminator.r1_every = 16
    config.discriminator.r1_norm = 0.0  # length of the gradient that costs nothing; 1 for WGAN-GP
    config.discriminator.feature_matching_weight = 0.0  # of its hidden features, added to the generator's loss
    config.discriminator.ema_decay = 0.0  # of an average of its parameters, kept in checkpoints; 0 = none
    config.discriminator.fresh_forward = False  # True: the generator runs again, updated, before its turn (VQGAN)
    config.discriminator.leads = False  # True: its turn comes first, the generator faces it updated (IBQ)
    config.discriminator.optimizer = optimizer()

    config.data = data()

    config.mesh = ConfigDict({"data": -1, "fsdp": 1, "context": 1, "split": "height"})
    config.mesh.rules = ()  # pairs (regular expression over parameter paths, placement): tokenizers/parallel/rules.py
    config.mesh.smallest = 2**16  # arrays with fewer elements are not split over fsdp
    config.distributed = ConfigDict({"mode": "off", "coordinator": "", "processes": 1, "process": 0})

    config.log = ConfigDict({"every": 50, "tensorboard": True, "wandb": placeholder(str)})
    config.checkpoint = ConfigDict({"every": 1000, "keep_last": 2, "keep_best": 1})  # every=0: only at the end
    config.evaluation = ConfigDict({"every": 1000, "max_items": 64, "final_report": True})  # every=0: at the end
    config.profile = ConfigDict({"start": 0, "steps": 0})  # write a profiler trace of that many steps
    return _locked(config)


def latents(**changes) -> ConfigDict:
    """Batches of latents (tokenizers/data/latents.py)."""
    config = ConfigDict()
    config.path = ""  # folder that `configs/generation_blackbox.py` has made
    config.batch_size = 1024  # global
    config.flip = True  # mirrored copies with equal chance
    config.read_threads = 2
    config.prefetch = 4
    return _changed(config, changes)


def get_generator() -> ConfigDict:
    """A config with every field that train.py reads for a generator of latents, with LightningDiT's recipe."""
    config = get_base()
    config.unlock()
    config.recipe = "generator"
    for other in ("loss", "schedules", "discriminator", "captions", "evaluation", "init_parts"):
        del config[other]
    config.model = ConfigDict({"name": "lightningdit"})  # its fields; grid, channels and classes are those of the data
    config.ema_decay = 0.9999
    config.ema_warmup = False
    config.optimizer = optimizer(name="adamw", lr=2e-4, b2=0.95, clip=0.0)
    config.flow = ConfigDict()  # tokenizers/generators/flow.py
    config.flow.path = "linear"  # linear, cosine, variance_preserving
    config.flow.prediction = "velocity"  # velocity, noise, score
    config.flow.weighting = placeholder(str)  # of noise and score: velocity, likelihood; None = as they are
    config.flow.cosine = True  # the direction of the velocity counts once more
    config.flow.time_mean = 0.0  # times of training: sigmoid of a normal number
    config.flow.time_std = placeholder(float)
    config.flow.time_std = 1.0  # None = uniform
    config.flow.uniform_from = placeholder(int)  # step from which times are uniform; None = never
    config.data = latents()
    config.lock()
    config.model.unlock()
    return config
