"""A model that was changed, beside one that was trained again."""

import pytest
import torch

from bayesrule.uses.changes import Changes, Examples, render_changes


def probs(*rows):
    return torch.tensor(rows)


@pytest.fixture
def found():
    labels = torch.tensor([0, 1, 1])
    before = probs([0.9, 0.1], [0.2, 0.8], [0.6, 0.4])
    after = probs([0.8, 0.2], [0.4, 0.6], [0.4, 0.6])
    again = probs([0.8, 0.2], [0.3, 0.7], [0.1, 0.9])

    def changes(count=3, **more):
        said = dict(zip(("before", "adapted", "trained again"), (before, after, again), strict=True))
        names = list(said)[:count]
        parts = [
            Examples("test", labels, [said[name] for name in names]),
            Examples("removed", labels[:1], [said[name][:1] for name in names]),
        ]
        return Changes("A <model>", ["Some & more."], names, parts, [1.0, 0.5, 2.0][:count], **more)

    return changes


def test_rows_have_figures_of_every_kind_of_examples(found):
    before, after, again = found().rows
    assert [row["method"] for row in (before, after, again)] == ["before", "adapted", "trained again"]
    assert before["test accuracy"] == pytest.approx(2 / 3) and after["test accuracy"] == 1 and again["seconds"] == 2.0
    assert after["removed nll"] == pytest.approx(-torch.tensor(0.8).log().item())


def test_agreement_is_with_the_last(found):
    before, after = found().agreement
    assert before["test same"] == pytest.approx(2 / 3) and after["test same"] == 1
    assert after["test apart"] == pytest.approx((0 + 0.1 + 0.3) / 3) and after["removed apart"] == pytest.approx(0)
    assert "test same" in found().detailed[0] and "test same" not in found(2).detailed[0] and not found(2).is_compared


@pytest.mark.parametrize("count", [2, 3])
def test_the_page_says_all_and_escapes_what_it_is_told(found, count):
    page = render_changes(found(count, notes=["mind <this>"], settings={"lr": 0.1}))
    assert "A &lt;model&gt;" in page and "Some &amp; more." in page and "mind &lt;this&gt;" in page
    assert page.count("data:image/svg+xml") == (2 if count == 3 else 0)
    assert ("trained again" in page) == (count == 3)
    assert page == render_changes(found(count, notes=["mind <this>"], settings={"lr": 0.1}))
