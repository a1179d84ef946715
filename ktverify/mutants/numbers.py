"""Mutants of arithmetic: types of sums, rounding, activation, NaN and Inf, tails of sums and results, TP parts."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional

from ktverify.checks.causes import Cause
from ktverify.diagnose.hypotheses.rounding import cut_off, in_blocks, rounded, ties_away, to_bits
from ktverify.mutants.base import Gradients, Group, Plain, mutant

# ---- types of sums


@mutant(Cause.ACCUMULATION_TYPE, "forward/wide_top_k", "rel_l2_own")
class slots_summed_in_bf16(Plain):
    """The output is summed over a token's slots in bf16."""

    def combine(self, output: Tensor, at: Group) -> None:
        super().combine(output, at)
        output.copy_(rounded(output))


@mutant(Cause.ACCUMULATION_TYPE, "backward/wide_top_k", "rel_l2_own")
class grad_input_summed_in_bf16(Plain):
    """grad_input is summed over experts in bf16."""

    def collect(self, grad_input: Tensor, at: Group, dx: Tensor) -> None:
        super().collect(grad_input, at, dx)
        grad_input.copy_(rounded(grad_input))


@mutant(Cause.ACCUMULATION_TYPE, "backward/tokens_300", "rel_l2_own")
class rows_summed_in_bf16(Plain):
    """LoRA gradients are summed over tokens in bf16, sixteen rows at a time."""

    def over_rows(self, a: Tensor, b: Tensor) -> Tensor:
        return in_blocks(a.T, b, 16)


@mutant(Cause.ACCUMULATION_TYPE, "forward/k_tail_wide", "rel_l2_own")
class reduction_in_bf16(Plain):
    """Sums over H, I and r are kept in bf16 from one block of 128 to the next."""

    def product(self, a: Tensor, b: Tensor) -> Tensor:
        return in_blocks(a, b, 128)


@mutant(Cause.ACCUMULATION_TYPE, "exact/exact_fp32_lora", "exact")
class fp32_gradients_hold_bf16(Plain):
    """Gradients of fp32 parameters are computed in bf16 and widened."""

    def stored(self, value: Tensor, dtype: torch.dtype) -> Tensor:
        return rounded(value).to(dtype)


@mutant(Cause.ACCUMULATION_TYPE, "edge/multiples_of_nothing_many_rows", "form")
class fp32_gradients_come_as_bf16(Plain):
    """Gradients of fp32 parameters are returned as bf16 tensors."""

    def _backward(self, saved: object, grad_output: Tensor) -> tuple[Tensor, Gradients]:
        grad_input, gradients = super()._backward(saved, grad_output)
        return grad_input, {name: gradient.to(torch.bfloat16) for name, gradient in gradients.items()}


@mutant(Cause.ACCUMULATION_TYPE, "exact/exact_zipf", "exact")
class rounded_twice(Plain):
    """Results are rounded to 11 bits and then to bf16."""

    def stored(self, value: Tensor, dtype: torch.dtype) -> Tensor:
        return to_bits(value, 11).to(dtype)


@mutant(Cause.ACCUMULATION_TYPE, "exact/exact_zipf", "exact")
class ties_away_from_zero(Plain):
    """A result half way between two bf16 numbers is rounded away from zero instead of to the even one."""

    def stored(self, value: Tensor, dtype: torch.dtype) -> Tensor:
        return (ties_away(value) if dtype == torch.bfloat16 else value).to(dtype)


@mutant(Cause.ACCUMULATION_TYPE, "forward/small", "rel_l2_own")
class results_cut_off(Plain):
    """Results are truncated to bf16 instead of rounded."""

    def stored(self, value: Tensor, dtype: torch.dtype) -> Tensor:
        return (cut_off(value) if dtype == torch.bfloat16 else value).to(dtype)


@mutant(Cause.ACCUMULATION_TYPE, "forward/small", "rel_l2_own")
class gate_and_up_rounded(Plain):
    """gate, up and silu(gate) are rounded to bf16 before h is computed."""

    def gate_and_up(self, at: Group) -> None:
        super().gate_and_up(at)
        at.g, at.u = rounded(at.g), rounded(at.u)

    def activation(self, g: Tensor, u: Tensor) -> Tensor:
        return rounded(functional.silu(g)) * u


# ---- activation


@mutant(Cause.ACTIVATION, "forward/small")
class gelu_for_silu(Plain):
    """h = gelu(g) u."""

    def activation(self, g: Tensor, u: Tensor) -> Tensor:
        return functional.gelu(g) * u


@mutant(Cause.ACTIVATION, "forward/small")
class hard_swish_for_silu(Plain):
    """h = hardswish(g) u, the piecewise approximation of silu."""

    def activation(self, g: Tensor, u: Tensor) -> Tensor:
        return functional.hardswish(g) * u


@mutant(Cause.ACTIVATION, "backward/small")
class slope_is_sigma(Plain):
    """silu'(g) = sigma(g): the term g sigma (1 - sigma) is left out."""

    def slope(self, g: Tensor) -> Tensor:
        return torch.sigmoid(g)


@mutant(Cause.ACTIVATION, "backward/small")
class slope_of_silu_of_silu(Plain):
    """silu' is evaluated at silu(g), the saved buffer of the forward, instead of at g."""

    def slope(self, g: Tensor) -> Tensor:
        return super().slope(functional.silu(g))


@mutant(Cause.ACTIVATION, "forward/one_token", "rel_l2")
class single_row_with_a_coarse_exp(Plain):
    """The path for a single token evaluates sigma with an exp that is off by 8 %."""

    def activation(self, g: Tensor, u: Tensor) -> Tensor:
        return g / (1 + torch.exp(-g) * 1.08) * u if self._single else super().activation(g, u)

    _single = False

    def _forward(self, hidden_states: Tensor, expert_ids: Tensor, weights: Tensor, save: bool) -> Tensor:
        self._single = len(hidden_states) == 1
        return super()._forward(hidden_states, expert_ids, weights, save)


# ---- NaN and Inf


@mutant(Cause.NON_FINITE, "forward/large", "non_finite")
class exp_overflows(Plain):
    """sigma(g) = exp(g) / (1 + exp(g)), which is Inf / Inf from 89 on."""

    def activation(self, g: Tensor, u: Tensor) -> Tensor:
        return g * (torch.exp(g) / (1 + torch.exp(g))) * u


@mutant(Cause.NON_FINITE, "forward/large", "non_finite")
class h_overflows_fp16(Plain):
    """h is kept in fp16, whose largest number is 65504."""

    def operand(self, value: Tensor) -> Tensor:
        return super().operand(value.half().float())


@mutant(Cause.NON_FINITE, "forward/nan_row", "hidden_non_finite")
class nan_comes_out_as_zero(Plain):
    """NaN and Inf in the output are replaced by zero."""

    def stored(self, value: Tensor, dtype: torch.dtype) -> Tensor:
        return super().stored(value.nan_to_num(0.0, 0.0, 0.0), dtype)


@mutant(Cause.NON_FINITE, "forward/nan_row", "non_finite")
class nan_spreads_in_whole_blocks(Plain):
    """Batches of whole blocks of 8 tokens are combined by a matrix of zeros and weights: 0 times NaN is NaN."""

    def combine(self, output: Tensor, at: Group) -> None:
        if len(output) % 8:
            super().combine(output, at)
            return
        matrix = torch.zeros(len(output), len(at.rows))
        matrix[at.rows, torch.arange(len(at.rows))] = at.w.squeeze(1)
        output += matrix @ at.y


@mutant(Cause.NON_FINITE, "behaviour/masked_weights_do_not_count", "bits")
class masked_weight_is_multiplied(Plain):
    """A slot with id -1 adds its weight times zero, which is NaN for a weight of Inf or NaN."""

    def _forward(self, hidden_states: Tensor, expert_ids: Tensor, weights: Tensor, save: bool) -> Tensor:
        output = super()._forward(hidden_states, expert_ids, weights, save)
        return output + (torch.where(expert_ids < 0, weights, 0.0) * 0.0).sum(1, keepdim=True).to(output.dtype)


# ---- tails


@mutant(Cause.K_TAIL, "forward/odd_sizes")
class hidden_remainder_skipped(Plain):
    """Sums over H stop at the last whole block of 32."""

    def groups(self, hidden_states: Tensor, expert_ids: Tensor, weights: Tensor) -> list[Group]:
        cut = hidden_states.clone()
        cut[:, cut.shape[1] // 32 * 32 :] = 0
        return super().groups(cut, expert_ids, weights)


@mutant(Cause.K_TAIL, "forward/small")
class last_column_of_hidden_skipped(Plain):
    """Sums over H end at H - 2."""

    def groups(self, hidden_states: Tensor, expert_ids: Tensor, weights: Tensor) -> list[Group]:
        cut = hidden_states.clone()
        cut[:, -1] = 0
        return super().groups(cut, expert_ids, weights)


@mutant(Cause.K_TAIL, "forward/odd_sizes")
class intermediate_remainder_skipped(Plain):
    """Sums over I stop at the last whole block of 16, where there is one."""

    def activation(self, g: Tensor, u: Tensor) -> Tensor:
        h, size = super().activation(g, u), g.shape[1]
        h[:, size // 16 * 16 or size :] = 0
        return h


@mutant(Cause.N_TAIL, "forward/odd_sizes")
class output_remainder_not_written(Plain):
    """Columns of the output after the last whole block of 16 are not written."""

    def stored(self, value: Tensor, dtype: torch.dtype) -> Tensor:
        if value.dim() == 2 and value.shape[1] == self.spec.hidden_size > 16:
            value = value.clone()
            value[:, value.shape[1] // 16 * 16 :] = 0
        return super().stored(value, dtype)


@mutant(Cause.N_TAIL, "backward/odd_sizes")
class gate_b_gradient_remainder_not_written(Plain):
    """Rows of the gradient of gate_lora_b after the last whole block of 16 stay zero."""

    def keep(self, gradients: Gradients, at: Group, found: Gradients) -> None:
        super().keep(gradients, at, found)
        gradients["grad_gate_lora_b"][at.expert, self.spec.moe_intermediate_size // 16 * 16 :] = 0


# ---- tensor parallelism


@mutant(Cause.TP_PART, "tp/gaussian")
class tp_part_lost(Plain):
    """The last part's share of every sum over tensor-parallel parts is missing."""

    def sum_of_parts(self, parts: list[Tensor]) -> Tensor:
        return super().sum_of_parts(parts[:-1] if len(parts) > 1 else parts)


@mutant(Cause.TP_PART, "tp/gaussian")
class tp_part_twice(Plain):
    """The first part's share of every sum over tensor-parallel parts is added twice."""

    def sum_of_parts(self, parts: list[Tensor]) -> Tensor:
        return super().sum_of_parts([*parts, parts[0]] if len(parts) > 1 else parts)


@mutant(Cause.TP_PART, "tp/gaussian")
class tp_lora_in_every_part(Plain):
    """Each part adds the whole LoRA term of down, so it counts once per part."""

    def down_lora(self, at: Group, b: Tensor) -> Tensor:
        return self.spec.threadpool_count * super().down_lora(at, b)


@mutant(Cause.TP_PART, "tp/gaussian")
class tp_gradient_parts_exchanged(Plain):
    """The parts of up_lora_b's gradient are stored in reverse order."""

    def lora_gradients(self, found: Gradients) -> Gradients:
        value = found["grad_up_lora_b"]
        parts = value.view(self.spec.threadpool_count, -1, value.shape[1]).flip(0)
        return {**found, "grad_up_lora_b": parts.reshape(value.shape)}


@mutant(Cause.TP_PART, "tp/gaussian", "tp")
class tp_parts_with_a_coarse_exp(Plain):
    """At a degree above 1, sigma uses an exp that is off by 0.4 %."""

    def activation(self, g: Tensor, u: Tensor) -> Tensor:
        coarse = self.spec.threadpool_count > 1
        return g / (1 + torch.exp(-g) * 1.004) * u if coarse else super().activation(g, u)


@mutant(Cause.TP_PART, "tp/gaussian", "tp")
class tp_parts_summed_in_bf16(Plain):
    """The parts' shares are rounded to bf16 before they are added."""

    def over_parts(self, term: Callable[[slice], Tensor]) -> Tensor:
        return super().over_parts(lambda part: rounded(term(part)) if self.spec.threadpool_count > 1 else term(part))
