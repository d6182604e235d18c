"""PNG and JPEG: grey pictures, one slice a file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from recon.errors import ReconError

SUFFIXES = (".png", ".jpg", ".jpeg")


def picture_size(path: str | Path) -> tuple[int, int]:
    """Height and width of a picture, without reading its pixels.

    Raises
    ------
    ReconError
        Naming the file, if it is absent or no picture.
    """
    with _open(Path(path)) as picture:
        return (picture.height, picture.width)


def read_picture(path: str | Path) -> Tensor:
    """Read a picture; of a coloured one, its luminance (ITU-R BT.601); transparency is passed over.

    Parameters
    ----------
    path : str or Path
        ``.png`` or ``.jpg``, of 1, 8 or 16 bits a channel.

    Returns
    -------
    Tensor
        ``(H, W)`` float32 as stored, so that white is 255 or 65535.

    Raises
    ------
    ReconError
        Naming the file, if it is absent, damaged or no picture.
    """
    path = Path(path)
    with _open(path) as picture:
        try:
            if picture.mode in ("P", "PA", "CMYK", "YCbCr", "LAB", "HSV", "1"):
                picture = picture.convert("L" if picture.mode == "1" else "RGB")
            values = np.asarray(picture)
        except (OSError, SyntaxError, ValueError) as error:
            raise ReconError(f"{path} cannot be read as a picture, it may be damaged ({error})") from None
    if values.ndim == 3 and values.shape[2] >= 3:
        values = values[..., :3] @ np.array([0.299, 0.587, 0.114])
    elif values.ndim == 3:  # grey and transparency
        values = values[..., 0]
    return torch.from_numpy(np.array(values, dtype=np.float32))


def _open(path: Path) -> Any:
    from PIL import Image, UnidentifiedImageError

    try:
        return Image.open(path)
    except FileNotFoundError:
        raise ReconError(f"{path}: there is no such file") from None
    except UnidentifiedImageError:
        raise ReconError(f"{path} is no PNG or JPEG picture") from None
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise ReconError(f"{path} cannot be read as a picture, it may be damaged ({error})") from None
