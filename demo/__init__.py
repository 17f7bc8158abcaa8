"""How the demo dataset was made: simulator, expert, imperfections, encoder. `sarm_lib` never imports this package."""

import os
import sys

# MuJoCo chooses its OpenGL backend when it is first imported, so this comes before every module of the package.
os.environ.setdefault("MUJOCO_GL", "egl" if sys.platform == "linux" else "glfw")
