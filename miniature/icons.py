"""The miniature's drawings: chooses objects from three open icon sets, and renders, packs and loads them.

The sets are the npm packages of `ICON_SETS` (Iconify JSON: an SVG body for every slug). `select_objects` keeps the
objects that all three draw and that words can tell apart, under plain English names; `render_drawing` makes a tight square
RGBA drawing of one; `pack_drawings` writes them to one zip file that `load_drawings` reads with nothing but Pillow.

Drawing `object * len(STYLES) + style` is object `object` in style `style`, everywhere.
"""

import io
import json
import logging
import re
import signal
import zipfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

from training.errors import TrainingError
from training.files import whole_file

logger = logging.getLogger(__name__)

DRAWING_SIZE = 192
"""Side of a packed drawing in pixels, slightly more than a default object's in a scene of 256 pixels."""
EFFORT = 6
"""libwebp's method, 0 to 6: at 6, files are smallest and take longest. The pixels of a drawing without loss are the same."""


@dataclass(frozen=True)
class IconSet:
    """One icon set: its npm ``package`` and ``version``, its ``style`` in captions, its ``licence`` and ``author``."""

    package: str
    version: str
    style: str
    licence: str
    author: str

    @property
    def key(self) -> str:
        """Short name of the set, as used in the object list."""
        return self.package.rsplit("/", 1)[1]


ICON_SETS = (
    IconSet("@iconify-json/noto", "1.2.9", "cartoon", "Apache-2.0", "Google"),
    IconSet("@iconify-json/fluent-emoji", "1.2.7", "3D", "MIT", "Microsoft"),
    IconSet("@iconify-json/twemoji", "1.2.5", "flat", "CC-BY-4.0", "Twitter and contributors"),
)
STYLES = tuple(icon_set.style for icon_set in ICON_SETS)

OBJECT_LIST = Path(__file__).parent / "objects.json"


@dataclass(frozen=True)
class IconObject:
    """One object: its ``name`` in captions, its icon's slug in each of `ICON_SETS`, and ``also`` further names."""

    name: str
    slugs: tuple[str, ...]
    also: tuple[str, ...] = ()


# Slugs to leave out: captions cannot tell them from others, they are mostly lettering, or one set draws another object.
_LEFT_OUT = re.compile(
    r"""
    .*-(oclock|thirty|facing-right|skin-tone) | keycap-.* | input-.* | japanese-(?!castle|dolls|post-office).* | (men|women)-.*
    | (?!chequered|black|white|pirate|rainbow|triangular|crossed).*flag.* | white-flag
    | (?!play|pause|stop|record|eject|fast-forward|fast-reverse|shuffle-tracks|repeat).*-button(-blood-type)?
    | (?!man-(dancing|beard|bald)|woman-(dancing|red-hair|curly-hair|with-headscarf))(man|woman)-.*
    | person-(bald|beard|curly-hair|red-hair|white-hair|standing|kneeling|frowning|pouting|tipping-hand|with-skullcap)
    | person-(in-manual-wheelchair|getting-haircut|facepalming|bowing|feeding-baby|with-veil)
    | (waning|waxing)-.* | (black|white)-(large|medium|small|medium-small)-.* | (large|small)-.*-diamond
    | aquarius|aries|cancer|capricorn|gemini|leo|libra|ophiuchus|pisces|sagittarius|scorpio|taurus|virgo
    | (back|end|on|soon|top|up-.*|down-.*|left-right)-arrow | (left|right)-arrow-.* | grinning-cat-with-smiling-eyes
    | dotted-six-pointed-star|sports-medal|repeat-single-button|outbox-tray|new-moon|tired-face|face-with-diagonal-mouth
    | hushed-face|frowning-face-with-open-mouth|slightly-frowning-face|squinting-face-with-tongue|grinning-face-with-big-eyes
    | kissing-face-with-.*-eyes|face-with-open-eyes-and-hand-over-mouth
    | copyright|registered|trade-mark|information|part-alternation-mark|wavy-dash|heavy-equals-sign|circled-m|wireless
    | (fast-up|fast-down|clockwise|counterclockwise).* | older-person|mx-claus|leftwards-.*|rightwards-.*
    | (minus|divide|multiply|plus|double-curly-loop|curly-loop|customs|baggage-claim|left-luggage|passport-control)
    | (bust|busts)-in-silhouette|pregnant-(man|person)|magnifying-glass-tilted-right|right-facing-fist
    | left-speech-bubble|breast-feeding|no-one-under-eighteen|atm-sign|water-closet|biting-lip|speaker-(low|medium)-volume
    | (black|white)-square.*|tumbler.*|eight-.*|ewe|om|antenna-bars|vibration-mode|mobile-phone-off
    | middle-finger|dvd|optical-disk|chart-increasing-with-yen|(euro|pound|yen)-banknote
    | heavy-dollar.*|cinema|label|eye-in-speech-bubble
    """,
    re.VERBOSE,
)
_KEPT = {"closed-mailbox-with-raised-flag", "open-mailbox-with-raised-flag", "flag-in-hole", "white-flag"}

# Names that say better what is drawn than the slug does.
_RENAMED = {
    "1st-place-medal": "gold medal",
    "2nd-place-medal": "silver medal",
    "3rd-place-medal": "bronze medal",
    "airplane-arrival": "landing airplane",
    "airplane-departure": "departing airplane",
    "alien-monster": "space invader",
    "american-football": "American football",
    "articulated-lorry": "big truck",
    "auto-rickshaw": "rickshaw",
    "automobile": "car",
    "backhand-index-pointing-down": "hand pointing down",
    "backhand-index-pointing-left": "hand pointing left",
    "backhand-index-pointing-up": "hand pointing up",
    "badminton": "badminton racket",
    "baguette-bread": "baguette",
    "bank": "bank building",
    "beach-with-umbrella": "beach",
    "beverage-box": "juice box",
    "billed-cap": "baseball cap",
    "biohazard": "biohazard sign",
    "boar": "wild boar",
    "bottle-with-popping-cork": "champagne bottle",
    "bowling": "bowling ball and pins",
    "building-construction": "building under construction",
    "camping": "camping tent",
    "carpentry-saw": "saw",
    "chart-decreasing": "falling chart",
    "chart-increasing": "rising chart",
    "cheese-wedge": "cheese",
    "chequered-flag": "checkered flag",
    "children-crossing": "children crossing sign",
    "christmas-tree": "Christmas tree",
    "closed-mailbox-with-raised-flag": "mailbox",
    "collision": "explosion",
    "construction": "construction barrier",
    "cooking": "fried egg in a pan",
    "cricket": "cricket insect",
    "cricket-game": "cricket bat and ball",
    "cup-with-straw": "cup with a straw",
    "currency-exchange": "currency exchange sign",
    "custard": "pudding",
    "cut-of-meat": "steak",
    "dashing-away": "puff of wind",
    "deciduous-tree": "tree",
    "diamond-with-a-dot": "blue diamond with a dot",
    "diya-lamp": "oil lamp",
    "dizzy": "dizzy star",
    "dna": "DNA strand",
    "droplet": "water drop",
    "e-mail": "email",
    "ear-of-corn": "corn",
    "evergreen-tree": "pine tree",
    "ferry": "ferry boat",
    "field-hockey": "field hockey stick",
    "flag-in-hole": "golf hole",
    "fleur-de-lis": "fleur-de-lis",
    "flower-playing-cards": "flower card",
    "flying-disc": "frisbee",
    "flying-saucer": "UFO",
    "foggy": "foggy bridge",
    "folding-hand-fan": "hand fan",
    "fork-and-knife-with-plate": "plate with fork and knife",
    "front-facing-baby-chick": "baby chick facing forward",
    "game-die": "die",
    "gem-stone": "diamond",
    "globe-showing-americas": "globe with America",
    "globe-showing-asia-australia": "globe with Asia",
    "globe-showing-europe-africa": "globe with Africa",
    "globe-with-meridians": "wireframe globe",
    "green-salad": "salad",
    "head-shaking-horizontally": "face shaking from side to side",
    "head-shaking-vertically": "face nodding up and down",
    "hear-no-evil-monkey": "monkey covering its ears",
    "herb": "sprig of herb",
    "high-voltage": "lightning bolt",
    "hindu-temple": "Hindu temple",
    "horse-racing": "jockey on a horse",
    "hot-beverage": "cup of coffee",
    "hourglass-done": "hourglass",
    "hourglass-not-done": "running hourglass",
    "house-with-garden": "house with a garden",
    "ice": "ice cube",
    "ice-cream": "bowl of ice cream",
    "ice-hockey": "ice hockey stick",
    "jack-o-lantern": "jack-o'-lantern",
    "japanese-castle": "Japanese castle",
    "japanese-dolls": "Japanese dolls",
    "japanese-post-office": "Japanese post office",
    "joker": "joker card",
    "knot": "knot of rope",
    "lacrosse": "lacrosse stick",
    "lady-beetle": "ladybug",
    "latin-cross": "cross",
    "leaf-fluttering-in-wind": "leaves fluttering in the wind",
    "left-facing-fist": "fist facing left",
    "link": "chain link",
    "litter-in-bin-sign": "litter bin sign",
    "locked": "padlock",
    "locked-with-key": "padlock with a key",
    "locked-with-pen": "padlock with a pen",
    "magnifying-glass-tilted-left": "magnifying glass",
    "mahjong-red-dragon": "mahjong tile",
    "man-bald": "bald man",
    "man-beard": "man with a beard",
    "man-dancing": "dancing man",
    "mans-shoe": "brown shoe",
    "mantelpiece-clock": "mantel clock",
    "map-of-japan": "map of Japan",
    "mate": "mate drink",
    "memo": "memo with a pencil",
    "mens-room": "men's room sign",
    "metro": "metro train",
    "money-with-wings": "dollar bills with wings",
    "mount-fuji": "Mount Fuji",
    "mountain-cableway": "cable car",
    "mrs-claus": "Mrs. Claus",
    "nail-polish": "bottle of nail polish",
    "no-bicycles": "no bicycles sign",
    "no-entry": "no entry sign",
    "no-littering": "no littering sign",
    "no-mobile-phones": "no phones sign",
    "no-pedestrians": "no pedestrians sign",
    "no-smoking": "no smoking sign",
    "non-potable-water": "no drinking water sign",
    "open-mailbox-with-raised-flag": "open mailbox",
    "package": "cardboard box",
    "page-facing-up": "sheet of paper",
    "performing-arts": "pair of theater masks",
    "person-bouncing-ball": "person bouncing a ball",
    "person-in-motorized-wheelchair": "person in a motorized wheelchair",
    "person-in-steamy-room": "person in a sauna",
    "person-in-suit-levitating": "person in a suit levitating",
    "person-in-tuxedo": "person in a tuxedo",
    "person-rowing-boat": "person rowing a boat",
    "person-taking-bath": "person taking a bath",
    "person-wearing-turban": "person wearing a turban",
    "person-with-crown": "person with a crown",
    "person-with-white-cane": "person with a white cane",
    "pick": "pickaxe",
    "ping-pong": "ping pong paddle",
    "police-car-light": "siren",
    "pool-8-ball": "eight ball",
    "pot-of-food": "pot of stew",
    "potable-water": "tap water sign",
    "poultry-leg": "chicken leg",
    "pouring-liquid": "glass pouring liquid",
    "prohibited": "prohibited sign",
    "radioactive": "radioactive sign",
    "rescue-workers-helmet": "rescue helmet",
    "restroom": "restroom sign",
    "roll-of-paper": "toilet paper",
    "rolling-on-the-floor-laughing": "face rolling on the floor laughing",
    "rosette": "rosette flower",
    "rugby-football": "rugby ball",
    "sake": "bottle of sake",
    "salt": "salt shaker",
    "santa-claus": "Santa Claus",
    "sauropod": "long-necked dinosaur",
    "seat": "airplane seat",
    "see-no-evil-monkey": "monkey covering its eyes",
    "selfie": "hand taking a selfie",
    "shallow-pan-of-food": "paella",
    "shower": "shower head",
    "snowman": "snowman in the snow",
    "snowman-without-snow": "snowman",
    "soap": "bar of soap",
    "soft-ice-cream": "ice cream cone",
    "speak-no-evil-monkey": "monkey covering its mouth",
    "sport-utility-vehicle": "SUV",
    "star-of-david": "star of David",
    "star-struck": "star-struck face",
    "station": "train station",
    "statue-of-liberty": "Statue of Liberty",
    "stuffed-flatbread": "pita sandwich",
    "sun-with-face": "sun with a face",
    "t-rex": "T-rex",
    "t-shirt": "T-shirt",
    "teacup-without-handle": "cup of green tea",
    "tear-off-calendar": "tear-off calendar",
    "tennis": "tennis ball",
    "thread": "spool of thread",
    "tokyo-tower": "Tokyo tower",
    "triangular-flag": "red flag",
    "two-hump-camel": "camel with two humps",
    "umbrella-on-ground": "beach umbrella",
    "umbrella-with-rain-drops": "umbrella in the rain",
    "unlocked": "open padlock",
    "warning": "warning sign",
    "water-wave": "ocean wave",
    "wedding": "wedding chapel",
    "white-flower": "flower stamp",
    "woman-curly-hair": "woman with curly hair",
    "woman-dancing": "dancing woman",
    "woman-red-hair": "woman with red hair",
    "woman-with-headscarf": "woman with a headscarf",
    "womans-boot": "woman's boot",
    "womans-clothes": "woman's blouse",
    "womans-hat": "woman's hat",
    "womans-sandal": "woman's sandal",
    "womens-room": "women's room sign",
    "wood": "log of wood",
    "wrapped-gift": "gift box",
    "x-ray": "X-ray",
    "yarn": "ball of yarn",
    "yo-yo": "yo-yo",
    "zzz": "zzz sign",
}

# Other words that people use for the same thing.
_ALSO = {
    "airplane": ("plane",),
    "alien-monster": ("pixel monster",),
    "automobile": ("automobile", "red car"),
    "bicycle": ("bike",),
    "baguette-bread": ("loaf of French bread",),
    "cat-face": ("kitten face",),
    "closed-book": ("book",),
    "computer-disk": ("minidisc",),
    "cooking": ("fried egg",),
    "couch-and-lamp": ("sofa",),
    "cricket": ("grasshopper",),
    "crescent-moon": ("moon",),
    "desktop-computer": ("computer",),
    "dog-face": ("puppy face",),
    "doughnut": ("donut",),
    "ear-of-corn": ("ear of corn",),
    "eggplant": ("aubergine",),
    "evergreen-tree": ("fir tree",),
    "gem-stone": ("gemstone",),
    "glowing-star": ("shining star",),
    "grinning-face": ("smiley",),
    "hamburger": ("burger",),
    "high-voltage": ("flash of lightning",),
    "hot-beverage": ("coffee", "hot drink"),
    "hot-pepper": ("chili pepper",),
    "jack-o-lantern": ("halloween pumpkin",),
    "lady-beetle": ("ladybird",),
    "laptop": ("laptop computer",),
    "locked": ("lock",),
    "mobile-phone": ("smartphone",),
    "motorcycle": ("motorbike",),
    "package": ("parcel",),
    "panda": ("panda bear",),
    "pile-of-poo": ("poop",),
    "police-car-light": ("police light",),
    "red-apple": ("apple",),
    "red-heart": ("heart",),
    "rose": ("red rose",),
    "shrimp": ("prawn",),
    "skull": ("human skull",),
    "snowman-without-snow": ("snow man",),
    "soccer-ball": ("football",),
    "soft-ice-cream": ("soft ice cream",),
    "steaming-bowl": ("bowl of noodles",),
    "sun": ("bright sun",),
    "t-rex": ("dinosaur",),
    "takeout-box": ("Chinese takeout",),
    "television": ("TV",),
    "triangular-flag": ("triangular flag",),
    "umbrella-with-rain-drops": ("rainy umbrella",),
    "wastebasket": ("trash can",),
    "watch": ("wristwatch",),
    "water-pistol": ("water gun",),
    "wrapped-gift": ("gift", "present"),
}

# The sets' different slugs for one emoji, in ICON_SETS order.
_SAME = {
    "phoenix": ("phoenix", "phoenix-bird", "phoenix"),
    "pinata": ("pinata", "piata", "pinata"),
    "blackbird": ("black-bird", "blackbird", "black-bird"),
    "elf": ("elf", "person-elf", "elf"),
    "fairy": ("fairy", "person-fairy", "fairy"),
    "genie": ("genie", "person-genie", "genie"),
    "mage": ("mage", "person-mage", "mage"),
    "mermaid": ("merperson", "person-merpeople", "merperson"),
    "superhero": ("superhero", "person-superhero", "superhero"),
    "supervillain": ("supervillain", "person-supervillain", "supervillain"),
    "vampire": ("vampire", "person-vampire", "vampire"),
    "zombie": ("zombie", "person-zombie", "zombie"),
}


def read_icon_set(path: Path) -> dict[str, str]:
    """Reads an Iconify ``icons.json``: an SVG document for each slug, including aliases that only rename."""
    data = json.loads(path.read_text())
    width, height = data.get("width", 16), data.get("height", 16)
    icons = {}
    for slug, icon in data["icons"].items():
        box = f"0 0 {icon.get('width', width)} {icon.get('height', height)}"
        icons[slug] = (
            '<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
            f'viewBox="{box}">{icon["body"]}</svg>'
        )
    for slug, alias in data.get("aliases", {}).items():
        if alias.keys() == {"parent"} and alias["parent"] in icons:
            icons[slug] = icons[alias["parent"]]
    return icons


def select_objects(sets: Sequence[Mapping[str, str]]) -> list[IconObject]:
    """The objects that all ``sets`` have and that captions can tell apart, sorted by name; names are unique."""
    shared = set.intersection(*(set(icons) for icons in sets))
    kept = {slug for slug in shared if slug in _KEPT or not _LEFT_OUT.fullmatch(slug)}
    chosen = [
        IconObject(_RENAMED.get(slug, slug.replace("-", " ")), (slug,) * len(sets), _ALSO.get(slug, ()))
        for slug in kept
    ]
    chosen += [
        IconObject(name, slugs)
        for name, slugs in _SAME.items()
        if all(slug in icons for slug, icons in zip(slugs, sets, strict=True))
    ]
    chosen.sort(key=lambda item: item.name.lower())
    names = [item.name for item in chosen] + [name for item in chosen for name in item.also]
    doubles = sorted({name for name in names if names.count(name) > 1})
    if doubles:
        raise ValueError(f"object names must be unique, but these are used twice: {', '.join(doubles)}")
    return chosen


def save_objects(objects: Iterable[IconObject], path: Path = OBJECT_LIST) -> None:
    """Writes the object list as JSON, one object a line."""
    lines = [json.dumps({"name": o.name, "slugs": o.slugs, **({"also": o.also} if o.also else {})}) for o in objects]
    with whole_file(path) as part:
        part.write_text("[\n" + ",\n".join(lines) + "\n]\n", encoding="utf-8")


def load_objects(path: Path = OBJECT_LIST) -> list[IconObject]:
    """Reads an object list that `save_objects` wrote."""
    rows = json.loads(path.read_text())
    return [IconObject(row["name"], tuple(row["slugs"]), tuple(row.get("also", ()))) for row in rows]


def render_drawing(svg: str, size: int = DRAWING_SIZE) -> Image.Image:
    """Renders an SVG to an RGBA image (size, size), straight alpha, cropped so that the drawing's longer side fills it."""
    import resvg_py  # only who builds the data needs the renderer

    png = bytes(resvg_py.svg_to_bytes(svg_string=svg, width=2 * size, height=2 * size, skip_system_fonts=True))
    image = Image.open(io.BytesIO(png)).convert("RGBA")
    box = image.getchannel("A").point(lambda alpha: 255 * (alpha > 8)).getbbox()
    if box is None:
        raise ValueError(f"the drawing is empty: {svg[:200]}")
    left, top, right, bottom = box
    side = max(right - left, bottom - top)
    x, y = (left + right - side) // 2, (top + bottom - side) // 2
    # Resampled with premultiplied alpha ("RGBa"), or else the colour under transparent pixels bleeds into the edge.
    square = image.convert("RGBa").crop((x, y, x + side, y + side))
    return square.resize((size, size), Image.Resampling.LANCZOS).convert("RGBA")


def _pack(drawing: Image.Image) -> bytes:
    """WebP of a drawing: lossless with a palette of 256 colours if that is close enough (flat art), otherwise lossy."""
    reduced = drawing.quantize(256, method=Image.Quantize.FASTOCTREE, dither=Image.Dither.NONE).convert("RGBA")
    # Palette entries are means: what was opaque comes out a little less so.
    reduced.putalpha(reduced.getchannel("A").point(lambda alpha: 255 if alpha >= 250 else alpha))
    error = np.asarray(reduced, np.float32) - np.asarray(drawing, np.float32)
    visible = np.asarray(drawing)[..., 3:] / 255
    flat = np.square(error * visible).mean() < 4.0
    file = io.BytesIO()
    if flat:
        reduced.save(file, "WEBP", lossless=True, quality=100, method=EFFORT)
    else:
        drawing.save(file, "WEBP", quality=93, alpha_quality=90, method=EFFORT)
    return file.getvalue()


def _render_packed(svg: str) -> bytes:
    return _pack(render_drawing(svg))


def pack_drawings(
    objects: Sequence[IconObject],
    sets: Sequence[Mapping[str, str]],
    path: Path,
    styles: Sequence[str] = STYLES,
) -> None:
    """Renders every object in every style into one zip file: ``catalogue.json``, and one WebP for each drawing.

    The file appears when it is complete. Shows a progress bar.
    """
    svgs = [icons[slug] for item in objects for icons, slug in zip(sets, item.slugs, strict=True)]
    catalogue = {"names": [item.name for item in objects], "styles": list(styles), "size": DRAWING_SIZE}
    # Ctrl-C reaches all processes of a terminal; only this one should react.
    deaf = ProcessPoolExecutor(initializer=signal.signal, initargs=(signal.SIGINT, signal.SIG_IGN))
    with whole_file(path) as part, deaf as pool, zipfile.ZipFile(part, "w") as archive:
        archive.writestr("catalogue.json", json.dumps(catalogue))
        drawn = pool.map(_render_packed, svgs, chunksize=4)
        try:
            for index, packed in enumerate(tqdm(drawn, desc="drawing", total=len(svgs), mininterval=1)):
                archive.writestr(f"{index:05d}.webp", packed)
        finally:
            pool.shutdown(cancel_futures=True)  # so that an interruption does not wait for thousands of drawings
    logger.info("%d objects, %d drawings in %s", len(objects), len(svgs), path)


@contextmanager
def _opened(path: Path | str) -> Iterator[tuple[zipfile.ZipFile, dict[str, Any]]]:
    """The file of drawings and its catalogue; errors are `load_drawings`' own."""
    try:
        with zipfile.ZipFile(path) as archive:
            yield archive, json.loads(archive.read("catalogue.json"))
    except FileNotFoundError:
        raise TrainingError(f"There is no file {path}; scripts/build-mini-data makes it.") from None
    except (OSError, ValueError, KeyError, zipfile.BadZipFile) as error:
        raise TrainingError(f"{path} is not a complete file of drawings; scripts/build-mini-data makes it.") from error


def load_names(path: Path | str) -> tuple[list[str], list[str]]:
    """The names and styles alone that `load_drawings` returns, with its errors."""
    with _opened(path) as (_, catalogue):
        return catalogue["names"], catalogue["styles"]


def load_drawings(path: Path | str) -> tuple[torch.Tensor, list[str], list[str]]:
    """Reads the drawings that `pack_drawings` wrote.

    Returns:
        drawings: uint8 (objects * styles, 4, 192, 192), RGBA with colour premultiplied by alpha, 0..255.
        names: one for each object; drawing ``object * len(styles) + style`` shows ``names[object]`` in ``styles[style]``.
        styles: the style words, `STYLES`.

    Raises:
        TrainingError: there is no such file, or it is not complete.
    """
    with _opened(path) as (archive, catalogue):
        names, styles, size = catalogue["names"], catalogue["styles"], catalogue["size"]
        files = [archive.read(f"{index:05d}.webp") for index in range(len(names) * len(styles))]
    drawings = np.empty((len(files), 4, size, size), np.uint8)

    def decode(index: int) -> None:
        image = Image.open(io.BytesIO(files[index])).convert("RGBA").convert("RGBa")
        drawings[index] = np.asarray(image).transpose(2, 0, 1)

    with ThreadPoolExecutor() as pool:
        list(pool.map(decode, range(len(files))))
    return torch.from_numpy(drawings), names, styles
