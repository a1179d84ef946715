"""Read YAML: errors in one line, no key twice, and 1e-4 is a number."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import yaml

from ktverify.system.files import EXAMPLES
from ktverify.system.text import read_text


class _Loader(yaml.SafeLoader):
    """YAML's own loader takes the last of two equal keys in silence, and 1e-4 for a text."""

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        node: yaml.MappingNode = super().compose_mapping_node(anchor)
        # as they are written: keys that come by << may stand there as well
        seen: set[str] = set()
        for key in (key for key, _ in node.value if isinstance(key, yaml.ScalarNode)):
            if key.value in seen:
                line = key.start_mark.line + 1
                raise yaml.MarkedYAMLError(problem=f"the key {key.value!r} stands twice, again in line {line}")
            seen.add(key.value)
        return node


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"), list("-+.0123456789")
)


def read_yaml(path: Path) -> Any:
    """The value of a YAML file. ValueError for anything else."""
    return parse_yaml(read_text(path), str(path))


def read_keys(path: Path) -> dict[Any, Any]:
    """The keys and values of a configuration. ValueError for anything else."""
    if not path.is_file():
        # a wheel has the examples that help names, beside its modules
        example = EXAMPLES / path.name if path.parent.name == "examples" else path
        hint = f"; an example is {example}" if example.is_file() else ""
        raise ValueError(f"there is no configuration {path}{hint}")
    found = read_yaml(path)
    if not isinstance(found, dict):
        held = "nothing" if found is None else f"a {type(found).__name__}"
        raise ValueError(f"{path} holds {held}; it takes keys and values")
    return found


def parse_yaml(text: str, where: str) -> Any:
    """The value of a YAML text. ValueError for anything else; `where` is named."""
    try:
        return yaml.load(text, _Loader)
    except (yaml.YAMLError, RecursionError, ValueError) as error:
        raise ValueError(f"{where} is no YAML: {' '.join(str(error).split())}") from None
