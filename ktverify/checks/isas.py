"""Which instruction sets a run covers, and how each of them is run on this CPU."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ktverify.engines import registry
from ktverify.system.instruction_sets import AMX, AVX512_BF16, ISA_FLAGS, SCALAR

EMULATION_ENV = "KTVERIFY_EMULATE_AMX"
# every id that an Isa can have: test ids contain one of them
IDS = (f"{AMX}_emulated", *ISA_FLAGS, "engine")


@dataclass(frozen=True)
class Isa:
    """An instruction set of an engine: `name` is what its `isa=` takes, None for an engine that has no choice."""

    name: str | None = None
    emulated: bool = False

    @property
    def label(self) -> str:
        """The name that reports show."""
        return f"{self.name} (emulated)" if self.emulated else self.name or ""

    @property
    def id(self) -> str:
        """The name that test ids and xdist groups show."""
        return f"{self.name}_emulated" if self.emulated else self.name or "engine"

    @property
    def env(self) -> dict[str, str]:
        """What a process needs in its environment to run this instruction set."""
        return {EMULATION_ENV: "1"} if self.emulated else {}


def planned(engine: str, wanted: str = "all") -> list[Isa]:
    """The instruction sets of `engine` to run, best first. AMX is emulated where this CPU has none.

    Raises ValueError when `wanted` is neither "all" nor one of them: a forced choice never falls back silently.
    """
    isas = _native() if engine == registry.NATIVE else _declared(engine)
    if wanted == "all":
        return isas
    chosen = [isa for isa in isas if wanted in (isa.name, isa.id)]
    if not chosen:
        names = ", ".join(isa.id for isa in isas if isa.name) or "all"
        raise ValueError(f"--isa {wanted}: engine {engine} has no such instruction set on this CPU; it takes {names}")
    return chosen


def _declared(engine: str) -> list[Isa]:
    """What the factory's attribute `isas` names, a tuple of what its `isa=` takes; one without a name otherwise."""
    return [Isa(name) for name in registry.facts(engine).isas]


def _native() -> list[Isa]:
    from ktverify.engines.native.isa import amx_is_emulated, available_isas

    return native_on(available_isas(), amx_is_emulated())


def native_on(available: Sequence[str], trapped: bool) -> list[Isa]:
    """The instruction sets of the native engine on a machine that runs `available`; trapped: AMX is emulated there."""
    isas = [Isa(name, emulated=trapped and name == AMX) for name in available]
    # the trap handler emulates the tile instructions only; the kernels around them are AVX-512, which this one implies
    if AVX512_BF16 in available and AMX not in available:
        isas.append(Isa(AMX, emulated=True))
    return isas


def of_tier(tier: str, planned: list[Isa]) -> list[Isa]:
    """Those of `planned` that run the cases of a tier.

    Big cases leave out kernels that take minutes and show nothing that small cases do not: portable and emulated ones.
    """
    fast = [isa for isa in planned if not (isa.emulated or isa.name == SCALAR)]
    return planned if tier == "default" else fast or planned[:1]
