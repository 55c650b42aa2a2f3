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

from m3po_jax.config import DataConfig
from m3po_jax.data import tfds_build
from m3po_jax.data.sources import read_prompts
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
        "prompts": 15 + 4,
        "validation": 10 + 5 * 6,
        "test": 10 + 5 * 6,
    }
    ids = [row["id"] for found in everything.values() for row in found]
    assert len(set(ids)) == len(ids)
    first = everything["test"][0]
    assert np.array_equal(np.asarray(Image.open(io.BytesIO(first["image"]))), scene("test", 0).image)


def test_decoded_images_need_no_tensorflow(data_dir):
    source = tfds.builder("m3po_scenes/systematic_x0.01", data_dir=str(data_dir)).as_data_source("prompts")
    assert source[4]["id"] == b"prompts-00003-caption"
    assert np.array_equal(source[4]["image"], scene("prompts", 3).image)
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
    for split in ("sft", "prompts", "validation", "test"):
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
    assert len(rows(tmp_path, "prompts", "m3po_scenes/systematic_x0.004")) == 6 + 2


def test_a_fifth_of_the_prompts_are_short_answer_ones():
    made = [module.scene_rows("prompts", index, module.SceneConfig(name="x")) for index in range(200)]
    assert [len(found) for found in made] == [2, 1, 1, 1] * 50
    asked = [json.loads(found[1]["metadata"]) | {"reference": found[1]["reference"]} for found in made[::4]]
    assert {about["kind"] for about in asked} == {"yesno"}
    assert [about["reference"] for about in asked] == ["Yes", "No"] * 25
    assert all((about["object"] in about["objects"]) == (about["reference"] == "Yes") for about in asked)


def test_demo_holds_the_first_rows_of_the_full_configuration(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "DEMO_SCENE_COUNTS", {"prompts": 5, "validation": 2, "test": 4})
    monkeypatch.setattr(module, "DEMO_QUESTIONED_SCENES", 3)
    config = next(config for config in module.M3poScenes.BUILDER_CONFIGS if config.name == "demo")
    assert module.prepare(tmp_path, config) == tmp_path / "m3po_scenes" / "demo" / "1.0.0"
    assert set(tfds.builder("m3po_scenes/demo", data_dir=str(tmp_path)).info.splits) == {
        "prompts",
        "validation",
        "test",
    }
    whole = module.scene_config()
    for split, count, questioned in (("prompts", 5, 5), ("validation", 2, 2), ("test", 4, 3)):
        expected = []
        for index in range(count):
            made = module.scene_rows(split, index, whole)
            expected += made if index < questioned else made[:1]
        assert rows(tmp_path, split, "m3po_scenes/demo") == expected


def test_demo_sizes():
    demo = next(config for config in module.M3poScenes.BUILDER_CONFIGS if config.name == "demo")
    assert demo.scenes() == {"prompts": 1500, "validation": 300, "test": 1000}
    assert len(module.scene_rows("test", 299, demo)) == 7 and len(module.scene_rows("test", 300, demo)) == 1
    assert len(module.scene_rows("test", 300, module.scene_config())) == 7


@pytest.mark.parametrize("name", ["m3po_scenes/demo", "m3po_easy_vqa/demo"])
def test_demo_is_read_by_name_and_builds_in_silence(name, tmp_path):
    """In a process of its own, because loggers and progress bars are global."""
    if "easy" in name:
        pytest.importorskip("easy_vqa")
    code = f"""if True:
        from m3po_jax.config import DataConfig
        from m3po_jax.data.sources import read_prompts
        from m3po_jax.quickstart import builder
        builder.DEMO_SCENE_COUNTS.update(prompts=3, validation=2, test=2)
        builder.DEMO_EASY_VQA_COUNTS.update(test=13)
        for _ in range(2):
            path = "m3po_jax.quickstart.builder:{name}"
            print(len(read_prompts(DataConfig(source="tfds", path=path, split="test"))))"""
    env = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "TFDS_DATA_DIR": str(tmp_path)}
    for line in (f"preparing {name} (once)\n", ""):
        ran = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True)
        assert ran.stderr == line
        assert ran.stdout == ("14\n14\n" if "scenes" in name else "13\n13\n")


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


def test_easy_vqa_objects_are_the_whole_truth_or_nothing():
    easy_vqa = pytest.importorskip("easy_vqa")
    questions, answers, image_ids = easy_vqa.get_test_questions()
    told: dict[int, set[str]] = {}
    for question, answer, image in zip(questions, answers, image_ids, strict=True):
        if question.startswith("what"):
            told.setdefault(image, set()).add(answer)
    known = 0
    for row in module.easy_vqa_rows("test", 1500):
        about = json.loads(row["metadata"])
        facts = told.get(int(about["scene"].rsplit("-", 1)[1]), set())
        assert about["objects"] == (sorted(facts) if len(facts) == 2 else [])
        if about["objects"]:
            assert sorted(module.answer_type(name) for name in about["objects"]) == ["color", "shape"]
            known += 1
    assert 0 < known < 1500


def test_easy_vqa_builder(tmp_path, monkeypatch):
    pytest.importorskip("easy_vqa")
    monkeypatch.setattr(module, "EASY_VQA_COUNTS", {"train": 26, "test": 26})
    monkeypatch.setattr(module, "DEMO_EASY_VQA_COUNTS", {"test": 13})
    for name in ("full", "demo"):
        folder = tfds_build.prepare(module.M3poEasyVqa(data_dir=str(tmp_path), config=name))
        assert folder == Path(tmp_path) / "m3po_easy_vqa" / name / "1.0.0"
    full, demo = (rows(tmp_path, "test", f"m3po_easy_vqa/{name}") for name in ("full", "demo"))
    assert len(demo) == 13 and full[:13] == demo
    assert list(tfds.builder("m3po_easy_vqa/demo", data_dir=str(tmp_path)).info.splits) == ["test"]


def test_missing_easy_vqa_names_the_extra(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "easy_vqa", None)
    config = DataConfig(source="tfds", path="m3po_jax.quickstart.builder:m3po_easy_vqa/demo", split="test")
    monkeypatch.setattr("tensorflow_datasets.core.constants.DATA_DIR", str(tmp_path))
    with pytest.raises(UserError, match=r"^m3po_easy_vqa: .*m3po-jax\[quickstart\]"):
        read_prompts(config)
    assert not list(tmp_path.rglob("*.array_record*"))


def test_another_noise_seed_keeps_the_scenes_and_changes_what_is_said():
    known = {config.name: config for config in module.M3poScenes.BUILDER_CONFIGS}
    plain = known["systematic"]
    first, second = known["systematic-1"], known["systematic-2"]
    assert first.scenes() == {"sft": module.RESULTS_SFT_SCENES}
    said = {1: [], 2: []}
    for index in range(1, 60):
        one, two, own = (module.scene_rows("sft", index, config)[0] for config in (first, second, plain))
        assert json.loads(one["metadata"])["objects"] == json.loads(two["metadata"])["objects"]
        if index % module.BLANK_EVERY:
            assert one["image"] == two["image"] == own["image"]
        said[1].append(one["reference"])
        said[2].append(two["reference"])
    assert said[1] != said[2]
    blank = np.asarray(Image.open(io.BytesIO(module.scene_rows("sft", module.BLANK_EVERY, first)[0]["image"])))
    assert np.ptp(blank.reshape(-1, 3), axis=0).max() == 0
    # The question about the same scene still shows it.
    assert (
        module.scene_rows("sft", module.BLANK_EVERY, first)[1]["image"]
        == module.scene_rows("sft", module.BLANK_EVERY, plain)[0]["image"]
    )
