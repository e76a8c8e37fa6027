"""Names that the command line offers, apart from what bears them, so that help needs no torch."""

DTYPE_NAMES = ("bfloat16", "float16", "float32")
"""Keys of `toma_fx.checkpoints.DTYPES`."""
PROMPT = "a large red circle left of a small blue square on a striped green ground under a blue sky"
"""A scene that the repository's small models can draw."""
