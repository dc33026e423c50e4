"""How to load the model and repeat the run; and the numbers behind the page."""

from __future__ import annotations

import json
import math
from html import escape as e
from pathlib import Path

from atoll.recipes import words
from atoll.recipes.page import label, table
from atoll.recipes.readings import epsilon_of
from atoll.recipes.record import Record
from atoll.recipes.words import MISSING, count, duration, metric_text, plain, size

MOST_ROUNDS = 200
"""Rounds in the table behind the curves; ``events.jsonl`` has all of them."""


def use(r: Record) -> str:
    out = []
    if (r.folder / "model").is_dir():
        out.append(f"<h2>Load the model</h2>\n<pre><code>{e(_loading(r.folder / 'model'))}</code></pre>")
    same = "From the run directory. The same seed, versions and machine give the same result."
    out.append(f"<h2>Repeat the run</h2>\n<p>{same}</p>")
    out.append("<pre><code>atoll run recipe.yaml --out repeated</code></pre>")
    versions = r.start.get("versions")
    made = ", ".join(f"{k} {v}" for k, v in versions.items()) + ", " if isinstance(versions, dict) else ""
    out.append(f'<p class="note">{e(made)}seed {e(str(r.config.get("seed", MISSING)))}</p>')
    return "\n".join(out)


def _loading(model: Path) -> str:
    """Three lines of Python, by the files that are there (``atoll.models.export`` wrote them)."""
    try:
        about = json.loads((model / "model.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        about = {}
    about = about if isinstance(about, dict) else {}
    if (model / "adapter_config.json").exists():
        lines = ["from peft import PeftModel", "base = ...  # the model that was adapted"]
        return "\n".join([*lines, 'model = PeftModel.from_pretrained(base, "model")'])
    if (model / "config.json").exists():
        kind = str(about.get("class", "")).rpartition(".")[2] or "AutoModel"
        load = f'model = transformers.{kind}.from_pretrained("model")'
        lines = ["import transformers", load, "model.eval()"]
    elif "builder" in about:
        lines = ["from atoll.models.export import load_model", 'model = load_model("model")']
        lines.append('# or, without Atoll: safetensors.torch.load_file("model/model.safetensors")')
        lines.append("# inputs: (raw * unit - mean) / scale, with the numbers under `data` in model/model.json")
    else:
        lines = ["from safetensors.torch import load_file", 'weights = load_file("model/model.safetensors")']
        lines.append("network.load_state_dict(weights)  # network: the one that the recipe names")
    return "\n".join(lines)


def behind(r: Record) -> str:
    out = ["<h2>Details</h2>"]
    if r.merges:
        out.append(f"<details><summary>Numbers behind the curves</summary>\n{_rounds_table(r)}</details>")
    recipe = f"<pre><code>{e(r.recipe_text)}</code></pre>"
    out.append(f"<details><summary>Resolved recipe</summary>\n{recipe}</details>")
    out.append("<footer>Made by Atoll from the run's own record.</footer>")
    return "\n".join(out)


def _rounds_table(r: Record) -> str:
    metrics = sorted({k for m in r.merges for k in m.metrics}, key=lambda k: (k != r.headline, k))[:6]
    private = epsilon_of(r) is not None
    every = -(-len(r.merges) // MOST_ROUNDS)
    head = ["round", *(label(m) for m in metrics), "replies", "refused", "up", "down", "work"]
    head += ["device time", "time here", *(["epsilon"] if private else [])]
    rows = []
    for m in r.merges:
        if m.round % every and m.round not in (1, len(r.merges)):
            continue
        row = [count(m.round), *(metric_text(k, m.metrics.get(k, math.nan)) for k in metrics)]
        row += [count(m.replies), count(m.refused), size(m.up), size(m.down), words.flops(m.flops)]
        row += [duration(m.time), duration(m.seconds), *([plain(m.epsilon, 3)] if private else [])]
        rows.append(row)
    caption = "" if every == 1 else f"Every {every} rounds; events.jsonl has all of them."
    return table(head, rows, caption)
