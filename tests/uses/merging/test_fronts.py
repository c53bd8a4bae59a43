"""The picture of a front."""

from xml.etree import ElementTree

import pytest

from bayesrule.uses.merging.fronts import front_chart
from bayesrule.uses.merging.previews import Point, Preview

SVG = "{http://www.w3.org/2000/svg}"
FOUND = Preview(
    ("tweets", "films <i>"),
    (
        Point((0.0, 1.0), (0.9, 0.2), True),
        Point((0.5, 0.5), (0.5, 0.4), True),
        Point((0.4, 0.4), (0.8, 0.8), False),
        Point((1.0, 0.0), (0.3, 0.7), True),
    ),
)


def marks(text, kind):
    """How many points of a kind are drawn."""
    root = ElementTree.fromstring(text)
    return sum(len(group.findall(f".//{SVG}use")) for group in root.iter(f"{SVG}g") if group.get("id") == kind)


def test_is_an_image_that_shows_every_point_and_repeats():
    text = front_chart(FOUND)
    assert (marks(text, "front"), marks(text, "others")) == (3, 1)
    assert text == front_chart(FOUND)


def test_tasks_choose_the_axes():
    assert front_chart(FOUND, (1, 0)) != front_chart(FOUND)


@pytest.mark.parametrize("tasks", [(0, 0), (0, 2), (-1, 0)])
def test_tasks_that_are_none(tasks):
    with pytest.raises(ValueError, match="numbers of two of 2 tasks, counted from 0"):
        front_chart(FOUND, tasks)
