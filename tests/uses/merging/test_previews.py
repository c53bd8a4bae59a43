"""Weightings of tasks, and which of them no other is better than."""

import pytest
import torch

import bayesrule as br
from bayesrule.uses.merging.previews import Point, Preview, weightings

TARGETS = torch.tensor([[1.0, 0.0], [0.0, 1.0]])


def task(target, precision):
    return br.Posterior({"w": torch.tensor(target)}, {"w": torch.tensor(precision)})


BASE, ONE, TWO = task([0.0, 0.0], [1.0, 1.0]), task([1.0, 0.0], [3.0, 1.0]), task([0.0, 1.0], [1.0, 3.0])


def losses(posterior):
    return [float((posterior.mean["w"] - target).square().sum()) for target in TARGETS]


class TestPreview:
    def test_each_weighting_is_merged_and_judged(self):
        grid = [(0.0, 1.0), (0.3, 0.7), (2.0, 0.0)]
        found = br.preview(BASE, [ONE, TWO], losses, grid, names=["a", "b"])
        assert found.names == ("a", "b") and [point.alphas for point in found.points] == grid
        for point in found.points:
            assert list(point.losses) == losses(br.merge(BASE, [ONE, TWO], point.alphas))

    @pytest.mark.parametrize(
        ("values", "front"),
        [
            ([(1, 2), (2, 1), (2, 2)], [True, True, False]),
            ([(1, 1), (1, 1), (0, 2)], [True, True, True]),  # equal ones do not beat one another
            ([(1, 1), (1, 2)], [True, False]),
            ([(0, 0), (1, 1), (2, 2)], [True, False, False]),
        ],
    )
    def test_the_front(self, values, front):
        given = iter(values)
        found = br.preview(BASE, [ONE, TWO], lambda _: next(given), [(i, 0) for i in range(len(values))])
        assert [point.on_front for point in found.points] == front
        assert found.front == tuple(point for point in found.points if point.on_front)

    def test_the_default_goes_from_one_task_to_the_other(self):
        found = br.preview(BASE, [ONE, TWO], losses)
        assert [point.alphas for point in found.points] == weightings(2) and len(found.points) == 11

    def test_mixtures(self):
        grid = [(0.5, 0.5), (1.0, 0.2)]
        mixed = br.Posterior.mixture([ONE, task([0.8, 0.1], [2.0, 2.0])])
        found = br.preview(BASE, [mixed, TWO], losses, grid)
        for point in found.points:
            assert list(point.losses) == losses(br.merge_mixtures(BASE, [mixed, TWO], point.alphas).posterior)

    def test_averages_take_shares(self):
        found = br.preview(None, [ONE, TWO], losses, [(3, 1)], method="fisher")
        assert list(found.points[0].losses) == losses(br.merge(None, [ONE, TWO], [3, 1], "fisher"))

    @pytest.mark.parametrize(
        ("call", "message"),
        [
            (
                lambda: br.preview(BASE, [ONE, TWO], lambda _: [1.0]),
                r"finite loss for each of 2 tasks, got \(1.0,\) for \(0.0, 1.0\)",
            ),
            (
                lambda: br.preview(BASE, [ONE, TWO], lambda _: [1.0, float("nan")]),
                r"finite loss for each of 2 tasks, got \(1.0, nan\)",
            ),
            (lambda: br.preview(BASE, [ONE], losses, [(1, 1)]), "there are 1 models and 2 alphas"),
            (lambda: br.preview(BASE, [], losses), "takes at least one posterior"),
            (
                lambda: br.preview(BASE, [br.Posterior.mixture([ONE, TWO])], losses, method="fisher"),
                "mixtures are merged by 'gradient_matching', got method='fisher'",
            ),
        ],
    )
    def test_refusals(self, call, message):
        with pytest.raises(ValueError, match=message):
            call()


class TestWeightings:
    @pytest.mark.parametrize(("tasks", "steps", "count"), [(1, 5, 1), (2, 5, 11), (3, 4, 61), (4, 1, 15)])
    def test_all_of_which_the_largest_is_1(self, tasks, steps, count):
        found = weightings(tasks, steps)
        assert len(set(found)) == len(found) == count
        assert all(len(one) == tasks and max(one) == 1 and min(one) >= 0 for one in found)

    @pytest.mark.parametrize(("tasks", "steps"), [(0, 1), (2, 0), (2, 1.5)])
    def test_refusals(self, tasks, steps):
        with pytest.raises(ValueError, match="must be a whole number >= 1"):
            weightings(tasks, steps)


def test_a_preview_is_a_value():
    points = (Point((1.0,), (2.0,), True),)
    assert Preview(("a",), points) == Preview(("a",), points)
