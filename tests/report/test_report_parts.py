"""The pieces of the report, each against an independent statement of what it should do."""

from __future__ import annotations

import base64
import io
import json
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from report_runs import picture

from m3po_jax.evaluation.metric import verdict
from m3po_jax.report import browser, charts, formatting, images, tables
from m3po_jax.report.figures import within_prompt_correlation
from m3po_jax.workspace.contents import Candidates

json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**50), 2**50)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
)


@given(json_values)
def test_embedded_json_round_trips_and_is_inert(value):
    text = str(formatting.embed_json(value))
    assert json.loads(text) == value
    assert not set(text) & set("<>&\u2028\u2029")


def test_embedded_json_has_no_nan():
    assert formatting.embed_json({"a": [math.nan, math.inf, 1.5]}) == '{"a":[null,null,1.5]}'


@given(st.floats(-1e6, 1e6), st.integers(0, 6))
def test_numbers_parse_back(value, digits):
    text = formatting.format_number(value, digits).replace("−", "-").replace(",", "")
    assert float(text) == pytest.approx(value, abs=0.5 * 10**-digits + 1e-9)
    assert text != "-0" and not text.startswith("-0.000000")


@pytest.mark.parametrize("value", [None, float("nan"), float("inf"), "x", True, [], {}])
def test_what_is_no_number_is_a_dash(value):
    assert formatting.format_number(value) == "–" == formatting.format_percent(value)


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.44, "0.4 s"),
        (59.4, "59 s"),
        (59.6, "1 min 00 s"),
        (3599.6, "1 h 00 min"),
        (8040, "2 h 14 min"),
        (None, "–"),
    ],
)
def test_durations(seconds, text):
    assert formatting.format_duration(seconds) == text


def test_page_encoding_replaces_controls_and_lone_surrogates():
    assert formatting.encode_page("a\x00\x1b\x85\t\n\ud800猫") == "a\ufffd\ufffd\ufffd\t\n?猫".encode()


@given(st.lists(st.floats(-10, 10), min_size=1, max_size=700))
def test_averaged_lines_keep_their_mean_and_bound(values):
    x, y = charts.average(range(len(values)), values)
    size = charts.bin_size(len(values))
    assert len(x) <= charts.MAX_POINTS
    counts = [len(values[i : i + size]) for i in range(0, len(values), size)]
    assert np.average(y, weights=counts) == pytest.approx(np.mean(values), abs=1e-9)


def test_averages_leave_out_nan():
    x, y = charts.average([1, 2, 3], [1.0, math.nan, 3.0])
    assert (x.tolist(), y.tolist()) == ([1, 3], [1, 3])


def test_charts_need_points():
    nothing = np.array([math.nan])
    assert charts.line_chart("", [charts.Line("", [1], [math.nan], "s0")], x_label="") is None
    assert charts.histogram_chart("", [("all", nothing)], x_label="") is None
    assert charts.scatter_chart("", [("all", np.array([1.0]), nothing)], x_label="", y_label="") is None
    assert charts.frontier_chart("", [], x_label="", y_label="") is None


@pytest.mark.parametrize(
    ("value", "base", "better", "expected"),
    [
        (1.0, (0, 2), "higher", ""), (2.0, (0, 2), "higher", ""), (2.1, (0, 2), "higher", "better"),
        (2.1, (0, 2), "lower", "worse"), (-1, (0, 2), "lower", "better"), (-1, (0, 2), None, "differs"),
        (None, (0, 2), "lower", ""), (5, None, "lower", ""),
    ],
)  # fmt: skip
def test_verdicts(value, base, better, expected):
    assert verdict(value, base, better) == expected


@pytest.mark.parametrize(("fixed", "broken", "p"), [(0, 0, 1.0), (5, 5, 1.0), (10, 0, 2 / 1024), (8, 2, 112 / 1024)])
def test_mcnemar_exact(fixed, broken, p):
    assert tables.mcnemar(fixed, broken) == pytest.approx(p) == tables.mcnemar(broken, fixed)


def test_correlation_within_prompts_ignores_differences_between_prompts():
    rng = np.random.default_rng(0)
    ids, mas, confidence = [], [], []
    for prompt in range(50):  # the prompts' means correlate perfectly, the candidates within do so negatively
        noise = rng.normal(size=6)
        ids += [str(prompt)] * 6
        mas += (prompt + noise).tolist()
        confidence += (prompt - noise).tolist()
    scores = {"mas": np.array(mas), "confidence": np.array(confidence)}
    pool = Candidates(ids, np.zeros(300), np.zeros(300), np.zeros(300, bool), 0, scores)
    assert within_prompt_correlation(pool) == pytest.approx(-1.0)
    scores["confidence"][:] = 1.0
    assert within_prompt_correlation(pool) is None


def test_spread_takes_best_worst_and_even_steps():
    values = np.array([0.1, 0.9, math.nan, 0.5, 0.3, 0.7])
    ids = list("abcdef")
    assert browser.spread(values, ids, 10) == [1, 5, 3, 4, 0, 2]
    assert browser.spread(values, ids, 2) == [1, 2]
    assert browser.spread(np.zeros(3), ["c", "a", "b"], 3) == [1, 2, 0]


def test_every_drop_reason_is_sampled_whatever_the_order():
    drops = [(f"p{i}", "common") for i in range(500)] + [("q", "rare"), ("r", "rare")]
    shown = browser.sample_drops(drops, 10)
    assert sorted(shown) == sorted(browser.sample_drops(drops[::-1], 10))
    assert [reason for _, reason in shown] == ["common"] * 5 + ["rare"] * 2


def test_token_levels_follow_probability_and_bad_ids_show_their_number():
    log_probs = [math.log(p) for p in (0.95, 0.6, 0.3, 0.1, 0.01)] + [None, float("nan")]

    def text(token: int) -> str:
        if token == 3:
            raise IndexError
        return f" {token}"

    tokens = browser.colour_tokens(list(range(7)), log_probs, text)
    assert [token.level for token in tokens] == [0, 1, 2, 3, 4, 0, 0]
    assert [token.text for token in tokens] == ["0", " 1", " 2", "⟨3⟩", " 4", " 5", " 6"]
    assert tokens[5].log_prob is None and tokens[6].log_prob is None


def test_tokens_beyond_the_budget_fall_back_to_text_chosen_first():
    def answer(role: str) -> browser.ShownAnswer:
        return browser.ShownAnswer(0, role, "text", [browser.Token("word", 0, -0.1)] * 10)

    item = browser.Item("a", 1, "", answers=[answer(""), answer("chosen")])
    browser.finish([item], [[]], token_budget=500)
    assert [len(a.tokens) for a in item.answers] == [0, 10]


def test_tokenizer_text_restores_spaces_and_bytes():
    class Tokenizer:
        pieces = ("▁cat", "Ġdog", "Ċ", "<0x0A>", "<0xE7>", "s")

        def convert_ids_to_tokens(self, token: int) -> str:
            return self.pieces[token]

    text = browser.tokenizer_text(Tokenizer())
    assert [text(i) for i in range(6)] == [" cat", " dog", "\n", "\n", "⟨E7⟩", "s"]


def decode(uri: str) -> Image.Image:
    return Image.open(io.BytesIO(base64.b64decode(uri.split(",")[1])))


def encode(image: Image.Image, kind: str = "PNG", **kwargs: object) -> bytes:
    out = io.BytesIO()
    image.save(out, kind, **kwargs)
    return out.getvalue()


def test_thumbnails_are_bounded_upright_and_clean():
    exif = Image.Exif()
    exif[0x0112] = 6  # rotate by 90 degrees
    exif[0x010E] = "a private description"
    uri = images.thumbnail(encode(Image.new("RGB", (1200, 600), "red"), "JPEG", exif=exif))
    assert uri is not None
    shown = decode(uri)
    assert shown.size == (180, 360) and shown.format == "WEBP"
    assert b"private" not in base64.b64decode(uri.split(",")[1])


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P", "L", "I;16", "CMYK", "1"])
def test_thumbnails_of_every_mode(mode):
    kind = "TIFF" if mode == "CMYK" else "PNG"
    uri = images.thumbnail(encode(Image.new(mode, (20, 10)), kind))
    assert uri is not None and decode(uri).size == (20, 10)


def test_transparent_pixels_become_white():
    uri = images.thumbnail(encode(Image.new("RGBA", (8, 8), (0, 0, 0, 0))))
    assert uri is not None and decode(uri).convert("RGB").getpixel((4, 4)) == (255, 255, 255)


def test_hostile_images_are_refused(monkeypatch):
    good = picture(0)
    for data in (None, b"", b"not an image", good[: len(good) // 2], b"<svg/>", b"%!PS-Adobe-3.0 EPSF-3.0\n"):
        assert images.thumbnail(data) is None
    monkeypatch.setattr(images, "MAX_PIXELS", 100 * 100)
    assert images.thumbnail(encode(Image.new("1", (101, 100)))) is None
    assert images.thumbnail(encode(Image.new("1", (100, 100)))) is not None


def test_thumbnails_shrink_to_their_budget():
    noise = np.random.default_rng(0).integers(0, 255, (300, 300, 3), dtype=np.uint8)
    data = encode(Image.fromarray(noise))
    one = len(images.thumbnail(data) or "")
    many = images.thumbnails([data] * 4, budget=one)
    assert sum(len(uri) for uri in many if uri) <= one and all(many)
    assert images.thumbnails([data] * 3, budget=10) == [None] * 3
