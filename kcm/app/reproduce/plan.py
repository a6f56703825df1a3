"""What is run for each of the paper's tables, and on how much: whole, or quick."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import msgspec

from kcm.app.reproduce import paper


class Budget(msgspec.Struct, frozen=True, kw_only=True):
    """How much of a part is run. at_most: so many samples of a file, drawn evenly. epochs: of image models; 0: the task's."""

    seeds: int = 3
    rounds: int = 2
    at_most: dict[str, int] = {}
    epochs: int = 0


_FEW = {"large_train": 600, "stream": 400, "selection": 300, "calibration": 300, "test": 500}
_FEW_IMAGES = {"large_train": 1500, "stream": 500, "selection": 300, "test": 500}
_FEWEST = {"stream": 60, "selection": 20, "calibration": 20, "test": 60}  # a causal model takes a second a sample


class Part(msgspec.Struct, frozen=True, kw_only=True):
    """One task with one large model: a column or a block of a table.

    differs: how data and models differ from the paper's, in a sentence.
    large: instead of the task's: a model's name, or a kind of image model.
    """

    name: str
    title: str
    task: str
    large: str = ""
    differs: str
    whole: Budget
    quick: Budget


_QUICK = Budget(seeds=1, rounds=1, at_most=_FEW)
_QUICK_IMAGES = Budget(seeds=1, rounds=1, at_most=_FEW_IMAGES, epochs=2)
_ENCODER = "BERT is MiniLM (22.7M parameters, frozen, a head fitted on at most 1,500 documents), the edge has 8 labels a class"
LANGUAGE = (
    Part(
        name="r52",
        title="R52",
        task="r52",
        differs=f"{_ENCODER}; APD's event roles are topics of Reuters news",
        whole=Budget(rounds=3),
        quick=_QUICK,
    ),
    Part(
        name="20newsgroups",
        title="20 Newsgroups",
        task="20newsgroups",
        differs=_ENCODER,
        whole=Budget(rounds=3),
        quick=_QUICK,
    ),
)
CHAT = (
    Part(
        name="r52-smollm2",
        title="R52, SmolLM2",
        task="r52",
        large="smollm2",
        differs="ChatGPT is SmolLM2-135M, not fitted, which scores the 52 labels behind a prompt: weaker than the small model",
        whole=Budget(rounds=1, at_most={"stream": 240, "selection": 120, "calibration": 120, "test": 240}),
        quick=Budget(seeds=1, rounds=1, at_most=_FEWEST),
    ),
)
_CIFAR = "the edge is a ResNet-8 with a fifth of the labels; test is a balanced half of CIFAR-100's, the stream unlabelled"
VISION = (
    Part(
        name="cifar-resnet",
        title="ResNet-32",
        task="cifar",
        large="resnet",
        differs=f"ResNet-32 is fitted for fewer epochs than the paper's; {_CIFAR}",
        whole=Budget(seeds=3, rounds=2),
        quick=_QUICK_IMAGES,
    ),
    Part(
        name="cifar-bbn",
        title="BBN",
        task="cifar",
        large="bbn",
        differs=f"a two-branch ResNet-32 in BBN's manner, fewer epochs; {_CIFAR}",
        whole=Budget(seeds=3, rounds=2),
        quick=_QUICK_IMAGES,
    ),
    Part(
        name="cifar-efficientnet",
        title="EfficientNet-Lite0",
        task="cifar",
        large="efficientnet-lite",
        differs=f"a backbone that the paper doesn't have: ImageNet weights, a head fitted here; {_CIFAR}",
        whole=Budget(seeds=3, rounds=2),
        quick=_QUICK_IMAGES,
    ),
)
_EMOJI = (
    "CLIP is EfficientNet-Lite0 and MiniLM with fitted heads, MSCOCO is emoji and their names: a gallery of 825 that no head was fitted on"
)
MULTIMODAL = (
    Part(
        name="emoji-i2t",
        title="I2T",
        task="emoji-i2t",
        differs=_EMOJI,
        whole=Budget(rounds=2),
        quick=_QUICK,
    ),
    Part(
        name="emoji-t2i",
        title="T2I",
        task="emoji-t2i",
        differs=_EMOJI,
        whole=Budget(rounds=2),
        quick=_QUICK,
    ),
)


class Table(msgspec.Struct, frozen=True, kw_only=True):
    """A table of the paper. `columns`, `rows`: what the paper printed."""

    name: str
    title: str
    parts: tuple[Part, ...]
    columns: tuple[str, ...]
    rows: dict[str, dict[str, paper.Row]]  # by the paper's model


TABLES = (
    Table(name="language", title="Language, a fine-tuned encoder", parts=LANGUAGE, columns=paper.APD, rows={"BERT": paper.BERT}),
    Table(name="chat", title="Language, a causal model", parts=CHAT, columns=paper.APD, rows={"ChatGPT": paper.CHATGPT}),
    Table(
        name="vision",
        title="CIFAR-100-LT",
        parts=VISION,
        columns=paper.LONG_TAIL,
        rows={"ResNet-32": paper.RESNET, "BBN": paper.BBN},
    ),
    Table(name="multimodal", title="Image-text retrieval", parts=MULTIMODAL, columns=paper.RECALL, rows={"CLIP": paper.CLIP}),
)
NAMES = (*(table.name for table in TABLES), "ablation")
Absent = Callable[[Part], str]  # why a part can't be run here, "" where it can


def absent(part: Part, cifar: Path | None) -> str:
    """Why a part can't be run: what isn't there, and how to get it; "" where all is."""
    from kcm.assets import model_path, task_path
    from kcm.errors import ConfigError
    from kcm.task import load_task

    if part.task == "cifar" and not cifar:
        return "CIFAR-100-LT can't be fetched from a package registry: give --cifar FOLDER (benchmarks/cifar100_lt.py says what is in it)"
    try:
        if part.task == "cifar":
            needed, root = ["efficientnet-lite0"] if part.large == "efficientnet-lite" else [], "."
        else:
            task = load_task(task_path(part.task))
            images = [task.large.net.weights, task.small.net.weights] if task.gallery.file else []
            needed, root = [part.large or task.large.model, task.small.vectors, *images], task.root
        for model in filter(None, needed):
            model_path(model, root)
    except ConfigError as error:
        return f"{error.message}: {error.fix}"
    return ""
