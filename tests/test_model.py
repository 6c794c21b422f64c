"""The model: published totals, shapes, training and evaluation modes, initial weights, rates."""

import dataclasses
import math
from statistics import NormalDist

import codec_helpers
import pytest
import torch

import cmamba_ref
from cmamba_ref import CMamba, CMambaConfig, InvalidArgumentError
from cmamba_ref.config import BASE, CONFIGS, SMALL, TINY
from cmamba_ref.entropy.bounds import lower_bound, ste_round
from cmamba_ref.entropy.latent_coder import SKIPPED_TABLES
from cmamba_ref.entropy.precision import float64_copy
from cmamba_ref.entropy.tables import gaussian_tables
from cmamba_ref.losses import bits, rate_distortion_loss
from cmamba_ref.model import pad
from cmamba_ref.nn.blocks import CASSM, ResBlock, VSSBlock
from cmamba_ref.nn.context import CAE
from tools import complexity

MINI = dataclasses.replace(
    TINY,
    name="mini",
    widths=(16, 20, 24),
    latent_channels=32,
    hyper_widths=(24, 16),
    slices=4,
    cae_width=24,
    lrp_widths=(24, 16),
    lrp=True,
    bypass=False,
)


@pytest.fixture
def model() -> CMamba:
    torch.manual_seed(0)
    return CMamba(MINI)


def random_images(*shape: int) -> torch.Tensor:
    """Smooth random images, so that a codec has something to predict."""
    torch.manual_seed(1)
    coarse = torch.rand(shape[0], 3, 4, 4)
    return torch.nn.functional.interpolate(coarse, shape[1:], mode="bicubic").clamp(0, 1)


def test_ss2d_has_the_sizes_of_vmamba_by_default():
    """R = C / 16, N = 16, twice as many channels inside; channels come last."""
    ss2d = cmamba_ref.SS2D(32)
    shapes = {name: list(p.shape) for name, p in ss2d.named_parameters()}
    assert shapes["A_log"] == [4, 64, 16] and shapes["dt_weight"] == [4, 64, 2]
    assert shapes["in_proj.weight"] == [128, 32] and shapes["out_proj.weight"] == [32, 64]
    assert ss2d(torch.rand(2, 5, 7, 32)).shape == (2, 5, 7, 32)


def vmamba_state(channels: int, inner: int, n: int, rank: int) -> dict[str, torch.Tensor]:
    """Random weights of an SS2D under VMamba's names."""
    shapes = {
        "in_proj.weight": (2 * inner, channels),
        "conv2d.weight": (inner, 1, 3, 3),
        "conv2d.bias": (inner,),
        "x_proj_weight": (4, rank + 2 * n, inner),
        "dt_projs_weight": (4, inner, rank),
        "dt_projs_bias": (4, inner),
        "A_logs": (4 * inner, n),
        "Ds": (4 * inner,),
        "out_norm.weight": (inner,),
        "out_norm.bias": (inner,),
        "out_proj.weight": (channels, inner),
    }
    torch.manual_seed(0)
    return {name: 0.5 * torch.randn(shape) for name, shape in shapes.items()}


def vmamba_forward(w: dict[str, torch.Tensor], x: torch.Tensor, n: int) -> torch.Tensor:
    """SS2D as VMamba computes it, scan by scan: `[B, H, W, C]` to `[B, H, W, C]`."""
    functional = torch.nn.functional
    u, z = functional.linear(x, w["in_proj.weight"]).chunk(2, dim=-1)
    inner, rank = u.shape[-1], w["dt_projs_weight"].shape[2]
    u = u.permute(0, 3, 1, 2)
    u = functional.silu(
        functional.conv2d(u, w["conv2d.weight"], w["conv2d.bias"], padding=1, groups=inner)
    )
    batch, _, height, width = u.shape
    rows, columns = u.flatten(2), u.transpose(2, 3).flatten(2)
    total = torch.zeros_like(u)
    for k, sequence in enumerate((rows, columns, rows.flip(-1), columns.flip(-1))):
        projected = torch.einsum("cd,bdl->bcl", w["x_proj_weight"][k], sequence)
        r, B, C = projected.split((rank, n, n), dim=1)
        y = cmamba_ref.selective_scan(
            sequence,
            torch.einsum("dr,brl->bdl", w["dt_projs_weight"][k], r),
            -w["A_logs"].unflatten(0, (4, inner))[k].exp(),
            B,
            C,
            w["Ds"].unflatten(0, (4, inner))[k],
            delta_bias=w["dt_projs_bias"][k],
            delta_softplus=True,
            backend="reference",
        )
        y = y.flip(-1) if k >= 2 else y
        shape = (batch, inner, width, height) if k % 2 else (batch, inner, height, width)
        total = total + (y.view(shape).transpose(2, 3) if k % 2 else y.view(shape))
    total = total.permute(0, 2, 3, 1)
    normed = functional.layer_norm(total, (inner,), w["out_norm.weight"], w["out_norm.bias"])
    return functional.linear(normed * functional.silu(z), w["out_proj.weight"])


@pytest.mark.parametrize("stored_as_convolutions", [False, True])
def test_vmamba_weights_give_vmamba_results(stored_as_convolutions):
    state = vmamba_state(channels=20, inner=24, n=4, rank=2)
    x = torch.randn(2, 5, 7, 20)
    expected = vmamba_forward(state, x, n=4)
    if stored_as_convolutions:  # as its channel-first models do
        for name in ("in_proj.weight", "out_proj.weight"):
            state[name] = state[name][:, :, None, None]
    ss2d = cmamba_ref.SS2D(20, d_state=4, ssm_ratio=1.2)
    ss2d.load_vmamba(state)
    with torch.no_grad():
        torch.testing.assert_close(ss2d(x), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.pop("Ds"), r"\['D'\]"),
        (lambda s: s.update(extra=torch.zeros(1)), r"\['extra'\]"),
        (lambda s: s.update({"in_proj.weight": torch.zeros(24, 20)}), r"\['in_proj.weight'\]"),
    ],
    ids=["missing", "too many", "without a gate"],
)
def test_load_vmamba_refuses_other_weights(change, message):
    state = vmamba_state(channels=20, inner=24, n=4, rank=2)
    change(state)
    with pytest.raises(InvalidArgumentError, match=message):
        cmamba_ref.SS2D(20, d_state=4, ssm_ratio=1.2).load_vmamba(state)


def test_base_lands_on_the_published_totals():
    """56.26 M parameters +-1 %, 362.7 GMACs +-2 % at 768x512, scan at 4.5 MACs per element."""
    total = complexity.count("base", 768, 512)["total"]
    assert total.params == pytest.approx(complexity.PUBLISHED["params"], rel=0.01)
    assert total.total("4.5") == pytest.approx(complexity.PUBLISHED["macs"], rel=0.02)
    # The derivation, part by part: 332.5 G without the scan, 30.0 G of scan.
    assert total.macs / 1e9 == pytest.approx(332.5, abs=0.1)
    assert 18 * total.scan / 1e9 == pytest.approx(30.0, abs=0.1)


@pytest.mark.parametrize(
    ("name", "params", "macs", "scan"),
    [("small", 14.596e6, 67.958e9, 11.325e9), ("tiny", 5.535e6, 20.49e9, 0.09378e9)],
)
def test_totals_of_the_other_configurations(name, params, macs, scan):
    costs = complexity.count(name, 768, 512)
    total = costs.pop("total")
    assert total.params == pytest.approx(params, rel=1e-3)
    assert total.macs == pytest.approx(macs, rel=1e-3)
    assert 18 * total.scan == pytest.approx(scan, rel=5e-3)
    # The rest are the likelihoods of z.
    assert sum(cost.macs for cost in costs.values()) == pytest.approx(total.macs, rel=2e-5)


def test_scan_elements_match_a_hand_count():
    """L D N summed over the scans of tiny, from its sizes alone."""
    positions = 768 * 512
    per_image = (
        2 * positions // 16 * 32 * 2  # g_a and g_s at H/4: D = 64 / 2, N = 2
        + 2 * positions // 64 * 48 * 2
        + 6 * positions // 256 * 48 * 2  # six slices of the CAE
    )
    assert complexity.count("tiny", 768, 512)["total"].scan == per_image


def test_complexity_table_names_every_convention(capsys):
    assert complexity.main(["tiny"]) == 0
    printed = capsys.readouterr().out
    for convention in complexity.CONVENTIONS:
        assert convention in printed
    with pytest.raises(SystemExit):
        complexity.main(["huge"])
    with pytest.raises(SystemExit):
        complexity.main(["--size", "wide"])


def test_literal_cae_width():
    """`cae_width=None` is the paper's equation: Phi_i itself is means and log-scales."""
    literal = dataclasses.replace(BASE, cae_width=None)
    cae = CAE(literal, context_channels=640, slice_width=64)
    assert cae.w_sq.out_features == 2 * literal.slice_widths[0] == 128
    assert not list(cae.head.parameters())
    assert CAE(BASE, context_channels=640, slice_width=64).head.out_features == 128
    small = CMamba(dataclasses.replace(MINI, cae_width=None)).eval()
    with torch.no_grad():
        assert small(random_images(1, 64, 64), 3.0)["x_hat"].shape == (1, 3, 64, 64)


@pytest.mark.parametrize("size", [(64, 64), (1, 1), (65, 127), (1, 200), (130, 64)])
@pytest.mark.parametrize("training", [True, False])
def test_forward_takes_any_size(model, size, training):
    model.train(training)
    x = random_images(2, *size)
    output = model(x, 4.0)
    assert output["x_hat"].shape == x.shape
    padded = [-(-side // 64) * 64 for side in size]
    assert output["likelihoods"]["y"].shape == (2, 32, padded[0] // 16, padded[1] // 16)
    assert output["likelihoods"]["z"].shape == (2, 16, padded[0] // 64, padded[1] // 64)
    for likelihood in output["likelihoods"].values():
        assert (likelihood > 0).all() and (likelihood <= 1).all()


def test_padding_continues_lines_and_smooths_them():
    """By hand, and without rounding: weights and pixels are powers of two."""
    x = torch.tensor([0.0, 1.0, 0.0, 0.0, 0.5]).expand(1, 3, 1, 5)
    padded = pad(x)
    assert padded.shape == (1, 3, 64, 64)
    first = torch.tensor([0.25, 0.5, 0.25, 0.125, 0.375])
    second = first / 2 + torch.tensor([0.25 + 0.25, 0.25 + 0.125, 0.25 + 0.375, 0.875, 0.625]) / 4
    assert torch.equal(padded[0, 0, :3, :5], torch.stack([x[0, 0, 0], first, second]))
    assert padded[..., 5:].std() < 0.1 * x.std()
    row = random_images(1, 1, 64)
    assert torch.equal(pad(row).mT, pad(row.mT))
    for shape in ((64, 128), (1, 1), (65, 3)):
        grey = torch.full((2, 3, *shape), 0.7)
        assert (pad(grey) == 0.7).all()
    x = random_images(1, 64, 128)
    assert torch.equal(pad(x), x)


def test_training_is_noisy_and_evaluation_is_not(model):
    x = random_images(1, 64, 64)
    model.eval()
    with torch.no_grad():
        first, second = model(x, 4.0), model(x, 4.0)
    for key in ("y", "z"):
        assert torch.equal(first["likelihoods"][key], second["likelihoods"][key])
    model.train()
    first, second = model(x, 4.0), model(x, 4.0)
    # Noise is in the rate alone: the reconstruction is of rounded latents in both modes.
    assert not torch.equal(first["likelihoods"]["y"], second["likelihoods"]["y"])
    assert torch.equal(first["x_hat"], second["x_hat"])


def test_given_noise_is_used(model):
    """Then an image sees its own, whatever it is batched with; x_hat has none."""
    model.train()
    x, quality = random_images(2, 64, 128), torch.tensor([2.0, 7.0])
    shapes = model.latent_shapes(64, 128)
    assert shapes == {"y": (32, 4, 8), "z": (16, 1, 2)}
    noise = {name: torch.rand(2, *shape) - 0.5 for name, shape in shapes.items()}
    both, again = model(x, quality, noise), model(x, quality, noise)
    drawn = model(x, quality)
    assert torch.equal(both["x_hat"], drawn["x_hat"])
    for name in ("y", "z"):
        assert torch.equal(both["likelihoods"][name], again["likelihoods"][name])
        assert not torch.equal(both["likelihoods"][name], drawn["likelihoods"][name])
    second = model(x[1:], quality[1:], {name: values[1:] for name, values in noise.items()})
    # The noise of y stands in the likelihood that it is given to: that of the same element.
    for name in ("y", "z"):
        close = torch.allclose(
            second["likelihoods"][name], both["likelihoods"][name][1:], atol=1e-4
        )
        assert close, name
    none = model(x, quality, {name: torch.zeros_like(values) for name, values in noise.items()})
    assert not torch.equal(none["likelihoods"]["y"], both["likelihoods"]["y"])


@pytest.mark.parametrize("change", [{"y": None}, {"z": torch.zeros(1, 16, 1, 1)}])
def test_noise_of_another_shape_is_refused(model, change):
    noise = {name: torch.zeros(2, *shape) for name, shape in model.latent_shapes(64, 64).items()}
    noise = {name: value for name, value in {**noise, **change}.items() if value is not None}
    with pytest.raises(InvalidArgumentError, match=f"`noise` must hold {next(iter(change))}"):
        model.train()(random_images(2, 64, 64), 3.0, noise)


@pytest.mark.parametrize("part", ["ms-ssim", -0.1, 1.1, float("nan"), None])
def test_the_part_of_ms_ssim_is_a_number_from_0_to_1(part):
    x = torch.rand(1, 3, 64, 64)
    output = {"x_hat": x, "likelihoods": {}}
    with pytest.raises(InvalidArgumentError, match="`ms_ssim` must be a number from 0 to 1"):
        rate_distortion_loss(output, x, 0.01, part)
    with pytest.raises(InvalidArgumentError, match="sides of at least 161"):
        rate_distortion_loss(output, x, 0.01, 0.5)


def test_every_parameter_is_trained(model):
    """The loss reaches every parameter; quantiles have a loss of their own."""
    x = random_images(2, 64, 64)
    quality = torch.tensor([2.5, 7.0])
    output = model.train()(x, quality)
    loss = rate_distortion_loss(output, x, model.gain.lmbda(quality))["loss"].sum()
    (loss + model.aux_loss()).backward()
    missing = [name for name, p in model.named_parameters() if p.grad is None]
    assert missing == []
    for name, parameter in model.named_parameters():
        assert torch.isfinite(parameter.grad).all(), name


def test_aux_loss_moves_only_the_quantiles(model):
    model.aux_loss().backward()
    touched = [name for name, p in model.named_parameters() if p.grad is not None]
    assert touched == ["entropy_bottleneck.quantiles"]


def test_lower_bound_gradient_points_inwards():
    """Descent subtracts the gradient: one below zero lifts the value, however small it is."""
    x = torch.tensor([0.5, 1.0, 2.0, 0.5], requires_grad=True)
    bounded = lower_bound(x, 1.0)
    assert bounded.tolist() == [1.0, 1.0, 2.0, 1.0]
    bounded.backward(torch.tensor([0.25, 0.25, 0.25, -0.25]))
    assert x.grad is not None and x.grad.tolist() == [0.0, 0.25, 0.25, -0.25]


def test_rounding_is_straight_through():
    x = torch.tensor([-1.5, -0.2, 0.5, 2.7], requires_grad=True)
    rounded = ste_round(x)
    assert rounded.tolist() == [-2.0, 0.0, 0.0, 3.0]
    rounded.backward(torch.tensor([1.0, -2.0, 3.0, 4.0]))
    assert x.grad is not None and x.grad.tolist() == [1.0, -2.0, 3.0, 4.0]


def test_tables_of_y_are_those_of_64_scales(model):
    """Log-spaced from 0.11 to 256, as docs/format.md has them."""
    model.gaussian_conditional.update()
    made = model.gaussian_conditional.stored.tables()
    expected = gaussian_tables([0.11 * (256 / 0.11) ** (i / 63) for i in range(64)])
    assert made.offsets.tolist() == expected.offsets.tolist()
    assert abs(made.cdf - expected.cdf).max() <= 1  # scales may differ in their last bit


def test_a_float64_copy_is_frozen_and_leaves_the_module_alone():
    layer = torch.nn.Conv2d(2, 3, 1)
    twin = float64_copy(layer, torch.device("cpu"))
    assert {(p.dtype, p.requires_grad) for p in twin.parameters()} == {(torch.float64, False)}
    assert {(p.dtype, p.requires_grad) for p in layer.parameters()} == {(torch.float32, True)}
    assert torch.equal(twin.weight.float(), layer.weight) and not twin.training


@pytest.mark.parametrize("scale", [0.2, 1.0, 7.5])
def test_likelihood_of_y_is_the_mass_of_the_unit_interval(model, scale):
    mean, offsets = 0.3, torch.linspace(-3, 3, 13, dtype=torch.float64) * scale
    y = mean + offsets
    log_scales = torch.full_like(y, math.log(scale))
    likelihood = model.gaussian_conditional.likelihood(y, torch.full_like(y, mean), log_scales)
    density = NormalDist(mean, scale)
    mass = [density.cdf(v + 0.5) - density.cdf(v - 0.5) for v in y.tolist()]
    assert torch.allclose(likelihood, torch.tensor(mass, dtype=torch.float64), rtol=1e-6, atol=2e-9)


def test_fresh_model_reconstructs():
    """g_a and g_s start as a transform and its inverse, see cmamba_ref.nn.hadamard_init."""
    torch.manual_seed(0)
    fresh = CMamba(TINY).eval()
    x = random_images(1, 128, 128)
    with torch.no_grad():
        mse = (fresh.g_s(fresh.g_a(x)) - x).square().mean()
    assert -10 * mse.log10() > 30
    # With room for all 768 coefficients of a 16x16 block the transform is exact.
    sizes = {"widths": (12, 48, 192), "latent_channels": 768, "slices": 1}
    whole = dataclasses.replace(TINY, depths=(0, 0, 0), **sizes)
    full = CMamba(whole).eval()
    with torch.no_grad():
        mse = (full.g_s(full.g_a(x)) - x).square().mean()
    assert -10 * mse.log10() > 42


def test_fresh_blocks_are_the_identity():
    x = torch.randn(2, 16, 9, 7)
    sizes = {"d_state": 2, "ssm_ratio": 1.0}
    for block in (ResBlock(16), VSSBlock(16, **sizes), CASSM(16, **sizes, fusion_reduction=4)):
        assert torch.allclose(block(x), x, atol=1e-6), type(block).__name__


def test_fusion_weights_follow_the_content():
    """alpha + beta = 1 per channel, and both depend on the image."""
    torch.manual_seed(0)
    block = CASSM(16, d_state=2, ssm_ratio=1.0, fusion_reduction=4)
    alpha, beta = block.fusion_weights(torch.randn(2, 16))
    assert alpha.shape == beta.shape == (2, 16, 1, 1)
    assert torch.allclose(alpha + beta, torch.ones_like(alpha))
    assert not torch.allclose(alpha[0], alpha[1])


def test_ssm_sees_the_whole_map():
    """One pixel in a corner reaches the opposite corner through the global path, not the local."""
    torch.manual_seed(0)
    x = torch.randn(1, 8, 24, 24)
    moved = x.clone()
    moved[:, 0, 0, 0] += 1
    ssm, cnn = VSSBlock(8, d_state=4, ssm_ratio=2.0), ResBlock(8)
    torch.nn.init.normal_(ssm.ss2d.out_proj.weight)
    torch.nn.init.normal_(cnn.conv2.weight)
    assert (ssm(moved) - ssm(x))[..., -1, -1].abs().max() > 0
    assert (cnn(moved) - cnn(x))[..., -1, -1].abs().max() == 0


def test_quality_scales_the_rate(model):
    """More gain, more bits: already so in a fresh model."""
    model.eval()
    x = random_images(1, 64, 64)
    with torch.no_grad():
        rates = [
            sum(float(bits(p)) for p in model(x, q)["likelihoods"].values()) for q in (1, 4.5, 8)
        ]
    assert rates[0] < rates[1] < rates[2]


def test_gain_is_interpolated_geometrically(model):
    with torch.no_grad():
        model.gain.log_gain.copy_(torch.randn_like(model.gain.log_gain))
    low, high, middle = (model.gain(torch.tensor([q]))[0] for q in (3.0, 4.0, 3.5))
    assert torch.allclose(middle, (low * high).sqrt())
    top = model.gain(torch.tensor([8.0]))[0]
    assert torch.allclose(top[0, :, 0, 0], model.gain.log_gain[-1].exp())


def test_qualities_out_of_range_are_refused(model):
    x = random_images(1, 64, 64)
    for quality in (0.99, 8.01, float("nan")):
        with pytest.raises(InvalidArgumentError, match="quality"):
            model.compress(x, quality)
    with pytest.raises(InvalidArgumentError, match="one rate"):
        CMamba(dataclasses.replace(MINI, lmbdas=()))(x, 3.0)


def test_default_quality(model):
    x = random_images(1, 64, 64)
    model.eval()
    with torch.no_grad():
        assert torch.equal(model(x)["x_hat"], model(x, 4.0)["x_hat"])


@pytest.mark.parametrize(
    "quality", [[0.0, 3.0], [3.0, 8.5], [3.0, float("nan")], [3.0, 3.0, 3.0], [[3.0, 3.0]]]
)
def test_tensors_of_qualities_are_checked(model, quality):
    with pytest.raises(InvalidArgumentError, match="quality"):
        model(random_images(2, 64, 64), torch.tensor(quality))


def test_out_of_range_scales_have_inward_gradient(model):
    """Likelihoods are those of the table's ends, and gradients point inwards from outside."""
    log_scales = torch.tensor([-5.0, 7.0], requires_grad=True)
    distance = torch.tensor([30.0, 0.0])
    likelihood = model.gaussian_conditional.likelihood(distance, torch.zeros(2), log_scales)
    (-likelihood.log()).sum().backward()
    assert log_scales.grad[1] > 0
    ends = torch.tensor([0.11, 256.0]).log()
    at_ends = model.gaussian_conditional.likelihood(distance, torch.zeros(2), ends)
    assert torch.allclose(likelihood, at_ends)


def test_wrong_image_shapes_are_refused(model):
    for x in (torch.rand(3, 64, 64), torch.rand(1, 1, 64, 64), torch.zeros(1, 3, 0, 64)):
        with pytest.raises(InvalidArgumentError, match="`x`"):
            model(x, 3.0)
    with pytest.raises(InvalidArgumentError, match="`x`"):
        model(torch.zeros(1, 3, 64, 64, dtype=torch.uint8), 3.0)


def test_wrong_image_types_say_what_to_do():
    """In every call; values a little out of 0...1 are nobody's mistake."""
    model, x = codec_helpers.random_model(), torch.rand(1, 3, 64, 64)
    for call in (model, model.analyze, model.compress):
        for scaled in (255 * x, (255 * x).half()):
            with pytest.raises(
                InvalidArgumentError, match=r"got values up to 25\d.*; divide 0...255"
            ):
                call(scaled, 3.0)
        with pytest.raises(InvalidArgumentError, match=r"8-bit images with .float\(\) / 255"):
            call((255 * x).byte(), 3.0)
        for wrong in (x.numpy(), None, "a.png"):
            with pytest.raises(InvalidArgumentError, match=f"got {type(wrong).__name__}"):
                call(wrong, 3.0)
        for wrong in ("5", True, [5]):
            with pytest.raises(InvalidArgumentError, match="`quality` must be a number from 1 to"):
                call(x, wrong)
        call(2 * x - 0.5, 3.0)


@pytest.mark.parametrize("config", [codec_helpers.SMALL, codec_helpers.ONE_RATE])
def test_analyze_and_synthesize_match_the_codec(config):
    """The symbols are those of y, and the decoder's y_bar becomes the decoded image."""
    model = codec_helpers.random_model(config)
    quality = 2.5 if config.lmbdas else None
    x = random_images(1, 70, 100)
    with torch.no_grad():
        y = model.analyze(x, quality)
        x_hat = model(x, quality)["x_hat"]
    assert y.shape[1:] == model.latent_shapes(70, 100)["y"]
    means = []
    hooks = [
        cae.register_forward_hook(lambda module, args, output: means.append(output[0]))
        for cae in model.context.cae
    ]
    with torch.no_grad():
        model(x, quality)
    for hook in hooks:
        hook.remove()
    with codec_helpers.recording() as recordings:
        coded = model.compress(x, quality)
    symbols = torch.from_numpy(recordings[0].symbols[-y.numel() :]).view_as(y)
    rounded = (y - torch.cat(means, dim=1)).round()
    is_coded = recordings[0].indexes[-y.numel() :] >= SKIPPED_TABLES
    rounded *= torch.from_numpy(is_coded).view_as(y)
    # The codec computes in float64, so a value in the middle may be rounded the other way.
    assert (rounded == symbols).float().mean() > 0.999 and symbols.any()

    y_bar, qualities = model.decode_latent(**coded)
    decoded = model.decompress(**coded)["x_hat"]
    with torch.no_grad():
        for same in (quality, qualities):
            assert torch.equal(model.synthesize(y_bar, same).clamp(0, 1), decoded)
        assert torch.allclose(model.synthesize(y_bar, quality)[..., :70, :100], x_hat, atol=1e-4)


def test_analyze_applies_the_gain(model):
    """Each image has its own; its inverse is taken back, and nothing is clipped."""
    with torch.no_grad():
        model.gain.log_gain.copy_(torch.randn_like(model.gain.log_gain))
        model.gain.log_inverse_gain.copy_(-model.gain.log_gain)
        x, qualities = random_images(2, 64, 128), torch.tensor([2.0, 6.5])
        gain = model.gain(qualities).latent
        unscaled = model.g_a(x)
        y = model.analyze(x, qualities)
        assert torch.allclose(y, unscaled * gain, rtol=1e-4, atol=1e-4)
        assert torch.allclose(model.analyze(x[1:], 6.5), y[1:], rtol=1e-4, atol=1e-4)
        assert torch.equal(model.analyze(x), model.analyze(x, 4.0))
        found, expected = model.synthesize(3 * y, qualities), model.g_s(3 * unscaled)
    assert found.shape == (2, 3, 64, 128) and found.max() > 1
    assert torch.allclose(found, expected, rtol=1e-3, atol=1e-4)


def test_analyze_and_synthesize_are_differentiable(model):
    x = random_images(1, 64, 64).requires_grad_()
    y = model.analyze(x, 3.0)
    y.retain_grad()
    model.synthesize(y, 3.0).square().sum().backward()
    for tensor in (x, y):
        assert tensor.grad is not None and torch.isfinite(tensor.grad).all()
        assert tensor.grad.abs().max() > 0
    assert model.gain.log_gain.grad.any() and model.gain.log_inverse_gain.grad.any()


def test_analyze_and_synthesize_refuse_wrong_arguments(model):
    x, y = random_images(1, 64, 64), torch.zeros(1, 32, 4, 4)
    for wrong in (x[0], x[:, :1], x[..., :0], x.byte()):
        with pytest.raises(InvalidArgumentError, match="`x`"):
            model.analyze(wrong, 3.0)
    for wrong in (y[0], y[:, :16], y[..., :0], y.int()):
        with pytest.raises(InvalidArgumentError, match="`y`"):
            model.synthesize(wrong, 3.0)
    fixed = CMamba(dataclasses.replace(MINI, lmbdas=()))
    for call, tensor in ((model.analyze, x), (model.synthesize, y)):
        for quality in (0.99, 8.01, torch.tensor([3.0, 3.0])):
            with pytest.raises(InvalidArgumentError, match="quality"):
                call(tensor, quality)
        with pytest.raises(InvalidArgumentError, match="one rate"):
            getattr(fixed, call.__name__)(tensor, 3.0)


def test_unknown_configuration_lists_known_names():
    with pytest.raises(InvalidArgumentError, match="base"):
        CMamba("enormous")


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_configuration_survives_json(config):
    assert CMambaConfig.from_json(config.to_json()) == config


@pytest.mark.parametrize(
    ("change", "argument"),
    [
        ({"widths": (1, 2)}, "widths"),
        ({"widths": (0, 2, 3)}, "widths"),
        ({"slices": 5}, "latent_channels"),
        ({"d_state": 1.5}, "d_state"),
        ({"depths": (-1, 1, 1)}, "depths"),
        ({"ssm_ratio": 0.0}, "ssm_ratio"),
        ({"ssm_stages": (1, 1, 1)}, "ssm_stages"),
        ({"lmbdas": (0.01,)}, "lmbdas"),
        ({"lmbdas": (0.01, -1.0)}, "lmbdas"),
        ({"lmbdas": ("x", 1.0)}, "lmbdas"),
        ({"lmbdas": (10**400, 1)}, "lmbdas"),
        ({"lmbdas": (0.01,) * 700}, "lmbdas"),
    ],
)
def test_impossible_sizes_are_refused(change, argument):
    with pytest.raises(InvalidArgumentError, match=argument):
        dataclasses.replace(SMALL, **change)


@pytest.mark.parametrize("text", ["", "[]", '{"name": "x"}', '{"colour": 1}', "{"])
def test_broken_configuration_files_are_refused(text):
    with pytest.raises(InvalidArgumentError):
        CMambaConfig.from_json(text)
