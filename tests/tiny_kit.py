"""A small text task of templated sentences: easy ones, ones that name two labels' words, and words that say nothing."""

from __future__ import annotations

import csv
import random
from collections.abc import Sequence
from pathlib import Path

from kcm.app.init import write_task_toml

# A label with a quote and one with an accent: the whole path must carry such names.
TOPICS = {
    "refund": ("refund", "money back", "returned item", "reimburse"),
    "late delivery": ("delivery", "parcel", "courier", "delayed"),
    "lost card": ("lost card", "stolen card", "wallet gone", "block card"),
    "exchange rate": ("exchange rate", "currency", "euros", "conversion"),
    "café order": ("coffee", "espresso", "menu", "croissant"),
    'PIN "locked"': ("pin code", "passcode", "locked out", "wrong pin"),
}
LABELS = tuple(sorted(TOPICS))
SIZES = {"train": 72, "large_train": 180, "stream": 400, "calibration": 120, "test": 200}
_FRAMES = (
    "please help me with {} today",
    "i want to ask about {}",
    "what happened to {} since monday",
    "{} is a problem",
    "could somebody look at {} for my account",
    "hello, {} again",
)
_FILLER = ("really", "very", "maybe", "yesterday", "online", "support", "again", "thanks", "urgent", "still")


def sentences(count: int, seed: int) -> list[tuple[str, str]]:
    """(text, label) rows, every label equally often; one in four names another label's word as well, one in ten none at all."""
    draw = random.Random(seed)
    rows = []
    for place in range(count):
        label = LABELS[place % len(LABELS)]
        words = [draw.choice(TOPICS[label])]
        if draw.random() < 0.25:
            words.append(draw.choice(TOPICS[draw.choice(LABELS)]))
        draw.shuffle(words)
        said = "this" if draw.random() < 0.1 else " and ".join(words)
        text = draw.choice(_FRAMES).format(said)
        rows.append((" ".join([text, *draw.sample(_FILLER, draw.randint(0, 3)), f"n{draw.randint(0, 10**6)}"]), label))
    draw.shuffle(rows)
    return rows


def write_csv(path: Path, rows: Sequence[Sequence[str]], header: Sequence[str] = ("text", "label")) -> Path:
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(header)
        writer.writerows(rows)
    return path


def write_tiny_files(folder: Path) -> dict[str, Path]:
    """The five CSV files, the stream without labels; train lies inside large_train."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = {split: sentences(size, seed) for seed, (split, size) in enumerate(SIZES.items())}
    rows["large_train"] = rows["train"] + rows["large_train"]
    files = {}
    for split, content in rows.items():
        columns = [row[:1] for row in content] if split == "stream" else content
        files[split] = write_csv(folder / f"{split}.csv", columns, ("text",) if split == "stream" else ("text", "label"))
    return files


def write_tiny_task(folder: Path) -> Path:
    """A task folder with all five files. No word vectors, so that no model needs fetching."""
    files = write_tiny_files(folder)
    write_task_toml(folder, "tiny", LABELS, {split: path.name for split, path in files.items()})
    without_vectors(folder)
    return folder


def without_vectors(folder: Path) -> None:
    path = folder / "task.toml"
    path.write_text(path.read_text(encoding="utf-8").replace("[small]\n", '[small]\nvectors = ""\n'), encoding="utf-8")
