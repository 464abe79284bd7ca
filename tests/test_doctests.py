"""The examples in docstrings run, and say what comes out."""

import doctest
import importlib
from pathlib import Path

import pytest
from test_layout import MODULES
from test_measured import SEVERAL, made_up

finder = doctest.DocTestFinder(exclude_empty=True)
WITH_EXAMPLES = [name for name, file in MODULES.items() if ">>> " in file.read_text(encoding="utf-8")]
EXAMPLES = [
    pytest.param(example, id=example.name)
    for name in WITH_EXAMPLES
    for example in finder.find(importlib.import_module(f"loopdiag.{name}"))
    if example.examples
]


@pytest.mark.parametrize("example", EXAMPLES)
def test_an_example_of_a_docstring_runs(example, monkeypatch, tmp_path):
    """In a folder with a sweep, where two loops are best with the offset, and three without."""
    monkeypatch.chdir(tmp_path)
    if "sweep.nc" in example.docstring:
        (tmp_path / "sweeps" / "mine").mkdir(parents=True)
        made_up(SEVERAL).save(Path("sweeps") / "mine" / "sweep.nc")
    runner, said = doctest.DocTestRunner(optionflags=doctest.FAIL_FAST), []
    failed, tried = runner.run(example, out=said.append)
    assert tried
    assert not failed, "".join(said)


@pytest.mark.parametrize(
    "name",
    [
        *("model.loading.load", "trace.record", "trace.LoopTrace.from_states", "diagnosis.diagnose"),
        *("gaincost.curve.gain_cost", "gaincost.decision.recommend", "gaincost.measured.decompose"),
        *("measures.prediction.exits", "measures.diversity.effective_rank", "measures.similarity.cka"),
        *("interventions.contexts.skip_loop", "bootstrap.resampled_means"),
    ],
)
def test_the_main_functions_have_an_example(name):
    """So that the list above is not empty."""
    assert f"loopdiag.{name}" in {parameter.id for parameter in EXAMPLES}
