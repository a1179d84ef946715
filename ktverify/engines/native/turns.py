"""Threads that share a layer, or a wrapped model, take turns to give it weights. Standard library only.

A layer's parameters and the values that its engine has of them change together, and base weights are read of one load.
Between giving LoRA to the engine of a model and its forward, no other thread may give other values; one thread builds
the engine. The engine computes one call at a time in any case; where a device computes some experts, both see the same
weights and saved forwards only in turn.
"""

from __future__ import annotations

import functools
import os
import threading
import weakref
from collections.abc import Callable
from typing import Any, TypeVar, cast

Call = TypeVar("Call", bound=Callable[..., Any])
_turn = threading.RLock()
_own = threading.local()


def _new_turn() -> None:
    global _turn
    _turn = threading.RLock()


# a forked child has no thread that could end a turn of the parent's
os.register_at_fork(after_in_child=_new_turn)


def in_turn(call: Call) -> Call:
    """A decorator: of all calls that have it, one runs at a time; those of one thread may be nested."""

    @functools.wraps(call)
    def wrapped(*given: Any, **named: Any) -> Any:
        with _turn:
            return call(*given, **named)

    return cast(Call, wrapped)


def in_turn_where(attribute: str) -> Callable[[Call], Call]:
    """A decorator of methods: like `in_turn` for the objects whose attribute is not None."""

    def decorate(call: Call) -> Call:
        turn = in_turn(call)

        @functools.wraps(call)
        def wrapped(owner: Any, *given: Any, **named: Any) -> Any:
            return (call if getattr(owner, attribute) is None else turn)(owner, *given, **named)

        return cast(Call, wrapped)

    return decorate


def list_of_this_thread(owner: object) -> list[Any]:
    """A list that belongs to `owner` and to the calling thread, empty at first."""
    if not hasattr(_own, "lists"):
        _own.lists = weakref.WeakKeyDictionary()
    found: list[Any] = _own.lists.setdefault(owner, [])
    return found
