"""Engines that live in a process of their own, under another Python if need be.

`Hosted("path/to/engine.py:Engine", python="/there/bin/python")` is a factory like any other: it takes KTMoEWrapper's
keyword arguments and returns a layer with its methods. host.py is what runs there, and imports nothing of ktverify.
"""

from __future__ import annotations

from ktverify.hosting.layer import Hosted
from ktverify.hosting.process import Died

__all__ = ["Died", "Hosted"]
