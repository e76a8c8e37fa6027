"""Names for the command line, kept apart from their objects, so that help needs no torch."""

DTYPE_NAMES = ("bfloat16", "float16", "float32")
"""Keys of `toma_fx.checkpoints.DTYPES`."""
PROMPT = "a large red circle left of a small blue square on a striped green ground under a blue sky"
"""A scene that the repository's small models can draw."""
