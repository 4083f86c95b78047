"""The rows of the benchmark by name: each gives its measurements one after the other."""

import statistics
from argparse import Namespace
from collections.abc import Callable, Iterator
from functools import partial

import evaluating
import generating
import loading
import measuring
import quantizers
import sampling
import translators
import volumes
from measuring import Measured

import networks

Row = Callable[[Namespace, dict], Iterator[Measured]]


def quantizer(options: Namespace, settings: dict) -> Iterator[Measured]:
    for dim in (4, 8):
        variants = quantizers.quantizer(dim)
        yield from measuring.compare(
            f"quantizer, {dim} channels", variants, **settings, reference="MONAI EMAQuantizer"
        )


def memory(options: Namespace, settings: dict) -> Iterator[Measured]:
    yield from measuring.compare("32,768 tokens x 16,384 codes", quantizers.memory(), **settings)


def vqvae(options: Namespace, settings: dict) -> Iterator[Measured]:
    size = options.batch_size or 1
    variants = networks.vqvae(size, options.compile)
    yield from measuring.compare(
        f"VQ-VAE step, {size} x 256^2", variants, **settings, reference="MONAI default"
    )


def unet(options: Namespace, settings: dict) -> Iterator[Measured]:
    size = options.batch_size or 2
    variants = networks.unet(size, options.compile)
    yield from measuring.compare(
        f"U-Net step, {size} x 32^2", variants, **settings, reference="MONAI default"
    )


def msspade(options: Namespace, settings: dict) -> Iterator[Measured]:
    size, edge = options.batch_size or 8, options.latent_edge
    variants, title = translators.translators(size, edge), f"MS-SPADE step, {size} x {edge}^3"
    yield from measuring.compare(title, variants, **settings, reference="loop over samples")


def ssim(options: Namespace, settings: dict) -> Iterator[Measured]:
    variants = evaluating.ssim_3d()
    yield from measuring.compare("SSIM of 96^3", variants, **settings, reference="MONAI SSIMMetric")


def crop(options: Namespace, settings: dict) -> Iterator[Measured]:
    read, folder = loading.crops()
    times = [measuring.seconds(read) for _ in range(50 * max(1, options.repeats))]
    folder.cleanup()
    yield Measured("96^3 of 144x192x144", "medldm", statistics.median(times), (min(times), max(times)), "s")


def vqgan3d(options: Namespace, settings: dict) -> Iterator[Measured]:
    for shape in ((64, 64, 64), (32, 128, 128)):
        variants = volumes.vqgan(shape)
        yield from measuring.compare(
            f"3D VQ-GAN step, {shape}", variants, **settings, reference="MONAI default"
        )


def unet3d(options: Namespace, settings: dict) -> Iterator[Measured]:
    variants = volumes.unets((8, 16, 16))
    yield from measuring.compare(
        "3D U-Net step, 8x16x16 latents", variants, **settings, reference="MONAI default"
    )


def latents3d(options: Namespace, settings: dict) -> Iterator[Measured]:
    variants = volumes.cached_latents((128,) * 3)
    yield from measuring.compare("stage two, 128^3", variants, **settings, reference="encoding each step")


def traced3d(options: Namespace, settings: dict) -> Iterator[Measured]:
    yield from volumes.traced(settings["tick"])


def sampling_time(options: Namespace, settings: dict) -> Iterator[Measured]:
    for title, variants in generating.rows():
        yield from measuring.compare(title, variants, **settings, reference="MONAI, DDIM")


def sampler(options: Namespace, settings: dict) -> Iterator[Measured]:
    yield from sampling.compare_samplers(options, settings["tick"])


def loader(options: Namespace, settings: dict) -> Iterator[Measured]:
    read, count, folder = loading.loader(options.data, 1500)
    read()
    rates = [count / measuring.seconds(read) for _ in range(max(3, options.repeats))]
    if folder is not None:
        folder.cleanup()
    spread = (min(rates), max(rates))
    yield Measured("loader 256^2", "medldm", statistics.median(rates), spread, "slices/s")


ALWAYS = (
    quantizer,
    memory,
    vqvae,
    unet,
    msspade,
    loader,
    ssim,
    crop,
    vqgan3d,
    unet3d,
    latents3d,
    traced3d,
    sampling_time,
)
ROWS: dict[str, Row] = {row.__name__: row for row in ALWAYS}  # those that need no checkpoint
ON_REQUEST: dict[str, Row] = {"sampler": sampler}


def run(name: str, options: Namespace, peak: float, tick: Callable) -> Iterator[Measured]:
    settings = {"repeats": options.repeats, "peak": peak, "tick": tick}
    yield from partial((ROWS | ON_REQUEST)[name], options)(settings)
