"""Writes and reads picture files with metadata, in the fields that viewers read. Knows formats, not the texts' content.

==================  ===========================  =============================
                    PNG                          JPEG and WebP
==================  ===========================  =============================
description         tEXt ``Description``         EXIF ``ImageDescription``
parameters          tEXt/iTXt ``parameters``     EXIF ``UserComment``
source              iTXt ``XML:com.adobe.xmp``   XMP
==================  ===========================  =============================
"""

from collections.abc import Iterable
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

from PIL import ExifTags, Image, TiffTags
from PIL.PngImagePlugin import PngInfo
from PIL.TiffImagePlugin import ImageFileDirectory_v2

from cascade.images.png import save_png

# How hard WebP tries, 0 to 6. Of eight kinds of pictures of 1024x1024, method 2 took 39 to 113 ms; 4, Pillow's own, took 86 to
# 274 ms for files of 92 to 103 % of that size, and 0 took 28 to 103 ms for files of up to 157 % (docs/experiments.md).
WEBP_METHOD = 2
# Maximum bytes of a JPEG's EXIF, which must fit into one segment.
LONGEST_EXIF = 65_533
# The prefix of a UserComment in UTF-16. A1111 writes the text big-endian, and its readers expect that. EXIF requires the byte
# order of its numbers. So all of it is big-endian. BIG_ENDIAN is TIFF's header, with 8 as the first directory's offset.
UTF_16 = b"UNICODE\0"
BIG_ENDIAN = b"MM\0*\0\0\0\x08"

XMP = (
    '<?xpacket begin="\ufeff" id="W5M0MpCehiHzreSzNTczkc9d"?>'
    '<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:RDF xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#">'
    '<rdf:Description rdf:about="" xmlns:Iptc4xmpExt="http://iptc.org/std/Iptc4xmpExt/2008-02-29/">'
    "<Iptc4xmpExt:DigitalSourceType>{source}</Iptc4xmpExt:DigitalSourceType>"
    '</rdf:Description></rdf:RDF></x:xmpmeta><?xpacket end="r"?>'
)


class SourceType(StrEnum):
    """Two of IPTC's digital source types, with IPTC's definitions (cv.iptc.org/newscodes/digitalsourcetype)."""

    # "Digital media created algorithmically using an Artificial Intelligence model trained on captured content"
    CREATED = "http://cv.iptc.org/newscodes/digitalsourcetype/trainedAlgorithmicMedia"
    # "Augmentation, correction or enhancement using a Generative AI model, such as with inpainting or outpainting
    # operations"
    EDITED = "http://cv.iptc.org/newscodes/digitalsourcetype/compositeWithTrainedAlgorithmicMedia"


@dataclass(frozen=True)
class Metadata:
    """The metadata of a picture file.

    Attributes:
        source: whether the picture was created or edited.
        description: ASCII. Empty: left out.
        parameters: any text without NUL and lone surrogates. Empty: left out.
    """

    source: SourceType
    description: str = ""
    parameters: str = ""


def save_picture(image: Image.Image, path: Path, metadata: Iterable[Metadata], quality: int = 80) -> None:
    """Write a picture in the format of its path's suffix.

    Args:
        image: RGB.
        path: ends in .webp, .jpg or .png.
        metadata: versions of the metadata, the complete one first, each shorter than the previous one. PNG and WebP get the
            first version, JPEG the first one that fits.
        quality: 0 to 100, for WebP and JPEG; PNG is lossless.

    Raises:
        ValueError: the path has another suffix, or no version fits into a JPEG file.
        OSError: the file cannot be written.
    """
    versions = iter(metadata)
    if path.suffix == ".png":
        save_png(image, path, ((kind, content) for kind, content, *_ in _png_texts(next(versions)).chunks))
    elif path.suffix == ".webp":
        chosen = next(versions)
        image.save(path, "WEBP", quality=quality, method=WEBP_METHOD, exif=_exif(chosen), xmp=_xmp(chosen))
    elif path.suffix == ".jpg":
        for chosen in versions:
            exif = _exif(chosen)
            if len(exif) <= LONGEST_EXIF:
                break
        image.save(path, "JPEG", quality=quality, exif=exif, xmp=_xmp(chosen))
    else:
        raise ValueError(f"{path.name} must end in .webp, .jpg or .png.")


def read_description(path: Path) -> str:
    """The description in a PNG, JPEG or WebP file; "" if it has none, or is a file of another format. Decodes no pixels.

    Raises:
        FileNotFoundError: there is no such file.
    """
    try:
        with Image.open(path, formats=("PNG", "JPEG", "WEBP")) as picture:
            # `save_picture` writes a PNG's texts before its pixels, so they are there without decoding.
            texts = picture.info if picture.format == "PNG" else {}
            return str(texts.get("Description") or picture.getexif().get(ExifTags.Base.ImageDescription, ""))
    except FileNotFoundError:
        raise
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
        return ""


def _png_texts(metadata: Metadata) -> PngInfo:
    texts = PngInfo()
    # Pillow writes Latin-1 text as tEXt, and other text as iTXt in UTF-8.
    for keyword, text in (("Description", metadata.description), ("parameters", metadata.parameters)):
        if text:
            texts.add_text(keyword, text)
    texts.add_itxt("XML:com.adobe.xmp", _xmp(metadata).decode())
    return texts


def _exif(metadata: Metadata) -> bytes:
    """EXIF: a directory with the description, and if there are parameters, a second directory with the UserComment."""
    if not metadata.description and not metadata.parameters:
        return b""
    first, second = ImageFileDirectory_v2(BIG_ENDIAN), ImageFileDirectory_v2(BIG_ENDIAN)
    if metadata.description:
        first[ExifTags.Base.ImageDescription] = metadata.description
    start = len(BIG_ENDIAN)
    if not metadata.parameters:
        return b"Exif\0\0" + BIG_ENDIAN + first.tobytes(start)
    # Image.Exif would write the type BYTE, so it is not used.
    second.tagtype[ExifTags.Base.UserComment] = TiffTags.UNDEFINED
    second[ExifTags.Base.UserComment] = UTF_16 + metadata.parameters.encode("utf-16-be")
    first[ExifTags.IFD.Exif] = 0  # a placeholder for the offset, so that the first directory has its final length
    end = start + len(first.tobytes(start))
    first[ExifTags.IFD.Exif] = end
    return b"Exif\0\0" + BIG_ENDIAN + first.tobytes(start) + second.tobytes(end)


def _xmp(metadata: Metadata) -> bytes:
    return XMP.format(source=metadata.source.value).encode()
