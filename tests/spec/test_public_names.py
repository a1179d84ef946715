"""The names that `import ktverify` offers."""

from __future__ import annotations

import subprocess
import sys

import pytest

import ktverify
from ktverify.checks.target import Target
from ktverify.engines.native.layer import KTMoEWrapper
from ktverify.engines.registry import find
from ktverify.isolation.hosted import Hosted
from ktverify.spec.cases import Case


def test_public_names_are_those_of_their_modules() -> None:
    named = {"Case": Case, "Target": Target, "Hosted": Hosted, "KTMoEWrapper": KTMoEWrapper, "find_engine": find}
    assert {name: getattr(ktverify, name) for name in named} == named
    assert set(named) <= set(ktverify.__all__) <= set(dir(ktverify))


def test_an_unknown_public_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="module 'ktverify' has no attribute 'nothing'"):
        _ = ktverify.nothing


def test_importing_the_package_loads_neither_torch_nor_numpy() -> None:
    code = "import sys, ktverify\nsys.exit(' '.join({'torch', 'numpy', 'typer'} & set(sys.modules)) or 0)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
