"""The posterior: a Gaussian over named weights, in memory, in a model, in a file."""

import json
import math
import struct
from dataclasses import replace
from pathlib import Path

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from safetensors import safe_open
from safetensors.torch import save_file
from tests.instances import SMALL_IVON, Network, flat, state, train
from torch import Tensor, nn
from torch.distributions import Independent, Normal, kl_divergence

import bayesrule as br

SHAPES = {"a.weight": (3, 4), "a.bias": (4,), "scale": ()}
BLOCKS = ("mean", "precision", "prior_mean", "prior_precision")


def gaussian(seed: int = 0, dtype: torch.dtype = torch.float64, **about: object) -> br.Posterior:
    generator = torch.Generator().manual_seed(seed)

    def normals(shape: tuple[int, ...]) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)

    mean = {name: normals(shape) for name, shape in SHAPES.items()}
    precision = {name: normals(shape).exp() * 10 for name, shape in SHAPES.items()}
    return br.Posterior(mean, precision, **about)


def with_prior(seed: int = 0, dtype: torch.dtype = torch.float64) -> br.Posterior:
    post = gaussian(seed, dtype)
    prior_mean = {name: torch.zeros((), dtype=dtype) for name in post.mean}
    prior_precision = {name: torch.full_like(m, 0.5) for name, m in post.mean.items()}
    return br.Posterior(post.mean, post.precision, prior_mean, prior_precision, ess=50.0, num_data=40)


def torchs(post: br.Posterior) -> Independent:
    """The same distribution, by torch.distributions."""
    normal = Normal(flat(post.mean.values()), flat(post.precision.values()).rsqrt(), validate_args=True)
    return Independent(normal, 1)


def assert_identical(a: br.Posterior, b: br.Posterior) -> None:
    assert (a.ess, a.num_data, a.structure) == (b.ess, b.num_data, b.structure)
    for block in BLOCKS:
        one, two = getattr(a, block), getattr(b, block)
        assert (one is None) == (two is None)
        for name in one or {}:
            assert one[name].dtype == two[name].dtype
            assert torch.equal(one[name], two[name])
        assert set(one or {}) == set(two or {})


class Model(nn.Module):
    """Parameters by the names of SHAPES, and one more."""

    def __init__(self, dtype: torch.dtype = torch.float64) -> None:
        super().__init__()
        self.a = nn.Module()
        self.a.weight = nn.Parameter(torch.ones(3, 4, dtype=dtype))
        self.a.bias = nn.Parameter(torch.ones(4, dtype=dtype))
        self.scale = nn.Parameter(torch.tensor(2.0, dtype=dtype))
        self.spare = nn.Parameter(torch.full((2,), 7.0, dtype=dtype))


class TestFromOptimizer:
    def test_precision_is_ess_times_curvature_plus_decay_and_mean_the_weights(self):
        net = Network()
        optimizer = br.IVON(net.parameters(), **SMALL_IVON)
        train(net, optimizer, 5)
        post = br.Posterior.from_optimizer(optimizer, net, num_data=64)
        assert list(post.mean) == [name for name, _ in net.named_parameters()]
        assert torch.equal(flat(post.mean.values()), flat(net.parameters()))
        expected = 50.0 * (state(optimizer, "hess") + 0.01)
        torch.testing.assert_close(flat(post.precision.values()), expected, rtol=1e-14, atol=0)
        assert post.ess == 50.0
        assert post.num_data == 64
        assert post.structure == "diag"

    def test_its_samples_are_spread_as_the_optimizers_own(self):
        w = nn.Parameter(torch.zeros(20000))
        model = nn.Module()
        model.w = w
        optimizer = br.IVON(model.parameters(), lr=0.1, ess=50.0, hess_init=0.3, weight_decay=0.02)
        with optimizer.sampled_params(train=False):
            own = w.detach().clone()
        drawn = optimizer.posterior(model).sample(seed=0)["w"]
        assert drawn.std().item() == pytest.approx(own.std().item(), rel=0.03)


class TestGaussian:
    def test_variance_is_one_over_precision(self):
        post = gaussian()
        for name, variance in post.variance.items():
            torch.testing.assert_close(variance * post.precision[name], torch.ones_like(variance))

    def test_sample_is_the_same_for_the_same_seed_and_another_for_another(self):
        post = gaussian()
        torch.manual_seed(0)
        one = post.sample(seed=3)
        torch.manual_seed(1)
        two = post.sample(seed=3)
        assert all(torch.equal(one[name], two[name]) for name in SHAPES)
        assert all((one[name] != post.sample(seed=4)[name]).all() for name in SHAPES)
        assert {name: tuple(t.shape) for name, t in one.items()} == SHAPES

    @pytest.mark.parametrize("kind", [np.int64, np.uint16, torch.tensor], ids=["int64", "uint16", "tensor"])
    def test_seeds_and_draws_of_other_kinds_are_the_same_numbers(self, kind):
        post = gaussian()
        one, two = post.sample(5, draw=2), post.sample(kind(5), draw=kind(2))
        assert all(torch.equal(one[name], two[name]) for name in SHAPES)

    def test_draws_of_a_seed_differ_from_one_another_and_from_other_seeds_and_zero_is_the_first(self):
        post = gaussian()
        drawn = {(seed, draw): flat(post.sample(seed, draw).values()) for seed in range(4) for draw in range(4)}
        assert len({tuple(t.tolist()) for t in drawn.values()}) == 16
        assert torch.equal(drawn[3, 0], flat(post.sample(3).values()))

    @pytest.mark.parametrize("bad", [1.0, "1", None, True], ids=repr)
    def test_a_seed_or_draw_that_is_no_whole_number_is_refused(self, bad):
        with pytest.raises(ValueError, match=f"seed must be a whole number, got {bad!r}"):
            gaussian().sample(bad)
        with pytest.raises(ValueError, match=f"draw must be a whole number, got {bad!r}"):
            gaussian().sample(0, draw=bad)

    @pytest.mark.parametrize("shape", [(400, 400), (70, 2, 31, 31)], ids=str)
    def test_a_tensor_larger_than_a_bucket_is_drawn_as_one(self, shape):
        """In any memory format, with the spread that it should have; the noise of what comes behind stays the same."""
        mean = torch.arange(math.prod(shape), dtype=torch.float64).view(shape)
        for m in (mean, mean.transpose(0, 1).contiguous().transpose(0, 1)):
            drawn = br.Posterior(
                {"large": m, "w": torch.zeros(3).double()},
                {"large": torch.full(shape, 4.0).double(), "w": torch.ones(3).double()},
            ).sample(0)
            unit = 2 * (drawn["large"] - mean)
            assert unit.mean().abs() < 4.5 / math.sqrt(unit.numel())
            assert abs(unit.var() - 1) < 4.5 * math.sqrt(2 / unit.numel())
            ahead, behind = br.CounterNoise(0, stream=2).normal(br.Vector([mean, torch.zeros(3).double()]))
            torch.testing.assert_close(unit, ahead, rtol=0, atol=1e-9)
            torch.testing.assert_close(drawn["w"], behind, rtol=1e-12, atol=1e-12)

    @pytest.mark.slow
    def test_samples_have_the_mean_and_the_variance(self):
        post, count = gaussian(), 1500
        draws = torch.stack([flat(post.sample(seed).values()) for seed in range(count)])
        variance = flat(post.variance.values())
        z = (draws.mean(0) - flat(post.mean.values())) / (variance / count).sqrt()
        assert z.abs().max() < 4.5
        ratio = draws.var(0) / variance
        assert (ratio - 1).abs().max() < 4.5 * math.sqrt(2 / count)
        correlations = torch.corrcoef(draws.T).fill_diagonal_(0)
        assert correlations.abs().max() < 5 / math.sqrt(count)

    def test_matvec_is_the_covariance_and_sqrt_matvec_its_root_twice(self):
        post = gaussian()
        v = gaussian(seed=1).mean
        twice = post.sqrt_matvec(post.sqrt_matvec(v))
        for name, value in post.matvec(v).items():
            torch.testing.assert_close(value, v[name] * post.variance[name])
            torch.testing.assert_close(value, twice[name])

    def test_sample_is_the_mean_plus_sqrt_matvec_of_unit_normals(self):
        post = gaussian()
        unit = {name: (t - post.mean[name]) * post.precision[name].sqrt() for name, t in post.sample(seed=5).items()}
        zeros, ones = ({n: fill(s).double() for n, s in SHAPES.items()} for fill in (torch.zeros, torch.ones))
        for name, value in br.Posterior(zeros, ones).sample(seed=5).items():
            torch.testing.assert_close(unit[name], value, rtol=1e-9, atol=1e-9)

    @settings(derandomize=True, deadline=None, max_examples=25)
    @given(seed=st.integers(0, 10**6), other=st.integers(0, 10**6))
    def test_log_prob_and_kl_are_those_of_torch_distributions(self, seed, other):
        q, p = gaussian(seed), gaussian(other)
        theta = gaussian(seed + 1).mean
        expected = torchs(q).log_prob(flat(theta[name] for name in q.mean))
        torch.testing.assert_close(q.log_prob(theta), expected, rtol=1e-10, atol=1e-10)
        torch.testing.assert_close(q.kl(p), kl_divergence(torchs(q), torchs(p)), rtol=1e-10, atol=1e-10)
        assert q.kl(q).item() == pytest.approx(0, abs=1e-10)

    def test_kl_goes_by_name_not_by_order(self):
        q, p = gaussian(0), gaussian(1)
        turned = br.Posterior(dict(reversed(p.mean.items())), dict(reversed(p.precision.items())))
        torch.testing.assert_close(q.kl(turned), q.kl(p))

    @pytest.mark.parametrize(
        ("changes", "expected"),
        [
            ({}, None),
            ({"mean": {"w": torch.tensor([1.0, 2.0]), "b": torch.tensor([4.0])}}, math.inf),
            ({"precision": {"w": torch.tensor([4.0, math.inf]), "b": torch.tensor([1.0])}}, math.inf),
            ({"precision": {"w": torch.tensor([4.0, 2.0]), "b": torch.tensor([math.inf])}}, math.inf),
        ],
    )
    def test_weights_known_exactly_add_nothing_or_everything(self, changes, expected):
        known = {"w": torch.tensor([1.0, 2.0]), "b": torch.tensor([3.0])}
        exact = {"w": torch.tensor([4.0, math.inf]), "b": torch.tensor([math.inf])}
        q = br.Posterior(known, exact)
        apart = br.Posterior({"w": torch.tensor([1.5, 2.0]), "b": known["b"]}, exact)
        alone = [br.Posterior({"w": p.mean["w"][:1]}, {"w": p.precision["w"][:1]}) for p in (q, apart)]
        torch.testing.assert_close(q.kl(apart), alone[0].kl(alone[1]))
        torch.testing.assert_close(q.log_prob(apart.mean), alone[0].log_prob(alone[1].mean))
        other = replace(q, **changes)
        assert q.kl(other).item() == (0.0 if expected is None else expected)
        assert q.log_prob(other.mean).isfinite().item() == (other.mean["b"].item() == 3.0)

    def test_kl_between_different_names_is_refused(self):
        q = gaussian()
        fewer = br.Posterior(
            {"scale": q.mean["scale"], "x": q.mean["scale"]}, {"scale": q.precision["scale"], "x": torch.tensor(1.0)}
        )
        with pytest.raises(ValueError, match="disagree on the name"):
            q.kl(fewer)

    def test_rescale_is_a_power_of_the_density(self):
        post = with_prior()
        cold = post.rescale(ess=200.0)
        assert cold.ess == 200.0
        assert cold.num_data == 40
        theta, mode = gaussian(seed=1).mean, post.mean
        torch.testing.assert_close(cold.log_prob(theta) - cold.log_prob(mode), 4 * (post.log_prob(theta) - post.log_prob(mode)))
        for name in SHAPES:
            torch.testing.assert_close(cold.precision[name], 4 * post.precision[name])
            torch.testing.assert_close(cold.prior_precision[name], 4 * post.prior_precision[name])
            assert torch.equal(cold.mean[name], post.mean[name])

    def test_rescale_there_and_back_is_the_same(self):
        post = with_prior()
        back = post.rescale(ess=123.0).rescale(ess=50.0)
        torch.testing.assert_close(flat(back.precision.values()), flat(post.precision.values()))

    @pytest.mark.parametrize("ess", [0.0, -1.0, math.nan])
    def test_rescale_to_no_size_is_refused(self, ess):
        with pytest.raises(ValueError, match="ess must be a number > 0, got"):
            gaussian().rescale(ess=ess)

    def test_point_and_exact_draw_the_mean_bit_by_bit(self):
        model = Model()
        point = br.Posterior.point(model)
        assert set(point.mean) == {name for name, _ in model.named_parameters()}
        for certain in (point, gaussian().exact()):
            assert all(variance.eq(0).all() for variance in certain.variance.values())
            for name, value in certain.sample(seed=1).items():
                assert torch.equal(value, certain.mean[name])

    def test_point_does_not_follow_the_model(self):
        model = Model()
        point = br.Posterior.point(model)
        model.scale.data.fill_(9.0)
        assert point.mean["scale"] == 2.0

    def test_very_large_ess_draws_the_mean_up_to_rounding(self):
        post = gaussian(ess=1.0)
        for name, value in post.rescale(ess=1e24).sample(seed=0).items():
            torch.testing.assert_close(value, post.mean[name], rtol=0, atol=1e-11)

    def test_is_a_value(self):
        post = gaussian()
        with pytest.raises(AttributeError):
            post.ess = 3.0
        before = flat([*post.mean.values(), *post.precision.values()])
        post.sample(0), post.rescale(ess=3.0), post.exact(), post.kl(post), post.matvec(post.mean)
        assert torch.equal(flat([*post.mean.values(), *post.precision.values()]), before)


class TestChecks:
    @pytest.mark.parametrize("bad", [0.0, -3.1e-4, math.nan])
    def test_a_precision_that_is_not_positive_is_refused_with_its_name_and_count(self, bad):
        precision = {name: torch.ones(shape) for name, shape in SHAPES.items()}
        precision["a.weight"][1, :2] = bad
        mean = {name: torch.zeros(shape) for name, shape in SHAPES.items()}
        with pytest.raises(ValueError, match=r"posterior precision of 'a\.weight' has 2 non-positive entries \(min"):
            br.Posterior(mean, precision)

    @pytest.mark.parametrize("block", BLOCKS[1:])
    def test_names_that_do_not_agree_are_refused(self, block):
        blocks = {b: {name: torch.ones(shape) for name, shape in SHAPES.items()} for b in BLOCKS}
        del blocks[block]["a.bias"]
        with pytest.raises(ValueError, match=rf"{block} disagree on the name 'a\.bias'"):
            br.Posterior(**blocks)

    @pytest.mark.parametrize("block", BLOCKS[1:])
    def test_shapes_that_do_not_agree_are_refused(self, block):
        blocks = {b: {name: torch.ones(shape) for name, shape in SHAPES.items()} for b in BLOCKS}
        blocks[block]["a.bias"] = torch.ones(5)
        with pytest.raises(ValueError, match=rf"{block} of 'a\.bias' has shape \(5,\), the mean \(4,\)"):
            br.Posterior(**blocks)

    @pytest.mark.parametrize("ess", [0.0, -2.0, math.nan])
    def test_an_ess_that_is_no_size_is_refused(self, ess):
        with pytest.raises(ValueError, match="ess must be a number > 0, got"):
            gaussian(ess=ess)

    @pytest.mark.parametrize(
        ("bad", "says"),
        [(-1.0, "1 entries below 0 or NaN; 0 is a flat prior"), (math.nan, "1 entries below 0 or NaN")],
    )
    def test_a_prior_precision_that_is_negative_is_refused(self, bad, says):
        with pytest.raises(ValueError, match=f"posterior prior_precision of 'w' has {says}"):
            br.Posterior({"w": torch.zeros(2)}, {"w": torch.ones(2)}, prior_precision={"w": torch.tensor([1.0, bad])})

    @pytest.mark.parametrize("fine", [0.0, 1e-30, math.inf])
    def test_a_flat_prior_is_taken(self, fine):
        br.Posterior({"w": torch.zeros(2)}, {"w": torch.ones(2)}, prior_precision={"w": torch.tensor(fine)})

    @pytest.mark.parametrize("bad", [0, -5, 2.0, 2.5, math.nan, "8", True], ids=repr)
    def test_a_num_data_that_is_no_number_of_examples_is_refused(self, bad):
        with pytest.raises(ValueError, match=rf"num_data must be a whole number >= 1, got {bad!r}; None where it is not known"):
            gaussian(num_data=bad)

    @pytest.mark.parametrize("given", [np.int64(40), torch.tensor(40), 40], ids=repr)
    def test_a_num_data_of_another_kind_is_a_number_that_a_file_can_hold(self, given, tmp_path):
        post = gaussian(num_data=given)
        assert type(post.num_data) is int
        post.save(tmp_path / "p.safetensors")
        assert br.Posterior.load(tmp_path / "p.safetensors").num_data == 40


class TestBind:
    def test_gives_the_models_own_parameters_by_name(self):
        model = Model()
        bound = gaussian().bind(model)
        assert list(bound) == list(SHAPES)
        assert bound["a.weight"] is model.a.weight

    def test_a_name_the_model_lacks_is_named(self):
        post = br.Posterior({"b.weight": torch.zeros(2)}, {"b.weight": torch.ones(2)})
        with pytest.raises(KeyError, match=r"posterior holds 'b\.weight' and the model has no parameter of that name"):
            post.bind(Model())

    def test_a_prefix_too_many_is_recognized_and_its_cure_works(self, tmp_path):
        post = gaussian()
        wrapped = br.Posterior(
            {f"module.{n}": m for n, m in post.mean.items()}, {f"module.{n}": s for n, s in post.precision.items()}
        )
        with pytest.raises(KeyError, match=r"but the model has 'a\.weight'; pass strip_prefix='module\.' to load\(\)"):
            wrapped.bind(Model())
        wrapped.save(tmp_path / "p.safetensors")
        assert_identical(br.Posterior.load(tmp_path / "p.safetensors", strip_prefix="module."), post)

    @pytest.mark.parametrize(
        ("strip", "expected"),
        [
            ("module.", "model.x"),
            ("module", "model.x"),
            ("mod", "module.model.x"),
            ("module.mod", "module.model.x"),
            ("module.model", "x"),
            ("module.model.", "x"),
            ("module.model.x", "module.model.x"),
            ("model", "module.model.x"),
            ("", "module.model.x"),
            (".", "module.model.x"),
        ],
    )
    def test_strip_prefix_takes_whole_parts_of_names_only(self, strip, expected, tmp_path):
        one = {"module.model.x": torch.ones(2)}
        br.Posterior(one, one, one, one).save(tmp_path / "p.safetensors")
        loaded = br.Posterior.load(tmp_path / "p.safetensors", strip_prefix=strip)
        assert [list(getattr(loaded, block)) for block in BLOCKS] == [[expected]] * 4

    def test_strip_prefix_that_makes_two_names_one_is_refused(self, tmp_path):
        two = {"module.x": torch.ones(2), "x": torch.ones(2)}
        br.Posterior(two, two).save(tmp_path / "p.safetensors")
        with pytest.raises(ValueError, match=r"p\.safetensors' holds 'x' twice without 'module\.'; take no strip_prefix"):
            br.Posterior.load(tmp_path / "p.safetensors", strip_prefix="module")

    def test_a_shape_the_model_does_not_have_is_named(self):
        post = br.Posterior({"a.bias": torch.zeros(9)}, {"a.bias": torch.ones(9)})
        with pytest.raises(ValueError, match=r"posterior of 'a\.bias' has shape \(9,\), the model \(4,\)"):
            post.bind(Model())


class TestSampled:
    def test_puts_the_draw_of_the_seed_into_the_model_and_brings_back_what_was_there(self):
        model, post = Model(), gaussian()
        before = flat(model.parameters())
        places = [p.data_ptr() for p in model.parameters()]
        with br.sampled(model, post, seed=4) as inside:
            assert inside is model
            for name, value in post.sample(4).items():
                assert torch.equal(model.get_parameter(name), value)
            assert (model.spare == 7).all()
        assert torch.equal(flat(model.parameters()), before)
        assert [p.data_ptr() for p in model.parameters()] == places

    def test_takes_the_number_of_a_draw(self):
        model, post = Model(), gaussian()
        with br.sampled(model, post, 4, draw=2):
            for name, value in post.sample(4, draw=2).items():
                assert torch.equal(model.get_parameter(name), value)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
    @pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
    def test_brings_back_what_was_there_after_an_exception_bit_by_bit(self, error, dtype):
        model = Model(dtype)
        before = [p.detach().clone() for p in model.parameters()]
        with pytest.raises(error), br.sampled(model, gaussian(), seed=0):
            raise error
        for p, old in zip(model.parameters(), before, strict=True):
            assert torch.equal(p.view(torch.uint8) if p.dim() else p, old.view(torch.uint8) if old.dim() else old)

    def test_leaves_gradients_and_modes_alone(self):
        model = Model()
        model.scale.square().backward()
        gradient = model.scale.grad.clone()
        with br.sampled(model, gaussian(), seed=0):
            assert model.training
            assert model.scale.requires_grad
        assert torch.equal(model.scale.grad, gradient)

    def test_gradients_can_be_taken_inside(self):
        model = Model()
        with br.sampled(model, gaussian(), seed=0):
            drawn = model.scale.item()
            model.scale.square().backward()
        assert model.scale.grad.item() == pytest.approx(2 * drawn)

    def test_a_posterior_that_does_not_fit_changes_nothing(self):
        model = Model()
        before = flat(model.parameters())
        mean = {**gaussian().mean, "nobody": torch.zeros(2)}
        post = br.Posterior(mean, {name: torch.ones_like(m) for name, m in mean.items()})
        with pytest.raises(KeyError, match="nobody"), br.sampled(model, post, seed=0):
            pytest.fail("the context opened")
        assert torch.equal(flat(model.parameters()), before)


class TestFiles:
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
    @pytest.mark.parametrize("make", [gaussian, with_prior], ids=["plain", "prior"])
    def test_round_trip_is_bit_equal(self, make, dtype, tmp_path):
        post = make(dtype=dtype)
        post.save(tmp_path / "p.safetensors")
        assert_identical(br.Posterior.load(tmp_path / "p.safetensors"), post)

    def test_round_trip_of_what_was_learned(self, tmp_path):
        net = Network(torch.float32)
        optimizer = br.IVON(net.parameters(), **SMALL_IVON)
        train(net, optimizer, 3)
        post = optimizer.posterior(net, num_data=64)
        post.save(str(tmp_path / "p.safetensors"))
        loaded = br.Posterior.load(str(tmp_path / "p.safetensors"))
        assert_identical(loaded, post)
        drawn, again = post.sample(3), loaded.sample(3)
        assert all(torch.equal(drawn[name], again[name]) for name in post.mean)

    def test_the_order_of_names_survives(self, tmp_path):
        """The noise of a draw, and a prior for parameters without names, go by it."""
        gaussian().save(tmp_path / "p.safetensors")
        assert list(br.Posterior.load(tmp_path / "p.safetensors").mean) == list(SHAPES)

    def test_what_was_loaded_is_the_prior_of_the_parameters_that_it_was_learned_from(self, tmp_path):
        """Parameters of one shape, not in the order of the alphabet, and no names to go by."""
        norm = nn.LayerNorm(3)
        post = br.IVON(norm.parameters(), lr=0.1, ess=10.0).posterior(norm)
        post.save(tmp_path / "p.safetensors")
        prior = br.Posterior.load(tmp_path / "p.safetensors")
        optimizer = br.IVON(norm.parameters(), lr=0.1, ess=10.0, prior=prior)
        assert (optimizer.posterior(norm).prior_mean["weight"] == 1).all()
        assert (optimizer.posterior(norm).prior_mean["bias"] == 0).all()

    def test_round_trip_of_views_infinities_and_turned_tensors(self, tmp_path):
        whole = torch.randn(8, 6, generator=torch.Generator().manual_seed(0)).abs() + 1
        mean = {"view": whole[:4], "turned": whole.T, "same": whole[:4]}
        precision = {"view": whole[4:], "turned": whole.T, "same": torch.full((4, 6), math.inf)}
        post = br.Posterior(mean, precision, ess=math.inf)
        post.save(tmp_path / "p.safetensors")
        assert_identical(br.Posterior.load(tmp_path / "p.safetensors"), post)

    def test_is_safetensors_with_json_metadata_and_names_that_others_can_read(self, tmp_path):
        with_prior().save(tmp_path / "p.safetensors")
        with safe_open(tmp_path / "p.safetensors", framework="pt") as file:
            about = json.loads(file.metadata()["bayesrule"])
            keys = set(file.keys())
        assert about.pop("names") == list(SHAPES)
        assert about == dict(format="bayesrule-posterior", version=1, structure="diag", ess=50.0, num_data=40)
        assert keys == {f"{block}.{name}" for block in BLOCKS for name in SHAPES}

    def test_saving_replaces_an_older_file_and_leaves_no_litter(self, tmp_path):
        path = tmp_path / "p.safetensors"
        gaussian(0).save(path)
        gaussian(1).save(path)
        assert_identical(br.Posterior.load(path), gaussian(1))
        assert [p.name for p in tmp_path.iterdir()] == ["p.safetensors"]

    def test_a_save_that_fails_leaves_the_old_file_and_no_litter(self, tmp_path):
        path = tmp_path / "p.safetensors"
        gaussian(0).save(path)
        before = path.read_bytes()
        with pytest.raises(TypeError):
            gaussian(1, ess=torch.tensor(2.0)).save(path)  # no JSON
        assert path.read_bytes() == before
        assert [p.name for p in tmp_path.iterdir()] == ["p.safetensors"]

    def test_a_save_onto_a_folder_fails_and_leaves_no_litter(self, tmp_path):
        (tmp_path / "folder").mkdir()
        with pytest.raises(OSError, match="folder"):
            gaussian().save(tmp_path / "folder")
        assert [p.name for p in tmp_path.iterdir()] == ["folder"]

    def test_a_save_into_no_folder_names_the_path(self, tmp_path):
        with pytest.raises(FileNotFoundError, match="nowhere"):
            gaussian().save(tmp_path / "nowhere" / "p.safetensors")

    def test_a_saved_file_may_be_read_by_whom_the_umask_allows(self, tmp_path):
        """As any other file that is written: the run folder is handed round."""
        gaussian().save(tmp_path / "p.safetensors")
        (tmp_path / "plain").write_bytes(b"")
        mode = (tmp_path / "p.safetensors").stat().st_mode
        assert mode == (tmp_path / "plain").stat().st_mode


# Files that must fail: what is written, what is raised, what the message says beside the file's name or the tensor's


ABOUT = dict(format="bayesrule-posterior", version=1, structure="diag", ess=1.0, num_data=None)


def good(path: Path) -> bytes:
    gaussian().save(path)
    return path.read_bytes()


def cut(where: float):
    """The first part of a good file."""
    return lambda path: path.write_bytes((data := good(path))[: int(len(data) * where)])


def header_length(length: int):
    """A good file whose first eight bytes say that the header is that long."""
    return lambda path: path.write_bytes(struct.pack("<Q", length) + good(path)[8:])


def flipped(path: Path) -> None:
    data = bytearray(good(path))
    data[0] ^= 0xFF
    path.write_bytes(data)


def garbled_header(path: Path) -> None:
    data = bytearray(good(path))
    data[8:40] = b"\x00" * 32
    path.write_bytes(data)


def pickled(path: Path) -> None:
    torch.save({"mean": torch.zeros(2)}, path)


def tensors(blocks: dict[str, dict[str, Tensor]], metadata: dict | str | None = None, **about: object):
    """A valid safetensors file with these blocks; what is said about it, or exactly this metadata."""

    def write(path: Path) -> None:
        text = metadata if isinstance(metadata, str) else json.dumps(metadata or {**ABOUT, **about})
        flat_names = {f"{block}.{name}": t for block, named in blocks.items() for name, t in named.items()}
        save_file(flat_names, path, {"bayesrule": text})

    return write


def foreign(path: Path) -> None:
    save_file({"weight": torch.zeros(2)}, path)


def foreign_with_metadata(path: Path) -> None:
    save_file({"weight": torch.zeros(2)}, path, {"format": "pt"})


def blocks(**changes: dict[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    return {"mean": {"w": torch.zeros(2)}, "precision": {"w": torch.ones(2)}, **changes}


HOSTILE = {
    "empty": (lambda path: path.write_bytes(b""), ValueError, "damaged"),
    "text": (lambda path: path.write_text("name,value\n1,2\n"), ValueError, "damaged"),
    "json": (lambda path: path.write_text(json.dumps(ABOUT)), ValueError, "damaged"),
    "zeros": (lambda path: path.write_bytes(b"\0" * 4096), ValueError, "damaged"),
    "pickle": (pickled, ValueError, "damaged"),
    "cut in the header's length": (lambda path: path.write_bytes(good(path)[:5]), ValueError, "damaged"),
    "cut in the header": (cut(0.2), ValueError, "damaged"),
    "cut in the tensors": (cut(0.9), ValueError, "damaged"),
    "cut by one byte": (lambda path: path.write_bytes(good(path)[:-1]), ValueError, "damaged"),
    "too long": (lambda path: path.write_bytes(good(path) + b"more"), ValueError, "damaged"),
    "header length flipped": (flipped, ValueError, "damaged"),
    "header length zero": (header_length(0), ValueError, "damaged"),
    "header length huge": (header_length(2**63), ValueError, "damaged"),
    "header garbled": (garbled_header, ValueError, "damaged"),
    "another safetensors file": (foreign, ValueError, "no posterior file"),
    "a model's safetensors file": (foreign_with_metadata, ValueError, "no posterior file"),
    "metadata no json": (tensors(blocks(), "{"), ValueError, "no posterior file"),
    "metadata a list": (tensors(blocks(), "[1, 2]"), ValueError, "no posterior file"),
    "metadata another format": (tensors(blocks(), format="other"), ValueError, "no posterior file"),
    "ess null": (tensors(blocks(), ABOUT | {"ess": None}), ValueError, "ess"),
    "ess in quotes": (tensors(blocks(), ess="50"), ValueError, "ess"),
    "ess negative": (tensors(blocks(), ess=-1.0), ValueError, "ess"),
    "version 99": (tensors(blocks(), version=99), ValueError, "version 99"),
    "version no number": (tensors(blocks(), version="new"), ValueError, "version"),
    "structure unknown": (tensors(blocks(), structure="kron"), ValueError, "kron"),
    "temperature in quotes": (tensors(blocks(), temperature="2"), ValueError, "temperature"),
    "temperature zero": (tensors(blocks(), temperature=0.0), ValueError, "temperature must be a number > 0, got 0.0"),
    "noise one number": (tensors(blocks(), noise_variance=2.0), ValueError, "noise_variance"),
    "noise null in a list": (tensors(blocks(), noise_variance=[1.0, None]), ValueError, "noise_variance"),
    "noise negative": (tensors(blocks(), noise_variance=[1.0, -2.0]), ValueError, "noise_variance must be a tuple of numbers > 0"),
    "no tensors": (tensors({}), ValueError, "mean|empty|no posterior file"),
    "precision missing": (tensors(blocks(precision={})), ValueError, "precision"),
    "mean missing": (tensors(blocks(mean={})), ValueError, "mean"),
    "a block unknown": (tensors(blocks(other={"w": torch.ones(2)})), ValueError, "other.w"),
    "shapes differ": (tensors(blocks(precision={"w": torch.ones(3)})), ValueError, r"'w' has shape \(3,\)"),
    "names differ": (tensors(blocks(precision={"v": torch.ones(2)})), ValueError, "'v'"),
    "precision negative": (tensors(blocks(precision={"w": torch.tensor([1.0, -2.0])})), ValueError, "'w' has 1 non-pos"),
    "precision zero": (tensors(blocks(precision={"w": torch.zeros(2)})), ValueError, "'w' has 2 non-positive"),
    "prior negative": (tensors(blocks(prior_precision={"w": torch.tensor([1.0, -2.0])})), ValueError, "'w' has 1 entries"),
    "num_data negative": (tensors(blocks(), num_data=-3), ValueError, "num_data must be a whole number >= 1, got -3"),
    "precision nan": (tensors(blocks(precision={"w": torch.tensor([1.0, math.nan])})), ValueError, "'w' has 1 non-pos"),
    "mean nan": (tensors(blocks(mean={"w": torch.tensor([1.0, math.nan])})), ValueError, "'w'"),
    "a folder": (lambda path: path.mkdir(), FileNotFoundError, "no posterior file"),
    "no such file": (lambda path: None, FileNotFoundError, "no posterior file"),
}


@pytest.mark.parametrize("kind", HOSTILE)
def test_a_hostile_file_is_refused_in_one_line_that_names_it_or_its_tensor(kind, tmp_path):
    write, error, says = HOSTILE[kind]
    path = tmp_path / "hostile.safetensors"
    write(path)
    with pytest.raises(error, match=says) as caught:
        br.Posterior.load(path)
    message = str(caught.value)
    assert "\n" not in message
    assert "hostile.safetensors" in message or "'w'" in message or "'v'" in message or "ess" in message


def test_a_good_file_of_the_same_making_is_taken(tmp_path):
    """So the table above fails for the reason that it gives."""
    tensors(blocks())(tmp_path / "fine.safetensors")
    loaded = br.Posterior.load(tmp_path / "fine.safetensors")
    assert torch.equal(loaded.mean["w"], torch.zeros(2))
    assert torch.equal(loaded.precision["w"], torch.ones(2))


def test_a_posterior_of_another_model_is_refused_when_it_meets_the_model(tmp_path):
    gaussian().save(tmp_path / "p.safetensors")
    loaded = br.Posterior.load(tmp_path / "p.safetensors")
    with pytest.raises(KeyError, match=r"posterior holds 'a\."), br.sampled(nn.Linear(2, 2), loaded, seed=0):
        pytest.fail("the context opened")
    with pytest.raises(KeyError, match=r"posterior holds 'a\."):
        br.predict(nn.Linear(2, 2).eval(), loaded, torch.zeros(1, 2))


def test_loading_never_unpickles(tmp_path):
    """A pickle that would leave a trace."""
    trace = tmp_path / "trace"

    class Trap:
        def __reduce__(self):
            return Path.touch, (trace,)

    torch.save(Trap(), tmp_path / "trap.safetensors")
    with pytest.raises(ValueError, match="damaged"):
        br.Posterior.load(tmp_path / "trap.safetensors")
    assert not trace.exists()


@pytest.mark.parametrize("structure", ["diag", "kron", "full"])
def test_autocast_around_draws_and_products_changes_none(structure):
    torch.manual_seed(0)
    model, x, y = nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3)), torch.randn(16, 5), torch.randint(3, (16,))
    post = br.Posterior.laplace(model, [(x, y)], structure=structure)
    v = {name: torch.ones_like(m) for name, m in post.mean.items()}

    def found() -> list[Tensor]:
        vectors = [post.sample(0), post.matvec(v), post.sqrt_matvec(v), post.variance]
        return [t for named in vectors for t in named.values()] + [post.log_prob(v), post.kl(post.rescale(ess=8.0))]

    outside = found()
    with torch.autocast("cpu", torch.bfloat16):
        assert all(map(torch.equal, found(), outside))
