"""How the engine computes the experts of a model: the settings that wrap_moe_layers takes, checked."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ktverify.engines import argument_checks
from ktverify.engines.checkpoint_files import Checkpoint
from ktverify.engines.native.isa import require_isa
from ktverify.engines.native.placement import require_numa_nodes
from ktverify.engines.quantise import MADE
from ktverify.system.limits import processors
from ktverify.training import capture
from ktverify.training.gpu_experts import ALL_IN_ENGINE, GpuExperts

# kt_backend of the users' configurations -> the engine's method
BACKENDS = {
    "AMXBF16": "AMXBF16_SFT", "AMXBF16_SFT": "AMXBF16_SFT", "AMXInt8": "AMXINT8_SFT", "AMXInt4": "AMXINT4_SFT",
    "AMXFP8": "AMXFP8_SFT", "MXFP4": "MXFP4_SFT",
}  # fmt: skip


@dataclass(frozen=True)
class CpuInfer:
    """How the engine computes: most workers, tensor parallel degree, instruction set, saved forwards, rows per call.

    method: of the base weights. weight_path: where the experts' weights are read from, "" for the model's own. gpu: the
    experts that torch computes on a device. numa_nodes: of each tensor-parallel part, None to spread the parts."""

    threads: int
    tp: int = 1
    isa: str | None = None
    max_cache_depth: int = 4
    chunked_prefill_size: int = 25600
    method: str = BACKENDS["AMXBF16"]
    weight_path: str = ""
    gpu: GpuExperts = ALL_IN_ENGINE
    numa_nodes: tuple[int, ...] | None = None

    def experts_in_files(self, quantised: bool) -> bool:
        """Whether a model's experts stay in files. quantised: whether its checkpoint is.

        ValueError for a method that makes no codes, where no file has codes."""
        format = argument_checks.FORMATS[self.method]
        if format not in ("bf16", *MADE) and not (quantised or self.weight_path):
            raise ValueError(
                f"its weights are not quantised, and method {self.method} takes {format}: name a checkpoint in "
                f"{format}, as kt_weight_path or as the model, or take another kt_backend"
            )
        return bool(self.weight_path) or format != "bf16"


def init_cpu_infer(
    threads: int | None = None,
    threadpool_count: int = 1,
    *,
    backend: str = "AMXBF16",
    weight_path: str = "",
    isa: str | None = None,
    max_cache_depth: int = 4,
    chunked_prefill_size: int = 25600,
    gpu: GpuExperts = ALL_IN_ENGINE,
    numa_nodes: Sequence[int] | None = None,
) -> CpuInfer:
    """The settings that `wrap_moe_layers` takes. threads: None takes all processors of this process; threadpool_count:
    tensor parallel degree; numa_nodes: the NUMA node of each of these parts, None to spread them over the nodes.

    max_cache_depth: forwards of one layer that may be saved for their backward; any further one is computed again.
    chunked_prefill_size: most tokens of one engine call; more are computed in pieces. weight_path: a checkpoint whose
    experts are taken instead of the model's own. ValueError for an unknown backend, a path that is no checkpoint, or a
    node that is not here, RuntimeError for an instruction set that cannot run here.
    """
    if not isinstance(backend, str) or backend not in BACKENDS:
        takes = ", ".join(BACKENDS)
        raise ValueError(f"kt_backend is {argument_checks.shown(backend)}, which is unknown; it takes {takes}")
    if weight_path:
        Checkpoint(weight_path, "kt_weight_path")
    if threads is not None:
        argument_checks.check_count("threads", threads)
    argument_checks.check_count("threadpool_count", threadpool_count)
    argument_checks.check_count("max_cache_depth", max_cache_depth)
    argument_checks.check_count("chunked_prefill_size", chunked_prefill_size)
    if isa is not None:
        require_isa(isa)
    nodes = None if numa_nodes is None else require_numa_nodes(numa_nodes, threadpool_count)
    capture.current()  # refuses a wrong environment now
    return CpuInfer(
        threads or processors(),
        threadpool_count,
        isa,
        max_cache_depth,
        chunked_prefill_size,
        BACKENDS[backend],
        weight_path,
        gpu,
        nodes,
    )
