"""Fits, times and figure of benchmarks/growth.py."""

import pathlib
import sys

import pytest

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1] / "benchmarks"))
import growth


@pytest.mark.parametrize("power", [1.0, 1.5])
def test_the_exponent_is_that_of_the_upper_half(power):
    amounts = [1.0, 2, 4, 8, 16, 32]
    costs = [1e3, 1e3, 1e3, *(amount**power for amount in amounts[3:])]
    assert growth.exponent(amounts, costs) == pytest.approx(power)


def test_time_that_several_events_share_belongs_to_the_first_kind():
    spans = {"compile": [(2.0, 3.0)], "lower": [(1.5, 2.5)], "trace": [(0.0, 4.0), (1.0, 2.0)]}
    assert growth.exclusive(spans) == {"compile": 1.0, "lower": 0.5, "trace": 2.5}


def test_each_axis_varies_one_number():
    for axis, (field, values) in growth.AXES.items():
        row = growth.row_at(axis, values[0])
        assert getattr(row, field) in (values[0], (values[0], values[0], 1))
        assert len({growth.row_at(axis, value) for value in values}) == len(values)


@pytest.mark.nightly
def test_a_measured_axis_can_be_drawn(tmp_path):
    found = growth.measure_axis("inner steps", (1, 2, 3), rounds=1)
    points = found["points"].values()
    assert all(point["memory_bytes"] > 0 and point["median_s"] > 0 for point in points)
    growth.draw({"inner steps": found}, dict.fromkeys(growth.PARTS, 0.5), tmp_path / "growth.png")
    assert (tmp_path / "growth.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
def test_the_first_call_is_the_sum_of_its_parts():
    parts = growth.first_call()
    assert tuple(parts) == growth.PARTS
    assert min(parts.values()) > 0
