"""The parameters that are drawn and their state: frozen or without a gradient, resumed, in groups, of any dtype and layout."""

import contextlib
import copy
import io
import math
import pickle

import pytest
import torch
from tests.instances import ALGORITHMS, SMALL_IVON, Network, flat, named, train
from tests.optimizers.problems import APPROXIMATIONS, as_row, assert_equal_states, pair, pair64, same
from torch import Tensor, nn

import bayesrule as br


class TestLeftAlone:
    """Faults 1 and 4: parameters without a gradient, and frozen ones."""

    def test_a_parameter_without_gradient_is_untouched(self):
        problem, optimizer = pair64()
        bias = problem.outer.bias
        mean = bias.detach().clone()
        for _ in range(2):
            with optimizer.sampled_params(train=True):
                (problem(problem.x).sum() * 0 + problem.inner.weight.square().sum()).backward()
                bias.grad = None
            optimizer.step()
        assert torch.equal(bias, mean)
        assert (optimizer.state[bias]["hess"] == 0.5).all()
        assert optimizer.state[bias]["step"].item() == 0
        assert optimizer.state[problem.inner.weight]["step"].item() == 2

    def test_a_parameter_that_joins_late_is_debiased_from_its_own_first_step(self):
        w, late = (nn.Parameter(torch.zeros(2, dtype=torch.float64)) for _ in range(2))
        optimizer = br.IVON([w, late], lr=0.1, ess=math.inf, weight_decay=0.0, hess_init=1.0)
        for step in range(5):
            with optimizer.sampled_params(train=True):
                w.grad = torch.ones_like(w)
                late.grad = torch.ones_like(late) if step == 4 else None
            optimizer.step()
        torch.testing.assert_close(late.detach(), torch.full_like(late, -0.1))
        torch.testing.assert_close(w.detach(), torch.full_like(w, -0.5))

    def test_a_frozen_parameter_is_neither_perturbed_nor_decayed(self):
        problem = Network()
        problem.inner.requires_grad_(False)
        optimizer = br.IVON(problem.parameters(), **SMALL_IVON)
        inner = flat(problem.inner.parameters())
        for step in range(3):
            with optimizer.sampled_params(train=True):
                assert torch.equal(flat(problem.inner.parameters()), inner)
                problem.loss(step).backward()
            optimizer.step()
        with optimizer.sampled_params(train=False):
            assert torch.equal(flat(problem.inner.parameters()), inner)
        assert torch.equal(flat(problem.inner.parameters()), inner)

    def test_freezing_and_thawing_midway_works(self):
        problem, optimizer = pair64()
        train(problem, optimizer, 2)
        problem.inner.requires_grad_(False)
        inner, hess = flat(problem.inner.parameters()), optimizer.state[problem.inner.weight]["hess"].clone()
        train(problem, optimizer, [2, 3])
        assert torch.equal(flat(problem.inner.parameters()), inner)
        assert torch.equal(optimizer.state[problem.inner.weight]["hess"], hess)
        problem.inner.requires_grad_(True)
        train(problem, optimizer, [4])
        assert (flat(problem.inner.parameters()) != inner).all()
        assert optimizer.state[problem.inner.weight]["step"].item() == 3
        assert optimizer.state[problem.outer.weight]["step"].item() == 5

    @pytest.mark.parametrize("draws", [1, 2, 3])
    @pytest.mark.parametrize("approximation", APPROXIMATIONS)
    def test_parameters_of_different_age_do_not_mix(self, approximation, draws):
        """In one group, where they are worked on together, as in groups of their own."""

        def run(groups: bool) -> Tensor:
            problem = Network()
            params = [{"params": [p]} for p in problem.parameters()] if groups else problem.parameters()
            optimizer = br.IVON(params, **SMALL_IVON, **approximation)
            for step in range(8):
                for number in range(draws):
                    with optimizer.sampled_params(train=True):
                        if step % 3 == 1 or (step == 5 and number == 0):
                            problem.outer(torch.ones(7, dtype=torch.float64)).square().sum().backward()
                        else:
                            problem.loss(step).backward()
                optimizer.step()
            assert optimizer.state[problem.inner.bias]["step"].item() < optimizer.state[problem.outer.bias]["step"].item()
            return as_row(optimizer, problem)

        same(run(groups=False), run(groups=True))

    def test_the_noise_of_the_others_is_the_same_with_one_frozen(self):
        problem, optimizer = pair64()
        other, plain = pair64()
        problem.inner.weight.requires_grad_(False)
        with optimizer.sampled_params(train=False), plain.sampled_params(train=False):
            assert torch.equal(problem.outer.weight, other.outer.weight)


class TestSparse:
    def test_sparse_gradients_are_refused_in_words_and_move_nothing(self):
        """Fault 18: a missing reshape deep inside."""
        first, table = nn.Parameter(torch.ones(3)), nn.Embedding(5, 3, sparse=True)
        optimizer = br.IVON([first, *table.parameters()], lr=0.1, ess=10.0)
        before = flat([first, table.weight])
        with optimizer.sampled_params(train=True):
            (table(torch.tensor([1, 3])) * first).sum().backward()
        with pytest.raises((RuntimeError, TypeError, ValueError), match="sparse gradients"):
            optimizer.step()
        assert torch.equal(flat([first, table.weight]), before)
        with contextlib.suppress(RuntimeError, TypeError, ValueError):
            for _ in range(2):
                with optimizer.sampled_params(train=True):
                    (table(torch.tensor([1, 3])) * first).sum().backward()
            optimizer.step()
            pytest.fail("two draws with sparse gradients were taken")
        assert torch.equal(flat([first, table.weight]), before)


class TestResume:
    """Fault 5: the step count and every switch were lost; the first step after a resume was 8.9 times too long."""

    @pytest.mark.parametrize("algorithm", ALGORITHMS, ids=named)
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
    def test_save_load_continue_is_bit_equal_to_no_interruption(self, algorithm, dtype):
        straight = Network(dtype)
        train(straight, algorithm(straight.parameters()), 12)
        first = Network(dtype)
        optimizer = algorithm(first.parameters())
        train(first, optimizer, 5)
        file = io.BytesIO()
        torch.save((first.state_dict(), optimizer.state_dict()), file)
        file.seek(0)
        weights, saved = torch.load(file, weights_only=True)
        second = Network(dtype)
        second.load_state_dict(weights)
        resumed = algorithm(second.parameters())
        resumed.load_state_dict(saved)
        train(second, resumed, range(5, 12))
        assert torch.equal(flat(second.parameters()), flat(straight.parameters()))

    def test_every_switch_and_the_seed_are_saved(self):
        problem, optimizer = pair64(
            hess_approx="gradsq", gradsq_scale=3.0, debias=False, rescale_lr=False, clip_radius=0.2, seed=7, mc_samples=2
        )
        train(problem, optimizer, 2)
        other = Network()
        plain = br.IVON(other.parameters(), lr=9.0, ess=9.0)
        other.load_state_dict(problem.state_dict())
        plain.load_state_dict(optimizer.state_dict())
        train(problem, optimizer, [2, 3])
        train(other, plain, [2, 3])
        assert torch.equal(as_row(optimizer, problem), as_row(plain, other))

    def test_float32_state_of_bfloat16_weights_is_not_rounded_by_loading(self):
        """Fault 16: state in the weights' dtype; torch's own loading casts it so."""
        w = nn.Parameter(torch.ones(50, dtype=torch.bfloat16))
        optimizer = br.IVON([w], lr=0.1, ess=100.0)
        for _ in range(3):
            with optimizer.sampled_params(train=True):
                w.square().sum().backward()
            optimizer.step()
        v = nn.Parameter(w.detach().clone())
        other = br.IVON([v], lr=0.1, ess=100.0)
        other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
        for name in ("hess", "momentum"):
            assert other.state[v][name].dtype == torch.float32
            assert torch.equal(other.state[v][name], optimizer.state[w][name])

    def test_loading_shares_no_memory_with_what_was_loaded(self):
        problem, optimizer = pair64()
        train(problem, optimizer, 2)
        saved = optimizer.state_dict()
        before = copy.deepcopy(saved)
        other, second = pair64()
        second.load_state_dict(saved)
        train(other, second, [2, 3])
        assert_equal_states(saved, before)

    def test_loading_over_a_used_optimizer_takes_the_loaded_state(self):
        problem, optimizer = pair64()
        train(problem, optimizer, 3)
        other, second = pair64(seed=5)
        train(other, second, 8)
        second.load_state_dict(optimizer.state_dict())
        other.load_state_dict(problem.state_dict())
        with second.sampled_params(train=False):
            pass
        train(problem, optimizer, [3, 4])
        train(other, second, [3, 4])
        assert torch.equal(as_row(optimizer, problem), as_row(second, other))

    def test_deepcopy_of_model_and_optimizer_continues_alike_and_apart(self):
        problem, optimizer = pair64(mc_samples=2)
        train(problem, optimizer, 3)
        before = as_row(optimizer, problem)
        twin, second = copy.deepcopy((problem, optimizer))
        train(twin, second, [3, 4])
        assert torch.equal(as_row(optimizer, problem), before)
        train(problem, optimizer, [3, 4])
        assert torch.equal(as_row(optimizer, problem), as_row(second, twin))

    def test_pickle_of_model_and_optimizer_continues_alike(self):
        model = nn.Linear(3, 2, dtype=torch.float64)
        optimizer = br.IVON(model.parameters(), **SMALL_IVON)

        def step(model: nn.Module, optimizer: br.IVON) -> Tensor:
            with optimizer.sampled_params(train=True):
                model(torch.ones(1, 3, dtype=torch.float64)).square().sum().backward()
            optimizer.step()
            return flat(model.parameters())

        step(model, optimizer)
        twin, second = pickle.loads(pickle.dumps((model, optimizer)))
        assert torch.equal(step(twin, second), step(model, optimizer))


class TestState:
    """Fault 6: state lay flat in param_groups."""

    def test_is_per_parameter_and_groups_hold_no_tensors(self):
        problem, optimizer = pair64()
        train(problem, optimizer, 2)
        assert set(optimizer.state) == set(problem.parameters())
        for p in problem.parameters():
            for name in ("momentum", "hess"):
                assert optimizer.state[p][name].shape == p.shape
        for group in optimizer.param_groups:
            assert not any(isinstance(value, Tensor) for key, value in group.items() if key != "params")

    def test_a_state_tensor_that_someone_replaces_is_used(self):
        problem, optimizer = pair64()
        train(problem, optimizer, 2)
        p = problem.inner.bias
        optimizer.state[p]["hess"] = torch.full_like(p, 1e6, requires_grad=False)
        mean = p.detach().clone()
        with optimizer.sampled_params(train=False):
            assert (p - mean).abs().max() < 1e-2

    def test_a_state_tensor_that_someone_writes_into_is_used(self):
        problem, optimizer = pair64()
        train(problem, optimizer, 2)
        p = problem.inner.bias
        optimizer.state[p]["hess"].fill_(1e6)
        mean = p.detach().clone()
        with optimizer.sampled_params(train=False):
            assert (p - mean).abs().max() < 1e-2


class TestGroups:
    """Fault 7: add_param_group raised a KeyError."""

    def test_a_group_added_later_is_drawn_and_trained(self):
        problem = Network()
        optimizer = br.IVON(problem.inner.parameters(), **SMALL_IVON)
        train(problem, optimizer, 3)
        optimizer.add_param_group({"params": list(problem.outer.parameters()), "lr": 0.05, "hess_init": 2.0})
        optimizer.zero_grad()
        before = flat(problem.outer.parameters())
        with optimizer.sampled_params(train=True):
            assert (flat(problem.outer.parameters()) != before).all()
            problem.loss(3).backward()
        optimizer.step()
        assert (flat(problem.outer.parameters()) != before).all()
        assert optimizer.state[problem.outer.weight]["step"].item() == 1
        assert optimizer.state[problem.inner.weight]["step"].item() == 4
        assert optimizer.param_groups[1]["ess"] == SMALL_IVON["ess"]

    def test_a_group_added_between_a_look_and_a_draw_is_drawn(self):
        problem = Network()
        optimizer = br.IVON(problem.inner.parameters(), **SMALL_IVON)
        with optimizer.sampled_params(train=False):
            pass
        optimizer.add_param_group({"params": list(problem.outer.parameters())})
        before = flat(problem.outer.parameters())
        with optimizer.sampled_params(train=False):
            assert (flat(problem.outer.parameters()) != before).all()
        assert torch.equal(flat(problem.outer.parameters()), before)

    def test_hyper_parameters_changed_between_a_look_and_a_step_are_used(self):
        problem, optimizer = pair64()
        other, plain = pair64()
        with optimizer.sampled_params(train=False):
            pass
        for changed in (optimizer, plain):
            changed.param_groups[0].update(betas=(0.5, 0.9), clip_radius=0.01, lr=0.2)
        train(problem, optimizer, 1)
        train(other, plain, 1)
        assert torch.equal(as_row(optimizer, problem), as_row(plain, other))


class TestPlaces:
    """Faults 8, 9 and 16: dtypes, and where the weights lie."""

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
    def test_state_is_float32_or_wider(self, dtype):
        w = nn.Parameter(torch.ones(5, dtype=dtype))
        optimizer = br.IVON([w], lr=0.1, ess=10.0)
        with optimizer.sampled_params(train=True):
            w.square().sum().backward()
        optimizer.step()
        wide = torch.promote_types(dtype, torch.float32)
        assert {optimizer.state[w][name].dtype for name in ("hess", "momentum")} == {wide}
        assert w.dtype == dtype

    def test_small_steps_of_the_curvature_do_not_vanish_beside_bfloat16_weights(self):
        w = nn.Parameter(torch.ones(50, dtype=torch.bfloat16))
        optimizer = br.IVON([w], lr=0.0, ess=100.0, betas=(0.9, 0.99999))
        with optimizer.sampled_params(train=True):
            w.square().sum().backward()
        optimizer.step()
        assert (optimizer.state[w]["hess"] != 1.0).all()

    def test_several_dtypes_share_an_optimizer_and_each_goes_its_own_way(self):
        dtypes = [torch.bfloat16, torch.float32, torch.float64, torch.float32]  # the first is rounded by the same noise if alone
        weights = [nn.Parameter(torch.linspace(-1, 1, 5 + i).to(dtype)) for i, dtype in enumerate(dtypes)]
        weights.append(nn.Parameter(torch.tensor(0.5)))
        normals = {w: torch.linspace(-2, 1, w.numel()).reshape(w.shape).to(w.dtype) for w in weights}
        together = br.IVON(weights, **SMALL_IVON, noise=lambda p: normals[p])
        starts = [w.detach().clone() for w in weights]
        alone = [nn.Parameter(start.clone()) for start in starts]
        noises = {id(a): normals[w] for a, w in zip(alone, weights, strict=True)}
        apart = [br.IVON([a], **SMALL_IVON, noise=lambda p: noises[id(p)]) for a in alone]

        def loss(tensors: list[Tensor]) -> Tensor:
            return sum((w.double().square().sum() + w.double().sum() for w in tensors), torch.zeros((), dtype=torch.double))

        for _ in range(3):
            with together.sampled_params(train=True):
                loss(weights).backward()
            together.step()
            with contextlib.ExitStack() as stack:
                for optimizer in apart:
                    stack.enter_context(optimizer.sampled_params(train=True))
                loss(alone).backward()
            for optimizer in apart:
                optimizer.step()
        for a, w, start in zip(alone, weights, starts, strict=True):
            torch.testing.assert_close(w, a, rtol=1e-6, atol=0)
            assert (w != start).all()

    def test_an_empty_parameter_does_no_harm(self):
        w, empty = nn.Parameter(torch.ones(3)), nn.Parameter(torch.empty(0, 4))
        optimizer = br.IVON([w, empty], lr=0.1, ess=10.0)
        for _ in range(2):
            with optimizer.sampled_params(train=True):
                (w.square().sum() + empty.sum()).backward()
            optimizer.step()
        assert (w != 1).all()
        optimizer.load_state_dict(optimizer.state_dict())

    def test_the_models_dtype_may_change_between_steps(self):
        problem, optimizer = pair(dtype=torch.float32)
        train(problem, optimizer, 2)
        problem.double()
        problem.x = problem.x.double()
        train(problem, optimizer, [2, 3])
        assert {p.dtype for p in problem.parameters()} == {torch.float64}
        assert flat(problem.parameters()).isfinite().all()
        assert optimizer.state[problem.inner.weight]["step"].item() == 4

    def test_storage_stays_where_it_is(self):
        problem, optimizer = pair64()
        places = [p.data_ptr() for p in problem.parameters()]
        alias = problem.inner.weight.detach()[2:]
        train(problem, optimizer, 2)
        with optimizer.sampled_params(train=False):
            assert [p.data_ptr() for p in problem.parameters()] == places
            assert torch.equal(alias, problem.inner.weight[2:])
        assert [p.data_ptr() for p in problem.parameters()] == places
        assert torch.equal(alias, problem.inner.weight[2:])

    def test_channels_last_stays_channels_last_and_trains_as_contiguous_does(self):
        def run(memory_format: torch.memory_format) -> nn.Module:
            torch.manual_seed(0)
            net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(16, 2)).double()
            net = net.to(memory_format=memory_format)
            optimizer = br.IVON(net.parameters(), **SMALL_IVON)
            x = torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
            for _ in range(3):
                with optimizer.sampled_params(train=True):
                    net(x.to(memory_format=memory_format)).square().mean().backward()
                    assert net[0].weight.is_contiguous(memory_format=memory_format)
                optimizer.step()
            assert net[0].weight.is_contiguous(memory_format=memory_format)
            return net

        last, plain = run(torch.channels_last), run(torch.contiguous_format)
        torch.testing.assert_close(flat(last.parameters()), flat(plain.parameters()), rtol=1e-9, atol=1e-12)

    def test_tied_weights_stay_tied_and_are_perturbed_once(self):
        net = nn.Module()
        net.table = nn.Embedding(6, 4, dtype=torch.float64)
        net.head = nn.Linear(4, 6, bias=False, dtype=torch.float64)
        net.head.weight = net.table.weight
        optimizer = br.IVON(net.parameters(), **SMALL_IVON)
        with optimizer.sampled_params(train=True):
            assert net.head.weight is net.table.weight
            net.head(net.table(torch.tensor([1, 2]))).square().mean().backward()
        optimizer.step()
        assert net.head.weight is net.table.weight
        assert len(optimizer.state) == 1

    @pytest.mark.parametrize("shape", [(70_001,), (300, 401), (401, 300)], ids=str)
    def test_a_tensor_too_large_for_one_bucket_moves_by_the_same_equations(self, shape):
        """Laid out row by row or column by column."""
        generator = torch.Generator().manual_seed(0)
        start, eps, g = (torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(3))
        small = torch.ones(3, dtype=torch.float64)
        for turned in (False, True)[: len(shape)]:
            memory = start.T.clone().T if turned else start.clone()
            w, v = nn.Parameter(memory), nn.Parameter(small.clone())
            normals = {id(w): eps, id(v): small}
            optimizer = br.IVON([v, w], lr=0.1, ess=50.0, hess_init=0.5, betas=(0.9, 0.9), weight_decay=0.01,
                                noise=lambda p, normals=normals: normals[id(p)])  # fmt: skip
            with optimizer.sampled_params(train=True):
                torch.testing.assert_close(w.detach(), start + eps / math.sqrt(50 * 0.51), rtol=1e-14, atol=1e-14)
                w.grad, v.grad = g.clone(), small.clone()
            assert torch.equal(w, start)
            optimizer.step()
            excess = math.sqrt(50 * 0.51) * eps * g - 0.5
            hess = 0.5 + 0.1 * excess + 0.005 * excess**2 / 0.51
            mean = start - 0.1 * 0.51 * (g + 0.01 * start) / (hess + 0.01)
            torch.testing.assert_close(optimizer.state[w]["hess"], hess, rtol=1e-10, atol=1e-10)
            torch.testing.assert_close(optimizer.state[w]["momentum"], 0.1 * g, rtol=1e-12, atol=1e-12)
            torch.testing.assert_close(w.detach(), mean, rtol=1e-10, atol=1e-10)
