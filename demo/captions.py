"""Sentences about a scene, from the simulator's state, for the contrastive training of the demo's encoder."""

import numpy as np

from demo.simulator import TASK, Scene

# Meta-World tasks in other words, so that the text tower tells tasks apart and paraphrases not. The demo's own is first.
TASKS = (
    (
        TASK,
        "put the nut onto the peg",
        "grab the nut and set it down over the peg",
        "place the ring of the nut over the peg",
    ),
    ("open the door", "pull the door open", "swing the door wide by its handle", "get the door to open"),
    ("close the door", "push the door shut", "shut the door", "swing the door until it is closed"),
    ("open the drawer", "pull the drawer out", "slide the drawer open", "draw out the drawer by its handle"),
    ("close the drawer", "push the drawer in", "slide the drawer shut", "shut the drawer"),
    ("press the button", "push the button down", "hit the button with the gripper", "press down on the button"),
    ("turn the faucet", "rotate the faucet handle", "open the tap", "twist the handle of the faucet"),
    (
        "hammer the nail",
        "drive the nail in with the hammer",
        "hit the nail with the hammer",
        "use the hammer on the nail",
    ),
    (
        "push the puck to the goal",
        "slide the puck onto the target",
        "move the puck to the goal",
        "shove the puck over to the goal",
    ),
    (
        "pick up the bottle and put it in the box",
        "place the bottle into the box",
        "put the bottle in the box",
        "lift the bottle into the box",
    ),
    (
        "fold the towel",
        "fold the cloth in half",
        "lay one half of the towel over the other",
        "make a fold in the towel",
    ),
    ("pull the lever down", "draw the lever down", "move the lever to the bottom", "lower the lever"),
    (
        "sweep the cube into the hole",
        "brush the cube into the hole",
        "push the cube until it drops into the hole",
        "sweep up the cube",
    ),
    (
        "remove the nut from the peg",
        "take the nut off the peg",
        "lift the nut from the peg",
        "pull the ring of the nut off the peg",
    ),
    (
        "throw the ball into the basket",
        "drop the ball through the hoop",
        "dunk the ball",
        "put the basketball in the basket",
    ),
    ("slide the window open", "open the window", "push the window to the side", "move the window until it is open"),
)


def caption(scene: Scene) -> str:
    """What a person would measure in the picture, in steps of 2 cm."""
    gripper = ("closed", "closed around the handle", "half open", "open")[
        int(np.digitize(scene.opening, [0.38, 0.6, 0.9]))
    ]
    to_handle = _centimetres(np.linalg.norm((scene.hand - scene.handle)[:2]))
    over_handle = _centimetres(scene.hand[2] - scene.handle[2])
    to_peg = _centimetres(np.linalg.norm((scene.nut - scene.peg)[:2]))
    side = ("left", "middle", "right")[int(np.digitize(scene.peg[0], [-0.03, 0.03]))]
    return (
        f"the gripper is {gripper}, {to_handle} cm beside and {over_handle} cm above the handle; "
        f"the nut is {_centimetres(scene.nut[2])} cm high and {to_peg} cm from the peg on the {side}"
    )


def _centimetres(metres: float, step: int = 2) -> int:
    return max(0, round(float(metres) * 100 / step) * step)
