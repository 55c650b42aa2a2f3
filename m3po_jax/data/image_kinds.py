"""What a file is that stands where an image should and is none of the formats that are read."""

from __future__ import annotations

# Beginnings of files, at a place, and what they are: pictures of other kinds, and what downloads leave behind.
_KINDS = (
    (0, b"<svg", "an SVG drawing"),
    (0, b"<!doctype html", "a web page"),
    (0, b"<html", "a web page"),
    (0, b"version https://git-lfs", "a pointer of Git LFS, not the file itself"),
    (0, b"%pdf", "a PDF"),
    (0, b"%!ps", "PostScript"),
    (0, b"8bps", "a Photoshop file"),
    (0, b"\x00\x00\x01\x00", "an icon"),
    (0, b"\x00\x00\x00\x0cjp  ", "JPEG 2000"),
    (0, b"\xff\x4f\xff\x51", "JPEG 2000"),
    (0, b"\xff\x0a", "JPEG XL"),
    (0, b"\x00\x00\x00\x0cjxl ", "JPEG XL"),
    (0, b"v/1\x01", "OpenEXR"),
    (0, b"\x93numpy", "a NumPy array"),
    (0, b"pk\x03\x04", "a zip archive"),
    (0, b"\x1f\x8b", "a gzip archive"),
    (0, b"{", "JSON"),
    (4, b"ftypqt", "a video"),
    (4, b"ftypisom", "a video"),
    (4, b"ftypmp4", "a video"),
    (0, b"\x1a\x45\xdf\xa3", "a video"),
)
_HEIF = (b"heic", b"heix", b"heif", b"hevc", b"mif1", b"msf1")
_REMEDIES = {
    "a web page": "the download failed: fetch the image again",
    "a pointer of Git LFS, not the file itself": "fetch it with `git lfs pull`",
}
HEAD = 512  # bytes that are looked at
# Names of picture files that are not read, for folders of images.
UNREAD_SUFFIXES = [
    ".heic",
    ".heif",
    ".svg",
    ".svgz",
    ".pdf",
    ".psd",
    ".jp2",
    ".j2k",
    ".jxl",
    ".exr",
    ".ico",
    ".eps",
    ".dng",
    ".cr2",
    ".nef",
    ".arw",
    ".tga",
    ".hdr",
]


def other_kind(start: bytes) -> tuple[str, str] | None:
    """(what, remedy) of a file that begins with `start`; None where it is not known, or damaged."""
    if start[4:8] == b"ftyp" and start[8:12].lower() in _HEIF:
        return "HEIC", "save it as JPEG or PNG"
    if not start.strip(b"\x00"):
        return ("only zeros", "fetch the image again") if start else None
    text = start.removeprefix(b"\xef\xbb\xbf").lstrip().lower()
    if text.startswith(b"<?xml"):
        return ("an SVG drawing", "save it as PNG") if b"<svg" in text else ("XML", "give an image")
    for place, signature, kind in _KINDS:
        if start.lower()[place:].startswith(signature) or (place == 0 and text.startswith(signature)):
            return kind, _REMEDIES.get(kind, "save it as JPEG or PNG")
    return None
