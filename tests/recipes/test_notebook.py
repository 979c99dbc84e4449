"""The notebook runs from top to bottom, and what it computes is what it says."""

import json
import re
from pathlib import Path

import pytest

nbformat = pytest.importorskip("nbformat")
nbclient = pytest.importorskip("nbclient")
pytest.importorskip("ipykernel")
pytest.importorskip("matplotlib")

ROOT = Path(__file__).parents[2]
NOTEBOOK = ROOT / "recipes" / "sophia_in_ten_minutes.ipynb"

#: Shows what the cells have left, after the last of them.
PROBE = """
import json
print(json.dumps({
    "steps": STEPS,
    "adamw": adamw.state.log_history,
    "sophia": sophia.state.log_history,
    "range": [low, high],
    "loop": losses,
    "loop_norm": optimizer.hessian_norm().item(),
    "same_start": all(map(torch.equal, make_model().parameters(), make_model().parameters())),
}))
"""


@pytest.fixture(scope="module")
def executed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("notebook")
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    notebook.cells.append(nbformat.v4.new_code_cell(PROBE))
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {"STEPS": "20", "BLOCKS": "32", "OUTPUT": str(folder / "out")}.items():
            patch.setenv(name, value)
        for name in ("IPYTHONDIR", "JUPYTER_CONFIG_DIR", "JUPYTER_DATA_DIR", "JUPYTER_RUNTIME_DIR"):
            patch.setenv(name, str(folder / name.lower()))
        client = nbclient.NotebookClient(
            notebook, timeout=300, resources={"metadata": {"path": str(NOTEBOOK.parent)}}
        )
        client.execute()
    return notebook


def text_of(cell) -> str:
    return "".join(output.get("text", "") for output in cell.outputs)


def cell_of(notebook, name: str):
    return next(cell for cell in notebook.cells if cell.id == name)


def test_it_is_valid_and_comes_without_outputs() -> None:
    raw = json.loads(NOTEBOOK.read_text(encoding="utf-8"))
    assert (raw["nbformat"], raw["nbformat_minor"]) == (4, 5)
    notebook = nbformat.from_dict(raw)
    nbformat.validate(notebook)
    assert len({cell.id for cell in notebook.cells}) == len(notebook.cells)
    for cell in notebook.cells:
        if cell.cell_type == "code":
            assert (cell.outputs, cell.execution_count) == ([], None)


def test_its_links_lead_somewhere() -> None:
    texts = [c.source for c in nbformat.read(NOTEBOOK, 4).cells if c.cell_type == "markdown"]
    links = re.findall(r"\]\((?!http)([^)#]+)\)", "\n".join(texts))
    assert len(links) >= 3
    for path in [*links, *(f"../{p}" for p in re.findall(r"`(recipes/\w+\.py)`", " ".join(texts)))]:
        assert (NOTEBOOK.parent / path).exists(), path


def test_both_optimizers_learn_from_the_same_start(executed) -> None:
    found = json.loads(text_of(executed.cells[-1]))
    assert found["same_start"]
    first = {}
    for name in ("adamw", "sophia"):
        trained = [entry for entry in found[name] if "loss" in entry]
        evaluated = [entry["eval_loss"] for entry in found[name] if "eval_loss" in entry]
        assert [entry["step"] for entry in trained] == list(range(1, found["steps"] + 1))
        assert trained[-1]["loss"] < trained[0]["loss"] - 0.5
        assert len(evaluated) == 4
        assert evaluated[-1] < evaluated[0]
        first[name] = trained[0]["loss"]
    assert first["adamw"] == pytest.approx(first["sophia"], rel=1e-6)
    final = cell_of(executed, "compare")
    for name, entries in {"AdamW": found["adamw"], "Sophia": found["sophia"]}.items():
        last = [entry["eval_loss"] for entry in entries if "eval_loss" in entry][-1]
        assert f"{name}: validation loss {last:.3f}" in text_of(final)


def test_the_hessian_arrives_and_is_logged(executed) -> None:
    found = json.loads(text_of(executed.cells[-1]))
    logged = [entry for entry in found["sophia"] if "loss" in entry]
    assert all(entry["sophia/hessian_norm"] > 0 for entry in logged)
    assert {entry["sophia/hessian_tokens"] for entry in logged} == {16 * 127}
    # A hundredth of most tensors, and a half of embeddings.
    assert all(0 < entry["sophia/clip_fraction"] < 0.5 for entry in logged)
    assert not any("sophia/rho" in entry for entry in found["adamw"])
    table = cell_of(executed, "logs").outputs[0].data["text/html"]
    assert "sophia/clip_fraction" in table


def test_the_plain_loop_learns_and_the_doctor_gives_a_range(executed) -> None:
    found = json.loads(text_of(executed.cells[-1]))
    assert found["loop"][-1] < found["loop"][0]
    assert found["loop_norm"] > 0
    low, high = found["range"]
    assert 0 < low <= high
    assert f"try {low:.2g} to {high:.2g}" in text_of(cell_of(executed, "lr"))


def test_the_picture_is_in_the_notebook(executed) -> None:
    (picture,) = [
        out for out in cell_of(executed, "plot").outputs if "image/png" in out.get("data", {})
    ]
    assert len(picture.data["image/png"]) > 20_000
