"""What was paid for is kept: answers of a server by a hash of the request, and what a run has spent.

One line of JSON per paid request, appended by one write to a file of the run's own in a folder that runs may share.
So a line is whole or absent whenever the writer is killed, answer and cost cannot part, and nobody else's file is
touched. Requests are not stored, only their hashes: prompts and images stay where they are. Of an answer that could
not be used only the cost is kept: asked again it may be better. A request that a command got no answer to is noted.
"""

from __future__ import annotations

import errno
import json
import os
import threading
from pathlib import Path
from typing import Any

from m3po_jax.data.tables import content_hash
from m3po_jax.errors import UserError, full_disk, full_disk_number


class AnswerCache:
    """Answers by key, from all runs that share `folder`; safe to use from several threads.

    Args:
        folder: Is made if need be.
        run: Tells this run's spending from other runs': the path of its directory.
    """

    def __init__(self, folder: Path, run: str):
        self.path = folder / f"answers-{content_hash(run)[:16]}.jsonl"
        self.spent = {"requests": 0, "prompt_tokens": 0, "completion_tokens": 0, "cost": 0.0, "guessed": 0}
        self._answers: dict[str, Any] = {}
        self._failures: dict[str, int] = {}
        self._lock = threading.Lock()
        try:
            folder.mkdir(parents=True, exist_ok=True)
            for file in sorted(folder.glob("answers-*.jsonl")):
                self._read(file)
        except OSError as error:
            raise UserError(f"cannot be used ({error.strerror})", where=f"endpoint cache {folder}") from None

    def _read(self, file: Path) -> None:
        with file.open("rb") as lines:
            for line in lines:
                try:
                    row = json.loads(line)
                    if file == self.path and "failed" in row:
                        self._failures[row["failed"]] = self._failures.get(row["failed"], 0) + 1
                    if "spent" not in row:
                        continue
                    key, answer = row["key"], row["answer"]
                    if file == self.path:
                        self._add(row["spent"])
                except (ValueError, KeyError, TypeError, RecursionError):
                    continue  # a disk that was full, or an editor: that answer is asked for again
                if answer is not None:
                    self._answers[str(key)] = answer

    def _add(self, spent: dict[str, Any]) -> None:
        numbers = {name: spent[name] + 0 for name in ("prompt_tokens", "completion_tokens", "cost")}
        self.spent["requests"] += 1
        for name, number in numbers.items():
            self.spent[name] += number
        self.spent["guessed"] += bool(spent.get("guessed"))

    def get(self, key: str) -> Any | None:
        with self._lock:
            return self._answers.get(key)

    def put(
        self,
        key: str,
        answer: Any | None,
        *,
        prompt_tokens: int,
        completion_tokens: int,
        cost: float,
        guessed: bool = False,
    ) -> None:
        """Keeps what a request cost, and its answer unless that is None; `guessed`: the server did not tell."""
        spent = {"prompt_tokens": prompt_tokens, "completion_tokens": completion_tokens, "cost": cost}
        spent |= {"guessed": True} if guessed else {}
        with self._lock:
            self._write({"key": key, "answer": answer, "spent": spent})
            if answer is not None:
                self._answers[key] = answer
            self._add(spent)

    def fail(self, key: str) -> int:
        """Notes that a command ended without an answer to a request; returns how many of this run's have."""
        with self._lock:
            self._write({"failed": key})
            self._failures[key] = self._failures.get(key, 0) + 1
            return self._failures[key]

    def _write(self, row: dict[str, Any]) -> None:
        try:
            self._append(json.dumps(row, ensure_ascii=True).encode() + b"\n")
        except OSError as error:
            number = full_disk_number(error)
            if number is not None:
                raise full_disk(number, self.path) from None
            raise UserError(f"cannot keep an answer ({error.strerror})", where=str(self.path)) from None

    def _append(self, line: bytes) -> None:
        descriptor = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
        try:
            before = os.fstat(descriptor).st_size
            if os.write(descriptor, line) != len(line):
                os.ftruncate(descriptor, before)  # else the next line would go on where this one ends
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        finally:
            os.close(descriptor)
