"""The page: fields on the left, the two images and their figures on the right.

Gradio gives each browser tab a session. Each session has a state of its own, and can cancel only
its own drawing. All sessions share the pipelines, behind the lock of the `Studio`.
"""

import html
import logging
import os
import threading
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

# This comes before the import, which would ask the network for a newer version.
os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"

import gradio as gr
import numpy as np
from numpy.typing import NDArray
from PIL import Image

from toma_fx.app import words
from toma_fx.app.compare import CancelledError, Comparison, Studio, Untouched, Wish
from toma_fx.choices import PROMPT
from toma_fx.errors import TomaError
from toma_fx.lab.small_models import own_settings

logger = logging.getLogger(__name__)

TITLE = "toma_fx: one image, untouched and merged"
MEMORIES = [("none", 0), ("every 2", 2), ("every 3", 3), ("every 4", 4)]
SIZES = [
    ("its own", 0),
    *((f"{side} x {side}", side) for side in (256, 384, 512, 768, 1024, 1536, 2048)),
]
PICTURE_PIXELS = 400
"""Approximate height of a picture on the page."""
KEPT_SECONDS = 3600
"""Images that a page showed are deleted from the disk after this time."""

# Gradio's own themes ask Google for their fonts, and explain fields in a grey that is hard to read.
THEME = gr.themes.Default(
    font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "Menlo", "monospace"]
).set(block_info_text_color="*neutral_600", block_info_text_color_dark="*neutral_300")
CSS = """
.problem { color: #b42318; font-weight: 600; }
.dark .problem { color: #fda29b; }
#figures table { width: 100%; border-collapse: collapse; }
#figures :is(table, thead, tbody, tr) { border: 0 !important; }
#figures :is(th, td) {
  text-align: left; padding: 6px 12px;
  border: 0; border-bottom: 1px solid var(--border-color-primary);
}
#notes ul { margin: 0; padding-left: 18px; list-style: disc; }
"""


def build_page(studio: Studio) -> gr.Blocks:
    """The page over a studio; `gradio.Blocks.launch` shows it."""
    cancelling: dict[str, threading.Event] = defaultdict(threading.Event)

    def run(
        known: Untouched | None,
        model: str,
        prompt: str,
        seed: Any,
        steps: Any,
        ratio: Any,
        merge_below: Any,
        memory: Any,
        theta: Any,
        size: Any,
        request: gr.Request,
        progress: gr.Progress = gr.Progress(),  # noqa: B008  gradio finds it by the default
    ) -> Sequence[Any]:
        cancelled = cancelling[request.session_hash] = threading.Event()
        try:
            wish = Wish(
                model=model,
                prompt=prompt,
                seed=seed,
                steps=steps,
                ratio=ratio,
                merge_below=merge_below,
                memory=memory,
                theta=theta,
                size=size or None,
            )
            made = studio.compare(
                wish,
                known,
                tell=lambda text, share: progress(share, desc=text),
                cancelled=cancelled,
            )
        except CancelledError:
            return _only_said("Cancelled; nothing else on the page has changed.")
        except TomaError as error:
            return _only_said(str(error), problem=True)
        except Exception as error:
            logger.exception("a comparison failed")
            text = f"{type(error).__name__}: {error}"
            return _only_said(f"The pipeline failed with {text}", problem=True)
        return (made.untouched, *_shown(made), "")

    def cancel(request: gr.Request) -> None:
        cancelling[request.session_hash].set()

    def leave(request: gr.Request) -> None:
        cancelling.pop(request.session_hash, threading.Event()).set()

    with gr.Blocks(
        title=TITLE, analytics_enabled=False, delete_cache=(KEPT_SECONDS, KEPT_SECONDS)
    ) as page:
        gr.Markdown(
            f"# {TITLE}\n"
            "The same prompt and seed, drawn twice: by the pipeline as it is, and with redundant "
            "tokens merged by `toma_fx.transform`."
        )
        known = gr.State(None)
        with gr.Row():
            with gr.Column(scale=2, min_width=320):
                fields, (start, stop) = _fields(studio.models)
                status = gr.HTML("", elem_id="status")
            with gr.Column(scale=3, min_width=420):
                results = _results()
        gr.on(
            [start.click, fields[1].submit],
            run,
            inputs=[known, *fields],
            outputs=[known, *results, status],
            show_progress_on=results[0],
            trigger_mode="once",
            # Sessions wait at the studio's lock, which says so, and not in gradio's queue.
            concurrency_limit=None,
            api_name="compare",
        )
        stop.click(cancel, queue=False, api_name="cancel")
        page.unload(leave)
    return page


def _fields(models: Sequence[str]) -> tuple[list[Any], tuple[gr.Button, gr.Button]]:
    small = any(map(own_settings, models))
    prompt = gr.Textbox(
        PROMPT,
        label="Prompt",
        lines=2,
        elem_id="prompt",
        info="The small models draw plain scenes of coloured shapes." if small else None,
    )
    model = gr.Dropdown(
        [(Path(name).name, name) for name in models],
        value=models[0],
        label="Model",
        elem_id="model",
        info="toma-fx app --model NAME brings yours.",
    )
    with gr.Row():
        seed = gr.Number(0, label="Seed", precision=0, elem_id="seed", min_width=100)
        steps = gr.Number(25, label="Steps", precision=0, elem_id="steps", min_width=100)
        size = gr.Dropdown(SIZES, value=0, label="Size", elem_id="size", min_width=100)
    ratio = gr.Slider(
        0,
        0.95,
        0.5,
        step=0.05,
        label="Ratio",
        info="The share of tokens merged away. 0.25 to 0.5 alone, 0.75 to 0.95 with memory.",
        elem_id="ratio",
    )
    merge_below = gr.Slider(
        0.05,
        1,
        1,
        step=0.05,
        label="Noise level (merge_below)",
        info="Merges below it. 1 merges at every step; 0.8 leaves early steps alone.",
        elem_id="merge_below",
    )
    memory = gr.Radio(
        MEMORIES,
        value=0,
        label="Memory",
        info="One step in 2, 3 or 4 runs in full; the others add what has changed since.",
        elem_id="memory",
    )
    theta = gr.Slider(
        0,
        1,
        0,
        step=0.05,
        label="Theta",
        info="With memory. At 0 the steps between only extrapolate, and the ratio has no effect; "
        "above 0 they also run on merged tokens.",
        elem_id="theta",
    )
    with gr.Row():
        start = gr.Button("Draw both", variant="primary", elem_id="run")
        stop = gr.Button("Cancel", elem_id="cancel")
    return [model, prompt, seed, steps, ratio, merge_below, memory, theta, size], (start, stop)


def _results() -> list[Any]:
    both = gr.ImageSlider(
        label="Untouched (left) and merged (right)",
        format="png",
        interactive=False,
        elem_id="both",
        max_height=PICTURE_PIXELS,
    )
    figures = gr.HTML("", elem_id="figures")
    buttons: Any = ["download", "fullscreen"]  # gradio's third one shares pictures on the network
    with gr.Row():
        difference, kept = (
            gr.Image(label=label, format="png", height=300, buttons=buttons, elem_id=name)
            for label, name in (("Difference", "difference"), ("Kept tokens", "kept"))
        )
    notes = gr.HTML("", elem_id="notes")
    code = gr.Code(
        label="The code that draws the merged image",
        language="python",
        wrap_lines=True,
        interactive=False,
        elem_id="code",
    )
    return [both, figures, difference, kept, notes, code]


def _shown(made: Comparison) -> tuple[Any, ...]:
    """New values of the outputs that `_results` lists."""
    rows = "".join(
        f"<tr><th scope='row'>{name}</th><td>{before}</td><td>{after}</td></tr>"
        for name, before, after in words.table(made)
    )
    figures = (
        "<table><thead><tr><td></td><th scope='col'>untouched</th><th scope='col'>merged</th></tr>"
        f"</thead><tbody>{rows}</tbody></table>"
    )
    texts = [words.of_difference(made), words.of_kept(made), *words.sentences(made)]
    notes = "".join(f"<li>{html.escape(each)}</li>" for each in texts)
    return (
        (made.untouched.image, made.merged),
        figures,
        _enlarged(made.difference()),
        None if made.kept is None else made.kept.painted(made.merged),
        f"<ul>{notes}</ul>",
        words.code(made),
    )


def _enlarged(picture: NDArray[np.uint8]) -> Image.Image:
    """A small picture at a size that can be seen, each pixel a square."""
    image = Image.fromarray(picture)
    times = max(1, PICTURE_PIXELS // image.height)
    return image.resize((image.width * times, image.height * times), Image.Resampling.NEAREST)


def _only_said(text: str, *, problem: bool = False) -> tuple[Any, ...]:
    """Values that show one sentence and leave all other outputs as they are."""
    kind, role = ("problem", "alert") if problem else ("told", "status")
    said = f"<p class='{kind}' role='{role}'>{html.escape(text)}</p>"
    return (*(gr.skip() for _ in range(7)), said)
