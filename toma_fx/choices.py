"""Names for the command line, kept apart from their objects, so that help needs no torch."""

DTYPE_NAMES = ("bfloat16", "float16", "float32")
"""Keys of `toma_fx.checkpoints.DTYPES`."""
# fmt: off
MODEL_NAMES = (
    "sdxl", "flux", "flux2-dev", "flux2-klein-4b", "flux2-klein-9b", "qwen-image",
    "qwen-image-edit", "qwen-image-edit-2511", "qwen-image-layered", "z-image",
    "wan2.1-1.3b", "wan2.1-14b", "wan2.1-i2v-14b", "wan2.1-flf2v-14b", "wan2.2-a14b",
    "wan2.2-i2v-a14b", "wan2.2-5b", "wan2.1-vace-1.3b", "wan2.1-vace-14b", "sd3-medium",
    "sd3.5-medium", "sd3.5-large", "chroma", "hunyuan-video", "hunyuan-video-i2v",
    "hunyuan-video-i2v-33ch", "hunyuan-video-1.5-480p-t2v", "hunyuan-video-1.5-480p-i2v",
    "hunyuan-video-1.5-720p-t2v", "hunyuan-video-1.5-720p-i2v",
    "hunyuan-video-1.5-480p-i2v-step-distilled", "hunyuan-image-2.1",
    "hunyuan-image-2.1-distilled", "pixart-alpha-512", "pixart-alpha-1024",
    "pixart-sigma-512", "pixart-sigma-1024", "pixart-sigma-2048", "ltx-video",
    "ltx-video-0.9.7", "cogvideox-2b", "cogvideox-5b", "cogvideox-5b-i2v",
    "cogvideox1.5-5b", "cogvideox1.5-5b-i2v", "ltx-2", "ltx-2.3", "ltx-2.5", "krea-2",
    "cosmos-1-7b-text2world", "cosmos-1-7b-video2world", "cosmos-1-14b-text2world",
    "cosmos-1-14b-video2world", "cosmos-2-2b-text2image", "cosmos-2-14b-text2image",
    "cosmos-2-2b-video2world", "cosmos-2-14b-video2world", "cosmos-2.5-2b",
    "cosmos-2.5-14b",
)
# fmt: on
"""`toma_fx.checkpoints.RANDOM`: the published models that can have random weights."""
PROMPT = "a large red circle left of a small blue square on a striped green ground under a blue sky"
"""A scene that the repository's small models can draw."""
