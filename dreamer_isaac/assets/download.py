"""Fill a mirror from the asset server.

A file is written under another name, checked, and renamed, so that what has its own name is whole;
an interrupted one goes on where it stopped. A manifest per release remembers size, checksum and the
server's tag of every file. Nothing is written outside the mirror, whatever a server or a file says.
"""

from __future__ import annotations

import glob
import hashlib
import json
import os
import re
import shutil
import tarfile
import threading
import time
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import quote

import requests
from requests.adapters import HTTPAdapter
from urllib3.util.retry import Retry

from dreamer_isaac.assets.mirror import SERVER, Asset, Mirror, UnsafePath, clean, relative
from dreamer_isaac.assets.references import comes_with_the_renderer, references

MANIFEST = "manifest.json"


class DownloadError(RuntimeError):
    """The mirror could not be made complete."""


@dataclass
class Remote:
    """What the server says of a file."""

    asset: Asset
    size: int
    etag: str = ""

    @property
    def md5(self) -> str | None:
        """The content's MD5, where the tag is one: a file that was uploaded in one part."""
        tag = self.etag.strip('"')
        return tag if re.fullmatch(r"[0-9a-f]{32}", tag) else None


@dataclass
class Report:
    """What came of it."""

    fetched: list[Asset] = field(default_factory=list)
    kept: list[Asset] = field(default_factory=list)
    missing: dict[Asset, str] = field(default_factory=dict)
    """Not on the server, and which file asks for it."""
    failed: dict[Asset, str] = field(default_factory=dict)
    outside: dict[str, str] = field(default_factory=dict)
    """References that lead out of the release's tree, and from where; never followed."""
    bytes: int = 0


class Downloader:
    """Fetches assets of one release.

    Args:
        server: base URL. workers: parallel transfers. retries: of one request, with growing pauses.
        timeout: seconds without a byte. progress: called with (bytes so far, bytes in all, file).
    """

    def __init__(
        self,
        mirror: Mirror,
        release: str,
        server: str = SERVER,
        workers: int = 8,
        retries: int = 5,
        timeout: float = 30.0,
        pause: float = 0.5,
        progress: Callable[[int, int, str], None] = lambda done, total, name: None,
    ):
        self.mirror, self.release, self.server = mirror, release, server.rstrip("/")
        self.workers, self.timeout, self.progress = workers, timeout, progress
        self.retries, self.pause = retries, pause
        self._local = threading.local()
        self._lock = threading.Lock()
        self._done = self._total = 0
        self._tiles: set[Asset] = set()
        """Files that a UDIM pattern may mean; most of a hundred are not there."""
        self.manifest = self._read_manifest()

    # -- talking to the server -----------------------------------------------------------------

    def _session(self) -> requests.Session:
        """One per thread: `requests` does not promise that they can be shared."""
        if not hasattr(self._local, "session"):
            retry = Retry(
                total=self.retries, backoff_factor=self.pause, backoff_max=30,
                status_forcelist=(429, 500, 502, 503, 504), allowed_methods=("GET", "HEAD"),
                respect_retry_after_header=True,
            )  # fmt: skip
            session = requests.Session()
            for scheme in ("http://", "https://"):
                session.mount(scheme, HTTPAdapter(max_retries=retry))
            self._local.session = session
        return self._local.session

    def list(self, prefix: str) -> list[Remote] | None:
        """Every file under `prefix` of the release by the bucket's listing; None where there is
        none. Names that are no safe path are left out.

        Raises:
            DownloadError: the server cannot be reached.
        """
        out: list[Remote] = []
        token = ""
        start = f"Assets/Isaac/{self.release}/"
        while True:
            url = f"{self.server}/?list-type=2&prefix={quote(start + prefix)}"
            if token:
                url += f"&continuation-token={quote(token, safe='')}"
            try:
                answer = self._session().get(url, timeout=self.timeout)
            except requests.RequestException as e:
                raise DownloadError(f"{self.server}: {_short(e)}") from None
            if answer.status_code != 200:
                return None
            try:
                tree = ElementTree.fromstring(answer.content)
            except ElementTree.ParseError:
                return None
            if not tree.tag.endswith("ListBucketResult"):
                return None
            space = tree.tag[: -len("ListBucketResult")]
            for entry in tree.iter(f"{space}Contents"):
                key = entry.findtext(f"{space}Key") or ""
                if key.endswith("/") or not key.startswith(start):
                    continue
                try:
                    path = clean(key.removeprefix(start))
                except UnsafePath:
                    continue
                size = int(entry.findtext(f"{space}Size") or 0)
                etag = entry.findtext(f"{space}ETag") or ""
                out.append(Remote(Asset(self.release, path), size, etag))
            token = tree.findtext(f"{space}NextContinuationToken") or ""
            if not token:
                return out

    def look(self, asset: Asset) -> Remote | None:
        """What the server says of one file; None when it has none.

        Raises:
            DownloadError
        """
        try:
            answer = self._session().head(
                asset.url(self.server), timeout=self.timeout, allow_redirects=True
            )
        except requests.RequestException as e:
            raise DownloadError(f"{asset.path}: {_short(e)}") from None
        if answer.status_code in (403, 404, 410):  # a bucket that does not list says 403 for 404
            return None
        if answer.status_code != 200:
            raise DownloadError(f"{asset.path}: the server says {answer.status_code}")
        size = int(answer.headers.get("Content-Length", 0))
        return Remote(asset, size, answer.headers.get("ETag", ""))

    # -- one file ------------------------------------------------------------------------------

    def is_here(self, remote: Remote) -> bool:
        """Whether the mirror's file is the server's, by the manifest; another size or tag is
        another file."""
        known = self.manifest.get(remote.asset.path)
        path = self.mirror.place(remote.asset)
        if known is None or not path.is_file():
            return False
        same = known["size"] == remote.size == path.stat().st_size
        return same and (not remote.etag or known["etag"] == remote.etag)

    def fetch(self, remote: Remote) -> Path:
        """Download one file; returns its place.

        Raises:
            DownloadError: after `retries`, with the last reason.
            UnsafePath: the place leads out of the mirror.
        """
        target = self.mirror.writable(remote.asset)
        # The server's tag is in the name: what has arrived of another version is not gone on with.
        tag = hashlib.sha256(remote.etag.encode()).hexdigest()[:8]
        part = target.with_name(f"{target.name}.{tag}.part")
        if part.is_symlink():
            raise UnsafePath(f"{part} is a link")
        for other in target.parent.glob(f"{glob.escape(target.name)}.*.part"):
            if other != part:
                other.unlink()
        reason = ""
        for attempt in range(self.retries + 1):
            if attempt:
                time.sleep(min(self.pause * 2 ** (attempt - 1), 30))
            try:
                self._transfer(remote, part)
                digest = self._check(remote, part)
            except (requests.RequestException, DownloadError, OSError) as e:
                if isinstance(e, OSError) and not isinstance(e, requests.RequestException):
                    raise DownloadError(f"{remote.asset.path}: {_short(e)}") from None
                reason = _short(e)
                continue
            os.replace(part, target)
            with self._lock:
                self.manifest[remote.asset.path] = {
                    "size": remote.size, "etag": remote.etag, "sha256": digest,
                }  # fmt: skip
            self.mirror.show(remote.asset)
            return target
        raise DownloadError(f"{remote.asset.path}: {reason}")

    def _transfer(self, remote: Remote, part: Path) -> None:
        """Get what `part` lacks."""
        have = part.stat().st_size if part.is_file() else 0
        if have > remote.size:
            part.unlink()
            have = 0
        if have == remote.size and have:
            return
        headers = {"Accept-Encoding": "identity"}
        if have:
            headers["Range"] = f"bytes={have}-"
            if remote.etag:
                headers["If-Range"] = remote.etag  # the whole file where it has changed since
        with self._session().get(
            remote.asset.url(self.server), headers=headers, stream=True, timeout=self.timeout
        ) as answer:
            if answer.status_code not in (200, 206):
                raise DownloadError(f"the server says {answer.status_code}")
            resumed = answer.status_code == 206
            if have and resumed:
                begins = answer.headers.get("Content-Range", "").removeprefix("bytes ")
                if not begins.startswith(f"{have}-"):
                    raise DownloadError("the server answered with another range")
            with open(part, "ab" if resumed else "wb") as f:
                for block in answer.iter_content(1 << 18):
                    f.write(block)
                    self._advance(len(block), remote.asset.path)
                    if f.tell() > remote.size:
                        raise DownloadError(f"more than the {remote.size} bytes announced")

    def _check(self, remote: Remote, part: Path) -> str:
        """The SHA-256 of a complete transfer.

        Raises:
            DownloadError: it is not what the server announced; a wrong file is thrown away.
        """
        size = part.stat().st_size if part.exists() else 0
        if remote.size == 0 and size == 0:
            part.touch()
        if size < remote.size:
            raise DownloadError(f"{size} of {remote.size} bytes arrived")
        sha, md5 = hashlib.sha256(), hashlib.md5(usedforsecurity=False)
        with open(part, "rb") as f:
            while block := f.read(1 << 20):
                sha.update(block)
                md5.update(block)
        if size != remote.size or (remote.md5 and md5.hexdigest() != remote.md5):
            part.unlink()
            raise DownloadError("the content does not have the size or checksum announced")
        return sha.hexdigest()

    def _advance(self, count: int, name: str) -> None:
        with self._lock:
            self._done += count
            done, total = self._done, self._total
        self.progress(done, max(total, done), name)

    # -- many files ----------------------------------------------------------------------------

    def plan(self, prefixes: Iterable[str]) -> list[Remote] | None:
        """Every file of the release under these prefixes; None where the server does not list."""
        found: dict[Asset, Remote] = {}
        for prefix in prefixes:
            listed = self.list(prefix)
            if listed is None:
                return None
            found |= {r.asset: r for r in listed}
        return [found[a] for a in sorted(found)]

    def need_space(self, size: int) -> None:
        """Refuse before starting.

        Raises:
            DownloadError: the disk is too small.
        """
        self.mirror.root.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(self.mirror.root).free
        if size > 0.98 * free:
            raise DownloadError(
                f"{gigabytes(size)} are needed and {gigabytes(free)} are free on the disk of "
                f"{self.mirror.root}. Remedy: another root, or fewer categories."
            )

    def run(self, start: Iterable[Remote | Asset], follow: bool = True) -> Report:
        """Fetch these files and, with `follow`, everything that they refer to, and so on.

        Raises:
            DownloadError: the disk is too small for what is known to be needed.
        """
        report = Report()
        first = list(start)
        known = [r for r in first if isinstance(r, Remote)]
        self._total = sum(r.size for r in known if not self.is_here(r))
        self.need_space(self._total)
        seen: set[Asset] = set()
        asked: dict[Asset, str] = {}
        pool = ThreadPoolExecutor(self.workers)
        try:
            running: dict[Future[Any], Asset] = {}

            def add(item: Remote | Asset, by: str) -> None:
                asset = item.asset if isinstance(item, Remote) else item
                if asset not in seen:
                    seen.add(asset)
                    asked[asset] = by
                    running[pool.submit(self._one, item)] = asset

            for item in first:
                add(item, "the command")
            saved = time.monotonic()
            while running:
                done, _ = wait(running, return_when=FIRST_COMPLETED)
                for future in done:
                    asset = running.pop(future)
                    self._note(report, asset, asked[asset], future, follow, add)
                if time.monotonic() - saved > 5:
                    self._write_manifest()
                    saved = time.monotonic()
        finally:
            pool.shutdown(wait=False, cancel_futures=True)  # nothing is left, but after an error
            self._write_manifest()
        return report

    def _one(self, item: Remote | Asset) -> tuple[Path | None, bool, int]:
        """Where it is now, whether it was fetched, and its size; no place when there is none."""
        remote = item if isinstance(item, Remote) else self.look(item)
        if remote is None:
            return None, False, 0
        if self.is_here(remote):
            self.mirror.show(remote.asset)
            return self.mirror.place(remote.asset), False, remote.size
        return self.fetch(remote), True, remote.size

    def _folder(self, asset: Asset) -> list[Remote] | None:
        """The files of a folder, where the server lists it; names with a suffix are files."""
        return None if Path(asset.path).suffix else self.list(f"{asset.path}/")

    def _note(
        self, report: Report, asset: Asset, by: str, future: Future[Any], follow: bool,
        add: Callable[[Remote | Asset, str], None],
    ) -> None:  # fmt: skip
        try:
            path, fetched, size = future.result()
            parts = None if path or asset in self._tiles else self._folder(asset)
        except (DownloadError, UnsafePath, OSError) as e:
            report.failed[asset] = _short(e)
            return
        if path is None:
            for remote in parts or []:  # whose names the task's code puts together
                add(remote, asset.path)
            known = comes_with_the_renderer(asset.path) or asset in self._tiles
            if not parts and not known:
                report.missing[asset] = by
            return
        (report.fetched if fetched else report.kept).append(asset)
        report.bytes += size if fetched else 0
        if not follow:
            return
        try:
            for other in self.needs(asset, path, report):
                add(other, asset.path)
        except ValueError as e:
            report.failed[asset] = str(e)

    def needs(self, asset: Asset, path: Path, report: Report) -> Iterator[Asset]:
        """What a file in the mirror refers to within its release.

        Raises:
            NeedsUsd, ValueError: see `references`.
        """
        for text in references(path):
            tiles = expand_udim(text)
            for one in tiles:
                try:
                    other = relative(asset, one)
                except UnsafePath:
                    other = None
                if other is None:
                    report.outside[one] = asset.path
                elif other.release == self.release:
                    if len(tiles) > 1:
                        self._tiles.add(other)
                    yield other

    # -- the manifest --------------------------------------------------------------------------

    def _manifest_path(self) -> Path:
        return self.mirror.root / "Assets" / "Isaac" / self.release / MANIFEST

    def _read_manifest(self) -> dict[str, dict[str, Any]]:
        try:
            return json.loads(self._manifest_path().read_text())["files"]
        except (OSError, ValueError, KeyError):
            return {}  # files are fetched again where it says nothing

    def _write_manifest(self) -> None:
        with self._lock:
            files = dict(sorted(self.manifest.items()))
        if not files:
            return
        path = self.mirror.writable(Asset(self.release, MANIFEST))
        temporary = path.with_name(path.name + ".part")
        content = {"release": self.release, "server": self.server, "files": files}
        temporary.write_text(json.dumps(content, indent=1) + "\n")
        os.replace(temporary, path)

    def merge(self, files: dict[str, dict[str, Any]]) -> None:
        """Add what another mirror's manifest knows."""
        self.manifest |= files
        self._write_manifest()

    def verify(self) -> dict[str, str]:
        """Compare every file with the manifest; path -> what is wrong."""
        wrong: dict[str, str] = {}
        for name, known in self.manifest.items():
            path = self.mirror.place(Asset(self.release, name))
            if not path.is_file():
                wrong[name] = "is not there"
            elif hashlib.sha256(path.read_bytes()).hexdigest() != known["sha256"]:
                wrong[name] = "has other contents than the manifest says"
        return wrong


def expand_udim(reference: str) -> list[str]:
    """`tex.<UDIM>.png` stands for up to a hundred tiles; whichever exist are fetched."""
    if "<UDIM>" not in reference:
        return [reference]
    return [reference.replace("<UDIM>", str(tile)) for tile in range(1001, 1101)]


def gigabytes(size: int) -> str:
    return f"{size / 2**30:.2f} GiB" if size >= 2**30 else f"{size / 2**20:.1f} MiB"


def _short(e: BaseException) -> str:
    return " ".join(str(e).split())[:300] or type(e).__name__


# -- carrying a mirror to a machine without a network ----------------------------------------------


def pack(root: Path, archive: Path) -> int:
    """Write the mirror's trees and manifests into one tar file; returns the number of files. The
    flat view is made again when unpacking."""
    count = 0
    temporary = archive.with_name(archive.name + ".part")
    base = root / "Assets"
    with tarfile.open(temporary, "w") as tar:
        for path in sorted(base.rglob("*")):
            if path.is_file() and not path.is_symlink() and not path.name.endswith(".part"):
                tar.add(path, path.relative_to(root).as_posix(), recursive=False)
                count += 1
    os.replace(temporary, archive)
    return count


def unpack(archive: Path, root: Path) -> int:
    """Unpack into a mirror; only regular files below `Assets/` are taken.

    Raises:
        UnsafePath: the archive holds a link, or a name that leads elsewhere.
        DownloadError: it cannot be read.
    """
    mirror, count = Mirror(root), 0
    try:
        with tarfile.open(archive) as tar:
            for member in tar:
                if member.isdir():
                    continue
                name = clean(member.name)
                match = re.match(r"Assets/Isaac/(\d+(?:\.\d+)*)/(.+)$", name)
                if not member.isfile() or match is None:
                    raise UnsafePath(f"{member.name} in {archive} is no file of a mirror")
                asset = Asset(match[1], match[2])
                target = mirror.writable(asset)
                source = tar.extractfile(member)
                assert source is not None
                if asset.path == MANIFEST:
                    Downloader(mirror, asset.release).merge(json.load(source)["files"])
                    count += 1
                    continue
                part = target.with_name(target.name + ".part")
                if part.is_symlink():
                    raise UnsafePath(f"{part} is a link")
                with open(part, "wb") as f:
                    shutil.copyfileobj(source, f, 1 << 20)
                os.replace(part, target)
                mirror.show(asset)
                count += 1
    except (tarfile.TarError, OSError, ValueError, KeyError) as e:
        if isinstance(e, UnsafePath):
            raise
        raise DownloadError(f"{archive} cannot be read: {_short(e)}") from None
    return count
