"""Functions that read from a call's values which frames of a video are given, not generated."""

from torch import Tensor

from toma_fx.families.rows import Grid


def marked_frames(mask_BCFHW: Tensor, grid: Grid) -> tuple[bool, ...]:
    """Return for each frame whether a mask marks any place of it, in any sample.

    Args:
        mask_BCFHW: ``(B, C, F, H, W)``, above 0 where something is given.
        grid: the video's tokens; each of its frames covers one or more frames of the mask.
    """
    marked_F = mask_BCFHW.amax((0, 1, 3, 4)) > 0
    of_frame = marked_F.shape[0] // grid.frames
    marked = marked_F[: grid.frames * of_frame].unflatten(0, (grid.frames, of_frame)).any(1)
    return tuple(map(bool, marked.tolist()))


def frames_without_noise(timestep_BN: Tensor, grid: Grid) -> tuple[bool, ...]:
    """Return for each frame whether all its tokens are at timestep 0, in any sample.

    Args:
        timestep_BN: ``(B, N)``: the timestep of each token of the video.
        grid: the video's tokens.
    """
    still_BF = (timestep_BN == 0).unflatten(1, (grid.frames, grid.area)).all(2)
    return tuple(map(bool, still_BF.any(0).tolist()))
