"""The mutants by other names, so that they are taken for engines of a user and run in a process of their own."""

from __future__ import annotations

from typing import Any


def __getattr__(name: str) -> Any:
    from ktverify.engines.torch_bf16 import TorchBf16
    from ktverify.mutants import MUTANTS, Plain

    if name == "right_without_onednn":
        import torch

        torch.backends.mkldnn.set_flags(False)  # type: ignore[no-untyped-call]
    if name.startswith("right_without") or name == "right":
        return TorchBf16
    if name == "right_with_codes_and_masks":
        return Plain
    if name not in MUTANTS:
        raise AttributeError(name)
    return MUTANTS[name].factory
