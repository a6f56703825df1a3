"""A CLIP model as large model of a retrieval task: tiny, with random weights, in transformers' own format."""

from __future__ import annotations

import asyncio
import json
import math
from collections.abc import Callable
from pathlib import Path

import msgspec
import numpy as np
import pytest
import torch
from pair_kit import COLOURS, SHAPES, picture, write_pairs
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import CLIPConfig, CLIPModel, PreTrainedTokenizerFast

from cloud_server.batcher import Batcher, Unreadable
from cloud_server.models import ReadsAhead, load_large, read_large
from cloud_server.models.clip import GALLERY, image_spec
from kcm.app.large_retrieval import make_large_retrieval
from kcm.app.pairs import I2T, T2I, read_pairs, write_pair_tasks
from kcm.errors import ConfigError
from kcm.sample import Hint
from kcm.task import PreprocessSpec, Task, load_task
from training.data import load_split
from training.retrieval.gallery import load_gallery

SIZE = 40  # as the drawn pictures are: nothing is scaled, so pixels are the same everywhere


def tiny_clip(folder: Path) -> Path:
    words = ["<pad>", "<s>", "<unk>", *COLOURS, *SHAPES, "a", "in", "</s>"]
    last = len(words) - 1
    vocabulary = {word: place for place, word in enumerate(words)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", last)])
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    ).save_pretrained(folder)
    torch.manual_seed(0)
    layers = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = CLIPConfig(
        text_config={
            **layers,
            "vocab_size": len(words),
            "max_position_embeddings": 8,
            "eos_token_id": last,
            "bos_token_id": 1,
            "pad_token_id": 0,
        },
        vision_config={**layers, "image_size": SIZE, "patch_size": 8},
        projection_dim=16,
    )
    model = CLIPModel(config).eval()
    for parameter in model.parameters():
        if parameter.ndim > 1:
            parameter.data.normal_(0, 0.2)  # far enough apart that images differ
    model.save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text(json.dumps({"image_mean": [0.5, 0.4, 0.3], "image_std": [0.2, 0.3, 0.25]}))
    return folder


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Task]:
    """Both directions of the drawn items, their large model the tiny CLIP. Read only."""
    torch.set_num_threads(1)
    root = tmp_path_factory.mktemp("clip")
    tiny_clip(root / "weights")
    made = {direction: root / direction for direction in (I2T, T2I)}
    write_pair_tasks(made, "drawn", read_pairs(write_pairs(root / "own")), "Drawn")
    for folder in made.values():
        path = folder / "task.toml"
        before = path.read_text()
        large = 'kind = "clip"\nmodel = "../weights"\n'
        start, end = before.index("[large]\n") + len("[large]\n"), before.index("[large.net]")
        path.write_text(before[:start] + large + before[end:])
    return {direction: load_task(folder) for direction, folder in made.items()}


def reference(task: Task, images: list[bytes], texts: list[str]) -> np.ndarray:
    """CLIPModel's own logits_per_image [images, texts], each alone, its pixels scaled here."""
    from io import BytesIO

    from PIL import Image
    from transformers import AutoTokenizer

    folder = Path(task.root).parent / "weights"
    model, tokenizer = CLIPModel.from_pretrained(str(folder)).eval(), AutoTokenizer.from_pretrained(str(folder))
    out = np.zeros((len(images), len(texts)), np.float32)
    pixels = [np.asarray(Image.open(BytesIO(image)).convert("RGB"), np.float32) / 255 for image in images]
    ready = [torch.from_numpy(((x - [0.5, 0.4, 0.3]) / [0.2, 0.3, 0.25]).astype(np.float32).transpose(2, 0, 1))[None] for x in pixels]
    with torch.inference_mode():
        for column, text in enumerate(texts):
            given = tokenizer([text], return_tensors="pt")
            ids = {name: given[name] for name in ("input_ids", "attention_mask")}
            for row, x in enumerate(ready):
                out[row, column] = model(pixel_values=x, **ids).logits_per_image.item()
    return out


@pytest.mark.parametrize("direction", [I2T, T2I])
def test_logits_are_clips_own(tasks: dict[str, Task], tmp_path: Path, direction: str) -> None:
    """Where an item has one wording or picture, the similarities are those of CLIPModel.forward."""
    task = tasks[direction]
    make_large_retrieval(task, tmp_path, None, lambda _: None, hints=False)
    lines = (tmp_path / GALLERY).read_bytes().splitlines()
    first = {json.loads(line)["label"]: line for line in reversed(lines)}
    (tmp_path / GALLERY).write_bytes(b"\n".join(first.values()))
    described = json.loads((tmp_path / "large.json").read_text())
    (tmp_path / "large.json").write_text(json.dumps({**described, "temperature": 1.0}))
    gallery, model, queries = load_gallery(task), load_large(tmp_path), list(load_split(task, "calibration").payloads[:5])
    content = [gallery.payloads[int(np.flatnonzero(gallery.items == item)[0])] for item in range(gallery.size)]
    found = model.logits(queries, [None] * len(queries))
    expected = reference(task, queries, content) if direction == I2T else reference(task, content, queries).T  # type: ignore[arg-type]
    log_p = expected - np.log(np.exp(expected - expected.max(1, keepdims=True)).sum(1, keepdims=True)) - expected.max(1, keepdims=True)
    np.testing.assert_allclose(found, log_p, atol=2e-3)
    assert np.ptp(expected, axis=1).min() > 1, "the tiny model must tell items apart, else this proves nothing"


def test_a_query_does_not_depend_on_its_neighbours(tasks: dict[str, Task], tmp_path: Path) -> None:
    for direction, task in tasks.items():
        make_large_retrieval(task, tmp_path / direction, None, lambda _: None, hints=False)
        model, queries = load_large(tmp_path / direction), list(load_split(task, "test").payloads[:40])
        if direction == T2I:
            queries[0] = "a " * 50 + "red disc"  # longer than the model reads
        together = model.logits(queries, [None] * len(queries))
        alone = np.concatenate([model.logits([query], [None]) for query in queries])
        np.testing.assert_allclose(together, alone, atol=1e-3)


def test_an_image_that_cannot_be_read_costs_its_own_call_alone(tasks: dict[str, Task], tmp_path: Path) -> None:
    task = tasks[I2T]
    make_large_retrieval(task, tmp_path, None, lambda _: None, hints=False)
    model, good = load_large(tmp_path), load_split(task, "test").payloads[0]
    assert isinstance(model, ReadsAhead)

    async def both() -> list[object]:
        batcher = Batcher(model.scores, read=model.read, max_batch=8, max_queue=8)
        try:
            calls = [batcher.submit([payload], [None], deadline=math.inf) for payload in (good, good[:60])]  # type: ignore[list-item]
            return await asyncio.gather(*calls, return_exceptions=True)
        finally:
            await batcher.drain()

    scores, refused = asyncio.run(both())
    np.testing.assert_allclose(scores[0], model.logits([good], [None])[0], atol=1e-5)  # type: ignore[index]
    assert isinstance(refused, Unreadable)
    with pytest.raises(ValueError, match="reads images"):
        model.read("a red disc")


def test_temperature_and_a_hint(tasks: dict[str, Task], tmp_path: Path) -> None:
    task = tasks[I2T]
    make_large_retrieval(task, tmp_path, load_split(task, "train"), lambda _: None, hints=False)
    plain = load_large(tmp_path)
    assert not plain.reads_hints and plain.prompt_id == "none"
    described = json.loads((tmp_path / "large.json").read_text())
    assert described["temperature"] != 0.05, "fitted on the labelled rows"
    (tmp_path / "large.json").write_text(json.dumps({**described, "hint_weight": 0.7}))
    hinted, query = load_large(tmp_path), load_split(task, "test").payloads[0]
    hint = Hint(label_ids=(7,), probabilities=(0.9,), confidence=0.9)
    assert hinted.reads_hints and hinted.prompt_id.startswith("prior-")
    without, under = hinted.logits([query], [None])[0], hinted.logits([query], [hint])[0]
    np.testing.assert_allclose(without, plain.logits([query], [hint])[0], atol=1e-5)
    gained = under - without
    assert gained.argmax() == 7 and gained[7] - gained[0] == pytest.approx(0.7 * np.log(0.9 / (0.1 / 44)), rel=1e-3)


def test_files_that_are_wrong(tasks: dict[str, Task], tmp_path: Path) -> None:
    task = tasks[T2I]
    make_large_retrieval(task, tmp_path, None, lambda _: None, hints=False)
    assert read_large(tmp_path).modality == "text"
    whole = (tmp_path / GALLERY).read_bytes()
    lines = whole.splitlines()
    wrong = {
        b"": "it is empty",
        b"\n".join(line for line in lines if json.loads(line)["label"]): "doesn't hold content for each",
        b"\n".join([*lines, b'{"label":45,"image":"' + json.loads(lines[0])["image"].encode() + b'"}']): "and for no other",
        b"\n".join([*lines, b'{"label":1,"text":"a red disc"}']): "a row is no image",
        b"\n".join([*lines, b'{"label":1,"image":"AAAA"}']): "can't be read as a gallery",
        b"{": "can't be read as a gallery",
    }
    for data, said in wrong.items():
        (tmp_path / GALLERY).write_bytes(data)
        with pytest.raises(ConfigError, match=said):
            load_large(tmp_path)
    (tmp_path / GALLERY).unlink()
    with pytest.raises(ConfigError, match="can't be read as a gallery"):
        load_large(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ConfigError, match="can't be read as a CLIP model"):
        image_spec(tmp_path, PreprocessSpec())


def test_limits_of_the_task_hold(tasks: dict[str, Task], tmp_path: Path) -> None:
    task = tasks[I2T]
    small = msgspec.structs.replace(task, preprocess=msgspec.structs.replace(task.preprocess, max_pixels=SIZE * SIZE))
    make_large_retrieval(small, tmp_path, None, lambda _: None, hints=False)
    from io import BytesIO

    large = BytesIO()
    picture("red", "disc", size=SIZE + 1).save(large, "PNG")
    with pytest.raises(ValueError, match="pixels"):
        load_large(tmp_path).logits([large.getvalue()], [None])


@pytest.mark.slow
def test_simulate_with_clip(tasks: dict[str, Task], kcm: Callable[..., tuple[int, str, str]], tmp_path: Path) -> None:
    """The task's own file names the CLIP model; word vectors and captions come from MiniLM, where it is fetched."""
    import cloud_kit

    cloud_kit.real_model("minilm")
    code, said, err = kcm("simulate", "--task", tasks[I2T].root, "--seeds", 1, "--rounds", 1, "--out", tmp_path / "out.json")
    assert code == 0 and "R@10" in said, err
