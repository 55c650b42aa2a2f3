"""What becomes of the rows of a data file: prompts, problems, or a count of what was left out."""

from __future__ import annotations

import dataclasses
import re
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from m3po_jax.config import DataConfig
from m3po_jax.data import schema
from m3po_jax.data.image_spool import SpooledImages
from m3po_jax.data.images import header_size
from m3po_jax.data.rows import RowRules, prompt_from_row
from m3po_jax.errors import UserError

ON_BAD_ROW = ("stop", "skip")


class Checker:
    """Makes prompts of rows; collects the problems of a source, raises the first, or leaves bad rows out.

    Args:
        config: Of the source; `on_bad_row` says what a bad row does.
        rules: How its rows are read.
        problems: Where given, gets the errors of bad rows (unless they are left out); else the first is raised.

    Attributes:
        skipped: How many rows were left out, by kind of problem.
        numbered: How many rows got another id because an earlier row has theirs.
    """

    def __init__(self, config: DataConfig, rules: RowRules, problems: list[UserError] | None):
        self.rules, self.problems = rules, problems
        self.skips, self.max_pixels = config.on_bad_row == "skip", config.max_image_pixels
        self.skipped: Counter[str] = Counter()
        self.numbered = 0
        self.unread: Counter[str] = Counter()  # files of a folder, by suffix
        self.left_out: dict[str, None] = {}  # columns that hold bytes
        self._uses: dict[str, int] = {}
        self._inline = SpooledImages()

    def report(self, error: UserError) -> None:
        """A row that cannot be used."""
        if self.skips:
            self.skipped[kind_of(error)] += 1
        elif self.problems is None:
            raise error
        else:
            self.problems.append(error)

    def prompt(
        self,
        row: Mapping[str, Any],
        where: str,
        place: str,
        image_root: Path,
        stored: tuple[schema.Image, ...] | None = None,
    ) -> schema.Prompt | None:
        """The prompt of a row, None where the row is bad.

        Args:
            place: Of the row in its source, for the id of a row without one.
            stored: The images, where the row has empty shells for them.
        """
        try:
            prompt = prompt_from_row(row, where, self.rules, place=place)
            images = self._inline.keep(prompt.images) if stored is None else stored
            prompt = dataclasses.replace(prompt, images=images)
            if self.skips:  # a run cannot leave a row out once it has begun
                for image in prompt.images:
                    header_size(image, root=image_root, max_pixels=self.max_pixels, where=prompt.where)
        except UserError as error:
            self.report(error)
            return None
        return self._unique(prompt, where)

    def _unique(self, prompt: schema.Prompt, where: str) -> schema.Prompt:
        """The second row of an id ``ID`` is called ``ID#2``, and so on: LLaVA's files name conversations by image."""
        count = self._uses.get(prompt.id, 0) + 1
        if count == 1:
            self._uses[prompt.id] = 1
            return prompt
        while (name := f"{prompt.id}#{count}") in self._uses:
            count += 1
        self._uses[prompt.id], self._uses[name] = count, 1
        self.numbered += 1
        return dataclasses.replace(prompt, id=name, where=f"{where} (id {name!r})")

    def notes(self, path: str) -> list[str]:
        """One line each for what was done to the rows without being asked row by row."""
        lines = []
        if total := sum(self.skipped.values()):
            kinds = "; ".join(f"{count} x {kind}" for kind, count in self.skipped.most_common())
            lines.append(f"{path}: {total} bad rows left out ({kinds})")
        if self.numbered:
            lines.append(f"{path}: {self.numbered} rows have the id of an earlier row and are called ID#2, ID#3, ...")
        if self.unread:
            kinds = ", ".join(f"{count} x {suffix}" for suffix, count in sorted(self.unread.items()))
            lines.append(f"{path}: pictures of kinds that are not read are left out ({kinds}): save them as JPEG")
        if self.left_out:
            lines.append(f"{path}: not kept, because they hold bytes: columns {', '.join(self.left_out)}")
        return lines


_VALUES = re.compile(r"'(?:[^'\\]|\\.)*'|\"(?:[^\"\\]|\\.)*\"|\S*/\S+|(?<![\w-])\d+(?!\w)")


def kind_of(error: UserError) -> str:
    """What is wrong without the values, so that many rows of one problem can be counted together."""
    return " ".join(_VALUES.sub("…", error.what).split())
