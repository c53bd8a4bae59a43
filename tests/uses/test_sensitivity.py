"""What examples mean to a model: against models that were really trained without them."""

import json
import warnings
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tests.contracts import close
from torch import nn

import bayesrule as br
from bayesrule.uses.products import ESTIMATORS

GOLDEN = Path(__file__).parents[1] / "golden"
RIDGE = json.loads((GOLDEN / "ridge_loo.json").read_text())
LOGISTIC = json.loads((GOLDEN / "logistic_loo.json").read_text())
EXACT = [name for name in ESTIMATORS if name != "mc"]


def tensor(values):
    return torch.tensor(values, dtype=torch.float64)


def parted(x, y, at=7):
    """In two batches of unequal size."""
    return [(x[:at], y[:at]), (x[at:], y[at:])]


class Linear:
    """A linear model, its full posterior and its data."""

    def __init__(self, mean, precision, x, y):
        self.model = nn.Linear(x.shape[1], mean.numel() // x.shape[1], bias=False).double().eval()
        self.post = br.Posterior.of(
            br.Full(mean.reshape(-1), precision), {"weight": self.model.weight.shape}, ess=len(x), num_data=len(x)
        )
        self.x, self.y = x, y
        self.loader = parted(x, y)

    def sensitivity(self, loss, **how):
        return br.Sensitivity(self.model, self.post, loss, **how)


def ridge(name):
    case = RIDGE[name]
    return case, Linear(tensor(case["theta"]), tensor(case["precision"]), tensor(case["X"]), tensor(case["y"])[:, None])


def binary():
    case = LOGISTIC["binary"]
    return case, Linear(tensor(case["theta"]), tensor(case["precision"]), tensor(case["X"]), tensor(case["t"])[:, None])


def classes():
    """Its weights are written by feature, those of a layer by class."""
    case = LOGISTIC["multiclass"]
    order = torch.arange(9).view(3, 3).T.reshape(-1)
    precision = tensor(case["precision"])[order][:, order]
    return case, Linear(tensor(case["theta"]).T, precision, tensor(case["X"]), torch.tensor(case["y"]))


@pytest.mark.parametrize("estimator", EXACT)
@pytest.mark.parametrize("name", ["dense", "dense_noise_quarter", "orthogonal"])
class TestLinearRegression:
    """Where the estimate is exact."""

    def test_equals_leaving_one_out(self, name, estimator):
        case, linear = ridge(name)
        found = linear.sensitivity("mse", noise_variance=case["noise_variance"], estimator=estimator).scores(linear.loader)
        close(found.deviation[:, 0], tensor(case["loo_dev_f_exact"]), 1e-9)
        close(found.cook, tensor(case["cook_distance_H"]), 1e-9)
        close(found.leverage, tensor(case["leverage"]), 1e-9)
        close(found.loo_loss.mean(), tensor(case["loo_nll_plugin_exact"]), 1e-9)
        close(found.loss.mean(), tensor(case["train_nll_plugin"]), 1e-9)
        press = (found.deviation[:, 0] + tensor(case["error"])).square().mean()
        close(press, tensor(case["loo_mse_exact"]), 1e-9)

    def test_first_order_is_the_published_equation(self, name, estimator):
        case, linear = ridge(name)
        how = dict(noise_variance=case["noise_variance"], estimator=estimator, correction="first_order")
        found = linear.sensitivity("mse", **how).scores(linear.loader)
        close(found.deviation[:, 0], tensor(case["mpe_first_order_f"]), 1e-9)
        close(found.loo_loss.mean(), tensor(case["loo_nll_plugin_mpe_first_order"]), 1e-9)

    def test_groups_equal_leaving_them_out(self, name, estimator):
        case, linear = ridge(name)
        found = linear.sensitivity("mse", noise_variance=case["noise_variance"], estimator=estimator)
        for group in case["groups"]:
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", "Newton estimate removes")
                removed = found.remove(group["indices"], linear.loader)
            order = torch.tensor(group["indices"]).argsort()
            close(removed.deviation[:, 0], tensor(group["dev_f_exact"])[order], 1e-9)
            close(removed.weights["weight"][0], tensor(group["dev_theta_exact"]), 1e-9)
            everyone = removed.effect(linear.loader)
            close(everyone.outputs[:, 0], linear.x @ tensor(group["dev_theta_exact"]), 1e-9)

    def test_groups_to_first_order_add_up(self, name, estimator):
        case, linear = ridge(name)
        how = dict(noise_variance=case["noise_variance"], estimator=estimator, correction="first_order")
        found = linear.sensitivity("mse", **how)
        whole = found.remove([0, 1], linear.loader).weights["weight"]
        close(whole, sum(found.remove([i], linear.loader).weights["weight"] for i in (0, 1)), 1e-9)


def test_an_optimizers_own_parameters_give_the_exact_answer():
    """Diagonal precision as ess (hess + weight_decay), of an orthogonal design."""
    case = RIDGE["orthogonal"]
    x, y, own = tensor(case["X"]), tensor(case["y"])[:, None], case["ivon"]
    model = nn.Linear(3, 1, bias=False).double().eval()
    precision = own["ess"] * (tensor(own["hess"]) + own["weight_decay"])[None]
    post = br.Posterior({"weight": tensor(own["mean"])[None]}, {"weight": precision}, ess=own["ess"], num_data=len(x))
    found = br.Sensitivity(model, post, "mse").scores([(x, y)])
    close(found.deviation[:, 0], tensor(case["loo_dev_f_exact"]), 1e-8)  # the file has ten digits


@pytest.mark.parametrize("estimator", EXACT)
class TestLogisticRegression:
    def test_of_two_classes(self, estimator):
        case, linear = binary()
        newton = linear.sensitivity("bce", estimator=estimator).scores(linear.loader)
        first = linear.sensitivity("bce", estimator=estimator, correction="first_order").scores(linear.loader)
        close(newton.deviation[:, 0], tensor(case["one_newton_f"]), 1e-9)
        close(first.deviation[:, 0], tensor(case["mpe_f"]), 1e-9)
        close(first.probability_deviation[:, 0], tensor(case["mpe_prob"]), 1e-9)
        for found, key in ((newton.loo_loss, "loo_nll_one_newton"), (first.loo_loss, "loo_nll_mpe"), (newton.loss, "train_nll")):
            close(found.mean(), tensor(case[key]), 1e-9)
        exact = case["loo_nll_exact"]
        assert abs(newton.loo_loss.mean() - exact) < abs(first.loo_loss.mean() - exact) < abs(first.loss.mean() - exact)

    def test_of_more_with_the_whole_covariance_of_the_logits(self, estimator):
        case, linear = classes()
        newton = linear.sensitivity("cross_entropy", estimator=estimator).scores(linear.loader)
        first = linear.sensitivity("cross_entropy", estimator=estimator, correction="first_order").scores(linear.loader)
        close(newton.deviation, tensor(case["one_newton_logits"]), 1e-9)
        close(first.deviation, tensor(case["mpe_logits_full_V"]), 1e-9)
        close(first.probability_deviation, tensor(case["mpe_prob_full"]), 1e-9)
        close(newton.loo_loss.mean(), tensor(case["loo_nll_one_newton"]), 1e-9)
        close(first.loo_loss.mean(), tensor(case["loo_nll_full_V"]), 1e-9)
        off = (newton.deviation - tensor(case["loo_dev_logits_exact"])).abs().max()
        close(off, tensor(case["max_abs_err"]["one_newton"]), 1e-6)

    def test_groups(self, estimator):
        case, linear = binary()
        for correction, key in (("newton", "dev_f_one_newton"), ("first_order", "dev_f_first_order")):
            found = linear.sensitivity("bce", estimator=estimator, correction=correction)
            for group in case["groups"]:
                with warnings.catch_warnings():
                    warnings.filterwarnings("ignore", ".* estimate removes")
                    removed = found.remove(group["indices"], linear.loader)
                order = torch.tensor(group["indices"]).argsort()
                close(removed.deviation[:, 0], tensor(group[key])[order], 1e-9)

    def test_a_class_left_out_is_a_ranking_and_says_so(self, estimator):
        case, linear = classes()
        found = linear.sensitivity("cross_entropy", estimator=estimator, correction="first_order")
        for one in case["leave_one_class_out"]:
            share = f"{100 * len(one['indices']) / len(linear.x):.0f}%"
            with pytest.warns(UserWarning, match=f"^first-order estimate removes {share} of the data; values are a ranking only"):
                removed = found.leave_class_out(one["removed_class"], linear.loader)
            close(removed.loss_without.mean(), tensor(one["loss_group_first_order"]), 1e-9)
            assert removed.indices.tolist() == one["indices"]


@pytest.mark.parametrize("name", ["dense", "dense_noise_quarter"])
class TestWidth:
    def test_is_one_where_the_precision_is_that_of_the_data_and_the_prior(self, name):
        case, linear = ridge(name)
        prior = {"weight": torch.full((1, 4), case["delta"], dtype=torch.float64)}
        post = replace(linear.post, prior_mean={"weight": torch.zeros(1, 4, dtype=torch.float64)}, prior_precision=prior)
        found = br.Sensitivity(linear.model, post, "mse", noise_variance=case["noise_variance"])
        close(torch.tensor(found.width(linear.loader), dtype=torch.float64), torch.ones((), dtype=torch.float64), 1e-8)

    def test_makes_estimates_independent_of_the_width_of_the_posterior(self, name):
        case, linear = ridge(name)
        how = dict(noise_variance=case["noise_variance"], scale="data")
        narrow = replace(linear.post.rescale(ess=700.0), num_data=None)
        wanted, found = (
            br.Sensitivity(linear.model, p, "mse", **how).scores(linear.loader, subset=30) for p in (linear.post, narrow)
        )
        close(found.deviation, wanted.deviation, 1e-9)
        widths = [
            br.Sensitivity(linear.model, p, "mse", noise_variance=case["noise_variance"]).width(linear.loader)
            for p in (narrow, linear.post)
        ]
        assert widths[0] / widths[1] == pytest.approx(700 / 30, rel=1e-9)
