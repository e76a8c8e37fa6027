"""A judge of small pipelines' pictures: is each a good picture of what its prompt says?

    python -m examples.small_models.judge --work small_models_work     # trains it, once

The judge is a small classifier, trained on true pictures alone, plain and detailed. Its share of
right answers says whether a picture shows what was asked for. Frechet's distance between its
features of drawn and of true pictures says how far the drawn ones are from true ones as a set. It
is also asked how soft and how noisy a picture is, so that its features notice both.
"""

import argparse
import math
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from tqdm import tqdm

from examples.small_models import pictures
from examples.small_models.losses import to_pixels
from examples.small_models.pictures import DETAILED_SIZE, SIZE, Scene, Thing, draw, scene_of
from examples.small_models.videos import CLIP_SIZE, clips_of
from toma_fx.lab.distances import frechet_distance

WEIGHTS = Path(__file__).parent / "judge.safetensors"
Drawn = npt.NDArray[np.uint8]
TRUE_PICTURES = 400
"""Number of true pictures that Frechet's distance compares with."""
FIRST_TRUE = 50_000_000
"""Index of the first true picture; no training saw it."""

QUESTIONS: dict[str, tuple[tuple[str, ...], Callable[[Scene], str]]] = {
    "layout": (tuple(pictures.LAYOUTS), lambda scene: scene.layout),
    "size": (pictures.SIZES, lambda scene: scene.first.size),
    "colour": (tuple(pictures.COLOURS), lambda scene: scene.first.colour),
    "shape": (tuple(pictures.SHAPES), lambda scene: scene.first.shape),
    "second size": (pictures.SIZES, lambda scene: _second(scene).size),
    "second colour": (tuple(pictures.COLOURS), lambda scene: _second(scene).colour),
    "second shape": (tuple(pictures.SHAPES), lambda scene: _second(scene).shape),
    "texture": (pictures.TEXTURES, lambda scene: scene.texture),
    "ground": (tuple(pictures.GROUNDS), lambda scene: scene.ground),
    "sky": (tuple(pictures.SKIES), lambda scene: scene.sky),
}
"""Questions about a picture: the possible answers, and a function to the right one or ""."""
SPOILED = 3
"""Degrees of softness, and of noise, that the judge tells apart in training."""
FEATURES = 128


class Judge(nn.Module):
    """Answers all questions about pictures ``(N, 3, H, W)`` from -1 to 1, of 256 pixels or less."""

    def __init__(self) -> None:
        super().__init__()
        layers: list[nn.Module] = [nn.Conv2d(3, 48, 4, stride=4)]
        for before, after, stride in ((48, 96, 2), (96, 128, 2), (128, 128, 1), (128, 128, 2)):
            layers += [nn.GroupNorm(8, before), nn.SiLU()]
            layers += [nn.Conv2d(before, after, 3, stride=stride, padding=1)]
        self.look = nn.Sequential(
            *layers,
            nn.GroupNorm(8, 128),
            nn.SiLU(),
            nn.Conv2d(128, 32, 1),
            nn.Flatten(),
            nn.Linear(32 * 8 * 8, FEATURES),
        )
        self.answer = nn.Linear(FEATURES, sum(_sizes()) + 2 * SPOILED)

    def features(self, pixels: Tensor) -> Tensor:
        """``(N, 128)``, in which sets of pictures are compared."""
        if pixels.shape[-1] != DETAILED_SIZE:
            pixels = F.interpolate(
                pixels, (DETAILED_SIZE, DETAILED_SIZE), mode="bilinear", antialias=True
            )
        return self.look(pixels)  # type: ignore[no-any-return]

    def forward(self, pixels: Tensor) -> list[Tensor]:
        """For each question, and then softness and noise, logits ``(N, answers)``."""
        return list(
            self.answer(F.silu(self.features(pixels))).split([*_sizes(), SPOILED, SPOILED], 1)
        )


def right_answers(scenes: Sequence[Scene]) -> Tensor:
    """The number of each question's right answer, ``(scenes, questions)``; -1 for none."""
    rows = []
    for scene in scenes:
        answers = [(possible, right(scene)) for possible, right in QUESTIONS.values()]
        rows.append([possible.index(right) if right else -1 for possible, right in answers])
    return torch.tensor(rows)


def load_judge(weights: Path = WEIGHTS) -> Judge:
    """The trained judge.

    Raises:
        FileNotFoundError: if it has not been trained.
    """
    if not weights.exists():
        raise FileNotFoundError(f"{weights} does not exist; python -m examples.small_models.judge")
    judge = Judge()
    judge.load_state_dict(load_file(weights))
    return judge.eval()


@torch.no_grad()
def hits(judge: Judge, drawn: Drawn, scenes: Sequence[Scene]) -> tuple[Tensor, Tensor]:
    """Masks of the right answers and of the asked questions: ``(scenes, questions)`` each."""
    right = right_answers(scenes)
    logits = [judge(pixels)[: len(QUESTIONS)] for pixels in _pixels(drawn)]
    answers = torch.cat([torch.stack([one.argmax(1) for one in some], 1) for some in logits])
    return answers == right, right >= 0


def shares(judge: Judge, drawn: Drawn, scenes: Sequence[Scene]) -> npt.NDArray[np.float64]:
    """The share of questions that the judge answers rightly, for each picture: ``(scenes,)``."""
    hit, asked = hits(judge, drawn, scenes)
    return ((hit & asked).sum(1) / asked.sum(1)).double().numpy()


def accuracies(judge: Judge, drawn: Drawn, scenes: Sequence[Scene]) -> dict[str, float]:
    """Each question's share of right answers, and of pictures in which all answers are right."""
    hit, asked = hits(judge, drawn, scenes)
    of_questions = (hit & asked).sum(0) / asked.sum(0)
    everything = (hit | ~asked).all(1).float().mean()
    named = zip(QUESTIONS, of_questions.tolist(), strict=True)
    return {**dict(named), "everything": everything.item()}


@torch.no_grad()
def features(judge: Judge, drawn: Drawn) -> Tensor:
    """``(N, 128)`` features of ``N`` pictures, in float64."""
    return torch.cat([judge.features(pixels) for pixels in _pixels(drawn)]).double()


def distance_to_true(judge: Judge, drawn: Drawn) -> float:
    """Frechet's distance of ``(N, H, W, 3)`` pictures, or frames, to true ones; 0 is equal.

    Compare only sets of equally many pictures: it is biased upwards where they are few.
    """
    return frechet_distance(features(judge, drawn), _true_features(judge, drawn.shape[1]))


@cache
def _true_features(judge: Judge, size: int) -> Tensor:
    if size == CLIP_SIZE:
        true = clips_of(range(FIRST_TRUE, FIRST_TRUE + TRUE_PICTURES), 1)[:, 0]
    else:
        true = true_pictures(TRUE_PICTURES, detailed=size >= DETAILED_SIZE, start=FIRST_TRUE)
    return features(judge, true)


def true_pictures(count: int, *, detailed: bool, start: int) -> Drawn:
    """Pictures that no training saw, of things that training shows."""
    size = DETAILED_SIZE if detailed else SIZE
    return np.stack(
        [
            draw(scene_of(index), index, size=size, detailed=detailed)
            for index in range(start, start + count)
        ]
    )


def _pixels(drawn: Drawn) -> Iterator[Tensor]:
    return (to_pixels(part) for part in np.array_split(drawn, len(drawn) // 32 + 1))


def spoil(pixels: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Pictures of which half are softer or noisier, and the degrees ``(N, 2)`` of both."""
    degrees = torch.randint(SPOILED, (len(pixels), 2), generator=generator)
    degrees[::2] = 0
    spoiled = pixels.clone()
    for index, (soft, noise) in enumerate(degrees.tolist()):
        if soft:
            width = 2 * soft + 1
            one = F.pad(pixels[index : index + 1], (soft,) * 4, mode="replicate")
            spoiled[index] = F.avg_pool2d(one, width, stride=1)[0]
        grains = torch.randn(pixels.shape[1:], generator=generator)
        spoiled[index] += 0.06 * noise * grains
    return spoiled, degrees


def train(work: Path, count: int, epochs: int, batch: int, weights: Path = WEIGHTS) -> Judge:
    """Trains the judge on pictures of all things, also on those that the pipelines never saw."""
    torch.manual_seed(0)
    judge = Judge()
    scenes = [scene_of(index, held_out=index % 2 == 1) for index in range(count)]
    drawn = _training_pictures(work, scenes)
    answers = right_answers(scenes)
    optimizer = torch.optim.AdamW(judge.parameters(), lr=1e-3, weight_decay=0.05)
    order = torch.cat([torch.randperm(count) for _ in range(epochs)]).split(batch)
    generator = torch.Generator().manual_seed(0)
    for step, chosen in enumerate(tqdm(order, "judge", mininterval=10)):
        for group in optimizer.param_groups:
            group["lr"] = 1e-3 * (1 + math.cos(math.pi * step / len(order))) / 2
        pixels, degrees = spoil(to_pixels(drawn[chosen.numpy()]), generator)
        right = torch.cat([answers[chosen], degrees], dim=1)
        losses = [
            F.cross_entropy(one, answer, ignore_index=-1)
            for one, answer in zip(judge(pixels), right.unbind(1), strict=True)
            if (answer >= 0).any()
        ]
        optimizer.zero_grad()
        torch.stack(losses).sum().backward()
        optimizer.step()
    save_file({name: weight.contiguous() for name, weight in judge.state_dict().items()}, weights)
    return judge.eval()


def _training_pictures(work: Path, scenes: Sequence[Scene]) -> Drawn:
    """Two detailed pictures in three, the others plain; all of 256 x 256 pixels."""
    path = work / "judged_pictures.npy"
    if not path.exists():
        shape = (len(scenes), DETAILED_SIZE, DETAILED_SIZE, 3)
        partial = path.with_suffix(".partial")
        array = np.lib.format.open_memmap(partial, mode="w+", dtype=np.uint8, shape=shape)
        for index, scene in enumerate(tqdm(scenes, "pictures", mininterval=10)):
            detailed = index % 3 > 0
            picture = draw(
                scene, index, size=DETAILED_SIZE if detailed else SIZE, detailed=detailed
            )
            array[index] = picture if detailed else _enlarged(picture)
        array.flush()
        partial.rename(path)
    drawn: Drawn = np.load(path, mmap_mode="r")
    if len(drawn) != len(scenes):
        raise ValueError(f"{path} has {len(drawn)} pictures, not {len(scenes)}; remove it")
    return drawn


def _enlarged(picture: Drawn) -> Drawn:
    large = F.interpolate(to_pixels(picture[None]), scale_factor=2, mode="bilinear")
    found: Drawn = ((large[0].permute(1, 2, 0) + 1) * 127.5).round().byte().numpy()
    return found


def _second(scene: Scene) -> Thing:
    return scene.second or Thing(size="", colour="", shape="")


def _sizes() -> list[int]:
    return [len(possible) for possible, _ in QUESTIONS.values()]


def main(arguments: list[str] | None = None) -> None:
    """Train the judge, and say how often it is right about pictures that it has not seen."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--work", type=Path, default=Path("small_models_work"))
    parser.add_argument("--count", type=int, default=9_000, help="pictures")
    parser.add_argument("--epochs", type=int, default=6)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--weights", type=Path, default=WEIGHTS, help="where they are written")
    options = parser.parse_args(arguments)
    options.work.mkdir(parents=True, exist_ok=True)
    judge = train(options.work, options.count, options.epochs, options.batch, options.weights)
    unseen = range(20_000_000, 20_000_200)
    scenes = [scene_of(index, held_out=index % 2 == 1) for index in unseen]
    for detailed in (False, True):
        size = DETAILED_SIZE if detailed else SIZE
        pairs = zip(unseen, scenes, strict=True)
        drawn = np.stack([draw(scene, i, size=size, detailed=detailed) for i, scene in pairs])
        print("detailed" if detailed else "plain", accuracies(judge, drawn, scenes))


if __name__ == "__main__":
    main()
