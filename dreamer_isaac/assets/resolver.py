"""Isaac Lab reads its assets from a mirror.

Isaac Lab builds every asset's URL from a few constants of `isaaclab.utils.assets`, in task
configurations and in code at run time. They are set to the mirror when that module is imported, so
that everything built from them is a local path from the start; the module's functions, and the one
through which USD files are referenced, translate what is spelled out as a URL of any release. A
file that the mirror lacks is fetched into it, with what it refers to, unless `strict`.

Nothing of a task's configuration is touched, and nothing here imports torch or Isaac Lab.
"""

from __future__ import annotations

import functools
import importlib.abc
import importlib.util
import io
import os
import shutil
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

from dreamer_isaac.assets.mirror import SERVER, Asset, Mirror, UnsafePath, parse, relative
from dreamer_isaac.assets.references import NeedsUsd, comes_with_the_renderer, references

FETCH = "python scripts/download_assets.py"


@dataclass
class Preflight:
    """What a task needs and what of it is there."""

    found: list[Asset] = field(default_factory=list)
    missing: dict[Asset, str] = field(default_factory=dict)
    """And which file or field asks for it."""
    unread: list[Asset] = field(default_factory=list)
    """USD files whose references could not be followed."""

    @property
    def below(self) -> list[Asset]:
        """What is missing of files that are there: nobody asks for it by itself, and a robot
        without its meshes is no error."""
        there = {a.path for a in self.found}
        return [a for a, by in self.missing.items() if by in there]

    def describe(self, root: Path) -> str:
        """In words, with the command that fetches what is missing."""
        if not self.missing:
            note = f", {len(self.unread)} of them not looked into" if self.unread else ""
            return f"assets: all {len(self.found)} that the task names are in {root}{note}"
        lines = [f"assets: {len(self.missing)} of {len(self.found) + len(self.missing)} are not in "
                 f"{root}:"]  # fmt: skip
        lines += [f"  {a.path} ({a.release}), for {by}" for a, by in sorted(self.missing.items())]
        for release in sorted({a.release for a in self.missing}):
            paths = " ".join(sorted(a.path for a in self.missing if a.release == release))
            lines.append(f"  {FETCH} --root {root} --release {release} --files {paths}")
        return "\n".join(lines)


class Resolver:
    """Finds assets in a mirror.

    Args:
        strict: never ask the server. server: where a missing file is fetched from.
        say: told of every file that is fetched or missing.
    """

    def __init__(
        self,
        mirror: Mirror,
        strict: bool = False,
        server: str = SERVER,
        say: Callable[[str], None] = lambda _: None,
    ):
        self.mirror, self.strict, self.server, self.say = mirror, strict, server, say
        self.outcome: dict[Asset, str] = {}
        """Asset -> local, remote (fetched now) or missing."""

    def root(self, release: str) -> str:
        """What takes the place of the server's `.../Assets/Isaac/<release>`."""
        return str(self.mirror.root / "Assets" / "Isaac" / release)

    def resolve(self, reference: str) -> str:
        """The local path that stands for an asset's URL, or for a path in the mirror; anything else
        as it is. The path exists unless the asset could not be had."""
        try:
            asset = parse(reference)
        except UnsafePath:
            return reference
        if asset is None or (not _is_url(reference) and not self.is_ours(reference)):
            return reference
        place = self.mirror.place(asset)
        if place.is_dir():  # a folder of textures, say
            return str(place)
        if asset not in self.outcome:
            self.outcome[asset] = self._obtain(asset)
        return str(place)

    def is_ours(self, path: str) -> bool:
        """Whether a path lies in the mirror."""
        return Path(os.path.abspath(path)).is_relative_to(self.mirror.root)

    def _obtain(self, asset: Asset) -> str:
        found = self.mirror.locate(asset)
        if found is not None and found != self.mirror.place(asset):
            try:
                self._adopt(asset, found)
            except (OSError, UnsafePath) as e:
                self.say(f"asset missing: {found} cannot be used: {e}")
                return "missing"
        if found is not None:
            return "local"
        if self.strict:
            self.say(f"asset missing: {asset.path} ({asset.release}) is not in {self.mirror.root}")
            return "missing"
        from dreamer_isaac.assets.download import Downloader, DownloadError

        self.say(f"asset fetched from {self.server}: {asset.path} ({asset.release}) ...")
        try:
            report = Downloader(self.mirror, asset.release, self.server, retries=1).run([asset])
        except (DownloadError, NeedsUsd, OSError) as e:
            self.say(f"asset missing: {asset.path} ({asset.release}): {e}")
            return "local" if self.mirror.place(asset).exists() else "missing"
        if self.mirror.place(asset).exists():
            self.say(f"asset fetched: {asset.path} ({asset.release}), {len(report.fetched)} files")
            self._tell(report, asset)
            return "remote"
        reason = report.failed.get(asset, "the server does not have it")
        self.say(f"asset missing: {asset.path} ({asset.release}): {reason}")
        return "missing"

    def fetch(self, assets: Iterable[Asset]) -> None:
        """Have the server's files in the mirror, with what they refer to; what could not be had is
        said. A server that does not answer is asked for one file."""
        from dreamer_isaac.assets.download import Downloader, DownloadError

        wanted = sorted(assets)
        for release in dict.fromkeys(a.release for a in wanted):
            those = [a for a in wanted if a.release == release]
            self.say(f"assets: fetching {len(those)} from {self.server} ({release}) ...")
            try:
                downloader = Downloader(self.mirror, release, self.server, retries=1)
                downloader.look(those[0])
                report = downloader.run(those)
            except (DownloadError, NeedsUsd, OSError) as e:
                self.say(f"assets missing ({release}): {e}")
                continue
            self.say(f"assets fetched ({release}): {len(report.fetched)} files")
            self._tell(report)

    def _tell(self, report: Any, besides: Asset | None = None) -> None:
        """Of a download: what did not come, and counts as missing."""
        reasons = {**{a: f"{by} asks for it, and the server does not have it"
                      for a, by in report.missing.items()}, **report.failed}  # fmt: skip
        for asset, reason in sorted(reasons.items()):
            if asset != besides:
                self.outcome[asset] = "missing"
                self.say(f"asset missing: {asset.path} ({asset.release}): {reason}")

    def _adopt(self, asset: Asset, found: Path) -> None:
        """Give a file that was dropped into the flat layout its place in the tree: a copy, which
        the downloader may replace one day."""
        place = self.mirror.writable(asset)
        temporary = place.with_name(f"{place.name}.{os.getpid()}.part")
        shutil.copyfile(found, temporary)
        os.replace(temporary, place)

    def report(self) -> str:
        """One line on everything that was asked for."""
        counts = {k: sum(v == k for v in self.outcome.values())
                  for k in ("local", "remote", "missing")}  # fmt: skip
        return (f"assets: {counts['local']} from {self.mirror.root}, {counts['remote']} fetched, "
                f"{counts['missing']} missing")  # fmt: skip

    def preflight(self, named: dict[Asset, str]) -> Preflight:
        """Look for everything that a task names and that those files refer to. Fetches nothing.

        Args:
            named: assets and who names them (`tasks.assets_of`).
        """
        out, queue, seen = Preflight(), list(named.items()), set(named)
        while queue:
            asset, by = queue.pop()
            path = self.mirror.locate(asset)
            if path is None:
                out.missing[asset] = by
                continue
            out.found.append(asset)
            if path.is_dir():
                continue
            try:
                needed = references(path)
            except (NeedsUsd, ValueError):
                out.unread.append(asset)
                continue
            for other in _within(asset, needed):
                if other not in seen:
                    seen.add(other)
                    queue.append((other, asset.path))
        return out


def _is_url(text: str) -> bool:
    return text.split(":", 1)[0] in ("http", "https", "omniverse")


def _within(asset: Asset, texts: Iterable[str]) -> Iterable[Asset]:
    """What a file refers to in its release, less what comes with the renderer and tile patterns."""
    for text in texts:
        try:
            other = None if "<UDIM>" in text else relative(asset, text)
        except UnsafePath:
            other = None
        if other is not None and not comes_with_the_renderer(other.path):
            yield other


# -- into Isaac Lab --------------------------------------------------------------------------------


def install(resolver: Resolver) -> None:
    """From now on Isaac Lab, when it is imported, takes its assets from the resolver."""
    hooks = {
        "isaaclab.utils.assets": functools.partial(_hook_assets, resolver),
        "isaaclab.sim.utils.prims": functools.partial(
            _hook_argument, resolver, "add_usd_reference"
        ),
        "isaacsim.core.utils.stage": functools.partial(
            _hook_argument, resolver, "add_reference_to_stage"
        ),
        "isaacsim.storage.native.nucleus": functools.partial(_hook_root, resolver),
    }  # fmt: skip
    for name, hook in list(hooks.items()):
        if name in sys.modules:
            hook(sys.modules[name])
            del hooks[name]
    sys.meta_path.insert(0, _AfterImport(hooks))


class _AfterImport(importlib.abc.MetaPathFinder):
    """Calls a function with a module right after it has been imported, before its importer."""

    def __init__(self, hooks: dict[str, Callable[[ModuleType], None]]):
        self.hooks = hooks

    def find_spec(self, fullname: str, path: Any, target: Any = None) -> Any:
        hook = self.hooks.get(fullname)
        if hook is None:
            return None
        for finder in sys.meta_path:
            if finder is self or not hasattr(finder, "find_spec"):
                continue
            spec = finder.find_spec(fullname, path, target)
            if spec is None or spec.loader is None:
                continue
            run = spec.loader.exec_module

            def exec_module(module: ModuleType, run: Any = run, hook: Any = hook) -> None:
                run(module)
                hook(module)

            spec.loader.exec_module = exec_module  # type: ignore[method-assign]
            return spec
        return None


def _hook_assets(resolver: Resolver, module: Any) -> None:
    """The constants that URLs are built from, and the functions that read files."""
    known = parse(f"{module.NUCLEUS_ASSET_ROOT_DIR}/Isaac")
    if known is not None:
        root = resolver.root(known.release)
        module.NUCLEUS_ASSET_ROOT_DIR = root
        module.NVIDIA_NUCLEUS_DIR = f"{root}/NVIDIA"
        module.ISAAC_NUCLEUS_DIR = f"{root}/Isaac"
        module.ISAACLAB_NUCLEUS_DIR = f"{root}/Isaac/IsaacLab"
    check, retrieve, read = module.check_file_path, module.retrieve_file_path, module.read_file

    def kept(local: str) -> bool:
        """Whether it is not looked for elsewhere; in a strict run, nothing of NVIDIA's is."""
        theirs = _is_url(local) and "/Assets/Isaac/" in local
        return resolver.is_ours(local) or (resolver.strict and theirs)

    @functools.wraps(check)
    def check_file_path(path: str) -> int:
        local = resolver.resolve(path)
        if os.path.isfile(local):
            return 1
        return 0 if kept(local) else check(path)

    @functools.wraps(retrieve)
    def retrieve_file_path(path: str, *rest: Any, **options: Any) -> str:
        local = resolver.resolve(path)
        if os.path.exists(local):
            return os.path.abspath(local)
        if kept(local):
            raise FileNotFoundError(_missing(resolver, local))
        return retrieve(path, *rest, **options)

    @functools.wraps(read)
    def read_file(path: str) -> io.BytesIO:
        local = resolver.resolve(path)
        if os.path.isfile(local):
            return io.BytesIO(Path(local).read_bytes())
        if kept(local):
            raise FileNotFoundError(_missing(resolver, local))
        return read(path)

    module.check_file_path = check_file_path
    module.retrieve_file_path, module.read_file = retrieve_file_path, read_file


def _missing(resolver: Resolver, local: str) -> str:
    asset = None if _is_url(local) else parse(local)
    if asset is None:
        return f"{local} belongs to no release in the mirror, and assets.strict=true asks no server"
    root = resolver.mirror.root
    command = f"{FETCH} --root {root} --release {asset.release} --files {asset.path}"
    return f"{asset.path} of release {asset.release} is not in {root}. Remedy: {command}"


def _hook_argument(resolver: Resolver, name: str, module: Any) -> None:
    """A function that takes `usd_path`, by name or at some place."""
    original = getattr(module, name, None)
    if original is None:
        return

    @functools.wraps(original)
    def wrapped(*positional: Any, **named: Any) -> Any:
        positional = tuple(
            resolver.resolve(x) if isinstance(x, str) and _is_url(x) else x for x in positional
        )
        if isinstance(named.get("usd_path"), str):
            named["usd_path"] = resolver.resolve(named["usd_path"])
        return original(*positional, **named)

    setattr(module, name, wrapped)


def _hook_root(resolver: Resolver, module: Any) -> None:
    """Isaac Sim's own question for the server's root."""
    original = getattr(module, "get_assets_root_path", None)
    if original is None:
        return

    @functools.wraps(original)
    def get_assets_root_path(*positional: Any, **named: Any) -> str:
        try:
            known = parse(f"{original(*positional, **named)}/Isaac")
        except Exception:  # it asks the server whether it is there
            known = None
        releases = resolver.mirror.releases()
        release = known.release if known else (releases[-1] if releases else "")
        return resolver.root(release)

    module.get_assets_root_path = get_assets_root_path
