"""Folders on disk or in an object store, and what keeps one of the second kind up to date.

Everything goes through fsspec, so `s3://` is only one of the schemes; s3fs serves that one.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

MEMORY = 64 << 20
"""Files up to this size are read whole and sent in one request: what is sent is one state of a file
that grows meanwhile."""


class StoreError(RuntimeError):
    """Something is not there, or the store cannot be reached."""


def is_remote(url: str) -> bool:
    """Whether this is a URL and not a path."""
    return "://" in url


def filesystem(url: str) -> tuple[Any, str]:
    """The file system of a URL or path, and the path in it.

    Raises:
        StoreError: for a scheme that nothing here serves.
    """
    import fsspec

    options: dict[str, Any] = {}
    if url.startswith("s3://"):  # an outage is ours to wait out; a request should not hang in it
        options["config_kwargs"] = {
            "connect_timeout": 5, "read_timeout": 60, "retries": {"max_attempts": 2},
        }  # fmt: skip
    if not is_remote(url):
        url = os.path.abspath(url)
    try:
        return fsspec.core.url_to_fs(url, use_listings_cache=False, **options)
    except (ImportError, ValueError) as e:
        raise StoreError(f"{url}: {e}") from None


def patiently(action: Callable[[], Any], what: str, seconds: float = 60.0) -> Any:
    """Try again while the store fails, except where it says that something does not exist.

    Raises:
        StoreError: it still failed after `seconds`.
    """
    end, pause = time.monotonic() + seconds, 0.5
    while True:
        try:
            return action()
        except FileNotFoundError:
            raise StoreError(f"{what} does not exist.") from None
        except PermissionError as e:
            raise StoreError(f"{what}: access denied ({e}).") from None
        except Exception as e:  # botocore, aiohttp and s3fs each have their own kinds
            if time.monotonic() + pause > end:
                raise StoreError(f"{what}: {type(e).__name__}: {e}") from None
        time.sleep(pause * random.uniform(0.5, 1.0))
        pause = min(2 * pause, 15.0)


@dataclass(frozen=True)
class Folder:
    """A folder by its URL or path, without a slash at its end."""

    url: str

    @staticmethod
    def split(url: str) -> tuple[Folder, str]:
        """The folder of a file, and the file's name."""
        if not is_remote(url):
            url = os.path.abspath(url)
        head, _, name = url.rpartition("/")
        return Folder(head or "/"), name

    @property
    def name(self) -> str:
        return self.url.rpartition("/")[2]

    def is_top(self) -> bool:
        """Nothing is above: the file system's root, or a bucket."""
        return self.url == "/" or self.url.split("://")[-1].count("/") == 0

    def parent(self) -> Folder:
        return Folder(self.url.rpartition("/")[0] or "/")

    def join(self, name: str) -> str:
        return f"{self.url.rstrip('/')}/{name}"

    def below(self, name: str) -> Folder:
        return Folder(self.join(name.strip("/")))

    def read(self, name: str) -> bytes:
        """A file's content.

        Raises:
            StoreError
        """
        fs, path = filesystem(self.join(name))
        return patiently(lambda: fs.cat_file(path), self.join(name))

    def exists(self, name: str) -> bool:
        fs, path = filesystem(self.join(name))
        return patiently(lambda: fs.exists(path), self.join(name))

    def download(self, name: str, target: Path) -> None:
        """Copy a file here, completely or not at all.

        Raises:
            StoreError
        """
        fs, path = filesystem(self.join(name))
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary = target.with_name(target.name + ".partial")
        patiently(lambda: fs.get_file(path, str(temporary)), self.join(name))
        temporary.replace(target)

    def _list(self) -> list[dict[str, Any]]:
        fs, path = filesystem(self.url)
        try:
            return patiently(lambda: fs.ls(path, detail=True), self.url)
        except StoreError as e:
            if "does not exist" in str(e):
                return []
            raise

    def names(self) -> list[str]:
        """Files in it, sorted; none when it does not exist."""
        files = (e["name"] for e in self._list() if e["type"] == "file")
        return sorted(n.rstrip("/").rpartition("/")[2] for n in files)

    def folders(self) -> list[str]:
        """Folders in it, sorted."""
        found = (e["name"] for e in self._list() if e["type"] == "directory")
        return sorted(n.rstrip("/").rpartition("/")[2] for n in found)


def fetch_run(url: str, folder: Path) -> None:
    """Bring the newest checkpoint and the metrics of an earlier attempt at the same job here,
    unless this machine has a checkpoint of it already: a retry may come to another machine.

    Raises:
        StoreError
    """
    there = Folder(url)
    mine = folder / "checkpoints"
    here = [p.parent.name for p in mine.glob("*/meta.json")]
    newest = max((n for n in here if n.isdigit()), default="")
    for name in sorted(n for n in there.below("checkpoints").folders() if n.isdigit())[::-1]:
        if name <= newest:  # names are frames, of one length
            return
        checkpoint = there.below(f"checkpoints/{name}")
        files = checkpoint.names()
        if "meta.json" not in files:
            continue
        parts = json.loads(checkpoint.read("meta.json")).get("files", {})
        if parts.keys() <= set(files):
            break
    else:
        return
    for file in sorted(files, key=_order):
        checkpoint.download(file, mine / name / file)
    if there.exists("metrics.csv"):
        there.download("metrics.csv", folder / "metrics.csv")
    if there.exists("log.txt") and not (folder / "log.txt").exists():  # it is added to
        there.download("log.txt", folder / "log.txt")
    (mine / "latest").write_text(name + "\n")
    print(f"job: goes on from checkpoint {name} of an earlier attempt", flush=True)


def _order(path: str) -> tuple[int, str]:
    """A checkpoint is complete when its `meta.json` is there, and is named by `latest` then."""
    name = path.rpartition("/")[2]
    return {"meta.json": 1, "latest": 2, "result.json": 3}.get(name, 0), path


class Publisher:
    """Copies a folder to an object store while it grows, in a thread of its own.

    An outage delays uploads and nothing else; what changed meanwhile is sent when it is over.

    Args:
        folder: what is copied, but for `*.partial*`, `.lock` and `inputs/`. url: where to.
        interval: seconds between two looks. keep: checkpoints that stay there, an earlier attempt's
            counted in.
    """

    def __init__(self, folder: Path, url: str, interval: float = 5.0, keep: int = 3):
        self.folder, self.url, self.interval = folder, url.rstrip("/"), interval
        self.keep = keep
        self._earlier: set[str] | None = None
        """Checkpoints of an earlier attempt that are there and not here; None: not yet known."""
        self._until = 0.0
        self.refused = 0
        """Uploads that failed and were tried again."""
        self._sent: dict[str, tuple[int, int]] = {}
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="uploads", daemon=True)
        self._trouble = ""

    def start(self) -> None:
        self._thread.start()

    def _watch(self) -> None:
        pause = self.interval
        while not self._stop.wait(pause):
            failed = self._pass()
            pause = min(2 * pause, 30.0) if failed else self.interval

    def _files(self) -> dict[str, tuple[int, int]]:
        """What there is to copy: size and time of change by relative path."""
        found = {}
        for path in self.folder.rglob("*"):
            relative = path.relative_to(self.folder)
            hidden = relative.parts[0] in ("inputs", ".lock")
            hidden = hidden or any(".partial" in p for p in relative.parts)
            try:
                if not hidden and path.is_file():
                    state = path.stat()
                    found[relative.as_posix()] = state.st_size, state.st_mtime_ns
            except OSError:  # a checkpoint that has just been rotated away
                continue
        return found

    def _pass(self) -> list[str]:
        """Send what changed; returns what could not be sent, with the reason."""
        failed = []
        try:
            fs, root = filesystem(self.url)
            files = self._files()
            in_a_row = 0
            unfinished: set[str] = set()
            for name in sorted(files, key=_order):
                if self._sent.get(name) == files[name]:
                    continue
                checkpoint = name.rpartition("/")[0]
                if _order(name)[0] in (1, 2) and (checkpoint in unfinished or (
                    name.endswith("/latest") and unfinished
                )):  # fmt: skip
                    failed.append(f"{name}: its checkpoint is not complete there")
                    continue
                try:
                    self._send(fs, f"{root}/{name}", self.folder / name)
                    self._sent[name] = files[name]
                except FileNotFoundError:
                    if (self.folder / name).exists():
                        raise  # the bucket is missing, not the file
                except Exception as e:
                    self.refused += 1
                    failed.append(f"{name}: {type(e).__name__}: {e}")
                    unfinished.add(checkpoint)
                    in_a_row += 1
                    if in_a_row == 3:  # the store is down, and every try takes its time
                        break
                else:
                    in_a_row = 0
            if not failed:
                self._remove_earlier(fs, root, files)
            for name in [n for n in self._sent if n not in files and n.startswith("checkpoints/")]:
                try:
                    fs.rm_file(f"{root}/{name}")
                except FileNotFoundError:
                    pass
                except Exception as e:
                    failed.append(f"{name}: {type(e).__name__}: {e}")
                    continue
                del self._sent[name]
        except Exception as e:
            failed.append(f"{self.url}: {type(e).__name__}: {e}")
        if failed and not self._trouble:
            print(f"uploads fail and will be tried again: {failed[0]}", flush=True)
        elif self._trouble and not failed:
            print("uploads work again", flush=True)
        self._trouble = failed[0] if failed else ""
        return failed

    def _remove_earlier(self, fs: Any, root: str, files: dict[str, tuple[int, int]]) -> None:
        """Rotate an earlier attempt's checkpoints away, as the run itself does with its own."""

        def numbers(names: Iterable[str]) -> set[str]:
            parts = (name.split("/") for name in names)
            return {p[1] for p in parts if len(p) > 2 and p[0] == "checkpoints" and p[1].isdigit()}

        here = numbers(files)
        if self._earlier is None:
            try:
                found = fs.find(f"{root}/checkpoints")
            except FileNotFoundError:
                found = []
            self._earlier = numbers(f[len(root) + 1 :] for f in found) - here
        for name in sorted(self._earlier | here)[: -self.keep]:
            if name in self._earlier - here:
                fs.rm(f"{root}/checkpoints/{name}", recursive=True)
            self._earlier.discard(name)

    def hurry(self, seconds: float) -> None:
        """Let `close` go on for no longer than that."""
        self._until = min(self._until, time.monotonic() + seconds)

    def _send(self, fs: Any, target: str, path: Path) -> None:
        if path.stat().st_size <= MEMORY:
            fs.pipe_file(target, path.read_bytes())
        else:
            fs.put_file(str(path), target)

    def close(self, patience: float) -> list[str]:
        """Stop watching; send everything that is missing or differs from what is here.

        Args:
            patience: seconds to go on trying.

        Returns:
            What is not there, with the reason: nothing when all is well.
        """
        self._stop.set()
        if self._thread.ident is not None:
            self._thread.join()
        self._until, pause = time.monotonic() + patience, 1.0
        while True:
            left = self._pass() or self._differences()
            if not left or time.monotonic() + pause > self._until:
                return left
            time.sleep(pause)
            pause = min(2 * pause, 15.0)

    def _differences(self) -> list[str]:
        """Compare sizes, and contents where the store tells their MD5; what differs is sent again
        by the next pass."""
        files = self._files()
        try:
            fs, root = filesystem(self.url)
            there = fs.find(root, detail=True)
        except Exception as e:
            return [f"{self.url}: {type(e).__name__}: {e}"]
        wrong = []
        for name, (size, _) in files.items():
            entry = there.get(f"{root}/{name}")
            tag = str((entry or {}).get("ETag", "")).strip('"')
            own = _md5(self.folder / name)
            same = entry is not None and entry["size"] == size
            if same and len(tag) == 32 and tag != own:
                # Not an MD5 where the bucket encrypts with keys of its own: look at the content.
                try:
                    same = fs.cat_file(f"{root}/{name}") == (self.folder / name).read_bytes()
                except Exception as e:
                    wrong.append(f"{name}: {type(e).__name__}: {e}")
                    continue
            if not same:
                self._sent.pop(name, None)
                wrong.append(f"{name}: not as it is here")
        return wrong


def _md5(path: Path) -> str:
    digest = hashlib.md5(usedforsecurity=False)
    with open(path, "rb") as f:
        while block := f.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
