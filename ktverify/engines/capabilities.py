"""What an engine says that it can do: in ktverify.toml beside it, or by attributes of its factory.

    contract = "1.0"                # the version of docs/contract.md that it is written for

    [capabilities]
    isas = ["avx2"]                 # what its isa= takes
    fp32_sums = false               # strict limits
    tp = [1, 2]                     # tensor parallel degrees
    methods = ["AMXBF16_SFT"]       # without _SkipLoRA
    skip_lora = true                # each method with _SkipLoRA
    odd_sizes = true                # H, I or I / TP that are no multiples of 32
    max_cache_depth = 1
    lora_dropout = false
    gpu_experts = false             # gpu_experts_mask=: experts on another device

The attributes are `contract` and the dict `capabilities` with the same names, `isas` and `fp32_sums`. What is left out
is neither claimed nor disclaimed.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeGuard

from ktverify.engines.argument_checks import FORMATS, WITHOUT_LORA
from ktverify.spec.cases import read_toml
from ktverify.system.instruction_sets import ISA_FLAGS

CONTRACT = "1.0"  # the version that this package judges by
FILE = "ktverify.toml"
MULTIPLE = 32  # sizes that are a multiple of it are even
WORKS = "works, though it is disclaimed: "  # how the reason of such a record begins
TP_DEGREES = (1, 2, 4)  # those that the checks ask for


def _is_count(value: Any) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def _are_counts(value: object) -> bool:
    return isinstance(value, (list, tuple)) and bool(value) and all(map(_is_count, value))


def _is_list(value: object, *names: str | None) -> bool:
    return isinstance(value, (list, tuple)) and bool(value) and all(each in names for each in value)


_FLAG = ("true or false", lambda value: isinstance(value, bool))
_TAKES: dict[str, tuple[str, Any]] = {
    "isas": (f"a list of some of {', '.join(ISA_FLAGS)}", lambda value: _is_list(value, None, *ISA_FLAGS)),
    "fp32_sums": _FLAG,
    "tp": (
        "a list of degrees",
        lambda value: isinstance(value, (list, tuple)) and value and all(map(_is_count, value)),
    ),
    "methods": (f"a list of some of {', '.join(FORMATS)}", lambda value: _is_list(value, *FORMATS)),
    "skip_lora": _FLAG,
    "odd_sizes": _FLAG,
    "max_cache_depth": ("a number of 1 or more", _is_count),
    "lora_dropout": _FLAG,
    "gpu_experts": _FLAG,
}


@dataclass(frozen=True)
class Capability:
    """What an engine claims or disclaims. name: of the capability; value: a TP degree, method or depth, or True."""

    name: str
    value: Any
    claimed: bool

    def __str__(self) -> str:
        return self.name if self.value is True else f"{self.name} {self.value}"


@dataclass(frozen=True)
class Capabilities:
    """What an engine declares; None where it says nothing. See the module for the fields."""

    contract: str | None = None
    isas: tuple[str | None, ...] | None = None
    fp32_sums: bool | None = None
    tp: tuple[int, ...] | None = None
    methods: tuple[str, ...] | None = None
    skip_lora: bool | None = None
    odd_sizes: bool | None = None
    max_cache_depth: int | None = None
    lora_dropout: bool | None = None
    gpu_experts: bool | None = None

    def claims(self, name: str, value: Any) -> bool | None:
        """Whether the engine claims this value of a capability, None where it says nothing about it."""
        held = getattr(self, name)
        if held is None or isinstance(held, bool):
            return held
        return bool(value in held if isinstance(held, tuple) else value <= held)

    def disclaimed(self, arguments: Mapping[str, Any]) -> str:
        """What a call of the factory needs and the engine disclaims, in words; "" for nothing.

        Arguments that the contract refuses need nothing: the engine has to refuse them.
        """
        for name, value in _needed(arguments):
            if self.claims(name, value) is False:
                return f"{Capability(name, value, False)} is disclaimed"
        return ""

    def all_claims(self) -> list[Capability]:
        """What a check can ask of the engine, claimed or disclaimed."""
        values: dict[str, tuple[Any, ...]] = {
            "tp": tuple(sorted({*TP_DEGREES, *(self.tp or ())})),
            "methods": tuple(FORMATS),
            "skip_lora": (True,),
            "odd_sizes": (True,),
            "max_cache_depth": (self.max_cache_depth or 1, (self.max_cache_depth or 1) + 1),
            "lora_dropout": (True,),
            "gpu_experts": (True,),
        }
        asked = [(name, value, self.claims(name, value)) for name, each in values.items() for value in each]
        return [Capability(name, value, claimed) for name, value, claimed in asked if claimed is not None]


def _needed(arguments: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """The capabilities that a layer of these arguments needs, as far as the contract permits the arguments."""
    degree, depth = arguments.get("threadpool_count", 1), arguments.get("max_cache_depth", 1)
    method, dropout = arguments.get("method"), arguments.get("lora_dropout", 0)
    if _is_count(degree):
        yield "tp", degree
    if isinstance(method, str) and (base := method.removesuffix(WITHOUT_LORA)) in FORMATS:
        yield "methods", base
        if method != base:
            yield "skip_lora", True
    hidden, intermediate = arguments.get("hidden_size"), arguments.get("moe_intermediate_size")
    if _is_count(hidden) and _is_count(intermediate):
        parts = degree if _is_count(degree) and intermediate % degree == 0 else 1
        if hidden % MULTIPLE or (intermediate // parts) % MULTIPLE:
            yield "odd_sizes", True
    if _is_count(depth):
        yield "max_cache_depth", depth
    if isinstance(dropout, float) and 0 < dropout < 1:
        yield "lora_dropout", True
    if arguments.get("gpu_experts_mask") is not None:
        yield "gpu_experts", True


def declared(engine: str, attributes: Mapping[str, Any], folder: Path | None) -> Capabilities:
    """What engine `engine` declares: its factory's attributes and the file in its folder, where there is one.

    ValueError in one line: a name is unknown; a value has the wrong type or is out of range; the attributes and the
    file give different values; or the contract is newer than this package's.
    """
    inside = attributes.get("capabilities") or {}
    if not isinstance(inside, Mapping):
        raise ValueError(f"engine {engine}: capabilities is a {type(inside).__name__}, it takes a dict")
    found = {name: attributes.get(name) for name in ("contract", "isas", "fp32_sums")} | dict(inside)
    found = {name: value for name, value in found.items() if value is not None}
    where = f"engine {engine}"
    path = folder / FILE if folder is not None else None
    if path is not None and path.is_file():
        where, document = str(path), read_toml(path)
        extra = document.keys() - {"contract", "capabilities"}
        if extra or not isinstance(document.get("capabilities", {}), dict):
            text = f"has {sorted(extra)[0]!r}" if extra else "has no table [capabilities]"
            raise ValueError(f"{where} {text}; it takes contract and the table [capabilities]")
        said = {**document.get("capabilities", {}), **{k: document[k] for k in ("contract",) if k in document}}
        for name, value in said.items():
            if name in found and _plain(found[name]) != _plain(value):
                raise ValueError(f"{where}: {name} is {value!r}, the factory's attribute says {found[name]!r}")
        found |= said
    contract = found.pop("contract", None)
    for name, value in found.items():
        if name not in _TAKES:
            raise ValueError(f"{where}: there is no capability {name!r}; there are {', '.join(_TAKES)}")
        takes, good = _TAKES[name]
        if not good(value):
            raise ValueError(f"{where}: {name} is {value!r}, it takes {takes}")
    if contract is not None and _version(contract, where) > _version(CONTRACT, ""):
        raise ValueError(
            f"{where}: written for contract {contract}, this ktverify judges by {CONTRACT}; install a newer one"
        )
    return Capabilities(contract, **{name: _plain(value) for name, value in found.items()})


def _plain(value: Any) -> Any:
    return tuple(value) if isinstance(value, (list, tuple)) else value


def _version(text: object, where: str) -> tuple[int, int]:
    first, dot, second = text.partition(".") if isinstance(text, str) else ("", "", "")
    if not (first.isdecimal() and dot and second.isdecimal()):
        raise ValueError(f"{where}: contract is {text!r}, it takes two numbers such as {CONTRACT!r}")
    return int(first), int(second)
