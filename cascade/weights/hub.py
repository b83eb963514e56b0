"""The Hub: which files a repository has, and how they are fetched, whole and as published.

A file has its name once its checksum has been compared with the Hub's; until then it ends in ``.incomplete``, and the
next download goes on with it. huggingface_hub's own functions for whole files begin again after a killed process, so the
one below them, which can resume, is called here.

What can go wrong on the way is one of three things, each with sentences of its own: the disk (`DiskError`), what this
machine is told about the way (certificates, proxies, tokens), and what the network and the Hub answer.
"""

import errno
import fcntl
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
from cascade.weights.manifest import INCOMPLETE, LOCK, DownloadError, amount
from cascade.weights.published import Repository

logger = logging.getLogger(__name__)

BRANCH = "main"  # of repositories other than the published, whose commits are pinned
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class HubError(DownloadError):
    """The Hub, the way to it or the disk denies a download. One sentence says which, and what can be done."""


class DiskError(HubError):
    """The disk denies it."""


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
        """Whether it is there whole. A large one was compared before it got its name; reading it again takes long. So it
        is read again only where a newer one may have come in its place, of the same size: a branch moves, a commit does not.
        """
        local = self.local(folder)
        if not local.is_file() or local.stat().st_size != self.size:
            return False
        if self.sha256 is None:
            return git_blob(local) == self.blob
        return self.repository.revision != BRANCH or sha256(local) == self.sha256

    def left(self, folder: Path) -> int:
        """How many of its bytes are not there yet, if it is not there whole."""
        incomplete = self.incomplete(folder)
        return max(self.size - incomplete.stat().st_size, 0) if incomplete.is_file() else self.size


@contextmanager
def fetched(files: list[RemoteFile], folder: Path) -> Iterator[dict[str, str]]:
    """Fetch what of some files is not there yet, and keep other downloads out of the folder until the block ends.

    Yields:
        sha256 of all of them, by path in the folder.

    Raises:
        HubError: see `download`.
    """
    missing = [file for file in files if not file.is_in(folder)]
    total, left = sum(file.size for file in files), sum(file.left(folder) for file in missing)
    logger.info("%s in %d files into %s; %s to fetch.", amount(total), len(files), folder, amount(left))
    check_free(folder, left)
    with locked(folder):
        for file in missing:
            with explained(file.repository):
                fetch(file, folder)
        local = {file: file.local(folder) for file in files}
        yield {local[file].relative_to(folder).as_posix(): file.sha256 or sha256(local[file]) for file in files}


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
    with on_disk(local):
        local.parent.mkdir(parents=True, exist_ok=True)
        # Small files may travel compressed, where a range would mean something else. A longer file is none of ours.
        if incomplete.is_file() and (file.sha256 is None or incomplete.stat().st_size > file.size):
            incomplete.unlink()
        stream = incomplete.open("ab", buffering=0)  # what was written stays, whatever comes then
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
    """A file that is being written, to which a full disk is a `DiskError`: for huggingface_hub, every error is the network's."""

    def __init__(self, stream: BinaryIO, path: Path) -> None:
        self.stream = stream
        self.path = path

    def write(self, data: bytes) -> int:
        with on_disk(self.path):
            left = memoryview(data)
            while left:  # an unbuffered file may take a part
                left = left[self.stream.write(left) :]
        return len(data)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)


@contextmanager
def on_disk(path: Path) -> Iterator[None]:
    """Turn what the disk raises, while a file is written, into a DiskError."""
    try:
        yield
    except OSError as error:
        reason = error.strerror or error
        advice = "make room" if error.errno in FULL else "mend that"
        raise DiskError(
            f"{path} could not be written ({reason}). What has arrived is kept; {advice}, and run the same command again."
        ) from error


def receive(file: RemoteFile, stream: Written) -> None:
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
    """Turn what huggingface_hub raises into a HubError."""
    hub = constants.ENDPOINT
    check_certificates()
    try:
        yield
    except HubError:
        raise
    except HfHubHTTPError as error:
        raise HubError(why_denied(error, repository)) from error
    except OfflineModeIsEnabled as error:
        raise HubError(f"HF_HUB_OFFLINE forbids to ask {hub} for {repository.name}.") from error
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise HubError(f"{hub} does not answer as the Hub does: something on the way may want a login.") from error
    except UnicodeEncodeError as error:
        raise HubError("Your token, in HF_TOKEN, is none: it must be of ASCII letters and digits.") from error
    except ImportError as error:  # a SOCKS proxy is the one thing for which httpx needs another package
        raise HubError(
            f"{hub} is to be asked through a SOCKS proxy, for which the package socksio is needed: {sys.executable} -m pip "
            "install socksio"
        ) from error
    except (httpx.HTTPError, OSError) as error:
        raise HubError(why_unreachable(error, repository)) from error
    except ValueError as error:  # of a proxy that httpx cannot use
        raise HubError(f"{hub} cannot be asked for {repository.name}: {str(error).rstrip('.')}.") from error


def check_certificates() -> None:
    """Make sure that SSL_CERT_FILE, if it is set, names certificates: httpx would raise what a disk raises."""
    file = os.environ.get("SSL_CERT_FILE")
    if not file:
        return
    try:
        ssl.create_default_context(cafile=file)
    except OSError as error:  # of which ssl.SSLError is one
        reason = "there is no such file" if error.errno == errno.ENOENT else "it holds no certificates in PEM form"
        raise HubError(f"SSL_CERT_FILE is {file}, but {reason}: correct the variable, or unset it.") from error


def why_unreachable(error: BaseException, repository: Repository) -> str:
    """One sentence about a connection that failed."""
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
                "something on the way opens connections, name its certificate in SSL_CERT_FILE."
            )
    return (
        f"The connection to {hub} for {repository.name} failed ({str(error) or type(error).__name__}). What has arrived is "
        "kept; run the same command again."
    )


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
