"""Inputs of a CLIP or SigLIP dual encoder: texts as fixed-length ids, images as pixels."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Int

from m3po_jax.data.images import IMAGE_FITS, ImageProcessor, decode
from m3po_jax.data.kept_images import KeptImages
from m3po_jax.data.schema import Image, Prompt
from m3po_jax.data.tokenizer import load_tokenizer
from m3po_jax.errors import UserError, nearest


@dataclass(frozen=True)
class DualEncoderProcessor:
    """Tokenizer and image processor of a dual encoder's directory.

    Attributes:
        max_positions: Length of every text; longer texts are cut before their end token, as CLIP does.
        image_fit: ``crop``, ``stretch`` or ``pad`` (keeps the whole image); empty: as the model was trained.
        kept: Images that were read last.
    """

    tokenizer: Any
    image_processor: ImageProcessor
    max_positions: int
    eos_token_id: int
    pad_token_id: int
    image_root: Path = Path(".")
    max_image_pixels: int = 50_000_000
    image_fit: str = ""
    kept: KeptImages = field(default_factory=KeptImages, compare=False, repr=False)

    @classmethod
    def from_pretrained(
        cls,
        directory: str | Path,
        *,
        max_positions: int,
        vocab_size: int | None = None,
        end_token_id: int | None = None,
        image_size: int | None = None,
        image_root: str | Path = ".",
        image_fit: str = "",
        max_image_pixels: int = 50_000_000,
    ) -> DualEncoderProcessor:
        """Reads a local directory in Hugging Face layout.

        Args:
            max_positions: Of the text tower.
            vocab_size: Rows of its embeddings; None: not compared with the tokenizer.
            end_token_id: Where the text tower reads a text's vector; None: not compared. Files from before
                transformers 4.31 say 2 whatever it is, and mean the highest id.
            image_size: Of the vision tower; None: not compared with the image processor.

        Raises:
            UserError: tokenizer or image processor are missing or malformed, or are not this model's, or `image_fit`
                is unknown.
        """
        folder = Path(directory)
        if image_fit and image_fit not in IMAGE_FITS:
            raise UserError(
                f"unknown image_fit {image_fit!r}{nearest(image_fit, IMAGE_FITS)}", where="model.image_fit"
            )
        files = load_tokenizer(folder)
        tokenizer = files.tokenizer
        if vocab_size is not None:
            files.check_rows(vocab_size)
        wanted = files.size - 1 if end_token_id == 2 else end_token_id
        if wanted is not None and wanted >= 0 and wanted != tokenizer.eos_token_id:
            raise UserError(
                f"texts end with token {tokenizer.eos_token_id}, and the model reads them at token {wanted} "
                "(text_config.eos_token_id)",
                where=str(folder),
                remedy="take the tokenizer and config.json of one model",
            )
        pad = tokenizer.pad_token_id
        image_processor = ImageProcessor.from_pretrained(folder)
        sides = (image_processor.height, image_processor.width)
        if image_size is not None and sides != (image_size, image_size):
            raise UserError(
                f"the image processor gives {sides[0]} x {sides[1]} pixels, config.json says {image_size}",
                where=str(folder),
                remedy="take both files from the same model",
            )
        return cls(
            tokenizer=tokenizer,
            image_processor=image_processor,
            max_positions=max_positions,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.eos_token_id if pad is None else pad,
            image_root=Path(image_root),
            max_image_pixels=max_image_pixels,
            image_fit=image_fit,
        )

    def encode_texts(self, texts: Sequence[str]) -> tuple[Int[np.ndarray, "c t"], Bool[np.ndarray, "c t"]]:
        """Ids and mask of shape [texts, max_positions]; each text ends with the end token."""
        ids = np.full((len(texts), self.max_positions), self.pad_token_id, np.int32)
        mask = np.zeros(ids.shape, bool)
        for row, text in enumerate(texts):
            tokens = list(self.tokenizer(self._plain(text), truncation=False)["input_ids"])
            if tokens and tokens[-1] == self.eos_token_id:
                tokens.pop()
            tokens = [*tokens[: self.max_positions - 1], self.eos_token_id]
            ids[row, : len(tokens)], mask[row, : len(tokens)] = tokens, True
        return ids, mask

    def _plain(self, text: str) -> str:
        """Text in which no special token is spelt: an answer could end itself before its false half is read."""
        text = text.encode("utf-8", "replace").decode("utf-8")  # lone surrogates cannot be tokenised
        for token in self.tokenizer.all_special_tokens:
            text = text.replace(token, " ")
        return text

    def absent_images(self, prompt: Prompt) -> Float[np.ndarray, "images h w 3"]:
        """Zeros that take no memory, where another host needs the prompt's images."""
        shape = (len(prompt.images), self.image_processor.height, self.image_processor.width, 3)
        return np.broadcast_to(np.float32(0), shape)

    def images(self, prompt: Prompt) -> Float[np.ndarray, "images h w 3"]:
        """Normalised pixels of every image of the prompt.

        Raises:
            UserError: naming the row, for anything that is wrong with an image.
        """
        where = prompt.where or f"id {prompt.id!r}"
        pixels = np.zeros(
            (len(prompt.images), self.image_processor.height, self.image_processor.width, 3), np.float32
        )

        def read(image: Image) -> dict[str, np.ndarray]:
            decoded = decode(image, root=self.image_root, max_pixels=self.max_image_pixels, where=where)
            try:
                return {"pixels": self.image_processor(decoded, self.image_fit or None)}  # type: ignore[arg-type]
            except UserError as error:
                raise UserError(error.what, where=where, remedy=error.remedy) from None

        for index, image in enumerate(prompt.images):
            pixels[index] = self.kept.get(image, self.image_root, self.max_image_pixels, read)["pixels"]
        return pixels
