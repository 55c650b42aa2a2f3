"""Decoding of hostile images, and the pixel pipeline against transformers' PIL back end."""

import hashlib
import io
import json
import os
import struct
import warnings
import zlib
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image as PILImage

from m3po_jax.data import schema
from m3po_jax.data.images import IMAGE_FITS, ImageProcessor, decode, picture_hash, read_encoded
from m3po_jax.data.pixel_modes import to_rgb
from m3po_jax.errors import UserError

CLIP = {
    "image_processor_type": "CLIPImageProcessor",
    "do_resize": True,
    "size": {"shortest_edge": 30},
    "resample": 3,
    "do_center_crop": True,
    "crop_size": {"height": 30, "width": 30},
    "do_rescale": True,
    "rescale_factor": 1 / 255,
    "do_normalize": True,
    "image_mean": [0.48145466, 0.4578275, 0.40821073],
    "image_std": [0.26862954, 0.26130258, 0.27577711],
}
SIGLIP = {
    "image_processor_type": "SiglipImageProcessor",
    "size": {"height": 28, "width": 28},
    "resample": 3,
    "image_mean": [0.5, 0.5, 0.5],
    "image_std": [0.5, 0.5, 0.5],
}
SIZES = [(30, 30), (1, 1), (17, 5), (5, 17), (31, 29), (400, 3), (3, 400), (97, 101), (640, 213)]
MODES = ["RGB", "L", "LA", "RGBA", "P", "PA", "CMYK", "1", "YCbCr"]


def oracle(kind: str, **settings):
    """One of transformers' PIL image processors."""
    clip = pytest.importorskip("transformers.models.clip.image_processing_pil_clip")
    llava = pytest.importorskip("transformers.models.llava.image_processing_pil_llava")
    siglip = pytest.importorskip("transformers.models.siglip.image_processing_pil_siglip")
    classes = {
        "CLIPImageProcessor": clip.CLIPImageProcessorPil,
        "LlavaImageProcessor": llava.LlavaImageProcessorPil,
        "SiglipImageProcessor": siglip.SiglipImageProcessorPil,
    }
    processor = classes[kind](**{k: v for k, v in settings.items() if k != "image_processor_type"})
    return lambda image: np.asarray(processor(image)["pixel_values"][0]).transpose(1, 2, 0)


def picture(size: tuple[int, int], mode: str = "RGB", seed: int = 0) -> PILImage.Image:
    rng = np.random.default_rng(seed)
    width, height = size
    rgba = PILImage.fromarray(rng.integers(0, 256, (height, width, 4), np.uint8))
    if mode in ("P", "PA"):
        palette = rgba.convert("RGB").quantize(7)
        return palette if mode == "P" else palette.convert("PA")
    return rgba if mode == "RGBA" else rgba.convert("RGB").convert(mode)


def png(image: PILImage.Image, **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG", **options)
    return buffer.getvalue()


def load(data: bytes | None = None, *, path: str | None = None, root: Path = Path("."), limit: int = 10**6):
    return decode(schema.Image(data, path), root=root, max_pixels=limit, where="prompts.jsonl:3 (id 'x')")


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("fit", IMAGE_FITS)
def test_pixels_equal_transformers_for_every_fit_and_shape(size, fit):
    image = picture(size, seed=sum(size))
    settings = {
        "crop": CLIP,
        "pad": CLIP | {"image_processor_type": "LlavaImageProcessor", "do_pad": True},
        "stretch": CLIP
        | {
            "image_processor_type": "SiglipImageProcessor",
            "size": {"height": 30, "width": 30},
            "do_center_crop": False,
        },
    }[fit]
    got = ImageProcessor.from_config(CLIP)(image, fit)
    assert got.dtype == np.float32 and got.shape == (30, 30, 3)
    np.testing.assert_allclose(got, oracle(settings["image_processor_type"], **settings)(image), atol=1e-6)


@pytest.mark.parametrize(
    "config",
    [
        CLIP | {"size": {"shortest_edge": 40}},  # resized further than the crop
        CLIP | {"size": {"shortest_edge": 21}},  # smaller than the crop: black borders
        CLIP | {"size": {"shortest_edge": 22}, "crop_size": {"height": 25, "width": 31}},
        CLIP | {"do_normalize": False, "rescale_factor": 1 / 127.5},
        CLIP | {"do_rescale": False, "resample": 2},
        CLIP | {"image_processor_type": "LlavaImageProcessor", "do_pad": True, "size": {"shortest_edge": 37}},
        SIGLIP,
        SIGLIP | {"size": {"height": 20, "width": 33}, "resample": 2},
    ],
)
@pytest.mark.parametrize("size", [(64, 48), (13, 55), (90, 7)])
def test_settings_of_the_model_are_followed(config, size):
    image = picture(size)
    want = oracle(config["image_processor_type"], **config)(image)
    np.testing.assert_allclose(ImageProcessor.from_config(config)(image), want, atol=1e-6)


@settings(max_examples=40, deadline=None)
@given(width=st.integers(1, 130), height=st.integers(1, 130), fit=st.sampled_from(["pad", "crop"]))
def test_any_size_equals_transformers(width, height, fit):
    image = picture((width, height), seed=width * 131 + height)
    config = CLIP | {"image_processor_type": "LlavaImageProcessor", "do_pad": fit == "pad"}
    want = oracle("LlavaImageProcessor", **config)(image)
    np.testing.assert_allclose(ImageProcessor.from_config(config)(image), want, atol=1e-6)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.filterwarnings("ignore")
def test_every_pixel_mode_becomes_rgb_as_in_transformers(mode):
    transforms = pytest.importorskip("transformers.image_transforms")
    image = picture((19, 11), mode)
    want = transforms.convert_to_rgb(image)
    assert to_rgb(image).mode == "RGB"
    np.testing.assert_array_equal(np.asarray(to_rgb(image)), np.asarray(want))
    np.testing.assert_allclose(
        ImageProcessor.from_config(CLIP)(image), oracle("CLIPImageProcessor", **CLIP)(image), atol=1e-6
    )


def test_a_transparent_palette_entry_becomes_white():
    image = PILImage.new("P", (4, 4), 0)
    image.putpalette([10, 20, 30] * 256)
    assert np.asarray(load(png(image, transparency=0))).tolist() == [[[255] * 3] * 4] * 4


def test_padding_uses_the_mean_colour_cut_to_whole_numbers():
    processor = ImageProcessor.from_config(CLIP)
    assert processor.background == (122, 116, 104)
    corner = processor(PILImage.new("RGB", (60, 20)), "pad")[0, 0]
    want = (np.array([122, 116, 104]) / 255 - CLIP["image_mean"]) / CLIP["image_std"]
    np.testing.assert_allclose(corner, want, atol=1e-6)


def encoded(image: PILImage.Image, kind: str, **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def with_orientation(number, kind: str = "JPEG", size=(12, 5), **options) -> bytes:
    exif = PILImage.Exif()
    exif[0x0112] = number
    return encoded(picture(size), kind, exif=exif, **options)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF", "MPO"])
@pytest.mark.parametrize("number", [1, 2, 3, 4, 5, 6, 7, 8])
def test_exif_orientation_is_applied_as_elsewhere(number, kind, tmp_path):
    """What transformers' load_image and the datasets library make of a photograph, our model and judge see too."""
    utilities, datasets = pytest.importorskip("transformers.image_utils"), pytest.importorskip("datasets")
    data = with_orientation(number, kind)
    (tmp_path / "x").write_bytes(data)
    got = np.asarray(load(data))
    assert got.shape == ((12, 5, 3) if number > 4 else (5, 12, 3))
    np.testing.assert_array_equal(got, np.asarray(utilities.load_image(str(tmp_path / "x")).convert("RGB")))
    np.testing.assert_array_equal(got, np.asarray(datasets.Image().decode_example({"bytes": data, "path": None})))


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
def test_exif_orientation_can_be_ignored_and_then_no_reader_turns(kind):
    datasets = pytest.importorskip("datasets")
    data = with_orientation(6, kind)
    image = schema.Image(data, exif="ignore")
    stored = np.asarray(PILImage.open(io.BytesIO(data)).convert("RGB"))  # as LLaVA's code opens it
    got = decode(image, root=Path("."), max_pixels=10**6, where="x")
    np.testing.assert_array_equal(np.asarray(got), stored)
    # A judge, the report, TRL and our own training from pairs get these bytes.
    shown = read_encoded(image, root=Path("."), where="x")
    np.testing.assert_array_equal(np.asarray(load(shown)), stored)
    np.testing.assert_array_equal(np.asarray(datasets.Image().decode_example({"bytes": shown, "path": None})), stored)
    plain = schema.Image(with_orientation(1, kind), exif="ignore")
    assert read_encoded(plain, root=Path("."), where="x") == plain.bytes


@pytest.mark.parametrize("value", [0, 9, 65535])
def test_an_orientation_that_means_nothing_turns_nothing(value):
    exif = PILImage.Exif()
    exif[0x0112] = value
    assert load(encoded(picture((12, 5)), "JPEG", exif=exif)).size == (12, 5)
    broken = with_orientation(6).replace(b"Exif\0\0MM", b"Exif\0\0XX").replace(b"Exif\0\0II", b"Exif\0\0XX")
    assert load(broken).size == (12, 5)


def test_cache_keys_change_with_what_is_seen_and_with_nothing_else():
    plain, turned = with_orientation(1), with_orientation(6)
    assert picture_hash(plain) == hashlib.sha256(plain).hexdigest()  # paid answers about it stay valid
    assert picture_hash(turned) != hashlib.sha256(turned).hexdigest()
    deep = png(PILImage.fromarray(np.zeros((2, 2), np.uint16)))
    assert picture_hash(deep) != hashlib.sha256(deep).hexdigest()
    assert picture_hash(b"no image") == hashlib.sha256(b"no image").hexdigest()


DEEP = np.array([[0, 128, 257, 32768], [65535, 65407, 300, 25700]], np.uint16)
EIGHT = np.floor(DEEP.astype(np.float64) * 255 / 65535 + 0.5).astype(np.uint8)


def chunked_png(depth: int, colour: int, width: int, rows: list[bytes], extra: bytes = b"") -> bytes:
    header = struct.pack(">IIBBBBB", width, len(rows), depth, colour, 0, 0, 0)
    data = png_chunk(b"IDAT", zlib.compress(b"".join(b"\0" + row for row in rows)))
    return b"\x89PNG\r\n\x1a\n" + png_chunk(b"IHDR", header) + extra + data + png_chunk(b"IEND", b"")


def png_chunk(name: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))


def big_endian(values: np.ndarray) -> list[bytes]:
    return [row.astype(">u2").tobytes() for row in values]


def white_is_zero(data: bytes) -> bytes:
    """A little-endian grey TIFF with the photometric interpretation 0."""
    entry = struct.pack("<HHII", 262, 3, 1, 1)
    assert entry in data
    return data.replace(entry, struct.pack("<HHII", 262, 3, 1, 0))


def grey(values) -> list:
    return np.repeat(np.asarray(values)[..., None], 3, axis=-1).tolist()


def test_sixteen_bit_grey_is_scaled_by_its_range():
    want = grey(EIGHT)
    assert np.asarray(load(chunked_png(16, 0, 4, big_endian(DEEP)))).tolist() == want
    assert np.asarray(load(encoded(PILImage.fromarray(DEEP), "TIFF"))).tolist() == want
    assert np.asarray(load(encoded(PILImage.fromarray(DEEP.astype(">u2")), "TIFF"))).tolist() == want
    inverted = white_is_zero(encoded(PILImage.fromarray(DEEP), "TIFF"))
    assert np.asarray(load(inverted)).tolist() == grey(255 - EIGHT)
    assert np.asarray(load(b"P5 4 2 65535\n" + b"".join(big_endian(DEEP)))).tolist() == want
    assert np.asarray(load(b"P5 2 1 1023\n" + struct.pack(">2H", 1023, 0))).tolist() == grey([[255, 0]])
    assert np.asarray(to_rgb(PILImage.fromarray(DEEP))).tolist() == want
    pixels = ImageProcessor.from_config(CLIP)(PILImage.fromarray(DEEP), "stretch")
    same = ImageProcessor.from_config(CLIP)(PILImage.fromarray(EIGHT), "stretch")
    np.testing.assert_array_equal(pixels, same)


def test_deep_colour_and_deep_alpha_are_scaled():
    colour = np.stack([DEEP, DEEP[::-1], 65535 - DEEP], -1)
    got = np.asarray(load(chunked_png(16, 2, 4, big_endian(colour.reshape(2, -1)))))
    assert np.abs(got.astype(int) - colour / 257).max() <= 1  # Pillow takes the upper byte
    both = np.stack([DEEP, np.full_like(DEEP, 65535)], -1)
    got = np.asarray(load(chunked_png(16, 4, 4, big_endian(both.reshape(2, -1)))))
    assert np.abs(got.astype(int) - np.array(grey(DEEP / 257))).max() <= 1
    clear = np.stack([DEEP, np.zeros_like(DEEP)], -1)
    assert (np.asarray(load(chunked_png(16, 4, 4, big_endian(clear.reshape(2, -1))))) == 255).all()


def test_a_transparent_colour_is_white_at_every_depth():
    def clear(*values):
        return png_chunk(b"tRNS", struct.pack(f">{len(values)}H", *values))

    row = big_endian(DEEP[:1])
    assert np.asarray(load(chunked_png(16, 0, 4, row, clear(257)))).tolist() == grey([[0, 0, 255, 128]])
    colour = [struct.pack(">6H", 256, 512, 65535, 9, 9, 9)]
    got = np.asarray(load(chunked_png(16, 2, 2, colour, clear(256, 512, 65535))))
    assert got.tolist() == [[[255] * 3, [0] * 3]]
    assert np.asarray(load(chunked_png(2, 0, 4, [bytes([0b00011011])], clear(2)))).tolist() == grey(
        [[0, 85, 255, 255]]
    )
    assert np.asarray(load(chunked_png(4, 0, 2, [bytes([0x3F])], clear(3)))).tolist() == grey([[255, 255]])
    assert np.asarray(load(chunked_png(1, 0, 4, [bytes([0b10100000])], clear(0)))).tolist() == grey([[255] * 4])
    assert np.asarray(load(chunked_png(8, 0, 2, [bytes([7, 9])], clear(7)))).tolist() == grey([[255, 9]])


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (encoded(PILImage.fromarray(np.array([[0, 9, 70000]], np.int32)), "TIFF"), "32-bit integers"),
        (encoded(PILImage.fromarray(np.array([[0.0, 0.5]], np.float32)), "TIFF"), "floating-point numbers"),
        (b"Pf\n1 1\n-1.0\n" + struct.pack("<f", 0.5), "floating-point numbers"),
    ],
)
def test_pixels_that_do_not_say_what_is_white_are_refused_by_name(data, reason):
    with pytest.raises(UserError, match=rf"prompts\.jsonl:3 \(id 'x'\): its pixels are .*{reason}.*; save it"):
        load(data)


def test_lab_colours_are_not_taken_for_transparency():
    data = encoded(PILImage.new("LAB", (2, 2), (136, 208, 195)), "TIFF")  # sRGB red; 8-bit a and b in TIFF's encoding
    want = np.asarray(PILImage.open(io.BytesIO(data)).convert("RGB"))
    np.testing.assert_array_equal(np.asarray(load(data)), want)


def test_the_first_frame_of_an_animation_is_seen():
    frames = [PILImage.new("RGB", (4, 3), colour) for colour in ((200, 30, 40), (0, 0, 255))]
    for kind in ("GIF", "WEBP", "PNG", "TIFF", "MPO"):
        options = {"lossless": True} if kind == "WEBP" else {}
        data = encoded(frames[0], kind, save_all=True, append_images=frames[1:], **options)
        difference = np.asarray(load(data)).astype(int) - (200, 30, 40)
        assert np.abs(difference).max() <= 3 * (kind == "MPO"), kind


def test_data_max_image_pixels_is_the_only_limit(monkeypatch):
    """Pillow's own limit neither refuses an image that ours allows nor warns of it."""
    monkeypatch.setattr(PILImage, "MAX_IMAGE_PIXELS", 50)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for kind in ("PNG", "TIFF", "WEBP", "GIF", "JPEG", "BMP"):
            data = encoded(picture((20, 30)), kind)
            assert load(data, limit=600).size == (20, 30)
            with pytest.raises(UserError, match=r"20 x 30 pixels, more than data.max_image_pixels = 599; .*=600"):
                load(data, limit=599)
    assert PILImage.MAX_IMAGE_PIXELS == 50


def test_metadata_that_unpack_to_megabytes_are_named():
    text = png_chunk(b"zTXt", b"a\0\0" + zlib.compress(b"x" * 5_000_000))
    with pytest.raises(UserError, match=r"its metadata unpack to more than a megabyte.*save it without metadata"):
        load(chunked_png(8, 0, 2, [bytes([7, 9])], text))


def test_a_web_address_is_named():
    with pytest.raises(UserError, match=r"the image is a web address, 'https://a\.b/c\.png'; download it"):
        load(path="https://a.b/c.png")


def test_reads_the_folder_of_a_model(tmp_path):
    with pytest.raises(UserError, match=r"preprocessor_config\.json"):
        ImageProcessor.from_pretrained(tmp_path)
    (tmp_path / "processor_config.json").write_text(json.dumps({"image_processor": SIGLIP, "patch_size": 14}))
    assert ImageProcessor.from_pretrained(tmp_path).native_fit == "stretch"
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(CLIP))
    assert ImageProcessor.from_pretrained(tmp_path).native_fit == "crop"
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(CLIP | {"size": 30, "crop_size": 30}))
    assert ImageProcessor.from_pretrained(tmp_path) == ImageProcessor.from_config(CLIP)
    for broken in (
        "{",
        json.dumps(CLIP | {"image_mean": ["x", 1, 2]}),
        json.dumps(CLIP | {"image_std": [1]}),
    ):
        (tmp_path / "preprocessor_config.json").write_text(broken)
        with pytest.raises(UserError, match=r"preprocessor_config\.json: "):
            ImageProcessor.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    "change",
    [
        {"image_processor_type": "LlavaNextImageProcessor"},
        {"image_processor_type": "Siglip2ImageProcessor"},
        {"do_resize": False},
        {"do_center_crop": False},
        {"size": {"longest_edge": 30}},
        {"size": {"height": 40, "width": 40}},
    ],
)
def test_processors_it_cannot_follow_are_refused(change):
    with pytest.raises(UserError):
        ImageProcessor.from_config(CLIP | change)


def test_unknown_fit_names_the_nearest():
    with pytest.raises(UserError, match="did you mean 'crop'"):
        ImageProcessor.from_config(CLIP)(picture((3, 3)), "croop")


def test_thin_images_are_refused_before_they_are_blown_up():
    processor = ImageProcessor.from_config(CLIP | {"size": {"shortest_edge": 336}})
    thin = PILImage.new("RGB", (1, 100_000))
    for fit in ("pad", "crop"):
        with pytest.raises(UserError, match="too thin"):
            processor(thin, fit)
    assert processor(thin, "stretch").shape == (30, 30, 3)


def test_decodes_bytes_and_paths_alike(tmp_path):
    image = picture((9, 7))
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "a.png").write_bytes(png(image))
    for got in (
        load(png(image)),
        load(path="sub/a.png", root=tmp_path),
        load(path=str(tmp_path / "sub" / "a.png"), root=tmp_path),
        load(path="sub/../sub/a.png", root=tmp_path),
    ):
        assert got.mode == "RGB"
        np.testing.assert_array_equal(np.asarray(got), np.asarray(image))


def test_paths_cannot_leave_the_root(tmp_path):
    root = tmp_path / "root"
    root.mkdir()
    (tmp_path / "secret.png").write_bytes(png(picture((3, 3))))
    (tmp_path / "root2").mkdir()
    (tmp_path / "root2" / "b.png").write_bytes(png(picture((3, 3))))
    (root / "link.png").symlink_to(tmp_path / "secret.png")
    (root / "folder").symlink_to(tmp_path)
    for path in (
        "../secret.png",
        str(tmp_path / "secret.png"),
        "link.png",
        "folder/secret.png",
        "../root2/b.png",
        "/etc/passwd",
    ):
        with pytest.raises(UserError, match=r"prompts\.jsonl:3 \(id 'x'\): .*outside"):
            load(path=path, root=root)


def test_things_that_are_not_files_are_refused(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    for path in ("missing.png", ".", "pipe", "loop", "a\0b", "x" * 5000, ""):
        with pytest.raises(UserError, match=r"prompts\.jsonl:3 \(id 'x'\): "):
            load(path=path, root=tmp_path)
    with pytest.raises(UserError, match="neither bytes nor a path"):
        load()


def forged_png(width: int, height: int) -> bytes:
    """A PNG whose header claims a size that its data does not have."""

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    data = png_chunk(b"IDAT", zlib.compress(b"\0" * 30))
    return b"\x89PNG\r\n\x1a\n" + png_chunk(b"IHDR", header) + data + png_chunk(b"IEND", b"")


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "no bytes"),
        (b"hello, this is text", "cannot decode"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n", "is PostScript, which is not read"),
        (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "is an SVG drawing, which is not read; save it as"),
        (b"\xef\xbb\xbf<?xml version='1.0'?>\n<!-- a -->\n<svg/>", "is an SVG drawing"),
        (b"\0\0\0\x18ftypheic\0\0\0\0mif1heic", "is HEIC, which is not read; save it as JPEG or PNG"),
        (b"\n<!DOCTYPE html><title>404</title>", "is a web page, which is not read; the download failed"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0", "a pointer of Git LFS.*git lfs pull"),
        (b"%PDF-1.7", "is a PDF"),
        (b"\0" * 4096, "is only zeros, which is not read; fetch"),
        (png(picture((40, 40)))[:200], "cannot decode"),
        (png(picture((40, 40)))[:20], "cannot decode"),
        (forged_png(0, 5), ""),
        (forged_png(90, 90), "cannot decode"),
        (forged_png(1001, 1000), "1001 x 1000 pixels"),
        (forged_png(20000, 20000), "more than data.max_image_pixels = 1000000"),
    ],
)
def test_hostile_bytes_give_one_clear_line(data, reason):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with pytest.raises(UserError, match=reason) as caught:
            load(data)
    assert str(caught.value).startswith("prompts.jsonl:3 (id 'x'): ")
    assert caught.value.remedy and "\n" not in str(caught.value)


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_flipped_and_cut_files_never_raise_anything_else(data):
    image = picture((13, 9))
    kind = data.draw(st.sampled_from(["PNG", "JPEG", "GIF", "BMP", "TIFF", "WEBP"]))
    buffer = io.BytesIO()
    image.save(buffer, kind)
    body = bytearray(buffer.getvalue())
    for _ in range(data.draw(st.integers(1, 8))):
        body[data.draw(st.integers(0, len(body) - 1))] = data.draw(st.integers(0, 255))
    body = body[: data.draw(st.integers(1, len(body)))]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            assert load(bytes(body)).mode == "RGB"
        except UserError as error:
            assert error.where == "prompts.jsonl:3 (id 'x')"
