"""The Isaac Lab tasks on MuJoCo-Warp, held against Isaac Lab's figures written out by hand."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import mujoco
import pytest
import torch

pytest.importorskip("mjlab")

from mjlab.envs import ManagerBasedRlEnv
from mjlab.tasks.registry import list_tasks, load_env_cfg
from mjlab.utils.lab_api.math import quat_apply, quat_from_euler_xyz

from dreamer_isaac.envs import tasks
from dreamer_isaac.envs.tasks import ant, cartpole, humanoid

DT = 1 / 60
ANT_JOINTS = [
    f"{leg}_{part}"
    for part in ("leg", "foot")
    for leg in ("front_left", "front_right", "left_back", "right_back")
]
ANT_LIMITS_DEG = [(-40, 40)] * 4 + [(30, 100), (-100, -30), (-100, -30), (30, 100)]
HUMANOID_JOINTS = [
    "lower_waist:0",
    "lower_waist:1",
    "right_upper_arm:0",
    "right_upper_arm:2",
    "left_upper_arm:0",
    "left_upper_arm:2",
    "pelvis",
    "right_lower_arm",
    "left_lower_arm",
    "right_thigh:0",
    "right_thigh:1",
    "right_thigh:2",
    "left_thigh:0",
    "left_thigh:1",
    "left_thigh:2",
    "right_shin",
    "left_shin",
    "right_foot:0",
    "right_foot:1",
    "left_foot:0",
    "left_foot:1",
]
HUMANOID_TORQUES = [67.5] * 7 + [45.0] * 2 + [45.0, 135.0, 45.0] * 2 + [90.0] * 2 + [22.5] * 4
HUMANOID_LIMITS_DEG = (
    [(-45, 45), (-75, 30)]
    + [(-90, 70)] * 4
    + [(-35, 35), (-90, 50), (-90, 50)]
    + [(-45, 15), (-120, 45), (-60, 35)] * 2
    + [(-160, 2)] * 2
    + [(-50, 50)] * 4
)


def locomotion_terms(joints: int, feet: int, ang: float, vel: float, force: float) -> list[tuple]:
    return [
        ("base_height", 1, None),
        ("base_lin_vel", 3, None),
        ("base_ang_vel", 3, ang),
        ("base_yaw_roll", 2, None),
        ("base_angle_to_target", 1, None),
        ("base_up_proj", 1, None),
        ("base_heading_proj", 1, None),
        ("joint_pos_norm", joints, None),
        ("joint_vel_rel", joints, vel),
        ("feet_body_forces", 6 * feet, force),
        ("actions", joints, None),
    ]


# id, module, observation, action, joints, torque per unit of action, observation terms, rewards,
# ends
SPEC: dict[str, dict[str, Any]] = {
    "cartpole": dict(
        id="Isaac-Cartpole-v0",
        module=cartpole,
        obs=4,
        joints=["slider_to_cart", "cart_to_pole"],
        torques=[100.0],
        episode_s=5,
        envs=4,
        terms=[("joint_pos_rel", 2, None), ("joint_vel_rel", 2, None)],
        rewards=dict(
            alive=1.0,
            terminating=-2.0,
            pole_pos=-1.0,
            cart_vel=-0.01,
            pole_vel=-0.005,
            success_rate=0.0,
        ),
        ends=["time_out", "cart_out_of_bounds"],
    ),
    "ant": dict(
        id="Isaac-Ant-v0",
        module=ant,
        obs=60,
        joints=ANT_JOINTS,
        torques=[7.5] * 8,
        episode_s=16,
        envs=8,
        terms=locomotion_terms(8, 4, 1.0, 0.2, 0.1),
        rewards=dict(
            progress=1.0,
            alive=0.5,
            upright=0.1,
            move_to_target=0.5,
            action_l2=-0.005,
            energy=-0.05,
            joint_pos_limits=-0.1,
        ),
        ends=["time_out", "torso_height"],
    ),
    "humanoid": dict(
        id="Isaac-Humanoid-v0",
        module=humanoid,
        obs=87,
        joints=HUMANOID_JOINTS,
        torques=HUMANOID_TORQUES,
        episode_s=16,
        envs=21,
        terms=locomotion_terms(21, 2, 0.25, 0.1, 0.01),
        rewards=dict(
            progress=1.0,
            alive=2.0,
            upright=0.1,
            move_to_target=0.5,
            action_l2=-0.01,
            energy=-0.005,
            joint_pos_limits=-0.25,
        ),
        ends=["time_out", "torso_height"],
    ),
}
SPEC["ant"]["terms"][2] = ("base_ang_vel", 3, None)  # the ant's angular velocity is not scaled


class Task:
    """An environment with what the tests write and read, by name."""

    def __init__(self, name: str):
        self.spec = SPEC[name]
        cfg = self.spec["module"].env_cfg()
        cfg.scene.num_envs = self.spec["envs"]
        cfg.seed = 0
        self.env = ManagerBasedRlEnv(cfg, device="cpu")
        self.robot = self.env.scene["robot"]
        self.joints: list[str] = self.spec["joints"]

    def start(self) -> None:
        """Every env at its default pose, at rest, at the start of an episode."""
        self.env.reset(seed=0)
        data = self.robot.data
        self.robot.write_joint_state_to_sim(
            data.default_joint_pos.clone(), torch.zeros_like(data.default_joint_vel)
        )

    def ids(self, names: list[str]) -> list[int]:
        return [list(self.robot.joint_names).index(name) for name in names]

    def set_joint(
        self, name: str, pos: float | None = None, vel: float | None = None, row: int | None = None
    ) -> None:
        rows = slice(None) if row is None else [row]
        all_pos, all_vel = self.robot.data.joint_pos.clone(), self.robot.data.joint_vel.clone()
        column = self.ids([name])[0]
        if pos is not None:
            all_pos[rows, column] = pos
        if vel is not None:
            all_vel[rows, column] = vel
        self.robot.write_joint_state_to_sim(all_pos, all_vel)

    def set_root(
        self,
        pos: tuple[float, float, float],
        rpy: tuple[float, float, float] = (0, 0, 0),
        ang_vel: tuple[float, float, float] = (0, 0, 0),
    ) -> None:
        n = self.env.num_envs
        quat = quat_from_euler_xyz(*(torch.full((n,), float(angle)) for angle in rpy))
        self.robot.write_root_link_pose_to_sim(
            torch.cat([torch.tensor(pos).expand(n, 3), quat], dim=-1)
        )
        self.robot.write_root_link_velocity_to_sim(
            torch.tensor([0.0, 0.0, 0.0, *ang_vel]).expand(n, 6)
        )

    def observe(self, term: str | None = None) -> torch.Tensor:
        self.env.sim.forward()
        obs = self.env.observation_manager.compute(update_history=True)["policy"].clone()
        if term is None:
            return obs
        start = 0
        for name, size, _ in self.spec["terms"]:
            if name == term:
                return obs[:, start : start + size]
            start += size
        raise KeyError(term)

    def reward(self, name: str) -> torch.Tensor:
        term = self.env.reward_manager.get_term_cfg(name)
        return term.func(self.env, **term.params)


@pytest.fixture(scope="module")
def built() -> Iterator[dict[str, Task]]:
    """Environments, made at first use and kept: starting one costs seconds."""
    made: dict[str, Task] = {}
    yield made
    for task in made.values():
        task.env.close()


@pytest.fixture(params=list(SPEC))
def task(request: pytest.FixtureRequest, built: dict[str, Task]) -> Task:
    return _get(built, request.param)


@pytest.fixture
def pole(built: dict[str, Task]) -> Task:
    return _get(built, "cartpole")


@pytest.fixture
def crawler(built: dict[str, Task]) -> Task:
    return _get(built, "ant")


@pytest.fixture
def walker(built: dict[str, Task]) -> Task:
    return _get(built, "humanoid")


@pytest.fixture(params=["ant", "humanoid"])
def runner(request: pytest.FixtureRequest, built: dict[str, Task]) -> Task:
    return _get(built, request.param)


def _get(built: dict[str, Task], name: str) -> Task:
    if name not in built:
        built[name] = Task(name)
    built[name].start()
    return built[name]


# Tables.


def test_register_twice_gives_the_three_ids() -> None:
    tasks.register()
    tasks.register()
    for spec in SPEC.values():
        assert spec["id"] in list_tasks()
        for play in (False, True):
            cfg = load_env_cfg(spec["id"], play=play)
            assert list(cfg.observations) == ["policy"]
            assert {name: term.weight for name, term in cfg.rewards.items()} == spec["rewards"]
            assert cfg.episode_length_s == spec["episode_s"]


def test_dimensions_and_times(task: Task) -> None:
    env, spec = task.env, task.spec
    assert task.observe().shape == (spec["envs"], spec["obs"])
    assert env.action_manager.total_action_dim == len(spec["torques"])
    assert env.physics_dt == 1 / 120 and env.cfg.decimation == 2
    assert env.max_episode_length == math.ceil(spec["episode_s"] / env.step_dt)
    assert env.max_episode_length == 60 * spec["episode_s"]


def test_terms_are_isaac_labs(task: Task) -> None:
    manager = task.env.observation_manager
    names, dims = manager.active_terms["policy"], manager.group_obs_term_dim["policy"]
    scales = [term.scale for term in task.env.cfg.observations["policy"].terms.values()]
    rows = [(name, *dim, scale) for name, dim, scale in zip(names, dims, scales, strict=True)]
    assert rows == task.spec["terms"]
    weights = {n: task.env.reward_manager.get_term_cfg(n).weight for n in task.spec["rewards"]}
    assert weights == task.spec["rewards"]
    assert task.env.reward_manager.active_terms == list(task.spec["rewards"])
    assert task.env.termination_manager.active_terms == task.spec["ends"]


def test_joint_order_is_breadth_first(task: Task) -> None:
    module = task.spec["module"]
    assert list(module.JOINT_NAMES) == task.joints
    model = module._spec().compile()
    level, order = [0], []
    while level:
        children = [
            b for parent in level for b in range(1, model.nbody) if model.body_parentid[b] == parent
        ]
        for body in children:
            first = model.body_jntadr[body]
            names = [model.joint(first + k).name for k in range(model.body_jntnum[body])]
            order += sorted(name for name in names if name != "root")
        level = children
    assert order == task.joints


# Names against columns.


def test_action_column_drives_the_named_joint(task: Task) -> None:
    torques = task.spec["torques"]
    actions = torch.zeros(task.env.num_envs, len(torques))
    actions[: len(torques)] = torch.eye(len(torques))
    task.env.step(actions)
    force = task.robot.data.qfrc_actuator
    for row, torque in enumerate(torques):
        expected = torch.zeros(len(task.joints))
        expected[task.ids([task.joints[row]])] = torque
        torch.testing.assert_close(force[row], expected)


def test_effort_is_limited(crawler: Task) -> None:
    crawler.env.step(torch.full((8, 8), 10.0))
    torch.testing.assert_close(crawler.robot.data.qfrc_actuator, torch.full((8, 8), 15.0))


def test_actions_are_observed_unscaled_in_order(runner: Task) -> None:
    actions = torch.rand(runner.env.num_envs, len(runner.joints))
    runner.env.step(actions)
    torch.testing.assert_close(runner.observe("actions"), actions)


@pytest.mark.parametrize("term", ["pos", "vel"])
def test_observation_column_follows_the_named_joint(task: Task, term: str) -> None:
    columns = {"pos": ("joint_pos_norm", "joint_pos_rel"), "vel": ("joint_vel_rel",)}[term]
    names = [name for name, *_ in task.spec["terms"]]
    column = next(name for name in columns if name in names)
    before = task.observe(column)
    for i, joint in enumerate(task.joints):
        now = task.robot.data.joint_pos[0, task.ids([joint])].item()
        row = i % task.env.num_envs
        task.set_joint(joint, **{term: now + 0.1 if term == "pos" else 0.7}, row=row)
        changed = (task.observe(column) - before).abs() > 1e-6
        assert changed[row].nonzero().flatten().tolist() == [i], joint
        task.start()


@pytest.mark.parametrize(
    "name,limits", [("ant", ANT_LIMITS_DEG), ("humanoid", HUMANOID_LIMITS_DEG)]
)
def test_joint_positions_are_normalized_by_their_limits(
    built: dict[str, Task], name: str, limits: list[tuple[int, int]]
) -> None:
    task = _get(built, name)
    expected = []
    for joint, (low, high) in zip(task.joints, limits, strict=True):
        task.set_joint(joint, pos=math.radians(low + 0.7 * (high - low)))
        expected.append(0.4)
    observed = task.observe("joint_pos_norm")
    torch.testing.assert_close(observed[0], torch.tensor(expected), atol=1e-5, rtol=0)


def test_joint_velocity_scale(runner: Task) -> None:
    runner.set_joint(runner.joints[3], vel=2.0)
    scale = 0.2 if len(runner.joints) == 8 else 0.1
    assert runner.observe("joint_vel_rel")[0, 3].item() == pytest.approx(2.0 * scale)


# Root observations.


def test_root_observations(runner: Task) -> None:
    runner.set_root((3.0, -50.0, 1.5), rpy=(0.3, 0.0, -0.7))
    assert runner.observe("base_height")[0].item() == pytest.approx(1.5)
    torch.testing.assert_close(runner.observe("base_yaw_roll")[0], torch.tensor([-0.7, 0.3]))
    to_target = math.atan2(50.0, 997.0)
    angle = runner.observe("base_angle_to_target")[0].item()
    assert angle == pytest.approx(to_target + 0.7, abs=1e-5)
    assert runner.observe("base_up_proj")[0].item() == pytest.approx(math.cos(0.3), abs=1e-5)
    heading = runner.observe("base_heading_proj")[0].item()
    assert heading == pytest.approx(math.cos(to_target + 0.7), abs=1e-5)


def test_angle_to_target_wraps(crawler: Task) -> None:
    crawler.set_root((0.0, 100.0, 0.5), rpy=(0.0, 0.0, math.pi - 0.01))
    expected = math.atan2(-100.0, 1000.0) - (math.pi - 0.01) + 2 * math.pi
    angle = crawler.observe("base_angle_to_target")[0].item()
    assert angle == pytest.approx(expected, abs=1e-5)


def test_velocity_is_the_centre_of_masss_in_the_roots_frame(walker: Task) -> None:
    walker.set_root((0.0, 0.0, 1.34), rpy=(0.0, 0.0, 0.5 * math.pi), ang_vel=(0.0, 0.0, 2.0))
    torch.testing.assert_close(
        walker.observe("base_ang_vel")[0], torch.tensor([0.0, 0.0, 0.5]), atol=1e-5, rtol=0
    )
    walker.set_root((0.0, 0.0, 1.34), rpy=(0.0, 0.0, 0.5 * math.pi), ang_vel=(0.0, 2.0, 0.0))
    offset = walker.env.sim.mj_model.body("robot/torso").ipos
    # In the root frame the world's y is x: (2, 0, 0) x offset.
    expected = torch.tensor([0.0, -2.0 * offset[2], 2.0 * offset[1]], dtype=torch.float32)
    assert expected.norm() > 0.05
    torch.testing.assert_close(walker.observe("base_lin_vel")[0], expected, atol=1e-5, rtol=0)


def test_nan_reaches_the_observation(task: Task) -> None:
    task.set_joint(task.joints[0], pos=math.nan, row=1)
    bad = task.observe().isnan().any(dim=1)
    assert bad[1] and bad.sum() == 1
    task.env.sim.reset()


# Wrench.


def test_wrench_frame_is_the_joint_frame() -> None:
    for module, axes in (
        (
            ant,
            {
                f"{leg}_foot": [f"{leg}_foot"]
                for leg in ("front_left", "front_right", "left_back", "right_back")
            },
        ),
        (
            humanoid,
            {f"{side}_foot": [f"{side}_foot:0", f"{side}_foot:1"] for side in ("left", "right")},
        ),
    ):
        model = module._spec().compile()
        for body, joint_names in axes.items():
            site = model.site(f"{body}_wrench")
            matrix = torch.empty(9, dtype=torch.float64).numpy()
            mujoco.mju_quat2Mat(matrix, site.quat)
            assert site.bodyid[0] == model.body(body).id
            for axis, joint in enumerate(joint_names):
                column = matrix.reshape(3, 3)[:, axis]
                assert column == pytest.approx(model.joint(joint).axis, abs=1e-4)
                assert site.pos == pytest.approx(model.joint(joint).pos)


def test_standing_ant_stays_up_and_carries_its_weight_on_its_feet(crawler: Task) -> None:
    env = crawler.env
    env.reset(seed=0)
    assert torch.all(crawler.observe("feet_body_forces") == 0)  # nothing is reported before a step
    sites = [crawler.robot.site_names.index(f"{body}_wrench") for body in ant.WRENCH_BODIES]
    vertical = []
    for _ in range(120):
        obs, _, terminated, truncated, _ = env.step(torch.zeros(8, 8))
        assert not terminated.any() and not truncated.any()
        wrench = obs["policy"][:, 28:52].view(8, 4, 6) / 0.1
        quat = crawler.robot.data.site_quat_w[:, sites]
        force = quat_apply(quat.reshape(-1, 4), wrench[..., :3].reshape(-1, 3))
        vertical.append(force.view(8, 4, 3)[..., 2].sum(dim=1))
    assert (crawler.observe("base_height") > 0.31).all()

    # Legs without springs sink until they rest on their limits: the median leaves the impacts out.
    typical = torch.stack(vertical[30:]).median(dim=0).values
    model = env.sim.mj_model
    feet = sum(model.body(f"robot/{body}").mass[0] for body in ant.WRENCH_BODIES)
    carried = (model.body("robot/torso").subtreemass[0] - feet) * 9.81
    # The joint presses the foot down: the wrench is what acts on the foot.
    torch.testing.assert_close(typical, torch.full((8,), -carried), rtol=0.05, atol=0.0)


def test_wrench_columns_follow_the_body_names(runner: Task) -> None:
    bodies = runner.spec["module"].WRENCH_BODIES
    assert [body.removesuffix("_foot") for body in bodies] == (
        ["front_left", "front_right", "left_back", "right_back"]
        if len(bodies) == 4
        else ["right", "left"]
    )
    runner.env.episode_length_buf[:] = 1
    runner.set_root((0.0, 0.0, 5.0))
    driven = [f"{body}:0" if f"{body}:0" in runner.joints else body for body in bodies]
    scale = 0.1 if len(bodies) == 4 else 0.01
    rest = runner.observe("feet_body_forces") / scale
    for i, joint in enumerate(driven):
        # A torque on one ankle alone: the largest change of the torque about x is at its own foot.
        runner.robot.data.data.qfrc_applied[:] = 0
        dof = int(runner.robot.data.indexing.joint_v_adr[runner.ids([joint])])
        runner.robot.data.data.qfrc_applied[:, dof] = 5.0
        change = ((runner.observe("feet_body_forces") / scale) - rest).view(-1, len(bodies), 6)
        runner.robot.data.data.qfrc_applied[:] = 0
        for part in (change[..., :3], change[..., 3:]):
            assert part.norm(dim=-1).argmax(dim=1).tolist() == [i] * runner.env.num_envs


def test_ant_never_touches_itself_and_humanoid_legs_touch() -> None:
    def collide(model: mujoco.MjModel, first: str, second: str) -> bool:
        a, b = model.geom(first), model.geom(second)
        return bool(a.contype[0] & b.conaffinity[0] or b.contype[0] & a.conaffinity[0])

    model = ant._spec().compile()
    names = [model.geom(i).name for i in range(model.ngeom)]
    assert not any(collide(model, a, b) for a in names for b in names)
    model = humanoid._spec().compile()
    assert collide(model, "left_shin", "right_shin") and collide(model, "left_hand", "pelvis")
    assert not collide(model, "left_shin", "left_thigh")


# Rewards.


def test_cartpole_rewards(pole: Task) -> None:
    pole.set_joint("slider_to_cart", pos=1.0, vel=-3.0)
    pole.set_joint("cart_to_pole", pos=2 * math.pi + 0.3, vel=2.0)
    assert pole.reward("pole_pos")[0].item() == pytest.approx(0.09, abs=1e-5)
    pole.env.termination_manager.compute()
    total = pole.env.reward_manager.compute(dt=pole.env.step_dt)
    expected = DT * (1.0 - 0.09 - 0.01 * 3.0 - 0.005 * 2.0)
    assert total[0].item() == pytest.approx(expected, abs=1e-6)
    pole.set_joint("slider_to_cart", pos=3.01)
    pole.env.termination_manager.compute()
    total = pole.env.reward_manager.compute(dt=pole.env.step_dt)
    expected = DT * (-2.0 - 0.09 - 0.01 * 3.0 - 0.005 * 2.0)
    assert total[0].item() == pytest.approx(expected, abs=1e-6)


def test_progress_reward_and_its_start(runner: Task) -> None:
    term = runner.env.reward_manager.get_term_cfg("progress").func
    # No refresh between writing and reading: the term must see the pose that the reset wrote.
    runner.set_root((0.0, 0.0, 50.0))
    term.reset(torch.arange(runner.env.num_envs))
    runner.set_root((0.25, 0.0, 50.0))
    first = (math.sqrt(1000.0**2 + 50.0**2) - 999.75) / DT  # the start counts the height
    assert runner.reward("progress")[0].item() == pytest.approx(first, abs=0.02)
    runner.set_root((0.5, 0.0, 40.0))
    assert runner.reward("progress")[0].item() == pytest.approx(0.25 / DT, abs=0.02)
    runner.set_root((0.4, 0.0, 40.0))
    assert runner.reward("progress")[0].item() == pytest.approx(-0.1 / DT, abs=0.02)


def test_upright_and_heading_rewards(runner: Task) -> None:
    for roll, upright in ((0.3, 1.0), (0.45, 0.0)):  # cos: 0.955, 0.900; the threshold is 0.93
        runner.set_root((0.0, 0.0, 1.0), rpy=(roll, 0.0, 0.0))
        assert runner.reward("upright")[0].item() == upright
    for yaw, heading in ((0.5, 1.0), (1.0, math.cos(1.0) / 0.8), (math.pi, -1.25)):
        runner.set_root((0.0, 0.0, 1.0), rpy=(0.0, 0.0, yaw))
        assert runner.reward("move_to_target")[0].item() == pytest.approx(heading, abs=1e-4)


def test_action_energy_and_limit_rewards(runner: Task) -> None:
    gears = [torque / max(runner.spec["torques"]) for torque in runner.spec["torques"]]
    actions = torch.zeros(runner.env.num_envs, len(runner.joints))
    energy = 0.0
    for i, (action, velocity) in ((1, (0.5, -2.0)), (len(gears) - 1, (-1.5, -1.0))):
        runner.set_joint(runner.joints[i], vel=velocity)
        actions[:, i] = action
        energy += abs(action * velocity) * gears[i]
    runner.env.action_manager.process_action(actions)
    assert runner.reward("action_l2")[0].item() == pytest.approx(0.25 + 2.25)
    assert runner.reward("energy")[0].item() == pytest.approx(energy, rel=1e-5)

    assert runner.reward("joint_pos_limits")[0].item() == 0.0
    index, threshold = (4, 0.99) if len(gears) == 8 else (18, 0.98)
    limits = (ANT_LIMITS_DEG if len(gears) == 8 else HUMANOID_LIMITS_DEG)[index]
    half, middle = math.radians(limits[1] - limits[0]) / 2, math.radians(sum(limits)) / 2
    for share, penalty in ((threshold - 0.001, 0.0), ((1 + threshold) / 2, 0.5), (1.0, 1.0)):
        runner.set_joint(runner.joints[index], pos=middle + share * half)
        observed = runner.reward("joint_pos_limits")[0].item()
        assert observed == pytest.approx(penalty * gears[index], abs=1e-3)


def test_rewards_are_weighted_sums_times_the_time_step(runner: Task) -> None:
    runner.env.step(torch.rand(runner.env.num_envs, len(runner.joints)))
    manager = runner.env.reward_manager
    rows = manager.get_active_iterable_terms(0)
    total = sum(value[0] for _, value in rows) * DT
    assert dict(rows)["alive"] == [runner.spec["rewards"]["alive"]]
    assert manager._reward_buf[0].item() == pytest.approx(total, rel=1e-4)


# Terminations and resets.


def test_root_height_terminates(runner: Task) -> None:
    low = 0.31 if len(runner.joints) == 8 else 0.8
    for height, down in ((low + 0.001, False), (low - 0.001, True)):
        runner.set_root((0.0, 0.0, height))
        runner.env.termination_manager.compute()
        assert runner.env.termination_manager.terminated.tolist() == [down] * runner.env.num_envs


def test_cart_out_of_bounds_terminates(pole: Task) -> None:
    for row, position in enumerate((2.999, 3.001, -2.999, -3.001)):
        pole.set_joint("slider_to_cart", pos=position, row=row)
    pole.env.termination_manager.compute()
    assert pole.env.termination_manager.terminated.tolist() == [False, True, False, True]


def test_time_out_truncates_at_the_last_step(task: Task) -> None:
    zero = torch.zeros(task.env.num_envs, len(task.spec["torques"]))
    task.env.episode_length_buf[:] = 60 * task.spec["episode_s"] - 2
    _, _, terminated, truncated, _ = task.env.step(zero)
    assert not terminated.any() and not truncated.any()
    _, _, terminated, truncated, extras = task.env.step(zero)
    assert not terminated.any() and truncated.all()
    assert extras["log"]["Metrics/success_rate"].item() == 1.0


def test_resets_stay_in_their_ranges_and_fill_them(task: Task) -> None:
    offsets, speeds = [], []
    for seed in range(6):
        task.env.reset(seed=seed)
        data, ids = task.robot.data, task.ids(task.joints)
        offsets.append((data.joint_pos - data.default_joint_pos)[:, ids].clone())
        speeds.append(data.joint_vel[:, ids].clone())
    offset, speed = torch.cat(offsets), torch.cat(speeds)
    quarter = 0.25 * math.pi
    pole = len(task.joints) == 2
    ranges = [(1.0, 0.5), (quarter, quarter)] if pole else [(0.2, 0.1)] * len(task.joints)
    for i, (position_range, velocity_range) in enumerate(ranges):
        assert 0.6 * position_range < offset[:, i].abs().max() <= position_range + 1e-6
        assert 0.6 * velocity_range < speed[:, i].abs().max() <= velocity_range + 1e-6
    task.env.sim.forward()
    place = task.robot.data.root_link_pos_w - task.env.scene.env_origins
    height = {2: 2.0, 8: 0.5, 21: 1.34}[len(task.joints)]
    torch.testing.assert_close(place, torch.tensor([0.0, 0.0, height]).expand_as(place))


def test_default_pose(crawler: Task) -> None:
    ids = crawler.ids(crawler.joints)
    expected = torch.tensor([0.0] * 4 + [0.785398, -0.785398, -0.785398, 0.785398])
    torch.testing.assert_close(crawler.robot.data.default_joint_pos[0, ids], expected)


def test_humanoid_springs_pull_to_zero(walker: Task) -> None:
    table = {
        "lower_waist:1": (20, 5),
        "right_thigh:1": (20, 5),
        "left_shin": (5, 0.1),
        "left_foot:1": (2, 1),
        "right_upper_arm:2": (10, 5),
        "left_lower_arm": (2, 1),
    }
    model = walker.env.sim.mj_model
    for name, (stiffness, damping) in table.items():
        joint = model.joint(f"robot/{name}")
        assert joint.stiffness[0] == stiffness and joint.damping[0] == damping
        assert model.qpos_spring[joint.qposadr[0]] == 0.0
        assert joint.armature[0] == pytest.approx(0.01)


def test_constraints_never_overflow(runner: Task) -> None:
    env, most_rows, most_contacts = runner.env, 0, 0
    torch.manual_seed(0)
    for _ in range(60):
        env.step(torch.rand(env.num_envs, len(runner.joints)) * 4 - 2)
        most_rows = max(most_rows, int(env.sim.data.nefc[:].max()))
        most_contacts = max(most_contacts, int(env.sim.data.nacon[:].max()))
    assert 0 < most_rows < env.cfg.sim.njmax
    assert 0 < most_contacts < env.cfg.sim.nconmax * env.num_envs


# State.


def test_progress_state_is_in_tensors(runner: Task) -> None:
    term = runner.env.reward_manager.get_term_cfg("progress").func
    runner.env.step(torch.zeros(runner.env.num_envs, len(runner.joints)))
    state = {name for name, value in vars(term).items() if isinstance(value, torch.Tensor)}
    assert state == {"potentials", "prev_potentials"}
    assert (term.potentials < -50_000).all()
