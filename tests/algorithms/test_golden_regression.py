"""The golden linear regression through the literal rule: every parametrization, any start, damped steps, one example at a time."""

import json
from pathlib import Path

import pytest
import torch
from tests.contracts import close

import bayesrule as br

CASE = json.loads((Path(__file__).parents[1] / "golden" / "bayes_linear_regression.json").read_text())
IN, OUT = CASE["inputs"], CASE["expected"]
NATURAL = br.BayesRule(br.Delta(), br.Hessian(), br.Natural())


def t(values):
    return torch.tensor(values, dtype=torch.float64)


X, Y, VARIANCE = t(IN["X"]), t(IN["y"]), IN["noise_var"]
PRIOR = br.Full(t(IN["prior_mean"]), IN["prior_precision"])
START = br.Full(t(IN["start_mean"]), t(IN["start_precision"]))


def loss(rows=slice(None)):
    return br.Quadratic(X[rows].mT @ X[rows] / VARIANCE, X[rows].mT @ Y[rows] / VARIANCE)


def same(q, case):
    close(q.mean, t(case["mean"]))
    for name in ("precision", "cov"):
        if name in case:
            close(q.precision if name == "precision" else q.covariance, t(case[name]))
    for index, name in enumerate(("lambda1", "lambda2")):
        if name in case:
            close(q.natural()[index], t(case[name]))


def test_posterior_in_three_parametrizations():
    q = br.linear_regression(X, Y, PRIOR, VARIANCE)
    same(q, OUT)
    close(q.expected()[0], t(OUT["mu1"]))
    close(q.expected()[1], t(OUT["mu2"]))
    close(q.entropy(), t(OUT["entropy"]))
    close(br.ridge(X, Y, OUT["ridge_alpha"], VARIANCE).mean, t(OUT["ridge_coef"]))
    close(br.ridge(X, Y, 0.0).mean, t(OUT["ols_coef"]))


def test_evidence_and_predictive():
    fit = br.cvi(X, Y, br.likelihoods.Gaussian(VARIANCE), prior=PRIOR)
    mean, variance = fit.predict(t(IN["X_test"]))
    assert fit.evidence_bound == pytest.approx(OUT["log_evidence"], abs=1e-10)
    close(mean, t(OUT["predictive_mean"]))
    close(variance, t(OUT["predictive_var_f"]))
    close(fit.predictive(t(IN["X_test"])).variance, t(OUT["predictive_var_y"]))


def test_one_step_from_any_start():
    same(NATURAL.step(START, PRIOR, loss()), OUT["blr_rho1_from_start"])


def test_damped_steps():
    q = START
    for case in OUT["blr_damped_from_start"]:
        q = NATURAL.step(q, PRIOR, loss(), IN["rho_damped"])
        same(q, case)


def test_one_example_at_a_time():
    q = PRIOR
    for n, case in enumerate(OUT["sequential"]):
        q = NATURAL.step(q, q, loss(slice(n, n + 1)))
        same(q, case)


def test_sites_of_single_examples():
    for n in range(len(X)):
        q = NATURAL.step(PRIOR, PRIOR, loss(slice(n, n + 1)))
        site = q.natural() - PRIOR.natural()
        close(site[0], t(OUT["site_lambda1"][n]))
        close(site[1], t(OUT["site_lambda2"][n]))


def test_mean_field_optimum():
    prior = br.Diagonal(PRIOR.mean, torch.full_like(PRIOR.mean, IN["prior_precision"]))
    result = br.infer(br.BayesRule(br.Delta(), br.Hessian(), br.Natural()), prior, prior, loss(), tolerance=1e-14)
    close(result.q.mean, t(OUT["diag_vi"]["mean"]), 1e-9)
    close(result.q.variance, t(OUT["diag_vi"]["var"]))
