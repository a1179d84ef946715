"""Which engines of `bench shapes` are in memory together. Imports no torch."""

from __future__ import annotations

from collections.abc import Sequence

from ktverify.bench.engines import OWN, Engine

# an interpreter with torch; the process that measures the ceilings; the share of free memory left to the system
_PROCESS_BYTES = 500 << 20
_CEILING_BYTES = 600 << 20
_RESERVE = 0.04


def form_groups(
    engines: Sequence[Engine], weights: int, active: int, available: int
) -> tuple[list[list[Engine]], list[tuple[Engine, str]]]:
    """Form groups of engines that fit into memory together: (groups, [(engine, why it does not fit)]).

    weights, active (those of experts that tokens reach), available: bytes. One group if memory allows. Otherwise the
    native engine forms a group with each peer, because every ratio is against the native engine in the same rounds.
    """

    def needed(group: Sequence[Engine]) -> int:
        return (
            sum(int(engine.held * (active if engine.lazy else weights)) + _PROCESS_BYTES for engine in group)
            + _CEILING_BYTES
        )

    room = int(available * (1 - _RESERVE))
    if needed(engines) <= room:
        return [list(engines)], []
    own = [engine for engine in engines if engine.name == OWN]
    groups, left_out = [], []
    for engine in engines:
        if engine.name == OWN:
            continue
        pair = [*own, engine]
        if needed(pair) <= room:
            groups.append(pair)
        else:
            left_out.append(
                (engine, f"needs {needed(pair) / 1e9:.1f} GB with the native engine; {room / 1e9:.1f} free")
            )
    if not groups and own:
        if needed(own) <= room:
            groups.append(own)
        else:
            left_out.append((own[0], f"needs {needed(own) / 1e9:.1f} GB; {room / 1e9:.1f} are free"))
    return groups, left_out
