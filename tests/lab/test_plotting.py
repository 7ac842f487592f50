"""The figures' helpers: what is drawn, and a player that is self-contained and the same at every run."""

import base64
import io
import re

import matplotlib

matplotlib.use("agg")

import matplotlib.pyplot as plt
import numpy as np
import pytest
from PIL import Image

from companion.lab import plotting


@pytest.fixture
def axis():
    figure, axis = plt.subplots()
    yield axis
    plt.close(figure)


def test_prediction_is_dashed_and_measurement_solid(axis):
    k = np.arange(5)
    plotting.predicted_over_measured(axis, k, np.ones((3, 5)), 2 * np.ones(5))
    *measured, predicted = axis.get_lines()
    assert len(measured) == 3
    assert all(line.get_linestyle() == "-" for line in measured)
    assert predicted.get_linestyle() != "-"
    assert axis.get_legend_handles_labels()[1] == ["measured", "predicted"]
    assert predicted.get_ydata().tolist() == [2] * 5


def test_a_slope_guide_has_its_slope(axis):
    line = plotting.slope_guide(axis, [1.0, 10.0, 100.0], 3.0, -0.5, "-1/2")
    x, y = line.get_data()
    assert np.polyfit(np.log(x), np.log(y), 1) == pytest.approx([-0.5, np.log(3.0)])


def film(alt="a line that rises"):
    figure, axis = plt.subplots(figsize=(2, 1.5))
    (line,) = axis.plot([0, 1], [0, 0], color=plotting.COLOURS[1])
    axis.set_ylim(0, 1)
    return plotting.player(figure, lambda i: line.set_ydata([0, i / 2]), 3, alt=alt)


def test_a_player_is_self_contained_and_repeatable():
    markup = film()._repr_html_()
    assert markup == film()._repr_html_()
    assert not re.search(r"""(src|href)=["']?(https?:)?//""", markup)
    assert "fa fa-" not in markup
    assert 'alt="a line that rises"' in markup
    assert 'aria-label="frame of: a line that rises"' in markup
    assert len(re.findall(r'frames\[\d\] = "data:image/png', markup)) == 3
    assert 'src="data:image/png' in markup


def test_two_players_on_a_page_do_not_share_names():
    names = [set(re.findall(r'id="([^"]+)"', film(alt)._repr_html_())) for alt in ("one", "two")]
    assert names[0]
    assert not names[0] & names[1]


def test_frames_keep_thin_coloured_lines():
    frame = re.findall(r'base64,([^"]*)"', film()._repr_html_())[-1]
    picture = np.asarray(Image.open(io.BytesIO(base64.b64decode(frame))).convert("RGB")).astype(int)
    wanted = np.array([int(plotting.COLOURS[1][i : i + 2], 16) for i in (1, 3, 5)])
    assert np.abs(picture - wanted).sum(axis=-1).min() < 30


def test_alternative_text_is_escaped():
    assert "&quot;&lt;b&gt;" in film('"<b>')._repr_html_()
    assert "player" in repr(film())


def test_use_sets_the_style_and_nothing_else():
    with plt.rc_context():
        before = dict(plt.rcParams)
        plotting.use()
        changed = {key for key in before if plt.rcParams[key] != before[key]}
        assert plt.rcParams["axes.spines.top"] is False
    assert changed <= set(plotting._STYLE) | {"axes.prop_cycle"}
