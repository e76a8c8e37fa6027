"""The page's words about a comparison: a table, sentences, and the code that does the same."""

import math
from typing import Any

from toma_fx.app.compare import Comparison
from toma_fx.lab.compare import DIFFERENCE_GAIN
from toma_fx.lab.small_models import own_settings
from toma_fx.report import Report
from toma_fx.runtime.plan import REMEMBER, UNTOUCHED


def table(comparison: Comparison) -> list[tuple[str, str, str]]:
    """Rows of three: a name, the figure of the untouched image, and that of the merged one."""
    report = comparison.report
    time = comparison.seconds / comparison.untouched.seconds
    return [
        (
            "time",
            f"{comparison.untouched.seconds:.2f} s",
            f"{comparison.seconds:.2f} s ({time:.0%})",
        ),
        ("arithmetic of a call", *_arithmetic(report)),
        ("PSNR to untouched", "", _decibel(comparison.psnr)),
    ]


def sentences(comparison: Comparison) -> list[str]:
    """Sentences below the table: how it was measured, and which blocks did not merge."""
    return [
        *(f"Warning: {each}" for each in comparison.warned),
        _of_time(comparison),
        *_of_steps(comparison),
        *_of_skipped(comparison),
    ]


def of_kept(comparison: Comparison) -> str:
    """The caption of the picture of kept tokens, or the reason why there is none."""
    kept = comparison.kept
    if kept is None:
        if not comparison.wish.config.merges:
            return "No tokens merged: the ratio is 0."
        if comparison.report.theta == 0:
            return (
                "No tokens merged: with theta 0, the steps between full ones extrapolate and run "
                "no block. For kept tokens, take no memory or a higher theta."
            )
        return "Kept tokens: this run made no plan over a grid of the image's shape."
    count, whole = len(kept.merged.destinations), len(kept.merged.clusters)
    return (
        f"Kept tokens: {count} of {whole} in {kept.block} at step {kept.step} of "
        f"{comparison.wish.steps}, the last that made a plan. A red dot is a kept token; what lies "
        "in a white border merges into it."
    )


def of_difference(comparison: Comparison) -> str:
    """The caption of the picture of the difference."""
    if math.isinf(comparison.psnr):
        return "Difference: none, both images are equal."
    return f"Difference of the images, {DIFFERENCE_GAIN} times as bright."


def code(comparison: Comparison) -> str:
    """A program that draws the merged image."""
    wish = comparison.wish
    config = wish.config
    options = [f"ratio={config.ratio:g}"]
    if config.merge_below < 1:
        options.append(f"merge_below={config.merge_below:g}")
    if config.memory is not None:
        options.append(f"memory=toma_fx.Memory(every={config.memory.every}, theta={wish.theta:g})")
    if config.skip is not None:
        options.append(f"skip={config.skip!r}")
    task = wish.task(comparison.dtype)
    given: dict[str, Any] = {"num_inference_steps": wish.steps}
    if task.guidance is not None:
        given["guidance_scale"] = task.guidance
    sizes = {"height": task.height, "width": task.width}
    given |= {name: size for name, size in sizes.items() if size is not None}
    if "true_cfg_scale" in task.arguments:
        given["negative_prompt"] = ""
    given |= task.arguments
    arguments = ", ".join(f"{name}={value!r}" for name, value in given.items())
    dtype = "" if comparison.dtype == "float32" else f", torch_dtype=torch.{comparison.dtype}"
    to = "" if comparison.device == "cpu" else f'.to("{comparison.device}")'
    return (
        "import toma_fx, torch\n"
        "from diffusers import DiffusionPipeline\n\n"
        f"pipe = DiffusionPipeline.from_pretrained({wish.model!r}{dtype}){to}\n"
        f"toma_fx.transform(pipe, {', '.join(options)})\n\n"
        f"generator = torch.Generator().manual_seed({wish.seed})\n"
        f"prompt = {wish.prompt!r}\n"
        f"image = pipe(prompt, generator=generator, {arguments}).images[0]\n"
    )


def _of_time(comparison: Comparison) -> str:
    kept = (
        "The untouched image and its time are those of your comparison before, since only merging "
        "changed. "
        if comparison.reused
        else ""
    )
    small = (
        " Real models have more tokens, and save more time than the repository's small ones."
        if own_settings(comparison.wish.model)
        else ""
    )
    where = {"cpu": "the CPU", "cuda": "the GPU"}.get(comparison.device, comparison.device)
    return (
        f"{kept}Times are from prompt to pixels, of one run each after a warm-up, on {where}, not "
        f"compiled. Rewriting the model took {comparison.rewriting_seconds:.2f} s, once.{small}"
    )


def _of_steps(comparison: Comparison) -> list[str]:
    config, report = comparison.wish.config, comparison.report
    counts = {name: round(share * report.steps) for name, share in report.shares.items()}
    said = []
    if counts.get(UNTOUCHED):
        said.append(
            f"{counts[UNTOUCHED]} of {report.steps} steps lie above the noise level "
            f"{config.merge_below:g} and run untouched."
        )
    if config.memory is not None and REMEMBER in counts:
        said.append(
            f"Memory: {counts[REMEMBER]} of {report.steps} steps run in full and are remembered, "
            f"which keeps {report.kept_bytes / 2**20:.1f} MiB."
        )
    return [
        *said,
        f"Arithmetic is that of a call of the denoising model, averaged over {report.steps} steps.",
    ]


def _of_skipped(comparison: Comparison) -> list[str]:
    if not comparison.wish.config.merges:
        return []
    reasons: dict[str, list[str]] = {}
    for group in comparison.report.groups:
        if group.skipped:
            reasons.setdefault(group.skipped, []).append(_blocks(group.path, *group.blocks))
    return [f"Left unmerged, {reason}: {', '.join(them)}." for reason, them in reasons.items()]


def _arithmetic(report: Report) -> tuple[str, str]:
    if not report.config.merges:  # the report then speaks of another size than the image's
        return "", "as untouched"
    share = report.flops_after / report.flops_before
    return _flops(report.flops_before), f"{_flops(report.flops_after)} ({share:.0%})"


def _blocks(path: str, first: int, last: int) -> str:
    return f"{path}.{first}" if first == last else f"{path}.{first} to {last}"


def _flops(count: int) -> str:
    for unit, size in (("PFLOP", 1e15), ("TFLOP", 1e12), ("GFLOP", 1e9)):
        if count >= size:
            return f"{count / size:.3g} {unit}"
    return f"{count / 1e6:.3g} MFLOP"


def _decibel(value: float) -> str:
    return "equal" if math.isinf(value) else f"{value:.1f} dB"
