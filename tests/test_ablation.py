"""Alternatives to the parts of the model, and the command that compares them."""

import dataclasses
import json
import tomllib

import numpy as np
import pytest
import torch
from codec_helpers import SMALL, as_input, make_image
from PIL import Image
from training_helpers import defaults, make_run_folder, records

import cmamba_ref
from cmamba_ref import CMamba, CMambaConfig, InvalidArgumentError, WeightsError
from cmamba_ref.codec import memory
from cmamba_ref.config import CONTEXTS
from cmamba_ref.entropy.precision import float64_copy
from cmamba_ref.losses import rate_distortion_loss
from cmamba_ref.nn.ablations import GDN, PlainFusion
from cmamba_ref.nn.blocks import BLOCKS, CASSM, ResBlock, VSSBlock, register_block
from tools import ablate, observe

VARIANTS = list(ablate.VARIANTS)


def config_of(variant: str) -> CMambaConfig:
    """The small model with the changes of a variant."""
    changes = tomllib.loads("\n".join(ablate.VARIANTS[variant].changes))
    return dataclasses.replace(SMALL, **changes)


# ---------------------------------------------------------------- the variants


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_variant_trains_and_codes(variant):
    """Every weight gets a gradient, and an image survives the file."""
    torch.manual_seed(0)
    config = config_of(variant)
    assert CMambaConfig.from_json(config.to_json()) == config
    model = CMamba(config)
    image = make_image(70, 90)
    x = as_input(image)
    loss = rate_distortion_loss(model(x, 3.0), x, 0.01)["loss"] + model.aux_loss()
    loss.backward()
    without = [name for name, p in model.named_parameters() if p.grad is None]
    assert not without
    model.eval()
    model.update()
    data = cmamba_ref.encode(image, model, 3)
    with torch.no_grad():
        expected = model(x, 3.0)["x_hat"].clamp(0, 1)[0].permute(1, 2, 0) * 255
    decoded = cmamba_ref.decode(data, model).astype(np.float64)
    assert np.abs(decoded - expected.numpy()).max() <= 1.01


def test_variants_differ_from_the_whole_model_as_described():
    """Classes of the blocks, scans and LRP of each variant, as they are built."""

    def kinds(variant: str) -> tuple[set[type], int, int]:
        model = CMamba(config_of(variant))
        classes = {type(block) for block in [*model.g_a, *model.g_s]} & {
            *(CASSM, PlainFusion, VSSBlock, ResBlock, GDN)
        }
        scans = sum("ss2d.A_log" in name for name, _ in model.named_parameters())
        lrp = sum(name.startswith("context.lrp") for name, _ in model.named_parameters())
        return classes, scans, lrp

    whole = kinds("ca-ssm")
    assert whole[0] == {CASSM, ResBlock} and whole[1] and whole[2]
    in_context = len(SMALL.slice_widths)
    in_transforms = whole[1] - in_context
    assert kinds("sum") == ({PlainFusion, ResBlock}, *whole[1:])
    assert kinds("concatenation") == ({PlainFusion, ResBlock}, *whole[1:])
    assert kinds("ssm") == ({VSSBlock, ResBlock}, *whole[1:])
    assert kinds("cnn") == ({ResBlock}, in_context, whole[2])
    assert kinds("cae-without-ssm") == (whole[0], in_transforms, whole[2])
    assert kinds("no-lrp") == (*whole[:2], 0)
    assert kinds("hyperprior") == ({GDN}, 0, 0)


def test_cae_without_its_scan_sees_one_position():
    """With it, the whole map."""

    def changed(context: str) -> torch.Tensor:
        torch.manual_seed(0)
        model = CMamba(dataclasses.replace(SMALL, context=context))
        cae = float64_copy(model.context, torch.device("cpu")).cae[0]
        phi = torch.randn(1, 2 * SMALL.latent_channels, 5, 6, dtype=torch.float64)
        moved = phi.clone()
        moved[0, 3, 2, 2] += 1
        with torch.no_grad():
            return (cae(moved)[0] - cae(phi)[0]).abs().sum((0, 1)) > 0

    assert changed("cae").all()
    assert changed("cae-without-ssm").nonzero().tolist() == [[2, 2]]


def test_without_context_means_and_scales_are_the_hyperprior_s():
    model = CMamba(config_of("hyperprior")).eval()
    phi = (torch.randn(1, 16, 4, 4), torch.randn(1, 16, 4, 4))
    seen = []
    y_bar = model.context(phi, lambda i, means, scales: seen.append((means, scales)) or means + 1)
    assert torch.equal(seen[0][0], phi[0]) and torch.equal(seen[0][1], phi[1])
    assert torch.equal(y_bar, phi[0] + 1)
    sliced = CMamba(dataclasses.replace(config_of("hyperprior"), slices=4)).eval()
    assert torch.equal(sliced.context(phi, lambda i, means, scales: scales), phi[1])


@pytest.mark.parametrize("concatenate", [False, True])
def test_plain_fusion_is_its_equation(concatenate):
    torch.manual_seed(0)
    block = PlainFusion(6, d_state=2, ssm_ratio=1.0, concatenate=concatenate)
    x = torch.randn(2, 6, 7, 5)
    with torch.no_grad():
        assert torch.allclose(block(x), x, atol=1e-6)  # fresh
        for parameter in block.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
        ssm, cnn = block.ssm(x), block.cnn(x)
        assert not torch.allclose(ssm, cnn, atol=1e-2)
        weight = block.w.weight[:, :, 0, 0]
        together = torch.cat([ssm, cnn], 1) if concatenate else ssm + cnn
        expected = torch.einsum("oc,bchw->bohw", weight, together) + block.w.bias[:, None, None]  # type: ignore[index]
        assert torch.allclose(block(x), expected, atol=1e-5)


def test_gdn_is_its_equation_and_its_inverse_multiplies():
    torch.manual_seed(0)
    divide, multiply = GDN(4, inverse=False), GDN(4, inverse=True)
    x = torch.randn(1, 4, 3, 3)
    with torch.no_grad():
        fresh = x / (1 + 0.1 * x.square()).sqrt()
        assert torch.allclose(divide(x), fresh, atol=1e-5)
        for block in (divide, multiply):
            block.gamma_root.copy_(torch.rand(4, 4))
            block.beta_root.copy_(torch.tensor([1.0, 2.0, 0.5, -3.0]))
        multiply.gamma_root.copy_(divide.gamma_root)
        beta = torch.tensor([1.0, 4.0, 0.25, GDN.BETA_MIN])  # a root below the bound counts as it
        gamma = divide.gamma_root.square()
        root = (beta[:, None, None] + torch.einsum("ij,bjhw->bihw", gamma, x.square())).sqrt()
        assert torch.allclose(divide(x), x / root, rtol=1e-4)
        assert torch.allclose(multiply(x), x * root, rtol=1e-4)


def test_without_scans_less_memory_is_asked_for():
    wide = dataclasses.replace(SMALL, ssm_ratio=4.0)
    without = dataclasses.replace(wide, block="cnn")
    assert memory.predict(without, 2000, 3000) < memory.predict(wide, 2000, 3000)


@pytest.mark.parametrize(
    "change", [{"context": None}, {"lrp": 1}, {"block": ["cnn"]}, {"block": None}], ids=str
)
def test_unknown_parts_are_refused(change):
    with pytest.raises(InvalidArgumentError, match=next(iter(change))):
        dataclasses.replace(SMALL, **change)


class Pointwise(torch.nn.Module):
    """A block of a user's own."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.layer = torch.nn.Conv2d(channels, channels, 1)

    def forward(self, x):
        return x + self.layer(x)


def test_a_block_of_ones_own_is_saved_loaded_and_codes(tmp_path, monkeypatch):
    monkeypatch.setitem(BLOCKS, "pointwise", BLOCKS["cnn"])  # undone after the test
    register_block("pointwise", lambda channels, config, inverse: Pointwise(channels))
    torch.manual_seed(0)
    model = CMamba(dataclasses.replace(SMALL, block="pointwise")).eval()
    assert any(isinstance(layer, Pointwise) for layer in model.g_s)
    model.update()
    model.save_pretrained(tmp_path)
    loaded = CMamba.from_pretrained(tmp_path)
    assert loaded.model_id == model.model_id
    image = make_image(70, 90)
    decoded = [
        cmamba_ref.decode(cmamba_ref.encode(image, m, 4), other)
        for m, other in ((model, loaded), (loaded, model))
    ]
    assert np.array_equal(*decoded)
    del BLOCKS["pointwise"]
    with pytest.raises(WeightsError, match="register it first"):
        CMamba.from_pretrained(tmp_path)
    with pytest.raises(InvalidArgumentError, match="one of 'ca-ssm', .*got 'pointwise'.*register"):
        CMamba(loaded.config)


def test_a_configuration_from_before_has_the_paper_s_parts():
    """config.json files that do not name them yet."""
    values = json.loads(SMALL.to_json())
    for name in ("block", "context", "lrp"):
        del values[name]
    config = CMambaConfig.from_json(json.dumps(values))
    assert config == SMALL and (config.block, config.context) == ("ca-ssm", CONTEXTS[0])


@pytest.mark.parametrize(
    ("variant", "paths"),
    [("sum", ["ssm", "cnn", "fused"]), ("ssm", ["ssm"]), ("cnn", ["cnn"]), ("hyperprior", ["cnn"])],
)
def test_the_paths_of_a_variant_are_observed(variant, paths):
    torch.manual_seed(0)
    seen = observe.observe(CMamba(config_of(variant)).eval(), torch.rand(1, 3, 64, 64), 3.0)
    last = [block for block in seen.blocks if block.name.startswith("g_a")][-1]
    assert list(last.paths) == paths and last.alpha is None


# ---------------------------------------------------------------- the command


@pytest.fixture
def folders(tmp_path):
    """Images to train on and to measure on, and a recipe of a few steps."""
    make_run_folder(tmp_path)
    (tmp_path / "test").mkdir()
    Image.fromarray(make_image(170, 180)).save(tmp_path / "test" / "a.png")
    recipe = {
        name: value
        for name, value in defaults(tmp_path).items()
        if name not in ("data", "out") and value != ""
    }
    lines = [f"{name} = {json.dumps(value)}" for name, value in recipe.items()]
    (tmp_path / "recipe.toml").write_text("\n".join(["steps = 2", *lines]) + "\n")
    return tmp_path


def run(folders, *more: str) -> int:
    command = [str(folders / "photos"), str(folders / "test"), "--out", str(folders / "out")]
    return ablate.main([*command, "--recipe", str(folders / "recipe.toml"), *more])


def test_the_whole_comparison(folders, capsys):
    """Two variants are trained alike and differ in what they are; the page says what was done."""
    assert run(folders, "--only", "no-lrp", "--log-every", "2") == 0
    out = folders / "out"
    found = json.loads((out / "ablation.json").read_text())
    rows = {row["variant"]: row for row in found["variants"]}
    assert list(rows) == ["ca-ssm", "no-lrp"]
    assert rows["ca-ssm"]["bd_rate"]["psnr"][0] in (None, pytest.approx(0, abs=1e-9))
    assert rows["no-lrp"]["parameters"] < rows["ca-ssm"]["parameters"]
    assert rows["no-lrp"]["macs"] < rows["ca-ssm"]["macs"]
    settings = [records(out / f"{name}-0")[0]["settings"] for name in rows]
    assert [s.pop("model") for s in settings] == [{}, {"lrp": False}]
    assert [s.pop("out") for s in settings] == [str(out / f"{name}-0") for name in rows]
    assert settings[0] == settings[1] and settings[0]["log_every"] == 2
    assert CMamba.from_pretrained(out / "no-lrp-0" / "model").config.lrp is False
    page = (out / "ablation.md").read_text()
    assert "for 2 steps of 2 crops of 64x64 pixels, seed 0" in page
    assert "on the 1 images of `test`" in page and "| `no-lrp` | without latent" in page
    assert page in capsys.readouterr().out

    # Nothing is trained again, and runs that are not alike are not compared.
    before = {path: path.stat().st_mtime_ns for path in out.glob("*/model/*")}
    log = out / "no-lrp-0" / "log.jsonl"
    first, *others = log.read_text().splitlines(keepends=True)
    log.write_text("".join([first.replace('"lr": 0.0001', '"lr": 0.5'), *others]))
    assert run(folders, "--only", "no-lrp") == 1
    assert "from ca-ssm-0 to no-lrp-0 lr was 0.0001 and is now 0.5" in capsys.readouterr().err
    assert before == {path: path.stat().st_mtime_ns for path in out.glob("*/model/*")}


def test_a_training_that_fails_is_named(folders, capsys):
    assert run(folders, "--only", "ca-ssm", "--crop", "100000") == 1
    assert "ca-ssm-0 failed, see" in capsys.readouterr().err
    assert "100000" in (folders / "out" / "ca-ssm-0.txt").read_text()
    assert not (folders / "out" / "ablation.json").exists()


def test_bd_rates_are_those_of_the_same_seed(tmp_path):
    """Against hand-made curves: half the rate of its own anchor is -50 %, whatever the others."""
    psnr = [20.0, 24.0, 28.0, 32.0]
    curves = {
        name: {"name": name, "results": {"bpp": [r * k for k in (1, 2, 4, 8)], "psnr-rgb": psnr}}
        for name, r in {"ca-ssm-0": 1, "ca-ssm-1": 3, "cnn-0": 0.5, "cnn-1": 3}.items()
    }
    (tmp_path / "rd.json").write_text(json.dumps(curves))
    found = {c.name: c for c in ablate.rd_curves.load_curves(str(tmp_path / "rd.json"))}
    pairs = [(found[f"ca-ssm-{seed}"], found[f"cnn-{seed}"]) for seed in (0, 1)]
    rates = [ablate.bd_rate_of(*pair, "psnr") for pair in pairs]
    assert rates == [pytest.approx(-50, rel=1e-9), pytest.approx(0)]
    assert ablate.in_percent(rates) == "-25.0 % (-50.0 to +0.0)"
    assert ablate.in_percent([None, 1.0]) == "none"
    assert ablate.bd_rate_of(*pairs[0], "ms-ssim") is None
