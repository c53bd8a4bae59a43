"""Contracts are inherited from here too, and say what was compared when they fail."""

import pytest

pytest.register_assert_rewrite("tests.families.contract", "tests.families.members")
