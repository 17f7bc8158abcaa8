"""Windows: LeRobot's indices, and rewinds whose frames are what their targets say."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sarm_lib.windows import WindowSpec

specs = st.builds(
    WindowSpec,
    kind=st.sampled_from(["centred", "past"]),
    n_obs_steps=st.integers(1, 6).map(lambda n: 2 * n),
    frame_gap=st.integers(1, 40),
    max_rewind_steps=st.integers(0, 4),
)


@given(
    length=st.integers(1, 400),
    at=st.floats(0, 1),
    half=st.integers(1, 6),
    gap=st.integers(1, 40),
    start=st.integers(0, 1000),
)
def test_centred_windows_are_lerobot_s(length, at, half, gap, start):
    from lerobot.rewards.sarm.sarm_utils import compute_absolute_indices

    frame = round(at * (length - 1))
    theirs, _ = compute_absolute_indices(start + frame, start, start + length, 2 * half, gap)
    ours = WindowSpec("centred", 2 * half, gap, 0).observed(np.array([frame]), np.array([length]))
    np.testing.assert_array_equal(ours[0] + start, theirs.numpy())


@given(spec=specs, length=st.integers(1, 300), at=st.floats(0, 1))
def test_the_current_frame_stands_at_the_position_that_is_read(spec, length, at):
    frame = round(at * (length - 1))
    window = spec.observed(np.array([frame]), np.array([length]))
    assert window.shape == (1, spec.length)
    assert window[0, spec.position] == frame
    assert (np.diff(window[0]) >= 0).all() and 0 <= window.min() and window.max() < length
    if spec.kind == "past":
        assert window[0, 0] == 0 and window.max() == frame


@given(spec=specs, length=st.integers(1, 300), at=st.floats(0, 1), wish=st.floats(0, 1))
def test_a_rewind_walks_back_from_the_last_frame_within_the_episode(spec, length, at, wish):
    frame = round(at * (length - 1))
    window = spec.observed(np.array([frame]), np.array([length]))
    steps = np.ceil(wish * spec.rewind_room(window)).astype(int)
    frames, valid = spec.with_rewind(window, steps)
    assert frames.shape == (1, spec.padded_length) and valid[0] == spec.length + steps[0]
    rewound = frames[0, spec.length : valid[0]]
    np.testing.assert_array_equal(rewound, window[0, -1] - spec.frame_gap * np.arange(1, steps[0] + 1))
    assert (rewound >= 0).all()


@pytest.mark.parametrize(("kind", "expected"), [("centred", [2, 6, 10, 14, 18]), ("past", [0, 0, 2, 6, 10])])
def test_by_hand(kind, expected):
    spec = WindowSpec(kind, 4, 4, 2)
    assert spec.observed(np.array([10]), np.array([40]))[0].tolist() == expected
