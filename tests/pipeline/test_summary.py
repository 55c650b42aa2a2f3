"""What the table that ends a run says of systems that lost something."""

from __future__ import annotations

from typing import Any

import pytest

from m3po_jax.pipeline.summary import worse_than_base

COLUMNS = [
    {"key": "scenes/chair_i", "label": "CHAIR_i", "digits": 1, "better": "lower"},
    {"key": "questions/accuracy", "label": "questions Acc", "digits": 1, "better": "higher"},
    {"key": "questions/yes", "label": "questions Yes", "digits": 1, "better": None},
]
BASE = {
    "name": "base",
    "kind": "arm",
    "values": {"scenes/chair_i": 23.9, "questions/accuracy": 83.2, "questions/yes": 53.2},
    "intervals": {"scenes/chair_i": [22.6, 25.1], "questions/accuracy": [81.7, 84.9], "questions/yes": [51.3, 55.2]},
}


def system(name: str, chair: float | None, accuracy: float | None, kind: str = "arm") -> dict[str, Any]:
    values = {"scenes/chair_i": chair, "questions/accuracy": accuracy, "questions/yes": 20.0}
    return {"name": name, "kind": kind, "values": values, "intervals": {}}


@pytest.mark.parametrize(
    ("row", "lines"),
    [
        (system("m3po", 8.9, 81.7), []),
        (system("m3po", None, None), []),
        (system("base, stop bias +6", 30.0, 70.0, "frontier"), []),
        (
            system("m3po", 8.9, 79.7),
            [
                "m3po is worse than the base, outside its interval: questions Acc 79.7 (base 83.2, interval 81.7 to "
                "84.9)"
            ],
        ),
        (
            system("dpo", 25.2, 79.7),
            [
                "dpo is worse than the base, outside its interval: CHAIR_i 25.2 (base 23.9, interval 22.6 to 25.1), "
                "questions Acc 79.7 (base 83.2, interval 81.7 to 84.9)"
            ],
        ),
    ],
)
def test_what_a_trained_system_lost_is_a_warning(row: dict[str, Any], lines: list[str]) -> None:
    assert worse_than_base(COLUMNS, [BASE, row]) == lines


def test_without_a_base_or_its_intervals_nothing_is_claimed() -> None:
    row = system("m3po", 99.0, 1.0)
    assert worse_than_base(COLUMNS, [row]) == []
    assert worse_than_base(COLUMNS, [{**BASE, "intervals": {}}, row]) == []
