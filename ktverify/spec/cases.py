"""Cases: sizes, kind of data, kind of routing and seed of one comparison. Imports no torch.

The rows of catalogue.toml are cases with a name and a reason. `Case.parse` also reads cases written by hand, and
`Case.parse(case.id)` gives the case back.
"""

from __future__ import annotations

import difflib
import fnmatch
import functools
import importlib
import math
import re
import sys
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from ktverify.spec.names import tensor_shapes

CATALOGUE = Path(__file__).with_name("catalogue.toml")
CUSTOM = "custom"

# kind of data -> what it is
DATA_KINDS: dict[str, str] = {
    "gaussian": "hidden_states and grad_output N(0, 1); weights scaled so that gate and up are of order 1",
    "integer": "sparse small integers: every sum is exact in bf16 operands with fp32 sums, in any order",
    "large": "gaussian, hidden_states times 2^8 and grad_output times 2^12",
    "tiny": "gaussian, hidden_states and grad_output times 2^-20",
    "strong_lora": "gaussian, LoRA B four times as large as the base, so that LoRA rules the output",
    "zero_b": "gaussian, every LoRA B zero, as a fresh adapter has it",
    "nan_row": "gaussian, one NaN in the hidden state of the middle token",
    "inf_row": "gaussian, one Inf in the hidden state of the middle token",
}
# kind of data -> magnitude of hidden_states and of grad_output, where it is not the case's own. Gates of 2^8 saturate
# and overflow exp; at 2^12, one rounding to bf16 moves a gate by more than the width of SiLU's bend, and silu' is
# random. grad_output enters linearly
_MAGNITUDES: dict[str, tuple[float, float]] = {"large": (2.0**8, 2.0**12), "tiny": (2.0**-20, 2.0**-20)}
# kind of routing -> what it is
ROUTING_KINDS: dict[str, str] = {
    "uniform": "k different experts per token, all equally likely",
    "zipf": "k different experts per token, the n-th most popular with weight 1/n",
    "one_expert": "one expert is in slot 0 of every token, the other slots are uniform over the other experts",
    "duplicate": "slot 1 of every token names the expert of slot 0 again",
    "masked": "a quarter of the slots is -1; token 0 keeps all of its slots, the last of several tokens has none",
    "all_masked": "every slot is -1",
}
LORA_DTYPES = ("bfloat16", "float32")
TIERS = ("default", "big", "full")
USUAL_TIERS = ("default", "big")  # those of a run that names none
MAPS = ("identity", "permuted")

# name in the text of a case -> field of Case
_KEYS: dict[str, str] = {
    "E": "num_experts",
    "k": "top_k",
    "H": "hidden",
    "I": "intermediate",
    "T": "qlen",
    "r": "rank",
    "alpha": "alpha",
    "data": "data",
    "routing": "routing",
    "lora": "lora_dtype",
    "map": "physical",
    "magnitude": "magnitude",
}
# keys that a hand-written case prints only where they differ from these defaults
_OPTIONAL: dict[str, object] = {"map": "identity", "magnitude": 1.0}
_SIZES = ("E", "k", "H", "I", "T", "r")


@dataclass(frozen=True)
class Case:
    """One comparison: E x [I, H] experts, T tokens with k experts each, LoRA of rank r and scale alpha / r.

    `Case.parse(case.id)` gives it back. ValueError for sizes, kinds and degrees that are no case.
    """

    name: str
    why: str
    num_experts: int
    top_k: int
    hidden: int
    intermediate: int
    qlen: int
    rank: int
    alpha: float
    data: str = "gaussian"
    routing: str = "uniform"
    lora_dtype: str = "bfloat16"
    seed: int = 0
    tier: str = "default"
    tp: tuple[int, ...] = (1,)
    physical: str = "identity"  # physical_map: identity, or a permutation of the slots
    magnitude: float = 1.0  # of hidden_states (2^8 at most) and grad_output, gaussian data only

    def __post_init__(self) -> None:
        for label, name in (*((f"{key} ({_KEYS[key]})", _KEYS[key]) for key in _SIZES), ("seed", "seed")):
            number, least = getattr(self, name), 0 if name in ("qlen", "seed") else 1
            if isinstance(number, bool) or not isinstance(number, int) or number < least:
                raise ValueError(f"{label} is {number!r}, it takes a whole number of {least} or more")
        if self.top_k > self.num_experts:
            raise ValueError(f"k is {self.top_k}, it takes at most E = {self.num_experts}")
        for label, number in (("alpha", self.alpha), ("magnitude", self.magnitude)):
            if not 0 < number < math.inf:
                raise ValueError(f"{label} is {number!r}, it takes a positive finite number")
        if self.magnitude != 1 and self.data != "gaussian":
            raise ValueError(f"magnitude is {self.magnitude:g}, data={self.data} has its own; it takes data=gaussian")
        for label, value, allowed in (
            ("data", self.data, tuple(DATA_KINDS)),
            ("routing", self.routing, tuple(ROUTING_KINDS)),
            ("lora", self.lora_dtype, LORA_DTYPES),
            ("tier", self.tier, TIERS),
            ("map", self.physical, MAPS),
        ):
            if value not in allowed:
                raise ValueError(f"{label} is {value!r}, it takes one of {', '.join(allowed)}")
        if self.routing == "duplicate" and self.top_k < 2:
            raise ValueError("routing=duplicate needs two slots per token, k is 1")
        for degree in self.tp:
            if degree < 1 or self.intermediate % degree:
                raise ValueError(f"tp degree {degree} does not divide I = {self.intermediate}")
        if self.data == "integer" and math.frexp(self.scaling)[0] != 0.5:
            power = f"data=integer takes a power of two: alpha = {2 * self.rank} would do"
            raise ValueError(f"alpha / rank is {self.scaling:g}, {power}")
        if self.data in ("nan_row", "inf_row") and self.qlen < 2:
            raise ValueError(f"data={self.data} needs another token to be isolated from, T is {self.qlen}")

    @property
    def scaling(self) -> float:
        """alpha / rank, the factor of the LoRA part."""
        return self.alpha / self.rank

    @property
    def magnitudes(self) -> tuple[float, float]:
        """Standard deviations of hidden_states (and so of the gates) and of grad_output; no unit."""
        most = _MAGNITUDES["large"][0]
        return _MAGNITUDES.get(self.data, (min(self.magnitude, most), self.magnitude))

    @property
    def exact(self) -> bool:
        """True where every engine with fp32 sums must give the same bits."""
        return self.data == "integer"

    @property
    def id(self) -> str:
        """The case as text that `parse` takes: `name@seed=0`, `name,T=1@seed=0` or `E=8,k=2,...@seed=0`."""
        row = catalogue().get(self.name)
        if row is None:
            return f"{self.spec}@seed={self.seed}"
        changed = [key for key, field in _KEYS.items() if getattr(self, field) != getattr(row, field)]
        overrides = "".join(f",{key}={_text(getattr(self, _KEYS[key]))}" for key in changed)
        return f"{self.name}{overrides}@seed={self.seed}"

    @property
    def brief(self) -> str:
        """The id without seed 0 and without fields at their default, for tables; `parse` takes it."""
        default = {field.name: field.default for field in fields(Case)}
        shown = [(key, getattr(self, name)) for key, name in self._printed() if getattr(self, name) != default[name]]
        text = self.id if self.name in catalogue() else ",".join(f"{key}={_text(value)}" for key, value in shown)
        return text.removesuffix("@seed=0") + (f"@seed={self.seed}" if self.seed and "@" not in text else "")

    @property
    def spec(self) -> str:
        """The case without its name and seed: `E=8,k=2,H=64,I=96,T=33,r=4,alpha=8,...`."""
        return ",".join(f"{key}={_text(getattr(self, field))}" for key, field in self._printed())

    def _printed(self) -> list[tuple[str, str]]:
        """The keys that a hand-written case prints: all but optional ones with their default."""
        return [(key, field) for key, field in _KEYS.items() if getattr(self, field) != _OPTIONAL.get(key)]

    def with_seed(self, seed: int) -> Case:
        """The same case on other numbers."""
        return replace(self, seed=seed)

    @classmethod
    def parse(cls, text: str) -> Case:
        """The case that `text` names: `NAME[,KEY=VALUE...][@seed=N]` or `E=8,k=2,H=64,I=96,T=33,r=4[,...][@seed=N]`.

        ValueError quotes the part that was not understood, with the nearest names.
        """
        body, found_seed = _split_seed(text.strip())
        parts = [part.strip() for part in body.split(",") if part.strip()]
        if not parts:
            raise ValueError(f"empty case {text!r}; `python -m ktverify list` prints the names")
        if "=" in parts[0]:
            return _custom(text, _read_pairs(text, parts), found_seed or 0)
        row = catalogue().get(parts[0])
        if row is None:
            near = difflib.get_close_matches(parts[0], catalogue(), n=3, cutoff=0.4)
            hint = f"did you mean {', '.join(near)}?" if near else "`python -m ktverify list` prints the names"
            raise ValueError(f"no case is called {parts[0]!r}; {hint}")
        changes = _read_pairs(text, parts[1:])
        if "intermediate" in changes:
            changes["tp"] = _degrees(changes["intermediate"])
        return replace(row, seed=row.seed if found_seed is None else found_seed, **changes)


def expects_zero(case: Case, tensor: str) -> bool:
    """True where the case makes `tensor` all zero (or empty), so that zero is right and not suspect."""
    if case.qlen == 0 or case.routing == "all_masked":
        return True
    # dA = s (dg B)^T x: with B = 0, only the gradients of B are not zero
    return case.data == "zero_b" and tensor in ("grad_gate_lora_a", "grad_up_lora_a", "grad_down_lora_a")


def broken_token(case: Case) -> int | None:
    """The row of hidden_states that contains a NaN or Inf; None where all are finite."""
    return case.qlen // 2 if case.data in ("nan_row", "inf_row") else None


def tensors_of(case: Case) -> dict[str, tuple[int, ...]]:
    """Shapes of all tensors that the case produces, by name."""
    return tensor_shapes(case.num_experts, case.top_k, case.hidden, case.intermediate, case.qlen, case.rank)


def flops(case: Case, *, backward: bool = False) -> int:
    """Floating-point operations of one forward (or forward and backward) when every slot is taken; a product is two."""
    rows = case.qlen * case.top_k
    base = 3 * 2 * rows * case.hidden * case.intermediate
    lora = 2 * rows * case.rank * 3 * (case.hidden + case.intermediate)
    # the base weights are frozen, so backward has one product for each of the forward; LoRA has two
    return base + lora + (base + 2 * lora if backward else 0)


def read_toml(path: Path) -> dict[str, Any]:
    """The document at `path`. OSError where it cannot be read, ValueError that names it for a file that is not TOML."""
    # tomllib came with Python 3.11; tomli is the same code, and a dependency before that
    parser = importlib.import_module("tomllib" if sys.version_info >= (3, 11) else "tomli")
    try:
        document: dict[str, Any] = parser.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is no TOML: {error}") from None
    return document


@functools.cache
def catalogue() -> dict[str, Case]:
    """All rows of catalogue.toml by name, in the file's order. ValueError names a bad row."""
    rows = {}
    for name, table in read_toml(CATALOGUE).items():
        try:
            rows[name] = _from_table(name, table)
        except (ValueError, TypeError) as error:
            raise ValueError(f"{CATALOGUE.name}, row {name}: {error}") from error
        if not re.fullmatch(r"[a-z][a-z0-9_]*", name) or name == CUSTOM:
            raise ValueError(f"{CATALOGUE.name}, row {name}: a name is lower-case letters, digits and _, not {CUSTOM}")
    return rows


def select(glob: str | None = None, tier: str | tuple[str, ...] | None = None, data: str | None = None) -> list[Case]:
    """The rows whose name (or id) matches the shell pattern `glob` (several with commas), of that tier and data.

    A text that is itself a case (`deepseek_v3_t4@seed=5`, `E=8,k=2,...`) selects that case. Empty if none matches.
    """
    if glob is not None and ("=" in glob or "@" in glob):
        return [Case.parse(glob)]
    tiers = TIERS if tier is None else (tier,) if isinstance(tier, str) else tier
    patterns = None if glob is None else [part.strip() for part in glob.split(",") if part.strip()]
    return [
        case
        for case in catalogue().values()
        if case.tier in tiers
        and (data is None or case.data == data)
        and (patterns is None or any(fnmatch.fnmatchcase(case.name, pattern) for pattern in patterns))
    ]


def _from_table(name: str, table: dict[str, Any]) -> Case:
    """The case of one table of catalogue.toml. ValueError for missing or unknown keys, and for what is no case."""
    missing = [key for key in ("why", *_SIZES, "alpha") if key not in table]
    known = ("why", *_KEYS, "tier", "tp")
    unknown = [key for key in table if key not in known]
    if missing or unknown:
        takes = f"it takes why, {', '.join(_KEYS)}, tier, tp"
        raise ValueError(f"missing keys: {missing}, unknown keys: {unknown}; {takes}")
    if len(table["why"]) < 20:
        raise ValueError("why takes a sentence that says what the case is for")
    found: dict[str, Any] = {_KEYS.get(key, key): value for key, value in table.items()}
    found["tp"] = tuple(found.get("tp", (1,)))
    for field in {"alpha", "magnitude"} & found.keys():
        found[field] = float(found[field])
    return Case(name=name, seed=0, **found)


def _split_seed(text: str) -> tuple[str, int | None]:
    body, at, tail = text.partition("@")
    if not at:
        return body, None
    match = re.fullmatch(r"seed=(\d+)", tail.strip())
    if match is None:
        raise ValueError(f"case {text!r}: behind @ stands {tail!r}, it takes seed=N")
    return body, int(match.group(1))


def _read_pairs(text: str, parts: list[str]) -> dict[str, Any]:
    types = {field.name: field.type for field in fields(Case)}
    found: dict[str, Any] = {}
    for part in parts:
        key, equals, value = part.partition("=")
        field = _KEYS.get(key.strip())
        if not equals or field is None:
            raise ValueError(f"case {text!r}: {part!r} is not understood, it takes {', '.join(f'{k}=' for k in _KEYS)}")
        if field in found:
            raise ValueError(f"case {text!r}: {key} stands there twice")
        kind = {"int": int, "float": float}.get(str(types[field]), str)
        try:
            found[field] = kind(value.strip())
        except ValueError:
            raise ValueError(f"case {text!r}: {key} is {value!r}, it takes a number") from None
    return found


def _custom(text: str, pairs: dict[str, Any], seed: int) -> Case:
    missing = [key for key in _SIZES if _KEYS[key] not in pairs]
    if missing:
        raise ValueError(f"case {text!r}: {', '.join(missing)} missing; a hand-written case tells {', '.join(_SIZES)}")
    pairs.setdefault("alpha", 2.0 * pairs["rank"])
    return Case(name=CUSTOM, why="written by hand", seed=seed, tp=_degrees(pairs["intermediate"]), **pairs)


def _degrees(intermediate: int) -> tuple[int, ...]:
    return tuple(degree for degree in (1, 2, 4) if intermediate % degree == 0)


def _text(value: object) -> str:
    if isinstance(value, float):
        short = format(value, "g")
        return short if float(short) == value else repr(value)
    return str(value)
