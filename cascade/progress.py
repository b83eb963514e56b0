"""What a generation reports while it runs."""

from dataclasses import dataclass
from typing import Any

from PIL import Image
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Progress:
    """A piece of work that has just been done; on a GPU, that has just been launched.

    Attributes:
        stage: "text": a prompt and its negative prompt have been encoded; "input_images": the image prompts, the start
            image or a control; "prior" or "decoder": one step of Stage C or B has been taken; "tiles": some of the tiles of a
            step of Stage B have been predicted, of a picture with a side above 2048 pixels; "image": a picture is ready.
        done, total: pieces of work of the whole request. The total grows when work is repeated for lack of memory.
        latents: of "prior" and "decoder": the prediction of the finished latents, float32 (B, C, h, w). `Cascade.preview` takes
            those of "prior".
        image: of "image": the picture.
    """

    stage: str
    done: int
    total: int
    latents: Tensor | None = None
    image: Image.Image | None = None


class Count:
    """Numbers the pieces of a request's work."""

    def __init__(self) -> None:
        self.done = self.total = 0

    def expect(self, left: int) -> None:
        """Set how many pieces are left."""
        self.total = self.done + left

    def did(self, stage: str, **made: Any) -> Progress:
        """Count one more piece."""
        self.done += 1
        return Progress(stage, self.done, self.total, **made)
