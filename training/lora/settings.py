"""The settings of a LoRA's training, and recipe files."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

from cascade.sizes import WHOLE
from training.errors import TrainingError
from training.options import Options
from training.values import Count, Range, Share, check_values, kinds_of, read_toml

Rank = Annotated[int, Range(1, 512)]
TextRank = Annotated[int, Range(0, 512)]
RESOLUTIONS = Range(128, WHOLE)
Target = Literal["attention", "mlp", "conditions", "timesteps", "all"]
TARGET_NAMES = get_args(Target)
Number = Literal["float16", "bfloat16", "float32"]


@dataclass(frozen=True)
class LoraSettings:
    """Settings of a LoRA's training.

    Attributes:
        rank: of every layer's LoRA, 1 to 512.
        alpha: the change of a weight is alpha / rank times the product of the two matrices; None: rank, so the factor is 1.
        targets: layers of Stage C: "attention" (q, k, v and output; the authors' choice), "mlp" (of the ResBlocks),
            "conditions" (the layers that read text and image embeddings), "timesteps", or "all" (these four).
        text_encoder_rank: of a LoRA of the Linear layers in the text encoder's blocks; 0: it has none.
        dropout: share of a LoRA's inputs that are zeroed in training.
        caption: of every picture that has no text file beside it; empty: every picture needs one.
        caption_prefix: put before every caption.
        word: put before every caption that does not have it.
        begins_from: known words, such as "dog", whose embeddings `word` begins from; it is then learned as a new word, which
            the file brings. Empty: `word` is text like any other.
        vectors: how many tokens a learned word has.
        caption_dropout: share of the samples whose caption is the empty one.
        resolution: pixels: pictures are trained on in their own shapes, with the area of this square. None: the model's own.
        preserve: prior preservation: prompts for what must not change, such as "a photo of a dog"; empty: none. The model makes
            pictures of them before training, and is trained on these between the others.
        preserve_pictures: how many in all, of each prompt in turn.
        preserve_share: share of the micro-batches that are of these pictures.
        samples: prompts, of each of which every evaluation makes a picture; up to 16.
        gradient_checkpointing: recompute activations in the backward pass: a third slower, and a fraction of the memory.
        compile_blocks: whether a GPU compiles the blocks of Stage C.
        number: dtype of the file.
        title: in the file's metadata; None: the output folder's name.

    Raises:
        TrainingError: a value is of the wrong kind or out of its range.
    """

    rank: Rank = 16
    alpha: float | None = None
    targets: tuple[Target, ...] = ("attention",)
    text_encoder_rank: TextRank = 0
    dropout: Share = 0.0
    caption: str = ""
    caption_prefix: str = ""
    word: str = ""
    begins_from: str = ""
    vectors: Annotated[int, Range(1, 16)] = 1
    caption_dropout: Share = 0.05
    resolution: int | None = None
    preserve: tuple[str, ...] = ()
    preserve_pictures: Count = 16
    preserve_share: Share = 0.5
    samples: tuple[str, ...] = ()
    gradient_checkpointing: bool = True
    compile_blocks: bool = False
    number: Number = "float16"
    title: str | None = None

    def __post_init__(self) -> None:
        check_values("[lora]", asdict(self), kinds_of(LoraSettings))
        for name in ("targets", "preserve", "samples"):  # TOML has lists
            object.__setattr__(self, name, tuple(getattr(self, name)))
        if not self.targets:
            raise TrainingError("[lora] targets is empty; name at least one.")
        if self.alpha is not None and self.alpha <= 0:
            raise TrainingError(f"[lora] alpha is {self.alpha}; it must be greater than 0.")
        if self.resolution is not None:
            RESOLUTIONS.check("[lora] resolution", self.resolution)
        if self.begins_from and not self.word:
            raise TrainingError(
                f"[lora] begins_from is {self.begins_from!r}, but word, which begins from it, is empty."
            )
        if any(letter.isspace() for letter in self.word) and self.begins_from:
            raise TrainingError(f"[lora] word is {self.word!r}; a word that is learned has no white space.")
        if len(self.preserve) > self.preserve_pictures:
            raise TrainingError(
                f"[lora] preserve has {len(self.preserve)} prompts, but preserve_pictures is {self.preserve_pictures}; "
                "each prompt needs a picture."
            )
        if self.preserve and self.preserve_share in (0, 1):
            raise TrainingError(f"[lora] preserve_share is {self.preserve_share}; it must lie between 0 and 1.")
        if len(self.samples) > 16:
            raise TrainingError(f"[lora] samples has {len(self.samples)} prompts; 16 are the limit.")

    @property
    def learns_a_word(self) -> bool:
        return bool(self.begins_from)

    @property
    def trains_text(self) -> bool:
        """Whether training changes the captions' embeddings."""
        return self.learns_a_word or self.text_encoder_rank > 0


def default_options() -> Options:
    return Options(steps=1000, batch_size=1, learning_rate=1e-4, ema=0.99, evaluate_every=250, compile=False)


@dataclass(frozen=True)
class Recipe:
    """All settings of one training.

    Attributes:
        lora: see `LoraSettings`.
        options: see `training.options.Options`. `compile` is not used: the blocks are compiled, see `LoraSettings`.
    """

    lora: LoraSettings = field(default_factory=LoraSettings)
    options: Options = field(default_factory=default_options)

    def changed(self, lora: Mapping[str, Any], options: Mapping[str, Any]) -> "Recipe":
        """A copy with other values; another number of steps scales warm-up and decay.

        Raises:
            TrainingError: a value is unknown, of the wrong kind or out of its range.
        """
        check_values("[lora]", lora, _optional(LoraSettings))
        check_values("[options]", options, _optional(Options))
        changed = self.options
        if "steps" in options:
            check_values("[options]", {"steps": options["steps"]}, {"steps": (Count, True)})
            changed = changed.scaled(options["steps"])
        return Recipe(replace(self.lora, **lora), replace(changed, **options))

    def as_tables(self) -> dict[str, Any]:
        """The tables of a recipe file."""
        return {"lora": asdict(self.lora), "options": asdict(self.options)}


def _optional(kind: type) -> dict[str, tuple[Any, bool]]:
    return {name: (annotation, False) for name, (annotation, _) in kinds_of(kind).items()}


def read_recipe(path: Path) -> Recipe:
    """A TOML file with the tables ``[lora]`` and ``[options]``; missing values are the defaults.

    Raises:
        TrainingError: there is no such file, it is not TOML, or a value is unknown or wrong.
    """
    tables = read_toml(path, "recipe")
    check_values(f"{path}", tables, {"lora": (dict, False), "options": (dict, False)})
    return Recipe().changed(tables.get("lora", {}), tables.get("options", {}))
