"""What the tensors of one call cannot show: further calls of the engine, each with what docs/contract.md says of it.

Comes in: a Situation and a Probe. Goes out: findings; the first kind of call that goes wrong ends the search. What an
engine raises where it must not is a finding too. A probe is a function of a Stand; it yields what it found.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator

from ktverify.checks.causes import Cause
from ktverify.diagnose import probes_calls as calling
from ktverify.diagnose import probes_inputs as feeding
from ktverify.diagnose import probes_lora as training
from ktverify.diagnose.evidence import Finding, Probe, Situation
from ktverify.diagnose.stand import Stand, certain

_Probe = tuple[str, Cause, Callable[[Stand], Iterator[Finding]]]

# what may make one case wrong without any wrong formula
REMEDIES: tuple[_Probe, ...] = (
    ("the memory of inputs and results", Cause.MEMORY_LAYOUT, calling.memory),
    ("the same call again", Cause.STALE_VALUES, calling.repeats),
    ("another number of threads", Cause.THREADS, calling.threads),
)
# what a case that is right does not show
PROBES: tuple[_Probe, ...] = (
    *REMEDIES,
    ("fewer tokens after more", Cause.STALE_VALUES, calling.left_over),
    ("other weights in a used layer", Cause.STALE_VALUES, calling.reloaded),
    ("two layers", Cause.STALE_VALUES, calling.two_layers),
    ("a forward that saves nothing", Cause.OTHER, calling.evaluation),
    ("outstanding forwards", Cause.ORDER, calling.outstanding),
    ("update_lora_weights", Cause.STALE_LORA, training.updates),
    ("tensor parallelism", Cause.TP_PART, feeding.tensor_parallel),
    ("a NaN in one row", Cause.NON_FINITE, feeding.non_finite),
    ("ids", Cause.IDS, feeding.ids),
    ("an outlier", Cause.OTHER, feeding.outlier),
    ("other cases", Cause.OTHER, feeding.others),
    ("fifty updates", Cause.STALE_LORA, training.many_updates),
    ("the method without LoRA", Cause.OTHER, training.skip_lora),
    ("refusals", Cause.REFUSAL, feeding.refusals),
)


def examine(situation: Situation, probe: Probe) -> tuple[list[Finding], int]:
    """(findings, how many kinds of call were tried); on the case itself where it failed, else on a small one."""
    stand = Stand(situation.case, situation.inputs, probe) if situation.failing else Stand.of(probe)
    tried = 0
    for text, cause, look in REMEDIES if situation.failing else PROBES:
        if time.monotonic() > situation.deadline:
            break
        tried += 1
        try:
            found = list(look(stand))
        except Exception as error:  # an engine that raises where the contract has a result
            found = [certain(cause, f"{text}: {type(error).__name__}: {str(error).partition(chr(10))[0]}")]
        if found:
            return found, tried
    return [], tried
