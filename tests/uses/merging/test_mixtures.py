"""Mixtures merged: the search for the weights that suit all tasks."""

import json
import math
from pathlib import Path

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from tests.contracts import close

import bayesrule as br

GOLDEN = json.loads((Path(__file__).parents[2] / "golden" / "merge_mixture.json").read_text())
CONSTANT = (1 - sum(GOLDEN["alphas"])) * math.log(2 * math.pi / GOLDEN["delta"])  # that of the prior, which the numbers leave out
examples = settings(derandomize=True, deadline=None, max_examples=20)


def tensor(values):
    return torch.tensor(values, dtype=torch.float64)


def full(mean, precision):
    return br.Posterior.of(br.Full(tensor(mean), tensor(precision)), {"w": (2,)})


def golden(**options):
    posteriors = [
        br.Posterior.mixture(list(map(full, means, precisions)), weights)
        for weights, means, precisions in zip(GOLDEN["weights"], GOLDEN["means"], GOLDEN["precisions"], strict=True)
    ]
    start = {"w": tensor(GOLDEN["start"])}
    return br.merge_mixtures(None, posteriors, GOLDEN["alphas"], prior_precision=GOLDEN["delta"], start=start, **options)


def gaussian(seed, precision=0.0):
    generator = torch.Generator().manual_seed(seed)
    mean = torch.randn(3, generator=generator, dtype=torch.float64)
    return br.Posterior({"w": mean}, {"w": torch.rand(3, generator=generator, dtype=torch.float64) + 0.5 + precision})


class TestGolden:
    def test_fixed_point(self):
        found = golden()
        close(found.posterior.mean["w"], tensor(GOLDEN["theta"]), 1e-8)
        assert found.objective[-1] == pytest.approx(GOLDEN["objective"] + CONSTANT, abs=1e-8)
        assert len(found.objective) < 2 * GOLDEN["iterations"]

    @pytest.mark.parametrize("steps", range(1, len(GOLDEN["first_iterations"])))
    def test_first_steps(self, steps):
        found, wanted = golden(max_steps=steps), GOLDEN["first_iterations"][: steps + 1]
        close(found.posterior.mean["w"], tensor(wanted[-1]["theta"]), 1e-9)
        assert found.objective == pytest.approx([one["objective"] + CONSTANT for one in wanted], abs=1e-9)

    def test_what_it_ends_at_is_a_minimum(self):
        """Of the objective, by the densities of posteriors and autograd."""
        found = golden().posterior
        theta = found.mean["w"].clone().requires_grad_()
        prior = torch.distributions.Normal(tensor(0.0), tensor(GOLDEN["delta"]) ** -0.5)
        value = -prior.log_prob(theta).sum()
        for a, weights, means, precisions in zip(
            *(GOLDEN[key] for key in ("alphas", "weights", "means", "precisions")), strict=True
        ):
            mixture = torch.distributions.MixtureSameFamily(
                torch.distributions.Categorical(tensor(weights)),
                torch.distributions.MultivariateNormal(tensor(means), precision_matrix=tensor(precisions)),
            )
            value = value - a * (mixture.log_prob(theta) - prior.log_prob(theta).sum())
        close(torch.autograd.grad(value, theta)[0], torch.zeros(2, dtype=torch.float64), 1e-8)
        assert value.item() == pytest.approx(GOLDEN["objective"] + CONSTANT, abs=1e-8)


class TestAlgebra:
    @given(seed=st.integers(0, 10**6), alphas=st.lists(st.floats(0, 1.5), min_size=2, max_size=3))
    @examples
    def test_the_objective_does_not_increase(self, seed, alphas):
        base = gaussian(seed)
        posteriors = [br.Posterior.mixture([gaussian(seed + 7 * t + k, 1.5) for k in range(3)]) for t in range(len(alphas))]
        found = br.merge_mixtures(base, posteriors, alphas)
        slack = 1e-10 * (1 + abs(found.objective[0]))
        assert all(later <= earlier + slack for earlier, later in zip(found.objective, found.objective[1:], strict=False))
        assert all(float(share.sum()) == pytest.approx(1) for share in found.responsibilities)

    def test_gaussians_are_merged_as_they_are(self):
        base, posteriors = gaussian(0), [gaussian(1, 1.5), gaussian(2, 1.5)]
        found, plain = br.merge_mixtures(base, posteriors, [0.5, 1.0]), br.merge(base, posteriors, [0.5, 1.0])
        assert torch.equal(found.posterior.mean["w"], plain.mean["w"])
        assert torch.equal(found.posterior.precision["w"], plain.precision["w"])

    def test_equal_components_are_one(self):
        base, (one, two) = gaussian(0), (gaussian(seed, 1.5) for seed in (1, 2))
        found = br.merge_mixtures(base, [br.Posterior.mixture([one, one]), two])
        close(found.posterior.mean["w"], br.merge(base, [one, two]).mean["w"], 1e-12)
        assert found.responsibilities[0].tolist() == [0.5, 0.5]

    def test_the_start_decides_which_minimum_is_found(self):
        base = br.Posterior({"w": torch.zeros(1)}, {"w": torch.ones(1)})
        left, right = (br.Posterior({"w": torch.tensor([m])}, {"w": torch.tensor([50.0])}) for m in (-2.0, 2.0))
        for start, side in ((left, -1), (right, 1)):
            found = br.merge_mixtures(base, [br.Posterior.mixture([left, right])], start=start.mean)
            assert found.posterior.mean["w"].item() * side > 1.9

    def test_many_weights_in_float32(self):
        """Log densities of 1e8, rounded to single precision, would not tell components apart that differ by 1."""
        size = 200_000
        base = br.Posterior({"w": torch.zeros(size)}, {"w": torch.ones(size)})
        mean = torch.randn(size, generator=torch.Generator().manual_seed(0)) * 50
        mean[0], other = 0.0, mean.clone()
        other[0] = 1.0
        parts = [br.Posterior({"w": m}, {"w": torch.full((size,), 2.0)}) for m in (mean, other)]
        found = br.merge_mixtures(base, [br.Posterior.mixture(parts)], start=base.mean, max_steps=1)
        share = 1 / (1 + math.e)  # of the other, from 0
        close(found.posterior.mean["w"], br.merge(base, parts, [1 - share, share]).mean["w"], 1e-4)
        assert abs(float(found.posterior.mean["w"][0]) - share) < 1e-4


class TestWhatIsKnown:
    def test_examples_are_counted_once_for_a_task(self):
        about = {"ess": 30.0, "num_data": 30}
        parts = [br.Posterior({"w": torch.tensor([m])}, {"w": torch.tensor([9.0])}, **about) for m in (1.0, 2.0)]
        task = br.Posterior.mixture(parts)
        base = br.Posterior({"w": torch.zeros(1)}, {"w": torch.ones(1)}, ess=5.0, num_data=5)
        found = br.merge_mixtures(base, [task, task]).posterior
        assert (found.num_data, found.ess) == (65, pytest.approx(65.0))

    def test_components_know_the_prior_of_the_mixture(self):
        prior = {"w": torch.ones(1)}
        parts = [br.Posterior({"w": torch.tensor([m])}, {"w": torch.tensor([9.0])}, None, prior) for m in (1.0, 1.1)]
        found = br.merge_mixtures(None, [br.Posterior.mixture(parts), parts[0]]).posterior
        assert found.precision["w"].item() == pytest.approx(17.0)


class TestRefusals:
    @pytest.mark.parametrize(
        ("alphas", "options", "message"),
        [
            ([1.0, -0.5], {}, r"alphas of mixtures must be >= 0, got \[1.0, -0.5\]; merge takes a Gaussian out"),
            ([1.0], {}, "there are 2 models and 1 alphas"),
            (1.0, {"max_steps": 0}, "max_steps must be a whole number >= 1, got 0"),
            (
                30.0,
                {},
                r"adding 'posteriors\[1\]\[0\]' leaves 3 of 3 precisions non-positive; the base's precision exceeds its own",
            ),
        ],
    )
    def test_messages(self, alphas, options, message):
        base, mixture = gaussian(0, 0.5), br.Posterior.mixture([gaussian(1, -0.4), gaussian(1, -0.4)])
        with pytest.raises(ValueError, match=message):
            br.merge_mixtures(base, [mixture, gaussian(1, -0.4)], alphas, **options)

    def test_components_of_different_structures(self):
        full = br.Posterior.of(br.Full(torch.zeros(3), torch.eye(3)), {"w": (3,)})
        with pytest.raises(TypeError, match=r"'posteriors\[1\]\[0\]' \(diag\) has no posterior of one structure"):
            br.merge_mixtures(None, [full, gaussian(0)], prior_precision=1.0)
