"""Properties of every right layer, on cases that hypothesis draws and makes small: ktverify/checks/properties.py."""

from __future__ import annotations

from dataclasses import replace

import pytest

from ktverify.checks import isas, property_search
from ktverify.checks.check import Check
from ktverify.checks.isas import Isa
from ktverify.checks.properties import PROPERTIES
from ktverify.checks.target import Target
from ktverify.engines import registry
from ktverify.pytest_plugin.ask import Ask, each
from ktverify.spec.cases import Case

# cases for each property: on the best instruction set, on each of the others, on an emulated one
BEST, OTHER, EMULATED = 15, 2, 1


@pytest.mark.slow
@each("property")
def test_property(ask: Ask, check: Check, isa: Isa, pytestconfig: pytest.Config) -> None:
    name, option = check.name, pytestconfig.option

    def run(case: Case) -> tuple[int, int]:
        try:
            child = ask.children.get(isa.env)
            compared, believed = child.call(check.function, Target(ask.engine, isa.name), name=name, case=case)
        except Exception as error:
            # a case that ends the process ends it without the property too; a relation of two calls is more than a case
            ask.about(case if hasattr(error, "verdict") else None, 2 if PROPERTIES[name].splits else 1)
            raise
        return int(compared), int(believed)

    if option.case is not None:
        run(_given(option.case, name))
        return
    best = isa == isas.planned(ask.engine)[0]
    usual = EMULATED if isa.emulated else BEST if best else OTHER
    sizes = property_search.TINY if isa.emulated else property_search.ORDINARY
    chosen = f" --isa {isa.id}" if isa.name else ""
    property_search.search(
        name,
        PROPERTIES[name],
        run,
        examples=option.examples or usual,
        sizes=replace(sizes, step=option.sizes_of or 1),
        fresh=ask.fresh or 0,
        options=f"{registry.option(ask.engine)}{chosen}",
    )


def _given(text: str, name: str) -> Case:
    case = Case.parse(text)
    lacking = [f"{field}={value}" for field, value in PROPERTIES[name].fixed.items() if getattr(case, field) != value]
    if lacking:
        pytest.skip(f"{name} is a property of cases with {', '.join(lacking)}")
    return case
