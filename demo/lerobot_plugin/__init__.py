"""The demo's robot on LeRobot's command line, as an environment and as a robot: both are called `assembly`.

    lerobot-eval --discover_packages_path=demo.lerobot_plugin --env.type=assembly --policy.path=... --eval.n_episodes=20
    lerobot-rollout --discover_packages_path=demo.lerobot_plugin --robot.type=assembly --policy.path=... --fps=40 --duration=3.5

The policies of notebook 06 are found too: their type is registered with it. A package, since LeRobot looks for plugins in
packages, and for a robot in the one around its configuration.
"""

import sarm_lib.small_pi0  # noqa: F401  (registers the type of the demo's policies)
from demo.lerobot_plugin.environment import AssemblyEnvConfig
from demo.lerobot_plugin.robot import AssemblyRobot, AssemblyRobotConfig

__all__ = ["AssemblyEnvConfig", "AssemblyRobot", "AssemblyRobotConfig"]
