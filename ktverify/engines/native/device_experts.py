"""Experts of a layer that a torch device computes while the engine computes the others.

On a GPU a call is launched on a stream of its own and runs while the engine computes; the device "cpu", which stands in
for one, computes first. Operands are bf16; the experts' outputs are weighted and summed in fp32.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional

from ktverify.engines.argument_checks import LayerSpec, check_gpu_device
from ktverify.spec.names import GRAD_NAMES, LORA_NAMES

# copies a logical expert's gate_proj, up_proj [I, H] and down_proj [H, I] into three tensors
Read = Callable[[int, list[Tensor]], None]
# grouped_mm takes rows of a multiple of 16 bytes
MULTIPLE = 8


@dataclass
class DeviceWork:
    """What the device computes of a forward: n token slots, sorted by expert.

    experts: those that have a slot, by their place on the device. output [T, H] fp32: their part of the output, on the
    CPU once `_finish` returned. On the device: row [n], the token of each slot; slots [T, k], where each slot is among
    the n, n for one of the engine's; w [n]; y [n, H] bf16; leaves: x [n, H] and, where LoRA is trained, six tensors.
    """

    experts: dict[int, int]
    output: Tensor
    row: Tensor
    slots: Tensor
    w: Tensor
    y: Tensor
    leaves: list[Tensor]


@dataclass(frozen=True)
class Launched:
    """A forward. others [T, k] int64: the ids of the engine's slots, -1 for the device's. work: None for no slot."""

    others: Tensor
    work: DeviceWork | None


@dataclass(frozen=True)
class DeviceGradients:
    """The device's part of a backward, on the CPU once `_finish` returned: grad_input [T, H] fp32, grad_weights [T, k]
    fp32, zero for the engine's slots, and the six LoRA gradients by an expert's place. experts: those that have any."""

    experts: dict[int, int]
    grad_input: Tensor
    grad_weights: Tensor
    lora: list[Tensor]


@dataclass(frozen=True)
class Held:
    """What the device holds of m experts, whose place is their number there.

    place [E + 1] int64, on the CPU: an expert's place, -1 for one of the engine's; the last is that of id -1.
    base: gate over up [m, 2 I, H], down [m, H, I]. lora: six bf16 tensors by LORA_NAMES, of ranks for grouped_mm.
    """

    experts: tuple[int, ...]
    place: Tensor
    base: tuple[Tensor, Tensor] | None = None
    lora: tuple[Tensor, ...] = ()


class DeviceExperts:
    """The experts of a layer on `spec.gpu_device`: base weights, LoRA and saved forwards.

    held: what calls compute with from now on; saved forwards keep what they were computed with.
    """

    def __init__(self, spec: LayerSpec) -> None:
        self.spec = spec
        self.device = check_gpu_device(spec.gpu_device)
        self._stream = torch.cuda.Stream(self.device) if self.device.type == "cuda" else None  # type: ignore[no-untyped-call]
        self.held = self.with_base(spec.gpu_experts, None)
        self._saved: dict[int, tuple[int, Launched]] = {}  # by ticket, with the thread that made it; oldest first
        sizes = (spec.hidden_size, spec.moe_intermediate_size)
        self._grouped = hasattr(functional, "grouped_mm") and not any(size % MULTIPLE for size in sizes)

    # ---- weights

    def with_base(self, experts: tuple[int, ...], read: Read | None, lora: tuple[Tensor, ...] = ()) -> Held:
        """These experts, with their LoRA. read: None before the layer has base weights."""
        if read is None:
            return Held(experts, self._places(experts), None, lora)
        h, i = self.spec.hidden_size, self.spec.moe_intermediate_size
        gate_up = torch.empty((len(experts), 2 * i, h), dtype=torch.bfloat16, device=self.device)
        down = torch.empty((len(experts), h, i), dtype=torch.bfloat16, device=self.device)
        for at, expert in enumerate(experts):
            both = torch.empty((2 * i, h), dtype=torch.bfloat16, device="cpu")
            last = torch.empty((h, i), dtype=torch.bfloat16, device="cpu")
            read(expert, [both[:i], both[i:], last])
            gate_up[at].copy_(both)
            down[at].copy_(last)
        return Held(experts, self._places(experts), (gate_up, down), lora)

    def with_lora(self, held: Held, lora: Mapping[str, Tensor]) -> Held:
        """`held` with the present values of the six LoRA tensors [E, …] by LORA_NAMES."""
        short = -self.spec.lora_rank % MULTIPLE if self._grouped else 0
        found = []
        for name in LORA_NAMES:
            # new tensors, because the parameters change in place
            own = lora[name].detach()[list(held.experts)].to(torch.bfloat16)
            own = functional.pad(own, (0, 0, 0, short) if name.endswith("_a") else (0, short)) if short else own
            found.append(own.to(self.device))
        return replace(held, lora=tuple(found))

    def _places(self, experts: tuple[int, ...]) -> Tensor:
        places = torch.full((self.spec.num_experts + 1,), -1, dtype=torch.int64, device="cpu")
        places[list(experts)] = torch.arange(len(experts), device="cpu")
        return places

    # ---- forward

    def launch(self, x: Tensor, ids: Tensor, weights: Tensor, *, save: bool) -> Launched:
        """Start the forward of the slots of these experts: x [T, H] bf16, ids [T, k] int64 of 0 to E - 1 or -1, weights
        [T, k] fp32, on the CPU. save: a backward may follow."""
        held = self.held
        places = held.place[ids]
        flat = places.reshape(-1)
        order = torch.argsort(flat, stable=True)
        counts = torch.bincount(flat + 1, minlength=len(held.experts) + 1).tolist()
        order, counts = order[counts[0] :], counts[1:]
        others = torch.where(places < 0, ids, -1)
        if not len(order):
            return Launched(others, None)
        where = torch.full_like(flat, len(order))
        where[order] = torch.arange(len(order), device="cpu")
        trained = save and self.spec.lora_backward
        with self._computing(grad=save):
            row, slots = self._there(order // ids.shape[1]), self._there(where.view(ids.shape))
            w = self._there(weights.reshape(-1)[order])
            rows = self._there(x)[row].requires_grad_(save)
            lora = [value.detach().requires_grad_(trained) for value in held.lora]
            y = self._experts(held, rows, lora, counts)
            output = self._back(_over_slots(y.detach().float() * w[:, None], slots))
        experts = {at: expert for at, expert in enumerate(held.experts) if counts[at]}
        return Launched(others, DeviceWork(experts, output, row, slots, w, y, [rows, *(lora if trained else [])]))

    def _experts(self, held: Held, x: Tensor, lora: list[Tensor], counts: list[int]) -> Tensor:
        """y [n, H] of x [n, H], whose rows are sorted by expert; counts: the rows of each."""
        assert held.base is not None
        ends = self._there(torch.tensor(counts, device="cpu").cumsum(0).to(torch.int32))

        def product(value: Tensor, weight: Tensor) -> Tensor:
            """value [n, K] times weight [m, N, K] of each row's expert."""
            if self._grouped:
                return functional.grouped_mm(value, weight.transpose(-2, -1), offs=ends)
            parts = zip(torch.split(value, counts), weight.unbind(), strict=True)
            return torch.cat([functional.linear(part, matrix) for part, matrix in parts])

        def with_lora(base: Tensor, value: Tensor, a: Tensor, b: Tensor) -> Tensor:
            low = self.spec.scaling * product(product(value, a), b)
            return base + (low if self.spec.lora_backward else low.detach())

        gate_up, down = held.base
        gate, up = product(x, gate_up).chunk(2, -1)
        h = functional.silu(with_lora(gate, x, *lora[:2])) * with_lora(up, x, *lora[2:4])
        return with_lora(product(h, down), h, *lora[4:])

    def add_output(self, begun: Launched, output: Tensor) -> None:
        """Add the device's part to the engine's output [T, H] bf16, in fp32, once it is there."""
        if begun.work is not None:
            self._finish()
            output.copy_(begun.work.output.add_(output))
            begun.work.output = output[:0]  # its memory

    # ---- saved forwards

    def keep(self, ticket: int, begun: Launched) -> None:
        """Save a forward under the ticket that the engine gave it."""
        self._saved[ticket] = (threading.get_ident(), begun)

    def newest(self, *, of_any_thread: bool) -> int:
        """The ticket of the newest saved forward, of the calling thread or of any; 0 for none."""
        own = threading.get_ident()
        return max((ticket for ticket, (of, _) in list(self._saved.items()) if of_any_thread or of == own), default=0)

    def work_of(self, ticket: int) -> DeviceWork | None:
        """What the device computed of a saved forward, None for nothing."""
        return self._saved[ticket][1].work if ticket in self._saved else None

    def drop(self, ticket: int) -> None:
        """Free the saved forward of a ticket; does nothing where there is none."""
        self._saved.pop(ticket, None)

    # ---- backward

    def launch_backward(self, work: DeviceWork, grad_output: Tensor) -> DeviceGradients:
        """Start the backward of a saved forward's work: grad_output [T, H] bf16, on the CPU. It stays saved."""
        with self._computing(grad=True):
            d_out = self._there(grad_output)[work.row].float()
            d_y = (d_out * work.w[:, None]).to(torch.bfloat16)
            d_w = (d_out * work.y.detach().float()).sum(1)
            # the forward waits on, if the engine refuses this backward
            d_x, *d_lora = torch.autograd.grad(work.y, work.leaves, d_y, retain_graph=True)
            return DeviceGradients(
                work.experts,
                self._back(_over_slots(d_x.float(), work.slots)),
                self._back(functional.pad(d_w, (0, 1))[work.slots]),
                [self._back(gradient) for gradient in d_lora],
            )

    def add_gradients(
        self, found: DeviceGradients, grad_input: Tensor, grads: Mapping[str, Tensor], grad_weights: Tensor
    ) -> None:
        """Add the device's part to the engine's results, once it is there. In slots and experts of the other side, each
        has zeros."""
        self._finish()
        grad_input.copy_(found.grad_input.add_(grad_input))
        grad_weights.add_(found.grad_weights)
        rank = self.spec.lora_rank
        for name, gradient in zip(GRAD_NAMES, found.lora, strict=bool(found.lora)):
            whole = gradient[:, :rank] if name.endswith("_a") else gradient[..., :rank]
            for at, expert in found.experts.items():
                grads[name][expert].copy_(whole[at])

    # ---- the device

    def _finish(self) -> None:
        """Wait until the results of all launched calls are on the CPU."""
        if self._stream is not None:
            self._stream.synchronize()

    @contextlib.contextmanager
    def _computing(self, *, grad: bool) -> Iterator[None]:
        """Torch's modes of the caller do not reach what is computed here: inference mode, autocast, hooks of saved
        tensors, as gradient checkpointing has them."""
        on_stream = torch.cuda.stream(self._stream) if self._stream is not None else contextlib.nullcontext()
        own = torch.autograd.graph.saved_tensors_hooks(Tensor.detach, Tensor.detach)
        with (
            torch.inference_mode(False),
            torch.set_grad_enabled(grad),
            torch.autocast(self.device.type, enabled=False),
            own,
            on_stream,
        ):
            yield

    def _there(self, tensor: Tensor) -> Tensor:
        """A CPU tensor on the device. From pinned memory, the copy does not delay the caller."""
        return tensor.pin_memory().to(self.device, non_blocking=True) if self._stream is not None else tensor

    def _back(self, tensor: Tensor) -> Tensor:
        """A tensor of the device on the CPU, once `_finish` returned."""
        if self._stream is None:
            return tensor
        host = torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu", pin_memory=True)
        return host.copy_(tensor, non_blocking=True)


def _over_slots(values: Tensor, slots: Tensor) -> Tensor:
    """[T, H]: the sum of a token's rows of values [n, H]; slots [T, k]: those rows, n for a slot that has none. In the
    order of the slots, so that repeats have the same bits."""
    padded = functional.pad(values, (0, 0, 0, 1))
    total = padded[slots[:, 0]]
    for slot in range(1, slots.shape[1]):
        total += padded[slots[:, slot]]
    return total
