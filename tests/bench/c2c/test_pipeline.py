"""The pipeline: which tokens meet, what projectors change, and that the identity changes nothing."""

from __future__ import annotations

import copy
import itertools
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast, Qwen3Config

from ktverify.bench.c2c.alignment import align_prompt, match
from ktverify.bench.c2c.models import Side
from ktverify.bench.c2c.pipeline import Pipeline
from ktverify.bench.c2c.projector import Fuser, Heads, Projectors, layer_pairs
from ktverify.bench.c2c.prompts import BUILT_IN
from ktverify.bench.c2c.record import STAGE_FIELDS, PromptTiming
from ktverify.system.timing import Timeline
from tests.support import c2c

PROMPT = BUILT_IN[4]  # letters of several bytes


# ---- tokens that meet


def brute_force(base: list[tuple[int, int]], teacher: list[tuple[int, int]]) -> tuple[int | None, ...]:
    found: list[int | None] = []
    for begin, end in base:
        shares = [len(set(range(begin, end)) & set(range(*span))) for span in teacher]
        most = max(shares, default=0)
        found.append(max(place for place, share in enumerate(shares) if share == most) if most else None)
    return tuple(found)


@st.composite
def spans(draw: st.DrawFn) -> list[tuple[int, int]]:
    """Tokens of a text of at most 20 characters: some characters in none, some split into several, some empty."""
    ends = sorted(draw(st.lists(st.integers(0, 20), min_size=2, max_size=12)))
    found = []
    for begin, end in itertools.pairwise(ends):
        found += [(begin, end)] * draw(st.integers(0, 3)) if end > begin else [(0, 0)]
    return found


@settings(max_examples=100, deadline=None)
@given(spans(), spans())
def test_match_finds_the_largest_overlap(base: list[tuple[int, int]], teacher: list[tuple[int, int]]) -> None:
    assert match(base, teacher) == brute_force(base, teacher)


def words() -> Any:
    """A tokenizer that has nothing in common with the tiny ones: whole words, a token before and after the text."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    tokenizer = Tokenizer(models.WordLevel({"[UNK]": 0, "[CLS]": 1, "[SEP]": 2}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.BertProcessing(("[SEP]", 2), ("[CLS]", 1))
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


def test_two_tokenizers_meet_by_characters(sides: tuple[Side, Side]) -> None:
    """Each token of the prompt is aligned with one that covers its characters; a template's tokens with none."""
    mine, theirs = sides[0].tokenizer, words()
    found = align_prompt(PROMPT, mine, theirs, template=True)
    base, teacher = found.base, found.teacher
    assert base.text != PROMPT == teacher.text
    met = 0
    for span, place in zip(base.spans, found.teacher_of, strict=True):
        inside = base.begin <= span[0] and span[1] <= base.begin + len(PROMPT)
        letters = set(range(span[0] - base.begin, span[1] - base.begin))
        if place is None:
            # a template, or spaces, which are in none of the other's tokens
            assert not inside or base.text[slice(*span)].isspace()
            continue
        assert inside
        assert letters & set(range(*teacher.spans[place])), "they share no character"
        met += 1
    assert met > len(PROMPT.split())
    assert {place for place in found.teacher_of if place is not None} == set(range(1, len(teacher.ids) - 1))


def test_equal_tokenizers_meet_one_to_one_and_the_tiny_ones_are_not_equal(sides: tuple[Side, Side]) -> None:
    mine, theirs = (side.tokenizer for side in sides)
    equal = align_prompt(BUILT_IN[0], mine, mine, template=True)
    assert equal.teacher_of == tuple(range(len(equal.base.ids)))
    found = align_prompt(BUILT_IN[1], mine, theirs, template=False)
    assert len(found.base.ids) > len(found.teacher.ids)
    assert None not in found.teacher_of


def test_what_cannot_be_aligned_is_refused(sides: tuple[Side, Side]) -> None:
    tokenizer = words()
    with pytest.raises(ValueError, match="the prompt is empty"):
        align_prompt("", tokenizer, tokenizer, template=True)
    tokenizer.chat_template = "{{ messages[0]['content'] | upper }}"
    with pytest.raises(ValueError, match=r"changes the prompt 'abc'.*--no-template"):
        align_prompt("abc", tokenizer, sides[1].tokenizer, template=True)


# ---- the identity changes nothing, anything else does


@pytest.mark.parametrize("template", [True, False])
def test_identity_projectors_give_the_bases_own_response(sides: tuple[Side, Side], template: bool) -> None:
    base, teacher = sides
    pipeline = c2c.pipeline(base, teacher, template=template)
    for prompt in BUILT_IN:
        found = pipeline.run(prompt, c2c.NEW_TOKENS, Timeline())
        ids = align_prompt(prompt, base.tokenizer, teacher.tokenizer, template=template).base.ids
        expected = c2c.alone(base, ids)
        assert list(found.tokens) == expected
        assert found.text == base.tokenizer.decode(expected, skip_special_tokens=True)


def caches(pipeline: Pipeline, prompt: str) -> tuple[Any, Any, Any]:
    """(aligned, the fused cache, the one that transformers makes of the base alone)"""
    base = pipeline.base
    aligned = align_prompt(prompt, base.tokenizer, pipeline.teacher.tokenizer, template=pipeline.template)
    with torch.inference_mode():
        plain = base.model(input_ids=torch.tensor([aligned.base.ids[:-1]]), use_cache=True).past_key_values
        return aligned, pipeline.fused_cache(aligned, Timeline()), plain


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_identity_keeps_every_bit_of_the_cache(sides: tuple[Side, Side], dtype: torch.dtype) -> None:
    base, teacher = (Side(copy.deepcopy(side.model).to(dtype), side.tokenizer, side.name) for side in sides)
    pipeline = c2c.pipeline(base, teacher)
    pipeline.projectors.to(dtype)
    _, fused, plain = caches(pipeline, PROMPT)
    assert fused.layers[0].keys.dtype == dtype
    for got, wanted in zip(fused.layers, plain.layers, strict=True):
        assert torch.equal(got.keys, wanted.keys)
        assert torch.equal(got.values, wanted.values)


def test_projectors_change_only_aligned_rows(sides: tuple[Side, Side]) -> None:
    # a teacher without the base's template: its rows have no partner
    other = Side(sides[1].model, words(), "words")
    aligned, fused, plain = caches(c2c.pipeline(sides[0], other, teaching=True), PROMPT)
    met = torch.tensor([place is not None for place in aligned.teacher_of[:-1]])
    assert met.any()
    assert not met.all()
    for got, wanted in zip(fused.layers, plain.layers, strict=True):
        for now, before in ((got.keys, wanted.keys), (got.values, wanted.values)):
            assert torch.equal((now != before).any(dim=-1)[0].all(dim=0), met)
            assert torch.equal(now[:, :, ~met], before[:, :, ~met])


def test_fused_rows_are_those_of_aligned_rows(sides: tuple[Side, Side]) -> None:
    """Layer by layer and row by row, against projectors called on what the two models alone keep."""
    pipeline = c2c.pipeline(*sides, teaching=True, template=False)
    aligned, fused, plain = caches(pipeline, BUILT_IN[1])
    with torch.inference_mode():
        teacher = sides[1].prefill(sides[1].embed(aligned.teacher.ids))
        for to, source in ((0, 1), (1, 2)):
            mine, theirs = plain.layers[to], teacher.layers[source]
            for row, place in enumerate(aligned.teacher_of[:-1]):
                assert place is not None
                own = (mine.keys[:, :, row], mine.values[:, :, row])
                keys, values = pipeline.projectors[to](own, (theirs.keys[:, :, place], theirs.values[:, :, place]))
                assert torch.allclose(fused.layers[to].keys[:, :, row], keys, rtol=1e-4, atol=1e-5)
                assert torch.allclose(fused.layers[to].values[:, :, row], values, rtol=1e-4, atol=1e-5)


def test_the_teacher_changes_the_first_token(sides: tuple[Side, Side]) -> None:
    base, teacher = sides
    taught = c2c.pipeline(base, teacher, teaching=True)
    responses = [taught.run(prompt, 1, Timeline()).tokens for prompt in BUILT_IN]
    plain = [c2c.pipeline(base, teacher).run(prompt, 1, Timeline()).tokens for prompt in BUILT_IN]
    assert responses != plain


def test_a_prompt_of_one_token_has_no_cache_to_fuse(sides: tuple[Side, Side]) -> None:
    timeline = Timeline()
    found = c2c.pipeline(*sides, teaching=True, template=False).run("W", 3, timeline)
    assert list(found.tokens) == c2c.alone(sides[0], sides[0].tokenizer("W")["input_ids"], 3)
    assert PromptTiming.of(timeline).projector_calls == 0


def test_decoding_ends_after_an_end_token(sides: tuple[Side, Side], monkeypatch: pytest.MonkeyPatch) -> None:
    pipeline = c2c.pipeline(*sides)
    tokens = pipeline.run(BUILT_IN[0], c2c.NEW_TOKENS, Timeline()).tokens
    third = next(token for token in tokens if tokens.index(token) >= 2)
    monkeypatch.setattr(pipeline.base, "ends", frozenset({third}))
    assert pipeline.run(BUILT_IN[0], c2c.NEW_TOKENS, Timeline()).tokens == tokens[: tokens.index(third) + 1]


# ---- projectors


def test_a_fuser_computes_its_formula() -> None:
    torch.manual_seed(0)
    fuser = Fuser(Heads(2, 5), Heads(3, 4), hidden=7).double()
    for parameter in fuser.parameters():
        torch.nn.init.normal_(parameter)
    base, teacher = torch.randn(6, 2, 5).double(), torch.randn(6, 3, 4).double()
    joint = torch.cat([base.reshape(6, 10), teacher.reshape(6, 12)], 1)
    inner = joint @ fuser.inner.weight.T + fuser.inner.bias
    change = (inner / (1 + torch.exp(-inner))) @ fuser.outer.weight.T + fuser.outer.bias
    share = 1 / (1 + torch.exp(-(joint @ fuser.weigh.weight.T + fuser.weigh.bias)))
    expected = base + share[:, :, None] * change.reshape(6, 2, 5)
    assert torch.allclose(fuser(base, teacher), expected, rtol=1e-12, atol=1e-12)


def test_layers_are_paired_from_the_last_down() -> None:
    assert layer_pairs(2, 3) == ((0, 1), (1, 2))
    assert layer_pairs(3, 2) == ((1, 0), (2, 1))


def test_projectors_come_back_from_their_file(sides: tuple[Side, Side], tmp_path: Path) -> None:
    shapes = sides[0].cache_shapes(), sides[1].cache_shapes()
    saved = c2c.pipeline(*sides, teaching=True).projectors
    saved.save(tmp_path / "p.safetensors")
    loaded = Projectors.load(tmp_path / "p.safetensors", *shapes)
    assert loaded.pairs == saved.pairs
    for (name, got), (same, wanted) in zip(loaded.state_dict().items(), saved.state_dict().items(), strict=True):
        assert name == same
        assert torch.equal(got, wanted)


def test_projectors_of_other_models_are_refused(sides: tuple[Side, Side], tmp_path: Path) -> None:
    base, teacher = sides[0].cache_shapes(), sides[1].cache_shapes()
    file = tmp_path / "p.safetensors"
    Projectors(base, teacher).save(file)
    wider = [replace(shape, value=Heads(5, 20)) for shape in base]
    wanted = r"has a 0\.value\.inner\.weight of \[40, 112\], these models take one of \[40, 172\]"
    with pytest.raises(ValueError, match=wanted):
        Projectors.load(file, wider, teacher)
    with pytest.raises(ValueError, match="pairs the layers 0:1 1:2, these models 0:0 1:1"):
        Projectors.load(file, base, teacher[1:])
    (tmp_path / "other").write_bytes(b"no safetensors")
    with pytest.raises(ValueError, match="cannot be read"):
        Projectors.load(tmp_path / "other", base, teacher)


def test_a_sliding_window_is_refused(sides: tuple[Side, Side]) -> None:
    config = Qwen3Config(
        vocab_size=320, hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, head_dim=16,
        num_key_value_heads=1, use_sliding_window=True, sliding_window=8, max_window_layers=0,
    )  # fmt: skip
    base = Side(AutoModelForCausalLM.from_config(config), sides[0].tokenizer, "short")
    with pytest.raises(ValueError, match=r"short: layer 0 keeps \d+ of the prompt's \d+ tokens"):
        c2c.pipeline(base, sides[1]).run(BUILT_IN[1], 1, Timeline())


# ---- clocks


def test_a_timeline_has_begin_and_duration() -> None:
    timeline = Timeline()
    begin = time.perf_counter_ns()

    def slow() -> str:
        time.sleep(0.02)
        return "found"

    assert timeline.measure("base_prefill", slow) == "found"
    timeline.measure("projector", lambda: None)
    timeline.measure("projector", lambda: None)
    whole = time.perf_counter_ns() - begin
    first, second, third = timeline.calls
    assert 20e6 <= first.ns <= whole
    assert first.at + first.ns <= second.at <= second.at + second.ns <= third.at
    assert [span.number for span in timeline.calls] == [0, 0, 1]


def test_a_timing_sums_up_its_timeline(sides: tuple[Side, Side]) -> None:
    timeline = Timeline()
    found = c2c.pipeline(*sides).run(BUILT_IN[0], 5, timeline)
    timing = PromptTiming.of(timeline)
    assert timing.num_generated_tokens == len(found.tokens) == len(timing.decode_step_times_ms)
    assert timing.projector_calls == 2
    assert all(getattr(timing, name) > 0 for name in STAGE_FIELDS)
    assert timing.projector_avg_ms == pytest.approx(timing.projector_total_ms / 2)
    assert timing.decode_total_ms == pytest.approx(sum(timing.decode_step_times_ms))
    assert timing.decode_avg_ms == pytest.approx(timing.decode_total_ms / len(found.tokens))
    assert timing.tokens_per_second == pytest.approx(1e3 / timing.decode_avg_ms)
    assert timing.total_ms == pytest.approx(sum(span.ns for span in timeline.calls) / 1e6)
    last = timeline.calls[-1]
    assert timing.total_ms <= (last.at + last.ns) / 1e6
