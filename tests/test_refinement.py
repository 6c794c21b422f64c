"""Efforts: refinement of y for one image, whole and in tiles."""

import numpy as np
import pytest
import torch
from codec_helpers import ONE_RATE, load_image, make_image, random_model, shipped_model

from cmamba_ref import CMamba, InvalidArgumentError, decode, encode
from cmamba_ref.cli.demo import DEMO_IMAGE
from cmamba_ref.codec import refinement
from cmamba_ref.codec.container import Container
from cmamba_ref.codec.refinement import STEPS, check_effort, soft_round


@pytest.fixture(scope="module")
def image() -> np.ndarray:
    return load_image(DEMO_IMAGE)[100:196, 200:328]


def loss(image: np.ndarray, data: bytes, quality: float) -> float:
    """The rate-distortion loss of a file, in bits."""
    container, model = Container.unpack(data), shipped_model()
    assert model.gain is not None
    lmbda = float(model.gain.lmbda(torch.tensor([quality]))[0])
    error = decode(data, model).astype(float) - image
    return 8 * (len(container.y) + len(container.z)) + lmbda * float((error**2).sum()) / 3


@pytest.mark.parametrize(
    ("effort", "quality", "part"),
    [(1, 2, 0.993), (1, 6.5, 0.97), (4, 2, 0.985), (4, 6.5, 0.96)],
)
def test_an_effort_lowers_the_loss(image, effort, quality, part):
    model = shipped_model()
    plain, refined = encode(image, model, quality), encode(image, model, quality, effort=effort)
    assert loss(image, refined, quality) < part * loss(image, plain, quality)


def autocast():
    return torch.autocast("cpu", torch.bfloat16)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, autocast])
def test_an_effort_needs_no_mode_of_its_caller(image, mode):
    model, part = shipped_model(), image[:64, :64]
    expected = encode(part, model, 4, effort=1)
    with mode():
        found = encode(part, model, 4, effort=1)
    if mode is autocast:  # analyses in 16 bits
        assert loss(part, found, 4) < loss(part, encode(part, model, 4), 4)
    else:
        assert found == expected


def test_a_model_first_used_in_inference_mode_takes_an_effort(image, tmp_path):
    part = image[:64, :64]
    with torch.inference_mode():
        model = CMamba.from_pretrained("tiny")
        encode(part, model, 4)
    assert encode(part, model, 4, effort=1) == encode(part, shipped_model(), 4, effort=1)


def test_the_same_effort_gives_the_same_file_and_leaves_the_model_alone(image):
    model = shipped_model()
    before = [(p.requires_grad, p.grad) for p in model.parameters()]
    state = torch.get_rng_state()
    assert encode(image, model, 4, effort=1) == encode(image, model, 4, effort=1)
    assert [(p.requires_grad, p.grad) for p in model.parameters()] == before
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("shape", [(65, 70, 3), (40, 90), (64, 64, 4)])
def test_any_image_is_refined(shape):
    image = make_image(*shape[:2])
    if len(shape) == 2:
        image = image[..., 0]
    elif shape[2] == 4:
        image = np.dstack([image, image[..., :1]])
    plain, refined = (encode(image, shipped_model(), 4, effort=effort) for effort in (0, 1))
    assert decode(refined).shape == image.shape
    assert refined != plain


def test_large_latents_are_refined_in_tiles(image, monkeypatch):
    whole = encode(image, shipped_model(), 4, effort=2)
    monkeypatch.setattr(refinement, "TILE", 3)
    monkeypatch.setattr(refinement, "MARGIN", 2)
    done = []
    tiled = encode(image, shipped_model(), 4, effort=2, progress=lambda *n: done.append(n))
    # 128 x 128 pixels when padded: 8 x 8 positions, 3 x 3 tiles.
    assert done == [(n + 1, 9 * STEPS[2]) for n in range(9 * STEPS[2])]
    plain = encode(image, shipped_model(), 4)
    gains = [loss(image, data, 4) - loss(image, plain, 4) for data in (whole, tiled)]
    assert gains[1] < 0.5 * gains[0] < 0


@pytest.mark.parametrize("size", [(4, 4), (41, 40), (7, 130)])
def test_tiles_cover_each_position_once(size):
    seen = np.zeros(size, dtype=int)
    for tile in refinement._tiles(*size):
        seen[tile.inner] += 1
        around = np.zeros(size, dtype=bool)
        around[tile.window] = True
        assert around[tile.inner].all()
        assert max(np.shape(seen[tile.inner])) <= refinement.TILE
    assert (seen == 1).all()


def test_only_tiles_that_lower_the_loss_are_kept(image, monkeypatch):
    """One of two tiles is made worse: the other one is kept."""
    monkeypatch.setattr(refinement, "TILE", 4)
    anneal = refinement._Problem.anneal
    plain = encode(image, shipped_model(), 4)

    def spoil(self, y, phi, tile, steps):
        yield from anneal(self, y, phi, tile, steps)
        if tile.inner[0].start == 0:
            y[(slice(None), 5, *tile.inner)] += 3

    def spoil_all(self, y, *_):
        y += 3
        yield

    monkeypatch.setattr(refinement._Problem, "anneal", spoil)
    half = encode(image, shipped_model(), 4, effort=2)
    assert loss(image, half, 4) < loss(image, plain, 4)
    monkeypatch.setattr(refinement._Problem, "anneal", spoil_all)
    assert encode(image, shipped_model(), 4, effort=2) == plain


def test_a_search_that_is_ended_keeps_what_it_has_found(image):
    seen = []

    def stop(done: int, total: int) -> bool:
        seen.append((done, total))
        return done == 12

    model = shipped_model()
    plain, stopped = encode(image, model, 6), encode(image, model, 6, effort=3, progress=stop)
    assert seen == [(n, 32) for n in range(1, 13)]
    assert loss(image, stopped, 6) < loss(image, plain, 6)


def test_padding_does_not_count(image):
    """The loss is that of the image: what it says of the refined file is what a reader sees."""
    cut = image[:70, :65]
    x = torch.from_numpy(np.array(cut)).permute(2, 0, 1)[None].float() / 255
    problem = refinement._Problem(shipped_model(), x, 4.0)
    y = shipped_model().analyze(x, 4)
    with torch.no_grad():
        state = problem.state(y, shipped_model().h_a(y), problem.slope)
    assert state.loss == pytest.approx(loss(cut, encode(cut, shipped_model(), 4), 4), rel=1e-5)
    # The information of z and the overhead of the coder are not in the map.
    assert 0.8 * state.loss < float(state.loss_map.sum()) < state.loss


def test_soft_rounding_becomes_rounding():
    values = torch.linspace(-3, 3, 101).requires_grad_()
    generator = torch.Generator().manual_seed(0)
    soft = soft_round(values, 0.5, generator)
    assert ((soft >= values.floor()) & (soft <= values.floor() + 1)).all()
    assert (soft - values.round()).abs().mean() > 0.1  # at random
    (gradient,) = torch.autograd.grad(soft.sum(), values)
    assert (gradient >= 0).all() and (gradient > 0).sum() > 90  # none at whole numbers
    far = (values - values.round()).abs() < 0.4
    sharp = soft_round(values, 0.02, generator)
    torch.testing.assert_close(sharp[far], values.round()[far], atol=1e-3, rtol=0)


def test_compiled_models_and_default_devices_change_nothing():
    model, image = random_model(), make_image(40, 70)
    data = encode(image, model, effort=1)
    assert encode(image, torch.compile(model, backend="eager"), effort=1) == data
    with torch.device("meta"):
        assert encode(image, model, effort=1) == data


@pytest.mark.parametrize("effort", [-1, 10, 1.5, True, "3", None])
def test_efforts_are_checked(effort):
    with pytest.raises(InvalidArgumentError, match="`effort` must be"):
        check_effort(effort, random_model())


def test_efforts_may_be_of_numpy():
    assert check_effort(np.int64(3), random_model()) == check_effort(3, random_model())


def test_a_model_of_one_rate_has_no_efforts(image):
    model = random_model(ONE_RATE)
    assert encode(image, model, effort=0)
    with pytest.raises(InvalidArgumentError, match="`effort` must be 0"):
        encode(image, model, effort=1)


def test_a_model_for_ms_ssim_takes_no_effort(image):
    model = CMamba.from_pretrained("tiny-msssim")
    with pytest.raises(InvalidArgumentError, match="`effort` must be 0 for 'tiny-msssim'.*MS-SSIM"):
        encode(image, model, effort=1)


def test_a_model_in_bfloat16_is_refined_too():
    model, image = random_model().bfloat16(), make_image(40, 70)
    assert decode(encode(image, model, effort=1), model).shape == image.shape
