"""Options that several commands take. Light: nothing heavy is imported."""

from __future__ import annotations

from typing import Annotated

import typer

from ktverify.engines import registry

EngineName = Annotated[
    str, typer.Option(help=f"engine name, {registry.OWN}", callback=lambda name: registry.absolute(name))
]
