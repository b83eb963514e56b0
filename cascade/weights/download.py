"""Downloads the published weights: just the files that are needed, whole and as published.

A file has its name once its checksum has been compared with the Hub's; until then it ends in ``.incomplete``, and the
next download goes on with it. ``download.json`` is written when all of its files are there. huggingface_hub's own
functions for whole files begin again after a killed process, so the one below them, which can resume, is called here.
"""

import fcntl
import hashlib
import json
import logging
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from http import HTTPStatus
from pathlib import Path
from typing import BinaryIO
from urllib.parse import urlsplit

import httpx
from huggingface_hub import HfApi, constants, get_token, hf_hub_url
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.file_download import http_get
from huggingface_hub.utils import build_hf_headers

from cascade.weights.manifest import INCOMPLETE, LOCK, DownloadError, Manifest, amount, sha256
from cascade.weights.published import ALWAYS, DECODERS, EXTRAS, PARTS, PRIORS, Repository

logger = logging.getLogger(__name__)


class HubError(DownloadError):
    """The Hub, the way to it or the disk denies a download. One sentence says which, and what can be done."""


@dataclass(frozen=True)
class RemoteFile:
    """A file as the Hub describes it: `sha256` if it is in large-file storage, else git's `blob`."""

    repository: Repository
    path: str
    size: int
    sha256: str | None
    blob: str

    def local(self, folder: Path) -> Path:
        return folder / self.repository.folder / self.path

    def incomplete(self, folder: Path) -> Path:
        """Where its first bytes are; the name changes with the content, so that bytes of two files never mix."""
        local = self.local(folder)
        return local.with_name(f"{local.name}.{(self.sha256 or self.blob)[:12]}{INCOMPLETE}")

    def is_in(self, folder: Path) -> bool:
        """Whether it is there whole. A large one was compared before it got its name; reading it again takes long."""
        local = self.local(folder)
        if not local.is_file() or local.stat().st_size != self.size:
            return False
        return self.sha256 is not None or git_blob(local) == self.blob

    def left(self, folder: Path) -> int:
        """How many of its bytes are not there yet."""
        if self.is_in(folder):
            return 0
        incomplete = self.incomplete(folder)
        return max(self.size - incomplete.stat().st_size, 0) if incomplete.is_file() else self.size


def select_parts(prior: str, decoder: str, extras: list[str], *, only: bool = False) -> list[str]:
    """The names of the parts that the options ask for, in the order of the table."""
    chosen = set() if only else {*ALWAYS, PRIORS[prior], DECODERS[decoder]}
    chosen.update(part for extra in extras for part in EXTRAS[extra])
    return [part for part in PARTS if part in chosen]


def download(parts: list[str], folder: Path, *, add: bool = False) -> None:
    """Fetch the files of some parts into a folder, and say in its ``download.json`` that they are there.

    Args:
        parts: keys of ``PARTS``.
        folder: the directory; it need not exist.
        add: whether ``download.json`` goes on to list what it lists, other than the makings of the same components.

    Raises:
        DownloadError: the Hub, the way to it or the disk denies it, or ``download.json`` is damaged. What has been
            fetched stays, and is not fetched again.
    """
    earlier = Manifest.read(folder) if add and Manifest.file(folder).is_file() else Manifest([], {})
    files = find_files(parts)
    left = sum(file.left(folder) for file in files)
    total = sum(file.size for file in files)
    logger.info("%s in %d files into %s; %s to fetch.", amount(total), len(files), folder, amount(left))
    check_free(folder, left)
    with locked(folder):
        checksums = {}
        for file in files:
            if not file.is_in(folder):
                with explained(file.repository):
                    fetch(file, folder)
            local = file.local(folder)
            checksums[local.relative_to(folder).as_posix()] = file.sha256 or sha256(local)
        earlier.updated(Manifest(parts, checksums)).write(folder)


def find_files(parts: list[str]) -> list[RemoteFile]:
    """Ask the Hub for the files of some parts, after making sure that they may be read.

    Raises:
        HubError: a repository is not to be had, or has no such file.
    """
    listed: dict[Repository, dict[str, RemoteFile]] = {}
    found = []
    for name in parts:
        repository = PARTS[name].repository
        if repository not in listed:
            with explained(repository):
                listed[repository] = list_files(repository)
        for path in PARTS[name].files:
            if path not in listed[repository]:
                raise HubError(f"{repository.name} has no file {path} at its revision {repository.revision}.")
            found.append(listed[repository][path])
    return found


def list_files(repository: Repository) -> dict[str, RemoteFile]:
    """All files of a repository by their paths. Raises what huggingface_hub raises if they may not be read."""
    api = HfApi()
    # Of a gated repository everyone may see the list.
    api.auth_check(repository.name)
    info = api.model_info(repository.name, revision=repository.revision, files_metadata=True)
    return {
        file.rfilename: RemoteFile(
            repository,
            file.rfilename,
            file.lfs.size if file.lfs else file.size,
            file.lfs.sha256 if file.lfs else None,
            file.blob_id,
        )
        for file in info.siblings
    }


def check_free(folder: Path, needed: int) -> None:
    """Raise a HubError unless the disk of a folder, which need not exist, has that many bytes to spare."""
    existing = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    free = shutil.disk_usage(existing).free
    if needed > free:
        raise HubError(
            f"{amount(needed)} are still to be fetched, but the disk of {folder} has only {amount(free)} to spare: "
            "free some, or name a folder on another disk with --output."
        )


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Make the folder, and keep other downloads out of it: two that append to one file would spoil it."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / LOCK).open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise HubError(f"Another download into {folder} is running: wait for it, or end it.") from None
        yield


def fetch(file: RemoteFile, folder: Path) -> None:
    """Fetch the rest of a file, compare its checksum, and give it its name."""
    local, incomplete = file.local(folder), file.incomplete(folder)
    local.parent.mkdir(parents=True, exist_ok=True)
    # Small files may travel compressed, where a range would mean something else. A longer file is none of ours.
    if incomplete.is_file() and (file.sha256 is None or incomplete.stat().st_size > file.size):
        incomplete.unlink()
    with incomplete.open("ab") as stream:
        receive(file, stream)
        stream.flush()
        os.fsync(stream.fileno())
    size = incomplete.stat().st_size
    actual = sha256(incomplete) if file.sha256 else git_blob(incomplete)
    if size != file.size or actual != (file.sha256 or file.blob):
        incomplete.unlink()
        problem = f"with {size} bytes instead of {file.size}" if size != file.size else "damaged: its checksum differs"
        raise HubError(
            f"{file.path} of {file.repository.name} came {problem}. It was removed; run the same command again."
        )
    incomplete.replace(local)


def receive(file: RemoteFile, stream: BinaryIO) -> None:
    """Append to a file what it lacks; after a broken connection again, for as long as that brings something."""
    url = hf_hub_url(file.repository.name, file.path, revision=file.repository.revision)
    while (have := stream.tell()) < file.size:
        try:
            # No size is expected, so that a file of another size is judged here, in one place.
            http_get(url, stream, resume_size=have, headers=build_hf_headers(), displayed_filename=file.path)
        except httpx.TransportError:
            if stream.tell() <= have:
                raise
            continue
        except HfHubHTTPError as error:
            if error.response.status_code != HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE:
                raise
        return  # the server has no more, be it enough or not


@contextmanager
def explained(repository: Repository) -> Iterator[None]:
    """Turn what huggingface_hub and the disk raise into a HubError."""
    hub = constants.ENDPOINT
    try:
        yield
    except HfHubHTTPError as error:
        raise HubError(why_denied(error, repository)) from error
    except OfflineModeIsEnabled as error:
        raise HubError(f"HF_HUB_OFFLINE forbids to ask {hub} for {repository.name}.") from error
    except httpx.HTTPError as error:
        raise HubError(
            f"The connection to {hub} for {repository.name} failed ({error or type(error).__name__}). What has arrived "
            "is kept; run the same command again."
        ) from error
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise HubError(f"{hub} does not answer as the Hub does: something on the way may want a login.") from error
    except UnicodeEncodeError as error:
        raise HubError("Your token, in HF_TOKEN, is none: it must be of ASCII letters and digits.") from error
    except (ValueError, ImportError) as error:  # of a proxy that httpx cannot use
        raise HubError(f"{hub} cannot be asked for {repository.name}: {str(error).rstrip('.')}.") from error
    except OSError as error:
        raise HubError(
            f"A file of {repository.name} could not be written ({error.strerror or error}). What has arrived is kept; "
            "make room, and run the same command again."
        ) from error


def why_denied(error: HfHubHTTPError, repository: Repository) -> str:
    """One sentence about an answer of the Hub's that is none of the wanted ones."""
    hub = constants.ENDPOINT
    page = f"{hub}/{repository.name}"
    status = error.response.status_code
    with_token = get_token() is not None
    not_found = isinstance(error, RepositoryNotFoundError) and not isinstance(error, GatedRepoError)
    if with_token and status == HTTPStatus.UNAUTHORIZED and not not_found:
        return f"{hub} refuses your token: make another at {hub}/settings/tokens, and put it into HF_TOKEN."
    if isinstance(error, GatedRepoError):
        if with_token:
            return f"{repository.name} is gated: accept its conditions at {page} with the account of your token."
        return (
            f"{repository.name} is gated: accept its conditions at {page} with an account there, make a token at "
            f"{hub}/settings/tokens, and put it into HF_TOKEN."
        )
    # Who may see no repository is told the same as of one that does not exist.
    if not_found or status == HTTPStatus.UNAUTHORIZED:
        who = "does not show it to your token" if with_token else "shows it only to those with a token, in HF_TOKEN"
        return f"{hub} has no repository {repository.name}, or {who}."
    if isinstance(error, RevisionNotFoundError):
        return f"{repository.name} no longer has the revision {repository.revision}."
    host, reason = urlsplit(str(error.response.url)).netloc, error.response.reason_phrase
    advice = (error.server_message or "try again later").rstrip(".")
    return f"{host} answered {status} {reason} for {repository.name}: {advice}."


def git_blob(path: Path) -> str:
    """What git calls a file's content."""
    content = path.read_bytes()
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
