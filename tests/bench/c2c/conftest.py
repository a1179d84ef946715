"""One pair of tiny models for all tests of the family: a base and a teacher that differ in everything."""

from __future__ import annotations

from pathlib import Path

import pytest

from ktverify.bench.c2c.models import Side
from ktverify.training.tiny import build_model, make_tiny, make_tokenizer

# widths, layers, heads, head_dim and tokenizer other than the family's own, which the base has
TEACHER = {
    "hidden_size": 104,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 3,
    "head_dim": 24,
    "vocab_size": 448,
}


@pytest.fixture(scope="session")
def sides() -> tuple[Side, Side]:
    """Base and teacher in fp32."""
    rest = {name: size for name, size in TEACHER.items() if name != "vocab_size"}
    mine, theirs = make_tokenizer(), make_tokenizer(TEACHER["vocab_size"])
    teacher = build_model("qwen3", len(theirs), seed=1, sizes=rest).float()
    return Side(build_model("qwen3", len(mine)).float(), mine, "base"), Side(teacher, theirs, "teacher")


@pytest.fixture(scope="session")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Directories of the same two models in bf16."""
    folder = tmp_path_factory.mktemp("pair")
    return make_tiny("qwen3", folder / "base"), make_tiny("qwen3", folder / "teacher", seed=1, sizes=TEACHER)
