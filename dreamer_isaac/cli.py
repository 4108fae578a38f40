"""From a command line to a checked configuration and a running program. Imports no torch.

Hydra composes the configuration (defaults, presets, overrides); this module adds what Hydra
leaves out: messages that name the mistake and the remedy, exit code 2 for them, and free paths
below `env.cfg` and `env.cameras`.
"""

from __future__ import annotations

import contextlib
import datetime
import re
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dreamer_isaac.cameras import has_its_own
from dreamer_isaac.config import (
    Config,
    ConfigError,
    build,
    known_paths,
    leaves,
    merged,
    to_dict,
    unknown_key,
)
from dreamer_isaac.jobs.store import StoreError

if TYPE_CHECKING:
    from dreamer_isaac.jobs import Running

CONF = Path(__file__).resolve().parent.parent / "conf"
USAGE = """usage: python dreamer_isaac.py [--offline] [--cfg] [--help] [key=value ...]

  env.name=Isaac-Ant-v0           the task (scripts/list_envs.py lists them)
  size=tiny|1m|12m|...            the size of the networks
  experiment=NAME                 a file of conf/experiment
  run.dir=FOLDER                  results go there; the same command again resumes
  mode=evaluate checkpoint=RUN    deterministic episodes of a trained policy on its task
  mode=export checkpoint=RUN      its policy as ONNX and TorchScript
  job=FILE.json|s3://...          a job file of a pipeline: train or evaluate (docs/jobs.md)
  --offline                       Isaac Lab's assets from a local mirror (assets.offline=true)
  --cfg                           print the configuration and stop

Every key with its meaning: dreamer_isaac/config.py"""


def groups() -> dict[str, list[str]]:
    """The preset groups of conf/ and their choices."""
    return {
        d.name: sorted(p.stem for p in d.glob("*.yaml")) for d in sorted(CONF.iterdir())
        if d.is_dir()
    }  # fmt: skip


def compose(overrides: list[str]) -> Config:
    """Compose conf/config.yaml with `overrides` and check the result.

    Raises:
        ConfigError: naming every mistake that could be found.
    """
    return build(compose_unchecked(overrides))


def compose_unchecked(overrides: list[str]) -> dict[str, Any]:
    """The same without a look at the values: the plain configuration.

    Raises:
        ConfigError: for overrides that name no key or preset.
    """
    from hydra import compose as hydra_compose
    from hydra import initialize_config_dir
    from hydra.core.config_store import ConfigStore
    from hydra.core.global_hydra import GlobalHydra
    from hydra.errors import HydraException
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    overrides = [*_for_cameras(overrides), *_checked_overrides(overrides)]
    ConfigStore.instance().store(name="defaults", node=to_dict(Config()))
    GlobalHydra.instance().clear()
    try:
        with initialize_config_dir(str(CONF), version_base="1.3"):
            raw = OmegaConf.to_container(hydra_compose("config", overrides), resolve=True)
    except (HydraException, OmegaConfBaseException) as e:
        said = " ".join(str(e).split())
        if "--multirun" in said:
            many = ", ".join(o for o in overrides if "," in o)
            said = f"{many}: a key takes one value. Remedy: run once for each."
        raise ConfigError([said]) from None
    assert isinstance(raw, dict)
    return {str(k): v for k, v in raw.items()}


FOR_CAMERAS = (
    "env.num_envs=32", "evaluation.num_envs=4", "collector.frames_per_batch=256",
    "collector.init_random_frames=1024", "replay_buffer.size=100000",
)  # fmt: skip
"""Defaults of a run from pixels: rendering costs more than physics, and records are larger."""


def _for_cameras(overrides: list[str]) -> tuple[str, ...]:
    """`FOR_CAMERAS`, unless the user says how many envs there are, or takes an experiment."""
    given: dict[str, str] = {k: v for k, _, v in (o.partition("=") for o in overrides)}
    if "env.num_envs" in given or "experiment" in given:
        return ()
    asked = given.get("env.from_pixels", "auto")
    named = has_its_own(given.get("env.name", "")) or any(
        k.lstrip("+").startswith("env.cameras") for k in given
    )
    return FOR_CAMERAS if asked == "true" or (asked == "auto" and named) else ()


def _checked_overrides(overrides: list[str]) -> list[str]:
    """Name unknown keys ourselves, and let Hydra add the free paths below `env.cfg`
    and `env.cameras`."""
    paths, choices = set(known_paths()), groups()
    sections = {p.rsplit(".", i)[0] for p in paths for i in range(1, p.count(".") + 1)}
    problems, out = [], []
    for text in overrides:
        name, equals, value = text.partition("=")
        name = name.lstrip("+")
        if not equals or not name:
            problems.append(f"'{text}' is no override; write key=value.")
        elif name == "checkpoint":  # short for checkpoint.path
            out.append(f"checkpoint.path={_quoted(value)}")
        elif name == "collector":  # short for collector.kind
            out.append(f"collector.kind={value}")
        elif name == "job":  # short for job.path
            out.append(f"job.path={_quoted(value)}")
        elif name in ("run.dir", "checkpoint.path", "checkpoint.init_from", "job.path",
                      "job.id", "job.output", "job.root"):  # fmt: skip
            out.append(f"{name}={_quoted(value)}")
        elif name == "env.cameras":  # names of poses
            for pose in filter(None, (v.strip() for v in value.strip("[]'\" ").split(","))):
                out.append(f"++env.cameras.{pose}={pose}")
        elif name.startswith(("env.cfg.", "env.cameras.")):
            out.append("++" + text.lstrip("+"))
        elif name == "model.size":
            problems.append("model.size only says which sizes were taken. Remedy: size=<preset>, "
                            "or single sizes (model.units=...).")  # fmt: skip
        elif name in choices:
            if value not in choices[name]:
                problems.append(f"{text}: allowed are {', '.join(choices[name])}.")
            out.append(text)
        elif name in paths:
            out.append(text)
        elif name in sections:
            problems.append(
                f"'{name}' is a section; set one of its keys: "
                f"{', '.join(sorted(p for p in paths if p.startswith(name + '.')))}."
            )
        else:
            problems.append(unknown_key(name))
    given = {o.partition("=")[0]: o.partition("=")[2] for o in overrides}
    if given.get("algo") == "dreamer_v1" and "size" in given:
        problems.append(
            f"size={given['size']} is one of Dreamer V3's sizes, algo=dreamer_v1 has its own. "
            "Remedy: no size=, and single sizes (model.units=...)."
        )
    if problems:
        raise ConfigError(problems)
    return out


def _quoted(value: str) -> str:
    """A path as Hydra reads it verbatim, whatever signs are in it."""
    if value[:1] in "'\"" and value[:1]:
        return value
    return quoted(value)


def quoted(text: str) -> str:
    """A text as Hydra reads it verbatim: a backslash is one, unless a quote comes after it."""
    return "'" + re.sub(r"(\\+)(?='|$)", r"\1\1", text).replace("'", "\\'") + "'"


def default_run_dir(cfg: Config) -> str:
    now = datetime.datetime.now().strftime("%Y%m%d-%H%M%S")
    label = cfg.env.name if cfg.mode == "train" else f"{cfg.env.name}-{cfg.mode}"
    return str(Path("runs") / label / now)


def claimed(name: str) -> str:
    """That folder, made now, or `<name>-2`, ... where another run has it: two runs may start in one
    second."""
    for i in range(1, 1000):
        path = name if i == 1 else f"{name}-{i}"
        try:
            Path(path).mkdir(parents=True)
        except FileExistsError:
            continue
        except OSError:  # complained about where the run begins
            break
        return path
    return name


class Terminated(KeyboardInterrupt):
    """SIGTERM outside a training loop, which ends in order by itself."""

    code = 128 + signal.SIGTERM


@contextlib.contextmanager
def terminable() -> Iterator[None]:
    """SIGTERM raises `Terminated`, once: `timeout` and schedulers may send it twice."""
    raised = False

    def handle(*_: Any) -> None:
        nonlocal raised
        if not raised:
            raised = True
            raise Terminated

    before = signal.signal(signal.SIGTERM, handle)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def run(argv: list[str]) -> int:
    """Run one command line and return its exit code."""
    if "--help" in argv or "-h" in argv:
        print(USAGE)
        print("\nPresets: " + "; ".join(f"{g}={'|'.join(c)}" for g, c in groups().items()))
        return 0
    flags = [a for a in argv if a.startswith("-")]
    if set(flags) - {"--cfg", "--offline"}:
        print(
            f"error: unknown option {min(set(flags) - {'--cfg', '--offline'})}\n\n{USAGE}",
            file=sys.stderr,
        )
        return 2
    overrides = ["assets.offline=true"] if "--offline" in flags else []
    overrides += [a for a in argv if not a.startswith("-")]
    job: Running | None = None
    try:
        cfg, job = read(overrides)
    except ConfigError as e:
        print(f"error: {e}", file=sys.stderr)
        return 2
    except StoreError as e:
        print(f"error: {e}", file=sys.stderr)
        return 1
    unnamed = not cfg.run.dir
    if unnamed:
        cfg.run.dir = default_run_dir(cfg)
    if "--cfg" in flags:
        print(dump(to_dict(cfg)), end="")
        return 0

    from dreamer_isaac.launch import leave

    if job is None:
        if unnamed:
            cfg.run.dir = claimed(cfg.run.dir)
        with terminable():
            return leave(execute(cfg))
    code = 1
    try:
        with terminable():
            job.prepare(cfg)
            code = execute(cfg)
    except (StoreError, OSError) as e:
        print(f"error: {e}", file=sys.stderr)
    except Terminated as e:  # before the run has begun
        code = e.code
    finally:
        code = job.finish(code)
    return leave(code)


def read(overrides: list[str]) -> tuple[Config, Running | None]:
    """The checked configuration, and the job that it is for, if there is one.

    Raises:
        ConfigError, StoreError
    """
    named = [o.partition("=")[2] for o in overrides if o.startswith(("job=", "job.path="))]
    if not named or not named[-1]:
        return compose([*_task_of_checkpoint(overrides), *overrides]), None
    from dreamer_isaac import jobs

    own = compose_unchecked(overrides)["job"]
    try:
        job = jobs.load(own["path"], own["id"], own["output"], own["root"])
        try:
            cfg = compose(jobs.overrides_of(job, overrides, compose_unchecked))
        except ConfigError as e:
            raise jobs.JobError(e.problems, own["path"], job) from None
    except jobs.JobError as e:
        if e.job and (own["id"] or jobs.scheduled() or jobs.is_remote(e.job.output)):
            jobs.Running(e.job).reject(e.problems)
        raise
    return cfg, jobs.Running(job)


def _task_of_checkpoint(overrides: list[str]) -> list[str]:
    """Overrides with the task that a policy was trained on, where the command line names a
    checkpoint to evaluate or export and no task; and that it sees pictures, by which the number of
    envs goes."""
    from dreamer_isaac import checkpoint

    given: dict[str, str] = {k: v for k, _, v in (o.partition("=") for o in overrides)}
    path = given.get("checkpoint", given.get("checkpoint.path", "")).strip("'\"")
    if given.get("mode") not in ("evaluate", "export") or not path:
        return []
    try:
        env = checkpoint.read_meta(checkpoint.find(path), whole=False)["config"]["env"]
    except checkpoint.CheckpointError:
        return []  # complained about where the log is open
    out = []
    if not {"env.name", "experiment"} & given.keys():
        out.append(f"env.name={env['name']}")
        if env.get("import"):
            out.append(f"env.import={env['import']}")
    if env.get("from_pixels") == "true" and "env.from_pixels" not in given:
        out.append("env.from_pixels=true")
    return out


def execute(cfg: Config) -> int:
    """Start the simulator, then torch, then run; the exit code."""
    from dreamer_isaac import helpers
    from dreamer_isaac.launch import simulator

    as_trained(cfg)
    try:
        if cfg.mode == "train":
            helpers.start(cfg)
        with simulator(cfg) if cfg.mode != "export" else contextlib.nullcontext():
            from dreamer_isaac.main import main  # the first import of torch

            return main(cfg)
    except ConfigError as e:  # of the task, which only its simulator knows
        print(f"error: {e}", file=sys.stderr)
        return 2
    except Terminated as e:
        print("stopped by SIGTERM before the run had begun", file=sys.stderr)
        return e.code
    finally:
        helpers.stop()


def as_trained(cfg: Config) -> str:
    """Evaluation: what the trained policy sees, how far it acts, and the task's changes
    (`env.cfg`, below those of the command line) are as it was trained. Known before the simulator
    starts, which needs to know of cameras. Returns what is not as it was, in words."""
    from dreamer_isaac import checkpoint
    from dreamer_isaac.launch import choose_backend

    if cfg.mode != "evaluate" or cfg.evaluation.policy != "trained":
        return ""
    try:
        meta = checkpoint.read_meta(checkpoint.find(cfg.checkpoint.path), whole=False)
        saved = build(meta["config"], stored=True).env
        backend = choose_backend(cfg)[0]
    except (checkpoint.CheckpointError, ConfigError):
        return ""  # it is looked for again, and complained about, where the log is open
    for name in ("action_bound", "from_pixels", "pixels_only", "image_size", "cameras"):
        setattr(cfg.env, name, getattr(saved, name))
    if (saved.name, meta["task"]["backend"]) == (cfg.env.name, backend):
        cfg.env.cfg = merged(saved.cfg, cfg.env.cfg)
        return ""
    given = leaves(cfg.env.cfg)
    left = {k: v for k, v in leaves(saved.cfg).items() if given.get(k) != v}
    keys = ", ".join(f"env.cfg.{k}={v}" for k, v in left.items())
    where = f"{saved.name} of {meta['task']['backend']}"
    return f"trained on {where} with {keys}, which is not taken over here" if left else ""


def dump(raw: dict[str, Any]) -> str:
    """A configuration as YAML."""
    from omegaconf import OmegaConf

    return OmegaConf.to_yaml(OmegaConf.create(raw))
