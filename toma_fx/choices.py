"""Names that the command line offers, apart from what bears them, so that help needs no torch."""

DTYPE_NAMES = ("bfloat16", "float16", "float32")
"""Keys of `toma_fx.checkpoints.DTYPES`."""
LEVELS = ("op", "block", "stage", "model", "image")
"""What one timed call is; see `toma_fx.bench.levels`."""
BENCH_PRESETS = ("readme", "h200")
"""Keys of `toma_fx.bench.presets.PRESETS`."""
BENCH_MINUTES = 8.0
"""After these no further part of a preset is started."""
PROMPT = "a large red circle left of a small blue square on a striped green ground under a blue sky"
"""A scene that the repository's small models can draw."""
