"""Charts are well-formed SVG, whatever the numbers, and show what they should."""

import re
from xml.etree import ElementTree

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lorasmith.evaluation.charts import Lengths, Line, draw_lengths, draw_lines, draw_share
from lorasmith.evaluation.statistics import Count


def parse(markup):
    return ElementTree.fromstring(f"<div>{markup}</div>")


@given(st.lists(st.tuples(st.integers(0, 10**6), st.floats(-1e9, 1e9)), min_size=1, max_size=30))
def test_any_line_stays_inside_its_chart(points):
    svg = parse(
        draw_lines([Line("a", "tuned", sorted(points))], x_label="step", y_label="loss", from_zero=False)
    )
    (line,) = svg.iter("polyline")
    for pair in line.get("points").split():
        x, y = map(float, pair.split(","))
        assert 52 <= x <= 628
        assert 9.9 <= y <= 186.1


def test_a_long_line_is_thinned_and_keeps_its_ends():
    points = [(step, float(step)) for step in range(100_000)]
    (line,) = parse(draw_lines([Line("a", "tuned", points)], x_label="s", y_label="y")).iter("polyline")
    places = line.get("points").split()
    assert len(places) == 400
    assert (places[0], places[-1]) == ("52.0,186.0", "628.0,10.0")


def test_numbers_that_are_none_are_left_out():
    lines = [Line("a", "tuned", [(1, 2.0), (2, float("nan")), (3, 1.0)]), Line("<b>", "mark", [(1, 1.0)])]
    svg = parse(draw_lines(lines, x_label="step", y_label="loss"))
    assert "nan" not in ElementTree.tostring(svg, "unicode")
    assert [span.text or span[0].tail for span in svg.iter("span")] == ["a", "<b>"]
    assert draw_lines([Line("a", "tuned", [(1, float("inf"))])], x_label="", y_label="") == ""


@pytest.mark.parametrize(
    ("count", "width"), [(Count(9, 30), "30.0"), (Count(0, 5), "0.0"), (Count(7, 7), "100.0")]
)
def test_a_share_is_as_wide_as_it_is(count, width):
    svg = parse(draw_share(count, "tuned"))
    assert [r.get("width") for r in svg.iter("rect")] == ["100", width]
    low, high = (100 * bound for bound in count.interval())
    whisker = next(svg.iter("line"))
    assert (float(whisker.get("x1")), float(whisker.get("x2"))) == pytest.approx((low, high), abs=0.06)


def test_every_length_is_in_one_bar():
    svg = parse(draw_lengths([Lengths("tuned", "tuned", [1, 1, 5, 40]), Lengths("base", "base", [])]))
    heights = [float(r.get("height")) for r in svg.iter("rect") if r.get("class") == "bar-tuned"]
    assert sum(height > 0 for height in heights) == 3
    assert max(heights) == 40  # the two of one word
    assert re.search(r">40<", ElementTree.tostring(svg, "unicode"))
