"""Conjugate pairs against stored numbers."""

import json
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.contracts import close, flat
from torch import Tensor

import bayesrule as br
from bayesrule import conjugate as c

update = c.update
GOLDEN = json.loads((Path(__file__).parents[1] / "golden" / "conjugate_pairs.json").read_text())


def tensor(values: Any) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def tensors(thing: Any) -> dict[str, Tensor]:
    return {f.name: getattr(thing, f.name) for f in fields(thing)}


KNOWN = {
    "beta_bernoulli": (br.Beta, c.Bernoulli()),
    "gamma_poisson": (br.Gamma, c.Poisson()),
    "gamma_exponential": (br.Gamma, c.Exponential()),
    "dirichlet_categorical": (br.Dirichlet, c.Categorical()),
    "normal_known_var": (lambda mean, variance: br.Normal(mean, 1 / variance), c.Normal(variance=0.6)),
    "normal_gamma": (br.NormalGamma, c.Normal()),
    "normal_inverse_wishart": (br.NormalInverseWishart, c.MultivariateNormal()),
    "wishart_known_mean": (br.Wishart, c.MultivariateNormal(mean=0.0)),
    "von_mises_known_concentration": (br.VonMises, c.VonMises(2.0)),
    "inverse_gamma_known_mean": (br.InverseGamma, c.Normal(mean=1.0)),
    "normal_inverse_gamma": (br.NormalInverseGamma, c.LinearRegression()),
}


def known(name):
    """A golden case with the same keys as the others."""
    case = dict(GOLDEN[name])
    if name == "dirichlet_categorical":
        case |= {"prior": {"alpha": case["prior_alpha"]}, "posterior": {"alpha": case["posterior_alpha"]}}
        case |= {"x": [k for k, count in enumerate(case["counts"]) for _ in range(int(count))]}
        case |= {"log_evidence": case["log_evidence_of_ordered_sequence"]}
    if name == "normal_inverse_gamma":
        case["x"] = (tensor(case["X"]), tensor(case["y"]))
    else:
        case["x"] = tensor(case["x"])
    make, likelihood = KNOWN[name]
    prior, posterior = (make(*map(tensor, case[which].values())) for which in ("prior", "posterior"))
    return case, prior, posterior, update(prior, likelihood, case["x"])


def numbers(natural):
    return flat(br.Vector([tensor(part) for part in (natural.values() if isinstance(natural, dict) else natural)]))


def test_every_golden_case_is_known():
    assert KNOWN.keys() == GOLDEN.keys()


@pytest.mark.parametrize("name", KNOWN)
def test_golden_numbers(name):
    case, prior, posterior, found = known(name)
    for field, value in tensors(posterior).items():
        close(getattr(found.posterior, field), value)
    after, before = (flat(q.natural()) for q in (found.posterior, prior))
    stored = {"prior_lambda": before, "posterior_lambda": after, "site_lambda_sum": after - before}
    stored |= {"posterior_mu": flat(found.posterior.expected()), "log_evidence": found.log_evidence.reshape(-1)}
    for key, value in stored.items():
        if key in case:
            close(value, numbers(case[key] if key != "log_evidence" else [case[key]]))


def test_golden_predictives():
    predictives = {name: known(name)[3].predictive for name in KNOWN}
    case = GOLDEN["beta_bernoulli"]
    close(predictives["beta_bernoulli"].probs, tensor(case["predictive_prob_one"]))
    pmf = predictives["gamma_poisson"].log_prob(torch.arange(6, dtype=torch.float64)).exp()
    close(pmf, tensor(GOLDEN["gamma_poisson"]["predictive_pmf_0_to_5"]))
    close(predictives["dirichlet_categorical"].probs, tensor(GOLDEN["dirichlet_categorical"]["predictive"]))
    case, found = GOLDEN["normal_known_var"]["predictive"], predictives["normal_known_var"]
    close(torch.stack([found.mean, found.variance]), tensor([case["mean"], case["var"]]))
    case, found = GOLDEN["normal_gamma"]["predictive"], predictives["normal_gamma"]
    close(torch.stack([found.df, found.loc, found.scale**2]), tensor(list(case.values())))


def test_counts_of_a_multinomial_are_a_sequence_whose_order_is_forgotten():
    case, prior, posterior, sequence = known("dirichlet_categorical")
    found = update(prior, "multinomial", tensor([case["counts"]]))
    close(found.posterior.concentration, posterior.concentration)
    ways = tensor(11.0).lgamma() - (tensor(case["counts"]) + 1).lgamma().sum()
    close(found.log_evidence - ways, sequence.log_evidence)
