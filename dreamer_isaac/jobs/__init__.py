"""Job files: a JSON file in, a folder of results out, both on disk or in an object store.

`python dreamer_isaac.py job=path/to/job.json` checks everything that can be checked, turns the file
into overrides of the ordinary configuration, runs it, and leaves `result.json` beside the results.
The format is the asset pipeline's (docs/jobs.md); `schema.json` is its JSON Schema. Imports no
torch.
"""

from __future__ import annotations

import datetime
import difflib
import json
import os
import re
import signal
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dreamer_isaac.config import Config, ConfigError, EnvConfig, task_problems
from dreamer_isaac.jobs.store import Folder, Publisher, StoreError, fetch_run, is_remote

SCHEMA = Path(__file__).with_name("schema.json")
PARENTS = 2
"""Folders above the job file's own that still belong to its asset, unless `job.root` says more."""
RESERVED = ("training", "evaluation", "checkpoints")
"""Folders of an asset that no job's output may be named like."""
CONFIG_NAMES = {"train": "training-config.json", "evaluate": "evaluation-config.json"}


class JobError(ConfigError):
    """A job that cannot be run; one line for every mistake."""

    def __init__(self, problems: list[str], path: str, job: Job | None = None):
        super().__init__(problems)
        self.job = job
        """What could be understood of it, so that its output can say that it was rejected."""
        count = "a mistake" if len(problems) == 1 else f"{len(problems)} mistakes"
        self.args = ("\n".join([f"{path} has {count}:", *(f"  - {p}" for p in problems)]),)


@dataclass
class Job:
    """A checked job."""

    content: dict[str, Any]
    text: bytes
    """The file as it was read."""
    path: str
    id: str
    output: str
    """Where its results belong: a folder or a URL, the job's id included."""
    folder: Path
    """Where they are written first; the same place when `output` is a folder."""
    node: int = 0
    checkpoint: str = ""
    notes: list[str] = field(default_factory=list)
    """What the log should say of how it was understood."""

    @property
    def settings(self) -> dict[str, Any]:
        """Of a checked job only."""
        return self.content["trainingConfig"]


def problems_of(content: Any) -> list[str]:
    """Every way in which a job file departs from the schema, one line each, by path."""
    from jsonschema import Draft202012Validator

    schema = json.loads(SCHEMA.read_text())
    errors = sorted(Draft202012Validator(schema).iter_errors(content), key=lambda e: list(e.path))
    return list(dict.fromkeys(line for error in errors for line in _lines(error)))


def _lines(error: Any) -> list[str]:
    """What one finding of jsonschema means, in our words."""
    place = ".".join(str(p) for p in error.absolute_path)
    prefix = f"{place}." if place else ""
    value, rule = error.instance, error.validator_value
    shown = json.dumps(value) if not isinstance(value, dict | list) else f"a {_kind(value)}"
    if error.validator == "required":
        name = re.findall(r"'([^']*)' is a required", error.message)[0]
        return [f"{prefix}{name} is missing."]
    if error.validator == "additionalProperties":
        known = list(error.schema["properties"])
        lines = []
        for name in sorted(set(value) - set(known)):
            near = difflib.get_close_matches(name, known, n=1)
            hint = f"did you mean {near[0]}?" if near else f"known are {', '.join(known)}."
            lines.append(f"{prefix}{name} is unknown; {hint}")
        return lines
    if error.validator == "type":
        return [f"{place or 'the file'}: {shown} is no {rule}."]
    if error.validator == "minimum":
        return [f"{place}: {shown} must be {rule} or more."]
    if error.validator == "enum":
        return [f"{place}: {shown} is not one of {', '.join(rule)}."]
    if place.endswith("rlLibrary"):
        return [
            f"{place}: {shown} is not supported: this program trains with {rule!r} only. Remedy: "
            f'"rlLibrary": "{rule}"; a policy of another library is evaluated by that library.'
        ]
    if error.validator == "pattern":
        form = "key=value" if place.split(".")[-1].isdigit() else "s3://bucket/path"
        return [f"{place}: {shown} is not of the form {form}."]
    return [f"{place}: {error.message}."]


def _kind(value: Any) -> str:
    return "list" if isinstance(value, list) else "section"


def scheduled() -> str:
    """The scheduler's id of this job, the same when it is tried again; empty without one."""
    batch = os.environ.get("AWS_BATCH_JOB_ID", "").split("#")[0]  # '#1': a node of several
    return re.sub(r"[^\w.-]", "-", batch)


def nodes() -> tuple[int, int]:
    """How many nodes the launcher started this job on, and which one this is (from 0)."""
    launchers = {"AWS_BATCH_JOB_NUM_NODES": "AWS_BATCH_JOB_NODE_INDEX",
                 "SLURM_NNODES": "SLURM_NODEID", "NUM_NODES": "NODE_INDEX"}  # fmt: skip
    for count, index in launchers.items():
        if os.environ.get(count, "").isdigit():
            return int(os.environ[count]), int(os.environ.get(index) or 0)
    return 1, 0


def array_index() -> int:
    """Which task of an array this is, 0 without one: every task trains a seed of its own."""
    given = os.environ.get("AWS_BATCH_JOB_ARRAY_INDEX") or os.environ.get("SLURM_ARRAY_TASK_ID")
    return int(given) if given and given.isdigit() else 0


def load(cfg_path: str, job_id: str = "", output: str = "", root: str = "") -> Job:
    """Read and check a job file and find what it needs.

    Args:
        cfg_path: a file or a URL (`s3://...`). job_id: name of the output; empty takes the
            scheduler's, or a new one. output: the folder that results go below; empty takes the
            asset's (`asset_of`). root: the asset's topmost folder, up to which checkpoints are
            looked for.

    Raises:
        JobError: with every mistake.
        StoreError: the file cannot be read.
    """
    folder, name = Folder.split(cfg_path)
    text = folder.read(name)
    try:
        content = json.loads(text)
    except ValueError as e:
        raise JobError([f"no JSON: {e}."], cfg_path) from None
    found = problems_of(content)
    settings = content.get("trainingConfig") if isinstance(content, dict) else None
    settings = settings if isinstance(settings, dict) else {}
    task = settings.get("task")
    if isinstance(task, str) and task and "overrides" not in settings:
        found += [f"trainingConfig.task: {p}" for p in task_problems(EnvConfig(name=task))]
    count, index = nodes()
    compute = content.get("computeConfig") if isinstance(content, dict) else None
    wanted = compute.get("numNodes") if isinstance(compute, dict) else None
    if isinstance(wanted, int) and not isinstance(wanted, bool):
        if settings.get("mode") == "evaluate" and wanted > 1:
            found.append(f"computeConfig.numNodes: {wanted}, but an evaluation runs on 1.")
        elif wanted != count and wanted > 0:
            found.append(
                f"computeConfig.numNodes: {wanted}, but this job was started on {count}. Remedy: "
                "the number of nodes that it is submitted with (cluster/aws_batch/submit.py "
                "--nodes), or 1 and one node."
            )
    job_id = job_id or scheduled() or str(uuid.uuid4())
    if not re.fullmatch(r"\w[\w.-]*", job_id) or job_id in RESERVED:
        raise JobError([f"job.id={job_id}: letters, digits, '.', '_' and '-' make an id, and "
                        f"{', '.join(RESERVED)} are taken."], cfg_path)  # fmt: skip
    base = output.rstrip("/") or asset_of(folder).url
    if is_remote(base) and not re.fullmatch(r"[a-z0-9+]+://[^/]+(/.*)?", base):
        raise JobError([f"job.output={output}: a URL needs a bucket, s3://bucket/folder."],
                       cfg_path)  # fmt: skip
    target = Folder(base if is_remote(base) else os.path.abspath(base)).below(job_id)
    if count > 1:  # none inside another's, which may be uploading its own
        target = target.below(f"node-{index}")
    local = Path("runs") / "jobs" / target.url.split("://")[-1] if is_remote(base) else Path(
        target.url
    )  # fmt: skip
    job = Job(content, text, cfg_path, job_id, target.url, local, index)
    if settings.get("mode") == "evaluate":
        try:
            job.checkpoint, note = find_checkpoint(folder, settings, root)
            job.notes += [note] if note else []
        except StoreError as e:
            found.append(str(e))
    if found:
        raise JobError(found, cfg_path, job)
    return job


def asset_of(folder: Folder) -> Folder:
    """The asset that a job file belongs to: its folder, or the one above `training/` and
    `evaluation/`."""
    inside = folder.name in ("training", "evaluation") and not folder.is_top()
    return folder.parent() if inside else folder


# -- checkpoints ---------------------------------------------------------------------------------


def find_checkpoint(folder: Folder, settings: dict[str, Any], root: str = "") -> tuple[str, str]:
    """The checkpoint of an evaluation job, in the reference's order: `checkpointPath` from the
    job's folder upwards, and then among the outputs of earlier jobs there; `policyS3Uri`; the only
    `.pt` beside the job file.

    Returns:
        Its path or URL, and what is worth saying about the choice.

    Raises:
        StoreError: with what there is instead.
    """
    wanted = settings.get("checkpointPath")
    if isinstance(wanted, str) and wanted:
        return _by_path(folder, wanted, str(settings.get("task")), root)
    uri = settings.get("policyS3Uri")
    if isinstance(uri, str) and uri:
        place, name = Folder.split(uri)
        if not place.exists(name):
            raise StoreError(f"trainingConfig.policyS3Uri: {uri} does not exist.")
        return uri, ""
    beside = [n for n in folder.names() if n.endswith(".pt")]
    if len(beside) == 1:
        return folder.join(beside[0]), f"checkpoint beside the job file: {beside[0]}"
    there = ", ".join(beside) or "none"
    raise StoreError(
        "trainingConfig.checkpointPath is missing, policyS3Uri too, and beside the job file there "
        f"must be exactly one .pt file (there: {there})."
    )


def _by_path(folder: Folder, wanted: str, task: str, root: str) -> tuple[str, str]:
    if wanted.startswith("/") or ".." in wanted.split("/") or "://" in wanted:
        raise StoreError(
            f"trainingConfig.checkpointPath: {wanted!r} must be relative, without '..'."
        )
    root = root if is_remote(root) or not root else os.path.abspath(root)
    places = [folder]
    while not places[-1].is_top() and (
        places[-1].url != root.rstrip("/") if root else len(places) <= PARENTS
    ):
        places.append(places[-1].parent())
    for place in places:
        if place.exists(wanted):
            return place.join(wanted), ""
    seen: list[str] = []
    outputs = [o for place in places for o in _outputs(place, task)]
    for place in [*places, *outputs]:
        if place in outputs and place.exists(wanted):
            return place.join(wanted), f"checkpoint of the job {place.name}"
        names = _numbered(place, wanted)
        other = _last_instead(wanted, names)
        if other:
            why = f"{wanted} means the last one, which is {other} here"
            return place.join(other), f"{why} (job {place.name})" if place in outputs else why
        seen += [place.join(n) for n in names]
    listed = ", ".join(seen[-8:]) or "no checkpoint"
    raise StoreError(
        f"trainingConfig.checkpointPath: {wanted} is neither in {places[0].url} nor in a folder "
        f"above it up to {places[-1].url}, nor in an earlier job's output there. There is: "
        f"{listed}."
    )


def _outputs(place: Folder, task: str) -> list[Folder]:
    """Outputs of training jobs of this task below `place`, newest first."""
    found = []
    for name in place.folders():
        below = place.below(name)
        try:
            result = json.loads(below.read("result.json"))
            same = json.loads(below.read(CONFIG_NAMES["train"]))["trainingConfig"]["task"] == task
        except (StoreError, ValueError, KeyError, TypeError):
            continue
        if same:
            found.append((str(result.get("finished", "")), name, below))
    return [below for _, _, below in sorted(found, key=lambda x: x[:2], reverse=True)]


def _numbered(place: Folder, wanted: str) -> list[str]:
    """Files beside `wanted` that differ from it only in the number, in the number's order."""
    parent, _, name = wanted.rpartition("/")
    match = re.fullmatch(r"(.*?)(\d+)(\.pt)", name)
    if not match:
        return []
    form = re.compile(re.escape(match[1]) + r"(\d+)" + re.escape(match[3]))
    there = place.below(parent) if parent else place
    found = [n for n in there.names() if form.fullmatch(n)]
    found.sort(key=lambda n: int(form.fullmatch(n)[1]))  # type: ignore[index]
    return [f"{parent}/{n}" if parent else n for n in found]


def _last_instead(wanted: str, names: list[str]) -> str:
    """The last checkpoint, where `wanted` counts from 0 and it from 1, or the reverse."""
    if not names:
        return ""
    asked, last = (int(re.findall(r"(\d+)\.pt$", n)[0]) for n in (wanted, names[-1]))
    return names[-1] if abs(asked - last) == 1 else ""


# -- from a job to a configuration ---------------------------------------------------------------


def overrides_of(
    job: Job, more: list[str], values: Callable[[list[str]], dict[str, Any]]
) -> list[str]:
    """Overrides of the ordinary configuration that do what the job says.

    Args:
        more: overrides of the command line, which come last. values: composes overrides into the
            plain, unchecked configuration, from which sizes are taken that must fit each other.
    """
    s = job.settings
    own = [f"env.name={s['task']}", f"env.num_envs={s['numEnvs']}"]
    offset = job.node + array_index()
    own += [f"env.seed={s.get('seed', 0) + offset}"] if "seed" in s or offset else []
    given = [*s.get("overrides", []), *more]
    if s["mode"] == "evaluate":
        return [*own, "mode=evaluate", f"evaluation.episodes={s['numEpisodes']}",
                f"evaluation.max_steps={s['stepsPerEpisode']}", "evaluation.video_seconds=60",
                f"checkpoint={job.checkpoint}", *given]  # fmt: skip
    # Evaluating is a job of its own, with fewer envs than a training has.
    own += [f"optimization.max_updates={s['maxIterations']}", "checkpoint.models=true",
            "evaluation.final=false"]  # fmt: skip
    raw = values([*own, *given])
    try:
        fitted = _fitted(raw, given)
    except (TypeError, ValueError, ZeroDivisionError):  # of an override; it is complained about
        fitted = []
    return [*own, *fitted, *given]


def _fitted(raw: dict[str, Any], given: list[str]) -> list[str]:
    """Sizes that go with the number of envs and updates, for keys that nobody has set."""
    env, col, rb, opt = raw["env"], raw["collector"], raw["replay_buffer"], raw["optimization"]
    envs, length = int(env["num_envs"]), int(rb["batch_length"])
    watched = min(int(raw["evaluation"]["num_envs"]), envs // 4)
    trained = max(envs - watched, 1)
    batch = envs * max(1, int(col["frames_per_batch"]) // envs)
    start = -(-max(int(col["init_random_frames"]), length * envs) // batch) * batch
    needed = opt["max_updates"] * rb["batch_size"] / opt["replay_ratio"] * envs / trained

    def part(share: float) -> int:  # in whole batches
        return max(1, round(needed * share / batch)) * batch

    sizes = {
        "evaluation.num_envs": watched,
        "collector.frames_per_batch": batch,
        "collector.init_random_frames": start,
        # Updates end the run; this only must not end it before, however far a threaded collector
        # gets ahead.
        "collector.total_frames": start + part(4) + 4 * batch,
        "replay_buffer.size": max(int(rb["size"]), 2 * (length + 1) * trained, rb["batch_size"]),
        "checkpoint.interval_frames": part(0.1),
        "logger.interval_frames": part(0.02),
    }
    set_already = {o.partition("=")[0].lstrip("+") for o in given}
    return [f"{k}={v}" for k, v in sizes.items() if k not in set_already]


# -- running it ----------------------------------------------------------------------------------


def _now() -> str:
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")


class Running:
    """The life of a job around the run itself: folder, uploads, `result.json`.

    Args:
        job: a checked job. patience: seconds for which the last upload is tried.
    """

    def __init__(self, job: Job, patience: float = 900.0):
        self.job, self.patience = job, patience
        self.started, self._clock = _now(), time.monotonic()
        self.publisher = Publisher(job.folder, job.output) if is_remote(job.output) else None
        self._models: list[str] = []
        """Model files that an earlier attempt has left in the store."""

    def prepare(self, cfg: Config) -> None:
        """Make the folder, fetch what an earlier attempt and other jobs have left, start to upload.

        Raises:
            StoreError, OSError
        """
        job = self.job
        job.folder.mkdir(parents=True, exist_ok=True)
        cfg.run.dir = str(job.folder)
        if self.publisher and cfg.mode == "train":
            fetch_run(job.output, job.folder)
            self._models = Folder(job.output).below("checkpoints").names()
            self.publisher.keep = cfg.checkpoint.keep
        if is_remote(job.checkpoint):
            place, name = Folder.split(job.checkpoint)
            target = job.folder / "inputs" / name
            place.download(name, target)
            cfg.checkpoint.path = str(target)
        (job.folder / CONFIG_NAMES[cfg.mode]).write_bytes(job.text)
        for note in job.notes:
            print(f"job: {note}")
        if self.publisher:
            print(f"job {job.id}: results go to {job.output} (and {job.folder})", flush=True)
            self.publisher.start()

    def finish(self, code: int) -> int:
        """Write `result.json`, upload the rest; returns the exit code."""
        try:
            self._write(code, [])
        except (OSError, ValueError) as e:  # a full disk: what is there is uploaded all the same
            print(f"error: result.json cannot be written: {e}", flush=True)
            code = code or 1
        if not self.publisher:
            return code
        # A scheduler's signal now leaves seconds: they are for what can still be sent.
        publisher = self.publisher
        before = signal.signal(signal.SIGTERM, lambda *_: publisher.hurry(20.0))
        try:
            left = publisher.close(self.patience)
        finally:
            signal.signal(signal.SIGTERM, before)
        if left:
            print(f"error: {len(left)} files could not be uploaded to {self.job.output}: {left[0]}."
                  f" They are in {self.job.folder}.", flush=True)  # fmt: skip
            return code or 1
        return code

    def reject(self, problems: list[str]) -> None:
        """Leave word of a job that cannot be run, where its results were expected."""
        try:
            self.job.folder.mkdir(parents=True, exist_ok=True)
            self._write(2, problems)
        except OSError as e:
            print(f"error: {e}", flush=True)
        if self.publisher:
            self.publisher.close(30.0)

    def _write(self, code: int, problems: list[str]) -> None:
        job, folder = self.job, self.job.folder
        name = job.content.get("name") if isinstance(job.content, dict) else None
        status = {0: "succeeded", 2: "rejected", 130: "interrupted", 143: "interrupted"}
        result: dict[str, Any] = {
            "id": job.id, "name": name, "status": status.get(code, "failed"),
            "exit_code": code, "started": self.started, "finished": _now(),
            "seconds": round(time.monotonic() - self._clock, 1), "node": job.node,
            "output": job.output,
        }  # fmt: skip
        if job.checkpoint:
            result["checkpoint"] = job.checkpoint
        if code not in (0, 130, 143):
            result["error"] = problems or _last_error(folder / "log.txt")
        summary = folder / "summary.json"
        if code == 0 and summary.exists():
            result["summary"] = json.loads(summary.read_text())
        there = {p.name for p in (folder / "checkpoints").glob("model_*.pt")} | {*self._models}
        models = [m for m in (re.fullmatch(r"model_(\d+)\.pt", name) for name in there) if m]
        result["checkpoints"] = [m[0] for m in sorted(models, key=lambda m: int(m[1]))]
        temporary = folder / "result.json.partial"
        temporary.write_text(json.dumps(result, indent=2) + "\n")
        temporary.replace(folder / "result.json")


def _last_error(log: Path) -> list[str]:
    """What the run complained about last."""
    if not log.exists():
        return []
    lines = [line[9:] for line in log.read_text().splitlines()]  # without the time
    starts = [i for i, line in enumerate(lines) if line.startswith("error: ")]
    return lines[starts[-1] :] if starts else []
