"""Isaac Lab's classic tasks on MuJoCo-Warp, under their Isaac Lab ids.

Each task module holds `JOINT_NAMES` (the order of PhysX, in which actions and joint observations
are laid out) and `env_cfg(play)`. `register` puts them into mjlab's task registry.
"""

from __future__ import annotations

from mjlab.rl import RslRlOnPolicyRunnerCfg
from mjlab.tasks.registry import list_tasks, register_mjlab_task

from . import ant, cartpole, direct, humanoid

TASKS = {
    "Isaac-Cartpole-v0": cartpole.env_cfg,
    "Isaac-Cartpole-RGB-v0": cartpole.rgb_env_cfg,
    "Isaac-Ant-v0": ant.env_cfg,
    "Isaac-Humanoid-v0": humanoid.env_cfg,
    "Isaac-Cartpole-Direct-v0": direct.cartpole_cfg,
    "Isaac-Ant-Direct-v0": direct.ant_cfg,
    "Isaac-Humanoid-Direct-v0": direct.humanoid_cfg,
}


def register() -> None:
    """Register the tasks with mjlab; ids that are registered already are left alone."""
    known = set(list_tasks())
    for task_id, env_cfg in TASKS.items():
        if task_id not in known:
            # The registry insists on a configuration for its own PPO trainer; ours never reads it.
            register_mjlab_task(
                task_id,
                env_cfg=env_cfg(),
                play_env_cfg=env_cfg(play=True),
                rl_cfg=RslRlOnPolicyRunnerCfg(experiment_name=task_id),
            )
