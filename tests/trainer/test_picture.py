"""The picture of runs: what is drawn where, and that nothing is cut off."""

import math
import sys

import numpy as np
import pytest

from hf_sophia.trainer.picture import draw, new_figure

pytest.importorskip("matplotlib")


def history(steps: int = 40, sophia: bool = True, evaluations: bool = True, shift: float = 0.0):
    entries = []
    for step in range(1, steps + 1):
        loss = 3 + shift + 6 * math.exp(-step / 4)
        entry = {"step": step, "loss": loss, "learning_rate": 1e-3 * step, "grad_norm": 1.0}
        if sophia:
            own = {"clip_fraction": 0.1, "hessian_norm": 2.0**step, "rho": 0.3}
            entry |= {f"sophia/{name}": value for name, value in own.items()}
        entries.append(entry)
        if evaluations and step % 10 == 0:
            entries.append({"step": step, "eval_loss": loss + 0.1, "eval_runtime": 1.0})
    return [*entries, {"step": steps, "train_runtime": 3.0, "train_loss": 4.0}]


def panels(figure) -> dict[str, object]:
    return {axes.get_ylabel().split("\n")[0]: axes for axes in figure.axes}


def drawn(axes, index: int = 0) -> list[tuple[float, float]]:
    return [(float(x), float(y)) for x, y in zip(*axes.lines[index].get_data(), strict=True)]


def looks(figure) -> list[tuple]:
    lines = figure.legends[0].get_lines()
    return [(line.get_color(), line.get_linestyle(), line.get_marker()) for line in lines]


def rendered(figure) -> np.ndarray:
    """Draw it, small, and return its pixels."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    figure.set_dpi(60)
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3]


def test_each_value_is_drawn_over_its_own_steps() -> None:
    entries = history()
    axes = panels(draw({"run": entries}))
    assert list(axes) == ["loss (nats)", "learning rate", "clip fraction", "Hessian norm", "rho"]
    keys = ["loss", "learning_rate", "sophia/clip_fraction", "sophia/hessian_norm", "sophia/rho"]
    for panel, key in zip(axes.values(), keys, strict=True):
        assert drawn(panel) == [(e["step"], e[key]) for e in entries if key in e]
    losses = axes["loss (nats)"]
    assert drawn(losses, 1) == [(e["step"], e["eval_loss"]) for e in entries if "eval_loss" in e]
    assert [t.get_text() for t in losses.get_legend().get_texts()] == ["training", "validation"]
    scales = [panel.get_yscale() for panel in axes.values()]
    assert scales == ["linear", "linear", "linear", "log", "log"]
    assert {panel.get_xlabel() for panel in axes.values()} == {"", "optimizer steps"}


def test_what_no_run_has_is_left_out() -> None:
    adamw = history(sophia=False)
    assert list(panels(draw({"adamw": adamw}))) == ["loss (nats)", "learning rate"]
    both = panels(draw({"adamw": adamw, "sophia": history()}))
    assert len(both) == 5
    assert len(both["learning rate"].lines) == 2
    assert len(both["rho"].lines) == 1
    only = draw({"a": history(sophia=False, evaluations=False)}, unit="nats per token")
    assert "training loss (nats per token)" in panels(only)
    evaluated = [entry for entry in history() if "eval_loss" in entry]
    assert list(panels(draw({"a": evaluated}))) == ["validation loss (nats)"]


def test_a_run_has_one_look_in_all_panels_and_no_two_runs_look_alike() -> None:
    histories = {f"run {i}": history(sophia=i != 1, shift=i / 10) for i in range(20)}
    figure = draw(histories)
    assert len(set(looks(figure))) == 20
    # The first seven can be told apart without colours.
    assert len({(style, marker) for _, style, marker in looks(figure)[:7]}) == 7
    legend = dict(zip(histories, looks(figure), strict=True))
    rho = panels(figure)["rho"].lines
    with_rho = [name for name in histories if name != "run 1"]
    assert [line.get_color() for line in rho] == [legend[name][0] for name in with_rho]


def test_colours_reach_the_picture() -> None:
    pixels = rendered(draw({"one": history(), "other": history(shift=1.0)}))
    colours = {tuple(int(c) for c in pixel) for pixel in pixels.reshape(-1, 3)}
    assert {(0, 114, 178), (213, 94, 0)} <= colours


@pytest.mark.parametrize(
    "names",
    [
        ["a run"],
        ["sophia", "adamw"],
        [f"run_{i}" for i in range(12)],
        [f"a folder with learning_rate=0.00{i} and {'many more words ' * 8}" for i in range(4)],
        ["x" * 300],
        ["x" * 200, "y" * 200],
    ],
    ids=["one", "two", "twelve", "long", "one very long", "two very long"],
)
def test_nothing_overlaps_or_is_cut_off(names) -> None:
    figure = draw({name: history(shift=i / 5) for i, name in enumerate(names)})
    rendered(figure)
    renderer = figure.canvas.get_renderer()
    boxes = [axes.get_tightbbox(renderer) for axes in figure.axes]
    boxes += [legend.get_window_extent(renderer) for legend in figure.legends]
    if figure.get_suptitle():
        boxes.append(figure._suptitle.get_window_extent(renderer))
    whole = figure.bbox
    for i, box in enumerate(boxes):
        assert box.x0 >= whole.x0
        assert box.y0 >= whole.y0
        assert box.x1 <= whole.x1
        assert box.y1 <= whole.y1
        for other in boxes[i + 1 :]:
            assert not box.overlaps(other)
    # Panels keep their size, however much there is to name.
    assert min(axes.get_window_extent().height for axes in figure.axes) > 60 * 1.5


def test_names_are_shown_as_they_are() -> None:
    names = ["_begins_with_an_underscore", "costs $5 or $6^"]
    figure = draw({name: history() for name in names})
    rendered(figure)
    texts = figure.legends[0].get_texts()
    assert [text.get_text() for text in texts] == [f"./{names[0]}", names[1]]
    assert not any(text.get_parse_math() for text in texts)
    title = draw({"a": history()}, title="a $ sign, $x^").get_suptitle()
    assert title == "a $ sign, $x^"


def test_the_first_losses_do_not_squeeze_the_rest() -> None:
    entries = history(steps=100, evaluations=False)
    low, high = panels(draw({"a": entries}))["training loss (nats)"].get_ylim()
    late = [entry["loss"] for entry in entries if entry["step"] >= 5 and "loss" in entry]
    assert low < min(late) < max(late) < high < entries[0]["loss"]


@pytest.mark.parametrize("value", [math.nan, math.inf, 0.0, -1.0, "high", None])
def test_values_that_have_no_place_leave_a_gap(value) -> None:
    entries = history()
    entries[20] = {**entries[20], "loss": value, "sophia/hessian_norm": value}
    figure = draw({"a": entries})
    assert rendered(figure).min() == 0
    assert 3 <= panels(figure)["loss (nats)"].get_ylim()[1] < 9
    assert len(drawn(panels(figure)["Hessian norm"])) >= 39


def test_a_hessian_of_zeros_is_drawn_on_a_linear_scale() -> None:
    entries = [{**e, "sophia/hessian_norm": 0.0} for e in history() if "loss" in e]
    figure = draw({"a": entries})
    assert panels(figure)["Hessian norm"].get_yscale() == "linear"
    assert rendered(figure).min() == 0


def test_a_value_that_stays_has_a_number_beside_it() -> None:
    figure = draw({"a": history()})
    rendered(figure)
    rho = panels(figure)["rho"]
    low, high = rho.get_ylim()
    ticks = zip(rho.get_yticks(), rho.get_yticklabels(), strict=True)
    assert any(low < tick < high and label.get_text() for tick, label in ticks)


def test_a_single_entry_is_a_point() -> None:
    figure = draw({"a": history(steps=1, evaluations=False)})
    assert panels(figure)["training loss (nats)"].lines[0].get_marker() == "o"


def test_a_run_without_logs_is_named() -> None:
    with pytest.raises(ValueError, match=r"'empty' has logged nothing to draw.*--logging_steps"):
        draw({"full": history(), "empty": [{"step": 3, "train_runtime": 1.0}]})
    with pytest.raises(ValueError, match="no runs"):
        draw({})


def test_the_process_keeps_its_backend() -> None:
    import matplotlib

    before = matplotlib.rcParams._get_backend_or_none()
    rendered(draw({"a": history()}))
    assert matplotlib.rcParams._get_backend_or_none() == before


def test_without_matplotlib_the_remedy_is_named(monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'hf_sophia\[plots\]'"):
        new_figure()
