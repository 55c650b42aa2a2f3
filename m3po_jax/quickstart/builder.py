"""tensorflow-datasets builders of the quickstart: `m3po_scenes` and `m3po_easy_vqa`, without TensorFlow.

Importing this module registers both, so that ``tfds.builder("m3po_scenes", data_dir=...)`` finds them; a
prepared folder also opens without the import, because the features are stored beside the data.

Three facts about TFDS without TensorFlow shape this file. Images must be given as encoded bytes (arrays are
encoded by TensorFlow). Only ArrayRecord can be written and read. `as_data_source` gives texts as bytes and
decodes images with Pillow to uint8 arrays; ``decoders={"image": tfds.decode.SkipDecoding()}`` gives back the
PNG bytes that were stored.
"""

from __future__ import annotations

import functools
import importlib
import io
import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import tensorflow_datasets as tfds
from PIL import Image

from m3po_jax.data import tfds_build
from m3po_jax.errors import UserError, nearest
from m3po_jax.quickstart import language
from m3po_jax.quickstart.scenes import SIDE, Scene, scene, stream

SCENE_COUNTS: dict[str, int] = {
    "sft": 6000,
    "scorer": 8000,
    "prompts": 1500,
    "validation": 1000,
    "test": 1000,
}
# As many images as POPE asks about; each adds six questions to its split.
QUESTIONED_SCENES = 500
EASY_VQA_COUNTS: dict[str, int] = {"train": 6000, "test": 1500}
# What `m3po run` reads, so that its first run starts within seconds: the first scenes and questions of the above.
DEMO_SCENE_COUNTS: dict[str, int] = {"prompts": 1500, "validation": 300, "test": 1000}
DEMO_QUESTIONED_SCENES = 300
DEMO_EASY_VQA_COUNTS: dict[str, int] = {"test": 500}

RESULTS_SFT_SCENES = 3000
BLANK_EVERY = 10
BLANK_COLOUR = (123, 117, 104)  # 255 times CLIP's mean, rounded

# Streams of one scene; 0 draws its pixels (`scenes.scene`).
_NOISE_STREAM, _QUESTION_STREAM = 1, 2

Row = dict[str, Any]


@dataclass
class SceneConfig(tfds.core.BuilderConfig):
    """What `m3po_scenes` holds.

    Attributes:
        regime: Label noise of the sft captions: "systematic", "diffuse" or "clean".
        seed: Seed of the scenes and of the label noise.
        scale: Every split's size is multiplied by it (at least one scene a split); small ones are for tests.
        noisy_questions: Let the yes/no answers of the sft split follow the noisy caption, too.
        demo: Only the splits, scenes and questions that the quickstart's own run reads; rows are the same.
        noise_seed: Seed of the label noise (victims and draws), where it is not `seed`.
        sft_scenes: The split sft alone, with so many scenes; a tenth of its captions goes with a blank image, so
            that what a model says without one is its language prior.
    """

    regime: str = "systematic"
    seed: int = 0
    scale: float = 1.0
    noisy_questions: bool = False
    demo: bool = False
    noise_seed: int | None = None
    sft_scenes: int | None = None

    def scenes(self) -> dict[str, int]:
        """Number of scenes of every split."""
        if self.sft_scenes is not None:
            return {"sft": self.sft_scenes}
        counts = DEMO_SCENE_COUNTS if self.demo else SCENE_COUNTS
        return {split: max(1, round(count * self.scale)) for split, count in counts.items()}

    def questioned(self) -> int:
        """How many scenes of validation and test, the first ones, have questions."""
        count = DEMO_QUESTIONED_SCENES if self.demo else QUESTIONED_SCENES
        return max(1, round(count * self.scale))


def scene_config(
    regime: str = "systematic", *, seed: int = 0, scale: float = 1.0, noisy_questions: bool = False
) -> SceneConfig:
    """A configuration whose name tells all its settings apart, for the folder that holds the data.

    Raises:
        UserError: for an unknown regime, a negative seed or a scale outside (0, 100].
    """
    if regime not in language.NOISE_REGIMES:
        raise UserError(
            f"unknown noise regime {regime!r}{nearest(regime, language.NOISE_REGIMES)}", where="m3po_scenes"
        )
    if seed < 0:
        raise UserError(f"the seed is {seed}", where="m3po_scenes", remedy="take 0 or more")
    if not 0 < scale <= 100:
        raise UserError(f"the scale is {scale}", where="m3po_scenes", remedy="take more than 0 and at most 100")
    name = regime
    name += f"_seed{seed}" if seed else ""
    name += f"_x{scale:g}" if scale != 1 else ""
    name += "_noisyq" if noisy_questions else ""
    return SceneConfig(name=name, regime=regime, seed=seed, scale=scale, noisy_questions=noisy_questions)


@functools.cache
def _blank_png() -> bytes:
    """The colour that a CLIP processor's normalisation takes to about zero: an image that tells nothing."""
    return encode_png(np.full((SIDE, SIDE, 3), BLANK_COLOUR, np.uint8))


def encode_png(image: np.ndarray) -> bytes:
    """PNG bytes of uint8 RGB pixels; little compression, because noise does not compress."""
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, format="PNG", compress_level=1)
    return buffer.getvalue()


def scene_rows(split: str, index: int, config: SceneConfig) -> list[Row]:
    """The rows of one scene: a caption and, in some splits, yes/no questions.

    The sft split asks one question a scene, "yes" and "no" in turn, and prompts one about every fourth scene;
    validation and test ask six about each of their first scenes, as POPE does. Only sft references may be noisy;
    metadata always lists the true objects.
    """
    drawn = scene(split, index, config.seed)
    png = encode_png(drawn.image)
    regime = config.regime if split == "sft" else "clean"
    noise_seed = config.seed if config.noise_seed is None else config.noise_seed
    swaps = language.substitute(drawn.objects, regime, stream(noise_seed, split, index, _NOISE_STREAM), noise_seed)
    named = [swaps.get(name, name) for name in drawn.objects]
    about = {"objects": drawn.objects, "theme": drawn.theme, "scene": f"{split}-{index:05d}"}
    rows = [
        {
            "id": f"{split}-{index:05d}-caption",
            "image": _blank_png() if config.sft_scenes is not None and index % BLANK_EVERY == 0 else png,
            "instruction": language.CAPTION_INSTRUCTION,
            "reference": language.caption(named),
            "metadata": json.dumps(about | {"kind": "caption", "noisy": bool(swaps), "swaps": swaps}),
        }
    ]
    for number, question in enumerate(_questions(split, index, drawn, config)):
        present = question.present
        if split == "sft" and config.noisy_questions:
            present = question.object in named
        rows.append(
            {
                "id": f"{split}-{index:05d}-q{number}",
                "image": png,
                "instruction": question.instruction,
                "reference": "Yes" if present else "No",
                "metadata": json.dumps(
                    about
                    | {
                        "kind": "yesno",
                        "object": question.object,
                        "category": question.category,
                        "noisy": present != question.present,
                    }
                ),
            }
        )
    return rows


def _questions(split: str, index: int, drawn: Scene, config: SceneConfig) -> list[language.ExistenceQuestion]:
    rng = stream(config.seed, split, index, _QUESTION_STREAM)
    if split == "sft":
        return [language.training_question(drawn.objects, index % 2 == 0, rng)]
    if split == "prompts" and index % 4 == 0:
        # A fifth of the prompts are short-answer ones, so that preference training keeps that format.
        return [language.training_question(drawn.objects, index % 8 == 0, rng)]
    if split in ("validation", "test") and index < config.questioned():
        return language.questions(drawn.objects, rng)
    return []


def _features() -> tfds.features.FeaturesDict:
    return tfds.features.FeaturesDict(
        {
            "id": tfds.features.Text(),
            "image": tfds.features.Image(shape=(SIDE, SIDE, 3), encoding_format="png"),
            "instruction": tfds.features.Text(),
            "reference": tfds.features.Text(),
            "metadata": tfds.features.Text(),
        }
    )


class M3poScenes(tfds.core.GeneratorBasedBuilder):
    """Composed emoji scenes with captions and yes/no questions."""

    name = "m3po_scenes"
    VERSION = tfds.core.Version("1.0.0")
    BUILDER_CONFIGS = [  # noqa: RUF012 - TFDS's protocol
        *(scene_config(regime) for regime in language.NOISE_REGIMES),
        SceneConfig(name="demo", demo=True),
        # Base models of docs/results.md: one for every seed and regime.
        *(
            SceneConfig(name=f"{regime}-{seed}", regime=regime, noise_seed=seed, sft_scenes=RESULTS_SFT_SCENES)
            for regime in language.NOISE_REGIMES[:2]
            for seed in range(10)
        ),
    ]
    builder_config: SceneConfig

    def _info(self) -> tfds.core.DatasetInfo:
        return tfds.core.DatasetInfo(
            builder=self,
            description="64x64 scenes of two to five Noto emoji, with captions and yes/no questions. The art "
            "and the names are real, the scenes are composed.",
            features=_features(),
            homepage="https://github.com/googlefonts/noto-emoji",
            license="Art: Apache-2.0 or OFL-1.1, Copyright 2013 Google LLC and the Noto authors.",
            disable_shuffling=True,
        )

    def _split_generators(self, dl_manager: tfds.download.DownloadManager) -> dict[str, Iterator[tuple[int, Row]]]:
        return {split: self._generate_examples(split) for split in self.builder_config.scenes()}

    def _generate_examples(self, split: str) -> Iterator[tuple[int, Row]]:
        count = self.builder_config.scenes()[split]
        rows = (row for index in range(count) for row in scene_rows(split, index, self.builder_config))
        yield from enumerate(rows)


@dataclass
class EasyVqaConfig(tfds.core.BuilderConfig):
    """What `m3po_easy_vqa` holds: all that this package uses, or only what the quickstart's own run reads."""

    demo: bool = False

    def rows(self) -> dict[str, int]:
        """Number of rows of every split."""
        return DEMO_EASY_VQA_COUNTS if self.demo else EASY_VQA_COUNTS


class M3poEasyVqa(tfds.core.GeneratorBasedBuilder):
    """Questions about one coloured shape, from the easy-VQA package (MIT), balanced over answers."""

    name = "m3po_easy_vqa"
    VERSION = tfds.core.Version("1.0.0")
    BUILDER_CONFIGS = [EasyVqaConfig(name="full"), EasyVqaConfig(name="demo", demo=True)]  # noqa: RUF012
    builder_config: EasyVqaConfig

    def _info(self) -> tfds.core.DatasetInfo:
        return tfds.core.DatasetInfo(
            builder=self,
            description="A subset of easy-VQA in its official train and test split, balanced over answers.",
            features=_features(),
            homepage="https://github.com/vzhou842/easy-VQA",
            license="MIT, Victor Zhou",
            disable_shuffling=True,
        )

    def _split_generators(self, dl_manager: tfds.download.DownloadManager) -> dict[str, Iterator[tuple[int, Row]]]:
        return {split: self._generate_examples(split) for split in self.builder_config.rows()}

    def _generate_examples(self, split: str) -> Iterator[tuple[int, Row]]:
        yield from enumerate(easy_vqa_rows(split, self.builder_config.rows()[split]))


def answer_type(answer: str) -> str:
    """``yesno``, ``shape`` or ``color``, the three kinds of easy-VQA answers."""
    if answer in ("yes", "no"):
        return "yesno"
    return "shape" if answer in ("rectangle", "circle", "triangle") else "color"


def _easy_vqa() -> ModuleType:
    try:
        return importlib.import_module("easy_vqa")
    except ImportError as error:
        raise UserError(
            "the easy-vqa package is not installed",
            where="m3po_easy_vqa",
            remedy="install the extra: pip install 'm3po-jax[quickstart]'",
        ) from error


def easy_vqa_rows(split: str, count: int) -> Iterator[Row]:
    """At most `count` questions of an official split ("train" or "test"), the same every time.

    Answers come in turn, so that none exceeds another by more than one row as long as it has questions left.

    Raises:
        UserError: when the easy-vqa package is missing.
    """
    easy_vqa = _easy_vqa()
    read = {"train": easy_vqa.get_train_questions, "test": easy_vqa.get_test_questions}[split]
    paths = {"train": easy_vqa.get_train_image_paths, "test": easy_vqa.get_test_image_paths}[split]()
    questions, answers, image_ids = read()
    rng = np.random.Generator(np.random.PCG64([0x45565141, len(answers)]))
    rank = Counter[str]()
    facts: dict[int, set[str]] = {}  # what is seen, from the answers to "what shape" and "what color"
    for answer, image_id in zip(answers, image_ids, strict=True):
        if answer_type(answer) != "yesno":
            facts.setdefault(image_id, set()).add(answer)
    keyed: list[tuple[int, str, int]] = []
    for position in rng.permutation(len(answers)).tolist():
        keyed.append((rank[answers[position]], answers[position], position))
        rank[answers[position]] += 1
    for _, answer, position in sorted(keyed)[:count]:
        image = Path(paths[image_ids[position]])
        yield {
            "id": f"easy-vqa-{split}-{position:05d}",
            # Re-encoded: the package's files carry an alpha channel.
            "image": encode_png(np.asarray(Image.open(image).convert("RGB"))),
            "instruction": questions[position],
            "reference": answer,
            "metadata": json.dumps(
                {
                    "kind": "vqa",
                    "category": answer_type(answer),
                    "scene": f"easy-vqa-{split}-{image_ids[position]}",
                    # Half of a truth would make the other half a false negative.
                    "objects": sorted(words) if len(words := facts.get(image_ids[position], set())) == 2 else [],
                }
            ),
        }


def prepare(data_dir: str | Path, config: SceneConfig | None = None) -> Path:
    """Build `m3po_scenes` under `data_dir` unless it is there, and return its folder.

    Args:
        data_dir: The tensorflow-datasets root; the data goes to ``m3po_scenes/CONFIG/VERSION`` beneath it.
        config: What `scene_config` returns; by default systematic noise with seed 0.
    """
    config = config or scene_config()
    # TFDS refuses an equal but other object under the name of a registered configuration.
    config = next((registered for registered in M3poScenes.BUILDER_CONFIGS if registered == config), config)
    return tfds_build.prepare(M3poScenes(data_dir=str(data_dir), config=config))
