"""Inference over predictors: the golden optima, the equality of views, and what is done where a step goes too far."""

import itertools
import json
import math
from pathlib import Path

import pytest
import torch
from sklearn.gaussian_process import GaussianProcessClassifier, GaussianProcessRegressor
from sklearn.gaussian_process.kernels import RBF, ConstantKernel, DotProduct, WhiteKernel
from sklearn.linear_model import LogisticRegression
from tests.contracts import close, normal, positive

import bayesrule as br
from bayesrule.algorithms.cvi import CVI, NEWTON_SITES
from bayesrule.estimators.likelihoods import Bernoulli, Gaussian, NegativeBinomial, Poisson, StudentT

GOLDEN = Path(__file__).parents[1] / "golden"


def t(values):
    return torch.tensor(values, dtype=torch.float64)


def golden(name):
    case = json.loads((GOLDEN / f"{name}.json").read_text())
    return case["inputs"], case["expected"]


def rbf(signal, length):
    return ConstantKernel(signal**2) * RBF(length)


def processes(link, **options):
    """The golden GP classification: inputs, expected values, and the fit."""
    inputs, expected = golden("gp_classification_cvi")
    kernel = rbf(inputs["signal_std"], inputs["lengthscale"])
    labels = (t(inputs["y"]) + 1) / 2
    return inputs, expected[link], br.cvi(t(inputs["x"]), labels, Bernoulli(link, nodes=100), kernel=kernel, **options)


class TestLogistic:
    """Bayesian logistic regression; its expectations by quadrature with 100 nodes, which is right to 1e-12."""

    likelihood = Bernoulli(nodes=100)

    @pytest.mark.parametrize("expectation", [None, br.GaussHermite(100)], ids=["exact", "grid"])
    def test_full_optimum(self, expectation):
        inputs, expected = golden("bayes_logistic_regression")
        X, y, prior = t(inputs["X"]), t(inputs["y"]), inputs["prior_precision"]
        fit = br.cvi(X, y, self.likelihood, prior=prior, tolerance=1e-12, expectation=expectation)
        best, at = expected["full_gaussian_vi"], expected["at_full_vi"]
        assert fit.converged and not fit.backoffs
        close(fit.q.posterior.mean, t(best["mean"]))
        close(fit.q.posterior.covariance, t(best["cov"]))
        assert fit.evidence_bound == pytest.approx(best["elbo"], abs=1e-10)
        close(fit.q.mean, t(at["f_mean"]))
        close(fit.q.variance, t(at["f_var"]))
        close(fit.q.natural()[0], t(at["site_lambda1"]))
        close(fit.q.natural()[1], t(at["site_lambda2"]))

    @pytest.mark.parametrize("family", ["full", "diagonal"])
    def test_optimum_of_the_rule_over_weights(self, family):
        inputs, expected = golden("bayes_logistic_regression")
        loss = br.LinearLoss(t(inputs["X"]), self.likelihood, t(inputs["y"]))
        origin, precision = t([0.0] * 3), inputs["prior_precision"]
        prior = br.Full(origin, precision) if family == "full" else br.Diagonal(origin, origin + precision)
        result = br.infer(CVI, prior, prior, loss, tolerance=1e-12, steps=300)
        best = expected["full_gaussian_vi" if family == "full" else "diag_gaussian_vi"]
        assert result.converged
        # the stored mean-field optimum is right to 1e-8 (it is an L-BFGS optimum, checked by a fixed point)
        close(result.q.mean, t(best["mean"]), 1e-8)
        spread = result.q.covariance if family == "full" else result.q.variance
        close(spread, t(best["cov"] if family == "full" else best["var"]), 1e-8)
        assert result.bound == pytest.approx(best["elbo"], abs=1e-9)

    def test_the_literal_rule_by_quadrature_reaches_the_optimum(self):
        """Nothing but BayesRule.step: Full, quadrature of each example's predictor, the natural retraction."""
        inputs, expected = golden("bayes_logistic_regression")
        X, y = t(inputs["X"]), t(inputs["y"])
        prior = q = br.Full(t([0.0] * 3), inputs["prior_precision"])
        rule = br.BayesRule(br.Exact(), br.Zero(), br.Natural())
        for _ in range(60):
            q = rule.step(q, prior, br.LinearLoss(X, self.likelihood, y), 0.5)
        close(q.mean, t(expected["full_gaussian_vi"]["mean"]), 1e-8)
        close(q.covariance, t(expected["full_gaussian_vi"]["cov"]), 1e-8)

    def test_fixed_point_is_stationary(self):
        inputs, _ = golden("bayes_logistic_regression")
        X, y = t(inputs["X"]), t(inputs["y"])
        prior = br.Full(t([0.0] * 3), inputs["prior_precision"])
        fit = br.cvi(X, y, self.likelihood, prior=prior, tolerance=1e-13)
        q = fit.q.posterior
        look = br.LinearLoss(X, self.likelihood, y).expected(q)
        residual = q.natural() - prior.natural() + q.natural_gradient(look)
        assert max(part.abs().max() for part in residual) < 1e-11

    def test_laplace_and_the_path_of_newton(self):
        inputs, expected = golden("bayes_logistic_regression")
        X, y, prior = t(inputs["X"]), t(inputs["y"]), inputs["prior_precision"]
        fit = br.cvi(X, y, prior=prior, expectation=br.Delta(), tolerance=1e-12)
        close(fit.q.posterior.mean, t(expected["map"]))
        close(fit.q.posterior.precision, t(expected["laplace"]["precision"]))
        assert fit.evidence_bound == pytest.approx(expected["laplace"]["log_evidence"], abs=1e-10)
        q = start = br.WeightSpace(X, br.Full(t([0.0] * 3), prior))
        for weights in expected["newton_iterates_from_zero"][1:]:
            q = NEWTON_SITES.step(q, start, br.LikelihoodLoss(Bernoulli(), y))
            close(q.posterior.mean, t(weights))

    def test_the_mode_is_that_of_scikit_learn(self):
        X, y = normal(0, 200, 4), (normal(1, 200) > 0).double()
        twin = LogisticRegression(C=1 / 0.7, fit_intercept=False, tol=1e-12, max_iter=1000).fit(X.numpy(), y.numpy())
        fit = br.cvi(X, y, prior=0.7, expectation=br.Delta())
        close(fit.q.posterior.mean, t(twin.coef_[0]), 1e-6)

    def test_bounds_are_in_order(self):
        """Mean field below full below the evidence."""
        _, expected = golden("bayes_logistic_regression")
        inputs, _ = golden("bayes_logistic_regression")
        fit = br.cvi(t(inputs["X"]), t(inputs["y"]), self.likelihood, prior=inputs["prior_precision"])
        assert expected["diag_gaussian_vi"]["elbo"] < fit.evidence_bound < expected["exact_posterior"]["log_evidence"]


class TestOtherLikelihoods:
    def test_poisson(self):
        inputs, expected = golden("bayes_poisson_regression")
        X, y = t(inputs["X"]), t(inputs["y"])
        fit = br.cvi(X, y, "poisson", prior=inputs["prior_precision"], tolerance=1e-12)
        best = expected["full_gaussian_vi"]
        close(fit.q.posterior.mean, t(best["mean"]))
        close(fit.q.posterior.covariance, t(best["cov"]))
        assert fit.evidence_bound == pytest.approx(best["elbo"], abs=1e-10)
        close(fit.q.natural()[0], t(expected["at_full_vi"]["site_lambda1"]))
        mode = br.cvi(X, y, "poisson", prior=inputs["prior_precision"], expectation=br.Delta(), tolerance=1e-12).q.posterior
        close(mode.mean, t(expected["map"]))
        close(mode.precision, t(expected["laplace_precision"]))

    def test_student_t_with_an_outlier(self):
        inputs, expected = golden("studentt_location")
        y = t(inputs["y"])
        likelihood = StudentT(df=inputs["nu"], scale=inputs["scale"], nodes=100)
        fit = br.cvi(torch.ones_like(y), y, likelihood, prior=inputs["prior_precision"], tolerance=1e-12)
        q, best = fit.q.posterior, expected["gaussian_vi"]
        assert fit.converged and (fit.q.precisions < 0).any()  # a site of negative precision, and the whole is still a Gaussian
        assert q.mean.item() == pytest.approx(best["mean"], abs=1e-10)
        assert q.covariance.item() == pytest.approx(best["var"], abs=1e-10)
        assert fit.evidence_bound == pytest.approx(best["elbo"], abs=1e-9)
        assert fit.evidence_bound < expected["log_evidence"]

    def test_gaussian_likelihood_is_one_step_of_bayes_rule(self):
        X, y = normal(2, 30, 3), normal(3, 30)
        prior = br.Full(normal(4, 3), positive(5, 3))
        fit = br.cvi(X, y, Gaussian(0.3), prior=prior)
        exact = br.linear_regression(X, y, prior, 0.3)
        close(fit.q.posterior.mean, exact.mean)
        close(fit.q.posterior.covariance, exact.covariance)
        assert len(fit.trace) == 1 and fit.trace[0].rate == 1.0
        mean = X @ prior.mean
        covariance = 0.3 * torch.eye(30, dtype=torch.float64) + X @ prior.covariance @ X.mT
        evidence = torch.distributions.MultivariateNormal(mean, covariance).log_prob(y)
        assert fit.evidence_bound == pytest.approx(evidence.item(), abs=1e-10)

    def test_negative_binomial_against_poisson_and_brute_force(self):
        """One weight: the optimum over mean and variance of a bound made by brute force."""
        x, y, likelihood = normal(6, 8), t([0.0, 3, 1, 2, 0, 7, 1, 1]), NegativeBinomial(dispersion=0.5, nodes=60)
        fit = br.cvi(x, y, likelihood, prior=1.0, tolerance=1e-12)

        def bound(mean, log_sd):
            grid = torch.linspace(-12, 12, 4001, dtype=torch.float64)
            weight = mean + log_sd.exp() * grid
            density = torch.exp(-(grid**2) / 2) / math.sqrt(2 * math.pi) * (grid[1] - grid[0])
            loglik = torch.distributions.NegativeBinomial(2.0, logits=(x[:, None] * weight).add(math.log(0.5))).log_prob(y[:, None])
            return (density * loglik.sum(0)).sum() - (log_sd.exp() ** 2 + mean**2 - 1 - 2 * log_sd) / 2

        q = fit.q.posterior
        at = (q.mean[0].clone().requires_grad_(), (q.covariance[0, 0].log() / 2).clone().requires_grad_())
        value = bound(*at)
        assert fit.evidence_bound == pytest.approx(value.item(), abs=1e-9)
        assert max(abs(g.item()) for g in torch.autograd.grad(value, at)) < 1e-7


class TestProcesses:
    def test_regression_is_the_closed_form_in_one_step(self):
        inputs, expected = golden("gp_regression")
        kernel = rbf(inputs["signal_std"], inputs["lengthscale"])
        x, y, new = (t(inputs[key]) for key in ("x", "y", "x_test"))
        fit = br.cvi(x, y, Gaussian(inputs["noise_var"]), kernel=kernel)
        mean, variance = fit.predict(new)
        assert len(fit.trace) == 1
        close(mean, t(expected["test_mean"]))
        close(variance, t(expected["test_cov"]).diagonal())
        close(fit.q.mean, t(expected["posterior_mean_train"]))
        close(fit.q.covariance, t(expected["posterior_cov_train"]))
        close(fit.q.natural()[0], t(expected["site_lambda1"]))
        close(fit.q.natural()[1], t(expected["site_lambda2"]))
        assert fit.evidence_bound == pytest.approx(expected["log_marginal_likelihood"], abs=1e-10)

    @pytest.mark.parametrize("link", ["logit", "probit"])
    def test_classification(self, link):
        inputs, expected, fit = processes(link, tolerance=1e-13)
        mean, variance = fit.predict(t(inputs["x_test"]))
        assert fit.converged
        close(fit.q.mean, t(expected["mean"]))
        close(fit.q.covariance, t(expected["cov"]))
        close(fit.q.natural()[0], t(expected["site_lambda1"]))
        close(fit.q.natural()[1], t(expected["site_lambda2"]))
        assert fit.evidence_bound == pytest.approx(expected["elbo"], abs=1e-10)
        close(mean, t(expected["test_f_mean"]))
        close(variance, t(expected["test_f_var"]))
        close(fit.predictive(t(inputs["x_test"])).probs, t(expected["test_prob_plus"]))

    @pytest.mark.parametrize("link", ["logit", "probit"])
    def test_the_first_six_iterates_from_zero_sites(self, link):
        inputs, expected = golden("gp_classification_cvi")
        kernel = rbf(inputs["signal_std"], inputs["lengthscale"])
        q = prior = br.FunctionSpace(t(kernel(t(inputs["x"])[:, None].numpy())))
        loss = br.LikelihoodLoss(Bernoulli(link, nodes=100), (t(inputs["y"]) + 1) / 2)
        for sites in expected[link]["first_six_site_iterates_rho_half_from_zero"]:
            q = CVI.step(q, prior, loss, 0.5)
            close(q.natural()[0], t(sites["lambda1"]))
            close(q.natural()[1], t(sites["lambda2"]))

    def test_laplace_is_that_of_scikit_learn(self):
        inputs, expected, fit = processes("logit", expectation=br.Delta(), tolerance=1e-13)
        laplace = expected["laplace"]
        close(fit.q.mean, t(laplace["mode"]))
        close(fit.q.precisions, t(laplace["W"]))
        kernel = rbf(inputs["signal_std"], inputs["lengthscale"])
        twin = GaussianProcessClassifier(kernel, optimizer=None).fit(t(inputs["x"])[:, None].numpy(), inputs["y"])
        assert fit.evidence_bound == pytest.approx(twin.log_marginal_likelihood_value_, abs=1e-8)
        assert fit.evidence_bound == pytest.approx(laplace["log_marginal"], abs=1e-10)

    def test_weight_space_and_function_space_agree(self):
        """A linear kernel is a linear model; the two factorize different matrices."""
        X, y = normal(7, 25, 3), (normal(8, 25) > 0).double()
        weights = br.cvi(X, y, prior=2.0, tolerance=1e-12)
        functions = br.cvi(X, y, kernel=lambda a, b: a @ b.mT / 2.0, tolerance=1e-12)
        close(functions.q.mean, weights.q.mean, 1e-9)
        close(functions.q.variance, weights.q.variance, 1e-9)
        assert functions.evidence_bound == pytest.approx(weights.evidence_bound, abs=1e-9)
        for a, b in zip(functions.predict(normal(9, 4, 3)), weights.predict(normal(9, 4, 3)), strict=True):
            close(a, b, 1e-8)

    def test_views_agree_with_sites_of_negative_precision(self):
        X, y = normal(7, 25, 3), normal(8, 25)
        y[3] = 30.0
        likelihood = StudentT(df=3.0, scale=0.5, nodes=60)
        weights = br.cvi(X, y, likelihood, prior=1.0, tolerance=1e-12)
        functions = br.cvi(X, y, likelihood, kernel=lambda a, b: a @ b.mT, tolerance=1e-12)
        assert (weights.q.precisions < 0).any()
        close(functions.q.mean, weights.q.mean, 1e-8)
        close(functions.q.variance, weights.q.variance, 1e-8)
        for a, b in zip(functions.predict(normal(9, 4, 3)), weights.predict(normal(9, 4, 3)), strict=True):
            close(a, b, 1e-8)

    @pytest.mark.parametrize(("signal", "most"), [(1.5, 12), (10.0, 60), (100.0, 700)])
    def test_converges_at_any_signal(self, signal, most):
        """Where a fixed rate of 1 oscillates for a thousand steps, or never ends."""
        inputs, _ = golden("gp_classification_cvi")
        labels = (t(inputs["y"]) + 1) / 2
        fit = br.cvi(t(inputs["x"]), labels, kernel=rbf(signal, inputs["lengthscale"]), steps=1000)
        assert fit.converged and len(fit.trace) <= most
        bounds = [step.bound for step in fit.trace]
        assert all(b >= a - 1e-7 for a, b in itertools.pairwise(bounds))


class TestTuning:
    def test_regression_finds_what_scikit_learn_finds(self):
        inputs, _ = golden("gp_regression")
        x, y = t(inputs["x"]), t(inputs["y"])
        fit = br.cvi(x, y, "gaussian", kernel=rbf(1.0, 1.0), tune=100)
        twin = GaussianProcessRegressor(rbf(1.0, 1.0) + WhiteKernel(1.0), n_restarts_optimizer=3, random_state=0)
        twin.fit(x[:, None].numpy(), y.numpy())
        assert fit.evidence_bound == pytest.approx(twin.log_marginal_likelihood_value_, abs=1e-6)
        assert fit.likelihood.variance == pytest.approx(math.exp(twin.kernel_.theta[-1]), rel=1e-2)

    def test_classification_raises_the_bound_to_where_it_is_flat(self):
        X = normal(10, 40, 1)
        y = ((3 * X[:, 0]).sin() + 0.3 * normal(11, 40) > 0).double()
        before = br.cvi(X, y, kernel=rbf(1.0, 1.0))
        after = br.cvi(X, y, kernel=rbf(1.0, 1.0), tune=60)
        assert after.evidence_bound > before.evidence_bound + 1
        theta = after.kernel.source.theta
        for move in (-0.05, 0.05):
            for index in range(2):
                moved = theta.copy()
                moved[index] += move
                there = br.cvi(X, y, kernel=after.kernel.source.clone_with_theta(moved))
                assert there.evidence_bound < after.evidence_bound + 1e-6

    def test_a_module_is_tuned_in_place(self):
        class Kernel(torch.nn.Module):
            def __init__(self):
                super().__init__()
                self.log_length = torch.nn.Parameter(t(0.0))

            def forward(self, a, b):
                return (-((a[:, None] - b[None]) / self.log_length.exp()).square().sum(-1) / 2).exp()

        kernel, x = Kernel(), normal(12, 30)
        y = (4 * x).sin() + 0.1 * normal(15, 30)
        fit = br.cvi(x, y, Gaussian(0.01), kernel=kernel, tune=60)
        assert fit.evidence_bound > br.cvi(x, y, Gaussian(0.01), kernel=Kernel()).evidence_bound
        assert kernel.log_length.item() < -0.5

    def test_prior_and_noise_of_a_linear_model(self):
        X, y = normal(13, 60, 3), normal(13, 60, 3) @ t([1.0, -1.0, 0.5]) + 0.1 * normal(14, 60)
        fit = br.cvi(X, y, "gaussian", tune=60)
        assert fit.likelihood.variance == pytest.approx(0.01, rel=0.5)
        at = (fit.likelihood.variance, fit.q.prior.precision[0, 0].item())
        for variance, precision in ((at[0] * 1.1, at[1]), (at[0] / 1.1, at[1]), (at[0], at[1] * 1.1), (at[0], at[1] / 1.1)):
            assert br.cvi(X, y, Gaussian(variance), prior=precision).evidence_bound < fit.evidence_bound


class TestFrontDoor:
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
    def test_dtype_follows_the_inputs(self, dtype):
        X, y = normal(0, 30, 2).to(dtype), normal(1, 30) > 0
        for fit in (br.cvi(X, y), br.cvi(X, y, kernel=rbf(1.0, 1.0))):
            assert fit.converged
            assert {part.dtype for part in (*fit.predict(X), fit.predictive(X).probs)} == {dtype}
            assert fit.q.mean.dtype == torch.float64

    def test_float32_agrees_with_float64(self):
        X, y = normal(0, 100, 4), (normal(1, 100) > 0).double()
        a, b = br.cvi(X.float(), y.float()), br.cvi(X, y)
        torch.testing.assert_close(a.q.posterior.mean, b.q.posterior.mean, rtol=1e-4, atol=1e-4)

    def test_numpy_lists_and_kernels_of_others_come_in(self):
        X, y = normal(0, 20, 1), (normal(1, 20) > 0).long()
        kernel = DotProduct(1.0) + WhiteKernel(0.1)
        a = br.cvi(X.numpy(), y.numpy(), kernel=kernel)
        b = br.cvi(X.tolist(), y.tolist(), prior=br.Full(torch.zeros(1), 1.0))
        assert a.converged and b.converged

    def test_the_trace_says_what_was_taken_back(self):
        """Poisson counts up to 55 from a wide prior: E exp(f) is astronomical there, and the default starts elsewhere."""
        X = torch.stack([torch.ones(10), torch.linspace(-2, 4, 10)], 1).double()
        y = (X @ t([0.0, 1.0])).exp().round()
        fit = br.cvi(X, y, Poisson(), prior=0.01)
        assert fit.converged and y.max() == 55
        with pytest.raises(br.DomainError, match="start nearer"):
            br.cvi(X, y, Poisson(), prior=0.01, warm_start=False)
        wild = br.cvi(
            t([[1.0]] * 3), t([0.0, 0.1, 8.0]), StudentT(df=1.0, scale=0.2, nodes=200), prior=0.01, warm_start=False, rate=1.0
        )
        assert wild.converged and wild.backoffs > 0 and min(step.rate for step in wild.trace) < 1

    @pytest.mark.parametrize(
        ("call", "words"),
        [
            (lambda: br.cvi([[math.nan]], [1]), "X has 1 entries that are not finite"),
            (lambda: br.cvi(torch.zeros(0, 2), []), r"X must have shape .*got \(0, 2\)"),
            (lambda: br.cvi(torch.zeros(2, 2, 2), [1, 1]), r"X must have shape"),
            (lambda: br.cvi([["a"]], [1]), "X must be an array of numbers"),
            (lambda: br.cvi([[1.0], [2.0]], [1]), "X and y must have equally many examples, got 2 and 1"),
            (lambda: br.cvi([[1.0], [2.0]], [1, -1]), r"y\[1\] is -1: labels are 0 and 1"),
            (lambda: br.cvi([[1.0], [2.0]], [1, 0.5], "poisson"), r"y\[1\] is 0.5: counts"),
            (lambda: br.cvi([[1.0], [2.0]], [1, math.nan], "gaussian"), r"y\[1\] is nan"),
            (lambda: br.cvi([[1.0]], [1], prior=-1), "prior must be a precision in"),
            (lambda: br.cvi([[1.0]], [1], prior=br.Full(torch.zeros(2), 1.0)), "prior is over 2 weights, X has 1"),
            (
                lambda: br.cvi([[1.0]], [1], prior=br.Full(torch.zeros(1), 0.0)),
                "prior must have a finite mean and a positive definite",
            ),
            (lambda: br.cvi([[1.0]], [1], "logistic"), "likelihood must be .*bernoulli.*got 'logistic'"),
            (lambda: br.cvi([[1.0]], [1], rate=2.0), r"rate must be a number in \(0, 1\], got 2.0"),
            (lambda: br.cvi([[1.0]], [1], steps=0), "steps must be a whole number of at least 1, got 0"),
            (lambda: br.cvi([[1.0], [2.0]], [1, 0], kernel=lambda a, b: a[:, 0]), "kernel must give finite covariances of shape"),
            (lambda: br.cvi([[1.0], [2.0]], [1, 0], kernel=lambda a, b: a - b.mT), "kernel must give a symmetric matrix"),
            (lambda: br.cvi([[1.0], [2.0]], [1, 0], kernel=lambda a, b: -a @ b.mT), "kernel must give a positive semi-definite"),
            (lambda: br.cvi([[1.0], [2.0]], [1, 0], kernel=lambda a, b: a @ b.mT, tune=3), "tune found no hyper-parameter"),
            (lambda: br.cvi([[1.0], [2.0]], [1, 0]).predict([[1.0, 2.0]]), r"X must have shape \(examples, 1\)"),
        ],
        ids=lambda value: value[:40] if isinstance(value, str) else "",
    )
    def test_bad_input_is_one_line_that_names_it(self, call, words):
        with pytest.raises(ValueError, match=words) as error:
            call()
        assert "\n" not in str(error.value)

    def test_a_kernel_that_is_none(self):
        with pytest.raises(TypeError, match=r"kernel must be .* function of two tensors, got int"):
            br.cvi([[1.0]], [1], kernel=3)
