"""SARM reward models and Reward-Aligned Behavior Cloning: the logic behind the notebooks.

Data flows one way: dataset → frames → encoder → annotations → stages → windows → model → training → progress → rabc →
policy, with `scorecard` and `charts` beside it. Each of these is a module.
"""
