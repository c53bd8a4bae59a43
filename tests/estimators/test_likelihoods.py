import math
from dataclasses import replace
from types import SimpleNamespace

import hypothesis.strategies as st
import numpy as np
import pytest
import scipy.stats
import torch
from hypothesis import given, settings
from tests.contracts import close, normal

from bayesrule.estimators.likelihoods import (
    Bernoulli,
    Gaussian,
    Likelihood,
    NegativeBinomial,
    Poisson,
    StudentT,
    named,
)
from bayesrule.estimators.predictors import LikelihoodLoss
from bayesrule.rule import Look, Oracle

REALS = [-1.5, 0.0, 0.3, 2.0, 9.0]
COUNTS = [0.0, 1.0, 2.0, 5.0, 30.0]
LABELS = [0.0, 1.0, 1.0, 0.0, 1.0]
CASES = {
    "gaussian": (Gaussian(0.7), REALS),
    "logit": (Bernoulli(), LABELS),
    "probit": (Bernoulli("probit"), LABELS),
    "poisson": (Poisson(), COUNTS),
    "negative_binomial": (NegativeBinomial(0.4), COUNTS),
    "near_poisson": (NegativeBinomial(1e-3), COUNTS),
    "student_t": (StudentT(3.0, 0.8), REALS),
    "near_gaussian": (StudentT(200.0, 0.8), REALS),
}
LEARNED = {
    "gaussian": (lambda s: Gaussian(s), REALS),
    "negative_binomial": (lambda s: NegativeBinomial(s), COUNTS),
    "near_poisson": (lambda s: NegativeBinomial(s / 100), COUNTS),
    "df": (lambda s: StudentT(4 * s, 0.8), REALS),
    "scale": (lambda s: StudentT(3.0, s), REALS),
}
EXAMPLES = settings(max_examples=15, derandomize=True, deadline=None)

case = pytest.mark.parametrize(("likelihood", "y"), CASES.values(), ids=CASES)
learned = pytest.mark.parametrize(("make", "y"), LEARNED.values(), ids=LEARNED)


def t(values, dtype=torch.float64):
    return torch.tensor(values, dtype=dtype)


def moments(seed=0, size=5):
    return normal(seed, size), normal(seed + 10, size).square() / 4 + 0.05


def integral(of, mean, variance):
    """E[of(f)] under f ~ N(mean, variance) by the trapezoidal rule on a fine grid, nothing of Gauss and Hermite in it."""
    x = torch.linspace(-10, 10, 4001, dtype=torch.float64)[:, None]
    return torch.trapezoid(of(mean + variance.sqrt() * x) * (-x.square() / 2).exp() / math.sqrt(2 * math.pi), x, dim=0)


LOGISTIC = {
    "y": [1.0, 1.0, 0.0, 0.0, 0.0, 0.0, 1.0, 0.0, 1.0, 0.0],
    "mean": [
        2.9284184235291737, 1.6814028355796786, -1.4869539479189862, -3.4862369779042433, -0.8779237426822186,
        -4.149969397987105, -0.009600539971806358, -1.0388943842515692, -0.08879690642786625, -1.3178527534403552,
    ],
    "variance": [
        4.7098543670818085, 1.746831138673366, 0.7831637167709663, 3.223063049534388, 0.6120702705922492,
        3.584801069533156, 0.5366777181206994, 0.6349640381548076, 1.8598228719737835, 0.7355059915001773,
    ],
    "E": [
        -0.22019433005559985, -0.2890861363526755, -0.26296380038362605, -0.10409376694501743, -0.4087201840121826,
        -0.06754132021706855, -0.7611789310339677, -0.362532725278116, -0.9349594795079517, -0.29786660829587597,
    ],
    "a": [
        0.1468882012987664, 0.21742518648760084, -0.2161993796058715, -0.08319331380483809, -0.3151226096229404,
        -0.055619702418700186, 0.5021419603798538, -0.28566950524507295, 0.5163780335121873, -0.24097769163506277,
    ],
    "half_b": [
        -0.0406572755311464, -0.06706295624452664, -0.075125992987252, -0.02930904287435422, -0.09620976204134968,
        -0.020596315835125518, -0.11155290904892468, -0.09104998162741973, -0.09216572523005731, -0.0811128636947649,
    ],
    "site1": [
        0.38501123073058835, 0.44294487607140687, -0.43961716333332834, -0.2875498519159472, -0.48405227837075515,
        -0.22656786327279643, 0.5000000240552629, -0.4748521344429428, 0.5000099709539676, -0.4547673131542191,
    ],
}  # fmt: skip
POISSON = {
    "y": [0.0, 3.0, 1.0, 2.0, 0.0, 5.0, 1.0, 0.0, 2.0, 4.0],
    "mean": [
        0.3743083367559718, 0.3665920301600639, 0.5912908782329026, 0.5687592629728515, 0.4573357957279411,
        0.6008590984118284, 0.6073407959523911, 0.1014597355246677, 0.9147584507333626, 0.36319685525786444,
    ],
    "variance": [
        0.07989698846282343, 0.08256777472722843, 0.05784745184619368, 0.05536963764980886, 0.05935760611259763,
        0.05923388324777702, 0.06028627851380337, 0.2530529758098401, 0.2152032710732642, 0.0837839711606484,
    ],
    "E": [
        -1.5132457253739933, -2.195603955377682, -1.2680361401063993, -1.3712796558932876, -1.6274503680019452,
        -3.6617008605747556, -1.2843744124683718, -1.2560680210036126, -1.6433777513808914, -3.2247021145810018,
    ],
    "a": [
        -1.5132457253739933, 1.4963794233701815, -0.8593270183393018, 0.18434899872095456, -1.6274503680019452,
        3.1214953901481484, -0.8917152084207629, -1.2560680210036126, -0.7797474722876712, 2.5005642947354865,
    ],
    "half_b": [
        -0.7566228626869966, -0.7518102883149093, -0.9296635091696509, -0.9078255006395227, -0.8137251840009726,
        -0.9392523049259258, -0.9458576042103815, -0.6280340105018063, -1.3898737361438356, -0.7497178526322569,
    ],
    "site1": [
        -0.9468252348061698, 2.0475947431473527, 0.24007608725670826, 1.2170173240243443, -0.883159058944045,
        4.250211976386195, 0.2572006119767467, -1.1286276917915934, 1.7630500188921796, 3.045154627548916,
    ],
}  # fmt: skip
# classification by a Gaussian process of variance 2.25: the first sites at rate 1/2 from none, for a label of 1, and predictions
PROCESS = {
    "logit": {
        "site1": 0.24999999999999994,
        "site2": -0.04418193086385437,
        "mean": [
            -0.5260484747979945, -0.35340170804384613, 0.46738243492855136, 0.9782384362548413, 0.6130907910527329,
            0.09863213690098799,
        ],
        "variance": [
            2.025336761899413, 1.0918557906524409, 1.0913444554805605, 1.1194570894161497, 1.0888920303884808,
            2.2373704213868275,
        ],
        "probability": [
            0.4057146463671544, 0.42840469793026176, 0.5942666493556983, 0.6898329065534402, 0.6227660613857329,
            0.5174482619625852,
        ],
    },
    "probit": {
        "site1": 0.5100697664314151,
        "site2": -0.1425679387154698,
        "mean": [
            -0.5912210708462516, -0.2915352582439562, 0.40526704205520575, 0.9639221690796533, 0.4526207333492023,
            0.15303192575810934,
        ],
        "variance": [
            1.9089418647946694, 0.5876379639564744, 0.5961367749832671, 0.7061779992697477, 0.5984179821640121,
            2.2257713339165455,
        ],
        "probability": [
            0.3644297841785489, 0.4085119669158586, 0.6258111481804481, 0.7697290613142632, 0.639830267612469,
            0.5339508057292749,
        ],
    },
}  # fmt: skip
# z, log Phi(z), phi / Phi and minus phi / Phi (z + phi / Phi), computed with 60 digits
PROBIT = [
    (-10000.0, -50000010.12927891, 10000.000099999997, -0.9999999900000006),
    (-1000.0, -500007.82669481216, 1000.000999998, -0.999999000006),
    (-100.0, -5005.524208694205, 100.00999800099926, -0.9999000599500517),
    (-30.0, -454.3212439563432, 30.033259667433676, -0.9988962284881099),
    (-5.5, -17.77937635262526, 5.671410313897305, -0.9721382221455538),
    (-5.0, -15.064998393988725, 5.186503967125842, -0.9673035653828878),
    (-4.5, -12.59241973571308, 4.704319844827732, -0.9611859007152245),
    (-1.0, -1.8410216450092636, 1.525135276160981, -0.8009023344296512),
    (0.0, -0.6931471805599453, 0.7978845608028654, -0.6366197723675814),
    (3.0, -0.0013508099647481938, 0.004437839042125664, -0.013333211541740806),
    (8.0, -6.220960574271786e-16, 5.052271083536895e-15, -4.0418168668295186e-14),
]


class TestGoldenNumbers:
    @pytest.mark.parametrize(
        ("likelihood", "golden", "tolerance"),
        [
            (Poisson(), POISSON, 1e-14),
            (Bernoulli(nodes=180), LOGISTIC, 1e-14),
            (Bernoulli(nodes=100), LOGISTIC, 1e-11),
            (Bernoulli(nodes=80), LOGISTIC, 1e-10),
            (Bernoulli(), LOGISTIC, 1e-5),
        ],
        ids=["poisson", "logit_180_nodes", "logit_100_nodes", "logit_80_nodes", "logit_20_nodes"],
    )
    def test_regression_at_its_optimum(self, likelihood, golden, tolerance):
        """Variances of f up to 4.7: with them 80 nodes are needed for ten digits, and the usual 20 give five."""
        mean, variance = t(golden["mean"]), t(golden["variance"])
        E, a, b = likelihood.expected_log_prob(mean, variance, t(golden["y"]))
        close(E, t(golden["E"]), tolerance)
        close(a, t(golden["a"]), tolerance)
        close(b / 2, t(golden["half_b"]), tolerance)
        close(a - b * mean, t(golden["site1"]), 30 * tolerance)

    @pytest.mark.parametrize(("nodes", "tolerance"), [(40, 1e-10), (20, 5e-8)], ids=["40_nodes", "20_nodes"])
    def test_location_of_student_t_at_its_optimum(self, nodes, tolerance):
        """The stored optimum is stationary, and its bound is the stored one (to the 2e-11 to which that was computed)."""
        mean, variance, prior = t(0.15230079234250735), t(0.06802866828588257), 0.1
        y = t([-0.3, 0.1, 0.4, 0.2, 6.0])
        E, a, b = StudentT(3.0, 0.5, nodes=nodes).expected_log_prob(mean.expand(5), variance.expand(5), y)
        kl = (prior * variance + prior * mean**2 - 1 - (prior * variance).log()) / 2
        close(E.sum() - kl, t(-12.409384351479831), 1e-10)
        close(a.sum() - prior * mean, t(0.0), tolerance)
        close(prior - b.sum(), 1 / variance, tolerance)
        assert b[-1] > 0 and not StudentT.log_concave

    @pytest.mark.parametrize(("nodes", "tolerance"), [(80, 1e-13), (20, 5e-7)], ids=["80_nodes", "20_nodes"])
    @pytest.mark.parametrize("link", PROCESS)
    def test_first_sites_of_a_gaussian_process(self, link, nodes, tolerance):
        mean, y = torch.zeros(2, dtype=torch.float64), t([0.0, 1.0])
        _, a, b = Bernoulli(link, nodes=nodes).expected_log_prob(mean, torch.full_like(mean, 2.25), y)
        golden = PROCESS[link]
        close((a - b * mean) / 2, golden["site1"] * t([-1.0, 1.0]), tolerance)
        close(b / 4, golden["site2"] * t([1.0, 1.0]), tolerance)

    @pytest.mark.parametrize(
        ("link", "nodes", "tolerance"),
        [("logit", 80, 1e-14), ("logit", 40, 1e-10), ("logit", 20, 1e-7), ("probit", 20, 1e-14)],
        ids=["logit_80_nodes", "logit_40_nodes", "logit_20_nodes", "probit_closed_form"],
    )
    def test_predictions_of_a_gaussian_process(self, link, nodes, tolerance):
        golden = PROCESS[link]
        found = Bernoulli(link, nodes=nodes).predictive(t(golden["mean"]), t(golden["variance"]))
        close(found.probs, t(golden["probability"]), tolerance)
        close(found.mean, t(golden["probability"]), tolerance)


class TestLogProb:
    @pytest.mark.parametrize(
        ("likelihood", "y", "reference"),
        [
            (*CASES["gaussian"], lambda f, y: scipy.stats.norm.logpdf(y, f, 0.7**0.5)),
            (*CASES["logit"], lambda f, y: scipy.stats.bernoulli.logpmf(y, 1 / (1 + np.exp(-f)))),
            (*CASES["probit"], lambda f, y: scipy.stats.bernoulli.logpmf(y, scipy.stats.norm.cdf(f))),
            (*CASES["poisson"], lambda f, y: scipy.stats.poisson.logpmf(y, np.exp(f))),
            (*CASES["negative_binomial"], lambda f, y: scipy.stats.nbinom.logpmf(y, 2.5, 2.5 / (2.5 + np.exp(f)))),
            (*CASES["near_poisson"], lambda f, y: scipy.stats.nbinom.logpmf(y, 1e3, 1e3 / (1e3 + np.exp(f)))),
            (*CASES["student_t"], lambda f, y: scipy.stats.t.logpdf(y, 3.0, f, 0.8)),
            (*CASES["near_gaussian"], lambda f, y: scipy.stats.t.logpdf(y, 200.0, f, 0.8)),
        ],
        ids=CASES,
    )
    def test_is_that_of_scipy(self, likelihood, y, reference):
        f = normal(1, 3, 5)
        close(likelihood.log_prob(f, t(y)), torch.as_tensor(reference(f.numpy(), np.array(y))), 1e-10)

    def test_negative_binomial_has_its_mean_and_variance(self):
        f, y = t([0.7]), torch.arange(2000, dtype=torch.float64)
        probability = NegativeBinomial(0.3).log_prob(f, y).exp()
        mean = (probability * y).sum()
        close(probability.sum(), t(1.0), 1e-12)
        close(mean, f.exp()[0], 1e-10)
        close((probability * (y - mean).square()).sum(), mean + 0.3 * mean**2, 1e-10)

    @pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-8), (torch.float32, 2e-6)], ids=["float64", "float32"])
    def test_negative_binomial_becomes_poisson(self, dtype, tolerance):
        f, y = t([-1.0, 0.5, 2.0], dtype), t([0.0, 4.0, 9.0], dtype)
        close(NegativeBinomial(1e-9).log_prob(f, y), Poisson().log_prob(f, y), tolerance)

    @pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-8), (torch.float32, 2e-6)], ids=["float64", "float32"])
    def test_student_t_becomes_gaussian(self, dtype, tolerance):
        f, y = t([-1.0, 0.5, 2.0], dtype), t([0.0, 4.0, 1.0], dtype)
        close(StudentT(1e10, 0.8).log_prob(f, y), Gaussian(0.64).log_prob(f, y), tolerance)


class TestDerivatives:
    @case
    @EXAMPLES
    @given(st.lists(st.floats(-12, 12), min_size=5, max_size=5))
    def test_are_those_of_autograd(self, likelihood, y, f):
        f, y = t(f), t(y)
        slope = torch.func.grad(lambda f: likelihood.log_prob(f, y).sum())
        curve = torch.func.grad(lambda f: slope(f).sum())
        first, second = likelihood.derivatives(f, y)
        close(first, slope(f), 1e-10)
        close(second, curve(f), 1e-10)

    @case
    def test_can_be_differentiated_themselves(self, likelihood, y):
        f, y = normal(2, 5).requires_grad_(), t(y)
        assert torch.autograd.gradcheck(lambda f: (likelihood.log_prob(f, y), *likelihood.derivatives(f, y)), f)

    @case
    def test_concave_where_it_says_so(self, likelihood, y):
        curve = likelihood.derivatives(torch.linspace(-20, 20, 201, dtype=torch.float64)[:, None], t(y))[1]
        assert bool((curve <= 0).all()) == likelihood.log_concave

    @pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5)], ids=["float64", "float32"])
    @pytest.mark.parametrize("label", [0.0, 1.0])
    def test_probit_keeps_its_digits_in_the_tail(self, label, dtype, tolerance):
        z, value, slope, curve = t(PROBIT, dtype).T
        sign, y = 2 * label - 1, torch.full_like(z, label)
        f = (sign * z).requires_grad_()
        found = Bernoulli("probit").log_prob(f, y)
        first, second = Bernoulli("probit").derivatives(f, y)
        torch.testing.assert_close(found, value, rtol=10 * tolerance, atol=0)
        torch.testing.assert_close(first, sign * slope, rtol=tolerance, atol=0)
        torch.testing.assert_close(second, curve, rtol=4 * tolerance, atol=0)
        (by_autograd,) = torch.autograd.grad(found.sum(), f, create_graph=True)
        (twice,) = torch.autograd.grad(by_autograd.sum(), f)
        torch.testing.assert_close(by_autograd, sign * slope, rtol=10 * tolerance, atol=0)
        torch.testing.assert_close(twice, curve, rtol=20 * tolerance, atol=0)

    @pytest.mark.parametrize(("dtype", "far"), [(torch.float64, 1e6), (torch.float32, 1e4)], ids=["float64", "float32"])
    def test_logit_far_out(self, dtype, far):
        f, y = t([-far, -far, far, far], dtype), t([0.0, 1.0, 0.0, 1.0], dtype)
        assert Bernoulli().log_prob(f, y).tolist() == [0.0, -far, -far, 0.0]
        first, second = Bernoulli().derivatives(f, y)
        assert first.tolist() == [0.0, 1.0, -1.0, 0.0]
        assert second.tolist() == [0.0] * 4

    def test_logit_keeps_small_probabilities_of_an_error(self):
        torch.testing.assert_close(
            Bernoulli().log_prob(t([20.0], torch.float32), t([1.0], torch.float32)),
            t([-math.exp(-20.0)], torch.float32),
            rtol=1e-5,
            atol=0,
        )

    @pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
    @case
    def test_finite_far_out(self, likelihood, y, dtype):
        reach = 80.0 if likelihood == Poisson() else 1e4
        f = t([-reach, reach], dtype)[:, None]
        for found in (likelihood.log_prob(f, t(y, dtype)), *likelihood.derivatives(f, t(y, dtype))):
            assert found.isfinite().all()

    def test_student_t_beyond_what_squares(self):
        for found in StudentT().derivatives(t([1e30], torch.float32), t([0.0], torch.float32)):
            assert found.item() == 0

    @case
    def test_float32_is_float64(self, likelihood, y):
        f = normal(3, 20, 5) * 2
        double = (likelihood.log_prob(f, t(y)), *likelihood.derivatives(f, t(y)))
        single = (likelihood.log_prob(f.float(), t(y, torch.float32)), *likelihood.derivatives(f.float(), t(y, torch.float32)))
        for found, expected in zip(single, double, strict=True):
            assert found.dtype == torch.float32 and found.shape == (20, 5)
            close(found, expected.float(), 2e-5)


class TestExpectedLogProb:
    @case
    def test_is_the_integral(self, likelihood, y):
        """Quadrature with 100 nodes against a fine grid."""
        mean, variance = moments()
        E, a, b = replace(likelihood, nodes=100).expected_log_prob(mean, variance, t(y))
        close(E, integral(lambda f: likelihood.log_prob(f, t(y)), mean, variance), 1e-10)
        close(a, integral(lambda f: likelihood.derivatives(f, t(y))[0], mean, variance), 1e-10)
        close(b, integral(lambda f: likelihood.derivatives(f, t(y))[1], mean, variance), 1e-10)

    @case
    def test_bonnet_and_price(self, likelihood, y):
        """The mean's gradient is a, the variance's b / 2: by autograd, to the accuracy of the nodes."""
        mean, variance = (x.requires_grad_() for x in moments(1))
        E, a, b = replace(likelihood, nodes=100).expected_log_prob(mean, variance, t(y))
        by_mean, by_variance = torch.autograd.grad(E.sum(), (mean, variance))
        close(by_mean, a.detach(), 1e-10)
        close(by_variance, b.detach() / 2, 1e-8)

    @case
    def test_can_be_differentiated(self, likelihood, y):
        mean, variance = (x.requires_grad_() for x in moments(2))
        assert torch.autograd.gradcheck(lambda m, v: likelihood.expected_log_prob(m, v, t(y)), (mean, variance))

    @learned
    def test_hyperparameters_can_be_learned(self, make, y):
        mean, variance = moments(3)
        scale = t(0.6).requires_grad_()
        assert torch.autograd.gradcheck(lambda s: make(s).expected_log_prob(mean, variance, t(y)), scale)
        assert torch.autograd.gradcheck(lambda s: make(s).log_prob(mean, t(y)), scale)
        functional = torch.func.grad(lambda s: make(s).log_prob(mean, t(y)).sum())(scale.detach())
        close(functional, torch.autograd.grad(make(scale).log_prob(mean, t(y)).sum(), scale)[0], 1e-12)

    @pytest.mark.parametrize("name", ["logit", "probit", "negative_binomial", "student_t"])
    def test_doubling_the_nodes_converges(self, name):
        likelihood, y = CASES[name]
        mean, variance = moments(4)
        found = [replace(likelihood, nodes=n).expected_log_prob(mean, variance, t(y)) for n in (10, 20, 40, 80)]
        for a, b, c, d in zip(*found, strict=True):
            assert (a - b).abs().max() > 10 * (b - c).abs().max()
            close(c, d, 1e-8)

    @pytest.mark.parametrize("name", ["gaussian", "poisson"])
    def test_closed_forms_are_what_quadrature_gives(self, name):
        likelihood, y = CASES[name]
        mean, variance = moments(5)
        likelihood = replace(likelihood, nodes=60)
        found = likelihood.expected_log_prob(mean, variance, t(y))
        for closed, sum_ in zip(found, Likelihood.expected_log_prob(likelihood, mean, variance, t(y)), strict=True):
            close(closed, sum_, 1e-12)

    @case
    def test_without_variance_it_is_the_value_at_the_mean(self, likelihood, y):
        mean = normal(6, 5)
        found = likelihood.expected_log_prob(mean, torch.zeros_like(mean), t(y))
        for actual, expected in zip(found, (likelihood.log_prob(mean, t(y)), *likelihood.derivatives(mean, t(y))), strict=True):
            close(actual, expected, 1e-12)

    @case
    def test_float32_is_float64(self, likelihood, y):
        mean, variance = moments(7)
        single = likelihood.expected_log_prob(mean.float(), variance.float(), t(y, torch.float32))
        for found, expected in zip(single, likelihood.expected_log_prob(mean, variance, t(y)), strict=True):
            assert found.dtype == torch.float32
            close(found, expected.float(), 2e-5)

    @case
    def test_batches_and_vmap(self, likelihood, y):
        mean, variance = normal(8, 3, 5), moments(9)[1]
        together = likelihood.expected_log_prob(mean, variance, t(y))
        mapped = torch.func.vmap(lambda m: likelihood.expected_log_prob(m, variance, t(y)))(mean)
        for row in range(3):
            alone = likelihood.expected_log_prob(mean[row], variance, t(y))
            for x, several, parallel in zip(alone, together, mapped, strict=True):
                close(several[row], x, 1e-14)
                close(parallel[row], x, 1e-14)


class TestPredictive:
    @case
    def test_is_the_integral(self, likelihood, y):
        """To ten digits with all nodes there are; a count of 30 is a narrow peak over f."""
        mean, variance = moments(10)
        found = replace(likelihood, nodes=200).predictive(mean, variance).log_prob(t(y)).exp()
        close(found, integral(lambda f: likelihood.log_prob(f, t(y)).exp(), mean, variance), 1e-10)

    @pytest.mark.parametrize("name", ["poisson", "negative_binomial", "near_poisson"])
    def test_counts_sum_to_one(self, name):
        likelihood = replace(CASES[name][0], nodes=60)
        mean, variance = moments(11)
        found = likelihood.predictive(mean, variance)
        counts = torch.arange(3000, dtype=torch.float64)
        probability = found.log_prob(counts[:, None]).exp()
        close(probability.sum(0), torch.ones(5, dtype=torch.float64), 1e-8)
        rate, excess = (mean + variance / 2).exp(), getattr(likelihood, "dispersion", 0.0)
        close(found.mean, rate, 1e-12)
        # total variance, with E exp(2 f) = exp(2 m + 2 v)
        square = (2 * mean + 2 * variance).exp()
        close(found.variance, rate + (1 + excess) * square - rate**2, 1e-10)

    @pytest.mark.parametrize("link", ["logit", "probit"])
    def test_labels_sum_to_one(self, link):
        found = Bernoulli(link).predictive(*moments(12))
        total = sum(found.log_prob(torch.full((5,), label, dtype=torch.float64)).exp() for label in (0.0, 1.0))
        close(total, torch.ones(5, dtype=torch.float64), 1e-14)

    @pytest.mark.parametrize("link", ["logit", "probit"])
    def test_labels_keep_small_probabilities(self, link):
        mean = t([-30.0, 30.0], torch.float32)
        found = Bernoulli(link).predictive(mean, torch.full_like(mean, 0.01))
        double = Bernoulli(link).predictive(mean.double(), torch.full_like(mean.double(), 0.01))
        unlikely = t([1.0, 0.0], torch.float32)
        assert found.log_prob(unlikely).max() < -29
        torch.testing.assert_close(found.log_prob(unlikely), double.log_prob(unlikely.double()).float(), rtol=1e-4, atol=0)

    def test_student_t_integrates_to_one(self):
        found = StudentT(5.0, 0.5, nodes=40).predictive(t([0.4]), t([0.3]))
        y = torch.linspace(-300, 300, 60_001, dtype=torch.float64)[:, None]
        close(torch.trapezoid(found.log_prob(y).exp()[:, 0], y[:, 0]), t(1.0), 1e-8)
        close(found.mean, t([0.4]), 1e-12)
        close(found.variance, t([0.3 + 0.25 * 5 / 3]), 1e-12)

    def test_gaussian(self):
        found = Gaussian(0.75).predictive(t([0.4]), t([0.25]))
        assert (found.mean.item(), found.variance.item()) == (0.4, 1.0)

    @case
    def test_without_variance_it_is_the_likelihood(self, likelihood, y):
        mean = normal(13, 5)
        found = likelihood.predictive(mean, torch.zeros_like(mean))
        assert found.batch_shape == (5,) and found.event_shape == ()
        close(found.log_prob(t(y)), likelihood.log_prob(mean, t(y)), 1e-10)

    @case
    def test_float32_is_float64(self, likelihood, y):
        mean, variance = moments(14)
        found = likelihood.predictive(mean.float(), variance.float()).log_prob(t(y, torch.float32))
        expected = likelihood.predictive(mean, variance).log_prob(t(y))
        assert found.dtype == torch.float32
        close(found, expected.float(), 1e-3 if y == COUNTS else 2e-5)  # torch's own distributions of counts cancel

    @case
    def test_draws(self, likelihood, y):
        torch.manual_seed(0)
        draws = likelihood.predictive(*moments(15)).sample((7,))
        assert draws.shape == (7, 5)
        assert likelihood.check(draws.reshape(-1)).shape == (35,)

    def test_rates_that_overflow_leave_probabilities(self):
        found = Poisson().predictive(t([80.0], torch.float32), t([9.0], torch.float32)).log_prob(t([3.0], torch.float32))
        assert not found.isnan().any()


class TestCheck:
    @pytest.mark.parametrize(
        ("y", "dtype"),
        [([True, False], torch.bool), ([1, 0], torch.int64), ([1, 0], torch.uint8), ([1.0, 0.0], torch.float32)],
        ids=["bool", "int64", "uint8", "float32"],
    )
    @pytest.mark.parametrize("likelihood", [Gaussian(), Bernoulli(), Poisson(), StudentT()], ids=lambda x: type(x).__name__)
    def test_converts(self, likelihood, y, dtype):
        found = likelihood.check(torch.tensor(y, dtype=dtype))
        assert found.dtype == torch.float32 and found.tolist() == [1.0, 0.0]
        assert likelihood.check(torch.tensor(y, dtype=dtype), like=t([0.0])).dtype == torch.float64

    def test_keeps_a_floating_dtype(self):
        assert Gaussian().check(t([0.5])).dtype == torch.float64

    @pytest.mark.parametrize(
        ("likelihood", "y", "message"),
        [
            (Gaussian(), [], r"^y must have shape \(examples,\) with at least one example, got \(0,\)$"),
            (Gaussian(), [[1.0], [2.0]], r"^y must have shape \(examples,\) with at least one example, got \(2, 1\)$"),
            (Gaussian(), 1.0, r"^y must have shape \(examples,\) with at least one example, got \(\)$"),
            (Gaussian(), [1.0, math.nan], r"^y\[1\] is nan: remove or impute it$"),
            (StudentT(), [-math.inf], r"^y\[0\] is -inf: remove or impute it$"),
            (Poisson(), [0.0, 2.0, math.nan], r"^y\[2\] is nan: remove or impute it$"),
            (Poisson(), [math.inf], r"^y\[0\] is inf: remove or impute it$"),
            (Poisson(), [0, 3, -1], r"^y\[2\] is -1: counts are whole numbers >= 0; correct it, or use another likelihood$"),
            (NegativeBinomial(), [1.5], r"^y\[0\] is 1.5: counts are whole numbers >= 0; correct it, or use another likelihood$"),
            (Bernoulli(), [1, -1], r"^y\[1\] is -1: labels are 0 and 1; pass \(y \+ 1\) / 2 for labels -1 and 1$"),
            (Bernoulli("probit"), [-1.0], r"^y\[0\] is -1: labels are 0 and 1; pass \(y \+ 1\) / 2 for labels -1 and 1$"),
            (Bernoulli(), [0, 1, 2], r"^y\[2\] is 2: labels are 0 and 1; recode the two classes as these$"),
            (Bernoulli(), [0.0, 0.5], r"^y\[1\] is 0.5: labels are 0 and 1; recode the two classes as these$"),
            (Bernoulli(), [0.0, math.nan], r"^y\[1\] is nan: remove or impute it$"),
        ],
        ids=[
            "empty", "column", "scalar", "nan", "infinite", "count_nan", "count_infinite", "count_negative", "count_fraction",
            "signs", "sign", "third_class", "probability", "label_nan",
        ],
    )  # fmt: skip
    def test_refuses(self, likelihood, y, message):
        with pytest.raises(ValueError, match=message):
            likelihood.check(torch.tensor(y))


class TestConstruction:
    @pytest.mark.parametrize("value", [0.0, -1.0, math.inf, math.nan], ids=str)
    @pytest.mark.parametrize(
        ("kind", "name"),
        [(Gaussian, "variance"), (NegativeBinomial, "dispersion"), (StudentT, "df"), (StudentT, "scale")],
        ids=["variance", "dispersion", "df", "scale"],
    )
    def test_refuses_hyperparameters(self, kind, name, value):
        message = rf"^{name} must be one number in \(0, inf\), got {value:g}$"
        with pytest.raises(ValueError, match=message):
            kind(**{name: value})
        with pytest.raises(ValueError, match=message):
            kind(**{name: t(value).requires_grad_()})

    def test_refuses_several_hyperparameters(self):
        with pytest.raises(ValueError, match=r"^variance must be one number in \(0, inf\), got a tensor of shape \(2,\)$"):
            Gaussian(torch.ones(2))

    @pytest.mark.parametrize("nodes", [0, 201, 2.5], ids=str)
    def test_refuses_nodes(self, nodes):
        with pytest.raises(ValueError, match=rf"^nodes must be a whole number from 1 to 200, got {nodes}$"):
            Bernoulli(nodes=nodes)

    def test_refuses_links(self):
        with pytest.raises(ValueError, match=r"^link must be one of logit, probit, got 'cauchit'$"):
            Bernoulli("cauchit")

    @pytest.mark.parametrize(
        ("name", "likelihood"),
        [
            ("gaussian", Gaussian(1.0)),
            ("bernoulli", Bernoulli("logit")),
            ("probit", Bernoulli("probit")),
            ("poisson", Poisson()),
            ("negative_binomial", NegativeBinomial(1.0)),
            ("student_t", StudentT(4.0, 1.0)),
        ],
        ids=lambda x: x if isinstance(x, str) else "",
    )
    def test_named(self, name, likelihood):
        assert named(name) == likelihood
        assert named(likelihood) is likelihood

    @pytest.mark.parametrize("wrong", ["gamma", 3, []], ids=str)
    def test_no_such_name(self, wrong):
        names = "gaussian, bernoulli, probit, poisson, negative_binomial, student_t"
        with pytest.raises(ValueError, match=f"^likelihood must be a Likelihood or one of {names}, got "):
            named(wrong)


class TestLikelihoodLoss:
    @case
    def test_is_an_oracle(self, likelihood, y):
        f, loss = normal(16, 5), LikelihoodLoss(likelihood, t(y))
        oracle = loss(f)
        assert isinstance(oracle, Oracle)
        close(oracle.value(), -likelihood.log_prob(f, t(y)).sum(), 1e-14)
        close(oracle.gradient(), torch.func.grad(lambda f: loss(f).value())(f), 1e-10)
        close(oracle.hessian(), torch.func.jacrev(torch.func.grad(lambda f: loss(f).value()))(f), 1e-10)
        close(oracle.diagonal(), oracle.hessian().diagonal(), 1e-14)

    @case
    def test_expected(self, likelihood, y):
        mean, variance = moments(17)
        look = LikelihoodLoss(likelihood, t(y)).expected(SimpleNamespace(mean=mean, variance=variance))
        E, a, b = likelihood.expected_log_prob(mean, variance, t(y))
        assert isinstance(look, Look) and look.value.shape == ()
        close(look.value, -E.sum(), 1e-14)
        close(look.gradient, -a, 1e-14)
        close(look.curvature, -b, 1e-14)

    def test_one_step_of_rate_one_is_bayes_rule_for_gaussian_noise(self):
        y, prior = t([1.0, -2.0]), 0.5
        loss = LikelihoodLoss(Gaussian(0.25), y)
        q = SimpleNamespace(mean=t([7.0, 7.0]), variance=t([3.0, 3.0]))
        look = loss.expected(q)
        precision = prior + look.curvature
        close((look.curvature * q.mean - look.gradient) / precision, y * 4 / (prior + 4), 1e-14)
