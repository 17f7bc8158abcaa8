"""The sheets on which the demo's episodes are looked at: every frame of both cameras with its number.

    python -m demo.contact_sheets                       the sheets in git: episodes that were marked (demo/marks.yaml)
                                                        or fixed (demo/corrections.yaml)
    python -m demo.contact_sheets 81 82 --into sheets   those of other episodes

The dataset is opened without its `sim.*` columns: whoever marks cannot see the simulator's truth.
"""

import argparse
from collections.abc import Collection
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


def in_git(dataset: Dataset) -> list[int]:
    """The episodes of which somebody said what an annotator did not."""
    said = corrections.read_corrections(FOLDER / "corrections.yaml", dataset)
    marked = corrections.episodes_in(FOLDER / "marks.yaml", "marks", dataset)
    return sorted({*marked, *(correction.episode for correction in said if correction.verdict == "fix")})


def write_sheets(dataset: Dataset, episodes: Collection[int], target: Path) -> None:
    """One sheet an episode; a tile shows the first camera over the others."""
    target.mkdir(parents=True, exist_ok=True)
    for episode in (e for e in dataset.episodes if e.index in episodes):
        cameras = [
            np.stack([image for _, image in dataset.iterate_frames(key, (episode,))]) for key in dataset.camera_keys
        ]
        sheet = charts.contact_sheet(np.concatenate(cameras, axis=1))
        sheet.save(target / f"episode_{episode.index:03d}.jpg", quality=60)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("episodes", type=int, nargs="*")
    parser.add_argument("--into", type=Path, default=FOLDER / "contact_sheets")
    asked, blind = parser.parse_args(), open_blind(DATA)
    if missing := set(asked.episodes) - {episode.index for episode in blind.episodes}:
        parser.error(f"the demo has no episode {min(missing)}")
    write_sheets(blind, asked.episodes or in_git(blind), asked.into)
