"""Options that several commands take. Light: nothing heavy is imported."""

from __future__ import annotations

from typing import Annotated

import typer

from ktverify import engines

EngineName = Annotated[
    str, typer.Option(help=f"engine name, {engines.OWN}", callback=lambda name: engines.absolute(name))
]
