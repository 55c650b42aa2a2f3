"""Texts and images of dual encoders, against transformers' own tokenizer call."""

import json

import numpy as np
import pytest
from PIL import Image as PILImage

from m3po_jax.data.dual_inputs import DualEncoderProcessor
from m3po_jax.data.images import ImageProcessor
from m3po_jax.data.schema import Image, Prompt
from m3po_jax.errors import UserError

WORDS = ["<unk>", "<start>", "<end>", "<pad>", "a", "photo", "of", "dog", "cat", "red"]


def write(folder, *, pad="<pad>", siglip=False, **settings):
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    single = "$A <end>" if siglip else "<start> $A <end>"
    tokenizer.post_processor = processors.TemplateProcessing(
        single=single, special_tokens=[("<start>", 1), ("<end>", 2)]
    )
    tokenizer.add_special_tokens(WORDS[:4])
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "unk_token": "<unk>",
        "bos_token": "<start>",
        "eos_token": "<end>",
        **({"pad_token": pad} if pad else {}),
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    kind = "SiglipImageProcessor" if siglip else "CLIPImageProcessor"
    size = {"height": 8, "width": 8} if siglip else {"shortest_edge": 8}
    (folder / "preprocessor_config.json").write_text(
        json.dumps({"image_processor_type": kind, "size": size, "crop_size": 8, **settings})
    )
    return folder


@pytest.mark.parametrize("siglip", [False, True])
@pytest.mark.parametrize("pad", ["<pad>", "<end>"])
def test_texts_equal_transformers_padded_and_cut(tmp_path, siglip, pad):
    from transformers import AutoTokenizer

    texts = ["a photo of a dog", "cat", "", " ".join(["a red cat"] * 4), "a zebra", "a b c d e f"]
    processor = DualEncoderProcessor.from_pretrained(write(tmp_path, pad=pad, siglip=siglip), max_positions=8)
    expected = AutoTokenizer.from_pretrained(tmp_path)(
        texts, padding="max_length", truncation=True, max_length=8, return_tensors="np"
    )
    ids, mask = processor.encode_texts(texts)
    np.testing.assert_array_equal(ids, expected["input_ids"])
    np.testing.assert_array_equal(mask, expected["attention_mask"].astype(bool))
    assert ids.dtype == np.int32 and mask.dtype == bool


def test_without_a_padding_token_the_end_token_pads(tmp_path):
    processor = DualEncoderProcessor.from_pretrained(write(tmp_path, pad=""), max_positions=6)
    ids, mask = processor.encode_texts(["a dog"])
    np.testing.assert_array_equal(ids, [[1, 4, 7, 2, 2, 2]])
    assert mask.sum() == 4


def test_a_spelt_end_token_does_not_end_the_text(tmp_path):
    processor = DualEncoderProcessor.from_pretrained(write(tmp_path), max_positions=12)
    ids, _ = processor.encode_texts(["a dog <end> of<start>a<pad> cat \ud800"])
    plain, _ = processor.encode_texts(["a dog of a cat ?"])
    np.testing.assert_array_equal(ids, plain)
    assert (ids == processor.eos_token_id).sum() == 1


def picture(tmp_path, name="picture.png", size=(16, 8)):
    pixels = np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    PILImage.fromarray(pixels).save(tmp_path / name)
    return Image(path=name)


@pytest.mark.parametrize(
    ("siglip", "fit", "as_fit"), [(False, "", "crop"), (True, "", "stretch"), (False, "pad", "pad")]
)
def test_images_are_fitted_as_the_model_was_trained(tmp_path, siglip, fit, as_fit):
    write(tmp_path, siglip=siglip)
    processor = DualEncoderProcessor.from_pretrained(tmp_path, max_positions=8, image_root=tmp_path, image_fit=fit)
    image = picture(tmp_path)
    found = processor.images(Prompt("p", (image, image), "x"))
    with PILImage.open(tmp_path / "picture.png") as opened:
        expected = {
            name: ImageProcessor.from_pretrained(tmp_path)(opened, name) for name in ("crop", "stretch", "pad")
        }
    assert found.shape == (2, 8, 8, 3) and found.dtype == np.float32
    np.testing.assert_array_equal(found[0], expected[as_fit])
    np.testing.assert_array_equal(found[0], found[1])
    others = [value for name, value in expected.items() if name != as_fit]
    assert all(np.abs(found[0] - other).max() > 0.1 for other in others)


def test_no_images(tmp_path):
    processor = DualEncoderProcessor.from_pretrained(write(tmp_path), max_positions=8)
    assert processor.images(Prompt("p", (), "x")).shape == (0, 8, 8, 3)


def test_errors_name_the_row(tmp_path):
    processor = DualEncoderProcessor.from_pretrained(
        write(tmp_path), max_positions=8, image_root=tmp_path, max_image_pixels=100
    )
    thin = picture(tmp_path, "thin.png", (1, 90))
    for image, reason in (
        (Image(bytes=b"not an image"), "decode"),
        (picture(tmp_path), "max_image_pixels"),
        (Image(path="missing.png"), "missing"),
    ):
        with pytest.raises(UserError, match=rf"^rows:3.*{reason}"):
            processor.images(Prompt("p", (image,), "x", where="rows:3"))
    assert processor.images(Prompt("p", (thin,), "x")).shape == (1, 8, 8, 3)
    PILImage.new("RGB", (1, 60_000)).save(tmp_path / "thinnest.png")
    wide = DualEncoderProcessor.from_pretrained(tmp_path, max_positions=8, image_root=tmp_path, image_fit="pad")
    with pytest.raises(UserError, match=r"^id 'p': .*too thin"):
        wide.images(Prompt("p", (Image(path="thinnest.png"),), "x"))


def test_bad_directories(tmp_path):
    with pytest.raises(UserError, match="cannot load the tokenizer"):
        DualEncoderProcessor.from_pretrained(tmp_path, max_positions=8)
    write(tmp_path)
    with pytest.raises(UserError, match="did you mean 'stretch'"):
        DualEncoderProcessor.from_pretrained(tmp_path, max_positions=8, image_fit="strech")
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config | {"eos_token": None}))
    with pytest.raises(UserError, match="no EOS token"):
        DualEncoderProcessor.from_pretrained(tmp_path, max_positions=8)
