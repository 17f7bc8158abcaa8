"""SARM reward models and Reward-Aligned Behavior Cloning: the logic behind the notebooks.

Data flows one way: dataset → frames → encoder → annotations → stages → windows → model → training → progress → rabc →
policy, with `scorecard` and `charts` beside it. Each of these is a module.
"""

import logging

# Where torchcodec finds no FFmpeg libraries LeRobot logs eighty lines of traceback and goes on with PyAV. One line of
# ours says so where it matters (`policy.video_backend`).
logging.getLogger("lerobot.utils.import_utils").setLevel(logging.ERROR)
