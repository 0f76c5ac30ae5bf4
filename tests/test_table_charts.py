"""The charts of the honest table's page show speed beside stock, whatever the seconds were."""

import re
import sys
from itertools import pairwise
from pathlib import Path

from hypothesis import given
from hypothesis import strategies as st

sys.path.append(str(Path(__file__).parent.parent / "benchmarks"))
import table_charts
import winners
from contest import OURS, STOCK

ROWS = st.builds(
    lambda package, speed, ssim, perceptual, seconds: {
        "package": package, "method": "m" if package != STOCK else "fewer", "knob": 1.0,
        "parts": 1, "tuned": False, "ssim": ssim, "perceptual": perceptual,
        "speedup": {"median": speed}, "seconds": {"median": seconds},
    },
    st.sampled_from([OURS, STOCK, "peer"]), st.floats(0.5, 20.0), st.floats(0.2, 0.9999),
    st.floats(0.001, 0.9), st.floats(0.1, 50.0),
)  # fmt: skip


def places(svg):
    """Of each mark where its middle is."""
    circles = re.findall(r'cx="([\d.]+)" cy="([\d.]+)" r="5" class="mark', svg)
    square = re.findall(r'd="M([\d.]+) ([\d.]+)l6 6l-6 6l-6-6z" class="mark peer', svg)
    triangle = re.findall(r'd="M([\d.]+) ([\d.]+)l6 10h-12z" class="mark fewer', svg)
    found = [(float(x), float(y)) for x, y in circles]
    return found + [(float(x), float(y) + 6) for x, y in (*square, *triangle)]


@given(st.lists(ROWS, min_size=1, max_size=8))
def test_the_faster_the_further_right_and_the_nearer_the_lower(rows):
    lost = table_charts.LEAST
    for key, of in (
        ("ssim", lambda row: 1 - row["ssim"]),
        ("perceptual", lambda r: r["perceptual"]),
    ):
        svg = str(table_charts.Scatter("t", key, []).draw(rows))
        found = places(svg)
        assert len(found) == len(rows)
        ranked = sorted(rows, key=lambda row: row["speedup"]["median"])
        across = sorted(x for x, _ in found)
        assert table_charts.LEFT <= across[0] <= across[-1] <= table_charts.WIDE
        for (one, other), (left, right) in zip(pairwise(ranked), pairwise(across), strict=True):
            faster = other["speedup"]["median"] / one["speedup"]["median"]
            assert (right - left > 0.0) == (faster > 1.0) or faster < 1.01
        heights = sorted((max(lost, of(row)) for row in rows), reverse=True)
        down = sorted(y for _, y in found)
        for (most, less), (above, below) in zip(pairwise(heights), pairwise(down), strict=True):
            assert (below - above > 0.0) == (most > less) or most / less < 1.01


@given(st.lists(ROWS, min_size=1, max_size=4), st.floats(2.0, 9.0))
def test_seconds_move_no_mark(rows, slower):
    later = [row | {"seconds": {"median": row["seconds"]["median"] * slower}} for row in rows]
    before, after = (places(str(table_charts.draw(some))) for some in (rows, later))
    assert before == after


def test_stock_itself_is_no_mark():
    row = {"package": STOCK, "method": STOCK, "parts": 0, "tuned": False}
    assert winners.side(row) is None
    assert not table_charts.Scatter("t", "ssim", []).draw([row])
