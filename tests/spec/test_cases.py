"""Cases: a printed case parses back, and the catalogue gives a reason for each row."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ktverify.spec import cases
from ktverify.spec.cases import DATA_KINDS, LORA_DTYPES, ROUTING_KINDS, Case, catalogue, expects_zero, flops, select
from ktverify.spec.names import ALL_TENSORS

FULL = "E=8,k=2,H=64,I=96,T=33,r=4,alpha=8,data=gaussian,routing=zipf,lora=bfloat16@seed=7"


@st.composite
def hand_written(draw: st.DrawFn) -> Case:
    experts = draw(st.integers(1, 300))
    rank = draw(st.integers(1, 70))
    data = draw(st.sampled_from(sorted(DATA_KINDS)))
    slots = draw(st.integers(1, experts))
    ratio = draw(st.integers(-6, 8)) if data == "integer" else draw(st.floats(-3, 3))
    return Case(
        name="custom",
        why="written by hand",
        num_experts=experts,
        top_k=slots,
        hidden=draw(st.integers(1, 10_000)),
        intermediate=draw(st.integers(1, 20_000)),
        qlen=draw(st.integers(2, 400)),
        rank=rank,
        alpha=float(rank * 2.0**ratio),
        data=data,
        routing=draw(st.sampled_from([r for r in ROUTING_KINDS if r != "duplicate" or slots > 1])),
        lora_dtype=draw(st.sampled_from(LORA_DTYPES)),
        seed=draw(st.integers(0, 2**63)),
        physical=draw(st.sampled_from(cases.MAPS)),
    )


@given(hand_written())
@settings(max_examples=200, deadline=None)
def test_a_printed_case_parses_back(case: Case) -> None:
    again = Case.parse(case.id)
    assert again.id == case.id
    assert {**vars(again), "tp": case.tp} == vars(case)


@pytest.mark.parametrize("case", catalogue().values(), ids=lambda case: case.name)
def test_every_row_parses_back(case: Case) -> None:
    assert Case.parse(case.id) == case
    assert Case.parse(case.name) == case
    assert case.id == f"{case.name}@seed=0"
    assert Case.parse(f"{case.name}@seed=5") == case.with_seed(5)


def test_the_catalogue_has_the_case_of_the_specification() -> None:
    case = catalogue()["deepseek_v3_t4"]
    sizes = (case.num_experts, case.top_k, case.hidden, case.intermediate, case.qlen, case.rank, case.alpha)
    assert sizes == (256, 8, 7168, 2048, 4, 16, 32.0)


def test_the_catalogue_has_the_sizes_of_real_models() -> None:
    shapes = {(case.num_experts, case.hidden, case.intermediate, case.top_k) for case in catalogue().values()}
    # DeepSeek-V3, DeepSeek-V2-Lite, Qwen3-30B-A3B, Mixtral-8x7B
    assert {(256, 7168, 2048, 8), (64, 2048, 1408, 6), (128, 2048, 768, 8), (8, 4096, 14336, 2)} <= shapes


def test_the_catalogue_has_the_awkward_sizes() -> None:
    rows = catalogue().values()
    assert {c.data for c in rows} == set(DATA_KINDS)
    assert {c.routing for c in rows} == set(ROUTING_KINDS)
    assert {c.lora_dtype for c in rows} == set(LORA_DTYPES)
    assert {0, 1, 15, 16, 17, 31, 33, 100, 300} <= {c.qlen for c in rows}
    assert {1, 3, 64} <= {c.rank for c in rows}
    assert any((c.hidden, c.intermediate, c.rank) == (97, 47, 3) for c in rows)
    assert any(c.top_k == c.num_experts > 1 for c in rows)
    assert any(c.num_experts == 1 for c in rows)
    assert any(c.scaling >= 32 for c in rows)
    for side in ("hidden", "intermediate"):
        for block in (16, 32, 64):
            assert {1, block - 1} <= {getattr(c, side) % block for c in rows if getattr(c, side) > 8}
    integer = select(data="integer")
    assert len(integer) >= 10
    assert {"masked", "duplicate", "zipf"} <= {c.routing for c in integer}
    assert any(c.tp == (1, 2, 4) for c in integer)


def test_every_row_has_its_own_reason_and_few_a_lora_scale_of_one() -> None:
    reasons = [case.why for case in catalogue().values()]
    assert len(set(reasons)) == len(reasons)
    odd = [c.name for c in catalogue().values() if c.scaling == 1]
    assert len(odd) <= 2, f"alpha / rank is 1, so a forgotten scale is not seen: {odd}"


def test_the_default_tier_is_cheap() -> None:
    # the scalar kernels do about 1e9 multiply-adds a second, and every ISA runs the tier forward and backward
    assert sum(flops(c) for c in select(tier="default")) / 2 < 1.5e9
    assert sum(flops(c) for c in select(tier=("default", "big"))) / 2 < 5e9


def test_a_row_with_changed_keys() -> None:
    case = Case.parse("deepseek_v3_t4,T=1@seed=3")
    assert (case.qlen, case.seed, case.num_experts) == (1, 3, 256)
    assert case.id == "deepseek_v3_t4,T=1@seed=3"
    assert Case.parse(case.id) == case
    narrower = Case.parse("small,I=94")
    assert narrower.tp == (1, 2)
    assert Case.parse(FULL).id == FULL
    assert Case.parse(" small , T=5 ").qlen == 5
    louder = Case.parse("small,magnitude=1e4")
    assert (louder.id, Case.parse(louder.id)) == ("small,magnitude=10000@seed=0", louder)
    assert "magnitude" not in Case.parse("small,magnitude=1").id


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("deepsek_v3_t4", "did you mean deepseek_v3_t4"),
        ("", "empty case"),
        ("small@5", "it takes seed=N"),
        ("small@seed=-1", "it takes seed=N"),
        ("small,q=5", "'q=5' is not understood"),
        ("small,T", "'T' is not understood"),
        ("small,T=five", "T is 'five', it takes a number"),
        ("small,T=5,T=6", "T stands there twice"),
        ("small,T=-1", "T (qlen) is -1, it takes a whole number of 0 or more"),
        ("small,H=0", "H (hidden) is 0, it takes a whole number of 1 or more"),
        ("small,k=9", "k is 9, it takes at most E = 8"),
        ("small,alpha=-1", "alpha is -1.0, it takes a positive finite number"),
        ("small,alpha=nan", "alpha is nan"),
        ("small,data=gausian", "data is 'gausian', it takes one of gaussian, integer"),
        ("small,routing=none", "routing is 'none', it takes one of uniform"),
        ("small,lora=float16", "lora is 'float16', it takes one of bfloat16, float32"),
        ("small,map=random", "map is 'random', it takes one of identity, permuted"),
        ("small,k=1,routing=duplicate", "needs two slots"),
        ("small,data=integer,alpha=12", "takes a power of two: alpha = 16 would do"),
        ("small,data=nan_row,T=1", "needs another token"),
        ("small,magnitude=0", "magnitude is 0.0, it takes a positive finite number"),
        ("small,magnitude=2,data=large", "magnitude is 2, data=large has its own"),
        ("E=8,k=2,H=64,I=96", "T, r missing"),
    ],
)
def test_a_text_that_is_no_case_is_refused_with_a_reason(text: str, says: str) -> None:
    with pytest.raises(ValueError) as refusal:
        Case.parse(text)
    assert says in str(refusal.value)
    assert "\n" not in str(refusal.value)


def test_select_by_name_tier_and_case() -> None:
    assert [c.name for c in select("small")] == ["small"]
    assert {c.name for c in select("rank_*,small")} > {"rank_1", "small"}
    assert all(c.tier == "big" for c in select(tier="big"))
    assert select("no_such_case_*") == []
    assert select("small@seed=4") == [catalogue()["small"].with_seed(4)]
    assert [c.id for c in select(FULL)] == [FULL]
    assert len(select()) == len(catalogue())


ROW = 'why = "a sentence of some length"\nE=1\nk=1\nH=1\nI=1\nT=1\nr=1\nalpha=2\n'


@pytest.mark.parametrize(
    ("name", "row", "says"),
    [
        ("a_case", "E = 1", "missing keys: .*why"),
        ("a_case", ROW.replace("a sentence of some length", "short"), "a sentence"),
        ("Big", ROW, "lower-case"),
        ("a_case", ROW + "n=3", "unknown keys: .*n"),
        ("a_case", ROW.replace("I=1", "I=3") + "tp=[2]", "degree 2"),
        ("a_case", ROW.replace("k=1", "k=2"), "at most E = 1"),
    ],
)
def test_a_bad_row_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, row: str, says: str) -> None:
    (tmp_path / "catalogue.toml").write_text(f"[{name}]\n{row}", encoding="utf-8")
    monkeypatch.setattr(cases, "CATALOGUE", tmp_path / "catalogue.toml")
    with pytest.raises(ValueError, match=f"row {name}: (?s:.*){says}"):
        cases.catalogue.__wrapped__()


def test_zero_is_expected_only_where_a_case_makes_it() -> None:
    small = catalogue()["small"]
    assert not any(expects_zero(small, name) for name in ALL_TENSORS)
    assert all(expects_zero(catalogue()["all_masked"], name) for name in ALL_TENSORS)
    assert all(expects_zero(catalogue()["no_token"], name) for name in ALL_TENSORS)
    zero = [name for name in ALL_TENSORS if expects_zero(catalogue()["fresh_adapter"], name)]
    assert zero == ["grad_gate_lora_a", "grad_up_lora_a", "grad_down_lora_a"]


def test_flops_by_hand() -> None:
    case = Case.parse("E=4,k=2,H=10,I=6,T=5,r=3,alpha=6")
    base, lora = 3 * 2 * 10 * 10 * 6, 2 * 10 * 3 * 3 * (10 + 6)
    assert flops(case) == base + lora
    assert flops(case, backward=True) == 2 * base + 3 * lora


@pytest.mark.parametrize(
    ("more", "brief"), [("routing=uniform@seed=0", ""), ("data=integer@seed=3", ",data=integer@seed=3")]
)
def test_a_brief_name_leaves_out_defaults(more: str, brief: str) -> None:
    sizes = "E=4,k=2,H=32,I=32,T=9,r=4,alpha=8"
    case = Case.parse(f"{sizes},{more}")
    assert case.brief == sizes + brief
    assert Case.parse(case.brief) == case
    for row in ("small", "small,T=1@seed=4"):
        assert Case.parse(row).brief == row
