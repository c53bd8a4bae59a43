import pytest

from bayesrule.recipes.names import lookup


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("IVONN", "unknown thing 'IVONN'; did you mean 'ivon'. there are: adam, ivon"),
        ("zzz", "unknown thing 'zzz'; there are: adam, ivon"),
    ],
)
def test_an_unknown_name_gets_the_nearest_and_all(name, message):
    with pytest.raises(ValueError, match=message):
        lookup("thing", name, {"ivon": 1, "adam": 2})


def test_a_known_name_gets_its_entry():
    assert lookup("thing", "adam", {"ivon": 1, "adam": 2}) == 2
