"""The committed notebooks: run in order, with their outputs, and nothing in them of the machine that ran them."""

import asyncio
import json
import re
from pathlib import Path

import pytest
from test_decoder import make_model

FOLDER = Path(__file__).parents[1] / "notebooks"
NAMES = ["01_first_look", "02_gain_cost", "03_hooks_and_interventions", "04_your_model", "05_train_a_family"]
LARGEST = 600_000  # bytes
HANGS = 900  # seconds; on idle cores each takes one to two minutes, but these may be shared
DRAWS = re.compile(r"ld\.plots\.|sns\.|ax\.(plot|bar|step)|plt\.subplots")


@pytest.fixture(params=NAMES)
def notebook(request):
    return json.loads((FOLDER / f"{request.param}.ipynb").read_text(encoding="utf-8"))


def code(notebook):
    return [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]


def test_there_are_no_others():
    assert sorted(file.stem for file in FOLDER.glob("*.ipynb")) == NAMES


def test_one_constant_at_the_top_says_the_model(notebook):
    first, *others = code(notebook)
    assert re.fullmatch(r'MODEL = "tiny-plt-\d"', "".join(first["source"]))
    assert not any(re.search(r"\"tiny-plt-|^MODEL =", "".join(cell["source"]), re.MULTILINE) for cell in others)


def test_it_was_run_from_top_to_bottom_without_errors_and_warnings(notebook):
    cells = code(notebook)
    assert [cell["execution_count"] for cell in cells] == list(range(1, len(cells) + 1))
    outputs = [output for cell in cells for output in cell["outputs"]]
    assert outputs
    assert not any(output["output_type"] == "error" or output.get("name") == "stderr" for output in outputs)


def test_what_draws_shows_a_figure(notebook):
    for cell in code(notebook):
        source = "".join(cell["source"])
        if DRAWS.search(source) and "def " not in source:
            assert any("image/png" in output.get("data", ()) for output in cell["outputs"]), source


def test_nothing_is_in_it_of_the_machine_or_the_time(notebook):
    assert set(notebook["metadata"]) <= {"kernelspec", "language_info"}
    assert not any(cell["metadata"] for cell in notebook["cells"])
    text = json.dumps([cell["outputs"] for cell in code(notebook)])
    assert not re.findall(r"(?:/home|/root|/tmp|/usr|/work|/Users|/var|[A-Z]:\\\\)[/\\][\w./]+", text)
    assert " at 0x" not in text


@pytest.mark.parametrize("name", NAMES)
def test_it_is_small(name):
    assert (FOLDER / f"{name}.ipynb").stat().st_size < LARGEST


@pytest.mark.parametrize("name", NAMES)
def test_its_links_lead_somewhere(name):
    notebook = json.loads((FOLDER / f"{name}.ipynb").read_text(encoding="utf-8"))
    prose = "".join("".join(cell["source"]) for cell in notebook["cells"] if cell["cell_type"] == "markdown")
    links = [link for link in re.findall(r"\]\(([^)#]+)\)", prose) if "://" not in link]
    assert [link for link in links if not (FOLDER / link).exists()] == []


def executed(name, model):
    """The notebook, run from top to bottom in a kernel of its own with another model at its top; nothing is written."""
    import nbformat
    from nbclient import NotebookClient

    notebook = nbformat.read(FOLDER / f"{name}.ipynb", as_version=4)
    code(notebook)[0]["source"] = f"MODEL = {str(model)!r}"
    client = NotebookClient(notebook, timeout=None, resources={"metadata": {"path": str(FOLDER)}})
    return asyncio.run(asyncio.wait_for(client.async_execute(), HANGS))


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES[:-1])  # the last takes nothing but a tokenizer from its model
def test_it_runs_with_a_model_of_two_loops(name):
    found = executed(name, "tiny-plt-2")
    outputs = [output for cell in code(found) for output in cell["outputs"]]
    assert "tiny-plt-2" in json.dumps(outputs)
    assert not any(output.get("name") == "stderr" for output in outputs)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "lacks", "said"),
    [
        ("01_first_look", {"n_loops": 1}, "has one loop"),
        ("02_gain_cost", {"n_loops": 1}, "has one loop"),
        ("03_hooks_and_interventions", {"n_loops": 1}, "has n_loops=1"),
        ("03_hooks_and_interventions", {"memory": "own"}, "has n_loops=3 and memory='own'"),
    ],
)
def test_it_says_what_its_model_lacks(name, lacks, said, tmp_path):
    from nbclient.exceptions import CellExecutionError

    folder = tmp_path / "model"
    make_model(**lacks).save(folder)
    with pytest.raises(CellExecutionError) as found:
        executed(name, folder)
    assert found.value.ename == "ValueError"
    assert found.value.evalue.startswith(f"{folder} {said}")
    assert re.search("two (loops )?or more", found.value.evalue)
