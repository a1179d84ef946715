"""Load causal language models with transformers; errors are one line. Light until a function is called."""

from __future__ import annotations

import importlib.util
import re
import socket
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit
from urllib.request import getproxies

from ktverify.errors import is_expected, one_line
from ktverify.system.files import expand, install_command

if TYPE_CHECKING:
    from ktverify.training.infer import CpuInfer

DTYPES = ("bfloat16", "float32")
BASE_OPTION = "model_name_or_path"
_HUB_S = 5.0  # seconds to connect to the hub


def quiet(purpose: str, *more: str) -> None:
    """Turn off transformers' progress bars and deprecation notes. ImportError that says what to install where
    transformers or one of the modules `more` is missing."""
    missing = [name for name in ("transformers", *more) if importlib.util.find_spec(name) is None]
    if missing:
        raise ImportError(f"{purpose} needs {' and '.join(missing)}: {install_command('training')}")
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")


def load_pretrained(
    path: str, dtype: str = "bfloat16", *, option: str = BASE_OPTION, trust: bool = False
) -> tuple[Any, Any]:
    """The model at `path`, floating-point weights in `dtype`, and its tokenizer. ValueError that names `option`."""
    tokenizer = load_tokenizer(path, option=option, trust=trust)
    return load_model(path, dtype, option=option, trust=trust), tokenizer


def load_tokenizer(path: str, *, option: str, trust: bool = False) -> Any:
    """The tokenizer at `path`. ValueError that names `option`."""
    from transformers import AutoTokenizer

    return _load(AutoTokenizer.from_pretrained, path, option, trust_remote_code=trust)


def ensure_padding(tokenizer: Any) -> None:
    """Let a tokenizer without a padding token pad with its end token, as LLaMA-Factory does; labels and the attention
    mask leave padding out. ValueError for a tokenizer with neither token."""
    if tokenizer.pad_token is not None:
        return
    if tokenizer.eos_token is None:
        raise ValueError(f"the tokenizer of {BASE_OPTION} has neither a padding nor an end token; give it one")
    tokenizer.pad_token = tokenizer.eos_token


def load_form(path: str, dtype: str, *, option: str, trust: bool = False) -> Any:
    """The model at `path` without its weights, which are on the device meta. ValueError that names `option`."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    config = _load(AutoConfig.from_pretrained, path, option, trust_remote_code=trust)
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config, dtype=getattr(torch, dtype), trust_remote_code=trust)


def load_model(
    path: str | Path,
    dtype: str,
    *,
    option: str = BASE_OPTION,
    trust: bool = False,
    infer: CpuInfer | None = None,
    in_files: bool = False,
) -> Any:
    """The model at `path`, with floating-point weights in `dtype`; quantised ones are dequantised.

    infer: where it says that the experts are read from files, they stay there, for `wrap_moe_layers`; with in_files in
    any case, so that of several processes each reads its own.
    ValueError that names `option`; with the tensor's name for a checkpoint that lacks one, or has one of another
    size."""
    import torch
    from transformers import AutoModelForCausalLM

    from ktverify.engines.checkpoint_files import INDEX, read_index
    from ktverify.training.headers import shapes_in

    wanted = getattr(torch, dtype)

    def read(path: str, **settings: Any) -> Any:
        if (Path(path) / INDEX).is_file():
            read_index(Path(path) / INDEX)  # the library would not name the file
        return load_by_files(path, wanted, infer=infer, in_files=in_files, **settings) or _read_whole(
            AutoModelForCausalLM,
            path,
            lambda: shapes_in(Path(path) if Path(path).is_dir() else of_hub(path)),
            dtype=wanted,
            **settings,
        )

    return _load(read, path, option, trust_remote_code=trust)


def check_method(config: Any, infer: CpuInfer, *, in_files: bool = False) -> str:
    """A note where a model's experts are quantised and the engine is to hold them as bf16, else "". in_files: they stay
    in the files, whatever the method is.

    ValueError where the method takes codes and there are none, for codes in the files that a method in bf16 is to read,
    and for a quantised form that is not read."""
    from ktverify.training.quantised import quantisation_of

    try:
        about = quantisation_of(config)
        if infer.experts_in_files(about is not None) or about is None:
            return ""
    except ValueError as error:
        raise ValueError(f"{BASE_OPTION} {config.name_or_path!r} cannot be loaded: {error}") from None
    if in_files and not infer.weight_path:
        raise ValueError(
            f"{BASE_OPTION} {config.name_or_path!r} has {about.format} experts, and with kt_ep: true each rank reads "
            f"its own from the files as they are: take kt_backend {about.backend}"
        )
    note = f"the experts' {about.format} weights are dequantised to bf16"
    return f"{note}; kt_backend {about.backend} keeps them as codes"


def load_by_files(
    path: str,
    dtype: Any,
    *,
    infer: CpuInfer | None = None,
    in_files: bool = False,
    config: Any = None,
    trust_remote_code: bool = False,
    hub: Mapping[str, Any] | None = None,
) -> Any:
    """The model at `path`, a directory or a name on the hub, where it is quantised or its experts stay in files; None
    where transformers reads it.

    infer, in_files: as for load_model. config: its configuration where that is at hand. hub: further arguments of
    snapshot_download, as revision and token.
    ValueError for a quantised form that is not read, and for codes in a directory that config.json says nothing of."""
    from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig

    from ktverify.engines.checkpoint_files import Checkpoint
    from ktverify.training import quantised

    config = config or AutoConfig.from_pretrained(path, trust_remote_code=trust_remote_code)
    about = quantised.quantisation_of(config)
    outside = infer is not None and (in_files or infer.experts_in_files(about is not None))
    if about is None and not outside:
        if Path(path).is_dir():
            quantised.require_no_codes(Path(path))
        return None
    import torch

    from ktverify.training.wrap import WEIGHTS, find_experts

    folder = Path(path) if Path(path).is_dir() else of_hub(path, **(hub or {}))
    if about is not None:
        del config.quantization_config
    with torch.device("meta"):
        form = AutoModelForCausalLM.from_config(config, dtype=dtype, trust_remote_code=trust_remote_code)
    shapes = {}
    if outside:
        blocks = set(find_experts(form))
        names = [name for name, module in form.named_modules() if module in blocks]
        shapes = {f"{name}.{each}": form.get_parameter(f"{name}.{each}").shape for name in names for each in WEIGHTS}
    checkpoint = Checkpoint(folder, BASE_OPTION)
    tensors = quantised.tensors_in(checkpoint, about, shapes, dtype)
    try:
        model = _read_whole(type(form), None, tensors.shapes, config=config, dtype=dtype, state_dict=tensors.of)
    except Exception:
        if tensors.problems:  # the library says that there was one, and not which
            raise tensors.problems[0] from None
        raise
    model.config.name_or_path = model.name_or_path = path
    if model.can_generate() and (folder / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(folder)
    if infer is not None and outside:
        model._kt_experts_at = infer.weight_path or str(folder)
    return model


def _read_whole(kind: Any, path: str | None, shapes: Callable[[], Mapping[str, Sequence[int]]], **settings: Any) -> Any:
    """kind.from_pretrained(path, …). shapes: those of the checkpoint's tensors, for errors.

    ValueError for a checkpoint that lacks a tensor of the model, or has one of another shape: transformers draws such
    weights at random, or raises an error that does not name them."""
    try:
        model, found = kind.from_pretrained(path, output_loading_info=True, ignore_mismatched_sizes=True, **settings)
    except RuntimeError as error:
        if "CONVERSION" in str(error) and (odd := _odd_expert(shapes())):
            raise ValueError(odd) from None
        raise
    if missing := sorted(found["missing_keys"]):
        raise ValueError(f"it lacks {missing[0]}" + (f", and {len(missing) - 1} more" if missing[1:] else ""))
    for name, there, wanted in sorted(found["mismatched_keys"]):
        raise ValueError(f"its {name} has the shape {list(there)}; the model takes {list(wanted)}")
    return model


def _odd_expert(shapes: Mapping[str, Sequence[int]]) -> str:
    """Which expert's matrix is missing, or has another shape than those of its layer's other experts; "" for none.

    transformers stacks the experts of a layer, and cannot where one differs."""
    layers: dict[tuple[str, str], dict[int, list[int]]] = {}
    experts: dict[str, set[int]] = {}
    for name, shape in shapes.items():
        if match := re.fullmatch(r"(.*\.experts)\.(\d+)\.(.*)", name):
            layers.setdefault((match[1], match[3]), {})[int(match[2])] = list(shape)
            experts.setdefault(match[1], set()).add(int(match[2]))
    for (block, matrix), found in layers.items():
        usual = max(found.values(), key=list(found.values()).count)
        for expert in sorted(experts[block]):
            if expert not in found:
                return f"it lacks {block}.{expert}.{matrix}"
            if found[expert] != usual:
                return f"its {block}.{expert}.{matrix} has the shape {found[expert]}; that of other experts is {usual}"
    return ""


def of_hub(name: str, **settings: Any) -> Path:
    """The folder of the hub's cache with all files of a model. settings: those of snapshot_download."""
    from huggingface_hub import snapshot_download

    return Path(snapshot_download(name, **settings))


def _load(read: Callable[..., Any], path: str | Path, option: str, **settings: Any) -> Any:
    from ktverify.engines.quantization_config import QuantizationConfig

    path = expand(str(path))
    # NAME/MODEL may be on a hub, unless a directory NAME exists here
    local = path.startswith((".", "/", "~")) or path.count("/") != 1 or Path(path).parent.is_dir()
    if local and not Path(path).is_dir():
        raise ValueError(
            f"{option} {path!r} is no directory; a tiny model to try with: "
            f"python -m ktverify make-tiny FAMILY --out {path}"
        )
    if not local and not _cached(path):
        _require_hub(path, option)
    try:
        if Path(path).is_dir():
            QuantizationConfig.beside(Path(path))  # the library would not say what is wrong with it
        return read(path, **settings)
    except Exception as error:  # of transformers, tokenizers, safetensors, the hub, and of a model's own code
        if isinstance(error, MemoryError) or not is_expected(error):
            raise
        if "trust_remote_code" in str(error) and not settings["trust_remote_code"]:
            raise ValueError(
                f"{option} {path!r} needs code of its own, which runs with trust_remote_code: true or "
                "--trust-remote-code alone; read it first"
            ) from error
        raise ValueError(f"{option} {path!r} cannot be loaded: {one_line(error)[:500]}") from error


def _cached(name: str) -> bool:
    """Whether the hub's cache has this model, so that no network is needed."""
    from huggingface_hub import try_to_load_from_cache

    return isinstance(try_to_load_from_cache(name, "config.json"), str)


def _require_hub(name: str, option: str) -> None:
    """ValueError where the hub cannot be reached: its library retries for a minute before it says so."""
    from huggingface_hub import constants

    address = urlsplit(constants.ENDPOINT)
    if constants.is_offline_mode() or getproxies().get(address.scheme):
        return  # the library refuses at once; a proxy may reach what this machine does not
    port = address.port or (443 if address.scheme == "https" else 80)
    try:
        socket.create_connection((address.hostname or "", port), timeout=_HUB_S).close()
    except OSError as error:
        raise ValueError(
            f"{option} {name!r} is no directory here, the hub's cache does not have it, and {address.hostname} cannot "
            f"be reached ({error}); name a directory, or download the model first"
        ) from None
