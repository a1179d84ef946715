"""What torch says of a tensor before its memory is read by address: the one door of all engines that do so."""

from __future__ import annotations

import torch

_KEY = torch._C.DispatchKey
# the keys of a dense tensor on the CPU, and those that describe neither memory nor content
_PLAIN = torch._C.DispatchKeySet(_KEY.CPU)
for _key in (_KEY.ADInplaceOrView, _KEY.AutogradCPU, _KEY.AutocastCPU, _KEY.Negative):
    _PLAIN = _PLAIN.add(_key)


def why_not_plain(tensor: torch.Tensor) -> str:
    """Why the tensor's address says nothing of its values; "" where it does. A tensor whose values are the negatives of
    its memory is plain, because `values_of` resolves it.

    FakeTensor, ZeroTensor, functional and functorch's tensors, nested and quantized ones, and every subclass with a
    __torch_dispatch__ have keys of their own in torch's dispatcher; a storage may also have been resized to nothing.
    """
    if torch.nn.parameter.is_lazy(tensor):
        return f"is a {type(tensor).__name__}, which has no values yet"
    other = (torch._C._dispatch_keys(tensor) - _PLAIN).highestPriorityTypeId()
    if other != _KEY.Undefined:
        kind = type(tensor).__name__ if type(tensor) is not torch.Tensor else str(other).rpartition(".")[2]
        return f"is a {kind} tensor, without memory of its own"
    if tensor.device.type != "cpu" or not tensor.numel():
        return ""
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    needs = (tensor.storage_offset() + last + 1) * tensor.itemsize
    has = tensor.untyped_storage().nbytes()
    return f"needs {needs} bytes of its storage, which has {has}: it was resized" if has < needs else ""


def values_of(tensor: torch.Tensor) -> torch.Tensor:
    """The values of a plain tensor, detached: itself, or a copy where only its negatives are in memory."""
    with torch._C.DisableTorchFunctionSubclass():
        return tensor.detach().resolve_neg()


def check_modes() -> None:
    """RuntimeError where a mode of torch would make the results something else than plain tensors, or records a call
    without what the engine computes in it."""
    if torch._C._get_tracing_state():
        raise RuntimeError("torch.jit.trace cannot record what the engine computes: call the model itself")
    found = why_not_plain(torch.empty((1,), dtype=torch.uint8, device="cpu"))
    if found:
        raise RuntimeError(f"a mode of torch is active in which a new tensor {found}: call the layer outside of it")
