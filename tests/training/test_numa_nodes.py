"""The NUMA nodes of a configuration: the key, and where its value goes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from ktverify.training.infer import init_cpu_infer
from ktverify.training.kt_keys import KtKeys
from ktverify.training.tiny import build_model
from ktverify.training.wrap import wrap_moe_layers

NODES = sorted(int(path.name[4:]) for path in Path("/sys/devices/system/node").glob("node[0-9]*"))


def test_the_key_takes_a_list_of_nodes() -> None:
    assert KtKeys(kt_numa_nodes=[0, 1]).kt_numa_nodes == [0, 1]
    assert KtKeys().kt_numa_nodes is None
    for wrong in ("0,1", 0, [True], [-1], [0.5], [64]):
        with pytest.raises(ValueError, match="kt_numa_nodes"):
            KtKeys.model_validate({"kt_numa_nodes": wrong})


def test_settings_refuse_nodes_that_are_not_here_and_another_number_than_parts() -> None:
    absent = next(node for node in range(63, -1, -1) if node not in NODES)
    with pytest.raises(ValueError, match=rf"^numa_nodes names node {absent}; "):
        init_cpu_infer(2, 1, numa_nodes=[absent])
    with pytest.raises(ValueError, match=r"^numa_nodes is \[0\]; it takes .* each of 2 parts"):
        init_cpu_infer(2, 2, numa_nodes=[0])


@pytest.mark.skipif(not NODES, reason="the system names no NUMA nodes")
def test_settings_reach_the_engine_of_a_layer() -> None:
    infer = init_cpu_infer(2, 2, numa_nodes=[NODES[0]] * 2)
    model: Any = wrap_moe_layers(build_model("qwen3_moe"), infer)
    wrapper = model._kt_wrappers[0]
    x = torch.ones(3, wrapper.hidden_size)
    with torch.no_grad():
        wrapper(x, torch.zeros(3, 1, dtype=torch.int64), torch.ones(3, 1))
    assert wrapper.engine.spec.numa_nodes == (NODES[0],) * 2
    assert len(wrapper.engine.placement()) == 2
