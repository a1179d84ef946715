"""Confirm what the report states about kt-kernel beyond single cases, with kt-kernel and torch alone.

    python contract.py             # any Python that has torch and kt-kernel 0.7.2; about a minute
    python contract.py refused     # only the checks whose name contains that text

Every check has its name in the run's accuracy.md. It makes a call that docs/contract.md wants refused, or wants to
return the same bits, and prints what kt-kernel did. "yes": it did what the report states; "NO": it did something else,
so the report is wrong. Each check runs in a process of its own; the exit code is 1 if anything is not confirmed.
"""

from __future__ import annotations

import json
import math
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from kt_kernel import KTMoEWrapper  # type: ignore[import-not-found]

LORA = ("gate_lora_a", "gate_lora_b", "up_lora_a", "up_lora_b", "down_lora_a", "down_lora_b")
BASE = ("gate_proj", "up_proj", "down_proj")
# E experts, K per token, H hidden, I intermediate, T tokens, R rank
E, K, H, I, T, R = 6, 2, 64, 128, 9, 4  # noqa: E741
BF16 = {"dtype": torch.bfloat16}
SECONDS = 60
SHORT = 100  # characters of what is told
# checks run in forked processes, which threads of torch's own would not outlive
torch.set_num_threads(1)

# what a check gives: (True if it is as the report says, what kt-kernel did)
Answer = tuple[bool, str]
CHECKS: dict[str, Callable[[], Answer]] = {}


# ---- a layer and what it is fed


def bare(**more):
    """A layer without weights."""
    given = {
        "layer_idx": 0, "num_experts": E, "num_experts_per_tok": K, "hidden_size": H, "moe_intermediate_size": I,
        "gpu_experts_mask": None, "num_gpu_experts": 0, "cpuinfer_threads": 2, "threadpool_count": 1, "weight_path": "",
        "chunked_prefill_size": 512, "method": "AMXBF16_SFT", "mode": "sft", "lora_rank": R, "lora_alpha": 8.0,
    }  # fmt: skip
    return KTMoEWrapper(**{**given, **more})


def base_weights(e=E, h=H, i=I, seed=0):
    torch.manual_seed(seed)
    shapes = ((e, i, h), (e, i, h), (e, h, i))
    return {name: torch.randn(shape, **BF16) * h**-0.5 for name, shape in zip(BASE, shapes, strict=True)}


def lora_weights(e=E, h=H, i=I):
    torch.manual_seed(1)
    shapes = [(e, R, h), (e, i, R), (e, R, h), (e, i, R), (e, R, i), (e, h, R)]
    return {name: torch.randn(shape, **BF16) * 0.1 for name, shape in zip(LORA, shapes, strict=True)}


def tokens(t=T, e=E, h=H):
    """hidden_states [T, H] bf16, expert_ids [T, k] int64, weights [T, k] fp32."""
    torch.manual_seed(2)
    ids = torch.stack([torch.randperm(e)[:K] for _ in range(t)])
    return {"hidden_states": torch.randn(t, h, **BF16), "expert_ids": ids, "weights": torch.rand(t, K)}


def load(layer, weights, order=None):
    layer.load_weights_from_tensors(*weights.values(), torch.arange(E) if order is None else order)


def lend(layer, lora):
    """init_lora_weights; returns the buffers that backward writes the gradients into."""
    gradients = {name: torch.zeros_like(t) if isinstance(t, torch.Tensor) else t for name, t in lora.items()}
    layer.init_lora_weights(*lora.values(), *gradients.values())
    return gradients


def loaded(lora=None, **more):
    layer = bare(**more)
    load(layer, base_weights())
    lend(layer, lora_weights() if lora is None else lora)
    return layer


def forward(layer, save=True, **changed):
    return layer.forward(*{**tokens(), **changed}.values(), save_for_backward=save)


def upstream(t=T, h=H):
    return torch.ones(t, h, **BF16)


def differing(left, right):
    return f"{int((left != right).sum())} of {left.numel()} elements"


# ---- refusals


def check(name):
    def enter(function):
        CHECKS[name] = function
        return function

    return enter


def refusal(name, act, argument, errors=(ValueError, TypeError)):
    """Enters a check that `act` is refused by one of `errors`, in a text that holds `argument`; the report says no."""

    def asked():
        try:
            act()
        except errors as error:
            return argument not in str(error), f"{type(error).__name__}: {error}"
        except Exception as error:
            return True, f"{type(error).__name__}: {error}"
        return True, "accepted"

    CHECKS[f"refused[{name}]"] = asked


for _name, _value in (("chunked_prefill_size", 0), ("chunked_prefill_size", -3), ("cpuinfer_threads", 0),
                      ("cpuinfer_threads", -3), ("lora_alpha", math.nan), ("lora_alpha", math.inf)):  # fmt: skip
    refusal(f"{_name} {_value}", lambda n=_name, v=_value: bare(**{n: v}), _name)

_SPOILT = {
    "shape": lambda t: t[:, :-1], "too few experts": lambda t: t[:-1], "dimensions": lambda t: t[0],
    "transposed": lambda t: t.transpose(1, 2), "dtype": lambda t: t.half(), "integers": lambda t: t.view(torch.int16),
    "device": lambda t: t.to("meta"), "no tensor": lambda t: t.float().numpy(), "None": lambda t: None,
}  # fmt: skip
for _name in BASE:
    for _what, _spoil in _SPOILT.items():
        refusal(
            f"{_name} {_what}",
            lambda n=_name, s=_spoil: load(bare(), {**base_weights(), n: s(base_weights()[n])}),
            _name,
        )
    refusal(
        f"{_name} shape, of a layer that has weights",
        lambda n=_name: load(loaded(), {**base_weights(), n: base_weights()[n][:, :-1]}),
        _name,
    )


def load_float32():
    load(bare(), {**base_weights(), "gate_proj": base_weights()["gate_proj"].float()})


refusal("gate_proj float32", load_float32, "gate_proj")
for _name in LORA:
    for _what in ("no tensor", "None"):
        refusal(
            f"{_name} {_what}",
            lambda n=_name, s=_SPOILT[_what]: lend(bare(), {**lora_weights(), n: s(lora_weights()[n])}),
            _name,
        )

_MAPS = {
    "twice": torch.tensor([0, 1, 2, 3, 4, 4]), "out of range": torch.tensor([1, 2, 3, 4, 5, 6]),
    "negative": torch.tensor([-1, 0, 1, 2, 3, 4]), "too long": torch.arange(E + 1),
    "dtype": torch.arange(E).float(), "dimensions": torch.arange(E)[None],
}  # fmt: skip
for _what, _order in _MAPS.items():
    refusal(f"physical_map {_what}", lambda o=_order: load(bare(), base_weights(), o), "physical_to_logical_map")

_WRONG = {
    "dtype": {"hidden_states": torch.float32, "expert_ids": torch.int32, "weights": torch.bfloat16},
    "float16": {"hidden_states": torch.float16},
    "float64": {"weights": torch.float64},
}
for _what, _dtypes in _WRONG.items():
    for _name, _dtype in _dtypes.items():
        refusal(f"{_name} {_what}", lambda n=_name, d=_dtype: forward(loaded(), **{n: tokens()[n].to(d)}), _name)
_SPOILT_TOKENS = {
    "columns": lambda t: t[:, :-1], "one dimension": lambda t: t[0], "three dimensions": lambda t: t[None],
    "device": lambda t: t.to("meta"), "no tensor": lambda t: t.tolist(), "None": lambda t: None,
}  # fmt: skip
for _name in ("hidden_states", "expert_ids", "weights"):
    for _what, _spoil in _SPOILT_TOKENS.items():
        if _name == "hidden_states" or _what in ("device", "no tensor", "None"):
            refusal(f"{_name} {_what}", lambda n=_name, s=_spoil: forward(loaded(), **{n: s(tokens()[n])}), _name)


def with_id(value):
    ids = tokens()["expert_ids"]
    ids[5, 1] = value
    forward(loaded(), expert_ids=ids)


for _value in (E, E + 100, -2, 2**31, 2**62, -(2**63)):
    refusal(f"expert id {_value}", lambda v=_value: with_id(v), "expert_ids")


def back(spoil):
    layer = loaded()
    forward(layer)
    layer.backward(spoil(upstream()))


_ROWS = {"too few rows": lambda t: t[:-1], "too many rows": lambda t: torch.cat([t, t]), "no rows": lambda t: t[:0]}
for _what, _spoil in _ROWS.items():
    refusal(f"grad_output {_what}", lambda s=_spoil: back(s), "grad_output", (ValueError, RuntimeError))
_SPOILT_UPSTREAM = {
    "columns": lambda t: t[:, :-1], "dimensions": lambda t: t[0], "dtype": lambda t: t.float(),
    "device": lambda t: t.to("meta"), "None": lambda t: None,
}  # fmt: skip
for _what, _spoil in _SPOILT_UPSTREAM.items():
    refusal(f"grad_output {_what}", lambda s=_spoil: back(s), "grad_output")


def several(count, depth):
    layer = loaded(max_cache_depth=depth)
    for _ in range(count):
        forward(layer)


refusal("two forwards outstanding", lambda: several(2, 1), "max_cache_depth", (RuntimeError,))
refusal("four forwards outstanding of three", lambda: several(4, 3), "max_cache_depth", (RuntimeError,))


def degree(name, intermediate, tp):
    """threadpool_count `tp` has to be refused with a sentence that names it, before anything is loaded."""

    def asked():
        try:
            bare(moe_intermediate_size=intermediate, threadpool_count=tp)
        except Exception as error:
            return "threadpool_count" not in str(error), f"{type(error).__name__}: {error}"
        return True, f"threadpool_count {tp} accepted for moe_intermediate_size {intermediate}"

    CHECKS[name] = asked


_DEGREES = {2049: (2, 4, 8), 2048: (3, 5, 6), 1408: (3,), 768: (5, 7), 14336: (3,), 47: (2,), 48: (5, 7, 9), 1: (2,)}
for _size, _counts in {**_DEGREES, 6: (4, 12)}.items():
    for _tp in _counts:
        degree(f"degree[{_size}-{_tp}]", _size, _tp)
for _tp in (0, -1, -4):
    degree(f"no_degree_at_all[{_tp}]", I, _tp)


@check("out_of_memory")
def out_of_memory():
    """Four times this machine's memory of weights, in tensors of stride 0: MemoryError, with both figures."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    size = math.isqrt(4 * memory // 6)
    layer = bare(num_experts=1, num_experts_per_tok=1, hidden_size=size, moe_intermediate_size=size, lora_rank=1)
    wide = torch.empty(1, **BF16).expand(1, size, size)
    try:
        layer.load_weights_from_tensors(wide, wide, wide, torch.zeros(1, dtype=torch.int64))
    except Exception as error:
        return not isinstance(error, MemoryError), f"{type(error).__name__}: {error}"
    return True, "accepted"


# ---- sizes


def dies(h, i):
    """Loading has to work, for the contract has no smallest multiple; the report says that the process ends."""

    def asked():
        layer = bare(hidden_size=h, moe_intermediate_size=i)
        load(layer, base_weights(h=h, i=i))
        lend(layer, lora_weights(h=h, i=i))
        layer.forward(*tokens(h=h).values(), save_for_backward=True)
        layer.backward(upstream(h=h))
        return False, "loaded and computed"

    return asked


for _name in ("nothing_is_written", "odd_addresses", "repeats", "threads", "varying_tokens"):
    CHECKS[f"behaviour_at_odd_sizes[{_name}]"] = dies(203, 137)
CHECKS["trajectory[odd_sizes_idle_experts]"] = dies(97, 46)


# ---- behaviour


@check("behaviour[outlier_token]")
def outlier_token():
    """One token 48 times as large as the others: its gate values fall below -88, where exp(-g) is beyond fp32."""
    layer = loaded()
    given = tokens()
    given["hidden_states"][0] *= 48
    output = layer.forward(*given.values(), save_for_backward=True)
    grad_input, _ = layer.backward(upstream())
    bad = int((~grad_input[0].isfinite()).sum())
    fine = bool(output.isfinite().all())
    return fine and bad > 0, f"{bad} of {H} elements of that token's grad_input are NaN, its output is finite"


@check("behaviour[outstanding_forwards]")
def outstanding_forwards():
    layer = loaded(max_cache_depth=3)
    for _ in range(3):
        forward(layer)
    layer.backward(upstream())
    try:
        layer.backward(upstream())
    except RuntimeError as error:
        return True, f"max_cache_depth=3, three forwards, the second backward: {error}"
    return False, "two backwards of three forwards"


@check("behaviour[failed_update]")
def failed_update():
    """A parameter with a row too few: update_lora_weights has to refuse it by name."""
    layer = loaded()
    layer.gate_lora_a = lora_weights()["gate_lora_a"][:, :-1].contiguous()
    try:
        layer.update_lora_weights()
    except (ValueError, TypeError) as error:
        return "gate_lora_a" not in str(error), f"{type(error).__name__}: {error}"
    return True, f"gate_lora_a of {list(layer.gate_lora_a.shape)} accepted"


@check("behaviour[skip_lora]")
def skip_lora():
    """SkipLoRA leaves LoRA out of the backward; the output has to be that of the method without it."""
    nothing = {name: torch.zeros_like(tensor) for name, tensor in lora_weights().items()}
    full, none = forward(loaded(), save=False), forward(loaded(nothing), save=False)
    found = forward(loaded(method="AMXBF16_SFT_SkipLoRA"), save=False)
    same = bool(torch.equal(found, none))
    return not torch.equal(found, full), f"the output is {'that without LoRA' if same else 'another'}"


@check("parameters_count_only_once_synchronised")
def parameters_before_update():
    lora = lora_weights()
    layer = loaded(lora)
    before = forward(layer, save=False)
    for tensor in lora.values():
        tensor.mul_(-3)
    after = forward(layer, save=False)
    told = f"no update_lora_weights, and {differing(before, after)} of the output differ"
    return not torch.equal(before, after), told


def gradients_after(change):
    """grad_input of one forward, after `change` was done to its layer and LoRA in between."""
    lora = lora_weights()
    layer = loaded(lora)
    forward(layer)
    change(layer, lora)
    return layer.backward(upstream())[0]


def scaled(layer, lora):
    for tensor in lora.values():
        tensor.mul_(-3)


def scaled_and_updated(layer, lora):
    scaled(layer, lora)
    layer.update_lora_weights()


def _between(change, told):
    def asked():
        expected, found = gradients_after(lambda layer, lora: None), gradients_after(change)
        return not torch.equal(expected, found), f"{told}: {differing(expected, found)} of grad_input differ"

    return asked


CHECKS["backward_uses_the_weights_of_its_forward"] = _between(scaled, "parameters changed before the backward")
CHECKS["process[update_while_forward_waits]"] = _between(scaled_and_updated, "update_lora_weights before the backward")


@check("fresh_process[threads_have_a_ceiling]")
def threads_have_a_ceiling():
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:1])
    torch.set_num_threads(1)
    before = len(os.listdir("/proc/self/task"))
    forward(loaded(cpuinfer_threads=64))
    more = len(os.listdir("/proc/self/task")) - before
    return more > 1, f"{more} threads started on 1 processor"


def resident():
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@check("fresh_process[idle_experts_take_no_memory]")
def idle_experts_take_no_memory():
    """One token reaches two of 32 experts of 1024 x 1024; the report's layer has 128."""
    weights, lora = base_weights(32, 1024, 1024), lora_weights(32, 1024, 1024)
    one = 3 * 2 * 1024 * 1024
    before = resident()
    layer = bare(num_experts=32, hidden_size=1024, moe_intermediate_size=1024)
    load(layer, weights, torch.arange(32))
    lend(layer, lora)
    layer.forward(*tokens(1, 32, 1024).values(), save_for_backward=True)
    layer.backward(upstream(1, 1024))
    grown = resident() - before
    return grown > 16 * one, f"{grown / 1e6:.0f} MB for two of 32 experts of {one / 1e6:.0f} MB each"


# ---- each in a process of its own


def alone(function: Callable[[], Answer]) -> Answer:
    """What `function` gives in a forked process; one that dies was neither refused nor computed."""
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        signal.alarm(SECONDS)
        quiet = os.open(os.devnull, os.O_WRONLY)
        for stream in (1, 2):
            os.dup2(quiet, stream)
        try:
            answer = function()
        except BaseException as error:
            answer = (False, f"the check itself failed: {type(error).__name__}: {error}")
        os.write(write, json.dumps(answer).encode()[:4000])
        os._exit(0)
    os.close(write)
    with os.fdopen(read, "rb") as stream:
        said = stream.read()
    _, status = os.waitpid(child, 0)
    if os.WIFSIGNALED(status):
        return os.WTERMSIG(status) != signal.SIGALRM, f"the process died of {signal.Signals(os.WTERMSIG(status)).name}"
    confirmed, text = json.loads(said)
    return confirmed, " ".join(text.split())


def control() -> Answer:
    """What kt-kernel is not accused of: if this fails too, the checks show nothing."""
    layer = loaded()
    output = forward(layer)
    grad_input, _ = layer.backward(upstream())
    return bool(output.isfinite().all() and grad_input.isfinite().all()), "forward and backward of an ordinary layer"


def main(wanted: str) -> int:
    works, told = alone(control)
    if not works:
        print(f"nothing can be shown here, for this fails as well: {told}")
        return 2
    chosen = {name: function for name, function in CHECKS.items() if wanted in name}
    found = {}
    for number, (name, function) in enumerate(chosen.items(), start=1):
        if sys.stderr.isatty():
            print(f"\r{number} of {len(chosen)} ", end="\r", file=sys.stderr, flush=True)
        found[name] = alone(function)
    bad = [name for name, (confirmed, _) in found.items() if not confirmed]
    if not chosen:
        print(f"no check's name holds {wanted!r}")
        return 2
    verdict = f"NOT CONFIRMED: {len(bad)} of" if bad else "CONFIRMED: all"
    print(f"{verdict} {len(found)} accusations of kt-kernel beyond single cases.\n")
    width = max(map(len, found))
    print(f"confirmed  {'check':{width}}  kt-kernel")
    for name in sorted(found, key=lambda name: found[name][0]):
        confirmed, text = found[name]
        print(f"{'yes' if confirmed else 'NO':9}  {name:{width}}  {text[:SHORT]}")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main(" ".join(sys.argv[1:])))
