"""The keys of a configuration that are about the engine: use_kt and kt_*, checked before torch is imported."""

from __future__ import annotations

from typing import Annotated, Any, Literal, get_args

from pydantic import BaseModel, ConfigDict, Field, ValidationError, ValidationInfo, field_validator
from pydantic_core import PydanticCustomError

from ktverify.system.files import expand

# keys that have one value here -> how it may be written, and the error for another value
ONLY: dict[str, tuple[tuple[object, ...], str]] = {
    "kt_use_wrapper": ((True,), "the engine has no other way in; it takes true. use_kt: false trains without engine"),
}
MOST = 2**31 - 1  # of any count
Count = Annotated[int, Field(ge=1, le=MOST)]


class KtKeys(BaseModel):
    """The engine's keys and their defaults; docs/training.md says what each does."""

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=(), allow_inf_nan=False)

    use_kt: bool = True
    kt_backend: str = "AMXBF16"
    kt_num_threads: Count | None = None
    kt_tp_enabled: bool = False
    kt_tp_count: Count = 1
    kt_use_wrapper: Literal[True] = True
    kt_num_gpu_experts: Annotated[int, Field(ge=0, le=MOST)] = 0
    kt_gpu_experts_mask: str = ""
    kt_gpu_device: str = "cuda"
    kt_numa_nodes: list[Annotated[int, Field(strict=True, ge=0, lt=64)]] | None = None
    kt_weight_path: str = ""

    @field_validator(*ONLY, mode="before")
    @classmethod
    def _only_value(cls, value: Any, info: ValidationInfo) -> Any:
        wanted, reason = ONLY[str(info.field_name)]
        if any(value == one and type(value) is type(one) for one in wanted):
            return value
        raise PydanticCustomError("does_not_exist", reason)

    @field_validator("kt_weight_path", "kt_gpu_experts_mask", mode="before")
    @classmethod
    def _a_path(cls, value: Any) -> Any:
        try:
            return expand(value) if isinstance(value, str) else "" if value is None else value
        except ValueError as error:
            raise PydanticCustomError("path", "{text}", {"text": str(error)}) from None

    @field_validator("*", mode="before")
    @classmethod
    def _true_is_no_number(cls, value: Any, info: ValidationInfo) -> Any:
        """Refuse true and false where a number is wanted: pydantic would take true as 1."""
        kind = cls.model_fields[str(info.field_name)].annotation
        if isinstance(value, bool) and kind is not bool and not any(a is bool or a is True for a in get_args(kind)):
            raise PydanticCustomError("no_bool", "true and false are not what it takes")
        return value

    @property
    def tp(self) -> int:
        """The tensor parallel degree: kt_tp_count where kt_tp_enabled, else 1."""
        return self.kt_tp_count if self.kt_tp_enabled else 1


def problems_of(error: ValidationError) -> list[str]:
    """One line for each key: with several types to choose from, pydantic has an error for each of them."""
    found: dict[str, str] = {}
    for problem in error.errors():
        key = str(problem["loc"][0])
        got = "nothing" if problem["type"] == "missing" else repr(problem["input"])[:200]
        found.setdefault(key, f"{key} got {got}: {problem['msg']}")
    return list(found.values())
