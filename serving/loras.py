"""Finds the files of a request's LoRAs: in the model folder, or downloaded once and kept."""

import json
import os
import re
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import quote

from cascade.limits import InputError, shown
from cascade.loras.lora import Lora
from serving.digests import digest
from serving.download import Limits
from serving.image_urls import UrlSettings, download_all, positive
from serving.lora_cache import Cache
from serving.lora_sources import (
    ENDINGS,
    Local,
    OnCivitai,
    OnHub,
    Site,
    Web,
    civitai,
    hub,
    source_of,
    without_secrets,
)
from serving.record import Lora as Recorded

LIMITS = Limits(seconds=900.0, idle_seconds=30.0, size=4_000_000_000)
# Maximum bytes of an API's answer.
ANSWER = Limits(seconds=60.0, idle_seconds=30.0, size=10_000_000)
STATUS = re.compile(r"the server answered (\d{3}) ")
PEFT = ("adapter_config.json", "adapter_model.safetensors")


@dataclass(frozen=True)
class LoraSettings:
    """How LoRAs are downloaded.

    Attributes:
        cache: keeps the files.
        limits: of each download.
    """

    cache: Cache
    limits: Limits = field(default_factory=lambda: LIMITS)

    @classmethod
    def from_environment(cls) -> "LoraSettings":
        """CASCADE_LORA_CACHE, a folder (default ~/.cache/stable-cascade/loras), and CASCADE_LORA_GIGABYTES (10).

        Raises:
            ValueError: a variable has a value that is not allowed.
        """
        folder = os.environ.get("CASCADE_LORA_CACHE")
        root = Path(folder) if folder else _home() / ".cache" / "stable-cascade" / "loras"
        return cls(Cache(root, round(1e9 * positive("CASCADE_LORA_GIGABYTES", 10))))


def _home() -> Path:
    try:
        home = Path.home()
    except RuntimeError:
        return Path(tempfile.gettempdir())
    return home if os.access(home, os.W_OK) else Path(tempfile.gettempdir())


class Loras:
    """Finds the LoRAs of requests.

    Args:
        folder: the model folder's loras; it need not exist.
        settings: how they are downloaded.
        public_only: whether addresses that are not public are refused.
    """

    def __init__(self, folder: Path, settings: LoraSettings, *, public_only: bool) -> None:
        self.folder = folder
        self.settings = settings
        self.urls = UrlSettings(settings.limits, public_only)

    def find(self, weights: Sequence[str], scales: Sequence[float]) -> list[Lora]:
        """The files of a request, each with its scale. Downloads stop within a second when this is interrupted.

        Args:
            weights: their sources, see `lora_sources`.
            scales: one for each.

        Raises:
            InputError: a text is not a source, or a file does not exist.
        """
        found: list[Lora] = []
        kept: list[Path] = []
        for place, (text, scale) in enumerate(zip(weights, scales, strict=True)):
            label = f"lora_weights[{place}]"
            source = source_of(label, text)
            if isinstance(source, Local):
                path = self._local(label, source.name)
            else:
                try:
                    folder = self.settings.cache.get(repr(source), partial(self._fetch, label, source), kept)
                except OSError as error:
                    raise InputError(f"{label} could not be stored ({error.strerror}).") from None
                kept.append(folder)
                path = _adapter_in(folder)
            found.append(Lora(path, scale))
        return found

    def explained(self, error: InputError, weights: Sequence[str], loras: Sequence[Lora]) -> InputError:
        """Turn the engine's error about a request's LoRAs into one with the request's input names."""
        said = str(error)
        for place, (text, lora) in enumerate(zip(weights, loras, strict=True)):
            if said.startswith(f"loras[{place}]: "):
                said = f"lora_weights[{place}]: {said.partition(': ')[2]}".replace(
                    str(lora.path), shown(without_secrets(text))
                )
        return InputError(said)

    def recorded(self, loras: Sequence[Lora], *, hashed: bool) -> list[Recorded]:
        """The LoRAs' entries in metadata."""
        return [Recorded(Path(one.path).stem, _digest(Path(one.path)) if hashed else "", one.scale) for one in loras]

    def _local(self, label: str, name: str) -> Path:
        files = sorted(self.folder.iterdir()) if self.folder.is_dir() else []
        there = {path.name: path for path in files if os.path.exists(path)}  # pathlib's raises an error for some links
        for candidate in (name, f"{name}.safetensors"):
            if candidate in there:
                return there[candidate]
        names = [
            path.name.removesuffix(".safetensors")
            for path in there.values()
            if path.suffix != ".json" and path.name[0] != "."
        ]
        listed = f"it has {', '.join(names[:20])}" if names else "it has none"
        raise InputError(f"{label} is {shown(name)}, which is not among the model folder's loras: {listed}.")

    # ---- downloads ----

    def _fetch(self, label: str, source: Web | OnHub | OnCivitai, folder: Path) -> None:
        if isinstance(source, Web):
            self._get(label, source.url, folder / _file_name(source.url), None)
        elif isinstance(source, OnHub):
            self._fetch_from_hub(label, source, folder)
        else:
            self._fetch_from_civitai(label, source, folder)

    def _fetch_from_hub(self, label: str, source: OnHub, folder: Path) -> None:
        site = hub()
        names = self._names_on_hub(label, site, source)
        file = source.file or self._only(label, source, names)
        for name in PEFT if Path(file).name == PEFT[1] else (file, f"{Path(file).with_suffix('.json').as_posix()}"):
            inside = (Path(file).parent / name).as_posix() if name in PEFT else name
            if inside == file or inside in names:
                url = f"{site.endpoint}/{source.repository}/resolve/{quote(source.revision, safe='')}/{quote(inside)}"
                self._get(label, url, folder / Path(inside).name, site)

    def _names_on_hub(self, label: str, site: Site, source: OnHub) -> list[str]:
        revision = quote(source.revision, safe="")
        answer = self._ask(label, f"{site.endpoint}/api/models/{source.repository}/revision/{revision}", site)
        siblings = answer.get("siblings") if isinstance(answer, dict) else None
        names = [one.get("rfilename") for one in siblings or () if isinstance(one, dict)]
        return [name for name in names if isinstance(name, str)]

    def _only(self, label: str, source: OnHub, names: Sequence[str]) -> str:
        if PEFT[1] in names:
            return PEFT[1]
        found = [name for name in names if name.endswith(".safetensors")]
        if len(found) == 1:
            return found[0]
        listed = ", ".join(found[:10]) or "none"
        raise InputError(
            f"{label} is {shown(source.repository)}, which has {len(found)} safetensors files, {listed}; "
            f"name one, as in {source.repository}/FILE."
        )

    def _fetch_from_civitai(self, label: str, source: OnCivitai, folder: Path) -> None:
        site = civitai()
        version = source.version
        if version is None:
            answer = self._ask(label, f"{site.endpoint}/api/v1/models/{source.model}", site)
            versions = answer.get("modelVersions") if isinstance(answer, dict) else None
            first = versions[0] if isinstance(versions, list) and versions else {}
            version = str(first.get("id", "")) if isinstance(first, dict) else ""
            if not version.isdigit():
                raise InputError(f"{label} is model {source.model} of Civitai, which has no version to download.")
        name = f"civitai-{version}.safetensors"
        self._get(label, f"{site.endpoint}/api/download/models/{version}", folder / name, site)

    def _ask(self, label: str, url: str, site: Site) -> Any:
        """The JSON that an API answers."""
        with tempfile.TemporaryDirectory(prefix="cascade-loras-") as folder:
            target = Path(folder) / "answer"
            self._get(label, url, target, site, replace(self.urls, limits=ANSWER))
            try:
                return json.loads(target.read_bytes())
            except (ValueError, RecursionError):
                raise InputError(f"{label}: {site.name} answers something that is not JSON.") from None

    def _get(self, label: str, url: str, target: Path, site: Site | None, settings: UrlSettings | None = None) -> None:
        headers = site.headers if site is not None and site.holds(url) else {}
        try:
            download_all({label: (url, target)}, settings or self.urls, headers)
        except InputError as error:
            status = STATUS.search(str(error))
            if site is None or status is None or status[1] not in ("401", "403", "404"):
                raise
            raise InputError(f"{label} {_refused(site, status[1], bool(headers))}.") from None


def _digest(path: Path) -> str:
    """The sha256 of a file; of a folder, that of the adapter in it."""
    file = path / PEFT[1] if path.is_dir() else path
    return digest(file) if file.is_file() else ""


def _refused(site: Site, status: str, had_token: bool) -> str:
    if status == "404":
        return f"names something that is not on {site.name}, or is private (404)"
    if had_token:
        return f"may not be read with the token in {site.variable}: {site.name} answers {status}"
    return f"needs a token: {site.name} answers {status}, and {site.variable} is not set"


def _file_name(url: str) -> str:
    """The file name of a download. It matters, because the word of a textual inversion is its file's name."""
    path = url.partition("?")[0].partition("#")[0]
    name = re.sub(r"[^\w.-]", "_", path.rpartition("/")[2])[-100:].lstrip(".")
    return name if name.lower().endswith(ENDINGS) else "lora.safetensors"


def _adapter_in(folder: Path) -> Path:
    """Of one LoRA's files, the adapter; or the folder, as PEFT has it."""
    if (folder / PEFT[0]).is_file():
        return folder
    (file,) = (path for path in folder.iterdir() if path.suffix != ".json")
    return file
