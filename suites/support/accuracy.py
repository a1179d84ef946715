"""A case through an engine, tensor by tensor against the oracle: what the families forward and backward are made of."""

from __future__ import annotations

import time

import torch
from torch import Tensor

from ktverify import engines, gates, metrics, reference
from ktverify.cases import Case
from ktverify.data import Inputs, inputs_sha256, make_inputs
from ktverify.metrics import Difference
from ktverify.names import BACKWARD_TENSORS, OUTPUT
from ktverify.report.record import AccuracyRecord, accuracy_record
from ktverify.running import run_case

TENSORS: dict[str, tuple[str, ...]] = {"forward": (OUTPUT,), "backward": BACKWARD_TENSORS}


class Expected:
    """What a case has to give: from its golden, or from the oracle computed here and now."""

    def __init__(self, case: Case, inputs: Inputs, live: bool) -> None:
        self.source = "fresh" if live else "golden"
        self._oracle: dict[str, Tensor] = {}
        self.peer: dict[str, float] = {}
        if live:
            self._oracle = reference.forward_backward(inputs)
            plain = reference.peer_bf16(inputs)
            self.peer = {name: metrics.compare(plain[name], self._oracle[name]).rel_l2 for name in self._oracle}
            return
        from ktverify import golden

        self._golden = golden.load(case)
        self.peer = self._golden.peer
        if inputs_sha256(inputs) != self._golden.inputs_sha256:
            raise AssertionError(
                f"{case.id}: the inputs are not those that the golden was made from; if the generator changed on "
                "purpose, raise GENERATOR_VERSION and run python -m ktverify.golden regenerate"
            )

    def compare(self, name: str, actual: Tensor) -> Difference:
        """The difference of `actual` from the oracle's tensor `name`."""
        if self._oracle:
            return metrics.compare(actual, self._oracle[name])
        return self._golden.compare(name, actual)


_last: tuple[str, Inputs, Expected] | None = None


def prepared(case: Case, live: bool) -> tuple[Inputs, Expected]:
    """Inputs and expectation of `case`; the last one is kept, since the next instruction set asks for it again."""
    global _last
    key = f"{case.id} {live}"
    if _last is None or _last[0] != key:
        _last = None
        inputs = make_inputs(case)
        _last = (key, inputs, Expected(case, inputs, live))
    return _last[1], _last[2]


def repro_command(case: Case, engine: str, isa: str | None, tp: int = 1) -> str:
    """The command line that repeats a case."""
    words = [f"python -m ktverify repro '{case.id}'"]
    words += [f"--engine {engine}"] if engine != "native" else []
    words += [f"--isa {isa}"] if isa else []
    words += [f"--tp {tp}"] if tp != 1 else []
    return " ".join(words)


def check_case(
    family: str,
    engine: str,
    case: Case,
    *,
    isa: str | None = None,
    label: str = "",
    fresh: int | None = None,
    tp: int = 1,
    threads: int | None = None,
) -> list[AccuracyRecord]:
    """One record for each tensor of `family` ("forward" or "backward") of `case` on `engine`.

    isa: what the engine's `isa=` gets; label: how reports call it. fresh: a seed for new inputs and a live oracle.
    What the engine raises comes through.
    """
    begin = time.perf_counter()
    case = case if fresh is None else case.with_seed(fresh)
    inputs, expected = prepared(case, live=fresh is not None)
    actual = run_case(
        engines.find(engine), case, inputs=inputs, isa=isa, tp=tp, threads=threads, backward=family == "backward"
    )
    records = []
    for name in TENSORS[family]:
        difference = expected.compare(name, actual[name])
        judgement = gates.judge(
            case, name, difference, expected.peer[name], own_engine=engine == engines.NATIVE, isa=isa or ""
        )
        records.append(
            accuracy_record(
                judgement,
                difference,
                family=family,
                case=case,
                tensor=name,
                engine=engine,
                isa=label or isa or "",
                threads=threads or torch.get_num_threads(),
                tp=tp,
                source=expected.source,
                duration_s=time.perf_counter() - begin,
                repro=repro_command(case, engine, isa, tp),
            )
        )
    return records


def crashed(family: str, engine: str, case: Case, label: str, error: BaseException) -> list[AccuracyRecord]:
    """The records of a case whose engine gave no tensors at all."""
    return [
        AccuracyRecord(
            family=family,
            engine=engine,
            isa=label,
            verdict="CRASH",
            message=f"{type(error).__name__}: {error}"[:4000],
            case=case.id,
            why=case.why,
            tensor=name,
            repro=repro_command(case, engine, None),
        )
        for name in TENSORS[family]
    ]


def assert_passed(records: list[AccuracyRecord]) -> None:
    """AssertionError with the line of every tensor that did not pass, each followed by what repeats it."""
    failed = [record for record in records if record.verdict != "PASS"]
    if failed:
        lines = [record.message.partition("\n")[0] for record in failed]
        raise AssertionError("\n".join([*lines, failed[0].repro, f"({failed[0].case}: {failed[0].why})"]))
    if not records:
        raise AssertionError("nothing was compared")
