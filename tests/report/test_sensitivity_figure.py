"""The figure of a sensitivity, by what is written in its SVG file."""

import re

import pytest

import lossprune
from lossprune.pruning import LayerSensitivity, SensitivityPoint
from lossprune.report import draw_sensitivity

STEPS = (0.5, 0.8, 0.95)


def layer(name, *changes, predicted=0.01):
    points = tuple(
        SensitivityPoint(sparsity, 3, 0.5 + change, change, predicted)
        for sparsity, change in zip(STEPS, changes, strict=True)
    )
    return LayerSensitivity(name, (2, 2), points)


def sensitivity(*layers, **settings):
    return lossprune.Sensitivity("QM", 0.5, 100, layers, **settings)


def texts(file):
    return re.findall(r"<text[^>]*>([^<]*)</text>", file.read_text())


def paths(file, colour):
    """The lines of a colour, each as the points that it is drawn through."""
    found = re.findall(rf'<path d="([^"]*)"[^>]*stroke: {colour}', file.read_text())
    return [[tuple(map(float, p.split())) for p in re.findall(r"[ML] (\S+ \S+)", d)] for d in found]


def test_panels_tell_names_limits_and_both_changes(tmp_path):
    found = sensitivity(
        layer("first.weight", 0.001, 0.04, 2.0),
        layer("second.weight", 0.2, 0.5, 1.0),
        layer("third.weight", 0.01, 0.02, 0.03),
    )
    svg, png = tmp_path / "s.svg", tmp_path / "s.png"
    files = draw_sensitivity(found, svg, str(png), network="mine:build", max_loss_increase=0.05)
    assert files == [svg, png]
    assert png.read_bytes().startswith(b"\x89PNG")
    written = texts(svg)
    for text in ("mine:build", "first", "second", "third", "realised", "predicted", "ΔL = 0.05"):
        assert text in written, text
    assert {"0.8", "&lt; 0.5", "0.95"} <= set(written)
    # Of the first layer, the realised change rises more than the predicted one, which is flat.
    lines = [line for line in paths(svg, "#d55e00") if len(line) == 3]
    realised, predicted = lines[0], lines[1]
    assert realised[0][1] > realised[1][1] > realised[2][1]
    assert len({y for _, y in predicted}) == 1
    assert [x for x, _ in realised] == [x for x, _ in predicted]
    before = svg.read_bytes()
    draw_sensitivity(found, svg, network="mine:build", max_loss_increase=0.05)
    assert svg.read_bytes() == before


def test_nothing_is_drawn_of_what_is_not_predicted_and_many_layers_have_room(tmp_path):
    long = "encoder.layers.{}.attention.output.dense.projection.weight"
    layers = [layer(long.format(n), 0.0, -0.1, 0.3 * n, predicted=None) for n in range(22)]
    (file,) = draw_sensitivity(sensitivity(*layers, no_prediction="none"), tmp_path / "s.svg")
    written = texts(file)
    assert "predicted" not in written
    assert any(text.endswith("no prediction: none") for text in written)
    names = [text for text in written if text.startswith("encoder") and "…" in text]
    assert len(names) == 22
    assert not any(text.startswith("ΔL =") for text in written)


def test_a_network_that_nothing_changes_is_drawn(tmp_path):
    (file,) = draw_sensitivity(sensitivity(layer("only.weight", 0, 0, 0)), tmp_path / "s.pdf")
    assert file.read_bytes().startswith(b"%PDF")
    with pytest.raises(ValueError, match=r"a figure is a \.png, \.svg or \.pdf file, got 's\.gif'"):
        draw_sensitivity(sensitivity(layer("only.weight", 0, 0, 0)), "s.gif")
