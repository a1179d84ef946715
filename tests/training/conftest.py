"""What the oldest peft of the range says without a reason; see `make versions`."""

from __future__ import annotations

import peft
import pytest

OLD = tuple(map(int, peft.__version__.split(".")[:2])) < (0, 19)
NOTES = (
    "ignore:Unsupported layer type:UserWarning",  # of the experts, which it supports
    "ignore:Could not find a config file in:UserWarning",  # on saving an adapter of a model that has no path
)


def pytest_itemcollected(item: pytest.Item) -> None:
    if OLD:
        item.add_marker(pytest.mark.filterwarnings(*NOTES))
