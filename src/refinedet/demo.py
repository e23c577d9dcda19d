"""A page on which a model can be tried: an image goes in, boxes and the steps that lead to them come out.

Needs the extra ``refinedet[demo]`` (gradio).
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any, TypeVar

import numpy as np

from refinedet.config import DEFAULT_THRESHOLD
from refinedet.deploy.verify import example_photos
from refinedet.detections import Detections
from refinedet.detector import RefineDet
from refinedet.errors import RefineDetError, UsageError
from refinedet.explain import Explanation
from refinedet.images import read_image
from refinedet.pixels import Pixels
from refinedet.runtime import Runtime
from refinedet.text import printable, reason

MAX_MEGABYTES = 20
"""Largest file that the page takes."""
MAX_PIXELS = 50_000_000
"""Largest width times height of an image that the page takes."""
_KEPT = 3600
"""Seconds after which the images of a visitor are removed."""
_VISITORS = 50
"""Visitors whose images are remembered at once."""
_INTRODUCTION = (
    "# RefineDet: {model}\nDrop an image or take one of the examples, and move the threshold. Images go to the machine "
    "on which this page runs, and nowhere else."
)
_STEPS = (
    "RefineDet looks twice. Of the **anchors** that are tiled over the image, a first stage (ARM) discards those that "
    "are clearly background and moves the others to where objects seem to be. A second stage (ODM) tells what they are "
    "and moves them again; of boxes that overlap, the surest is kept."
)

Seen = tuple[Pixels, Detections, "Explanation | None"]
"""An image, all that was detected in it, and the steps; what the page remembers of a visitor."""
ResultT = TypeVar("ResultT")


def build_page(model: RefineDet | Runtime, name: str) -> Any:
    """The page of a model, as ``gradio.Blocks``.

    Args:
        model: the detector; the steps are shown only of one in PyTorch.
        name: what the page calls it.

    Raises:
        UsageError: gradio is not installed.
    """
    gradio = _gradio()
    model.predict_arrays([np.zeros((64, 64, 3), np.uint8)])  # the first run of a network takes longer than the others
    # A button to share would send the image to another host.
    shown = {"interactive": False, "show_label": False, "format": "jpeg", "buttons": ["download", "fullscreen"]}
    with gradio.Blocks(title="RefineDet", analytics_enabled=False, delete_cache=(_KEPT, _KEPT)) as page:
        gradio.Markdown(_INTRODUCTION.format(model=printable(name)))
        seen = gradio.State(None, time_to_live=_KEPT)
        with gradio.Row():
            with gradio.Column(scale=1):
                image = gradio.Image(
                    type="filepath", image_mode=None, sources=["upload", "clipboard"], label="Image", height=320
                )
                threshold = gradio.Slider(0, 1, DEFAULT_THRESHOLD, step=0.01, label="Lowest score")
                gradio.Examples([str(path) for path in example_photos()], image, cache_examples=False)
            with gradio.Column(scale=2), gradio.Tabs():
                with gradio.Tab("Detections"):
                    drawn = gradio.Image(label="Detections", **shown)
                    table = gradio.Dataframe(headers=["class", "score", "x1", "y1", "x2", "y2"], interactive=False)
                if isinstance(model, RefineDet):
                    with gradio.Tab("See how RefineDet thinks"):
                        gradio.Markdown(_STEPS)
                        steps = gradio.Image(label="Steps", **shown)
                        text = gradio.Code(
                            label="What each step keeps, and the time of each stage", language=None, interactive=False,
                            show_line_numbers=False,
                        )  # fmt: skip
        boxes = [drawn, table]

        def work(path: str | None) -> Seen | None:
            return None if path is None else _shown(gradio, lambda: look_at(model, path))

        found = image.change(work, image, seen, api_visibility="private")
        found.then(show_boxes, [seen, threshold], boxes, api_visibility="private")
        threshold.change(
            show_boxes, [seen, threshold], boxes, trigger_mode="always_last", show_progress="hidden",
            api_visibility="private",
        )  # fmt: skip
        if isinstance(model, RefineDet):
            found.then(show_steps, [seen, threshold], [steps, text], api_visibility="private")
            threshold.change(
                show_steps, [seen, threshold], [steps, text], trigger_mode="always_last", show_progress="hidden",
                api_visibility="private",
            )  # fmt: skip
    return page


def look_at(model: RefineDet | Runtime, path: str) -> Seen:
    """What a model detects in an image file, whatever its score.

    Raises:
        RefineDetError: it is no image, or larger than ``MAX_PIXELS``.
    """
    pixels = read_image(path, max_pixels=MAX_PIXELS, name="this file")
    if isinstance(model, Runtime):
        return pixels, model.predict_arrays([pixels], threshold=None)[0], None
    steps = model.explain(pixels, threshold=0.0)
    return pixels, steps.detections, steps


def show_boxes(seen: Seen | None, threshold: float) -> tuple[Pixels | None, list[list[Any]]]:
    """The image with the boxes of at least that score, and a row for each."""
    if seen is None:
        return None, []
    pixels, detections, _ = seen
    kept = detections.filter(threshold=threshold)
    rows = [[printable(item.name), round(item.score, 3), *(round(float(x), 1) for x in item.box)] for item in kept]
    return kept.draw(pixels), rows


def show_steps(seen: Seen | None, threshold: float) -> tuple[Pixels | None, str]:
    """The drawn steps, and what each step keeps as text."""
    if seen is None or seen[2] is None:
        return None, ""
    steps = seen[2].at(threshold)
    return steps.draw(), steps.table()


def serve(page: Any, *, host: str, port: int) -> str:
    """Show a page in the background; returns its address.

    Raises:
        UsageError: another program uses the port, or the host is none of this machine.
    """
    # Fonts of other hosts would tell them of every visit.
    theme = _gradio().themes.Base(font=["system-ui", "sans-serif"], font_mono=["monospace"])
    try:
        _, address, _ = page.launch(
            server_name=host, server_port=port, prevent_thread_lock=True, quiet=True, share=False, show_error=True,
            max_file_size=f"{MAX_MEGABYTES}mb", state_session_capacity=_VISITORS, footer_links=[], theme=theme,
            ssr_mode=False, enable_monitoring=False,
        )  # fmt: skip
    except OSError as error:
        raise UsageError(
            f"--host {host} --port {port}: cannot be used ({reason(error, 200)}); choose another"
        ) from None
    return str(address)


def _shown(gradio: Any, work: Callable[[], ResultT]) -> ResultT:
    """Do some work; what is wrong with an image is a message on the page."""
    try:
        return work()
    except RefineDetError as error:
        raise gradio.Error(str(error), print_exception=False) from None


def _gradio() -> Any:
    try:
        return importlib.import_module("gradio")
    except ImportError:
        raise UsageError("the page needs gradio: pip install 'refinedet[demo]'") from None
