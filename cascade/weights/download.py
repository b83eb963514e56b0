"""Downloads the needed files of the published repositories, and of others. Writes ``download.json`` when all are complete."""

import re
from pathlib import Path, PurePosixPath

from cascade.weights.hub import BRANCH, HubError, RemoteFile, explained, fetched, list_files
from cascade.weights.manifest import Manifest
from cascade.weights.names import COMPONENT_FOLDERS, SMALL_FILES, STEMS, SUFFIX, VARIANTS, index_names
from cascade.weights.published import ALWAYS, DECODERS, EXTRAS, PARTS, PRIORS, Repository

NAME = re.compile(r"[\w.-]+/[\w.-]+", re.ASCII)


def select_parts(prior: str, decoder: str, extras: list[str], *, only: bool = False) -> list[str]:
    """The keys of ``PARTS`` that the command line's options ask for, in the table's order."""
    chosen = set() if only else {*ALWAYS, PRIORS[prior], DECODERS[decoder]}
    chosen.update(part for extra in extras for part in EXTRAS[extra])
    return [part for part in PARTS if part in chosen]


def download(parts: list[str], folder: Path, *, add: bool = False) -> None:
    """Download the files of some parts into a folder, and list them in its ``download.json``.

    Args:
        parts: keys of ``PARTS``.
        folder: the directory; it need not exist.
        add: keep the old entries of ``download.json``, except those for the same components.

    Raises:
        DownloadError: the Hub, the network or the disk fails, or ``download.json`` is damaged. Downloaded bytes are kept,
            and not downloaded again.
    """
    earlier = Manifest.read(folder) if add and Manifest.file(folder).is_file() else Manifest([], {})
    files = find_files(parts)
    with fetched(files, folder) as checksums:
        earlier.updated(Manifest(parts, checksums)).write(folder)


def find_files(parts: list[str]) -> list[RemoteFile]:
    """Look up the files of some parts on the Hub. Checks first that their repositories may be read.

    Raises:
        HubError: a repository cannot be read, or has no such file.
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


def download_repository(name: str, folder: Path) -> Path:
    """Download Stable Cascade's components from another repository than the published, and add them to ``download.json``.

    Args:
        name: ``owner/name``, or ``owner/name/path`` of one of its files or folders.
        folder: the directory; it need not exist.

    Returns:
        The downloaded folder or file.

    Raises:
        DownloadError: as `download`; or `name` is malformed, or the repository has no usable file.
    """
    repository, path = named_repository(name)
    earlier = Manifest.read(folder) if Manifest.file(folder).is_file() else Manifest([], {})
    with explained(repository):
        listed = list_files(repository)
    files = [listed[one] for one in select_files(repository.name, list(listed), path)]
    with fetched(files, folder) as checksums:
        earlier.updated(Manifest([], {}, {name: checksums})).write(folder)
    return folder / repository.folder / path


def named_repository(name: str) -> tuple[Repository, str]:
    """Split ``owner/name/path`` into the repository and the path in it. Raises a HubError if it is malformed."""
    owner, _, rest = name.partition("/")
    called, _, path = rest.strip("/").partition("/")
    if not NAME.fullmatch(f"{owner}/{called}") or ".." in path.split("/"):
        raise HubError(f"{name!r} is not the name of a repository: it must be like owner/name.")
    return Repository(f"{owner}/{called}", BRANCH), path


def select_files(name: str, paths: list[str], below: str = "") -> list[str]:
    """Choose the files to download: the repository's components, or its single network.

    Prefers bfloat16 where a network has several files. Chooses only safetensors files, configurations and tokenizers.

    Args:
        name: the repository's name.
        paths: the paths of its files.
        below: one of its files or folders; "": the whole repository.

    Raises:
        HubError: no file can be used, or several could be meant.
    """
    if below in paths:
        chosen = [below]
        config = str(PurePosixPath(below).with_name("config.json"))
        return [*chosen, config] if config in paths else chosen
    inside = [path for path in paths if path.startswith(f"{below}/")] if below else paths
    if below and not inside:
        raise HubError(f"{name} has no file or folder {below}.")
    root = f"{below}/" if below else ""
    folders = sorted({path.removeprefix(root).partition("/")[0] for path in inside if "/" in path.removeprefix(root)})
    chosen = []
    for component in (folder for folder in folders if folder in COMPONENT_FOLDERS):
        chosen += _select_component([path for path in inside if path.startswith(f"{root}{component}/")])
    if chosen:
        return chosen
    top = [path for path in inside if "/" not in path.removeprefix(root)]
    chosen = _select_component(top)
    if any(path.lower().endswith(SUFFIX) for path in chosen):
        return chosen
    weights = [path for path in top if path.lower().endswith(SUFFIX)]
    if len(weights) == 1:
        return weights
    if not weights:
        raise HubError(f"{name} has no weights of Stable Cascade in safetensors files.")
    some = ", ".join(weights[:4]) + (" ..." if len(weights) > 4 else "")
    raise HubError(f"{name} has several files of weights: say which, as {name}/{weights[0]}. There are {some}.")


def _select_component(paths: list[str]) -> list[str]:
    """The files of the component in a folder: its small files, and the first standard name's file or shards."""
    names = {PurePosixPath(path).name: path for path in paths}
    small = [names[name] for name in SMALL_FILES if name in names]
    for stem in STEMS:
        for variant in VARIANTS:
            if (whole := f"{stem}{variant}{SUFFIX}") in names:
                return [*small, names[whole]]
            for index in index_names(stem, variant):
                if index in names:
                    shards = [path for name, path in names.items() if _is_shard(name, stem, variant)]
                    return [*small, names[index], *shards]
    return small


def _is_shard(name: str, stem: str, variant: str) -> bool:
    number = r"-\d{5}-of-\d{5}"
    return (
        re.fullmatch(rf"{stem}({re.escape(variant)}{number}|{number}{re.escape(variant)})\.safetensors", name)
        is not None
    )
