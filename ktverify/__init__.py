"""ktverify: a conformance suite and an engine for CPU Mixture-of-Experts layers with LoRA on the experts.

Importing the package is light: torch is imported by the modules that compute (``ktverify.experts``,
``ktverify.reference``, ``ktverify.data``), never by this one.
"""

import pkgutil

# In a checkout the sources come first on the path, and the compiled part lies with the installed package: both are
# this package.
__path__ = pkgutil.extend_path(__path__, __name__)

__version__ = "0.1.0"
