"""Looks at a job when it arrives at a hospital, before any of it is loaded.

The engine enforces the hospital's list of classes in the worker, which then ends; the
coordinator would only see that nobody answers. Refused here, the job goes on without
this hospital, and the code is among what the engine says of it. This file imports no
torch, so that the process that only waits for runs stays small.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from nvflare.apis.app_validation import AppValidator
from nvflare.lighter.tool_consts import NVFLARE_SIG_FILE, NVFLARE_SUBMITTER_CRT_FILE

from fl_helpers.cross_silo.on_premises.site import CLASSES, CONFIG, FILES

SIGNATURE = (NVFLARE_SIG_FILE, NVFLARE_SUBMITTER_CRT_FILE)
log = logging.getLogger(__name__)


class JobValidator(AppValidator):
    """Takes jobs of four files that name one class."""

    def validate(self, app_folder: str) -> tuple[str, dict[str, Any]]:
        """("", {}) or the code of a refusal; the reason is in the hospital's log."""
        folder = Path(app_folder)
        paths = [path.relative_to(folder) for path in folder.rglob("*")]
        expected = {CONFIG, *(f"{CONFIG}/{name}" for name in FILES)}
        found = {
            str(path)
            for path in paths  # the engine judges code, and signs
            if path.parts[0] != "custom" and path.name not in SIGNATURE
        }
        if other := sorted(found - expected):
            log.error("JOB_REFUSED: the job brings %s", other[:5])
            return "JOB_REFUSED", {}
        try:
            text = (folder / CONFIG / "config_fed_client.json").read_text()
            named = {*_classes(json.loads(text))}
        except (OSError, ValueError) as error:
            log.error("JOB_REFUSED: %s", error)
            return "JOB_REFUSED", {}
        if refused := sorted(named - {*CLASSES}):
            log.error("CLASS_REFUSED: the job names %s", refused[:5])
            return "CLASS_REFUSED", {}
        return "", {}


def _classes(content: Any) -> Iterator[str]:
    """All that the engine could take as the name of a class."""
    if isinstance(content, dict):
        for key, value in content.items():
            if key in ("path", "name", "class_path"):
                yield str(value)
            yield from _classes(value)
    elif isinstance(content, list):
        for value in content:
            yield from _classes(value)
