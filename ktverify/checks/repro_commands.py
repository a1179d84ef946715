"""The command lines that repeat a comparison, as failing lines print them."""

from __future__ import annotations

from ktverify.engines import registry
from ktverify.engines.run import METHOD
from ktverify.spec.cases import Case


def isa_name(label: str) -> str:
    """Return "amx_bf16" for the label "amx_bf16 (emulated)"."""
    return label.partition(" ")[0]


def repro_command(
    case: Case,
    *,
    engine: str = registry.NATIVE,
    isa: str = "",
    tensor: str = "",
    tp: int = 1,
    fresh: bool = False,
    method: str = METHOD,
) -> str:
    """The command line that repeats one comparison. `isa` may be a label; an emulated one sets the environment."""
    words = [f"{_environment(isa)}python -m ktverify repro '{case.id}'{registry.option(engine)}"]
    words += [f"--isa {isa_name(isa)}"] if isa else []
    words += [f"--tp {tp}"] if tp != 1 else []
    words += [f"--method {method}"] if method != METHOD else []
    words += ["--fresh"] if fresh else []
    words += [f"--tensor {tensor}"] if tensor else []
    return " ".join(words)


def verify_command(case: Case, *, engine: str = registry.NATIVE, isa: str = "", tp: int = 1) -> str:
    """The command line that repeats a training check."""
    words = [
        f"{_environment(isa)}python -m ktverify verify --mode training --case '{case.id}'{registry.option(engine)}"
    ]
    words += [f"--isa {isa_name(isa)}"] if isa else []
    words += ["--tp tp"] if tp != 1 else []
    return " ".join(words)


def _environment(isa: str) -> str:
    return "KTVERIFY_EMULATE_AMX=1 " if isa.endswith("(emulated)") else ""
