"""The safety checker: an image classifier that says which pictures not everyone should see.

Its folder is what transformers saves: ``config.json``, whose ``id2label`` names the classes, ``model.safetensors`` and
``preprocessor_config.json``. Whatever is wrong with a file is a ``WeightsError`` that names the folder.

transformers is imported only to load a checker: it takes seconds.
"""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from PIL import Image

from cascade.weights import ModelFolder, WeightsError
from cascade.weights.errors import shortened

if TYPE_CHECKING:
    from transformers import PreTrainedModel

FOLDER = "safety_checker"
UNSAFE_LABELS = frozenset({"nsfw", "unsafe", "porn", "hentai", "gore"})
FILES = ("config.json", "model.safetensors", "preprocessor_config.json")


def find_safety_checker(model_folder: Path) -> Path | None:
    """The folder ``safety_checker`` inside of a model folder, else beside it, if there is one."""
    candidates = (model_folder / FOLDER, model_folder.absolute().parent / FOLDER)
    return next((folder for folder in candidates if folder.is_dir()), None)


class SafetyChecker:
    """Flags pictures. Use :meth:`load`.

    Args:
        classifier: any image classifier of transformers, in evaluation mode.
        processor: its image processor.
        unsafe: the indices of the classes that are flagged.
    """

    def __init__(self, classifier: "PreTrainedModel", processor: Any, unsafe: list[int]) -> None:
        self.classifier = classifier
        self.processor = processor
        self.unsafe = unsafe

    @classmethod
    def load(cls, folder: Path, device: str | torch.device = "cpu") -> "SafetyChecker":
        """Read a classifier, in float32.

        Args:
            folder: see the module.
            device: where it computes.

        Raises:
            WeightsError: a file is missing or damaged, weights are missing, or no class has one of `UNSAFE_LABELS`; or
                a model folder's ``model.json`` lists other checksums.
        """
        from transformers import AutoModelForImageClassification

        for name in FILES:
            if not (folder / name).is_file():
                raise WeightsError(f"{folder / name} is missing.")
        if (folder.parent / "model.json").is_file():
            ModelFolder.open(folder.parent).compare(folder.name)
        try:
            processor = _processor_class(folder).from_pretrained(folder, local_files_only=True)
            classifier, report = AutoModelForImageClassification.from_pretrained(
                folder, local_files_only=True, use_safetensors=True, dtype=torch.float32, output_loading_info=True
            )
        except Exception as error:  # transformers raises nothing narrower
            raise WeightsError(f"{folder} holds no readable image classifier: {shortened(error)}") from error
        # transformers would make them up.
        if report["missing_keys"]:
            raise WeightsError(f"{folder / 'model.safetensors'} lacks {sorted(report['missing_keys'])[0]}.")
        labels = classifier.config.id2label
        unsafe = [index for index, label in labels.items() if label.lower() in UNSAFE_LABELS]
        if not unsafe:
            raise WeightsError(
                f"{folder / 'config.json'} has the classes {', '.join(labels.values())}; one of them must be called "
                f"{', '.join(sorted(UNSAFE_LABELS))}."
            )
        return cls(classifier.to(device).eval(), processor, unsafe)

    @torch.no_grad()
    def flags(self, image: Image.Image) -> bool:
        """Whether the unsafe classes are, together, more likely than the others.

        Args:
            image: RGB, of any size.
        """
        pixels = self.processor(image, return_tensors="pt").pixel_values.to(self.classifier.device)
        chances = self.classifier(pixels).logits[0].softmax(-1)
        return bool(chances[self.unsafe].sum() > 0.5)


def _processor_class(folder: Path) -> Any:
    """The class of a classifier's image processor that needs Pillow alone: transformers' `AutoImageProcessor` cannot be
    used without torchvision."""
    import transformers

    said = json.loads((folder / "preprocessor_config.json").read_text(encoding="utf-8"))["image_processor_type"]
    return getattr(transformers, said.removesuffix("Fast").removesuffix("Pil") + "Pil")
