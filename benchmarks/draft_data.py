"""Text for a draft to learn from: what the default teacher itself answers to 480 questions,
greedily.

    scripts/mis benchmarks/draft_data.py FOLDER      # about 10 minutes on 2 cores
    scripts/mis distill --student RUN/model --data FOLDER --reconstruct-samples 0 --quantize 0
    --iters 300

A draft has to guess the teacher's words, so the teacher's words are what it should have seen. The
questions share no sentence with those of benchmarks/speculative.py. Writes train.jsonl, valid.jsonl
and test.jsonl in mlx-lm's prompt and completion format.
"""

from __future__ import annotations

import itertools
import json
import sys
from pathlib import Path

from mis_mlx.compute import precision
from mis_mlx.models.opening import load, resolve
from mis_mlx.models.writing import mlx_generate

TOPICS = (
    "a lighthouse",
    "photosynthesis",
    "the moon",
    "bread",
    "a bicycle",
    "volcanoes",
    "honey bees",
    "the Roman Empire",
    "a glacier",
    "democracy",
    "chess",
    "the human heart",
    "a violin",
    "rivers",
    "electricity",
    "a library",
    "coffee",
    "dinosaurs",
    "the Sahara desert",
    "friendship",
    "a compass",
    "recycling",
    "gravity",
    "wool",
    "the alphabet",
    "snow",
    "money",
    "a telescope",
    "forests",
    "salt",
    "a windmill",
    "the ocean",
    "paper",
    "owls",
    "a castle",
    "the internet",
    "vaccines",
    "a garden",
    "opera",
    "earthquakes",
    "cotton",
    "the solar eclipse",
    "ants",
    "a passport",
    "jazz",
    "hospitals",
    "an island",
    "concrete",
    "dreams",
    "football",
    "the printing press",
    "tea",
    "a submarine",
    "wolves",
    "taxes",
    "marathons",
    "glass",
    "a desert flower",
    "the calendar",
    "patience",
)
ASKS = (
    "Tell me about {}.",
    "Explain {} in simple words.",
    "Write a short poem about {}.",
    "Give me three facts about {}.",
    "Write a story that has something to do with {}.",
    "Why is {} important?",
    "Ask me a question about {}.",
    "Opowiedz mi o tym: {}.",
)
TOKENS = 80
BATCH = 24


def main(folder: Path) -> None:
    """Answer all questions in batches, and split them 10 to 1 to 1."""
    path = resolve.resolve_model().path
    model, tokenizer, *_ = load.mlx_lm("utils").load(str(path))
    model.set_dtype(precision.usual_dtype())
    asked = [ask.format(topic) for topic, ask in itertools.product(TOPICS, ASKS)]
    rows = []
    for start in range(0, len(asked), BATCH):
        prompts = asked[start : start + BATCH]
        chats = [mlx_generate.encode(tokenizer, p) for p in prompts]
        done = load.mlx_lm("generate").batch_generate(model, tokenizer, chats, max_tokens=TOKENS)
        rows += [
            {"prompt": p, "completion": text} for p, text in zip(prompts, done.texts, strict=True)
        ]
        print(f"{len(rows)} of {len(asked)}", flush=True)
    folder.mkdir(parents=True)
    splits = {
        "train": [r for i, r in enumerate(rows) if i % 12 < 10],
        "valid": rows[10::12],
        "test": rows[11::12],
    }
    for name, chosen in splits.items():
        (folder / f"{name}.jsonl").write_text(
            "".join(json.dumps(r, ensure_ascii=False) + "\n" for r in chosen)
        )


if __name__ == "__main__":
    main(Path(sys.argv[1]))
