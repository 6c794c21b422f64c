"""The factorised prior of z: its density, its quantiles, its tables, its first weights."""

import numpy as np
import pytest
import torch

from cmamba_ref.entropy.factorized import TAIL_MASS, FactorizedPrior
from cmamba_ref.entropy.precision import float64_copy

CHANNELS = 6


@pytest.fixture
def prior() -> FactorizedPrior:
    """Densities of many shapes: weights as wide apart as training leaves them, medians anywhere."""
    torch.manual_seed(0)
    made = FactorizedPrior(CHANNELS)
    with torch.no_grad():
        for parameter in [*made.matrices, *made.biases, *made.factors]:
            parameter.add_(torch.randn_like(parameter) / 2)
    return made


def logit_cdf(prior: FactorizedPrior, values: np.ndarray) -> np.ndarray:
    """Logit of the cumulative at `values` `[C, n]`, from Ballé et al. 2018, appendix 6.1.

    f_K o ... o f_1 with f_k(x) = g_k(H x + b), H = softplus(.), g_k(x) = x + tanh(a) * tanh(x), and
    without g in the last layer; the sigmoid that follows is left to the caller. In float64.
    """
    matrices, biases, factors = (
        [parameter.detach().double().numpy() for parameter in parameters]
        for parameters in (prior.matrices, prior.biases, prior.factors)
    )
    hidden = values[:, None]
    for k, (matrix, bias) in enumerate(zip(matrices, biases, strict=True)):
        hidden = np.einsum("coi,cin->con", np.log1p(np.exp(matrix)), hidden) + bias
        if k < len(factors):
            hidden = hidden + np.tanh(factors[k]) * np.tanh(hidden)
    return hidden[:, 0]


def sigmoid(values: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-values))


def quantiles_of(prior: FactorizedPrior) -> np.ndarray:
    """Where the cumulative is TAIL_MASS / 2, a half, and 1 - TAIL_MASS / 2, by bisection."""
    tail = np.log((1 - TAIL_MASS / 2) / (TAIL_MASS / 2))
    target = np.array([-tail, 0.0, tail])
    low, high = np.full((2, CHANNELS, 3), [[[-1e4]], [[1e4]]])
    for _ in range(80):
        middle = (low + high) / 2
        below = logit_cdf(prior, middle) < target
        low, high = np.where(below, middle, low), np.where(below, high, middle)
    return low


def test_likelihood_is_the_mass_of_the_unit_interval(prior):
    """As accurate on the upper side, where the cumulative is nearly 1, as on the lower."""
    values = np.linspace(-120, 120, 481)
    expected = sigmoid(logit_cdf(prior, np.tile(values + 0.5, (CHANNELS, 1))))
    expected -= sigmoid(logit_cdf(prior, np.tile(values - 0.5, (CHANNELS, 1))))
    assert (expected[:, -1] < 1e-6).any()
    z = torch.from_numpy(values).float().view(1, 1, -1, 1).expand(2, CHANNELS, -1, 1)
    with torch.no_grad():
        likelihood = prior.likelihood(z)
    assert likelihood.shape == z.shape
    for image in likelihood[..., 0].double().numpy():
        np.testing.assert_allclose(image, expected.clip(1e-9), rtol=2e-4)


def test_likelihoods_sum_to_one_for_a_symmetric_density(prior):
    """No hole at the point where both logits cancel."""
    with torch.no_grad():
        for bias in prior.biases:
            bias.zero_()
        at_centre = prior.likelihood(torch.zeros(1, CHANNELS, 1, 1))
        beside = prior.likelihood(torch.full((1, CHANNELS, 1, 1), 1e-3))
    assert torch.allclose(at_centre, beside, rtol=1e-3)


def test_a_fresh_density_is_a_logistic_of_scale_ten():
    """Apart from its biases, which are random in ±0.5 (Ballé et al. 2018; scale as in its code)."""
    torch.manual_seed(0)
    prior = FactorizedPrior(200)
    assert prior.quantiles.tolist() == [[-10.0, 0.0, 10.0]] * 200
    for bias in prior.biases:
        assert -0.5 <= bias.min() < -0.48 and 0.48 < bias.max() <= 0.5
    values = torch.linspace(-40, 40, 33)
    with torch.no_grad():
        for bias in prior.biases:
            bias.zero_()
        likelihood = prior.likelihood(values.view(1, 1, -1, 1).expand(1, 200, -1, 1))
    expected = sigmoid((values.numpy() + 0.5) / 10) - sigmoid((values.numpy() - 0.5) / 10)
    np.testing.assert_allclose(likelihood[0, :, :, 0].numpy(), np.tile(expected, (200, 1)), 1e-4)


def test_aux_loss_vanishes_at_the_quantiles_of_the_density(prior):
    exact = float64_copy(prior, torch.device("cpu"))

    def loss_at(quantiles: np.ndarray) -> float:
        exact.quantiles.copy_(torch.from_numpy(quantiles))
        return float(exact.aux_loss())

    found = quantiles_of(prior)
    assert loss_at(found) < 1e-6
    for which in range(3):
        for side in (-1, 1):
            moved = found.copy()
            moved[:, which] += side
            assert loss_at(moved) > 0.1


def test_training_finds_the_medians(prior):
    optimizer = torch.optim.Adam([prior.quantiles], lr=0.05)
    for _ in range(600):
        optimizer.zero_grad()
        prior.aux_loss().backward()
        optimizer.step()
    assert np.abs(prior.medians[:, 0, 0].numpy() - quantiles_of(prior)[:, 1]).max() < 0.1


def tables_of(prior: FactorizedPrior) -> list[tuple[int, np.ndarray]]:
    """Of each channel the first integer of the table and the probabilities, the escape's last."""
    prior.update()
    tables = prior.stored.tables()
    return [
        (int(offset), np.diff(tables.cdf[start:stop]) / 65536)
        for offset, start, stop in zip(
            tables.offsets, tables.starts[:-1], tables.starts[1:], strict=True
        )
    ]


def test_tables_reach_as_far_as_the_density(prior):
    """Half of TAIL_MASS is left out on either side, whatever the learned outer quantiles say.

    These lag behind in training.
    """
    medians = quantiles_of(prior)[:, 1]
    with torch.no_grad():
        prior.quantiles.copy_(torch.from_numpy(medians[:, None] + [-1.0, 0.0, 1.0]))
    for channel, (low, frequencies) in enumerate(tables_of(prior)):
        high = low + len(frequencies) - 2  # the last one is the escape's
        assert -512 < low < -1 and 1 < high < 512

        def cumulative(edges: list[float], channel: int = channel) -> np.ndarray:
            at = medians[channel] + np.array(edges)
            return sigmoid(logit_cdf(prior, np.tile(at, (CHANNELS, 1)))[channel])

        # The last integer beyond which there is less than the half, and one that has it.
        outside, inside = cumulative([low - 0.5, low + 0.5])
        assert outside < TAIL_MASS / 2 * 1.01 and inside > TAIL_MASS / 2 * 0.99
        inside, outside = 1 - cumulative([high - 0.5, high + 0.5])
        assert outside < TAIL_MASS / 2 * 1.01 and inside > TAIL_MASS / 2 * 0.99
        mass = np.diff(cumulative([k - 0.5 for k in range(low, high + 2)]))
        assert np.abs(frequencies[:-1] - mass).max() < 2e-4


def test_tables_follow_the_median(prior):
    """z is coded as distances from it, so a density that lies elsewhere has the same table."""
    before = tables_of(prior)
    with torch.no_grad():
        prior.biases[0].sub_(7 * torch.nn.functional.softplus(prior.matrices[0]))
        prior.quantiles.add_(7)
    for (offset, frequencies), (low, moved) in zip(before, tables_of(prior), strict=True):
        assert low == offset and np.abs(moved - frequencies).max() < 1e-4


@pytest.mark.parametrize(("weight", "reach"), [(10.0, 1), (-2.0, 512), (-8.0, 1)])
def test_table_reach_is_bounded(prior, weight, reach):
    """Of a density that is all at its median, of a wide one, and of one too thin for any table.

    Of the last nearly every value is escaped.
    """
    with torch.no_grad():
        for parameters, value in ((prior.matrices, weight), (prior.biases, 0), (prior.factors, 0)):
            for parameter in parameters:
                parameter.fill_(value)
    for offset, frequencies in tables_of(prior):
        assert offset == -reach and len(frequencies) == 2 * reach + 2


def test_rounding_never_makes_the_escape_negative(prior, monkeypatch):
    """Masses in float32 may add up to a little more than one."""
    mass = torch.zeros(CHANNELS, 1, 1025)
    mass[..., 510:515] = torch.tensor([0.1, 0.2, 0.4, 0.2, 0.1 + 1e-6])
    monkeypatch.setattr(prior, "_interval_mass", lambda values: mass)
    for offset, frequencies in tables_of(prior):
        assert offset == -2 and frequencies[-1] == 1 / 65536


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_weights_and_tables_move_to_a_device_and_keep_their_type(prior, device):
    prior.update()
    moved = prior.to(device, torch.bfloat16)
    for tensors, dtype in ((moved.parameters(), torch.float32), (moved.buffers(), torch.int32)):
        assert {(t.dtype, t.device.type) for t in tensors} == {(dtype, device)}
