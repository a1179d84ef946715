"""ktverify: a conformance suite and an engine for CPU Mixture-of-Experts layers with LoRA on the experts.

Importing the package is light: torch is imported by the modules that compute (``ktverify.experts``,
``ktverify.reference``, ``ktverify.data``), never by this one.
"""

__version__ = "0.1.0"
