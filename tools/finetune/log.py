"""log.jsonl and TensorBoard of a fine-tuning."""

import json
from pathlib import Path
from typing import Any

from accelerate import Accelerator

LOG = "log.jsonl"


class Log:
    """Lines of steps and evaluations; the process that leads writes them."""

    def __init__(self, accelerator: Accelerator, folder: Path) -> None:
        self.accelerator, self.path = accelerator, folder / LOG

    def add(self, kind: str, line: dict[str, Any]) -> None:
        """A line with `step`; its floats go to TensorBoard too."""
        numbers = {f"{kind}/{k}": v for k, v in line.items() if isinstance(v, float)}
        self.accelerator.log(numbers, step=line["step"])
        if self.accelerator.is_main_process:
            with open(self.path, "a", encoding="utf-8") as file:
                file.write(json.dumps({"kind": kind, **line}) + "\n")

    def cut_behind(self, step: int) -> None:
        """Forget the steps behind the checkpoint, which are made again."""
        if self.accelerator.is_main_process:
            kept = [line for line in self._lines() if line["step"] <= step]
            text = "".join(json.dumps(line) + "\n" for line in kept)
            self.path.write_text(text, encoding="utf-8")

    def last_metrics(self) -> dict[str, float]:
        """Of the last evaluation; nothing if there was none."""
        found = [line for line in self._lines() if line["kind"] == "evaluation"]
        last = found[-1] if found else {}
        return {k: v for k, v in last.items() if k not in ("kind", "step", "epoch")}

    def _lines(self) -> list[dict[str, Any]]:
        """The lines that were written whole."""
        try:
            text = self.path.read_text(encoding="utf-8")
        except FileNotFoundError:
            return []
        return [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]
