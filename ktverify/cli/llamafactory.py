"""The command llamafactory: stock LLaMA-Factory, with the routed experts in the engine."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer

COMMANDS = ("train", "export", "chat")


def llamafactory(
    context: typer.Context,
    command: Annotated[str, typer.Argument(help=f"{', '.join(COMMANDS)}, as llamafactory-cli has them")],
    config: Annotated[Path, typer.Argument(metavar="CONFIG.yaml", help="LLaMA-Factory's configuration")],
) -> None:
    """Run stock LLaMA-Factory in this process, its model's routed experts in the engine where use_kt is true.

    Any key may be put over the file's as key=value or --key value. docs/llamafactory.md says how to install it and what
    the engine's keys do.

    \b
    Examples:  python -m ktverify llamafactory train sft.yaml
               python -m ktverify llamafactory train sft.yaml --kt_num_threads 8 output_dir=saves/again
               python -m ktverify llamafactory export merge.yaml
    """
    if command not in COMMANDS:
        raise ValueError(
            f"llamafactory takes {', '.join(COMMANDS)}, not {command!r}; llamafactory-cli itself has the others"
        )
    from ktverify.llamafactory import keys, stock

    given = keys.read_configuration(config, context.args)
    # first without LLaMA-Factory, whose import takes seconds
    keys.split_keys(given, trains=command == "train")
    stock.connect()
    run: Callable[[dict[str, Any]], Any] = _RUN[command]
    run(given)


def _train(given: dict[str, Any]) -> None:
    from llamafactory.train.tuner import run_exp

    run_exp(given)


def _export(given: dict[str, Any]) -> None:
    from llamafactory.train.tuner import export_model

    export_model(given)


def _chat(given: dict[str, Any]) -> None:
    from llamafactory.chat import chat_model

    # run_chat reads the command line alone
    chat_model.ChatModel = partial(chat_model.ChatModel, given)
    chat_model.run_chat()


_RUN = {"train": _train, "export": _export, "chat": _chat}
