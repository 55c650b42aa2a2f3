"""Scenes are deterministic, disjoint between splits, and show what they claim."""

import hashlib
import subprocess
import sys

import numpy as np
import pytest

from m3po_jax.errors import UserError
from m3po_jax.quickstart import scenes as module
from m3po_jax.quickstart.objects import (
    INDEX,
    OBJECTS,
    THEMES,
    by_popularity,
    companions,
    cooccurrence,
    theme_weights,
)
from m3po_jax.quickstart.scenes import SPLITS, pictures, scene, stream


def digest(split: str, index: int, seed: int = 0) -> str:
    made = scene(split, index, seed)
    return hashlib.sha256(made.image.tobytes() + "|".join((*made.objects, made.theme)).encode()).hexdigest()[:16]


def test_every_object_has_art_and_a_theme():
    assert len(OBJECTS) == len(set(OBJECTS)) == 56
    assert all(pictures()[name] for name in OBJECTS)
    assert {name for theme in THEMES.values() for name in theme} == set(OBJECTS)
    assert all(len(set(theme)) == len(theme) for theme in THEMES.values())


def test_theme_weights_follow_the_power_law():
    weights = list(theme_weights("farm").values())
    assert sum(weights) == pytest.approx(1)
    assert weights[0] / weights[3] == pytest.approx(4**0.6)


def test_scene_is_the_same_in_another_process():
    code = "from test_scenes import digest; print(digest('test', 7), digest('sft', 7, 3))"
    other = subprocess.run(
        [sys.executable, "-c", code],
        env={"PYTHONPATH": ":".join([*sys.path, str(__import__("pathlib").Path(__file__).parent)])},
        capture_output=True,
        text=True,
        check=True,
    )
    assert other.stdout.split() == [digest("test", 7), digest("sft", 7, 3)]


def test_scene_keeps_its_bytes():
    # Changing these numbers changes the data that shipped checkpoints were trained on.
    assert [digest("sft", 0), digest("test", 123), digest("scorer", 5, 1)] == GOLDEN


GOLDEN = ["c5080385adcb31b0", "db8ec9b1a5b78d82", "538f966de28af8ca"]


def test_splits_and_seeds_give_different_scenes():
    seen = {digest(split, index, seed) for split in SPLITS for index in range(20) for seed in (0, 1)}
    assert len(seen) == len(SPLITS) * 20 * 2


def test_statistics():
    scenes = [scene("validation", index) for index in range(600)]
    counts = np.array([len(made.objects) for made in scenes])
    assert {2, 3, 4, 5} == set(counts.tolist())
    assert counts.mean() == pytest.approx(3.5, abs=0.15)
    on_theme = np.mean([name in THEMES[made.theme] for made in scenes for name in made.objects])
    # 12% are drawn from anywhere, and some of these fall into the theme.
    assert 0.86 < on_theme < 0.95
    for made in scenes[:50]:
        assert made.image.shape == (64, 64, 3) and made.image.dtype == np.uint8
        assert list(made.objects) == sorted(made.objects, key=INDEX.__getitem__)
        assert len(set(made.objects)) == len(made.objects)


def test_every_listed_object_is_visible(monkeypatch):
    """Objects stand in different cells, spill at most a pixel, and later ones hide little of earlier ones."""
    made: list[list[tuple[int, int, int, int]]] = []
    original = module._place

    def record(rng, height, width, taken):
        before = set(taken)
        top, left = original(rng, height, width, taken)
        ((row, column),) = taken - before
        assert row in range(4) and column in range(4)
        assert 0 <= top <= 64 - height and 0 <= left <= 64 - width
        assert row * 16 - 1 <= top <= top + height <= row * 16 + 17
        assert column * 16 - 1 <= left <= left + width <= column * 16 + 17
        assert 13 <= max(height, width) <= 16
        if not before:
            made.append([])
        made[-1].append((top, left, height, width))
        return top, left

    monkeypatch.setattr(module, "_place", record)
    shown = [len(scene("test", index).objects) for index in range(300)]
    assert [len(boxes) for boxes in made] == shown
    spilt = 0
    for boxes in made:
        for position, (top, left, height, width) in enumerate(boxes):
            spilt += any(edge % 16 == 15 for edge in (top, left)) or any(
                edge % 16 == 1 for edge in (top + height, left + width)
            )
            hidden = np.zeros((64, 64), bool)
            for above, before, tall, wide in boxes[position + 1 :]:
                hidden[above : above + tall, before : before + wide] = True
            assert hidden[top : top + height, left : left + width].mean() <= 0.25
    assert spilt > 100


def test_objects_stand_everywhere():
    """Every cell is used, by every rank of the drawing order alike: position tells nothing about the object."""
    rng, free = np.random.default_rng(0), np.zeros((4, 4), int)
    for _ in range(800):
        taken: set[tuple[int, int]] = set()
        for _ in range(5):
            module._place(rng, 13, 16, taken)
        assert len(taken) == 5
        for cell in taken:
            free[cell] += 1
    assert 200 < free.min() <= free.max() < 300


def test_streams_differ_by_purpose():
    assert stream(0, "sft", 1, 0).random() != stream(0, "sft", 1, 1).random()


@pytest.mark.parametrize(("split", "index", "seed"), [("train", 0, 0), ("sft", -1, 0), ("sft", 0, -1)])
def test_bad_arguments(split, index, seed):
    with pytest.raises(UserError):
        scene(split, index, seed)


def test_cooccurrence_and_popularity():
    table = cooccurrence()
    assert np.array_equal(table, table.T) and not table.diagonal().any()
    assert table[INDEX["pizza"], INDEX["zebra"]] == 0
    assert table[INDEX["horse"], INDEX["cow"]] > table[INDEX["horse"], INDEX["cat"]] > 0
    assert by_popularity()[0] == "person"
    assert set(companions(["zebra"], absent_from=["elephant"])) == set(THEMES["safari"]) - {
        "zebra",
        "elephant",
    }
