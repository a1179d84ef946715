"""The native engine, through its public face.

What a file in this folder holds: TITLE, as tables print it; HELD, the most memory that loading takes, in units of the
bf16 weights; LAZY, whether that is of the experts that tokens reach, not of all; BACKWARD and LORA, whether it computes
them; NEEDS, which part of places.py it cannot do without ("" for none); and `load(problem)`, which returns an object
with
    about: dict[str, str]       version, isa and the like, for the records
    forward()                   output, keeping nothing
    forward_saving(), backward()    one step of training: output; then grad_input, LoRA and routing gradients
    results()                   the tensors of the last calls by their names in ktverify.names
    release()                   optional: gives back working memory
    stages()                    optional: stage times (ktverify.stages) of one training step, forward then backward
Only `load` and what it calls may import more than the standard library: the controller reads the constants.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ktverify.bench.host import BenchInputs

TITLE = "native"
HELD = 1.05
LAZY = True
BACKWARD = True
LORA = True
NEEDS = ""


class Native:
    def __init__(self, problem: BenchInputs) -> None:
        import torch

        import ktverify
        from ktverify.engines.native.layer import KTMoEWrapper

        p = problem
        self.layer = KTMoEWrapper(
            layer_idx=0,
            num_experts=p.num_experts,
            num_experts_per_tok=p.top_k,
            hidden_size=p.hidden,
            moe_intermediate_size=p.intermediate,
            cpuinfer_threads=p.threads,
            chunked_prefill_size=max(512, p.qlen),
            lora_rank=p.rank,
            lora_alpha=p.alpha,
            isa=p.isa or None,
        )
        t = p.tensors
        self.layer.load_weights_from_tensors(
            t["gate_proj"], t["up_proj"], t["down_proj"], torch.arange(p.num_experts, dtype=torch.int64)
        )
        self.layer.init_lora_weights(*(t[name] for name in p.lora_names))
        self.inputs = (t["hidden_states"], t["expert_ids"], t["weights"])
        self.grad_output = t["grad_output"]
        self.made: dict[str, Any] = {}
        self.about = {"version": ktverify.__version__, "isa": self.layer.isa, "threads": str(self.layer.threads)}

    def forward(self) -> None:
        self.made["output"] = self.layer.forward_sft(*self.inputs, save_for_backward=False)

    def forward_saving(self) -> None:
        self.made["output"] = self.layer.forward_sft(*self.inputs, save_for_backward=True)

    def backward(self) -> None:
        self.made["grad_input"], grads = self.layer.backward(self.grad_output)
        self.made.update(grads)

    def results(self) -> dict[str, Any]:
        grad_weights = self.layer.grad_weights
        return {**self.made, **({} if grad_weights is None else {"grad_weights": grad_weights})}

    def stages(self) -> list[dict[str, Any]]:
        from dataclasses import asdict

        found = []
        self.layer.record_stages()
        for step in (self.forward_saving, self.backward):
            step()
            found.append(asdict(self.layer.stage_times()))
        self.layer.record_stages(False)
        return found

    def release(self) -> None:
        self.made.clear()
        self.layer.clear_sft_buffer_cache()


def load(problem: BenchInputs) -> Native:
    return Native(problem)
