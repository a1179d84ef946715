"""Properties of every right layer, on cases that hypothesis draws and makes small: ktverify/checks/properties.py."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest

from ktverify.checks import isas, properties, property_search
from ktverify.checks.isas import Isa
from ktverify.checks.properties import PROPERTIES
from ktverify.checks.target import Target
from ktverify.engines import registry
from ktverify.isolation.child import ChildPool
from ktverify.spec.cases import Case

# cases for each property: on the best instruction set, on each of the others, on an emulated one
BEST, OTHER, EMULATED = 15, 2, 1


@pytest.mark.parametrize("name", PROPERTIES)
def test_property(
    name: str,
    engine: str,
    isa: Isa,
    children: ChildPool,
    fresh: int | None,
    pytestconfig: pytest.Config,
    about: Callable[[Case | None, int], None],
) -> None:
    def run(case: Case) -> tuple[int, int]:
        try:
            compared, believed = children.get(isa.env).call(
                properties.check, target=Target(engine, isa.name), name=name, case=case
            )
        except Exception as error:
            # a process that the case ends, it ends without the property too; a relation of two calls is more than it
            about(case if hasattr(error, "verdict") else None, 2 if PROPERTIES[name].splits else 1)
            raise
        return int(compared), int(believed)

    # pytest knows a family's own options only where the family was named on the command line
    text = pytestconfig.getoption("--case", default=None)
    if text is not None:
        run(_given(text, name))
        return
    best = isa == isas.planned(engine)[0]
    usual = EMULATED if isa.emulated else BEST if best else OTHER
    property_search.search(
        name,
        PROPERTIES[name],
        run,
        examples=pytestconfig.getoption("--examples", default=None) or usual,
        sizes=replace(
            property_search.TINY if isa.emulated else property_search.ORDINARY,
            step=pytestconfig.getoption("--sizes-of", default=None) or 1,
        ),
        fresh=fresh or 0,
        options=_options(engine, isa),
    )


def _given(text: str, name: str) -> Case:
    case = Case.parse(text)
    lacking = [f"{field}={value}" for field, value in PROPERTIES[name].fixed.items() if getattr(case, field) != value]
    if lacking:
        pytest.skip(f"{name} is a property of cases with {', '.join(lacking)}")
    return case


def _options(engine: str, isa: Isa) -> str:
    chosen = f" --isa {isa.id}" if isa.name else ""
    return f"{registry.option(engine)}{chosen}"
