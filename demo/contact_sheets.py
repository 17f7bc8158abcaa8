"""The sheets on which the demo's marked and corrected episodes were looked at: every frame of both cameras with its number.

    python -m demo.contact_sheets          writes demo/contact_sheets/*.jpg of the episodes in demo/marks.yaml and
                                           demo/corrections.yaml

The dataset is opened without its `sim.*` columns: whoever marks cannot see the simulator's truth.
"""

from pathlib import Path

import numpy as np

from sarm_lib import charts, corrections
from sarm_lib.dataset import TRUTH, Dataset, open_dataset

FOLDER = Path(__file__).parent
DATA = FOLDER.parent / "data/demo/assembly"


def open_blind(root: Path) -> Dataset:
    """The dataset without truth: asking for a `sim.*` column is an error, as for any that it does not have."""
    dataset = open_dataset(root)
    features = {key: value for key, value in dataset.features.items() if not key.startswith(TRUTH)}
    table = dataset.table[[name for name in dataset.table if not name.startswith(TRUTH)]]
    blind = Dataset(
        dataset.root,
        dataset.info | {"features": features},
        table,
        dataset.episodes,
        dataset.image_keys,
        dataset.state_key,
    )
    assert not [name for name in blind.features if name.startswith(TRUTH)]
    return blind


def looked_at(dataset: Dataset) -> list[int]:
    """The episodes that somebody marked or corrected."""
    marked = corrections.episodes_in(FOLDER / "marks.yaml", "marks", dataset)
    return sorted({*marked, *corrections.episodes_in(FOLDER / "corrections.yaml", "corrections", dataset)})


def write_sheets(root: Path, target: Path) -> None:
    """One sheet an episode; a tile shows the first camera over the others."""
    dataset = open_blind(root)
    target.mkdir(exist_ok=True)
    for number in looked_at(dataset):
        (episode,) = [e for e in dataset.episodes if e.index == number]
        cameras = [
            np.stack([image for _, image in dataset.iterate_frames(key, (episode,))]) for key in dataset.camera_keys
        ]
        sheet = charts.contact_sheet(np.concatenate(cameras, axis=1))
        sheet.save(target / f"episode_{number:03d}.jpg", quality=60)


if __name__ == "__main__":
    write_sheets(DATA, FOLDER / "contact_sheets")
