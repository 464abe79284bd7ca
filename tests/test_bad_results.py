"""Saved results as bad days bring them: refused with the file's name, or read whole."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import h5py
import numpy as np
import pytest
import xarray as xr
from synthetic import make
from test_cli import run
from test_plots_sweeps import make_sweep

from loopdiag import results
from loopdiag.cli.runs import kind_of
from loopdiag.diagnosis import DECIDING, Diagnosis
from loopdiag.interventions import Effects
from loopdiag.losses import SweepLosses
from loopdiag.scores import ProbeScores

ROOT = Path(__file__).parents[1]
PLACES = ("target", "hook", "loop", "document")


def make_effects():
    names, documents = ["a", "b"], [f"d{number}" for number in range(6)]
    values = np.random.default_rng(0).random((3, 2, 6))
    about = {"schema": Effects.SCHEMA, "model": "m", "corpus": "c", "absent": {}}
    about |= {"trained_loops": 2, "run_loops": 2, "documents": 6, "tokens": 60, "sources": 6}
    both = ("intervention", "document")
    data = {name: (both, values[place]) for place, name in enumerate(("effect", "helped", "harmed"))}
    coords = {"intervention": names, "document": documents, "source": ("document", documents)}
    coords |= {name: ("intervention", value) for name, value in (("group", names), ("change", names), ("loop", [0, 2]))}
    return Effects(xr.Dataset(data | {"nll": ("document", values[0, 0])}, coords, {"provenance": json.dumps(about)}))


def make_scores():
    data = {name: (PLACES, np.full((1, 1, 3, 6), 0.5)) for name in ("score", "control", "floor", "nll")}
    data |= {name: (PLACES[:3], np.ones((1, 1, 3))) for name in ("C", "control_C", "floor_C")}
    data |= {name: (("target", "loop", "document"), np.ones((1, 3, 6))) for name in ("baseline", "baseline_nll")}
    documents = [f"d{number}" for number in range(6)]
    about = {"schema": ProbeScores.SCHEMA, "suite": "s", "unit": "accuracy", "model": "m", "corpus": "c", "absent": {}}
    about |= {"trained_loops": 2, "run_loops": 2, "documents": 6}
    coords = {
        "target": ["t"],
        "hook": ["h"],
        "loop": [0, 1, 2],
        "document": documents,
        "source": ("document", documents),
    }
    return ProbeScores(xr.Dataset(data, coords, {"provenance": json.dumps(about)}))


MADE = {
    "diagnosis": lambda: make(2, groups=("offset", "prediction"), documents=6),
    "effects": make_effects,
    "sweep": make_sweep,
    "scores": make_scores,
}


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """One result of each kind, and its file."""
    folder = tmp_path_factory.mktemp("saved")
    found = {}
    for name, build in MADE.items():
        found[name] = build(), folder / f"{name}.nc"
        found[name][0].save(found[name][1])
    return found


def refuse(kind, file, said=""):
    with pytest.raises(kind.ERROR, match=rf"{file.name} .*{said}"):
        kind.load(file)


def written(result, file, dataset=None, **about):
    """The same file with other contents or another provenance."""
    dataset = result.data if dataset is None else dataset
    provenance = json.dumps(result.provenance | about)
    dataset.assign_attrs(provenance=provenance, kind=result.KIND).to_netcdf(file, engine="h5netcdf")
    return file


@pytest.mark.parametrize("kind", MADE)
def test_whole_results_are_read(saved, kind):
    result, file = saved[kind]
    xr.testing.assert_identical(type(result).load(file).data, result.data)


@pytest.mark.parametrize("kind", MADE)
@pytest.mark.parametrize("share", [0.0, 0.01, 0.3, 0.7, 0.99])
def test_cut_short(saved, tmp_path, kind, share):
    result, file = saved[kind]
    (tmp_path / "x.nc").write_bytes(file.read_bytes()[: int(share * file.stat().st_size)])
    refuse(type(result), tmp_path / "x.nc", f"holds no {result.KIND}")


@pytest.mark.parametrize("kind", MADE)
@pytest.mark.parametrize("schema", [0, -1, 99, 1.5, "3", None, [], {}, True])
def test_another_schema(saved, tmp_path, kind, schema):
    result, _ = saved[kind]
    if schema == result.SCHEMA:  # True is 1
        schema = False
    file = written(result, tmp_path / "x.nc", schema=schema)
    refuse(type(result), file, rf"has schema .*this version of loopdiag reads {result.SCHEMA}\. Measure again")


@pytest.mark.parametrize("kind", MADE)
def test_every_part_that_is_missing_is_named(saved, tmp_path, kind):
    """Each variable and coordinate that every such file holds, and each key of its provenance."""
    result, _ = saved[kind]
    for name in {**result.numbers(result.data), **result.TEXTS}:
        if kind != "diagnosis" or name in (*Diagnosis.NUMBERS, *Diagnosis.TEXTS, *DECIDING):
            file = written(result, tmp_path / "x.nc", result.data.drop_vars(name))
            refuse(type(result), file, rf"is no whole {result.KIND}: it has no {name}\. Measure again: `loopdiag")
    for key in result.ABOUT:
        about = {other: value for other, value in result.provenance.items() if other != key}
        data = result.data.assign_attrs(provenance=json.dumps(about), kind=result.KIND)
        data.to_netcdf(tmp_path / "x.nc", engine="h5netcdf")
        refuse(type(result), tmp_path / "x.nc", f"its provenance has no {key}")


@pytest.mark.parametrize("kind", MADE)
def test_every_part_of_another_form_is_named(saved, tmp_path, kind):
    """Numbers that are texts, texts that are numbers, dimensions in another order, keys of another type."""
    result, _ = saved[kind]
    data = result.data
    for name, dims in {**result.numbers(data), **result.TEXTS}.items():
        if kind == "diagnosis" and name not in (*Diagnosis.NUMBERS, *Diagnosis.TEXTS, *DECIDING):
            continue
        if name in data.dims:
            other = data.assign_coords(
                {name: [f"{x}" if name in result.numbers(data) else 0.5 for x in data[name].values]}
            )
        elif len(dims) > 1:
            other = data.assign({name: data[name].transpose(*dims[::-1])})
        elif name in result.TEXTS:
            other = data.assign_coords({name: (dims, np.arange(data.sizes[dims[0]]))})
        else:
            other = data.assign({name: data[name].astype(str)})
        refuse(type(result), written(result, tmp_path / "x.nc", other), rf"its {name} has dimensions .* should be")
    for key, of in result.ABOUT.items():
        if of is not object:
            refuse(type(result), written(result, tmp_path / "x.nc", **{key: 0.5}), f"{key} in its provenance is 0.5")


@pytest.mark.parametrize(
    "loops",
    [[0], [1, 2, 3], [0, 1, 1], [2, 1, 0], [0, 2, 1], [-1, 0, 2], [0, 1, 2**40], [0.0, np.nan, 2.0], [0, 1, 5]],
    ids=str,
)
def test_loops_that_cannot_be(saved, tmp_path, loops):
    result, _ = saved["diagnosis"]
    data = result.data.isel(loop=slice(len(loops))).assign_coords(loop=loops)
    refuse(Diagnosis, written(result, tmp_path / "x.nc", data), "its loops are .* should rise from 0 to the 2")


@pytest.mark.parametrize("dim", ["document", "loop"])
def test_nothing_in_it(saved, tmp_path, dim):
    result, _ = saved["diagnosis"]
    refuse(Diagnosis, written(result, tmp_path / "x.nc", result.data.isel({dim: []})), f"it has no {dim}")


# -- files of other people --------------------------------------------------------------------------


def hdf5(file, build):
    with h5py.File(file, "w") as content:
        build(content)


def linked(content):
    content["nll_exit"] = h5py.ExternalLink("/etc/passwd", "/")


def soft(content):
    content["nll_exit"] = h5py.SoftLink("/nowhere")


def outside(content):
    content.create_dataset("nll_exit", (100,), "u1", external=[("/etc/passwd", 0, 100)])


def virtual(content):
    layout = h5py.VirtualLayout((4,), "f8")
    layout[:] = h5py.VirtualSource("/nowhere.h5", "x", (4,))
    content.create_virtual_dataset("nll_exit", layout)


def giant(content):
    content.create_dataset("nll_exit", (10**6, 10**6), "f8", chunks=(1000, 1000), compression="gzip")


def compound(content):
    content["a"] = np.zeros(3, [("x", "f8"), ("y", "i4")])


def references(content):
    content.create_group("g")
    content.create_dataset("a", data=content["g"].ref)


FOREIGN = {
    "empty": lambda content: None,
    "a group": lambda content: content.create_group("g/h/i"),
    "plain arrays": lambda content: content.create_dataset("a", data=np.zeros((3, 4))),
    "other provenance": lambda content: content.attrs.update(provenance="by hand"),
    "provenance of numbers": lambda content: content.attrs.update(provenance=np.arange(5)),
    "provenance nested without end": lambda content: content.attrs.update(provenance="[" * 50_000),
    "provenance of another tool": lambda content: content.attrs.update(provenance='{"schema": "w3c"}'),
    "compound types": compound,
    "references": references,
    "a link to another file": linked,
    "a link to nothing": soft,
    "numbers in another file": outside,
    "a virtual dataset": virtual,
    "terabytes of nothing": giant,
}


@pytest.mark.parametrize("build", FOREIGN.values(), ids=FOREIGN)
@pytest.mark.parametrize("kind", [Diagnosis, Effects, SweepLosses, ProbeScores])
def test_foreign_hdf5(tmp_path, kind, build):
    hdf5(tmp_path / "x.nc", build)
    refuse(kind, tmp_path / "x.nc", f"(holds no {kind.KIND}|has schema)")


@pytest.mark.parametrize("build", [linked, soft, outside, virtual, giant])
def test_a_result_that_refers_to_another_file(saved, tmp_path, build):
    """However whole it is besides: what stands elsewhere is never read, nor is room made for terabytes."""
    _, file = saved["diagnosis"]
    shutil.copy(file, tmp_path / "x.nc")
    with h5py.File(tmp_path / "x.nc", "a") as content:
        del content["nll_exit"]
        build(content)
    refuse(Diagnosis, tmp_path / "x.nc", "is a link|stands in another file|bytes of memory|holds no diagnosis")


def coordinate(content):
    """Two gigabytes of one number, as an index that is read when the file is opened."""
    content.create_dataset("loop2", data=None, shape=(2**28,), dtype="i8", chunks=(2**22,), compression="gzip")
    content["loop2"].make_scale("loop2")


def test_a_small_file_that_takes_gigabytes(saved, tmp_path):
    """Refused before it is opened as a dataset, which would read its indexes."""
    _, file = saved["diagnosis"]
    shutil.copy(file, tmp_path / "x.nc")
    with h5py.File(tmp_path / "x.nc", "a") as content:
        coordinate(content)
    code = (
        "import resource, sys\n"
        "from loopdiag.diagnosis import Diagnosis\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "try:\n"
        "    Diagnosis.load(sys.argv[1])\n"
        "except Exception as error:\n"
        "    print(error)\n"
        "print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024)\n"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "x.nc")]
    message, megabytes = subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()
    assert "bytes of memory" in message
    assert int(megabytes) < 200


def test_texts_are_counted_as_they_are_read(tmp_path, monkeypatch):
    """However few bytes of the file they all refer to."""
    with h5py.File(tmp_path / "x.h5", "w") as content:
        texts = content.create_dataset("texts", data=["abc", "de"] * 6, dtype=h5py.string_dtype())
        table = content.create_dataset("table", data=np.array([["abc", "", "d"]] * 2, object), dtype=texts.dtype)
        one = content.create_dataset("one", data="abcd", dtype=texts.dtype)
        assert results._text_bytes(texts, 5, 1000) == 30
        assert results._text_bytes(table, 2, 1000) == 8
        assert results._text_bytes(one, 2, 1000) == 4
        assert results._text_bytes(texts, 2, 9) == 10


@pytest.mark.parametrize("build", [outside, giant])
def test_what_kind_of_file_it_is_takes_its_attributes_alone(tmp_path, build):
    hdf5(tmp_path / "x.nc", build)
    with h5py.File(tmp_path / "x.nc", "a") as content:
        content.attrs["kind"] = "sweep"
    assert kind_of(tmp_path / "x.nc") == "sweep"
    (tmp_path / "text.nc").write_text("text")
    assert kind_of(tmp_path / "text.nc") is None


NO_HDF5 = {
    "empty": b"",
    "text": b"nll_exit,gain\n1,2\n",
    "JSON": b'{"schema": 3}',
    "a pickle": b"cbuiltins\nopen\n(X\x06\x00\x00\x00openedX\x01\x00\x00\x00wtR.",
    "a zip": b"PK\x03\x04" + bytes(100),
    "netCDF 3": b"CDF\x01" + bytes(100),
    "a signature alone": b"\x89HDF\r\n\x1a\n",
    "a signature and noise": b"\x89HDF\r\n\x1a\n" + bytes(range(256)) * 20,
}


@pytest.mark.parametrize("content", NO_HDF5.values(), ids=NO_HDF5)
def test_no_hdf5_at_all(tmp_path, monkeypatch, content):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "x.nc").write_bytes(content)
    refuse(Diagnosis, tmp_path / "x.nc", "holds no diagnosis")
    assert sorted(file.name for file in tmp_path.iterdir()) == ["x.nc"]


def test_flipped_bits(saved, tmp_path):
    """Refused or read, and nothing else; in a process of its own, since a library below could end it."""
    _, file = saved["diagnosis"]
    code = (
        "import random, sys\n"
        "from pathlib import Path\n"
        "from loopdiag.diagnosis import Diagnosis, DiagnosisError\n"
        "good, file, draw = Path(sys.argv[1]).read_bytes(), Path(sys.argv[2]), random.Random(0)\n"
        "for number in range(40):\n"
        "    bad = bytearray(good)\n"
        "    bad[draw.randrange(3000 if number % 2 else len(good))] ^= 1 << draw.randrange(8)\n"
        "    file.write_bytes(bad)\n"
        "    try:\n"
        "        Diagnosis.load(file)\n"
        "    except DiagnosisError as refused:\n"
        "        assert str(refused).startswith(str(file))\n"
    )
    command = [sys.executable, "-c", code, str(file), str(tmp_path / "x.nc")]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=300)
    assert done.returncode == 0, done.stderr


def test_room_is_made_for_what_a_file_can_hold(saved, monkeypatch):
    """A file is read up to a size, and beyond it as long as it is packed as numbers are."""
    _, file = saved["diagnosis"]
    monkeypatch.setattr(results, "LARGE", 0)
    assert Diagnosis.load(file)
    monkeypatch.setattr(results, "MOST_PACKED", 0.01)
    refuse(Diagnosis, file, "bytes of memory")


@pytest.mark.parametrize("command", ["recommend", "figures", "report"])
@pytest.mark.parametrize("make_file", ["cut", "foreign", "schema", "lacking", "text"])
def test_the_command_line_refuses(saved, tmp_path, command, make_file):
    """One message, exit code 2, nothing written."""
    result, good = saved["diagnosis"]
    file = tmp_path / "x.nc"
    if make_file == "cut":
        file.write_bytes(good.read_bytes()[:5000])
    elif make_file == "foreign":
        hdf5(file, compound)
    elif make_file == "schema":
        written(result, file, schema=99)
    elif make_file == "lacking":
        written(result, file, result.data.drop_vars("source"))
    else:
        file.write_text("numbers")
    out = {"recommend": ["--json", tmp_path / "out"], "figures": ["--out", tmp_path / "out"]}
    done = run(command, file, "--quiet", *out.get(command, ["--out", tmp_path / "out"]))
    assert (done.exit_code, done.stdout) == (2, "")
    assert done.stderr.startswith(f"error: {file} ")
    assert not (tmp_path / "out").exists()


def test_one_document_has_no_interval(saved, tmp_path):
    """What a single document leaves undefined is null in the JSON and is no number in the table."""
    result, _ = saved["diagnosis"]
    written(result, tmp_path / "x.nc", result.data.isel(document=[0]), documents=1)
    done = run("recommend", tmp_path / "x.nc", "--json", tmp_path / "a.json")
    assert done.exit_code in (0, 3), done.output
    told = json.loads((tmp_path / "a.json").read_text())
    assert all(row["nll_exit_low"] is None for row in told["loops"])
    assert not {"nan", "None"} & set(done.stdout.replace("[", " ").replace(",", " ").replace("]", " ").split())
