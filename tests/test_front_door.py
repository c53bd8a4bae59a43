"""The front door: every public name is there, is imported when asked for, and nothing else answers."""

import subprocess
import sys

import pytest

import bayesrule as br


@pytest.mark.parametrize("name", br.__all__)
def test_public_name_resolves(name):
    assert getattr(br, name) is not None
    assert name in dir(br)


def test_unknown_name_is_an_attribute_error_that_names_it():
    with pytest.raises(AttributeError, match="no attribute 'IVONN'"):
        br.IVONN  # noqa: B018


def test_importing_the_package_imports_no_torch_and_the_library_needs_no_extra():
    code = (
        "import sys\n"
        "for extra in ('tyro', 'rich', 'matplotlib', 'jinja2', 'sklearn', 'mlxtend', 'PIL'): sys.modules[extra] = None\n"
        "import bayesrule as br\n"
        "assert 'torch' not in sys.modules\n"
        "br.IVON\n"
        "assert 'torch' in sys.modules\n"
        "[getattr(br, name) for name in br.__all__]"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
