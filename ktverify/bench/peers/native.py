"""The native engine, through its public calls.

A file in this folder describes one engine of the bench:
    TITLE       its name in tables
    PACKAGE     the module whose __version__ goes into the records
    HELD        the most memory that loading takes, in units of the bf16 weights
    LAZY        whether HELD counts only the weights of experts that tokens reach
    BACKWARD, LORA      whether the engine computes them
    FORMATS     where the engine takes base weights as codes: format -> (bits of a base weight, HELD). Each is an engine
                of the bench, this file's name and the format: native_fp8. `load` finds the format in inputs.options
    NEEDS       the part of optional_peers.LOCATIONS that it requires, "" for none
    load(inputs)        a layer with the calls of docs/contract.md, as `inputs.layer` makes one, or an object with
        about: dict[str, str]           version, isa and the like, for the records
        forward()                       output, nothing saved
        forward_saving(), backward()    one training step: output; then grad_input, LoRA and routing gradients
        results()                       the tensors of the last calls by their names in ktverify.spec.names
        inputs_changed()                where it keeps copies of the tokens: the tensors in inputs have other values now
Only `load` and what it calls may import more than the standard library: the controller reads the constants.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ktverify.bench.host import BenchInputs

TITLE = "native"
PACKAGE = "ktverify"
HELD = 1.05
LAZY = True
BACKWARD = True
LORA = True
NEEDS = ""
FORMATS = {format: (bits, bits / 16 * HELD) for format, bits in (("fp8", 8), ("int8", 8), ("int4", 4), ("mxfp4", 4))}


def load(inputs: BenchInputs) -> Any:
    from ktverify.bench import coded
    from ktverify.engines.native.layer import KTMoEWrapper

    if format := inputs.options.get("format"):
        return coded.layer_of(inputs, KTMoEWrapper, format, isa=inputs.isa or None)
    return inputs.layer(KTMoEWrapper, isa=inputs.isa or None)
