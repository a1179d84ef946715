"""Cases drawn by hypothesis for a property, and the search for one that violates it.

The draws shrink towards one expert, one token and sizes of 1, so that a falsifying case is a small one; its text goes
through `--case` to repeat it. No file is written: examples follow from the property's name and the seed alone.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable
from dataclasses import dataclass

from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st

from ktverify.checks.properties import Property
from ktverify.errors import PropertyFailed, Unsupported
from ktverify.isolation.child import raised_by_the_engine
from ktverify.judge import gates
from ktverify.spec.cases import LORA_DTYPES, MAPS, Case, flops
from ktverify.system.files import suites


@dataclass(frozen=True)
class Sizes:
    """Upper ends of what is drawn. flops: of one forward and backward; T is cut so that a case stays below.

    step: H, and I in as many parts as it is split into, are multiples of it.
    """

    experts: int = 64
    slots: int = 8
    tokens: int = 300
    width: int = 100
    rank: int = 40
    flops: float = 1e7
    step: int = 1


ORDINARY = Sizes()
TINY = Sizes(experts=4, slots=2, tokens=5, width=20, rank=4)

_DATA = ("gaussian", "integer", "large", "tiny", "strong_lora", "zero_b")
_ROUTING = ("uniform", "zipf", "one_expert", "duplicate", "masked")
_MAGNITUDES = (1.0, 1e-6, 1e-3, 30.0, 1e4)
# alpha / rank; 1 comes last, for there a forgotten scale does not show
_SCALES = (2.0, 0.5, 4.0, 1.0)


@st.composite
def cases(draw: st.DrawFn, wanted: Property, sizes: Sizes = ORDINARY) -> Case:
    """A case of at most `sizes` that the property takes; its text parses back into it."""
    experts = draw(st.integers(2 if "routing" in wanted.fixed else 1, sizes.experts), label="E")
    least = 2 if wanted.fixed.get("routing") == "duplicate" else 1
    slots = draw(st.integers(least, min(sizes.slots, experts)), label="k")
    hidden = _multiple(draw, sizes.step, sizes.width, "H")
    intermediate = _multiple(draw, sizes.step * (4 if wanted.splits else 1), sizes.width, "I")
    rank = draw(st.integers(1, sizes.rank), label="r")
    data = str(wanted.fixed.get("data") or draw(st.sampled_from(_DATA), label="data"))
    routings = [kind for kind in _ROUTING if kind != "duplicate" or slots > 1]
    found = Case(
        name="custom",
        why="written by hand",
        num_experts=experts,
        top_k=slots,
        hidden=hidden,
        intermediate=intermediate,
        qlen=1,
        rank=rank,
        alpha=rank * draw(st.sampled_from(_SCALES), label="scale"),
        data=data,
        routing=str(wanted.fixed.get("routing") or draw(st.sampled_from(routings), label="routing")),
        lora_dtype=draw(st.sampled_from(LORA_DTYPES), label="lora"),
        physical=draw(st.sampled_from(MAPS), label="map"),
        magnitude=draw(st.sampled_from(_MAGNITUDES), label="magnitude") if data == "gaussian" else 1.0,
        seed=draw(st.integers(0, 2**16), label="seed"),
    )
    most = max(1, min(sizes.tokens, int(sizes.flops / flops(found, backward=True))))
    tokens = draw(st.integers(0, most), label="T")
    # through its text, so that what is printed is what was run
    return Case.parse(found.id.replace(",T=1,", f",T={tokens},", 1))


def _multiple(draw: st.DrawFn, step: int, most: int, label: str) -> int:
    """A multiple of `step` up to `most`, or `step` itself."""
    return int(step * draw(st.integers(1, max(1, most // step)), label=label if step == 1 else f"{label} / {step}"))


def search(
    name: str,
    wanted: Property,
    run: Callable[[Case], tuple[int, int]],
    *,
    examples: int,
    sizes: Sizes = ORDINARY,
    fresh: int = 0,
    options: str = "",
    shrink: bool = True,
) -> None:
    """Run the property on drawn cases. PropertyFailed for the smallest that breaks it, or if too few are believed.

    run(case) gives (comparisons, believed ones). fresh: another seed draws other cases. options: what a pytest line
    that repeats the case needs besides. shrink=False stops at the first case that breaks it. A case that ends the
    engine's process is not made smaller, because every try would cost a process: PropertyFailed reports the first.
    Cases that the engine declares it cannot do are left out; Unsupported where that leaves nothing.
    """
    compared = believed = 0
    ended: dict[str, PropertyFailed] = {}
    reasons: list[str] = []

    def attempt(case: Case) -> PropertyFailed | None:
        nonlocal compared, believed
        if ended:
            return ended.get(case.id)
        try:
            counts = run(case)
        except NotImplementedError as error:
            reasons.append(str(error))
            return None
        except Exception as error:
            repeat = f"pytest {suites('properties')} -k {name} --case '{case.id}'{options}"
            text = f"{name}: {wanted.what}\n{case.id}\n{type(error).__name__}: {error}\n{repeat}"
            verdict = getattr(error, "verdict", "")
            if not verdict:
                return PropertyFailed(text, "CRASH" if raised_by_the_engine(error) else "FAIL")
            return ended.setdefault(case.id, PropertyFailed(text, verdict))
        compared += counts[0]
        believed += counts[1]
        return None

    @seed(zlib.crc32(f"{name} {fresh}".encode()))
    @settings(
        max_examples=examples,
        deadline=None,
        database=None,
        print_blob=False,
        report_multiple_bugs=False,
        phases=(Phase.generate, Phase.shrink) if shrink else (Phase.generate,),
        suppress_health_check=list(HealthCheck),
    )
    @given(case=cases(wanted, sizes))
    def holds(case: Case) -> None:
        violated = attempt(case)
        if violated is not None:
            raise violated

    holds()
    if reasons and not compared:
        raise Unsupported(reasons[0])
    believe(name, compared, believed)


def drawn(name: str, wanted: Property, count: int, seed_of: int, sizes: Sizes = ORDINARY) -> list[Case]:
    """`count` cases that the property takes; they follow from its name and the seed."""
    found: list[Case] = []

    @seed(zlib.crc32(f"{name} {seed_of}".encode()))
    @settings(
        max_examples=count,
        deadline=None,
        database=None,
        phases=(Phase.generate,),
        suppress_health_check=list(HealthCheck),
    )
    @given(case=cases(wanted, sizes))
    def keep(case: Case) -> None:
        found.append(case)

    keep()
    return found


def believe(name: str, compared: int, believed: int) -> None:
    """PropertyFailed if less than half ([trust] min_density) of the comparisons could distinguish right from wrong."""
    least = float(gates.tolerances()["trust"]["min_density"])
    if compared == 0 or believed < least * compared:
        raise PropertyFailed(
            f"{name}: only {believed} of {compared} comparisons could be believed: the cases are too empty"
        )
