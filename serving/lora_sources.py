"""Parses the source of a LoRA: the name of a file in the model folder, a URL, or a model on the Hub or Civitai.

Reads no file and no URL; `serving.loras` does.
"""

import os
import re
from dataclasses import dataclass
from urllib.parse import parse_qs, urlsplit, urlunsplit

import httpx

from cascade.limits import InputError, shown

ENDINGS = (".safetensors", ".tar", ".tar.gz", ".tgz", ".zip")
FORMS = (
    "it must be the name of a file in the model folder's loras, owner/name[/file] on the Hub, a link to Civitai, or a URL of "
    "a .safetensors, .tar or .zip"
)
# Parameters of URLs that are not secret.
PUBLIC_PARAMETERS = ("modelVersionId", "type", "format", "size", "fp", "download")


@dataclass(frozen=True)
class Site:
    """A site with an API.

    Attributes:
        name: its name in messages.
        endpoint: URL of its root.
        variable: the environment variable that has the token.
    """

    name: str
    endpoint: str
    variable: str

    @property
    def headers(self) -> dict[str, str]:
        """The headers of requests to it. httpx sends Authorization to no other host."""
        token = (os.environ.get(self.variable) or "").strip()
        return {"Authorization": f"Bearer {token}"} if token else {}

    def holds(self, url: str) -> bool:
        """Whether a URL belongs to this site, so that it may get the token."""
        one, other = httpx.URL(url), httpx.URL(self.endpoint)
        return (one.scheme, one.host, one.port) == (other.scheme, other.host, other.port)


def hub() -> Site:
    """The Hub, or the one that HF_ENDPOINT names."""
    return Site("the Hub", (os.environ.get("HF_ENDPOINT") or "https://huggingface.co").rstrip("/"), "HF_TOKEN")


def civitai() -> Site:
    """Civitai, or the compatible server that CIVITAI_ENDPOINT names."""
    endpoint = (os.environ.get("CIVITAI_ENDPOINT") or "https://civitai.com").rstrip("/")
    return Site("Civitai", endpoint, "CIVITAI_API_TOKEN")


@dataclass(frozen=True)
class Local:
    """A file in the model folder's loras."""

    name: str


@dataclass(frozen=True)
class Web:
    """A URL of a file."""

    url: str


@dataclass(frozen=True)
class OnHub:
    """A repository; file None: the only safetensors file in it, or PEFT's files."""

    repository: str
    file: str | None = None
    revision: str = "main"


@dataclass(frozen=True)
class OnCivitai:
    """A version of a model; version None: the newest."""

    model: str | None
    version: str | None


Source = Local | Web | OnHub | OnCivitai

_REPOSITORY = re.compile(r"([\w][\w.-]*/[\w][\w.-]*)(?:/(.+))?")
_ON_HUB = re.compile(
    r"/([\w][\w.-]*/[\w][\w.-]*)(?:/(?:resolve|blob|raw|tree)/([^/]+)(?:/(.+))?|/(.+\.safetensors))?/?"
)
_DOWNLOAD = re.compile(r"/api/download/models/(\d+)/?")
_MODEL = re.compile(r"/models/(\d+)(?:/[^/]*)?/?")
_NAMED = re.compile(r"(www\.)?(huggingface\.co|hf\.co|civitai\.com)/", re.IGNORECASE)


def source_of(label: str, text: str) -> Source:
    """The source of a LoRA.

    Args:
        label: the input's name, for the error.

    Raises:
        InputError: the text is not a source.
    """
    given = text.strip()
    if _NAMED.match(given):
        given = f"https://{given}"
    if re.match("https?://", given, re.IGNORECASE):
        found = _of_url(given)
    elif "/" in given or "\\" in given:
        match = _REPOSITORY.fullmatch(given)
        found = OnHub(match[1], _inside(match[2])) if match and _is_inside(match[2]) else None
    else:
        found = Local(given) if given and given[0] not in ".~" and given.isprintable() and ":" not in given else None
    if found is None:
        raise InputError(f"{label} is {shown(without_secrets(text))}; {FORMS}.")
    return found


def _is_inside(file: str | None) -> bool:
    return file is None or not any(part in ("", ".", "..") for part in file.split("/"))


def _inside(file: str | None) -> str | None:
    return file or None


def _of_url(url: str) -> Source | None:
    try:
        parts, parsed = urlsplit(url), httpx.URL(url)
    except (ValueError, httpx.InvalidURL):
        return None
    host = (parts.hostname or "").removeprefix("www.")
    if host in ("huggingface.co", "hf.co") or hub().holds(url):
        match = _ON_HUB.fullmatch(parsed.path)
        if match is None:
            return None
        file = match[3] or match[4]
        return OnHub(match[1], file, match[2] or "main") if _is_inside(file) else None
    if host == "civitai.com" or civitai().holds(url):
        if download := _DOWNLOAD.fullmatch(parts.path):
            return OnCivitai(None, download[1])
        model = _MODEL.fullmatch(parts.path)
        version = parse_qs(parts.query).get("modelVersionId", [None])[0]
        if version is not None and not version.isdigit():
            return None
        return OnCivitai(model[1], version) if model else None
    return Web(url) if parsed.path.lower().endswith(ENDINGS) and parsed.host else None


def without_secrets(text: str) -> str:
    """A text for files and logs: a URL loses its password and all parameters that may be secret."""
    if not re.match("https?://", text.strip(), re.IGNORECASE):
        return text
    try:
        parts = urlsplit(text.strip())
        kept = "&".join(one for one in parts.query.split("&") if one.partition("=")[0] in PUBLIC_PARAMETERS)
        return urlunsplit((parts.scheme, parts.netloc.rpartition("@")[2], parts.path, kept, ""))
    except ValueError:
        return "a URL"
