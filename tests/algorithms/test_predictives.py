"""Predictive distributions that torch does not have, against scipy, torch and quadrature."""

import math

import pytest
import scipy.stats
import torch
from tests.contracts import close, normal, positive
from torch import distributions as td

import bayesrule as br
from bayesrule import conjugate as c
from bayesrule.algorithms.predictives import MultivariateStudentT, VonMisesPredictive

DOUBLE = torch.float64
CIRCLE = torch.arange(720, dtype=DOUBLE) * (2 * math.pi / 720) - math.pi


def number(value):
    return torch.tensor(value, dtype=DOUBLE)


class TestMultivariateStudentT:
    def make(self, df=5.0, size=3):
        return MultivariateStudentT(number(df), normal(0, size), positive(1, size))

    @pytest.mark.parametrize("df", [0.5, 1.0, 3.0, 40.0])
    @pytest.mark.parametrize("size", [1, 2, 4])
    def test_log_prob_is_scipys(self, df, size):
        t, points = self.make(df, size), 3 * normal(2, 6, size)
        twin = scipy.stats.multivariate_t(t.loc.numpy(), t.scale.numpy(), df=df)
        close(t.log_prob(points), torch.as_tensor(twin.logpdf(points.numpy())).view(6))

    def test_of_one_number_it_is_torchs(self):
        t, points = self.make(3.0, 1), normal(2, 6, 1)
        twin = td.StudentT(t.df, t.loc, t.scale[0].sqrt())
        close(t.log_prob(points), twin.log_prob(points)[:, 0])
        close(t.mean, twin.mean)
        close(t.variance, twin.variance)

    def test_with_many_degrees_of_freedom_it_is_normal(self):
        t, points = self.make(1e9), normal(2, 6, 3)
        twin = td.MultivariateNormal(t.loc, t.scale)
        close(t.log_prob(points), twin.log_prob(points), 1e-6)
        close(t.covariance_matrix, t.scale, 1e-8)

    @pytest.mark.parametrize(
        ("df", "mean", "variance"), [(0.5, False, False), (1.0, False, False), (2.0, True, False), (2.5, True, True)]
    )
    def test_moments_exist_from_one_and_two_degrees_of_freedom_on(self, df, mean, variance):
        t = self.make(df)
        assert t.mean.isfinite().all() == mean and t.mean.isnan().all() != mean
        assert t.covariance_matrix.isfinite().all() == variance
        if variance:
            close(t.covariance_matrix, t.scale * 5)
            close(t.variance, t.covariance_matrix.diagonal())

    def test_a_batch_is_each_alone(self):
        df, loc = number([3.0, 4.0]), normal(0, 2, 3)
        scale = torch.stack([positive(1, 3), positive(2, 3)])
        both, points = MultivariateStudentT(df, loc, scale), normal(3, 5, 2, 3)
        assert both.batch_shape == (2,) and both.event_shape == (3,)
        for i in range(2):
            single = MultivariateStudentT(df[i], loc[i], scale[i])
            close(both.log_prob(points)[:, i], single.log_prob(points[:, i]))
            close(both.covariance_matrix[i], single.covariance_matrix)
        torch.manual_seed(0)
        assert both.sample((4, 6)).shape == (4, 6, 2, 3)

    def test_draws_have_its_law(self):
        """Squared lengths over D are F-distributed, directions are uniform: tests of Kolmogorov and Smirnov."""
        t = self.make(3.5)
        torch.manual_seed(0)
        z = torch.linalg.solve_triangular(torch.linalg.cholesky(t.scale), (t.sample((4000,)) - t.loc).mT, upper=False)
        assert scipy.stats.kstest(z.square().mean(0).numpy(), scipy.stats.f(3, 3.5).cdf).pvalue > 1e-4
        for part in (z / z.norm(dim=0)).numpy():  # of a uniform direction in three dimensions: uniform
            assert scipy.stats.kstest(part, scipy.stats.uniform(-1, 2).cdf).pvalue > 1e-4

    def test_draws_carry_no_gradient_and_repeat_with_torchs_seed(self):
        t = MultivariateStudentT(number(3.0), normal(0, 2).requires_grad_(), positive(1, 2))
        draws = []
        for _ in range(2):
            torch.manual_seed(3)
            draws.append(t.sample((2,)))
        assert torch.equal(*draws) and not draws[0].requires_grad

    def test_single_precision_stays(self):
        t = self.make()
        single = MultivariateStudentT(t.df.float(), t.loc.float(), t.scale.float())
        points = normal(2, 6, 3)
        assert single.sample().dtype == single.log_prob(points.float()).dtype == torch.float32
        close(single.log_prob(points.float()).double(), t.log_prob(points), 1e-5)

    def test_its_log_prob_is_differentiable(self):
        def at(df, loc, root):
            scale = root @ root.mT + torch.eye(2, dtype=DOUBLE)
            return MultivariateStudentT(df, loc, scale).log_prob(normal(2, 3, 2))

        values = [number(3.0), normal(0, 2), normal(1, 2, 2)]
        assert torch.autograd.gradcheck(at, [value.requires_grad_() for value in values])


class TestVonMisesPredictive:
    @pytest.mark.parametrize("concentration", [0.01, 1.5, 40.0])
    @pytest.mark.parametrize("noise", [0.1, 2.0, 30.0])
    def test_is_the_integral_over_the_direction(self, concentration, noise):
        loc, points = number(0.7), number([-3.0, -0.5, 0.7, 2.0])
        direction = torch.as_tensor(scipy.stats.vonmises(concentration, 0.7).logpdf(CIRCLE.numpy()))  # torch's is off by 1e-7
        around = torch.as_tensor(scipy.stats.vonmises(noise).logpdf((points[:, None] - CIRCLE).numpy()))
        expected = (direction + around).logsumexp(-1) + math.log(2 * math.pi / len(CIRCLE))
        close(VonMisesPredictive(loc, number(concentration), noise).log_prob(points), expected, 1e-9)

    @pytest.mark.parametrize("concentration", [1e-3, 1.0, 1e3])
    @pytest.mark.parametrize("noise", [1e-3, 1.0, 1e3])
    def test_integrates_to_one_and_turns_with_its_mean(self, concentration, noise):
        q, turned = (VonMisesPredictive(number(loc), number(concentration), noise) for loc in (0.0, 2.0))
        close(q.log_prob(CIRCLE).exp().sum() * (2 * math.pi / len(CIRCLE)), number(1.0), 1e-9)
        close(turned.log_prob(CIRCLE + 2.0), q.log_prob(CIRCLE), 1e-9)
        close(turned.log_prob(CIRCLE + 2 * math.pi), turned.log_prob(CIRCLE), 1e-9)
        assert turned.mean == 2.0

    def test_with_a_direction_that_is_certain_it_is_torchs(self):
        q = VonMisesPredictive(number(0.3), number(1e9), 2.0)
        close(q.log_prob(CIRCLE), td.VonMises(number(0.3), number(2.0)).log_prob(CIRCLE), 1e-6)

    def test_with_no_concentration_at_all_it_is_uniform(self):
        q = VonMisesPredictive(number(0.3), number(2.0), 1e-12)
        close(q.log_prob(CIRCLE), torch.full_like(CIRCLE, -math.log(2 * math.pi)), 1e-9)

    @pytest.mark.parametrize(("concentration", "noise"), [(2.0, 5.0), (0.5, 0.5)])
    def test_draws_have_its_law(self, concentration, noise):
        """Against the distribution function, summed over a fine grid."""
        q = VonMisesPredictive(number(0.3), number(concentration), noise)
        torch.manual_seed(0)
        draws = q.sample((3000,))
        assert draws.shape == (3000,) and (draws.abs() <= math.pi + 1e-12).all()
        grid = torch.linspace(-math.pi, math.pi, 20001, dtype=DOUBLE)
        law = torch.cumulative_trapezoid(q.log_prob(grid).exp(), grid)
        assert (
            scipy.stats.kstest(
                draws.numpy(), lambda x: law[((torch.as_tensor(x) + math.pi) / (2 * math.pi) * 19999).long()].numpy()
            ).pvalue
            > 1e-4
        )

    def test_a_batch_is_each_alone(self):
        loc, concentration = normal(0, 2, 3), normal(1, 2, 3).exp()
        both = VonMisesPredictive(loc, concentration, 1.5)
        assert both.batch_shape == (2, 3)
        torch.manual_seed(0)
        assert both.sample((4,)).shape == (4, 2, 3)
        close(
            both.log_prob(CIRCLE[:5, None, None])[:, 1, 2],
            VonMisesPredictive(loc[1, 2], concentration[1, 2], 1.5).log_prob(CIRCLE[:5]),
        )

    def test_its_log_prob_is_differentiable(self):
        values = [value.requires_grad_() for value in (number(0.3), number(2.0), number(1.5))]
        assert torch.autograd.gradcheck(lambda *values: VonMisesPredictive(*values).log_prob(CIRCLE[::80]), values)


class TestOthers:
    """Of torch's own distributions, what their parameters here must mean."""

    def test_the_beta_binomial_is_scipys(self):
        q = c.update(br.Beta(number(2.0), number(3.0)), c.Binomial(6), number([2.0, 5.0]))
        twin = scipy.stats.betabinom(6, q.posterior.concentration1.item(), q.posterior.concentration0.item())
        close(q.predictive.probs, torch.as_tensor(twin.pmf(range(7))))

    def test_the_lomax_is_scipys(self):
        q = c.update(br.Gamma(number(2.0), number(3.0)), "exponential", number([2.0, 5.0]))
        times = number([0.0, 1e-6, 0.5, 3.0, 100.0])
        twin = scipy.stats.lomax(q.posterior.concentration.item(), scale=q.posterior.rate.item())
        close(q.predictive.log_prob(times), torch.as_tensor(twin.logpdf(times.numpy())))
        torch.manual_seed(0)
        assert scipy.stats.kstest(q.predictive.sample((3000,)).numpy(), twin.cdf).pvalue > 1e-4

    def test_the_negative_binomial_is_scipys(self):
        q = c.update(br.Gamma(number(2.0), number(3.0)), "poisson", number([2.0, 5.0]))
        b = q.posterior.rate.item()
        twin = scipy.stats.nbinom(q.posterior.concentration.item(), b / (b + 1))
        close(q.predictive.log_prob(torch.arange(30, dtype=DOUBLE)), torch.as_tensor(twin.logpmf(range(30))))
        close(q.predictive.mean, number(twin.mean()))

    def test_the_regressions_is_a_student_t_at_every_input(self):
        prior = br.NormalInverseGamma(normal(0, 2), positive(1, 2), number(2.0), number(1.5))
        q = c.update(prior, "linear_regression", (normal(2, 9, 2), normal(3, 9)))
        X, p = normal(4, 3, 5, 2), q.posterior
        found = q.predictive(X)
        assert found.batch_shape == (3, 5)
        spread = 1 + torch.einsum("abi,ij,abj->ab", X, p.precision.inverse(), X)
        close(found.loc, X @ p.loc)
        close(found.scale, (p.rate / p.concentration * spread).sqrt())
        close(found.df, torch.full((3, 5), 2 * p.concentration.item(), dtype=DOUBLE))
