"""Memory is promised once: a call asks for all that it will touch before it touches any of it. Mappings are few."""

from __future__ import annotations

import json
import resource
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from ktverify.engines.native.layer import KTMoEWrapper
from ktverify.engines.run import layer_arguments
from ktverify.spec.cases import Case
from tests.support.command_line import python

pytestmark = pytest.mark.slow
# tens of megabytes in every part: working block, saved block, packed experts, gradients
CASE = Case.parse("E=6,k=2,H=1024,I=768,T=1024,r=64,alpha=128")
MIB = 1 << 20


class Call:
    """One layer before the call that is looked at."""

    def __init__(self, case: Case = CASE) -> None:
        torch.manual_seed(0)
        self.layer = KTMoEWrapper(**layer_arguments(case, threads=1), max_cache_depth=2)
        shapes = self.layer.spec.expert_shapes.values()
        self.base = [torch.randn(case.num_experts, *shape).mul_(0.02).bfloat16() for shape in shapes]
        self.lora = [torch.randn(shape).mul_(0.02).bfloat16() for shape in self.layer.spec.lora_shapes.values()]
        self.x = torch.randn(case.qlen, case.hidden).bfloat16()
        self.ids = torch.randint(case.num_experts, (case.qlen, case.top_k))
        self.weights = torch.rand(case.qlen, case.top_k)

    def load(self) -> None:
        gate_proj, up_proj, down_proj = self.base
        self.layer.load_weights_from_tensors(gate_proj, up_proj, down_proj, torch.arange(CASE.num_experts))

    def init_lora(self) -> list[Tensor]:
        self.layer.init_lora_weights(*self.lora)
        return []

    def pack(self) -> None:
        """All experts are packed by a call of few tokens."""
        slots = torch.arange(CASE.num_experts)[:, None].expand(-1, CASE.top_k).contiguous()
        rows = len(slots)
        self.layer.forward_sft(self.x[:rows], slots, self.weights[:rows], save_for_backward=False)

    def forward(self, save: bool) -> list[Tensor]:
        return [self.layer.forward_sft(self.x, self.ids, self.weights, save_for_backward=save)]

    def backward(self, accumulate: bool = False) -> list[Tensor]:
        grad_input, grads = self.layer.backward(self.x, accumulate=accumulate)
        return [grad_input, *grads.values()]


# name: what comes before, the call
STEPS: dict[str, tuple[tuple[str, ...], Callable[[Call], list[Tensor]]]] = {
    "init_lora_weights": ((), Call.init_lora),
    "a forward that packs": (("load", "init_lora"), lambda call: call.forward(False)),
    "a saved forward that packs": (("load", "init_lora"), lambda call: call.forward(True)),
    "a forward": (("load", "init_lora", "pack"), lambda call: call.forward(False)),
    "a saved forward": (("load", "init_lora", "pack"), lambda call: call.forward(True)),
    "backward": (("load", "init_lora", "pack", "saved"), lambda call: call.backward()),
    "backward with accumulate": (("load", "init_lora", "pack", "saved"), lambda call: call.backward(True)),
}


def prepared(step: str) -> Call:
    call = Call()
    for name in STEPS[step][0]:
        call.forward(True) if name == "saved" else getattr(call, name)()
    call.layer.clear_sft_buffer_cache()
    return call


def resident() -> int:
    """Bytes of this process in pages that belong to no file."""
    status = Path("/proc/self/status").read_text(encoding="ascii")
    return 1024 * int(status.split("RssAnon:")[1].split()[0])


def make_believe(root: Path, free: int) -> None:
    """Let the engine read that so many bytes are free."""
    from ktverify import _native

    (root / "proc").mkdir(exist_ok=True)
    (root / "proc/meminfo").write_text(f"MemAvailable: {free >> 10} kB\n", encoding="ascii")
    _native.read_system_below(str(root))


def promise(step: str, root: Path) -> dict[str, Any]:
    """What a step touches with enough memory, what it does and touches with a little less, and with a little more."""
    from ktverify import _native

    call, act = prepared(step), STEPS[step][1]
    before = resident()
    expected = act(call)
    grown = resident() - before
    del call
    call = prepared(step)
    make_believe(root, int(0.97 * grown))
    before, refused = resident(), ""
    try:
        act(call)
    except MemoryError as error:
        refused = str(error)
    touched = resident() - before
    make_believe(root, int(1.25 * grown) + 4 * MIB)
    # the same call, and it works
    same = all(torch.equal(a, b) for a, b in zip(act(call), expected, strict=True))
    _native.read_system_below("/")
    return {"grown": grown, "refused": refused, "touched": touched, "same": same}


@pytest.mark.parametrize("step", STEPS)
def test_a_call_asks_for_all_that_it_touches(tmp_path: Path, step: str) -> None:
    """In a process of its own, whose memory nothing else uses."""
    program = (
        "import json, sys; from pathlib import Path; from tests.engines import test_memory_promises as here; "
        "print(json.dumps(here.promise(sys.argv[1], Path(sys.argv[2]))))"
    )
    done = python("-c", program, step, tmp_path, OMP_NUM_THREADS="1")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["grown"] > 3 * MIB
    assert " needs " in found["refused"], found
    assert " are available; use fewer tokens" in found["refused"]
    assert found["touched"] < MIB, f"{found['touched']} bytes were touched before the refusal"
    assert found["same"]


def under_limits(kind: int) -> dict[str, int]:
    """A training step under ever higher limits: what was raised how often. The same step works without a limit."""
    counts: dict[str, int] = {}
    key = "VmSize" if kind == resource.RLIMIT_AS else "VmData"
    # few tokens, because it is computed twice at each limit
    case = replace(CASE, qlen=CASE.qlen // 4)
    for extra in (*range(0, 64, 4), *range(64, 200, 16)):
        call = Call(case)
        call.load()
        call.layer.clear_sft_buffer_cache()
        status = Path("/proc/self/status").read_text(encoding="ascii")
        used = 1024 * int(status.split(f"{key}:")[1].split()[0])
        limits = resource.getrlimit(kind)
        resource.setrlimit(kind, (used + extra * MIB, limits[1]))
        raised = "nothing"
        try:
            for act in (Call.init_lora, lambda c: c.forward(True), lambda c: c.backward(True)):
                act(call)
        except BaseException as error:
            raised = type(error).__name__ if " available" in str(error) else repr(error)
        finally:
            resource.setrlimit(kind, limits)
        counts[raised] = counts.get(raised, 0) + 1
        call.init_lora()
        while call.layer.saved_forwards:
            call.backward()
        call.forward(True)
        call.backward(True)
    return counts


@pytest.mark.parametrize("kind", ["RLIMIT_AS", "RLIMIT_DATA"])
def test_a_limit_of_the_process_is_a_memory_error(kind: str) -> None:
    program = (
        "import json, resource, sys; from tests.engines import test_memory_promises as here; "
        "print(json.dumps(here.under_limits(getattr(resource, sys.argv[1]))))"
    )
    done = python("-c", program, kind, OMP_NUM_THREADS="1")
    assert done.returncode == 0, done.stderr
    counts = json.loads(done.stdout)
    assert set(counts) == {"MemoryError", "nothing"}, counts


def mappings(folder: str) -> dict[str, list[int]]:
    """By source of the weights: mappings of this process after each expert of a layer of two parts was packed."""
    case = Case.parse("E=12,k=1,H=1024,I=1408,T=1,r=1,alpha=1")  # 4.1 MiB an expert and part: huge pages
    shapes = KTMoEWrapper(**layer_arguments(case, threads=1, tp=2)).spec.expert_shapes
    base = {name: torch.zeros(case.num_experts, *shape, dtype=torch.bfloat16) for name, shape in shapes.items()}
    named = {
        f"model.layers.0.mlp.experts.{expert}.{name}.weight": tensor[expert].clone()
        for name, tensor in base.items()
        for expert in range(case.num_experts)
    }
    save_file(named, Path(folder, "model.safetensors"))
    found = {}
    for source in ("tensors", "files"):
        path = folder if source == "files" else ""
        layer = KTMoEWrapper(**layer_arguments(case, threads=1, tp=2, weight_path=path))
        if source == "files":
            layer.load_weights()
        else:
            gate_proj, up_proj, down_proj = base.values()
            layer.load_weights_from_tensors(gate_proj, up_proj, down_proj, torch.arange(case.num_experts))
        layer.init_lora_weights(*(torch.zeros(shape) for shape in layer.spec.lora_shapes.values()))
        counts = []
        for expert in range(case.num_experts):
            x, ids = torch.zeros(1, case.hidden, dtype=torch.bfloat16), torch.tensor([[expert]])
            layer.forward_sft(x, ids, torch.ones(1, 1), save_for_backward=False)
            counts.append(len(Path("/proc/self/maps").read_text().splitlines()))
        found[source] = counts
    return found


def test_packed_experts_are_no_mappings_of_their_own(tmp_path: Path) -> None:
    """vm.max_map_count is 65,530; DeepSeek-V3 has 14,848 experts, with four parts 59,392 times packed."""
    program = "import json, sys; from tests.engines import test_memory_promises as here; "
    program += "print(json.dumps(here.mappings(sys.argv[1])))"
    done = python("-c", program, tmp_path, OMP_NUM_THREADS="1")
    assert done.returncode == 0, done.stderr
    for source, counts in json.loads(done.stdout).items():
        assert counts[-1] - counts[0] <= 2, (source, counts)
