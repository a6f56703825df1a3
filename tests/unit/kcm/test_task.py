"""task.toml: read, refused with a reason, and stable as a label space."""

from pathlib import Path

import pytest

from kcm.errors import ConfigError
from kcm.task import label_space, load_task, parse_task


def write(folder: Path, text: str) -> Path:
    (folder / "task.toml").write_text(text)
    return folder


def test_defaults_and_paths_relative_to_the_file(tmp_path: Path) -> None:
    task = load_task(write(tmp_path, '[task]\nid = "t"\nlabels = ["a", "b"]\n[data]\ntrain = "x.csv"\n'))
    assert task.judge.epsilon == 0.98
    assert task.path(task.data.train) == tmp_path / "x.csv"


def test_what_a_bundle_ships_reads_back_and_names_no_file(tmp_path: Path) -> None:
    task = load_task(write(tmp_path, '[task]\nid = "t"\nlabels = ["a", "b"]\n[data]\ntrain = "x.csv"\n[judge]\nranks = 4\n'))
    shipped = parse_task(task.shipped(), "task.toml")
    assert shipped.judge.ranks == 4
    assert (shipped.data.train, shipped.root) == ("", ".")
    assert shipped.label_space == task.label_space


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("[data]\ntrain = 'x'", "table [task]"),
        ('[task]\nid = "t"\nlabels = ["a"]', "at least two"),
        ('[task]\nid = "t"\nlabels = ["a", "a"]', "twice"),
        ('[task]\nid = "t"\nlabels = ["a", " "]', "empty"),
        ('[task]\nid = "a/b"\nlabels = ["a", "b"]', "must be letters"),
        ('[task]\nid = "t"\nlabels = ["a", "b"]\n[jugde]\nkind = "kan"', "did you mean 'judge'"),
        ('[task]\nid = "t"\nlabels = ["a", "b"]\n[judge]\nkind = "svm"', "kind"),
        ('[task]\nid = "t"\nlabels = ["a", "b"]\n[judge]\nepsilon = 1.2', "epsilon"),
        ('[task]\nid = "t"\nlabels = ["a", "b"]\nroot = "/"', "unknown key 'root'"),
    ],
)
def test_a_wrong_task_says_why(tmp_path: Path, text: str, said: str) -> None:
    with pytest.raises(ConfigError) as error:
        load_task(write(tmp_path, text))
    assert said in str(error.value)


def test_the_label_space_depends_on_order_and_on_where_names_end() -> None:
    assert len({label_space(("ab", "c")), label_space(("c", "ab")), label_space(("a", "bc"))}) == 3


def test_the_large_net_keeps_its_own_defaults_where_one_key_is_set() -> None:
    values = {
        "task": {"id": "t", "labels": ["a", "b"], "modality": "image"},
        "preprocess": {"kind": "image"},
        "small": {"kind": "resnet", "net": {"width": 8}},
        "large": {"kind": "resnet", "net": {"width": 8}},
    }
    task = parse_task(values, "task.toml")
    assert (task.small.net.depth, task.small.net.epochs) == (8, 30)
    assert (task.large.net.depth, task.large.net.epochs, task.large.net.width) == (32, 60, 8)
    assert values["large"] == {"kind": "resnet", "net": {"width": 8}}


@pytest.mark.parametrize("limits", [{"max_pixels": 1023}, {"max_bytes": 3000}, {"size": 1024, "max_bytes": 2**21}])
def test_limits_that_refuse_images_of_their_own_size_are_refused(limits: dict[str, int]) -> None:
    values = {
        "task": {"id": "t", "labels": ["a", "b"], "modality": "image"},
        "preprocess": {"kind": "image", **limits},
        "small": {"kind": "resnet"},
        "large": {"kind": "resnet"},
    }
    with pytest.raises(ConfigError, match="would refuse images of"):
        parse_task(values, "task.toml")
