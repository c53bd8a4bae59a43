"""Every family keeps the contract, over the range of its parameters in which the maps are well conditioned."""

import math
from typing import Any

import scipy.stats
import torch
from tests.families.contract import FamilyContract, often
from tests.families.members import NOISE, Drawn, Shape, blocks, close, rebuilt
from torch import Tensor

import bayesrule as br

V = br.Vector


def just(*numbers: Any) -> V:
    return V([torch.as_tensor(number, dtype=torch.float64) for number in numbers])


class Checked(FamilyContract):
    """Families whose class refuses what is outside."""

    def outside(self, q):
        return [natural.map(lambda part: part.to(q.natural()[0].dtype)) for natural in self.beyond(q)]

    def beyond(self, q: Any) -> list[V]:
        return []


class TestBernoulli(Checked):
    def members(self, drawn: Drawn, batch: Shape):
        return br.Bernoulli(drawn.reals(batch, -6, 6))

    def beyond(self, q):
        return [just(math.inf), just(math.nan)]

    def reference(self, q, theta):
        return scipy.stats.bernoulli(q.logits.sigmoid().item()).logpmf(theta.item())


class TestSignedBernoulli(Checked):
    torch_entropy = torch_log_prob = False

    def members(self, drawn: Drawn, batch: Shape):
        return br.SignedBernoulli(drawn.reals(batch, -6, 6))

    def beyond(self, q):
        return [just(math.inf), just(math.nan)]

    def reference(self, q, theta):
        return scipy.stats.bernoulli(q.logits.sigmoid().item()).logpmf((theta.item() + 1) / 2)


class TestCategorical(Checked):
    dims = (1,)

    def members(self, drawn: Drawn, batch: Shape):
        return br.Categorical(drawn.reals((*batch, 4), -3, 3))

    def named(self, q):
        return [q.logits.softmax(-1)]

    def beyond(self, q):
        return [just([0.0, math.inf, 0.0]), just([math.nan, 0.0, 0.0])]

    def reference(self, q, theta):
        return math.log(q.mean[int(theta)])


class TestPoisson(Checked):
    torch_entropy = False

    def members(self, drawn: Drawn, batch: Shape):
        return br.Poisson(drawn.positives(batch, 0.02, 400))

    def beyond(self, q):
        return [just(math.inf), just(800.0), just(-800.0)]

    def reference(self, q, theta):
        return scipy.stats.poisson(q.rate.item()).logpmf(theta.item())


class TestGamma(Checked):
    dims = (0, 0)

    def members(self, drawn: Drawn, batch: Shape):
        return br.Gamma(drawn.positives(batch, 0.05, 100), drawn.positives(batch))

    def beyond(self, q):
        return [just(-1.0, -1.0), just(-1.001, -1.0), just(0.0, 0.0), just(0.0, 0.001)]

    def reference(self, q, theta):
        return scipy.stats.gamma(q.concentration.item(), scale=1 / q.rate.item()).logpdf(theta.item())


class TestInverseGamma(Checked):
    dims = (0, 0)

    def members(self, drawn: Drawn, batch: Shape):
        return br.InverseGamma(drawn.positives(batch, 0.05, 100), drawn.positives(batch))

    def beyond(self, q):
        return [just(-1.0, -1.0), just(-0.999, -1.0), just(-3.0, 0.0), just(-3.0, 0.001)]

    def reference(self, q, theta):
        return scipy.stats.invgamma(q.concentration.item(), scale=q.rate.item()).logpdf(theta.item())


class TestExponential(Checked):
    def members(self, drawn: Drawn, batch: Shape):
        return br.Exponential(drawn.positives(batch, 1e-3, 1e3))

    def beyond(self, q):
        return [just(0.0), just(1e-6)]

    def reference(self, q, theta):
        return scipy.stats.expon(scale=1 / q.rate.item()).logpdf(theta.item())


class TestBeta(Checked):
    dims = (0, 0)

    def members(self, drawn: Drawn, batch: Shape):
        return br.Beta(drawn.positives(batch, 0.05, 100), drawn.positives(batch, 0.05, 100))

    def beyond(self, q):
        return [just(-1.0, 0.0), just(0.0, -1.001)]

    def reference(self, q, theta):
        return scipy.stats.beta(q.concentration1.item(), q.concentration0.item()).logpdf(theta.item())


class TestDirichlet(Checked):
    dims = (1,)

    def members(self, drawn: Drawn, batch: Shape):
        return br.Dirichlet(drawn.positives((*batch, 4), 0.05, 100))

    def beyond(self, q):
        return [just([0.0, 0.0, -1.0, 0.0]), just([-1.001, 0.0, 0.0, 0.0])]

    def reference(self, q, theta):
        return scipy.stats.dirichlet(q.concentration.numpy()).logpdf((theta / theta.sum()).numpy()).item()


class TestVonMises(Checked):
    dims = (0, 0)
    torch_entropy = torch_kl = torch_log_prob = False  # torch's Bessel functions are good to 1e-7

    def members(self, drawn: Drawn, batch: Shape):
        return br.VonMises(drawn.reals(batch, -3.1, 3.1), drawn.positives(batch, 0.05, 100))

    def named(self, q):
        return [q.loc.cos(), q.loc.sin(), q.concentration]

    def beyond(self, q):
        return [just(math.inf, 0.0), just(0.0, math.nan)]

    def reference(self, q, theta):
        return scipy.stats.vonmises(q.concentration.item(), loc=q.loc.item()).logpdf(theta.item())


class TestNormal(Checked):
    dims = (0, 0)

    def members(self, drawn: Drawn, batch: Shape):
        return br.Normal(drawn.reals(batch), drawn.positives(batch))

    def beyond(self, q):
        return [just(1.0, 0.0), just(1.0, 1e-6)]

    def reference(self, q, theta):
        return scipy.stats.norm(q.loc.item(), q.precision.item() ** -0.5).logpdf(theta.item())


class Matrices(Checked):
    """Families with a block that is a symmetric matrix."""

    @often(10)
    def test_fisher_is_the_hessian(self, data) -> None:
        self.check_fisher(self.one(data))


class TestWishart(Matrices):
    dims = (2, 0)

    def condition(self, q):
        return float(torch.linalg.cond(q.scale.double()).max()) if q.scale.numel() else 1.0

    def members(self, drawn: Drawn, batch: Shape):
        return br.Wishart(drawn.positives(batch, 3.1, 50), drawn.matrices(batch, 3))  # torch warns below 3

    def beyond(self, q):
        eye = torch.eye(3)
        return [just(-eye, -1.0), just(-eye, -1.001), just(0 * eye, 0.5), just(torch.tensor([-1.0, -1.0, 0.001]).diag(), 0.5)]

    def reference(self, q, theta):
        return scipy.stats.wishart(q.df.item(), q.scale.numpy()).logpdf(theta.numpy()).item()


class Joint(Checked):
    """Families of which torch.distributions has none."""

    torch_entropy = torch_kl = torch_log_prob = False


class TestNormalGamma(Joint):
    dims = (0, 0, 0, 0)

    def members(self, drawn: Drawn, batch: Shape):
        loc, kappa = drawn.reals(batch, -1, 1), drawn.positives(batch)
        return br.NormalGamma(loc, kappa, drawn.positives(batch, 0.2, 30), drawn.positives(batch, 0.3, 3))

    def beyond(self, q):
        return [just(-0.5, -1.0, 0.0, -0.5), just(1.0, -0.5, 1.0, -0.5), just(1.0, -1.0, 1.0, 0.0), just(1.0, -1.0, 1.0, 0.001)]

    def reference(self, q, theta):
        x, t = (part.item() for part in theta)
        a, b = q.concentration.item(), q.rate.item()
        given = scipy.stats.norm(q.loc.item(), (q.kappa.item() * t) ** -0.5).logpdf(x)
        return given + scipy.stats.gamma(a, scale=1 / b).logpdf(t)


class TestNormalInverseGamma(Joint, Matrices):
    dims = (0, 0, 1, 2)

    def members(self, drawn: Drawn, batch: Shape):
        loc, precision = drawn.reals((*batch, 2), -1, 1), drawn.matrices(batch, 2)
        return br.NormalInverseGamma(loc, precision, drawn.positives(batch, 0.2, 30), drawn.positives(batch, 0.3, 3))

    def beyond(self, q):
        half, zero = torch.eye(2) / -2, [0.0, 0.0]
        return [just(-2.0, -1.0, zero, half), just(-4.0, -0.5, [1.0, 0.0], half), just(-4.0, -1.0, zero, 0 * half)]

    def reference(self, q, theta):
        x, v = theta
        spread = (q.precision.inverse() * v).numpy()
        given = scipy.stats.multivariate_normal(q.loc.numpy(), spread).logpdf(x.numpy())
        return given + scipy.stats.invgamma(q.concentration.item(), scale=q.rate.item()).logpdf(v.item())


class TestNormalInverseWishart(Joint, Matrices):
    dims = (1, 0, 2, 0)

    def members(self, drawn: Drawn, batch: Shape):
        loc, kappa = drawn.reals((*batch, 2), -1, 1), drawn.positives(batch)
        return br.NormalInverseWishart(loc, kappa, drawn.positives(batch, 2.1, 30), drawn.matrices(batch, 2))

    def beyond(self, q):
        half, zero = torch.eye(2) / -2, [0.0, 0.0]
        few, no_scale = just(zero, -0.5, half, -2.5), just([1.0, 0.0], -0.5, half, -4.0)
        return [few, no_scale, just(zero, 0.0, half, -4.0), just(zero, -0.5, -half, -4.0)]

    def reference(self, q, theta):
        x, covariance = (part.numpy() for part in theta)
        given = scipy.stats.multivariate_normal(q.loc.numpy(), covariance / q.kappa.item()).logpdf(x)
        return given + scipy.stats.invwishart(q.df.item(), q.scale.numpy()).logpdf(covariance)


# Gaussians


class OneTheta(FamilyContract):
    """Gaussians: one theta, in batches by torch.func.vmap; elements of a Full alone make a batch."""

    batches = ((),)
    count = 1000

    def named(self, q):
        return [q.mean, q.precision + 0 * q.mean.sum()]

    def draws(self, q, count, noise=NOISE):
        drawn = [q.statistics(q.sample(noise.at(draw=draw))) for draw in range(count)]
        parts = zip(*map(blocks, drawn), strict=True)
        return rebuilt([torch.stack(part) for part in parts], drawn[0])

    def mean_log_base_measure(self, q) -> Any:
        return 0.0

    def log_base_measure(self, q, theta) -> Any:
        return 0.0

    def outside(self, q):
        return []


class TestFixed(OneTheta):
    dims = (1,)
    torch_kl = False  # members share what is fixed

    def members(self, drawn: Drawn, batch: Shape):
        return br.Fixed(drawn.reals((3,)), torch.tensor([0.5, 1.0, 2.0], dtype=torch.float64), ess=7.0)

    def log_base_measure(self, q, theta) -> Tensor:
        return (q.precision.log() - math.log(2 * math.pi) - q.precision * theta**2).sum() / 2

    def mean_log_base_measure(self, q) -> Tensor:
        return self.log_base_measure(q, q.mean) - 1.5

    def test_torch_gives_the_member_back(self) -> None:
        """It has the mean and the variance: what is fixed of a Fixed is not read from a distribution."""
        q = self.members(Drawn.seeded(0), ())
        close(q.to_torch().mean, q.mean, 1e-15)
        close(q.to_torch().variance, 1 / q.precision, 1e-15)


class TestIsotropic(OneTheta):
    dims = (1, 0)

    def members(self, drawn: Drawn, batch: Shape):
        return br.Isotropic(drawn.reals((3,)), drawn.positives(()), weight_decay=0.25, ess=2.0)


class TestDiagonal(OneTheta):
    dims = (1, 1)

    def members(self, drawn: Drawn, batch: Shape):
        return br.Diagonal(drawn.reals((3,)), drawn.positives((3,)), weight_decay=0.25, ess=2.0)


class TestFull(OneTheta):
    dims = (1, 2)
    batches = ((), (3,), (2, 2))

    def members(self, drawn: Drawn, batch: Shape):
        return br.Full(
            drawn.reals((*batch, 3)), drawn.matrices(batch, 3), weight_decay=torch.zeros(*batch, 3, 3, dtype=torch.float64)
        )

    def named(self, q):
        return [q.mean, q.precision]
