"""KTMoEWrapper: a Mixture-of-Experts layer with LoRA on the experts, computed on the CPU by the native engine."""

from __future__ import annotations

import copy
import dataclasses
import threading
import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from ktverify import _native
from ktverify.engines import argument_checks
from ktverify.engines.native.base_weights import Sources, sources_of
from ktverify.engines.native.checkpoint import sources_in_files
from ktverify.engines.native.copies import made_again
from ktverify.engines.native.device_experts import DeviceExperts
from ktverify.engines.native.gradient_memory import gradient_tensors
from ktverify.engines.native.isa import chosen_isa, require_isa
from ktverify.engines.native.phase_times import StageTimes
from ktverify.engines.native.placement import placement_of
from ktverify.engines.native.shortage import memory_errors
from ktverify.engines.native.turns import in_turn, in_turn_where
from ktverify.engines.plain_tensors import values_of
from ktverify.spec.names import BASE_NAMES, GRAD_NAMES, LORA_NAMES
from ktverify.system.limits import processors


class KTMoEWrapper:
    """E experts of gate_proj, up_proj [I, H], down_proj [H, I] (bf16, frozen) with LoRA of rank r (bf16 or fp32).

        g = x Wgᵀ + s (x Agᵀ) Bgᵀ,  u likewise,  h = silu(g) ⊙ u,  y = h Wdᵀ + s (h Adᵀ) Bdᵀ
        s = lora_alpha / lora_rank
        out[t] = Σ_j weights[t, j] · y of expert expert_ids[t, j]

    Operands are bf16, sums fp32, and each result is rounded once. The same call gives the same bits for any number of
    threads. An expert's weights are packed when its first token arrives. Until all are packed, the tensors given to
    `load_weights_from_tensors` are kept and must not change. If the caller has no reference to them any more, an
    expert's part is released as soon as it is packed.

    Arguments are those of the contract, and in addition:
    isa: one of `available_isas()`; None takes the variable KTVERIFY_ISA, and without it the best. RuntimeError for a
        name that cannot run here; it is never replaced.
    max_cache_depth: most forwards with save_for_backward=True that wait for their backward; backward takes the newest.
    gpu_experts_mask: bool [E], a tensor or a list: the experts that torch computes on `gpu_device`, while the engine
        computes the others; num_gpu_experts: the first so many instead. See `set_gpu_experts_mask`.
    numa_nodes: the NUMA node of each tensor-parallel part, threadpool_count of them, for its weights, buffers and
        workers; None spreads the parts over the nodes. ValueError for a node that this process may not use.
    """

    def __init__(
        self,
        *,
        layer_idx: int,
        num_experts: int,
        num_experts_per_tok: int,
        hidden_size: int,
        moe_intermediate_size: int,
        num_gpu_experts: int = 0,
        gpu_experts_mask: torch.Tensor | Sequence[bool] | None = None,
        gpu_device: str = "cuda",
        cpuinfer_threads: int,
        threadpool_count: int = 1,
        weight_path: str = "",
        chunked_prefill_size: int = 25600,
        method: str = "AMXBF16_SFT",
        mode: str = "sft",
        lora_rank: int = 16,
        lora_alpha: float = 32.0,
        lora_dropout: float = 0.0,
        max_cache_depth: int = 1,
        isa: str | None = None,
        numa_nodes: Sequence[int] | None = None,
    ) -> None:
        given = {name: value for name, value in locals().items() if name != "self"}
        self.spec = argument_checks.LayerSpec(**given)
        if self.spec.lora_dropout > 0:
            raise NotImplementedError(f"lora_dropout is {lora_dropout}; the native engine has no dropout: pass 0")
        self.layer_idx = layer_idx
        self.weight_path = weight_path
        self.isa: str = chosen_isa() if isa is None else isa
        require_isa(self.isa)
        self._own = threading.local()  # of the calling thread: whether it made a saved forward, its grad_weights
        self._latest_grad_weights: torch.Tensor | None = None
        self.gate_lora_a: torch.Tensor
        self.gate_lora_b: torch.Tensor
        self.up_lora_a: torch.Tensor
        self.up_lora_b: torch.Tensor
        self.down_lora_a: torch.Tensor
        self.down_lora_b: torch.Tensor
        self._lora_dtype: torch.dtype | None = None
        self._sources: Callable[[], Sources | None] = lambda: None  # the engine owns them, until all are packed
        self._weights_loaded = False
        spec = self.spec
        self._native: Any = _native.Layer(
            num_experts=spec.num_experts,
            top_k=spec.num_experts_per_tok,
            hidden=spec.hidden_size,
            intermediate=spec.moe_intermediate_size,
            rank=spec.lora_rank,
            scaling=spec.scaling,
            parts=spec.threadpool_count,
            threads=min(spec.cpuinfer_threads, processors()),
            max_rows=spec.chunked_prefill_size,
            max_cache_depth=spec.max_cache_depth,
            lora_backward=spec.lora_backward,
            isa=self.isa,
            numa_nodes=spec.numa_nodes or (),
        )
        self._device = DeviceExperts(spec) if spec.num_gpu_experts else None

    @property
    def threads(self) -> int:
        """Workers of a call: cpuinfer_threads, but at most the processors that this process may use, and those of their
        part's NUMA nodes."""
        return int(self._native.threads)

    placement = placement_of

    @property
    def packed_experts(self) -> int:
        """Number of packed experts: those that a token has reached."""
        return int(self._native.packed_experts)

    @property
    def saved_forwards(self) -> int:
        """Forwards that wait for their backward."""
        return int(self._native.saved_forwards)

    @memory_errors("load_weights_from_tensors")
    def load_weights_from_tensors(
        self,
        gate_proj: torch.Tensor,
        up_proj: torch.Tensor,
        down_proj: torch.Tensor,
        physical_map: torch.Tensor,
        scales: Sequence[torch.Tensor] | None = None,
        zero_points: Sequence[torch.Tensor] | None = None,
    ) -> None:
        """Take base weights: gate_proj, up_proj [E, I, H], down_proj [E, H, I] bf16 by slot, of any strides.

        physical_map int64 [E]: slot p contains logical expert physical_map[p]. expert_ids, LoRA tensors and gradients
        are in logical order. Quantised methods take codes, scales, zero points: docs/contract.md, and quantised.py.
        """
        self._load(sources_of(self.spec, (gate_proj, up_proj, down_proj), physical_map, scales, zero_points))

    @memory_errors("load_weights")
    def load_weights(
        self, physical_map: torch.Tensor | None = None, *, first: int = 0, total: int | None = None
    ) -> None:
        """Take the base weights of layer `layer_idx` from the safetensors file or folder `weight_path`, in the method's
        format (names: checkpoint.py, formats: weight_files.py). Files are mapped: an expert's pages are read when its
        first token arrives, and released once packed. physical_map as above; slot p is expert p of these, and by
        default logical expert p. first, total: those from `first` on of the checkpoint's `total`; by default all."""
        if physical_map is None:
            physical_map = torch.arange(self.spec.num_experts, device="cpu")
        slots = argument_checks.check_physical_map(self.spec, physical_map)
        self._load(sources_in_files(self.spec, slots, first, total))

    @memory_errors("base_weights")
    @in_turn
    def base_weights(self) -> dict[str, torch.Tensor]:
        """New tensors with the base weights, bit for bit: gate_proj, up_proj [E, I, H], down_proj [E, H, I] bf16 by
        logical expert; of codes, the bf16 that they stand for. RuntimeError before they were loaded."""
        argument_checks.check_ready(self._weights_loaded, True, "base_weights")
        experts = self.spec.num_experts
        found = {
            name: torch.empty((experts, *shape), dtype=torch.bfloat16, device="cpu")
            for name, shape in self.spec.expert_shapes.items()
        }
        for expert in range(experts):
            self._read_expert(expert, [found[name][expert] for name in BASE_NAMES])
        return found

    def _read_expert(self, expert: int, matrices: list[torch.Tensor]) -> None:
        """Copy a logical expert's gate_proj, up_proj, down_proj into three contiguous tensors."""
        to = [matrix.data_ptr() for matrix in matrices]
        sources = self._sources()  # without them, all experts are packed
        if not self._native.unpack(expert, *to) and sources is not None:
            sources.read(expert, matrices)
            self._native.unpack(expert, *to)  # another thread may have packed it meanwhile, and released its source

    def __deepcopy__(self, memo: dict[int, Any]) -> KTMoEWrapper:
        arguments, base, lora = self._state()
        copied: KTMoEWrapper = made_again(KTMoEWrapper, arguments, base, copy.deepcopy(lora, memo))
        return copied

    def __reduce__(self) -> tuple[Any, ...]:
        return made_again, (KTMoEWrapper, *self._state())

    @in_turn
    def _state(self) -> tuple[dict[str, Any], dict[str, torch.Tensor] | None, list[torch.Tensor] | None]:
        """All that makes another engine of the same weights, of codes their bf16; saved forwards stay with this one."""
        base = self.base_weights() if self._weights_loaded else None
        lora = [getattr(self, name) for name in LORA_NAMES] if self._lora_dtype is not None else None
        return {**dataclasses.asdict(self.spec), "method": self.spec.bf16_method}, base, lora

    @in_turn
    def _load(self, sources: Sources) -> None:
        device = self._device
        held = device.with_base(device.held.experts, sources.read, device.held.lora) if device else None
        sources.load(self._native)
        if device is not None and held is not None:
            device.held = held
        self._sources = weakref.ref(sources)
        self._weights_loaded = True

    @memory_errors("init_lora_weights")
    @in_turn
    def init_lora_weights(
        self, gate_lora_a: torch.Tensor, gate_lora_b: torch.Tensor, up_lora_a: torch.Tensor, up_lora_b: torch.Tensor,
        down_lora_a: torch.Tensor, down_lora_b: torch.Tensor,
    ) -> None:  # fmt: skip
        """Take gate_lora_a, up_lora_a [E, r, H], gate_lora_b, up_lora_b [E, I, r], down_lora_a [E, r, I], down_lora_b
        [E, H, r], all bf16 or all fp32. They become the parameters `layer.gate_lora_a` …; a non-contiguous one is
        copied."""
        given = (gate_lora_a, gate_lora_b, up_lora_a, up_lora_b, down_lora_a, down_lora_b)
        lora = argument_checks.check_lora(self.spec, dict(zip(LORA_NAMES, given, strict=True)))
        lora = {n: t if t.is_contiguous() and not t.is_neg() else values_of(t).contiguous() for n, t in lora.items()}
        self._snapshot(lora)
        self.__dict__.update(lora)

    def _snapshot(self, lora: Mapping[str, torch.Tensor]) -> None:
        values = [values_of(tensor).contiguous() for tensor in lora.values()]
        dtype = values[0].dtype
        device = self._device
        held = device.with_lora(device.held, dict(zip(LORA_NAMES, values, strict=True))) if device else None
        self._native.update_lora([value.data_ptr() for value in values], dtype == torch.float32)
        if device is not None and held is not None:
            device.held = held
        self._lora_dtype = dtype

    @memory_errors("set_gpu_experts_mask")
    @in_turn
    def set_gpu_experts_mask(self, gpu_experts_mask: torch.Tensor | Sequence[bool]) -> None:
        """Compute these experts, bool [E], on `gpu_device` from now on, and all others in the engine.

        Takes the LoRA parameters over, like update_lora_weights. Saved forwards have their backward where they were
        computed. The engine's memory keeps the weights of experts that leave it, so that they can come back."""
        spec = dataclasses.replace(self.spec, num_gpu_experts=0, gpu_experts_mask=gpu_experts_mask)
        device = self._device or DeviceExperts(spec)
        if self._lora_dtype is not None:
            self.update_lora_weights()
        held = device.with_base(spec.gpu_experts, self._read_expert if self._weights_loaded else None)
        if self._lora_dtype is not None:
            held = device.with_lora(held, {name: values_of(getattr(self, name)) for name in LORA_NAMES})
        device.held, self.spec, self._device = held, spec, device

    @memory_errors("update_lora_weights")
    @in_turn
    def update_lora_weights(self) -> None:
        """Give the engine the present values of all six parameters at once. A saved forward's backward uses its own."""
        argument_checks.check_ready(True, self._lora_dtype is not None, "update_lora_weights")
        lora = argument_checks.check_lora(self.spec, {name: getattr(self, name) for name in LORA_NAMES})
        if lora[LORA_NAMES[0]].dtype != self._lora_dtype:
            raise TypeError(
                f"the LoRA parameters have dtype {lora[LORA_NAMES[0]].dtype}; init_lora_weights got "
                f"{self._lora_dtype}: call it again to change the dtype"
            )
        self._snapshot(lora)

    def forward_sft(
        self,
        hidden_states: torch.Tensor,
        expert_ids: torch.Tensor,
        weights: torch.Tensor,
        save_for_backward: bool = True,
    ) -> torch.Tensor:
        """hidden_states [T, H] bf16, expert_ids [T, k] int64, weights [T, k] fp32 -> output [T, H] bf16.

        A slot with id -1 contributes nothing."""
        return self.forward_with_ticket(hidden_states, expert_ids, weights, save=save_for_backward)[0]

    @in_turn_where("_device")
    @memory_errors("forward_sft")
    def forward_with_ticket(
        self,
        hidden_states: torch.Tensor,
        expert_ids: torch.Tensor,
        weights: torch.Tensor,
        *,
        save: bool = True,
        room: int = 0,
    ) -> tuple[torch.Tensor, int]:
        """`forward_sft`, and the ticket of the saved forward for `backward_of` or `drop`; 0 if it was not saved.

        room: with 0, a saved forward beyond max_cache_depth is a RuntimeError; with another number, the forward is
        saved only while fewer than `room` wait."""
        argument_checks.check_ready(self._weights_loaded, self._lora_dtype is not None, "forward_sft")
        tokens = argument_checks.check_forward(self.spec, hidden_states, expert_ids, weights)
        x, ids, slot_weights = (values_of(t).contiguous() for t in (hidden_states, expert_ids, weights))
        device, begun = self._device, None
        if device is not None:
            argument_checks.check_expert_ids(ids, self.spec.num_experts)
            begun = device.launch(x, ids, slot_weights, save=bool(save))
            ids = begun.others
        output = torch.empty((tokens, self.spec.hidden_size), dtype=torch.bfloat16, device="cpu")
        sources = self._sources() if tokens else None
        released = sources.before_packing(self._native) if sources is not None else 0
        x_at, ids_at, weights_at, output_at = (tensor.data_ptr() for tensor in (x, ids, slot_weights, output))
        ticket = self._native.forward(tokens, x_at, ids_at, weights_at, output_at, bool(save), room, released)
        if device is not None and begun is not None:
            device.add_output(begun, output)
            if ticket:
                device.keep(ticket, begun)
        if ticket:
            self._own.made_one = True
        return output, ticket

    @property
    def grad_weights(self) -> torch.Tensor | None:
        """fp32 [T, k]: the gradient of the routing weights of this thread's last backward; in a thread without one, of
        the last backward of all."""
        return getattr(self._own, "grad_weights", self._latest_grad_weights)

    def backward(
        self, grad_output: torch.Tensor, *, accumulate: bool = False
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """grad_output [T, H] bf16 of the newest saved forward -> grad_input [T, H] bf16 and the six LoRA gradients, in
        their parameters' shapes and dtype. `grad_weights`, fp32 [T, k], is then the gradient of the routing weights.

        The newest is that of the calling thread; a thread that never saved a forward takes the newest of all.
        accumulate: return the sum of the LoRA gradients of all backward calls with accumulate since
        update_lora_weights, added in fp32 and rounded once."""
        grad_input, grads, grad_weights = self.backward_of(0, grad_output, accumulate=accumulate)
        self._own.grad_weights = self._latest_grad_weights = grad_weights
        return grad_input, grads

    @in_turn_where("_device")
    @memory_errors("backward")
    def backward_of(
        self, ticket: int, grad_output: torch.Tensor, *, accumulate: bool = False
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor], torch.Tensor]:
        """`backward` of the forward with this ticket, and the gradient of its routing weights. RuntimeError for one
        that was used or dropped."""
        spec = self.spec
        if not self.saved_forwards:
            argument_checks.check_backward(spec, grad_output, None)
        # the engine compares the rows, because it alone knows which forward is taken
        tokens = argument_checks.check_grad_output(spec, grad_output)
        upstream = values_of(grad_output).contiguous()
        device, of_any_thread = self._device, not getattr(self._own, "made_one", False)
        part = None
        if device is not None:
            if accumulate:
                raise NotImplementedError("accumulate=True with experts on gpu_device: add the gradients yourself")
            ticket = ticket or device.newest(of_any_thread=of_any_thread)
            work = device.work_of(ticket)
            part = device.launch_backward(work, upstream) if work and len(work.slots) == tokens else None
        grad_input = torch.empty((tokens, spec.hidden_size), dtype=torch.bfloat16, device="cpu")
        # it cannot change while the forward waits
        dtype = torch.float32 if self._native.lora_fp32 else torch.bfloat16
        written = tokens * spec.num_experts_per_tok if spec.lora_backward else 0
        grads, zero = gradient_tensors(list(spec.lora_shapes.values()), dtype, written=written)
        grad_weights = torch.empty((tokens, spec.num_experts_per_tok), dtype=torch.float32, device="cpu")
        self._native.backward(
            tokens, upstream.data_ptr(), grad_input.data_ptr(), [grad.data_ptr() for grad in grads],
            dtype == torch.float32, zero, grad_weights.data_ptr(), accumulate, ticket, of_any_thread,
        )  # fmt: skip
        named = dict(zip(GRAD_NAMES, grads, strict=True))
        if device is not None:
            device.drop(ticket)
            if part is not None:
                device.add_gradients(part, grad_input, named, grad_weights)
        return grad_input, named, grad_weights

    def drop(self, ticket: int) -> None:
        """Free the saved forward of this ticket; does nothing if it was used or dropped before."""
        self._native.drop(ticket)
        if self._device is not None:
            self._device.drop(ticket)

    def fingerprint(self, tensors: Sequence[torch.Tensor]) -> tuple[object, ...]:
        """A key of the tensors' shapes, dtypes and bytes, computed about as fast as memory is read. A change of one
        element always changes it, whoever wrote it; a larger one goes unseen with a chance of about 2^-64."""
        values = [values_of(tensor).cpu().contiguous() for tensor in tensors]
        content = self._native.fingerprint([(value.data_ptr(), value.nbytes) for value in values])
        return tuple((value.shape, value.dtype) for value in values), content

    def record_stages(self, on: bool = True) -> None:
        """Record from now on where each forward and backward spends its time; costs one clock read per task."""
        self._native.record_stages(on)

    def stage_times(self) -> StageTimes:
        """The times of the last recorded forward or backward. RuntimeError without one."""
        found = self._native.stage_times()
        if not found["workers"]:
            raise RuntimeError("no call was recorded: call record_stages(), then forward_sft or backward")
        return StageTimes.of(found)

    @staticmethod
    def clear_sft_buffer_cache() -> None:
        """Return to the operating system the working buffers that layers share, and the memory of freed LoRA gradients.
        Saved forwards keep their memory."""
        _native.clear_buffer_cache()
