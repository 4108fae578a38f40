"""The configuration: every key, its type, unit and meaning, and the checks across keys.

This module imports neither torch, numpy nor a simulator, so that a typing mistake is answered in
a fraction of a second and not after a simulator has booted. `build` turns the plain dictionary
that Hydra composed into a tree of dataclasses and collects *all* mistakes into one `ConfigError`.
The losses' values here are the reference's; `conf/config.yaml` and presets change many of them, and
`python dreamer_isaac.py --cfg` prints what holds.
"""

from __future__ import annotations

import dataclasses
import difflib
import importlib.util
import operator
import typing
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

EMBEDDED_TASKS = (
    "Isaac-Cartpole-v0", "Isaac-Cartpole-RGB-v0", "Isaac-Cartpole-Direct-v0", "Isaac-Ant-v0",
    "Isaac-Ant-Direct-v0", "Isaac-Humanoid-v0", "Isaac-Humanoid-Direct-v0",
)  # fmt: skip
"""Isaac Lab task ids that the embedded simulator ports (`dreamer_isaac/envs/tasks`)."""

MJLAB_PREFIX = "Mjlab-"
"""mjlab's own task ids all start with this; which of them exist only mjlab itself knows."""

SIZES = ("tiny", "1m", "12m", "25m", "50m", "100m", "200m", "400m")


class ConfigError(ValueError):
    """One or more mistakes in the configuration; the message has a line for each."""

    def __init__(self, problems: list[str]):
        self.problems = problems
        head = (
            "The configuration has a mistake:"
            if len(problems) == 1
            else (f"The configuration has {len(problems)} mistakes:")
        )
        super().__init__("\n".join([head, *(f"  - {p}" for p in problems)]))


def key(name: str | None = None, doc: str = "", **kwargs: Any) -> Any:
    """A dataclass field whose key in the file may differ from the attribute (`env.import`)."""
    return field(metadata={"key": name, "doc": doc}, **kwargs)


@dataclass
class EnvConfig:
    """What is simulated."""

    name: str = "Isaac-Cartpole-v0"
    """Task id: an Isaac Lab id, or an id that mjlab or `env.import` registers."""
    backend: Literal["auto", "isaaclab", "mjlab", "toy"] = "auto"
    """`auto` takes Isaac Lab where it can be imported and mjlab otherwise; `toy` is for tests."""
    num_envs: int = 256
    """Parallel environments N, evaluation rows included."""
    seed: int = 0
    """Seeds the simulator, the networks, the noise and the replay sampler."""
    device: str = "auto"
    """Where the simulator and the acting policy run: `auto`, `cpu`, `cuda`, `cuda:1`, ..."""
    from_pixels: Literal["auto", "true", "false"] = "auto"
    """Learn from cameras. `auto`: where the task has some of its own, or `cameras` names some."""
    pixels_only: bool = True
    """With `from_pixels`: without the task's own observation, or together with it."""
    image_size: int = 64
    """Height and width of a picture; a multiple of 16."""
    cameras: dict[str, Any] = field(default_factory=dict)
    """Cameras to add to the scene: a named pose (`rear`, `side`, `top`; `env.cameras=[rear,top]` is
    short for `env.cameras.rear=rear env.cameras.top=top`), or `env.cameras.NAME.position=[x,y,z]`
    with `.target=[x,y,z]`, metres from the robot's root along the world's axes, and `.fov`,
    degrees. Empty: the task's own cameras, or `side` where it has none. Several cameras are
    channels of one picture."""
    physics: str = "auto"
    """Isaac Lab 3.x: the physics engine, `newton_mjwarp`, `physx`, ... `auto`: the task's default
    where Isaac Sim is installed, Newton otherwise."""
    import_: str = key("import", default="")
    """A module to import first, e.g. `my_pkg.tasks`, which registers the user's own tasks."""
    action_bound: float = 1.0
    """What an action of 1 is in the simulator's units (both simulators declare unbounded actions).
    Policies act in [-1, 1] and are clipped there; replay holds that, exported policies the
    simulator's units."""
    cfg: dict[str, Any] = field(default_factory=dict)
    """Fields of the task's own configuration by path, e.g. `env.cfg.rewards.alive.weight=0.7`."""


@dataclass
class CollectorConfig:
    """How experience is gathered."""

    kind: Literal["auto", "sync", "thread"] = "auto"
    """`sync` collects and learns in turn; `thread` collects in a background thread without pause.
    `auto`: `thread` where simulator and learner have a GPU each. `collector=thread` is short for
    `collector.kind=thread`."""
    frames_per_batch: int = 4096
    """Frames (env steps, summed over envs) between two visits of the learner."""
    init_random_frames: int = 16384
    """Frames with uniformly random actions before the policy acts and the learner learns."""
    total_frames: int = 500_000
    """The run ends here. Counts the steps of all `env.num_envs`, evaluation rows included."""


@dataclass
class CompileConfig:
    """How the learner's update is executed; the results are the same. `auto`: on a GPU."""

    enabled: Literal["auto", "true", "false"] = "auto"
    """Compile the time steps of the loops and what lies between them (torch.compile)."""
    cudagraph: Literal["auto", "true", "false"] = "auto"
    """Capture the whole update in one CUDA graph. `true` needs a GPU."""
    kernels: Literal["auto", "true", "false"] = "auto"
    """Triton kernels of our own: Dreamer V3's recurrence, where they fit the model and there are no
    more than 32 sequences in a batch, its lambda returns, and V1's GRU. `true` needs a GPU."""
    helpers: Literal["auto", "true", "false"] = "auto"
    """Where the compilers' cache does not have the update yet: two more processes compile parts of
    it, on the GPU, with memory of their own. `auto`: with 8 CPU cores or more."""


@dataclass
class OptimizationConfig:
    """The learner."""

    lr: float = 4e-5
    """Learning rate after warm-up."""
    warmup_updates: int = 1000
    """Updates over which the learning rate rises linearly from 0."""
    anneal: float = 0.0
    """Part of the run's updates, at its end, over which the learning rate falls linearly to 0. The
    last policy is then an average of what the policies before it were, and not a lucky or unlucky
    one of them. 0: the rate stays, as in the reference."""
    agc: float = 0.3
    """Adaptive gradient clipping: a tensor's gradient norm is at most this times its norm."""
    replay_ratio: float = 32.0
    """Trained steps (batch_size) per collected and stored step: the learner waits for more
    experience rather than exceed it."""
    replay_ratio_floor: float = 0.5
    """With `collector=thread`: the collector waits for the learner rather than let the ratio fall
    below this part of `replay_ratio`; 0 lets it run freely. Between the two the ratio is what the
    learner manages (column `replay_ratio`); what is missing at the end is not made up."""
    max_updates: int = 0
    """End the run after so many updates; 0 means no limit."""
    autocast: Literal["bfloat16", "float16", "false"] = "false"
    """Precision of the networks in the update; weights, losses and optimiser stay float32."""
    compile: CompileConfig = field(default_factory=CompileConfig)
    device: str = "auto"
    """Where the learner and the replay buffer live."""
    num_threads: int = 0
    """CPU threads of torch; 0 leaves torch's own choice."""


@dataclass
class ReplayConfig:
    """The replay buffer."""

    size: int = 1_000_000
    """Capacity in records (one record = one step of one env)."""
    batch_size: int = 1024
    """Trained steps per update, B x T: a multiple of `batch_length`."""
    batch_length: int = 64
    """Trained steps T of one slice. One more record in front of them gives the context."""
    gpu_storage: bool = True
    """Store on the learner's device (true) or in main memory (false)."""


@dataclass
class ModelConfig:
    """Sizes of the networks; `size=` chooses a preset, single keys can be changed."""

    size: Literal["tiny", "1m", "12m", "25m", "50m", "100m", "200m", "400m", "v1"] = "12m"
    latent: Literal["categorical", "gaussian"] = "categorical"
    """Stochastic state: categorical with two-hot heads (Dreamer V3) or gaussian with plain ELU
    networks (V1)."""
    gaussian: int = 30
    """Components of the gaussian state."""
    belief: int = 2048
    """D: width of the deterministic state."""
    hidden: int = 256
    """Width of the projections around the recurrent core."""
    categoricals: int = 32
    """S: categorical variables of the stochastic state."""
    classes: int = 16
    """K: classes of each."""
    blocks: int = 8
    """Blocks of the block-diagonal GRU; divides `belief`."""
    units: int = 256
    """Width of encoder, decoder, heads, actor and critic."""
    cnn_depth: int = 16
    """Channels of the picture encoder's first stage are twice this (V1: this)."""
    encoder_layers: int = 3
    decoder_layers: int = 3
    head_layers: int = 1
    actor_layers: int = 3
    critic_layers: int = 3
    bins: int = 255
    """Bins of the two-hot reward and value heads."""
    unimix: float = 0.01
    """Uniform share mixed into every categorical."""


@dataclass
class AlgoConfig:
    """The losses. Defaults are DreamerV3's (Hafner et al. 2023, arXiv 2301.04104, and its code);
    `algo=dreamer_v1` is a preset with the first Dreamer's (2019, arXiv 1912.01603), which has no
    use for the keys in `V3_ONLY`; a run that changes one of them is refused, as is one of
    DreamerV3 that changes one in `V1_ONLY`."""

    name: Literal["dreamer_v3", "dreamer_v1"] = "dreamer_v3"
    horizon: int = 15
    """H: imagined steps."""
    discount_horizon: float = 333.0
    """Discount 1 - 1/this, folded into the continue target."""
    lmbda: float = 0.95
    reward_multiplier: float = 0.0
    """The learner sees rewards times this; 0 means reward per second, 1 / step_dt, where the
    simulator multiplies rewards by the step's duration, and 1 where it does not (Direct tasks).
    Managers of Isaac Lab and mjlab do, which makes rewards about 0.01, and the two-hot
    heads' bins are 0.16 apart around zero: too coarse to tell such rewards from each other. Logs
    and evaluations are always in the env's own units."""
    free_nats: float = 1.0
    dyn_scale: float = 1.0
    rep_scale: float = 0.1
    reconstruction_scale: float = 1.0
    reward_scale: float = 1.0
    continue_scale: float = 1.0
    actor_scale: float = 1.0
    critic_scale: float = 1.0
    replay_critic_scale: float = 0.3
    entropy: float = 3e-4
    slow_critic_rate: float = 0.02
    """The slow critic moves this fraction towards the critic after every update."""
    slow_critic_scale: float = 1.0
    return_norm_rate: float = 0.01
    return_norm_low: float = 0.05
    return_norm_high: float = 0.95
    return_norm_min: float = 1.0
    """The return's percentile range is never taken smaller than this."""
    exploration_noise: float = 0.0
    """Standard deviation of the noise added to the training rows' actions (V1: 0.3; V3's policy is
    noisy by itself)."""
    lr_actor: float = 8e-5
    """V1 only: the actor's learning rate; `optimization.lr` is the world model's."""
    lr_critic: float = 8e-5
    """V1 only."""
    grad_clip: float = 100.0
    """V1 only: norm to which the gradients of model, actor and critic are clipped, each."""
    actor_min_std: float = 0.1
    actor_max_std: float = 1.0


V3_ONLY = (
    "algo.entropy", "algo.actor_min_std", "algo.actor_max_std", "algo.return_norm_rate",
    "algo.return_norm_low", "algo.return_norm_high", "algo.return_norm_min",
    "algo.slow_critic_rate", "algo.slow_critic_scale", "algo.rep_scale", "algo.continue_scale",
    "algo.replay_critic_scale", "optimization.agc",
)  # fmt: skip
V1_ONLY = ("algo.lr_actor", "algo.lr_critic", "algo.grad_clip")


@dataclass
class EvaluationConfig:
    """Deterministic episodes."""

    num_envs: int = 16
    """Rows of `env.num_envs` that always act deterministically and never reach the replay
    buffer; 0 for none. Their returns are the line 'deterministic' of the learning curve."""
    episodes: int = 64
    """Episodes of the final evaluation (and of `mode=evaluate`), at least; every env plays the
    same number."""
    max_steps: int = 0
    """Episodes of `mode=evaluate` and of the final evaluation are cut off after so many steps, if
    not before (Direct tasks end a step earlier, as they do by themselves); 0: the task's own
    length."""
    final: bool = True
    """Evaluate at the end of a training run."""
    policy: Literal["trained", "random", "zero"] = "trained"
    """Whose actions `mode=evaluate` plays; `random` and `zero` are the baselines."""
    video: bool = True
    """Write `videos/*.mp4`."""
    video_seconds: float = 12.0
    """Longest video, in seconds of simulated time."""
    video_envs: int = 4
    """Envs in the video, side by side."""
    open_loop_steps: int = 50
    """Steps that the world model is asked to predict without seeing anything."""


@dataclass
class CheckpointConfig:
    """Saving and resuming."""

    path: str = ""
    """`mode=evaluate`, `mode=export`: a run folder, or one checkpoint in it. `checkpoint=X` is
    short for it."""
    interval_frames: int = 100_000
    """Frames between two checkpoints."""
    keep: int = 3
    """Newest checkpoints kept."""
    models: bool = False
    """At every checkpoint also write `checkpoints/model_<updates>.pt`: the networks and what is
    needed to run them in one file, never removed. `mode=evaluate` and `mode=export` read it."""
    replay: bool = False
    """Save the replay buffer too. Without it a resumed run refills it before it trains."""
    exact: bool = False
    """Save everything (simulator, generators, replay, ...), so that on a CPU a stopped and resumed
    run ends with the same bits as one that never stopped."""
    init_from: str = ""
    """Another run (folder or checkpoint) to take weights from; the optimiser starts fresh."""
    init_modules: list[str] = field(default_factory=lambda: ["all"])
    """Which modules `init_from` takes: `all`, or some of encoder, rssm, decoder, reward,
    continuation, actor, critic."""


@dataclass
class LoggerConfig:
    """`metrics.csv` is always written; `backend` adds to it."""

    backend: Literal["csv", "tensorboard", "wandb"] = "csv"
    mode: Literal["online", "offline", "disabled"] = "offline"
    """Weights & Biases only."""
    project: str = "dreamer_isaac"
    interval_frames: int = 16_384
    """Frames between two rows of metrics."""


@dataclass
class AssetsConfig:
    """Isaac Lab's assets from a local mirror (scripts/download_assets.py fills it)."""

    offline: bool = False
    """Take every asset from the mirror; `--offline` is short for it."""
    root: str = "offline_assets"
    """The mirror."""
    strict: bool = False
    """Never ask the server for what the mirror lacks; missing assets are an error at the start."""


@dataclass
class ProfilingConfig:
    """Where the time goes."""

    enabled: bool = False
    """Write `profile/phases.md` and `profile/trace.json.gz` for one window between two log points;
    the run is a little slower in it."""
    updates: int = 20
    """Updates in the trace."""


@dataclass
class JobConfig:
    """A job file of a pipeline (docs/jobs.md)."""

    path: str = ""
    """A JSON file or a URL of one (`s3://bucket/path.json`). `job=X` is short for it."""
    id: str = ""
    """Name of the job's output folder. The same id goes on with what is there. Empty: the
    scheduler's id of this job, or a new one."""
    output: str = ""
    """Folder or URL below which that folder is made. Empty: the asset that the job file lies in."""
    root: str = ""
    """The asset's topmost folder, up to which a job's checkpoint is looked for. Empty: two folders
    above the job file's."""


@dataclass
class RunConfig:
    """Where results go."""

    dir: str = ""
    """The run folder. Empty: `runs/<task>/<date>-<time>`. The same command on the same folder
    resumes the run."""


@dataclass
class Config:
    """The whole configuration."""

    mode: Literal["train", "evaluate", "export"] = "train"
    env: EnvConfig = field(default_factory=EnvConfig)
    collector: CollectorConfig = field(default_factory=CollectorConfig)
    optimization: OptimizationConfig = field(default_factory=OptimizationConfig)
    replay_buffer: ReplayConfig = field(default_factory=ReplayConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    algo: AlgoConfig = field(default_factory=AlgoConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    logger: LoggerConfig = field(default_factory=LoggerConfig)
    profiling: ProfilingConfig = field(default_factory=ProfilingConfig)
    assets: AssetsConfig = field(default_factory=AssetsConfig)
    job: JobConfig = field(default_factory=JobConfig)
    run: RunConfig = field(default_factory=RunConfig)


# -- from a plain dictionary to the dataclasses -------------------------------------------------


def field_keys(cls: type) -> dict[str, dataclasses.Field]:
    """The keys of one section as they are written in files and overrides."""
    return {f.metadata.get("key") or f.name: f for f in dataclasses.fields(cls)}


def known_paths(cls: type = Config, prefix: str = "") -> list[str]:
    """Every settable path, e.g. `env.num_envs`; `env.cfg` stands for everything below it."""
    paths: list[str] = []
    hints = typing.get_type_hints(cls)
    for name, f in field_keys(cls).items():
        kind = hints[f.name]
        if dataclasses.is_dataclass(kind):
            paths += known_paths(typing.cast(type, kind), f"{prefix}{name}.")
        else:
            paths.append(prefix + name)
    return paths


def unknown_key(path: str) -> str:
    """The message for a key that does not exist, with the nearest that do."""
    paths = known_paths()
    last = path.rsplit(".", 1)[-1]
    near = [p for p in paths if p.rsplit(".", 1)[-1] == last][:4]  # lr=... for optimization.lr=...
    near = near or difflib.get_close_matches(path, paths, n=3, cutoff=0.6)
    if not near:
        section = path.split(".")[0]
        near = [p for p in paths if p.startswith(section + ".")] or sorted(
            {p.split(".")[0] for p in paths}
        )
    return f"unknown key '{path}'. Known, among others: {', '.join(near)}."


def _convert(value: Any, kind: Any, path: str, problems: list[str]) -> Any:
    """`value` as `kind`, or a line in `problems`."""
    origin = typing.get_origin(kind)
    if dataclasses.is_dataclass(kind):
        return _section(value, typing.cast(type, kind), path + ".", problems)
    if origin is Literal:
        allowed = typing.get_args(kind)
        text = str(value).lower() if isinstance(value, bool) else value
        if isinstance(text, int | float):
            text = str(text)
        if text not in allowed:
            problems.append(f"{path}={value!r}: allowed are {', '.join(map(str, allowed))}.")
            return allowed[0]
        return text
    if origin is list:
        if not isinstance(value, list) or not all(isinstance(v, str) for v in value):
            problems.append(f"{path}={value!r}: must be a list of names, e.g. {path}=[rssm,actor].")
            return []
        return value
    if origin is dict:
        if not isinstance(value, dict):
            problems.append(f"{path}={value!r}: must be a mapping, e.g. {path}.decimation=4.")
            return {}
        return value
    if kind is bool and isinstance(value, bool):
        return value
    if kind is int and not isinstance(value, bool):
        if isinstance(value, int):
            return value
        if isinstance(value, float) and value.is_integer():  # 1e6 is a float to YAML
            return int(value)
    if kind is float and isinstance(value, int | float) and not isinstance(value, bool):
        return float(value)
    if kind is str and isinstance(value, str | int | float):
        return str(value)
    words = {bool: "true or false", int: "a whole number", float: "a number", str: "a text"}
    problems.append(f"{path}={value!r}: must be {words.get(kind, kind)}.")
    return kind() if isinstance(kind, type) else value


def _section(value: Any, cls: type, prefix: str, problems: list[str]) -> Any:
    if not isinstance(value, dict):
        problems.append(f"{prefix[:-1]}={value!r}: must be a section with keys.")
        return cls()
    hints = typing.get_type_hints(cls)
    keys = field_keys(cls)
    kwargs = {}
    for name, item in value.items():
        if name not in keys:
            problems.append(unknown_key(prefix + str(name)))
            continue
        f = keys[name]
        kwargs[f.name] = _convert(item, hints[f.name], prefix + name, problems)
    return cls(**kwargs)


def build(raw: dict[str, Any], stored: bool = False) -> Config:
    """The typed and checked configuration.

    Args:
        stored: it is a checkpoint's. It was checked when its run began, where another simulator may
            have been installed.

    Raises:
        ConfigError: with one line for every unknown key, wrong type, and contradiction.
    """
    problems: list[str] = []
    cfg = _section(raw, Config, "", problems)
    if f"{cfg.env.name}-v0" in EMBEDDED_TASKS and not cfg.env.import_:  # as Isaac Lab 3.x has it
        cfg.env.name += "-v0"
    if stored:  # of a version that took them, and overruled them
        cfg.env.cfg = {k: v for k, v in cfg.env.cfg.items() if k != "seed"}
        for section, key in (("scene", "num_envs"), ("sim", "device")):
            inner = cfg.env.cfg.get(section)
            if isinstance(inner, dict):
                cfg.env.cfg[section] = {k: v for k, v in inner.items() if k != key}
                if not cfg.env.cfg[section]:
                    del cfg.env.cfg[section]
    if not problems and not stored:
        problems += contradictions(cfg)
    if problems:
        raise ConfigError(problems)
    return cfg


def merged(below: dict[str, Any], above: dict[str, Any]) -> dict[str, Any]:
    """Nested mappings in one; where both have a value, `above`'s."""
    out = dict(below)
    for key, value in above.items():
        old = out.get(key)
        if isinstance(old, dict) and isinstance(value, dict):
            value = merged(old, value)
        out[key] = value
    return out


def leaves(nested: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """The values of nested mappings by dotted path."""
    out: dict[str, Any] = {}
    for name, value in nested.items():
        inner = isinstance(value, Mapping) and value  # an empty one is a value
        out |= leaves(value, f"{prefix}{name}.") if inner else {prefix + str(name): value}
    return out


def to_dict(cfg: Any) -> Any:
    """The reverse of `build`: plain values under the keys as the user writes them."""
    if dataclasses.is_dataclass(cfg):
        return {k: to_dict(getattr(cfg, f.name)) for k, f in field_keys(type(cfg)).items()}
    if isinstance(cfg, dict):
        return {k: to_dict(v) for k, v in cfg.items()}
    return cfg


def module_exists(name: str) -> bool:
    """Whether a top-level module could be imported, without importing it."""
    try:
        return importlib.util.find_spec(name) is not None
    except (ImportError, ValueError):
        return False


def isaaclab_available() -> bool:
    """Isaac Lab is usable: the package *and* a simulator under it.

    The wheel alone, without Isaac Sim (2.x) or Newton (3.x), imports up to a point and then fails,
    so the package being there is not enough.
    """
    return module_exists("isaaclab") and (module_exists("isaacsim") or module_exists("newton"))


def contradictions(cfg: Config) -> list[str]:
    """Values that are well typed but impossible, alone or together: one line each."""
    out: list[str] = []

    def need(ok: bool, line: str) -> None:
        if not ok:
            out.append(line)

    env, col, rb, opt, ev, ck = (
        cfg.env, cfg.collector, cfg.replay_buffer, cfg.optimization, cfg.evaluation,
        cfg.checkpoint,
    )  # fmt: skip
    for path, value in (
        ("env.num_envs", env.num_envs),
        ("env.action_bound", env.action_bound),
        ("collector.frames_per_batch", col.frames_per_batch),
        ("collector.total_frames", col.total_frames),
        ("replay_buffer.size", rb.size),
        ("replay_buffer.batch_size", rb.batch_size),
        ("replay_buffer.batch_length", rb.batch_length),
        ("optimization.lr", opt.lr),
        ("optimization.replay_ratio", opt.replay_ratio),
        ("algo.horizon", cfg.algo.horizon),
        ("evaluation.episodes", ev.episodes),
        ("evaluation.open_loop_steps", ev.open_loop_steps),
        ("evaluation.video_envs", ev.video_envs),
        ("checkpoint.interval_frames", ck.interval_frames),
        ("checkpoint.keep", ck.keep),
        ("logger.interval_frames", cfg.logger.interval_frames),
        ("model.blocks", cfg.model.blocks),
        ("profiling.updates", cfg.profiling.updates),
    ):
        need(value > 0, f"{path}={value}: must be above 0.")
    for path, value in (
        ("env.seed", env.seed),
        ("collector.init_random_frames", col.init_random_frames),
        ("evaluation.num_envs", ev.num_envs),
        ("algo.reward_multiplier", cfg.algo.reward_multiplier),
        ("optimization.warmup_updates", opt.warmup_updates),
        ("optimization.max_updates", opt.max_updates),
        ("optimization.num_threads", opt.num_threads),
        ("evaluation.max_steps", ev.max_steps),
    ):
        need(value >= 0, f"{path}={value}: must be 0 or more.")
    if out:
        return out

    need(0 <= opt.anneal <= 1, f"optimization.anneal={opt.anneal}: must be in [0, 1].")
    need((cfg.algo.name == "dreamer_v1") == (cfg.model.latent == "gaussian"),
         f"algo.name={cfg.algo.name} does not go with model.latent={cfg.model.latent}. Remedy: "
         "algo=dreamer_v1 or algo=dreamer_v3, which set both.")  # fmt: skip
    need(cfg.algo.discount_horizon > 1, "algo.discount_horizon must be above 1 (steps).")
    need(0 < cfg.model.unimix < 1, f"model.unimix={cfg.model.unimix}: must be in (0, 1); without "
         "a uniform share a class that is never drawn has a probability of 0.")  # fmt: skip
    need(rb.batch_length > 1, f"replay_buffer.batch_length={rb.batch_length}: must be 2 or more.")
    if cfg.model.latent == "categorical":
        lower = cfg.model.belief // cfg.model.blocks * cfg.model.blocks or cfg.model.blocks
        need(lower == cfg.model.belief, f"model.belief={cfg.model.belief} is no multiple of "
             f"model.blocks={cfg.model.blocks}. Remedy: model.belief={lower}.")  # fmt: skip
        need(cfg.model.encoder_layers > 0, "model.encoder_layers=0: must be 1 or more.")
    need(
        2 <= cfg.model.classes <= 256,
        f"model.classes={cfg.model.classes}: must be 2 to 256 (replay stores a class in a byte).",
    )
    need(0 <= opt.replay_ratio_floor <= 1, f"optimization.replay_ratio_floor="
         f"{opt.replay_ratio_floor}: must be in [0, 1].")  # fmt: skip
    need(not (ck.exact and col.kind == "thread"), "checkpoint.exact=true needs collector=sync: two "
         "threads meet at other moments in every run.")  # fmt: skip
    if cfg.mode == "train":
        out += _training_contradictions(cfg)
        need(not ck.path, f"checkpoint={ck.path} is read by mode=evaluate and mode=export; to "
             "resume a run set run.dir=<its folder>, to start from its weights "
             "checkpoint.init_from=<its folder>.")  # fmt: skip
        need(ev.policy == "trained", f"evaluation.policy={ev.policy} needs mode=evaluate.")
    elif cfg.mode == "export":
        need(bool(ck.path), "mode=export needs checkpoint=<run folder or checkpoint>.")
    elif ev.policy == "trained":
        need(bool(ck.path), "mode=evaluate needs checkpoint=<run folder or checkpoint>, or "
             "evaluation.policy=random | zero for a baseline.")  # fmt: skip
    allowed = {"all", "encoder", "rssm", "decoder", "reward", "continuation", "actor", "critic"}
    for name in ck.init_modules:
        need(name in allowed, f"checkpoint.init_modules: unknown '{name}'; allowed are "
             f"{', '.join(sorted(allowed))}.")  # fmt: skip
    out += _camera_contradictions(cfg)
    ours = {"scene.num_envs": "env.num_envs", "seed": "env.seed", "sim.device": "env.device"}
    for path in leaves(env.cfg):
        need(path not in ours, f"env.cfg.{path}: set from {ours.get(path)}. Remedy: that key.")
    if cfg.mode != "export":  # which starts no simulator
        out += task_problems(env)
    return out


def _camera_contradictions(cfg: Config) -> list[str]:
    from dreamer_isaac.cameras import poses

    env, out = cfg.env, []
    if env.image_size <= 0 or env.image_size % 16:
        near = max(16, round(env.image_size / 16) * 16)
        out.append(f"env.image_size={env.image_size}: must be a multiple of 16 (the networks halve "
                   f"a picture four times). Remedy: env.image_size={near}.")  # fmt: skip
    if cfg.algo.name == "dreamer_v1" and env.image_size != 64:
        out.append(f"env.image_size={env.image_size}: the first Dreamer's networks take 64. "
                   "Remedy: env.image_size=64, or algo=dreamer_v3.")  # fmt: skip
    if env.cameras and env.from_pixels == "false":
        out.append("env.cameras without env.from_pixels. Remedy: env.from_pixels=true.")
    try:
        poses(env.cameras)
    except ValueError as e:
        out += str(e).splitlines()
    return out


def _training_contradictions(cfg: Config) -> list[str]:
    out: list[str] = []
    env, col, rb, ev = cfg.env, cfg.collector, cfg.replay_buffer, cfg.evaluation
    train_envs = env.num_envs - ev.num_envs
    if train_envs < 1:
        return [
            f"evaluation.num_envs={ev.num_envs} leaves no env for training of env.num_envs="
            f"{env.num_envs}. Remedy: evaluation.num_envs={env.num_envs // 4} or less."
        ]
    for path in V3_ONLY if cfg.algo.name == "dreamer_v1" else V1_ONLY:
        value, default = (operator.attrgetter(path)(c) for c in (cfg, Config()))
        if value != default:
            out.append(f"{path}={value}: algo={cfg.algo.name} has no use for it. Remedy: leave it "
                       "out.")  # fmt: skip
    if rb.batch_size % rb.batch_length:
        lower = rb.batch_size // rb.batch_length * rb.batch_length or rb.batch_length
        out.append(
            f"replay_buffer.batch_size={rb.batch_size} is no multiple of replay_buffer."
            f"batch_length={rb.batch_length}. Remedy: replay_buffer.batch_size={lower}."
        )
    if col.total_frames <= col.init_random_frames:
        out.append(
            f"collector.total_frames={col.total_frames} ends the run before its first update, "
            f"which comes after collector.init_random_frames={col.init_random_frames}. "
            "Remedy: more frames, or fewer random ones."
        )
    least = rb.batch_length * env.num_envs
    if col.init_random_frames < least:
        out.append(
            f"collector.init_random_frames={col.init_random_frames} fills less than one slice: "
            f"replay_buffer.batch_length * env.num_envs = {rb.batch_length} * {env.num_envs} = "
            f"{least}. Remedy: collector.init_random_frames={least} or more, fewer envs, or "
            "shorter slices."
        )
    smallest = max((rb.batch_length + 1) * train_envs, rb.batch_size)
    if rb.size < smallest:
        out.append(
            f"replay_buffer.size={rb.size} cannot hold one batch: it needs (batch_length + 1) * "
            f"training envs = {(rb.batch_length + 1) * train_envs} and batch_size = "
            f"{rb.batch_size} records. Remedy: replay_buffer.size={smallest} or more."
        )
    if col.frames_per_batch % env.num_envs:
        near = max(1, round(col.frames_per_batch / env.num_envs)) * env.num_envs
        out.append(
            f"collector.frames_per_batch={col.frames_per_batch} is no multiple of env.num_envs="
            f"{env.num_envs}. Remedy: collector.frames_per_batch={near}."
        )
    elif col.frames_per_batch // env.num_envs > rb.size // train_envs:
        out.append(
            f"collector.frames_per_batch={col.frames_per_batch} is more than the replay buffer "
            f"holds (replay_buffer.size={rb.size}). Remedy: fewer frames per batch."
        )
    return out


def task_problems(env: EnvConfig) -> list[str]:
    """Refuse an id that nothing here could know; leave the rest to the simulator."""
    if env.backend in ("isaaclab", "toy") or env.import_ or env.name.startswith(MJLAB_PREFIX):
        return []
    if env.backend == "auto" and isaaclab_available():
        return []
    if env.name in EMBEDDED_TASKS:
        return []
    near = difflib.get_close_matches(env.name, EMBEDDED_TASKS, n=1)
    hint = f" Did you mean {near[0]}?" if near else ""
    return [
        f"env.name={env.name!r}: the embedded simulator has {', '.join(EMBEDDED_TASKS)} "
        f"and mjlab's own {MJLAB_PREFIX}* tasks (python scripts/list_envs.py lists them)."
        f"{hint} A task of your own needs env.import=<module that registers it>; other Isaac "
        "Lab tasks need Isaac Lab."
    ]
