"""Python source of installed packages, as training text and as held-out documents."""

from __future__ import annotations

import hashlib
import importlib.metadata
import importlib.util
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

# Import names. Everything in both lists is installed by the project's own constraints.
TRAINING_PACKAGES = (
    *("IPython", "PIL", "accelerate", "beartype", "datasets", "fontTools", "huggingface_hub", "hypothesis"),
    *("jupyter_server", "matplotlib", "mpl_toolkits", "mypy", "numpy", "pandas", "pyarrow", "pydantic", "scipy"),
    *("setuptools", "sklearn", "sympy", "torch", "torchgen", "transformer_lens", "transformers", "wandb", "xarray"),
)
HELD_OUT_PACKAGES = (
    *("anyio", "arrow", "babel", "bs4", "charset_normalizer", "click", "dateutil", "einops", "filelock", "fsspec"),
    *("h11", "hatchling", "httpcore", "httpx", "ipykernel", "ipywidgets", "jedi", "jinja2", "joblib"),
    *("jsonschema", "jupyter_client", "lark", "markdown_it", "mistune", "mpmath", "narwhals", "nbclient"),
    *("nbconvert", "nbformat", "networkx", "packaging", "parso", "platformdirs", "pluggy", "prompt_toolkit"),
    *("pycparser", "requests", "rich", "seaborn", "soupsieve", "tomlkit", "tornado", "traitlets", "typer"),
    *("urllib3", "websocket", "yaml"),
)
# Copies of other people's packages (which could hold held-out text), tests, and data kept as code.
SKIPPED_FOLDERS = re.compile(r"^(_?vendor(ed)?|_?vendored_packages|externals?|extern|tests?|testing|locale|_pb2.*)$")
LARGEST_FILE = 100_000  # characters; above it files are tables or generated code


@dataclass(frozen=True)
class SourceFile:
    """One file of an installed package: its text and where it came from."""

    package: str
    path: str  # inside the package, with forward slashes
    text: str

    @property
    def key(self) -> str:
        """A hash that orders files independently of names and machines."""
        return hashlib.sha256(f"{self.package}/{self.path}".encode()).hexdigest()


def package_files(package: str) -> Iterator[SourceFile]:
    """The Python files of an installed package, tests and vendored copies left out.

    Raises:
        ModuleNotFoundError: The package is not installed; the message says how to get it.
    """
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise ModuleNotFoundError(
            f"{package} is not installed here: the family is trained on the packages of the pinned environment; "
            "`make test` brings it."
        )
    root = Path(next(iter(spec.submodule_search_locations)))
    for file in sorted(root.rglob("*.py")):
        parts = file.relative_to(root).parts
        if any(SKIPPED_FOLDERS.match(part) for part in parts[:-1]):
            continue
        text = file.read_text(encoding="utf-8", errors="replace")
        if text.strip() and len(text) <= LARGEST_FILE and "\ufffd" not in text:
            yield SourceFile(package, "/".join(parts), text)


def installed() -> list[str]:
    """The training packages that are installed here: all of them in the project's own environment."""
    return [package for package in TRAINING_PACKAGES if importlib.util.find_spec(package)]


def training_files(
    held_out: list[str], characters_per_package: int, packages: Sequence[str] | None = None
) -> list[SourceFile]:
    """Training text: files of the packages, of all training packages when None, in hash order, up to a limit for each.

    Files that share five lines in a row with a held-out document are dropped: packages copy from each other.
    """
    forbidden = {window for text in held_out for window in _line_windows(text)}
    chosen: list[SourceFile] = []
    for package in TRAINING_PACKAGES if packages is None else packages:
        taken = 0
        for file in sorted(package_files(package), key=lambda file: file.key):
            if taken >= characters_per_package:
                break
            if forbidden.isdisjoint(_line_windows(file.text)):
                chosen.append(file)
                taken += len(file.text)
    return sorted(chosen, key=lambda file: file.key)


def _line_windows(text: str, lines: int = 5) -> Iterator[tuple[str, ...]]:
    kept = [line.strip() for line in text.splitlines() if len(line.strip()) > 3]
    return zip(*(kept[start:] for start in range(lines)), strict=False)


def excerpt(file: SourceFile, characters: int) -> str | None:
    """A piece of a file from a top-level definition on, so that documents do not all start with imports."""
    starts = [match.start() for match in re.finditer(r"^(?:@|def |class |async def )", file.text, re.MULTILINE)]
    starts = [start for start in starts if len(file.text) - start >= characters]
    if not starts:
        return None
    start = starts[int(file.key, 16) % len(starts)]
    piece = file.text[start : start + characters]
    return piece[: piece.rfind("\n") + 1] or None


def licence(package: str) -> tuple[str, str, str]:
    """Name and version of the distribution, its licence in a line, and the text of its licence file."""
    distribution = importlib.metadata.distribution(importlib.metadata.packages_distributions()[package][0])
    about = distribution.metadata
    classifiers = [
        line.split("::")[-1].strip() for line in about.get_all("Classifier", []) if line.startswith("License")
    ]
    named = [*about.get_all("License-Expression", []), "; ".join(classifiers), *about.get_all("License", [])]
    stated = next((line.split("\n")[0] for line in named if line), None)
    files = [file for file in distribution.files or [] if re.fullmatch(r"(LICEN[SC]E|COPYING)(\.\w+)?", file.name)]
    if not stated or not files:
        raise LookupError(f"{package} states no licence that could be bundled with its text.")
    return f"{about['Name']} {distribution.version}", stated, str(files[0].read_text())
