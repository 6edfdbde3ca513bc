"""A model folder that can talk but has no weights: the demo model's tokenizer, template and generation settings."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import gemma4cli

DEMO = Path(gemma4cli.__file__).parent / "data" / "demo"


def make_chat_folder(target: Path, *, template: str | None = None, **tokenizer_config: Any) -> Path:
    """Write the folder. `template` replaces chat_template.jinja; keywords change tokenizer_config.json."""
    target.mkdir(parents=True)
    for name in ("config.json", "tokenizer.json", "chat_template.jinja"):
        shutil.copy(DEMO / name, target / name)
    if template is not None:
        (target / "chat_template.jinja").write_text(template, encoding="utf-8")
    config = {**json.loads((DEMO / "tokenizer_config.json").read_text(encoding="utf-8")), **tokenizer_config}
    config = {key: value for key, value in config.items() if value is not None}
    (target / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    vocabulary = {t["content"]: t["id"] for t in json.loads((DEMO / "tokenizer.json").read_bytes())["added_tokens"]}
    generation = {
        "bos_token_id": vocabulary["<bos>"],
        "eos_token_id": [vocabulary["<eos>"], vocabulary["<turn|>"], vocabulary["<|tool_response>"]],
        "do_sample": True,
        "temperature": 1.0,
        "top_k": 64,
        "top_p": 0.95,
    }
    (target / "generation_config.json").write_text(json.dumps(generation), encoding="utf-8")
    return target
