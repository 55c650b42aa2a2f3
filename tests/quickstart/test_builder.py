"""The TFDS builders, without TensorFlow."""

import io
import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import tensorflow_datasets as tfds
from PIL import Image

from m3po_jax.errors import UserError
from m3po_jax.quickstart import builder as module
from m3po_jax.quickstart.language import caption
from m3po_jax.quickstart.scenes import SPLITS, scene

SMALL = module.scene_config(scale=0.01)


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tfds")
    module.prepare(folder, SMALL)
    return folder


def rows(data_dir, split, name="m3po_scenes/systematic_x0.01"):
    source = tfds.builder(name, data_dir=str(data_dir)).as_data_source(
        split, decoders={"image": tfds.decode.SkipDecoding()}
    )
    return [{key: value if key == "image" else value.decode() for key, value in row.items()} for row in source]


def test_sizes_ids_and_images(data_dir):
    everything = {split: rows(data_dir, split) for split in SPLITS}
    assert {split: len(found) for split, found in everything.items()} == {
        "sft": 120,
        "scorer": 80,
        "prompts": 15,
        "validation": 10 + 5 * 6,
        "test": 10 + 5 * 6,
    }
    ids = [row["id"] for found in everything.values() for row in found]
    assert len(set(ids)) == len(ids)
    first = everything["test"][0]
    assert np.array_equal(np.asarray(Image.open(io.BytesIO(first["image"]))), scene("test", 0).image)


def test_decoded_images_need_no_tensorflow(data_dir):
    source = tfds.builder("m3po_scenes/systematic_x0.01", data_dir=str(data_dir)).as_data_source("prompts")
    assert np.array_equal(source[3]["image"], scene("prompts", 3).image)
    assert "tensorflow" not in sys.modules


def test_noise_is_in_sft_captions_only(data_dir):
    noisy = 0
    for split in SPLITS:
        for row in rows(data_dir, split):
            about = json.loads(row["metadata"])
            if about["kind"] == "yesno":
                assert row["reference"] == ("Yes" if about["object"] in about["objects"] else "No")
                continue
            index = int(about["scene"].split("-")[1])
            assert tuple(about["objects"]) == scene(split, index).objects
            assert (row["reference"] != caption(about["objects"])) == about["noisy"] == bool(about["swaps"])
            assert split == "sft" or not about["noisy"]
            noisy += about["noisy"]
    assert 20 <= noisy <= 50


def test_questions_are_balanced(data_dir):
    for split in ("sft", "validation", "test"):
        asked = [row for row in rows(data_dir, split) if json.loads(row["metadata"])["kind"] == "yesno"]
        answers = Counter(row["reference"] for row in asked)
        assert answers["Yes"] == answers["No"] > 0


def test_noisy_questions_follow_the_noisy_caption():
    config = module.scene_config(noisy_questions=True)
    wrong = 0
    for index in range(300):
        told, asked = module.scene_rows("sft", index, config)
        about, swaps = json.loads(asked["metadata"]), json.loads(told["metadata"])["swaps"]
        claimed = [swaps.get(name, name) for name in about["objects"]]
        assert asked["reference"] == ("Yes" if about["object"] in claimed else "No")
        wrong += about["noisy"]
    assert wrong > 10


def test_prepare_reuses_what_is_there(data_dir):
    path = module.prepare(data_dir, SMALL)
    files = {file: file.stat().st_mtime_ns for file in path.iterdir()}
    assert module.prepare(data_dir, SMALL) == path
    assert {file: file.stat().st_mtime_ns for file in path.iterdir()} == files
    assert not list(path.parent.glob("*incomplete*"))


def test_registered_default_configuration(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "SCENE_COUNTS", dict.fromkeys(SPLITS, 3))
    assert module.prepare(tmp_path) == tmp_path / "m3po_scenes" / "systematic" / "1.0.0"
    assert tfds.builder("m3po_scenes", data_dir=str(tmp_path)).info.splits["sft"].num_examples == 6


def test_two_processes_prepare_the_same_folder(tmp_path):
    code = "import sys\nfrom m3po_jax.quickstart.builder import *\nprepare(sys.argv[1], scene_config(scale=.004))"
    env = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    running = [
        subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], env=env, stderr=subprocess.DEVNULL)
        for _ in range(2)
    ]
    assert [process.wait(timeout=120) for process in running] == [0, 0]
    assert len(rows(tmp_path, "prompts", "m3po_scenes/systematic_x0.004")) == 6


@pytest.mark.parametrize("wrong", [{"regime": "sistematic"}, {"seed": -1}, {"scale": 0}, {"scale": float("nan")}])
def test_bad_configurations(wrong):
    with pytest.raises(UserError):
        module.scene_config(**wrong)


def test_configuration_names_tell_settings_apart():
    configs = [
        module.scene_config(regime, seed=seed, scale=scale, noisy_questions=noisy)
        for regime in ("systematic", "clean")
        for seed in (0, 1)
        for scale in (1, 0.5)
        for noisy in (False, True)
    ]
    assert len({config.name for config in configs}) == len(configs)


def test_easy_vqa_is_balanced_and_from_the_official_splits():
    easy_vqa = pytest.importorskip("easy_vqa")
    for split, official in (
        ("train", easy_vqa.get_train_questions()),
        ("test", easy_vqa.get_test_questions()),
    ):
        made = list(module.easy_vqa_rows(split, 130))
        assert set(Counter(row["reference"] for row in made).values()) == {10}
        for row in made[:20]:
            position = int(row["id"].rsplit("-", 1)[1])
            assert (row["instruction"], row["reference"]) == (official[0][position], official[1][position])
            picture = Image.open(io.BytesIO(row["image"]))
            assert (picture.size, picture.mode) == ((64, 64), "RGB")
    assert {json.loads(row["metadata"])["category"] for row in made} == {"yesno", "shape", "color"}
    assert [row["id"] for row in made] == [row["id"] for row in module.easy_vqa_rows("test", 130)]


def test_easy_vqa_builder(tmp_path, monkeypatch):
    pytest.importorskip("easy_vqa")
    monkeypatch.setattr(module, "EASY_VQA_COUNTS", {"train": 26, "test": 13})
    assert module.prepare_easy_vqa(tmp_path) == Path(tmp_path) / "m3po_easy_vqa" / "1.0.0"
    assert len(rows(tmp_path, "test", "m3po_easy_vqa")) == 13


def test_missing_easy_vqa_names_the_extra(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "easy_vqa", None)
    with pytest.raises(UserError, match=r"m3po-jax\[quickstart\]"):
        module.prepare_easy_vqa(tmp_path)
    assert not list(tmp_path.rglob("*.array_record*"))
