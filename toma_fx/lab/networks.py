"""The networks that some measures need: CLIP, DINO, Inception and LPIPS.

A network that cannot be loaded is no error, because the other measures are still worth their table.
It becomes an `Unavailable`, and the table shows its reason.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from PIL import Image
from torch import Tensor, nn

from toma_fx.hub import find, first_line
from toma_fx.images import DATA_RANGE, pixels
from toma_fx.lab.measures import Unavailable

CLIP = "openai/clip-vit-large-patch14"
"""Papers quote the scores of this CLIP, and torchmetrics takes it by default."""
DINO = "facebook/dinov2-base"
"""The paper names DINO (Caron et al., 2021) without a size; ``facebook/dino-vitb16`` is one."""
INCEPTION = "inception"
"""The network of FID proper; any other vision network gives a distance of its own."""
LPIPS = "alex"
"""LPIPS's own choice for a forward measure (Zhang et al., 2018)."""
BATCH = 16

Item = TypeVar("Item")
Loaded = TypeVar("Loaded")
Module = TypeVar("Module", bound=nn.Module)

Features = Callable[[Sequence[Path]], Tensor]
"""``N`` image files to ``(N, D)`` float32 features on the CPU."""


@dataclass(frozen=True, kw_only=True)
class Networks:
    """Names of the networks: on the hub, or local folders as ``save_pretrained`` writes them."""

    clip: str = CLIP
    dino: str = DINO
    fid: str = INCEPTION
    lpips: str = LPIPS


@dataclass(frozen=True, kw_only=True)
class Encoder:
    """A network of transformers, and the processor that prepares its inputs."""

    model: Any
    processor: Any
    tokenizer: Any = None

    @torch.inference_mode()
    def images(self, files: Sequence[Path]) -> Tensor:
        """Features ``(N, D)`` of ``N`` files: CLIP's projection, otherwise the class token."""

        def parts() -> Iterator[Tensor]:
            for some in _batches(files):
                images = [read_image(file) for file in some]
                inputs = self.processor(images=images, return_tensors="pt").to(self._device)
                if hasattr(self.model, "get_image_features"):
                    yield self.model.get_image_features(**inputs).pooler_output.float().cpu()
                else:
                    yield self.model(**inputs).last_hidden_state[:, 0].float().cpu()

        return torch.cat(list(parts()))

    @torch.inference_mode()
    def texts(self, texts: Sequence[str]) -> Tensor:
        """CLIP's features ``(N, D)`` of ``N`` texts; CLIP's context cuts long texts off."""

        def parts() -> Iterator[Tensor]:
            for some in _batches(texts):
                inputs = self.tokenizer(
                    list(some), padding=True, truncation=True, return_tensors="pt"
                ).to(self._device)
                yield self.model.get_text_features(**inputs).pooler_output.float().cpu()

        return torch.cat(list(parts()))

    @property
    def _device(self) -> torch.device:
        device: torch.device = next(iter(self.model.parameters())).device
        return device


def load_clip(name: str) -> Encoder | Unavailable:
    """A CLIP by its hub name or folder."""

    def load() -> Encoder:
        from transformers import AutoModel, AutoTokenizer

        how = find(name)
        return Encoder(
            model=_ready(AutoModel.from_pretrained(name, **how)),
            processor=_processor(name, how),
            tokenizer=AutoTokenizer.from_pretrained(name, **how),
        )

    return _attempt(load, f"CLIP from {name!r}")


def load_vision(name: str) -> Encoder | Unavailable:
    """A vision network with a class token, such as DINO, by its hub name or folder."""

    def load() -> Encoder:
        from transformers import AutoModel

        how = find(name)
        return Encoder(
            model=_ready(AutoModel.from_pretrained(name, **how)), processor=_processor(name, how)
        )

    return _attempt(load, f"network from {name!r}")


def load_features(name: str) -> Features | Unavailable:
    """The features that FID compares: Inception's, or those of a vision network.

    Args:
        name: ``"inception"``, or as in `load_vision`. With another network the figure is that
            network's Frechet distance and must not be compared with a FID.
    """
    if name == INCEPTION:
        return _attempt(_inception, "Inception, which torchmetrics takes from torch-fidelity,")
    encoder = load_vision(name)
    return encoder if isinstance(encoder, Unavailable) else encoder.images


def load_lpips(network: str) -> Callable[[Tensor, Tensor], float] | Unavailable:
    """LPIPS over AlexNet, VGG or SqueezeNet, which torchmetrics takes from torchvision.

    Args:
        network: ``"alex"``, ``"vgg"`` or ``"squeeze"``.

    Returns:
        a function of two ``(3, H, W)`` uint8 images; 0 is equal.
    """

    def load() -> Callable[[Tensor, Tensor], float]:
        from torchmetrics.image.lpip import LearnedPerceptualImagePatchSimilarity

        choice: Any = network
        lpips = _ready(LearnedPerceptualImagePatchSimilarity(net_type=choice, normalize=True))
        device = _best_device()

        @torch.inference_mode()
        def distance(image: Tensor, reference: Tensor) -> float:
            pair = [(each[None].float() / DATA_RANGE).to(device) for each in (image, reference)]
            return float(lpips(*pair))

        return distance

    return _attempt(load, f"LPIPS over {network!r}, which torchmetrics takes from torchvision,")


def _inception() -> Features:
    from torchmetrics.image.fid import FrechetInceptionDistance

    network: Any = _ready(FrechetInceptionDistance(feature=2048)).inception

    @torch.inference_mode()
    def features(files: Sequence[Path]) -> Tensor:
        # One by one, because a folder of reference images may hold several sizes.
        rows = [network(pixels(read_image(file))[None].to(_best_device())) for file in files]
        return torch.cat(rows).float().cpu()

    return features


def _processor(name: str, how: dict[str, Any]) -> Any:
    from transformers import AutoImageProcessor

    untyped: Any = AutoImageProcessor
    return untyped.from_pretrained(name, **how)


def read_image(file: Path) -> Image.Image:
    """An image file, in memory and in RGB."""
    with Image.open(file) as image:
        return image.convert("RGB")


def _attempt(load: Callable[[], Loaded], what: str) -> Loaded | Unavailable:
    try:
        return load()
    # Libraries raise many classes for a missing package, file, network or hub.
    except (ImportError, OSError, ValueError, RuntimeError) as error:
        return Unavailable(f"{what} could not be loaded: {first_line(error)}")


def _ready(model: Module) -> Module:
    return model.eval().requires_grad_(False).to(_best_device())


def _best_device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def _batches(items: Sequence[Item]) -> Iterator[Sequence[Item]]:
    return (items[start : start + BATCH] for start in range(0, len(items), BATCH))
