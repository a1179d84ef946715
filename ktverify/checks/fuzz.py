"""Random calls of an engine, each result compared with a new layer's bits and with the oracle.

A session is one layer and a sequence of calls that its seed draws: forwards with and without saving, backwards, steps
of the LoRA parameters, new weights, bad input, threads and forks, with tensors of any strides and at any address. What
the contract promises of a sequence is that each call gives what it gives alone. So each result must have the bits of
the same call on a new layer, and be within the budgets. In every second session the native engine has base weights as
codes; the new layer then has the bf16 weights that they stand for.
"""

from __future__ import annotations

import random
import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from ktverify.checks.altered_inputs import TOKENS, at_offset, changed
from ktverify.checks.judging import judged
from ktverify.checks.processes import digest, fork_and_run
from ktverify.checks.quantised_inputs import as_bf16, draw, layer_of
from ktverify.checks.target import Target, bits, expect, same_bits
from ktverify.engines.registry import NATIVE
from ktverify.engines.run import backward_of, forward, run_layer
from ktverify.judge.dequantise import CODINGS, Coding
from ktverify.spec.cases import LORA_DTYPES, MAPS, Case
from ktverify.spec.inputs import Inputs, make_inputs
from ktverify.spec.names import BASE_NAMES, LORA_NAMES, OUTPUT

CALLS = 14  # of a session
_ROUTING = ("uniform", "zipf", "one_expert", "masked", "all_masked")
_REFUSALS = (ValueError, TypeError, RuntimeError)


class _Draw(random.Random):
    """random.Random with the choices of a session."""

    def size(self, most: int) -> int:
        """From 1 to `most`; every second one beside a multiple of 16, where blocks end."""
        if self.random() < 0.5:
            return self.randint(1, most)
        return min(most, max(1, 16 * self.randint(0, most // 16) + self.randint(-1, 1)))

    def case(self, coding: Coding | None) -> Case:
        """The sizes of a layer; every expert is reached, so that make_inputs draws the weights of all. Those of 4-bit
        codes are multiples of their group, in each part."""
        experts, tp = self.randint(1, 6), self.choice((1, 1, 2, 3))
        hidden, width = self.size(96), self.size(96 // tp)
        if coding is not None and coding.bits == 4:
            hidden, width = (coding.group * self.randint(1, max(1, 96 // coding.group)) for _ in range(2))
        text = (
            f"E={experts},k={experts},H={hidden},I={tp * width},T=1,r={self.size(36)},"
            f"alpha={self.choice((0.5, 4, 16, 33))},lora={self.choice(LORA_DTYPES)},map={self.choice(MAPS)}"
        )
        return replace(Case.parse(f"{text}@seed={self.randint(0, 2**30)}"), tp=(tp,))

    def tokens(self, layer: Inputs, top_k: int, most: int) -> Inputs:
        """Another batch for a layer: up to `most` tokens with `top_k` experts each."""
        routing = self.choice(_ROUTING if top_k < 2 else (*_ROUTING, "duplicate"))
        sizes: dict[str, Any] = {"qlen": self.choice((0, 1, self.size(most))), "top_k": top_k, "routing": routing}
        batch = make_inputs(replace(layer.case, seed=self.randint(0, 2**30), **sizes))
        for name in BASE_NAMES:
            setattr(batch, name, getattr(layer, name))
        batch.lora, batch.physical_map = layer.lora, layer.physical_map
        return batch

    def elsewhere(self, tensor: Tensor) -> Tensor:
        """The same values with other strides, at another address, or as a parameter."""
        how = self.randrange(6)
        if how == 0 or tensor.numel() == 0:
            return tensor.clone()
        if how == 1:
            return at_offset(tensor, tensor.element_size() * self.randint(0, 7))
        if how == 2 and tensor.dim() > 1:
            return tensor.transpose(0, 1).clone(memory_format=torch.contiguous_format).transpose(0, 1)
        if how == 3:
            wide = torch.zeros((*tensor.shape[:-1], 2 * tensor.shape[-1] + 1), dtype=tensor.dtype)
            return wide[..., 1::2].copy_(tensor)
        if how == 4 and tensor.dtype == torch.float32:
            return torch._neg_view(-tensor)
        return tensor.clone().requires_grad_(tensor.is_floating_point())


@dataclass
class Session:
    """One layer of `target` with what it must know: `lora` as of its last update, the forwards that wait.

    trace: the calls so far, one line each. Each is also printed to stderr, because the call may end the process.
    """

    target: Target
    seed: int
    trace: list[str] = field(default_factory=list)
    compared: int = 0

    def run(self) -> int:
        """Make the calls; returns the number of results that were compared. AssertionError with the trace."""
        self.draw = _Draw(self.seed)
        # the contract lets other engines declare which codes they take
        codes = self.target.engine == NATIVE and self.draw.random() < 0.5
        self.coding = self.draw.choice(list(CODINGS.values())) if codes else None
        case = self.draw.case(self.coding)
        self.top_k = self.draw.randint(1, min(4, case.num_experts))
        self.most = self.draw.size(70)
        self.depth = self.draw.randint(1, 3)
        self.inputs = make_inputs(case)
        self.waiting: list[tuple[Inputs, dict[str, Tensor]]] = []
        how = {"chunked_prefill_size": self.most, "max_cache_depth": self.depth, "num_experts_per_tok": self.top_k}
        self.how: dict[str, Any] = {**how, "tp": case.tp[0], "threads": self.draw.randint(1, 4)}
        self._note(f"{case.id} k={self.top_k} {self.how}{f' {self.coding.label}' if self.coding else ''}")
        if self.coding is None:
            self.layer = self.target.layer(case, self.inputs, **self.how)
        else:
            coded = draw(self.coding, case)
            self.layer = layer_of(self.target, coded, case, self.inputs, **self.how)
            self.inputs = as_bf16(coded, self.inputs)
        calls = [self.forward, self.forward, self.train, self.train, self.backward, self.step, self.bad, self.clear]
        calls += [self.lora_anew, self.weights_anew]
        # the contract asks these of the native engine alone
        calls += [self.threads, self.fork] if self.target.engine == NATIVE else []
        for _ in range(CALLS):
            self.draw.choice(calls)()
        while self.waiting:
            self.backward()
        return self.compared

    def _note(self, text: str) -> None:
        self.trace.append(text)
        print(text, file=sys.stderr, flush=True)

    def _batch(self) -> Inputs:
        return self.draw.tokens(self.inputs, self.top_k, self.most)

    def _alone(self, batch: Inputs) -> dict[str, Tensor]:
        """What a new layer gives for one forward and backward of `batch`, after its judgement by the oracle."""
        other = {**self.how, "threads": self.draw.randint(1, 4), "max_cache_depth": 1}
        found = run_layer(self.target.layer(batch.case, batch, **other), batch)
        judged(self.target, f"a new layer, {batch.case.id}", batch.case, found, batch)
        return found

    def _expect(self, what: str, right: dict[str, Tensor], found: dict[str, Tensor]) -> None:
        for name, tensor in found.items():
            expect(same_bits(tensor, right[name]), f"{what}: {name} has other bits than on a new layer")
        self.compared += len(found)

    def _elsewhere(self, batch: Inputs) -> Inputs:
        return changed(batch, **{name: self.draw.elsewhere(getattr(batch, name)) for name in TOKENS})

    # ---- the calls

    def forward(self) -> None:
        """One that is not saved."""
        batch = self._batch()
        self._note(f"forward T={batch.case.qlen} {batch.case.routing}")
        given = self._elsewhere(batch)
        before = [bits(getattr(given, name)).clone() for name in TOKENS]
        # the new layer first, so that this call is the latest of the process
        right = self._alone(batch)
        self._expect("forward", right, {OUTPUT: forward(self.layer, given, save=False)})
        kept = all(torch.equal(a, bits(getattr(given, name))) for a, name in zip(before, TOKENS, strict=True))
        expect(kept, "forward wrote to its arguments")

    def train(self) -> None:
        """A forward that waits for its backward, or is refused where too many wait."""
        batch = self._batch()
        self._note(f"saved forward T={batch.case.qlen} {batch.case.routing}, {len(self.waiting)} wait")
        given = self._elsewhere(batch)
        if len(self.waiting) == self.depth:
            self._refused(f"more than {self.depth} saved forwards", lambda: forward(self.layer, given, save=True))
            return
        right = self._alone(batch)
        self._expect("saved forward", right, {OUTPUT: forward(self.layer, given, save=True)})
        self.waiting.append((batch, right))

    def backward(self) -> None:
        """Of the newest forward that waits; refused where none does."""
        self._note(f"backward, {len(self.waiting)} wait")
        if not self.waiting:
            self._refused("backward without a forward", lambda: self.layer.backward(self.inputs.grad_output))
            return
        batch, right = self.waiting.pop()
        self._expect("backward", right, backward_of(self.layer, self._elsewhere(batch)))

    def step(self) -> None:
        """Write to some parameters in one of several ways, then update_lora_weights."""
        written = {name: tensor.clone() for name, tensor in self.inputs.lora.items()}
        names = self.draw.sample(LORA_NAMES, self.draw.randint(1, 6))
        ways = [self.draw.randrange(4) for _ in names]
        self._note(f"step of {', '.join(names)} {ways}")
        for name, way in zip(names, ways, strict=True):
            parameter = getattr(self.layer, name)
            factor = self.draw.choice((0.5, -1.0, 1.25))
            written[name].mul_(factor)
            with torch.no_grad():
                if way == 0:
                    parameter.mul_(factor)
                elif way == 1:
                    parameter.data.mul_(factor)
                elif way == 2:
                    setattr(self.layer, name, written[name].clone())
                else:
                    parameter.copy_(written[name])
        if self.draw.random() < 0.3:
            # without an update the layer computes with the old values
            self.forward()
        self.layer.update_lora_weights()
        self.inputs = changed(self.inputs, **written)

    def lora_anew(self) -> None:
        """LoRA of the other dtype or other values; where a forward waits, nothing."""
        if self.waiting:
            return
        dtype = self.draw.choice(LORA_DTYPES)
        if dtype != self.inputs.case.lora_dtype:
            # an engine that has packed the base weights needs them again
            self.weights_anew()
        case = replace(self.inputs.case, lora_dtype=dtype, seed=self.draw.randint(0, 2**30))
        self._note(f"init_lora_weights, {dtype}")
        lora = make_inputs(case).lora
        self.layer.init_lora_weights(*(self.draw.elsewhere(lora[name]) for name in LORA_NAMES))
        self.inputs = replace(changed(self.inputs, **lora), case=replace(self.inputs.case, lora_dtype=dtype))

    def weights_anew(self) -> None:
        """Other base weights and another map; where a forward waits, nothing."""
        if self.waiting:
            return
        case = replace(self.inputs.case, seed=self.draw.randint(0, 2**30), physical=self.draw.choice(MAPS))
        self._note(f"load_weights_from_tensors, {case.physical} map")
        new = make_inputs(case)
        if self.coding is None:
            base = [self.draw.elsewhere(new.slotted(name)).detach() for name in BASE_NAMES]
            self.layer.load_weights_from_tensors(*base, new.physical_map)
        else:
            coded = draw(self.coding, case)
            self.layer.load_weights_from_tensors(**coded.arguments(new.physical_map))
            new = as_bf16(coded, new)
        kept = {name: getattr(new, name) for name in (*BASE_NAMES, "physical_map")}
        self.inputs = replace(changed(self.inputs, **kept), case=replace(self.inputs.case, physical=case.physical))

    def clear(self) -> None:
        self._note("clear_sft_buffer_cache")
        self.layer.clear_sft_buffer_cache()

    def bad(self) -> None:
        """One bad call of several; the calls after it show that it changed nothing."""
        rows = max(1, self.most)
        x = torch.zeros(rows, self.inputs.case.hidden, dtype=torch.bfloat16)
        ids = torch.zeros(rows, self.top_k, dtype=torch.int64)
        w = torch.zeros(rows, self.top_k)
        beyond = torch.full_like(ids, self.inputs.case.num_experts)
        lora = [self.inputs.lora[name] for name in LORA_NAMES]
        calls: dict[str, Callable[[], object]] = {
            "an id of E": lambda: self.layer.forward_sft(x, beyond, w, save_for_backward=True),
            "an id of -2": lambda: self.layer.forward_sft(x, ids - 2, w, save_for_backward=True),
            "fp32 hidden_states": lambda: self.layer.forward_sft(x.float(), ids, w, save_for_backward=True),
            "a wrong width": lambda: self.layer.forward_sft(x[:, :-1], ids, w, save_for_backward=True),
            "int32 ids": lambda: self.layer.forward_sft(x, ids.int(), w, save_for_backward=True),
            "one weight less": lambda: self.layer.forward_sft(x, ids, w[:-1], save_for_backward=True),
            "too many rows": lambda: self.layer.forward_sft(
                *(t.repeat(2, 1)[: self.most + 1] for t in (x, ids, w)), save_for_backward=True
            ),
            "no tensor": lambda: self.layer.forward_sft(None, ids, w, save_for_backward=True),
            "LoRA of another rank": lambda: self.layer.init_lora_weights(*(t[..., :-1] for t in lora)),
            "grad_output of another width": lambda: self.layer.backward(x[:, :-1]),
        }
        name = self.draw.choice(list(calls))
        self._note(f"bad call: {name}")
        self._refused(name, calls[name])

    def _refused(self, what: str, call: Callable[[], object]) -> None:
        try:
            call()
        except _REFUSALS:
            return
        raise AssertionError(f"{what} was accepted")

    def threads(self) -> None:
        """Forwards of several Python threads on this layer at once."""
        batches = [self._batch() for _ in range(3)]
        self._note(f"3 threads, T={[batch.case.qlen for batch in batches]}")
        found: dict[int, Tensor] = {}

        def work(index: int) -> None:
            for _ in range(3):
                found[index] = forward(self.layer, batches[index], save=False)

        workers = [threading.Thread(target=work, args=(index,)) for index in range(3)]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
        expect(len(found) == 3, "a thread's forward raised an exception")
        for index, output in found.items():
            self._expect("forward in a thread", self._alone(batches[index]), {OUTPUT: output})

    def fork(self) -> None:
        """A forked process computes with this layer."""
        if self.waiting:
            return
        batch = self._batch()
        self._note(f"fork, T={batch.case.qlen}")
        right = self._alone(batch)
        found = fork_and_run(self.target, batch.case, self.layer, batch)
        expect(found == digest(right), "a forked process computes other bits than a new layer")


def run_session(target: Target, seed: int) -> tuple[int, int]:
    """(calls, compared results) of the session of `seed`. AssertionError with its calls where one is wrong."""
    torch.set_num_threads(1)
    # a draw whose sums cancel says nothing about the engine
    session = Session(replace(target, gates_off=target.gates_off | {"trust"}), seed)
    try:
        compared = session.run()
    except NotImplementedError:
        raise
    except Exception as error:
        calls = "\n".join(f"  {line}" for line in session.trace)
        raise AssertionError(f"{type(error).__name__}: {error}\n{calls}") from error
    return len(session.trace), compared
