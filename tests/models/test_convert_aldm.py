"""A release of ALDM under its published names gives, converted, what its own forward pass gives."""

import importlib.util
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from medldm.build import load_first_stage, load_module
from medldm.errors import InputError

SCRIPT = Path(__file__).resolve().parents[2] / "scripts" / "convert_aldm.py"
LEVELS, LATENT, CODES, CLASSES, HIDDEN = (32, 32, 64), 4, 64, 4, 8
SPADE_WIDTHS = (LATENT, 8, LATENT)


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("convert_aldm", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class Release(dict):
    """A state dict that is filled with random tensors of the published shapes."""

    def __init__(self) -> None:
        self.generator = torch.Generator().manual_seed(0)

    def conv(self, name: str, c_in: int, c_out: int, kernel: int = 3, bias: bool = True) -> None:
        scale = (c_in * kernel**3) ** -0.5
        self[f"{name}.weight"] = scale * torch.randn(c_out, c_in, *(kernel,) * 3, generator=self.generator)
        if bias:
            self[f"{name}.bias"] = 0.1 * torch.randn(c_out, generator=self.generator)

    def norm(self, name: str, channels: int) -> None:
        self[f"{name}.weight"] = 1 + 0.1 * torch.randn(channels, generator=self.generator)
        self[f"{name}.bias"] = 0.1 * torch.randn(channels, generator=self.generator)

    def res(self, name: str, c_in: int, c_out: int, truncated: bool) -> None:
        self.norm(f"{name}.norm1", c_in)
        self.conv(f"{name}.conv1", c_in, c_out)
        if truncated:
            return
        self.norm(f"{name}.norm2", c_out)
        self.conv(f"{name}.conv2", c_out, c_out)
        if c_in != c_out:
            self.conv(f"{name}.nin_shortcut", c_in, c_out, 1)


def published(truncated: bool = False, with_spade: bool = False, with_skips: bool = False) -> Release:
    state, width, last = Release(), LEVELS[0], len(LEVELS) - 1
    state.conv("encoder.conv_in", 1, width)
    for level, out in enumerate(LEVELS):
        state.res(f"encoder.down.{level}.block.0", width, out, truncated)
        width = out
        if level != last:
            state.conv(f"encoder.down.{level}.downsample.conv", out, out)
    state.res("encoder.mid.block_1", width, width, truncated)
    state.norm("encoder.norm_out", width)
    state.conv("encoder.conv_out", width, LATENT)
    state.conv("quant_conv", LATENT, LATENT, 1)
    state["quantize.embedding.weight"] = torch.randn(CODES, LATENT, generator=state.generator)
    state.conv("post_quant_conv", LATENT, LATENT, 1)
    state.conv("decoder.conv_in", LATENT, width)
    state.res("decoder.mid.block_1", width, width, truncated)
    for level in reversed(range(len(LEVELS))):
        for i in range(2):
            state.res(f"decoder.up.{level}.block.{i}", width, LEVELS[level], truncated)
            width = LEVELS[level]
        if level:
            state.conv(f"decoder.up.{level}.upsample.conv", width, width)
    state.norm("decoder.norm_out", width)
    state.conv("decoder.conv_out", width, 1)
    state.conv("loss.discriminator.main.0", 1, 32, 4)
    if with_spade:
        add_spade(state)
    for i, (c_in, c_out) in (
        enumerate(zip(SPADE_WIDTHS, SPADE_WIDTHS[1:], strict=False)) if with_skips else ()
    ):
        state.conv(f"spade.beside.{i}", c_in, c_out)  # of any name
    return state


def add_spade(state: Release) -> None:
    for i, (c_in, c_out) in enumerate(zip(SPADE_WIDTHS[:-1], SPADE_WIDTHS[1:], strict=True)):
        middle, name = min(c_in, c_out), f"spade.block.{i}"
        for norm, channels in (("norm_0", c_in), ("norm_1", middle)):
            for k in range(CLASSES):
                state.conv(f"{name}.{norm}.spades.{k}.mlp_shared.0", channels, HIDDEN)
                state.conv(f"{name}.{norm}.spades.{k}.mlp_gamma", HIDDEN, channels)
                state.conv(f"{name}.{norm}.spades.{k}.mlp_beta", HIDDEN, channels)
        state.conv(f"{name}.conv_0", c_in, middle)
        state.conv(f"{name}.conv_1", middle, c_out)
        state.conv(f"{name}.conv_s", c_in, c_out, 1, bias=False)


class Published:
    """The published forward pass in plain torch, on a state dict."""

    def __init__(self, state: dict) -> None:
        self.state = state

    def conv(self, name: str, x, **options):
        weight = self.state[f"{name}.weight"]
        padding = options.pop("padding", weight.shape[-1] // 2)
        return F.conv3d(x, weight, self.state.get(f"{name}.bias"), padding=padding, **options)

    def activated(self, name: str, x):
        return F.silu(F.group_norm(x, 32, self.state[f"{name}.weight"], self.state[f"{name}.bias"], eps=1e-6))

    def res(self, name: str, x):
        h = self.conv(f"{name}.conv1", self.activated(f"{name}.norm1", x))
        if f"{name}.conv2.weight" not in self.state:
            return h
        h = self.conv(f"{name}.conv2", self.activated(f"{name}.norm2", h))
        return h + (
            self.conv(f"{name}.nin_shortcut", x) if f"{name}.nin_shortcut.weight" in self.state else x
        )

    def encode(self, x):
        h = self.conv("encoder.conv_in", x)
        for level in range(len(LEVELS)):
            h = self.res(f"encoder.down.{level}.block.0", h)
            if level != len(LEVELS) - 1:
                h = self.conv(
                    f"encoder.down.{level}.downsample.conv", F.pad(h, (0, 1) * 3), stride=2, padding=0
                )
        h = self.conv(
            "encoder.conv_out", self.activated("encoder.norm_out", self.res("encoder.mid.block_1", h))
        )
        return self.conv("quant_conv", h)

    def quantize(self, h):
        codes = self.state["quantize.embedding.weight"]
        index = torch.cdist(h.movedim(1, -1).flatten(0, -2), codes).argmin(1)
        return codes[index].view(*h.movedim(1, -1).shape).movedim(-1, 1)

    def decode(self, z):
        h = self.res("decoder.mid.block_1", self.conv("decoder.conv_in", self.conv("post_quant_conv", z)))
        for level in reversed(range(len(LEVELS))):
            for i in range(2):
                h = self.res(f"decoder.up.{level}.block.{i}", h)
            if level:
                h = self.conv(f"decoder.up.{level}.upsample.conv", F.interpolate(h, scale_factor=2.0))
        return self.conv("decoder.conv_out", self.activated("decoder.norm_out", h))

    def spade(self, name: str, x, k: int):
        a = F.relu(self.conv(f"{name}.spades.{k}.mlp_shared.0", x))
        gamma, beta = (self.conv(f"{name}.spades.{k}.mlp_{part}", a) for part in ("gamma", "beta"))
        return F.leaky_relu(F.instance_norm(x) * (1 + gamma) + beta, 0.2)

    def translate(self, z, k: int):
        for i in range(len(SPADE_WIDTHS) - 1):
            name = f"spade.block.{i}"
            h = self.conv(f"{name}.conv_0", self.spade(f"{name}.norm_0", z, k))
            h = self.conv(f"{name}.conv_1", self.spade(f"{name}.norm_1", h, k))
            h = h + self.conv(f"{name}.conv_s", z)
            z = h + self.conv(f"spade.beside.{i}", z) if f"spade.beside.{i}.weight" in self.state else h
        return z


@pytest.mark.parametrize("truncated", [False, True], ids=["residual", "first release"])
def test_a_converted_autoencoder_gives_what_the_release_gives(
    script, prepared_modalities, tmp_path, truncated
):
    state = published(truncated)
    torch.save({"state_dict": dict(state), "global_step": 5}, tmp_path / "release.ckpt")
    left_out = script.convert(tmp_path / "release.ckpt", prepared_modalities, tmp_path / "out.ckpt")
    assert left_out == ["loss.discriminator.main.0.bias", "loss.discriminator.main.0.weight"]
    autoencoder = load_module(tmp_path / "out.ckpt").autoencoder
    own, x = Published(state), torch.rand(1, 1, 16, 8, 8, generator=torch.Generator().manual_seed(1)) * 2 - 1
    with torch.no_grad():
        h = autoencoder.encode(x)
        torch.testing.assert_close(h, own.encode(x), rtol=1e-4, atol=1e-4)
        z = autoencoder.quantize(h).z
        torch.testing.assert_close(z, own.quantize(h))
        torch.testing.assert_close(autoencoder.decode(z), own.decode(z), rtol=1e-4, atol=1e-4)
    stage, description = load_first_stage(
        tmp_path / "out.ckpt", latent="quant", requantize=False, normalisation="none"
    )
    assert stage.downsampling == (4, 4, 4) and description["stage"] == "autoencoder"


@pytest.mark.parametrize("with_skips", [False, True], ids=["head", "with convolutions beside the blocks"])
def test_a_release_with_ms_spade_becomes_a_translator(script, prepared_modalities, tmp_path, with_skips):
    state = published(with_spade=True, with_skips=with_skips)
    torch.save(dict(state), tmp_path / "release.ckpt")
    script.convert(tmp_path / "release.ckpt", prepared_modalities, tmp_path / "out.ckpt")
    module, own = load_module(tmp_path / "out.ckpt"), Published(state)
    assert module.description["model"]["translator"]["conv_skip"] is with_skips
    z = torch.randn(4, LATENT, 4, 2, 3, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        made = module.translator(z, torch.arange(4))
        each = torch.cat([own.translate(z[k : k + 1], k) for k in range(4)])
        torch.testing.assert_close(made, each, rtol=1e-4, atol=1e-5)
        x = torch.rand(1, 1, 8, 8, 8) * 2 - 1
        image = module.as_first_stage().translate_image(x, torch.tensor([2]))
        expected = own.decode(own.translate(own.quantize(own.encode(x)), 2))
        torch.testing.assert_close(image, expected, rtol=1e-3, atol=1e-3)


def test_a_convolution_whose_place_its_shape_does_not_tell_is_refused(script, prepared_modalities, tmp_path):
    state = dict(published(with_spade=True, with_skips=True))
    for kind in ("weight", "bias"):
        state[f"spade.other.{kind}"] = state[f"spade.beside.1.{kind}"]
    torch.save(state, tmp_path / "release.ckpt")
    with pytest.raises(InputError, match=r"spade\.beside\.0\.bias and 5 more have no place"):
        script.convert(tmp_path / "release.ckpt", prepared_modalities, tmp_path / "out.ckpt")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"encoder.attn.q.weight": torch.zeros(1)}, "encoder.attn.q.weight and 0 more have no place"),
        (
            {"decoder.conv_in.weight": torch.zeros(64, 5, 3, 3, 3)},
            r"from_latent.weight: \(64, 5, 3, 3, 3\) in the",
        ),
        ({"encoder.norm_out.bias": None}, "the release lacks encoder_norm.bias and 0 more"),
        ({"quantize.embedding.weight": None}, "not an autoencoder of ALDM"),
    ],
)
def test_other_files_are_refused_in_one_line(script, prepared_modalities, tmp_path, change, message):
    state = dict(published()) | change
    torch.save({key: x for key, x in state.items() if x is not None}, tmp_path / "release.ckpt")
    with pytest.raises(InputError, match=message):
        script.convert(tmp_path / "release.ckpt", prepared_modalities, tmp_path / "out.ckpt")
    assert not (tmp_path / "out.ckpt").exists()


def test_objects_in_a_release_are_never_executed(script, tmp_path):
    torch.save({"state_dict": {}, "hyper_parameters": Path("x")}, tmp_path / "release.ckpt")
    with pytest.raises(InputError, match="holds more than tensors"):
        script.read_release(tmp_path / "release.ckpt")
