"""What the documents say is so: links lead somewhere, commands and flags exist, examples in Python run."""

from __future__ import annotations

import ast
import contextlib
import doctest
import importlib
import importlib.util
import io
import pkgutil
import re
import shlex
import shutil
import tomllib
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest
from PIL import Image

import refinedet
from conftest import FolderFactory
from refinedet import cli
from refinedet.cli.training import DEFAULT_PRESETS
from refinedet.presets import PRESETS

ROOT = Path(__file__).parents[1]
DOCUMENTS = sorted(
    path.relative_to(ROOT).as_posix()
    for pattern in ("*.md", "docs/*.md", "experiments/*.md", "examples/*.md", "src/refinedet/weights/*/README.md")
    for path in ROOT.glob(pattern)
)
LINK = re.compile(r"!?\[[^\]]*\]\(([^)\s]+)\)")
INLINE_CODE = re.compile(r"(?<!`)`([^`\n]+)`(?!`)")
FLAG = re.compile(r"(?<![\w-])--[a-z][a-z0-9.-]*")
OTHER_PROGRAMS = {"--nproc-per-node", "--shm-size"}
"""Flags of torchrun and docker, which documents mention outside of a command."""


@cache
def text_of(document: str) -> str:
    return (ROOT / document).read_text(encoding="utf-8")


def blocks(document: str, language: str | None = None) -> list[str]:
    """Fenced code blocks, of one language or of any."""
    fenced = re.findall(r"^```(\w*)\n(.*?)^```", text_of(document), re.MULTILINE | re.DOTALL)
    return [code for name, code in fenced if language is None or name == language]


def indented(document: str) -> list[str]:
    """Lines of indented code blocks, continued lines joined."""
    prose = re.sub(r"^```.*?^```", "", text_of(document), flags=re.MULTILINE | re.DOTALL)
    lines = [line.strip() for line in prose.splitlines() if line.startswith("    ")]
    return "\n".join(lines).replace("\\\n", " ").splitlines()


def commands(document: str) -> Iterator[list[str]]:
    """The calls of ``refinedet`` in a document, as lists of words after the program's name."""
    lines = [*indented(document), *INLINE_CODE.findall(text_of(document))]
    for code in blocks(document):
        lines += code.replace("\\\n", " ").splitlines()
    for line in lines:
        call = re.search(r"(?:^|torchrun .* -m |python -m |\$ )refinedet (?=[a-zA-Z-])(.*)", line.strip())
        if call is not None:
            yield shlex.split(re.sub(r"[\[\]](?!-|:|\d|')|\.\.\.", " ", call[1]), comments=True)


@cache
def known_flags(verb: str) -> frozenset[str]:
    """All flags of a verb, from its own help."""
    calls = [[verb, "--help-all" if verb in DEFAULT_PRESETS else "--help"]]
    calls += [["train", "--resume", "runs/a", "--help-all"]] if verb == "train" else []
    output = io.StringIO()
    with contextlib.redirect_stdout(output):
        assert [cli.main(call) for call in calls] == [0] * len(calls)
    return frozenset(FLAG.findall(output.getvalue())) | {"--resume", "--help", "--help-all"}


def slugs(document: str) -> set[str]:
    """Anchors of the headings, as GitHub makes them."""
    prose = re.sub(r"^```.*?^```", "", text_of(document), flags=re.MULTILINE | re.DOTALL)
    headings = re.findall(r"^#+ (.+)$", prose, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("document", DOCUMENTS)
def test_links_lead_somewhere(document: str) -> None:
    for target in LINK.findall(text_of(document)):
        if re.match(r"[a-z]+:", target):
            continue
        file, _, anchor = target.partition("#")
        path = (ROOT / document).parent / file if file else ROOT / document
        assert path.exists(), f"{document}: {target}: no such file"
        if anchor:
            linked = path.resolve().relative_to(ROOT.resolve()).as_posix()
            assert anchor in slugs(linked), f"{document}: {target}: no such heading"


def test_every_document_is_linked_from_the_readme() -> None:
    linked = {target.partition("#")[0] for target in LINK.findall(text_of("README.md"))}
    assert {name for name in DOCUMENTS if name.startswith("docs/")} <= linked


@pytest.mark.parametrize("document", DOCUMENTS)
def test_commands_name_verbs_presets_and_flags_that_exist(document: str) -> None:
    for words in commands(document):
        verb = words[0]
        if verb.startswith("-"):
            assert verb in ("--version", "--help")
            continue
        assert verb == "COMMAND" or verb in cli.VERBS, f"{document}: refinedet {verb}"
        if verb == "COMMAND":
            continue
        given = {word.partition("=")[0] for word in words if FLAG.match(word)}
        assert given <= known_flags(verb), f"{document}: refinedet {verb} {sorted(given - known_flags(verb))}"
        first = words[1] if len(words) > 1 else "-"
        if verb in DEFAULT_PRESETS and not first.startswith("-"):
            assert first in ("PRESET", "NAME") or first in PRESETS, f"{document}: refinedet {verb} {first}"


@pytest.mark.parametrize("document", [name for name in DOCUMENTS if not name.startswith(("experiments", "CHANGELOG"))])
def test_flags_in_the_text_exist(document: str) -> None:
    known = frozenset().union(*(known_flags(verb) for verb in cli.VERBS)) | OTHER_PROGRAMS
    for code in INLINE_CODE.findall(text_of(document)):
        if not re.match(r"(python|pip|git|make|ray|sbatch|kubectl|kill|\S*/pip|torchrun|docker) ", code):
            unknown = set(FLAG.findall(code)) - known
            assert not unknown, f"{document}: {code}: no such flag"


@pytest.mark.parametrize("document", DOCUMENTS)
def test_python_compiles_and_imports_what_exists(document: str) -> None:
    for code in blocks(document, "python"):
        for node in ast.walk(ast.parse(code)):
            if isinstance(node, ast.Import):
                for alias in node.names:
                    importlib.import_module(alias.name)
            if isinstance(node, ast.ImportFrom) and node.module is not None:
                module = importlib.import_module(node.module)
                missing = [alias.name for alias in node.names if not hasattr(module, alias.name)]
                assert not missing, f"{document}: {node.module} has no {missing}"


@pytest.fixture
def work_folder(tmp_path: Path, yolo_folder: FolderFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working folder of the examples: examples/, and photos/ with cats and dogs in YOLO layout."""
    shutil.copytree(ROOT / "examples", tmp_path / "examples")
    yolo_folder(4, size=(64, 64), name="photos")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_python_of_the_readme_runs(work_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The blocks that use the bundled model; those that train are long, and tests of training have them."""
    ran = [code for code in blocks("README.md", "python") if "train(" not in code]
    assert ran
    for code in ran:
        exec(compile(code, "README.md", "exec"), {})
    assert "cat" in capsys.readouterr().out
    assert list(work_folder.glob("*.jpg"))


def test_commands_of_the_readme_run(work_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    calls = [words for words in commands("README.md") if words[0] == "predict" and "examples/" in " ".join(words)]
    assert calls
    for words in calls:
        assert cli.main(words) == 0
    assert "cat" in capsys.readouterr().out


@pytest.mark.slow
def test_training_of_the_readme_runs(
    work_folder: Path, yolo_folder: FolderFactory, capsys: pytest.CaptureFixture[str]
) -> None:
    """The commands and Python blocks that train, for two iterations."""
    yolo_folder(4, size=(64, 64), name="other-photos", splits={"test": [0, 1, 2, 4]})
    Image.new("RGB", (64, 64)).save(work_folder / "photo.jpg")
    section = text_of("README.md").partition("## Train on your own images")[2].partition("## Models")[0]
    code = "".join(re.findall(r"^```python\n(.*?)^```", section, re.MULTILINE | re.DOTALL))
    assert "epochs=40" in code
    exec(compile(code.replace("epochs=40", "iterations=2"), "README.md", "exec"), {})
    shutil.move(work_folder / "runs/a", work_folder / "runs/b")
    lines = re.findall(r"^    refinedet (.*)$", section, re.MULTILINE)
    assert [line.split()[0] for line in lines] == ["inspect", "train", "evaluate", "compare", "predict"]
    for line in lines:
        words = shlex.split(line.replace("DATA", "photos"), comments=True)
        assert cli.main([*words, *(["--iterations", "2"] if words[0] == "train" else [])]) == 0
    assert "trained: runs/a" in capsys.readouterr().out


def modules_with_examples() -> list[str]:
    names = [module.name for module in pkgutil.walk_packages(refinedet.__path__, "refinedet.")]
    sources = {name: importlib.util.find_spec(name) for name in names if not name.endswith("__main__")}
    return [
        name
        for name, spec in sources.items()
        if spec is not None and spec.origin and ">>>" in Path(spec.origin).read_text(encoding="utf-8")
    ]


@pytest.mark.parametrize("name", modules_with_examples())
def test_examples_in_docstrings_run(name: str, work_folder: Path) -> None:
    output = io.StringIO()
    runner = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE)
    for example in doctest.DocTestFinder(exclude_empty=True).find(importlib.import_module(name)):
        runner.run(example, out=output.write)
    assert runner.failures == 0, output.getvalue()


@pytest.mark.parametrize("name", sorted(set(refinedet.__all__) - {"PRESETS"}))
def test_public_names_have_an_example(name: str) -> None:
    assert ">>> " in (getattr(refinedet, name).__doc__ or "")


@pytest.mark.parametrize("document", DOCUMENTS)
def test_tests_and_modules_that_are_named_exist(document: str) -> None:
    for code in INLINE_CODE.findall(text_of(document)):
        named = re.fullmatch(r"(tests/[\w/]+\.py)(?:::(\w+))?", code)
        if named is not None:
            file = ROOT / named[1]
            assert file.is_file(), f"{document}: no {named[1]}"
            if named[2]:
                assert f"def {named[2]}(" in file.read_text(encoding="utf-8"), f"{document}: no {code}"
        elif document in ("docs/architecture.md", "docs/reliability.md") and re.fullmatch(
            r"[\w/]+\.(py|html|css)", code
        ):
            package = ROOT / "src/refinedet"
            there = (ROOT / code).is_file() or (package / code).is_file() or any(package.glob(f"*/{code}"))
            assert there, f"{document}: no {code}"


def test_every_module_is_in_the_architecture() -> None:
    text = text_of("docs/architecture.md")
    modules = {path.name for path in (ROOT / "src/refinedet").rglob("*.py")}
    assert [name for name in sorted(modules) if f"{name}`" not in text] == []


def test_the_ladder_of_imports_is_the_one_that_is_checked() -> None:
    """Long lines of the contract are "(all others)" of their package in the document."""
    configuration = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    contracts = configuration["tool"]["importlinter"]["contracts"]
    layers = next(contract["layers"] for contract in contracts if contract["id"] == "ladder")
    shown = indented("docs/architecture.md")
    shown = shown[shown.index("__main__") :]
    assert len(shown) == len(layers)
    for line, layer in zip(shown, layers, strict=True):
        if "(all others)" in line:
            packages = {name.split(".")[0] for name in re.findall(r"[\w.]+(?=\.\*)", line)} | set(line.split(" : ")[1:])
            assert {name.split(".")[1] for name in layer.split(" : ")} == packages
        else:
            assert line == layer.replace("refinedet.", "")
