"""The budget of the source: lines of a file, lines and parameters of a function, a test file for each module.

The lists of exceptions may only become shorter: an exception that is no longer needed fails the test, too.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1]
SOURCE = ROOT / "src" / "refinedet"
LINES_OF_A_FILE = 400
LINES_OF_A_FUNCTION = 60
"""From its first line to its last, decorators and the docstring not counted."""
PARAMETERS = 6
"""Of any kind, ``self`` and ``cls`` not counted."""

MANY_PARAMETERS = {
    # The public calls: each parameter has a default and is passed by its name.
    "training/train.py": {"train", "resume"},
    "evaluation/evaluate.py": {"evaluate", "collect_detections"},
    "bulk/results.py": {"evaluate_batch"},
    "bulk/run.py": {"batch"},
    "deploy/export.py": {"export"},
    "draw.py": {"draw_boxes"},
    "training/batches.py": {"training_batches"},
    # Verbs of the command line: each parameter is a flag.
    "cli/bulk.py": {"batch"},
    "cli/training.py": {"train", "ablate"},
    "cli/verbs.py": {"evaluate", "predict"},
    "cli/weights.py": {"export"},
}

TESTED_ELSEWHERE = {
    "__init__.py": "test_cli.py",
    "__main__.py": "test_cli.py",
    "ablations.py": "model/test_ablations.py",
    "bulk/worker.py": "bulk/test_local.py",
    "cli/bulk.py": "bulk/test_run.py",
    "cli/demo.py": "test_demo.py",
    "cli/flags.py": "cli/test_arguments.py",
    "cli/training.py": "test_cli.py",
    "cli/weights.py": "weights/test_convert_verb.py",
    "data/coco_document.py": "data/test_coco.py",
    "data/coco_records.py": "data/test_coco_exports.py",
    "data/mosaic.py": "data/test_health.py",
    "data/problems.py": "data/test_records.py",
    "data/yolo_description.py": "data/test_yolo_paths.py",
    "data/yolo_images.py": "data/test_yolo_paths.py",
    "data/yolo_labels.py": "data/test_yolo_exports.py",
    "data/yolo_rows.py": "data/test_yolo.py",
    "bulk/workers.py": "bulk/test_local.py",
    "dataclass_json.py": "test_config.py",
    "decoding.py": "test_sources.py",
    "deploy/graph.py": "deploy/test_export.py",
    "deploy/measure.py": "deploy/test_quantize.py",
    "deploy/verify.py": "deploy/test_export.py",
    "evaluation/detector.py": "typed_calls.py",  # a protocol
    "evaluation/evaluate.py": "evaluation/test_report.py",
    "evaluation/gallery.py": "evaluation/test_page.py",
    "evaluation/outcomes.py": "evaluation/test_diagnosis.py",
    "evaluation/sharing.py": "evaluation/test_report.py",
    "loading.py": "test_runtime.py",
    "locks.py": "training/test_run.py",
    "model/nms.py": "model/test_postprocess.py",
    "model/padded.py": "deploy/test_export.py",
    "model/soft_nms.py": "evaluation/test_multiscale.py",
    "pixels.py": "test_images.py",
    "training/briefing.py": "training/test_plan.py",
    "training/card.py": "training/test_train.py",
    "training/session.py": "training/test_train.py",
    "training/start.py": "training/test_train.py",
    "weights/__init__.py": "weights/test_store.py",
    "weights/caffemodel.py": "weights/test_convert.py",
    "weights/formats.py": "weights/test_convert.py",
    "weights/formats_resnet.py": "weights/test_convert.py",
}
"""Modules without a test file of their own, and the file that tests them."""


def modules() -> list[str]:
    return sorted(path.relative_to(SOURCE).as_posix() for path in SOURCE.rglob("*.py"))


def functions(module: str) -> Iterator[tuple[str, ast.FunctionDef | ast.AsyncFunctionDef]]:
    """Functions and methods with their qualified names, those inside of others included."""

    def visit(node: ast.AST, prefix: str) -> Iterator[tuple[str, ast.FunctionDef | ast.AsyncFunctionDef]]:
        for child in ast.iter_child_nodes(node):
            name = prefix
            if isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
                name = f"{prefix}.{child.name}" if prefix else child.name
            if isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef)):
                yield name, child
            yield from visit(child, name)

    yield from visit(ast.parse((SOURCE / module).read_text(encoding="utf-8")), "")


def count_lines(function: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    assert function.end_lineno is not None
    lines = function.end_lineno - function.lineno + 1
    if ast.get_docstring(function) is not None:
        docstring = function.body[0]
        assert docstring.end_lineno is not None
        lines -= docstring.end_lineno - docstring.lineno + 1
    return lines


def count_parameters(function: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    arguments = function.args
    every = [*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs, arguments.vararg, arguments.kwarg]
    return sum(argument is not None and argument.arg not in ("self", "cls") for argument in every)


def test_counting() -> None:
    (function,) = ast.parse(
        'def f(self, a, /, b=1, *c, d, **e):\n    """Doc.\n\n    More.\n    """\n    return a\n'
    ).body
    assert isinstance(function, ast.FunctionDef)
    assert (count_lines(function), count_parameters(function)) == (2, 5)


def test_files_are_short() -> None:
    lines = {module: (SOURCE / module).read_text(encoding="utf-8").count("\n") for module in modules()}
    assert {module: count for module, count in lines.items() if count > LINES_OF_A_FILE} == {}


def test_functions_are_short() -> None:
    long = {
        f"{module}: {name}": count_lines(function)
        for module in modules()
        for name, function in functions(module)
        if count_lines(function) > LINES_OF_A_FUNCTION
    }
    assert long == {}


def test_functions_have_few_parameters() -> None:
    many: dict[str, set[str]] = {}
    for module in modules():
        for name, function in functions(module):
            if count_parameters(function) > PARAMETERS:
                many.setdefault(module, set()).add(name)
    assert many == MANY_PARAMETERS


def test_tests_mirror_the_source() -> None:
    tests = ROOT / "tests"
    without = set()
    for module in modules():
        path = Path(module)
        # A package of one module is tested in a file of the package's name.
        mirror = path.parent.parent / f"test_{path.parent.name}.py" if path.name == "__init__.py" else None
        mirrors = [path.with_name(f"test_{path.name}"), *([mirror] if mirror is not None else [])]
        is_empty = path.name == "__init__.py" and not list(functions(module))
        if not is_empty and not any((tests / candidate).is_file() for candidate in mirrors):
            without.add(module)
    assert without == set(TESTED_ELSEWHERE)
    assert [test for test in TESTED_ELSEWHERE.values() if not (tests / test).is_file()] == []
