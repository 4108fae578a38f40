"""Fetch Isaac Lab's assets into a local mirror, for training without a network.

    python scripts/download_assets.py --categories Robots --subset Unitree
    python scripts/download_assets.py --categories all --dry-run
    python scripts/download_assets.py --task Isaac-Ant-v0          in Isaac Lab's Python
    python scripts/download_assets.py --verify
    python scripts/download_assets.py --pack assets.tar            to carry it elsewhere
    python scripts/download_assets.py --unpack assets.tar          there

Files that USD layers and materials refer to are fetched with them. A second call goes on where the
first one stopped. Exit code 0: complete; 1: something could not be had; 2: a mistake in the call.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from tqdm import tqdm

from dreamer_isaac.assets.download import (
    Downloader,
    DownloadError,
    Report,
    gigabytes,
    pack,
    unpack,
)
from dreamer_isaac.assets.mirror import (
    CATEGORIES,
    SERVER,
    Asset,
    Mirror,
    UnsafePath,
    category_prefixes,
    parse,
)
from dreamer_isaac.assets.references import NeedsUsd


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--categories", nargs="+", metavar="NAME",
                      help=f"all, or some of {', '.join(CATEGORIES)}")  # fmt: skip
    what.add_argument("--task", help="what this task's configuration names; needs Isaac Lab")
    what.add_argument("--files", nargs="+", metavar="PATH", help="paths below the release")
    what.add_argument("--verify", action="store_true", help="compare the files with the manifest")
    what.add_argument("--pack", type=Path, metavar="TAR", help="write the mirror into one file")
    what.add_argument("--unpack", type=Path, metavar="TAR", help="add a packed mirror to this one")
    parser.add_argument("--subset", default="", help="a folder of the categories, e.g. Unitree")
    parser.add_argument("--release", help="of the assets; by default the installed Isaac Lab's "
                        "with --task, else 5.1, which Isaac Lab 2.3 uses")  # fmt: skip
    parser.add_argument("--root", type=Path, default=Path("offline_assets"))
    parser.add_argument("--server", default=SERVER)
    parser.add_argument("--workers", type=int, default=8)
    parser.add_argument("--dry-run", action="store_true", help="only say what would be fetched")
    return parser.parse_args()


def task_assets(task: str, release: str | None) -> tuple[str, list[Asset]]:
    """What a task names, from its configuration; of the release that Isaac Lab reads unless
    another is asked for, which is returned first."""
    from dreamer_isaac.assets.tasks import assets_of, with_run_time
    from dreamer_isaac.cli import compose
    from dreamer_isaac.config import isaaclab_available

    if not isaaclab_available():
        raise DownloadError("--task reads the task's configuration and needs Isaac Lab. Remedy: "
                            "Isaac Lab's Python, or --categories.")  # fmt: skip
    from dreamer_isaac.envs.isaaclab import entry_point, task_config

    cfg = compose([f"env.name={task}"])
    config = task_config(cfg, "cpu")
    if release is None:
        from isaaclab.utils import assets as isaaclab_assets  # pyright: ignore[reportMissingImports]

        own = parse(f"{isaaclab_assets.NUCLEUS_ASSET_ROOT_DIR}/Isaac")
        release = own.release if own else "5.1"
    named = with_run_time(assets_of(config), release, entry_point(cfg))
    other = {a.release for a in named} - {release}
    if other:
        print(f"{task} names assets of release {', '.join(sorted(other))} too, which --release "
              "fetches", file=sys.stderr)  # fmt: skip
    return release, sorted(a for a in named if a.release == release)


def main() -> int:
    a = arguments()
    mirror = Mirror(a.root)
    try:
        if a.pack:
            print(f"{pack(mirror.root, a.pack)} files in {a.pack}")
            return 0
        if a.unpack:
            print(f"{unpack(a.unpack, mirror.root)} files in {mirror.root}")
            return 0
        if a.verify:
            return verify(mirror)
        return fetch(a, mirror)
    except (DownloadError, UnsafePath, NeedsUsd) as e:
        print(f"error: {e}", file=sys.stderr)
        return 1


def verify(mirror: Mirror) -> int:
    releases, wrong = mirror.releases(), 0
    if not releases:
        raise DownloadError(f"{mirror.root} holds no assets.")
    for release in releases:
        downloader = Downloader(mirror, release)
        if not downloader.manifest:
            print(f"{release}: no manifest says what its files should be")
            wrong += 1
            continue
        problems = downloader.verify()
        wrong += len(problems)
        for name, problem in problems.items():
            print(f"{release}: {name} {problem}")
        print(f"{release}: {len(downloader.manifest) - len(problems)} files are as they should be")
    return 1 if wrong else 0


def fetch(a: argparse.Namespace, mirror: Mirror) -> int:
    bar = tqdm(unit="B", unit_scale=True, disable=None, file=sys.stderr)

    def progress(done: int, total: int, name: str) -> None:
        bar.total = total
        bar.set_description_str(name.rsplit("/", 1)[-1][:30], refresh=False)
        bar.update(done - bar.n)

    start: list[Any] = []
    release = a.release
    if a.task:
        release, start = task_assets(a.task, release)
    release = release or "5.1"
    downloader = Downloader(mirror, release, a.server, a.workers, progress=progress)
    if a.categories:
        names = list(CATEGORIES) if "all" in a.categories else a.categories
        unknown = [n for n in names if n not in CATEGORIES]
        if unknown:
            print(f"error: unknown category {', '.join(unknown)}; there are "
                  f"{', '.join(CATEGORIES)}.", file=sys.stderr)  # fmt: skip
            return 2
        prefixes = [p for n in names for p in category_prefixes(n, a.subset)]
        planned = downloader.plan(prefixes)
        if planned is None:
            raise DownloadError(f"{a.server} does not list its files. Remedy: --task or --files, "
                                "which follow references.")  # fmt: skip
        if not planned:
            raise DownloadError(f"{a.server} has nothing below {', '.join(prefixes)}.")
        start = planned
    elif a.files:
        start = [Asset(release, path) for path in a.files]
    if a.dry_run:
        return dry_run(downloader, start)
    report = downloader.run(start)
    bar.close()
    return say(report, mirror)


def dry_run(downloader: Downloader, start: list[Any]) -> int:
    """What is known before anything is fetched: references show only in the files themselves."""
    missing, size, count = 0, 0, 0
    for item in start:
        remote = downloader.look(item) if isinstance(item, Asset) else item
        if remote is None:
            print(f"not on the server: {item.path}")
            missing += 1
        elif not downloader.is_here(remote):
            print(f"{gigabytes(remote.size):>12}  {remote.asset.path}")
            size, count = size + remote.size, count + 1
    print(f"{count} files, {gigabytes(size)}, and what they refer to; "
          f"{len(start) - count - missing} are here already")  # fmt: skip
    return 1 if missing else 0


def say(report: Report, mirror: Mirror) -> int:
    print(f"{len(report.fetched)} files fetched ({gigabytes(report.bytes)}), {len(report.kept)} "
          f"were here already: {mirror.root}")  # fmt: skip
    for asset, by in sorted(report.missing.items()):
        print(f"not on the server: {asset.path}, which {by} asks for")
    for asset, reason in sorted(report.failed.items()):
        print(f"failed: {asset.path}: {reason}")
    for reference, by in sorted(report.outside.items()):
        print(f"not followed: {reference} in {by} leads out of the release's tree")
    return 1 if report.failed or report.missing else 0


if __name__ == "__main__":
    sys.exit(main())
