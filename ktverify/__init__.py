"""ktverify: a conformance suite and an engine for CPU Mixture-of-Experts layers with LoRA on the experts.

Importing the package is light: a public name imports its module, and torch, on first use.
"""

import pkgutil
from typing import Any

# In a checkout, the sources come first on the path and the compiled module lies with the installed package. Both
# directories belong to this package.
__path__ = pkgutil.extend_path(__path__, __name__)

__version__ = "0.1.0"

_ADDRESSES = {
    "Case": "ktverify.spec.cases:Case",
    "Hosted": "ktverify.isolation.hosted:Hosted",
    "Inputs": "ktverify.spec.inputs:Inputs",
    "KTMoEWrapper": "ktverify.engines.native.layer:KTMoEWrapper",
    "Target": "ktverify.checks.target:Target",
    "find_engine": "ktverify.engines.registry:find",
    "make_inputs": "ktverify.spec.inputs:make_inputs",
}
__all__ = sorted(_ADDRESSES)


def __getattr__(name: str) -> Any:
    from ktverify.system import lazy_attribute

    return lazy_attribute(__name__, _ADDRESSES, name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_ADDRESSES])
