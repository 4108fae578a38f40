"""Checkpoints: a folder of files each, written under a temporary name and renamed when complete.

    <run>/checkpoints/000000409600/   networks.pt  learner.pt  meta.json  [replay.pt  exact.pt]
    <run>/checkpoints/latest          the name of the newest, replaced atomically

With `checkpoint.models` also `model_<updates>.pt`, networks and meta.json in one file.

`meta.json` is written last and holds the size and CRC-32 of the other files: a checkpoint is
complete exactly when it reads and they agree. A run that was killed at any moment leaves at worst
a `*.partial` folder, which the next save removes.
"""

from __future__ import annotations

import json
import os
import shutil
import zipfile
import zlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

FORMAT = 1
"""Raised when the contents change so that older ones cannot be read."""


INSIDE = "dreamer_isaac.json"
"""Where a model file keeps its meta.json: torch's files are zip archives of one folder."""


class CheckpointError(RuntimeError):
    """A checkpoint that cannot be used; nothing of it has been loaded."""


def _torch() -> Any:
    """Imported when something is saved or loaded: finding a checkpoint and reading what it is must
    be possible before a simulator that insists on coming first."""
    import torch

    return torch


def _sync(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def _crc(path: Path) -> int:
    value = 0
    with open(path, "rb") as f:
        while block := f.read(1 << 20):
            value = zlib.crc32(block, value)
    return value


class Checkpoints:
    """The checkpoints of one run.

    Args:
        folder: `<run>/checkpoints`. keep: newest ones kept.
    """

    def __init__(self, folder: Path, keep: int = 3):
        self.folder, self.keep = folder, keep

    def save(self, frames: int, parts: dict[str, Any], meta: dict[str, Any]) -> Path:
        """Write `parts` (file name without `.pt` -> state) completely, or not at all.

        Raises:
            CheckpointError: when it cannot be written (full disk, read-only folder); older
                checkpoints are untouched.
        """
        name = f"{frames:012d}"
        partial = self.folder / f"{name}.partial"
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            for leftover in self.folder.glob("*.partial"):
                shutil.rmtree(leftover)
            for leftover in self.folder.glob("model_*.partial.pt"):
                leftover.unlink()
            partial.mkdir()
            files = {}
            for part, state in parts.items():
                path = partial / f"{part}.pt"
                _torch().save(state, path)
                _sync(path)
                files[path.name] = {"bytes": path.stat().st_size, "crc32": _crc(path)}
            meta = meta | {"format": FORMAT, "frames": frames, "files": files}
            (partial / "meta.json").write_text(json.dumps(meta, indent=1))
            _sync(partial / "meta.json")
            final, old = self.folder / name, self.folder / f"{name}.old.partial"
            if final.exists():  # the same frame again: the old one goes when the new one is there
                os.rename(final, old)
            os.rename(partial, final)
            self._point(name)
            _sync(self.folder)
            shutil.rmtree(old, ignore_errors=True)
        except (OSError, RuntimeError) as e:  # torch.save reports a full disk as RuntimeError
            shutil.rmtree(partial, ignore_errors=True)
            free = shutil.disk_usage(self.folder.parent).free / 2**20
            raise CheckpointError(
                f"cannot save {self.folder / name} ({free:.1f} MiB are free there): {e}. Older "
                "checkpoints are intact. Remedy: free disk space or make the folder writable, then "
                "run the same command again."
            ) from e
        for old in self.complete()[: -self.keep]:
            (old / "meta.json").unlink(missing_ok=True)  # a kill in between leaves no half one
            shutil.rmtree(old, ignore_errors=True)
        return final

    def save_model(self, updates: int, networks: dict[str, Any], meta: dict[str, Any]) -> Path:
        """Write `model_<updates>.pt`, completely or not at all.

        Raises:
            CheckpointError: when it cannot be written.
        """
        path = self.folder / f"model_{updates}.pt"
        partial = self.folder / f"model_{updates}.partial.pt"
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            _torch().save({"networks": networks}, partial)
            with zipfile.ZipFile(partial, "a") as archive:
                top = archive.namelist()[0].partition("/")[0]
                archive.writestr(
                    f"{top}/{INSIDE}", json.dumps(meta | {"format": FORMAT, "updates": updates})
                )
            _sync(partial)
            os.replace(partial, path)
        except (OSError, RuntimeError) as e:
            partial.unlink(missing_ok=True)
            raise CheckpointError(f"cannot save {path}: {e}. Older ones are intact.") from e
        return path

    def _point(self, name: str) -> None:
        temporary = self.folder / "latest.partial-file"
        temporary.write_text(name + "\n")
        _sync(temporary)
        os.replace(temporary, self.folder / "latest")

    def complete(self) -> list[Path]:
        """Folders of complete checkpoints (by name and meta.json), oldest first."""
        if not self.folder.is_dir():
            return []
        found = [
            p for p in self.folder.iterdir() if p.name.isdigit() and (p / "meta.json").exists()
        ]
        return sorted(found)

    def latest(self) -> Path | None:
        """The newest checkpoint, or None."""
        found = self.complete()
        return found[-1] if found else None


def find(path: str | Path) -> Path:
    """The checkpoint that a user means: a run folder, its `checkpoints`, one checkpoint in it, a
    file of one, or a model file.

    Raises:
        CheckpointError: with what is there instead.
    """
    given = Path(path)
    if not given.exists():
        raise CheckpointError(f"{given} does not exist.")
    if given.is_file():
        if _is_model(given):
            return given
        if not (given.parent / "meta.json").exists():
            raise CheckpointError(
                f"{given} is no model file of dreamer_isaac (another library's, or damaged)."
            )
        given = given.parent
    if (given / "meta.json").exists():
        return given
    for folder in (given / "checkpoints", given):
        latest = Checkpoints(folder).latest()
        if latest:
            return latest
    there = ", ".join(sorted(p.name for p in given.iterdir())[:10]) or "nothing"
    raise CheckpointError(f"{given} holds no complete checkpoint (there: {there}).")


def _is_model(path: Path) -> bool:
    try:
        with zipfile.ZipFile(path) as archive:
            return any(name.endswith("/" + INSIDE) for name in archive.namelist())
    except (OSError, zipfile.BadZipFile):
        return False


def _model_meta(path: Path) -> str:
    with zipfile.ZipFile(path) as archive:
        odd = archive.testzip()
        if odd:
            raise CheckpointError(f"{path} is damaged ({odd}).")
        name = next(n for n in archive.namelist() if n.endswith("/" + INSIDE))
        return archive.read(name).decode()


def read_meta(folder: Path, whole: bool = True) -> dict[str, Any]:
    """`meta.json` of one checkpoint or model file.

    Args:
        whole: read every file to see whether it is damaged, a replay buffer's gigabytes too.

    Raises:
        CheckpointError: when it is damaged or of another program.
    """
    single = folder.is_file()
    remedy = "Remedy: another model file." if single else (
        f"Remedy: remove {folder} if it is a run's newest checkpoint; the one before is used then."
    )  # fmt: skip
    try:
        meta = json.loads(_model_meta(folder) if single else (folder / "meta.json").read_text())
        files, version = {} if single else meta["files"], meta["format"]
    except (OSError, ValueError, KeyError, TypeError, zipfile.BadZipFile) as e:
        raise CheckpointError(
            f"{folder} is damaged, or no checkpoint of dreamer_isaac: {e!r}. {remedy}"
        ) from e
    if version != FORMAT:
        raise CheckpointError(
            f"{folder} has format {version}, this version reads {FORMAT}. Remedy: the version of "
            "dreamer_isaac that wrote it."
        )
    for name, expected in files.items() if whole else ():
        path = folder / name
        if not path.exists():
            raise CheckpointError(f"{path} is missing: the checkpoint is damaged. {remedy}")
        if path.stat().st_size != expected["bytes"] or _crc(path) != expected["crc32"]:
            raise CheckpointError(
                f"{path} is damaged ({path.stat().st_size} bytes, {expected['bytes']} were "
                f"written). {remedy}"
            )
    return meta


def load(folder: Path, parts: list[str], device: torch.device) -> dict[str, Any]:
    """Read and check everything first, so that nothing is ever half-loaded.

    Returns:
        `parts` that exist, by name, and `meta`.

    Raises:
        CheckpointError
    """
    out: dict[str, Any] = {"meta": read_meta(folder)}
    if folder.is_file():
        content = _read(folder, device, True)
        return out | {part: content[part] for part in parts if part in content}
    for part in parts:
        path = folder / f"{part}.pt"
        if path.name not in out["meta"]["files"]:
            continue
        # Exact state holds numpy's and Python's generator states, which are no tensors. A replay
        # buffer may be larger than the GPU: it is read where and when it is copied from.
        if part == "replay":
            out[part] = _read(path, "cpu", True, mmap=True)
        else:
            out[part] = _read(path, device, part != "exact")
    return out


def _read(path: Path, device: torch.device | str, weights_only: bool, mmap: bool = False) -> Any:
    try:
        return _torch().load(path, map_location=device, weights_only=weights_only, mmap=mmap)
    except Exception as e:  # unpickling can raise anything
        raise CheckpointError(f"{path} cannot be read: {e}") from e


def load_networks(module: torch.nn.Module, state: dict[str, Any], source: Path) -> None:
    """Load a state dict after comparing every name and shape.

    Raises:
        CheckpointError: naming the first differences; nothing is loaded then.
    """
    own = module.state_dict()
    odd = [f"{k} {'missing' if k in own else 'unknown'}" for k in sorted(own.keys() ^ state.keys())]
    odd += [
        f"{k} is {tuple(state[k].shape)} there, {tuple(own[k].shape)} here"
        for k in own.keys() & state.keys() if own[k].shape != state[k].shape
    ]  # fmt: skip
    if odd:
        raise CheckpointError(
            f"the networks in {source} are of another shape: {'; '.join(odd[:4])}. Remedy: the "
            "same size=, model.* and task as the run that saved them."
        )
    module.load_state_dict(state)
