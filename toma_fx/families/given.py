"""Which frames of a video are given and not drawn, read off the values of a call."""

from torch import Tensor

from toma_fx.families.rows import Grid


def marked_frames(mask_BCFHW: Tensor, grid: Grid) -> tuple[bool, ...]:
    """The frames that a mask marks at any place, of any sample.

    Args:
        mask_BCFHW: ``(B, C, F, H, W)``, above 0 where something is given.
        grid: of the video's tokens; its frames are of one or more of the mask's.
    """
    marked_F = mask_BCFHW.amax((0, 1, 3, 4)) > 0
    of_frame = marked_F.shape[0] // grid.frames
    marked = marked_F[: grid.frames * of_frame].unflatten(0, (grid.frames, of_frame)).any(1)
    return tuple(map(bool, marked.tolist()))


def frames_without_noise(timestep_BN: Tensor, grid: Grid) -> tuple[bool, ...]:
    """The frames whose tokens all are at timestep 0, of any sample.

    Args:
        timestep_BN: ``(B, N)``: the timestep of each token of the video.
        grid: of the video's tokens.
    """
    still_BF = (timestep_BN == 0).unflatten(1, (grid.frames, grid.area)).all(2)
    return tuple(map(bool, still_BF.any(0).tolist()))
