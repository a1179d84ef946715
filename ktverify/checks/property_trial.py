"""One drawn case on the engine under test: what it gives, what is right, and how far apart the two may be.

A property relates two calls. The relation is exact in real numbers, so what a changed call gives, mapped
back, has the unchanged call's oracle as its right answer, and that case's budgets: no property has a number of its own.
Where moreover the order of no sum changes, the native engine owes the same bits.
"""

from __future__ import annotations

import functools
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from ktverify.checks.altered_inputs import everywhere
from ktverify.checks.judging import expect_forms
from ktverify.checks.target import Target, expect_same_bits
from ktverify.engines import registry
from ktverify.judge import gates, metrics, reference
from ktverify.judge.rounding import NONE, RoundingError, rounded_draws, rounding_error
from ktverify.spec.cases import Case
from ktverify.spec.inputs import Inputs, inputs_sha256, make_inputs

Tensors = dict[str, Tensor]


@dataclass(frozen=True)
class Right:
    """tensors: fp64, by name. drawn(): the same with errors of rounding, see `rounded_draws`; it takes long and is
    seldom wanted."""

    tensors: Tensors
    drawn: Callable[[], Tensors]

    @classmethod
    def of(cls, inputs: Inputs) -> Right:
        """The right answer of `inputs`, found again by their bytes: several engines may be asked about one case."""
        key = f"{inputs.case.spec} {inputs_sha256(inputs)}"
        if key not in _known:
            # a copy, as an engine may write into its inputs
            kept = everywhere(inputs, torch.clone)
            _known[key] = cls(reference.forward_backward(kept), functools.cache(lambda: rounded_draws(kept)))
            while len(_known) > _KEPT:
                _known.popitem(last=False)
        return _known[key]

    @classmethod
    def total(cls, parts: Sequence[Right], names: Sequence[str]) -> Right:
        """The sum of `parts`. Draw by draw: what two calls have in common errs alike in both."""

        def drawn() -> Tensors:
            found = [part.drawn() for part in parts]
            draws = min(len(each[name]) for each in found for name in names)
            return {name: functools.reduce(torch.add, [each[name][:draws] for each in found]) for name in names}

        tensors = {name: functools.reduce(torch.add, [part.tensors[name] for part in parts]) for name in names}
        return cls(tensors, functools.cache(drawn))

    def rounding(self, name: str) -> RoundingError:
        """What errors of rounding do to the tensor `name`."""
        return rounding_error(self.drawn()[name])


_KEPT = 6
_known: OrderedDict[str, Right] = OrderedDict()


class Trial:
    """A case, its inputs and its oracle on one engine; counts the comparisons, and those that could be believed."""

    def __init__(self, target: Target, case: Case) -> None:
        self.target = target
        self.case = case
        self.inputs = make_inputs(case)
        self.own = registry.strict(target.engine)
        self.compared = self.believed = 0
        self._before: Tensors = {}

    @cached_property
    def right(self) -> Right:
        return Right.of(self.inputs)

    @cached_property
    def plain(self) -> Tensors:
        """ALL_TENSORS of the case as it was drawn."""
        return self.run(self.inputs)

    def run(self, inputs: Inputs, *, tp: int = 1) -> Tensors:
        """ALL_TENSORS of a new layer with `inputs`, whose case has the sizes and the scale."""
        found = self.target.run(inputs.case, inputs, tp=tp)
        expect_forms(self.target, self.case.id, found, inputs, self._before)
        self._before = found
        return {name: tensor.detach() for name, tensor in found.items()}

    def keeps(self, what: str, found: Mapping[str, Tensor], right: Right | None = None, *, exact: bool = True) -> None:
        """AssertionError unless every tensor of `found` is within the budgets of `right` (default: the case's).

        exact=False where the tensors are sums of rounded results, so that even integer data does not give equal bits.
        """
        right = right or self.right
        wrong = []
        for name, tensor in found.items():
            difference = metrics.compare(tensor, right.tensors[name])
            judge = functools.partial(self._judge, name, difference, exact)
            # budgets only grow with the errors of rounding: who keeps the floor needs none
            judgement = judge(NONE)
            if judgement.verdict is gates.Verdict.FAIL:
                judgement = judge(right.rounding(name))
            self.compared += 1
            self.believed += judgement.verdict is gates.Verdict.PASS
            if judgement.verdict is gates.Verdict.FAIL:
                wrong.append(judgement.line.partition("\n")[0])
        if wrong:
            raise AssertionError("\n".join([what, *wrong]))

    def _judge(
        self, name: str, difference: metrics.Difference, exact: bool, rounding: RoundingError
    ) -> gates.Judgement:
        # the limits of strict engines are for tensors that many numbers decide, as small T is exempt there
        own = self.own and (exact if self.case.exact else self._many(name, difference.nonzero))
        isa = self.target.isa or ""
        return gates.judge(self.case, name, difference, rounding, own_engine=own, isa=isa)

    def _many(self, name: str, nonzero: int) -> bool:
        # h, dg and du are rounded too: with an I of 1, one of them decides a whole row
        slots = self.case.qlen * self.case.top_k
        decided = min(gates.numbers_deciding(self.case, name, nonzero), slots * self.case.intermediate)
        return bool(decided >= gates.tolerances()["own"]["few"])

    def same(self, what: str, left: Mapping[str, Tensor], right: Mapping[str, Tensor], names: Sequence[str]) -> None:
        """AssertionError unless the bits are the same: of the native engine only, see docs/contract.md."""
        if self.target.engine == registry.NATIVE:
            # an empty tensor may have strides of which no bytes can be seen, and has no bits to differ in
            expect_same_bits(what, left, right, tuple(name for name in names if left[name].numel()))

    def close(self, what: str, left: Mapping[str, Tensor], right: Mapping[str, Tensor], names: Sequence[str]) -> None:
        """AssertionError unless two results differ by no more than fp32 sums in another order may ([tp] rel_l2).

        Asked of engines that are `engines.strict`, of tensors that many numbers decide, and not of sums that cancel.
        """
        numbers = gates.tolerances()
        for name in names if self.own else ():
            apart = metrics.compare(left[name], right[name].double())
            if apart.rel_l2 <= numbers["tp"]["rel_l2"] or not self._many(name, apart.nonzero):
                continue
            if self.right.rounding(name).rel_l2 <= numbers["trust"]["max_rounding"]:
                raise AssertionError(
                    f"{what}\nFAIL {name}: {apart.rel_l2:.1e} apart, budget {numbers['tp']['rel_l2']:.1e}, "
                    f"worst {list(apart.worst_index)}"
                )
