"""Which files of ../src the distribution without PyTorch holds."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface


class SourceOfTheProject(BuildHookInterface[Any]):
    """All of the package but the bundled models, which need PyTorch."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Add the files to the wheel."""
        project = Path(self.root).parent
        models = project / "src" / "refinedet" / "weights"
        for file in sorted((project / "src").rglob("*")):
            of_a_model = models in file.parents and file.parent != models
            if file.is_file() and "__pycache__" not in file.parts and not of_a_model:
                build_data["force_include"][str(file)] = file.relative_to(project / "src").as_posix()
        build_data["force_include"][str(project / "LICENSE")] = "refinedet/LICENSE"
