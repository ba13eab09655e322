"""Widths and grids as text and numbers."""

import itertools

import pytest

from ptq.errors import SpecError
from ptq.spec import EDGES, BitConfig, Budget, Override, PlanRules, QuantSpec, Repair

WIDTHS = range(2, 9)


def test_parse_reads_back_what_str_wrote():
    for weight, act, edge in itertools.product(WIDTHS, (None, *WIDTHS), WIDTHS):
        bits = BitConfig(weight, act, edge)
        assert BitConfig.parse(str(bits)) == bits


def test_str_writes_back_what_parse_read():
    for text in ("w4a4", "w8", "w2a4e3", "w2e4"):
        assert str(BitConfig.parse(text)) == text


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("w4a4", BitConfig(4, 4, 8)), ("W8A8", BitConfig(8, 8, 8)), (" w4 ", BitConfig(4, None, 8)),
        ("w2a4e8", BitConfig(2, 4, 8)), ("w3a2e4", BitConfig(3, 2, 4)), ("w4e6", BitConfig(4, None, 6)),
    ],
)  # fmt: skip
def test_parse(text: str, expected: BitConfig):
    assert BitConfig.parse(text) == expected


@pytest.mark.parametrize(
    "text", ["", "4", "a4", "w", "wa4", "w4a", "w4e", "a4w4", "w4 a4", "w4a4x", "w-4", "w4.5", "w4e8a4"]
)
def test_text_of_another_form_is_refused(text: str):
    with pytest.raises(SpecError, match="not understood"):
        BitConfig.parse(text)


@pytest.mark.parametrize("text", ["w1", "w9", "w4a1", "w4a16", "w32a32", "w4a4e1", "w4a4e9", "w0a0"])
def test_widths_out_of_range_are_refused(text: str):
    with pytest.raises(SpecError, match="2 to 8 bits"):
        BitConfig.parse(text)


@pytest.mark.parametrize("bits", [-1, 0, 1, 9, 32])
def test_grids_have_2_to_8_bits(bits: int):
    with pytest.raises(SpecError, match=f"^{bits} bits"):
        QuantSpec(bits, signed=True, symmetric=True)


@pytest.mark.parametrize("bits", WIDTHS)
def test_codes_of_a_grid(bits: int):
    half = 2 ** (bits - 1)
    unsigned = [QuantSpec(bits, False, symmetric) for symmetric in (True, False)]
    assert [(s.qmin, s.qmax) for s in unsigned] == [(0, 2 * half - 1)] * 2
    wide, narrow = (QuantSpec(bits, True, symmetric) for symmetric in (False, True))
    assert (wide.qmin, wide.qmax) == (-half, half - 1)
    assert (narrow.qmin, narrow.qmax) == (-(half - 1), half - 1)


@pytest.mark.parametrize("bad", [{"edges": "first"}, {"edges": ""}, {"adds": 1}, {"adds": 9}])
def test_plan_rules_refuse(bad: dict):
    with pytest.raises(SpecError):
        PlanRules(**bad)


def test_unknown_edges_name_the_known_ones():
    with pytest.raises(SpecError, match=", ".join(EDGES)):
        PlanRules(edges="both")


@pytest.mark.parametrize("text", ["layer3.*=w8a8", "fc=w8", "conv1=a4", "blocks.[01].*=float"])
def test_override_reads_what_it_writes(text: str):
    assert str(Override.parse(text)) == text


@pytest.mark.parametrize("text", ["fc", "fc=", "=w8", "fc=8", "fc=w9", "fc=w8a1", "fc=x"])
def test_overrides_that_are_none(text: str):
    with pytest.raises(SpecError):
        Override.parse(text)


def test_budgets():
    assert Budget.parse("auto:size=1.2MB") == Budget("size", 1.2e6, 8)
    assert Budget.parse("auto:size=300KB,a4") == Budget("size", 3e5, 4)
    assert Budget.parse("auto:bops=2.5G") == Budget("bops", 2.5e9)
    for budget in (Budget("size", 123456.0, 4), Budget("bops", 2.5e9)):
        assert Budget.parse(str(budget)) == budget
    for wrong in ("auto", "auto:size=", "auto:size=1.2.3MB", "auto:bops=1GB", "auto:size=1MB,a9", "auto:speed=3"):
        with pytest.raises(SpecError):
            Budget.parse(wrong)


@pytest.mark.parametrize(
    "text", ["none", "equalize", "bias", "analytic_bias", "statistics", "equalize+bias", "equalize+statistics"]
)
def test_repairs_read_what_they_write(text: str):
    assert str(Repair.parse(text)) == text


def test_repairs_that_are_none():
    for wrong in ("equalise", "bias+analytic_bias", ""):
        with pytest.raises(SpecError):
            Repair.parse(wrong)
