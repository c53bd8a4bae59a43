"""Weights of 16 bits: the mean and the state are exact, samples are rounded by chance."""

import copy
import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import softplus

import bayesrule as br
from bayesrule import plots
from bayesrule.optimizers.cells import Names

pytestmark = pytest.mark.usefixtures("unrecorded")

NARROW = [torch.bfloat16, torch.float16]
GOLDEN = json.loads((Path(__file__).parents[1] / "golden" / "bayes_logistic_regression.json").read_text())
CHAINS = 128


class Golden:
    """The golden logistic regression, in many chains at once, with weights that lie around any center."""

    def __init__(self, dtype: torch.dtype, center: float) -> None:
        self.x = torch.tensor(GOLDEN["inputs"]["X"])
        self.sign = 2 * torch.tensor(GOLDEN["inputs"]["y"]).float() - 1
        self.center, self.pull = center, GOLDEN["inputs"]["prior_precision"]
        self.weights = nn.Parameter(torch.full((CHAINS, 3), center, dtype=dtype))

    def loss(self) -> Tensor:
        return softplus(-self.sign * ((self.weights.float() - self.center) @ self.x.T)).mean(1).sum()

    def train(self, kind: type[br.IVON], steps: int = 800, **hyper: object) -> tuple[Tensor, Tensor]:
        """Mean and precision that are reached, over the chains."""
        prior = br.Posterior({"w": torch.full((CHAINS, 3), self.center)}, {"w": torch.full((CHAINS, 3), self.pull)})
        optimizer = kind(
            [("w", self.weights)],
            lr=0.1,
            ess=len(self.sign),
            prior=prior,
            hess_init=0.2,
            betas=(0.9, 0.99),
            rescale_lr=False,
            **hyper,
        )
        schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.01, steps)
        for _ in range(steps):
            with optimizer.sampled_params(train=True):
                self.loss().backward()
            optimizer.step()
            schedule.step()
        posterior = optimizer.posterior(nn.ParameterDict({"w": self.weights}))
        return posterior.mean["w"].mean(0) - self.center, posterior.precision["w"].mean(0)


def errors(found: tuple[Tensor, Tensor]) -> tuple[float, float]:
    """Of the mean, absolute; of the precision, relative."""
    wanted = GOLDEN["expected"]["diag_gaussian_vi"]
    mean, precision = found
    apart = (mean - torch.tensor(wanted["mean"])).abs().max().item()
    return apart, (precision * torch.tensor(wanted["var"]) - 1).abs().max().item()


CASES = [
    (torch.bfloat16, 20.0),
    pytest.param(torch.bfloat16, 0.0, marks=pytest.mark.slow),
    pytest.param(torch.float16, 100.0, marks=pytest.mark.slow),
]


class TestTheGoldenPosterior:
    @pytest.mark.parametrize(("dtype", "center"), CASES, ids=str)
    def test_is_reached(self, dtype, center):
        apart, off = errors(Golden(dtype, center).train(br.IVON))
        assert apart < 1e-2
        assert off < 0.05

    def test_is_reached_with_momentum_in_bfloat16(self):
        apart, off = errors(Golden(torch.bfloat16, 20.0).train(br.IVON, momentum_dtype=torch.bfloat16))
        assert apart < 1e-2
        assert off < 0.05

    @pytest.mark.parametrize(("dtype", "center"), CASES, ids=str)
    def test_is_missed_by_the_naive_cast(self, dtype, center, naive):
        apart, _ = errors(Golden(dtype, center).train(naive))
        assert apart > 1e-2

    @pytest.fixture
    def naive(self, monkeypatch: pytest.MonkeyPatch) -> Iterator[type[br.IVON]]:
        """The mean in the parameters alone, and samples rounded to the nearest."""

        class Naive(br.IVON):
            names = Names("hess", "momentum")

        monkeypatch.setattr(plots, "stochastic", lambda x, uniform, dtype: x.to(dtype).float())
        return Naive


def small(dtype: torch.dtype, **hyper: object) -> tuple[nn.Parameter, br.IVON]:
    w = nn.Parameter(torch.linspace(-2, 3, 700).to(dtype))
    return w, br.IVON([w], **{"lr": 1e-3, "ess": 100.0, "hess_init": 0.5, "compile": False, **hyper})


def go(w: nn.Parameter, optimizer: br.IVON, steps: int = 1) -> None:
    for _ in range(steps):
        with optimizer.sampled_params(train=True):
            (w.float() - 0.3).square().mean().mul(10).backward()
        optimizer.step()


@pytest.mark.parametrize("dtype", NARROW, ids=str)
class TestTheMean:
    def test_stands_in_the_state_and_rounded_in_the_parameter(self, dtype):
        w, optimizer = small(dtype)
        go(w, optimizer, 3)
        mean = optimizer.state[w]["mean"]
        assert mean.dtype == torch.float32
        assert torch.equal(mean.to(dtype), w) and not torch.equal(mean, w.float())

    @pytest.mark.parametrize("memory", ["default", "low"])
    def test_returns_from_a_draw(self, dtype, memory):
        w, optimizer = small(dtype, memory=memory)
        go(w, optimizer, 3)
        mean, held = optimizer.state[w]["mean"].clone(), w.detach().clone()
        for train in (True, False):
            with optimizer.sampled_params(train=train):
                assert (w != held).float().mean() > 0.5
            bound = 1e-6 if memory == "low" else 0.0
            torch.testing.assert_close(optimizer.state[w]["mean"], mean, rtol=bound, atol=bound)
            assert torch.equal(optimizer.state[w]["mean"].to(dtype), w)

    def test_moves_by_less_than_a_place_of_the_parameter(self, dtype):
        w, optimizer = small(dtype, lr=1e-4)
        go(w, optimizer)
        before = optimizer.state[w]["mean"].clone()
        go(w, optimizer)
        assert (optimizer.state[w]["mean"] != before).float().mean() > 0.5

    def test_follows_whoever_writes_into_the_parameter(self, dtype):
        w, optimizer = small(dtype, lr=0.0)
        go(w, optimizer)
        kept = optimizer.state[w]["mean"][1:].clone()
        w.data[0] = 9.0
        assert optimizer.posterior(nn.ParameterDict({"w": w})).mean["w"][0] == 9.0
        go(w, optimizer)
        assert optimizer.state[w]["mean"][0] == 9.0
        assert torch.equal(optimizer.state[w]["mean"][1:], kept)

    def test_is_saved_and_the_run_goes_on_bit_by_bit(self, dtype):
        w, optimizer = small(dtype, momentum_dtype=torch.bfloat16)
        go(w, optimizer, 3)
        saved = copy.deepcopy((w.detach(), optimizer.state_dict()))
        go(w, optimizer, 3)
        again, other = small(dtype, momentum_dtype=torch.bfloat16)
        with torch.no_grad():
            again.copy_(saved[0])
        other.load_state_dict(saved[1])
        go(again, other, 3)
        assert torch.equal(w, again)
        for name, value in optimizer.state[w].items():
            assert torch.equal(value, other.state[again][name]) and value.dtype == other.state[again][name].dtype, name

    def test_is_the_parameter_itself_where_a_state_is_loaded_for_more_bits(self, dtype):
        w, optimizer = small(dtype)
        go(w, optimizer)
        wide, other = small(torch.float32)
        other.load_state_dict(optimizer.state_dict())
        go(wide, other)
        assert "mean" not in other.state[wide]

    def test_is_the_same_in_large_tensors_cut_to_pieces(self, dtype):
        w = nn.Parameter(torch.linspace(-2, 3, 300_000).to(dtype))
        optimizer = br.IVON([w], lr=1e-3, ess=100.0, compile=False)
        go(w, optimizer, 2)
        assert torch.equal(optimizer.state[w]["mean"].to(dtype), w)
        assert not torch.equal(optimizer.state[w]["mean"], w.float())


class TestTheMomentum:
    def test_may_be_bfloat16(self):
        w, optimizer = small(torch.float32, momentum_dtype=torch.bfloat16)
        exact, other = small(torch.float32)
        go(w, optimizer, 20)
        go(exact, other, 20)
        found, wanted = optimizer.state[w]["momentum"], other.state[exact]["momentum"]
        assert found.dtype == torch.bfloat16
        torch.testing.assert_close(found.float(), wanted, rtol=0.03, atol=0.01 * wanted.abs().max().item())

    def test_of_some_parameters_alone_keeps_the_others(self):
        a, b = nn.Parameter(torch.ones(300)), nn.Parameter(torch.ones(300))
        optimizer = br.IVON([a, b], lr=0.1, ess=100.0, momentum_dtype=torch.bfloat16, compile=False)
        with optimizer.sampled_params(train=True):
            (a + b).square().mean().backward()
        optimizer.step()
        before = optimizer.state[b]["momentum"].clone()
        with optimizer.sampled_params(train=True):
            a.square().mean().backward()
        optimizer.step()
        assert torch.equal(optimizer.state[b]["momentum"], before)

    def test_changes_its_dtype_with_the_group(self):
        w, optimizer = small(torch.float32)
        go(w, optimizer, 2)
        optimizer.param_groups[0]["momentum_dtype"] = torch.bfloat16
        go(w, optimizer)
        assert optimizer.state[w]["momentum"].dtype == torch.bfloat16

    def test_takes_no_other_dtype(self):
        with pytest.raises(ValueError, match=r"momentum_dtype must be one of None, torch.bfloat16, got torch.float16"):
            small(torch.float32, momentum_dtype=torch.float16)


class TestVisibility:
    def test_is_the_fraction_with_a_spread_of_half_a_place(self):
        w = nn.Parameter(torch.tensor([0.01, 1.0, 100.0, 1000.0], dtype=torch.bfloat16))
        optimizer = br.IVON([("w", w)], lr=0.1, ess=1e4, hess_init=1.0, weight_decay=0.0)  # a spread of 0.01
        assert optimizer.noise_visibility() == {"w": 0.5}  # half places: 3e-5, 0.004, 0.25, 2
        assert optimizer.noise_visibility(torch.float32) == {"w": 1.0}

    def test_is_empty_where_nothing_is_drawn(self):
        assert br.SGD([nn.Parameter(torch.ones(2))], lr=0.1).noise_visibility() == {}

    def test_is_warned_about_once_by_name(self):
        w = nn.Parameter(torch.full((8,), 100.0, dtype=torch.bfloat16))
        optimizer = br.IVON([("body.weight", w)], lr=0.0, ess=1e4, compile=False)
        with pytest.warns(UserWarning, match=r"only 0% of the noise of 'body.weight' is above the rounding"):
            go(w, optimizer)
        go(w, optimizer, 100)  # a second warning would be an error
