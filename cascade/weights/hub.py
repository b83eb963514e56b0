"""Lists a repository's files on the Hub, and downloads them.

A download is written to a name that ends in ``.incomplete``, and renamed once its checksum equals the Hub's. The next
download resumes it. huggingface_hub's public functions start over after a killed process, so this module calls the
resumable function below them.

Errors are of three kinds, each with its own sentences: the disk (`DiskError`), this machine's network settings
(certificates, proxies, tokens), and the answers of the network and the Hub.
"""

import errno
import hashlib
import json
import logging
import os
import shutil
import socket
import ssl
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from http import HTTPStatus
from pathlib import Path
from typing import Any, BinaryIO
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

from cascade.weights.hashing import sha256
from cascade.weights.locking import locked
from cascade.weights.manifest import INCOMPLETE, LOCK, DownloadError, amount
from cascade.weights.published import Repository

logger = logging.getLogger(__name__)

BRANCH = "main"  # for other repositories; the published ones are pinned to commits
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class HubError(DownloadError):
    """A download failed because of the Hub, the network or the disk. One sentence says why and what can be done."""


class DiskError(HubError):
    """The disk failed."""


@dataclass(frozen=True)
class RemoteFile:
    """A file as the Hub describes it.

    Attributes:
        size: bytes.
        sha256: of its content, if it is in large-file storage.
        blob: git's hash of a small file.
    """

    repository: Repository
    path: str
    size: int
    sha256: str | None
    blob: str

    def local(self, folder: Path) -> Path:
        return folder / self.repository.folder / self.path

    def incomplete(self, folder: Path) -> Path:
        """The path of a partial download. It contains a part of the hash, so bytes of two versions never mix."""
        local = self.local(folder)
        return local.with_name(f"{local.name}.{(self.sha256 or self.blob)[:12]}{INCOMPLETE}")

    def is_in(self, folder: Path) -> bool:
        """Whether the folder has the complete file.

        A large file's checksum was compared before it was renamed, and hashing it again is slow. So it is hashed again only
        on a branch, where a newer version may have the same size.
        """
        local = self.local(folder)
        if not local.is_file() or local.stat().st_size != self.size:
            return False
        if self.sha256 is None:
            return git_blob(local) == self.blob
        return self.repository.revision != BRANCH or sha256(local) == self.sha256

    def left(self, folder: Path) -> int:
        """How many bytes of an incomplete file are still to be downloaded."""
        incomplete = self.incomplete(folder)
        return max(self.size - incomplete.stat().st_size, 0) if incomplete.is_file() else self.size


@contextmanager
def fetched(files: list[RemoteFile], folder: Path) -> Iterator[dict[str, str]]:
    """Download the missing files, and lock the folder against other downloads until the block ends.

    Yields:
        The sha256 of all files, by path in the folder.

    Raises:
        HubError: see `download`.
    """
    missing = [file for file in files if not file.is_in(folder)]
    total, left = sum(file.size for file in files), sum(file.left(folder) for file in missing)
    logger.info("%s in %d files into %s; %s to fetch.", amount(total), len(files), folder, amount(left))
    check_free(folder, left)

    def refuse() -> None:
        raise HubError(f"Another download into {folder} is running: wait for it, or end it.")

    with locked(folder / LOCK, refuse):  # because two downloads that append to one file would corrupt it
        for file in missing:
            with explained(file.repository):
                fetch(file, folder)
        local = {file: file.local(folder) for file in files}
        yield {local[file].relative_to(folder).as_posix(): file.sha256 or sha256(local[file]) for file in files}


def list_files(repository: Repository) -> dict[str, RemoteFile]:
    """All files of a repository, by path. Raises huggingface_hub's errors if they may not be read."""
    api = HfApi()
    # A gated repository's list of files is public, so access to its files is checked first.
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
    """Raise a HubError unless the folder's disk has `needed` free bytes. The folder need not exist."""
    existing = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    free = shutil.disk_usage(existing).free
    if needed > free:
        raise HubError(
            f"{amount(needed)} are still to be fetched, but the disk of {folder} has only {amount(free)} free: "
            "free some, or name a folder on another disk with --output."
        )


def fetch(file: RemoteFile, folder: Path) -> None:
    """Download the rest of a file, compare its checksum, and rename it."""
    local, incomplete = file.local(folder), file.incomplete(folder)
    with on_disk(local):
        local.parent.mkdir(parents=True, exist_ok=True)
        # The server may compress small files, and then a range counts compressed bytes. A file that is too long is not ours.
        if incomplete.is_file() and (file.sha256 is None or incomplete.stat().st_size > file.size):
            incomplete.unlink()
        stream = incomplete.open("ab", buffering=0)  # so that a killed process loses no bytes
    with stream:
        receive(file, Written(stream, local))
        with on_disk(local):
            os.fsync(stream.fileno())
    size = incomplete.stat().st_size
    actual = sha256(incomplete) if file.sha256 else git_blob(incomplete)
    if size != file.size or actual != (file.sha256 or file.blob):
        incomplete.unlink()
        problem = f"with {size} bytes instead of {file.size}" if size != file.size else "damaged: its checksum differs"
        raise HubError(
            f"{file.path} of {file.repository.name} came {problem}. It was removed; run the same command again."
        )
    with on_disk(local):
        incomplete.replace(local)


class Written:
    """A file whose write errors are `DiskError`s. huggingface_hub takes every OSError for a network error."""

    def __init__(self, stream: BinaryIO, path: Path) -> None:
        self.stream = stream
        self.path = path

    def write(self, data: bytes) -> int:
        with on_disk(self.path):
            left = memoryview(data)
            while left:  # an unbuffered file may write only a part
                left = left[self.stream.write(left) :]
        return len(data)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)


@contextmanager
def on_disk(path: Path) -> Iterator[None]:
    """Turn an OSError while a file is written into a DiskError."""
    try:
        yield
    except OSError as error:
        reason = error.strerror or error
        advice = "make room" if error.errno in FULL else "fix that"
        raise DiskError(
            f"{path} could not be written ({reason}). What was downloaded is kept; {advice}, and run the same command again."
        ) from error


def receive(file: RemoteFile, stream: Written) -> None:
    """Append the missing bytes to a file. Reconnects after a broken connection, unless the last one received nothing."""
    url = hf_hub_url(file.repository.name, file.path, revision=file.repository.revision)
    while (have := stream.tell()) < file.size:
        try:
            # Without an expected size: `fetch` checks it.
            http_get(url, stream, resume_size=have, headers=build_hf_headers(), displayed_filename=file.path)
        except httpx.TransportError:
            if stream.tell() <= have:
                raise
            continue
        except HfHubHTTPError as error:
            if error.response.status_code != HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE:
                raise
        return  # the server has no more bytes; `fetch` checks whether they suffice


@contextmanager
def explained(repository: Repository) -> Iterator[None]:
    """Turn huggingface_hub's errors into a HubError."""
    hub = constants.ENDPOINT
    check_certificates()
    try:
        yield
    except HubError:
        raise
    except HfHubHTTPError as error:
        raise HubError(why_denied(error, repository)) from error
    except OfflineModeIsEnabled as error:
        raise HubError(f"HF_HUB_OFFLINE is set, so {hub} cannot be asked for {repository.name}.") from error
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise HubError(
            f"{hub} does not answer as the Hub does: a proxy or a login page may answer in its place."
        ) from error
    except UnicodeEncodeError as error:
        raise HubError("Your token, in HF_TOKEN, is not valid: it must consist of ASCII letters and digits.") from error
    except ImportError as error:  # httpx needs another package only for a SOCKS proxy
        raise HubError(
            f"{hub} is reached through a SOCKS proxy, which needs the package socksio: {sys.executable} -m pip "
            "install socksio"
        ) from error
    except (httpx.HTTPError, OSError) as error:
        raise HubError(why_unreachable(error, repository)) from error
    except ValueError as error:  # httpx raises it for a proxy that it cannot use
        raise HubError(f"{hub} cannot be asked for {repository.name}: {str(error).rstrip('.')}.") from error


def check_certificates() -> None:
    """Make sure that SSL_CERT_FILE, if it is set, names certificates. httpx would raise an OSError like a disk's."""
    file = os.environ.get("SSL_CERT_FILE")
    if not file:
        return
    try:
        ssl.create_default_context(cafile=file)
    except OSError as error:  # ssl.SSLError is one, too
        reason = "there is no such file" if error.errno == errno.ENOENT else "it holds no certificates in PEM form"
        raise HubError(f"SSL_CERT_FILE is {file}, but {reason}: correct the variable, or unset it.") from error


def why_unreachable(error: BaseException, repository: Repository) -> str:
    """One sentence about a failed connection."""
    hub = constants.ENDPOINT
    causes = [error]
    while (cause := causes[-1].__cause__ or causes[-1].__context__) is not None and cause not in causes:
        causes.append(cause)
    for cause in causes:
        if isinstance(cause, socket.gaierror):
            host = urlsplit(hub).hostname
            return (
                f"The name {host}, or that of a proxy, cannot be resolved ({cause.strerror}): check the network, and the "
                "variables HF_ENDPOINT and HTTPS_PROXY if they are set."
            )
        if isinstance(cause, ssl.SSLError):
            return (
                f"There is no trusted connection to {hub} ({getattr(cause, 'verify_message', '') or cause.reason}). If "
                "a proxy decrypts connections, name its certificate in SSL_CERT_FILE."
            )
    return (
        f"The connection to {hub} for {repository.name} failed ({str(error) or type(error).__name__}). What was downloaded "
        "is kept; run the same command again."
    )


def why_denied(error: HfHubHTTPError, repository: Repository) -> str:
    """One sentence about an error that the Hub answered."""
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
    # The Hub gives the same answer for a repository that does not exist and for one that the user may not see.
    if not_found or status == HTTPStatus.UNAUTHORIZED:
        who = "does not show it to your token" if with_token else "shows it only to those with a token, in HF_TOKEN"
        return f"{hub} has no repository {repository.name}, or {who}."
    if isinstance(error, RevisionNotFoundError):
        return f"{repository.name} no longer has the revision {repository.revision}."
    host, reason = urlsplit(str(error.response.url)).netloc, error.response.reason_phrase
    advice = (error.server_message or "try again later").rstrip(".")
    return f"{host} answered {status} {reason} for {repository.name}: {advice}."


def git_blob(path: Path) -> str:
    """Git's hash of a file's content."""
    content = path.read_bytes()
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
