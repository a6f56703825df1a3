"""A running daemon and its bundles: swap, roll back, refuse, and the verbs that ask for it."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path

import edge_kit
import pytest
from edge_kit import EASY, request, running_edge, stub, until

from edge_runtime.bundles import BundleStore
from protos.kcm.v1 import edge_pb2

LOCAL, CLOUD, DEGRADED = edge_pb2.InferAnswer.SOURCE_LOCAL, edge_pb2.InferAnswer.SOURCE_CLOUD, edge_pb2.InferAnswer.SOURCE_DEGRADED


def test_sighup_takes_up_a_bundle_folder_that_was_replaced(tmp_path: Path) -> None:
    folder = edge_kit.make_bundle(tmp_path / "bundle", seed=0)
    with running_edge(folder, tmp_path) as edge:
        made, channel = stub(edge.address)
        with channel:
            first = made.Infer(request(EASY[0])).answers[0].model_id  # without a deadline, as a local caller may
            folder.rename(tmp_path / "gone")
            edge.signal(signal.SIGHUP)
            until(lambda: "is not a bundle" in made.Status(edge_pb2.StatusRequest()).last_refusal, 5, "refused")
            assert made.Infer(request(EASY[0])).answers[0].model_id == first
            edge_kit.make_bundle(folder, seed=1)
            edge.signal(signal.SIGHUP)
            until(lambda: made.Infer(request(EASY[0])).answers[0].model_id != first, 5, "swapped")
            assert made.Status(edge_pb2.StatusRequest()).last_refusal == ""


def test_swap_rollback_and_refusal_of_a_running_daemon(tmp_path: Path) -> None:
    store = BundleStore(tmp_path / "store")
    first = store.install(edge_kit.make_bundle(tmp_path / "b0", seed=0)).current
    command = edge_kit.edge_command("--store", str(store.root), "--listen", "127.0.0.1:0", "--state", str(tmp_path / "state"))
    with edge_kit.running(command, tmp_path / "edge.log") as edge:
        made, channel = stub(edge.address)

        def serving() -> str:
            return made.Infer(request(EASY[0]), timeout=5).answers[0].model_id

        with channel:
            assert serving() == first
            second = store.install(edge_kit.make_bundle(tmp_path / "b1", seed=1)).current
            until(lambda: serving() == second, 5, "the new bundle serves")
            store.rollback()
            until(lambda: serving() == first, 5, "the old bundle serves again")
            # An install that is refused is seen in the status; one that got past (bit rot after it) is refused by the daemon itself.
            with pytest.raises(Exception, match="golden input 0"):
                store.install(edge_kit.make_bundle(tmp_path / "b2", seed=2, golden_shift=1.0))
            assert "golden input 0" in made.Status(edge_pb2.StatusRequest(), timeout=5).last_refusal
            third = edge_kit.make_bundle(tmp_path / "b3", seed=3)
            edge.signal(signal.SIGSTOP)
            state = store.install(third)
            (store.current() / "models" / "fp32.onnx").write_bytes(b"rotten")
            edge.signal(signal.SIGCONT)
            until(lambda: "fp32.onnx" in made.Status(edge_pb2.StatusRequest(), timeout=5).last_refusal, 5, "refused")
            assert serving() == first and state.current != first
            store.install(third)  # mends the copy
            edge.signal(signal.SIGHUP)
            until(lambda: serving() == state.current, 5, "taken after it was mended")
            assert made.Status(edge_pb2.StatusRequest(), timeout=5).last_refusal == ""


def test_a_store_whose_current_bundle_is_damaged_boots_the_previous(tmp_path: Path) -> None:
    store = BundleStore(tmp_path / "store")
    first = store.install(edge_kit.make_bundle(tmp_path / "b0", seed=0)).current
    store.install(edge_kit.make_bundle(tmp_path / "b1", seed=1))
    (store.current() / "golden.npz").unlink()
    command = edge_kit.edge_command("--store", str(store.root), "--listen", "127.0.0.1:0", "--state", str(tmp_path / "state"))
    with edge_kit.running(command, tmp_path / "edge.log") as edge:
        made, channel = stub(edge.address)
        with channel:
            status = made.Status(edge_pb2.StatusRequest(), timeout=5)
            assert status.bundle.bundle_id == first and "golden.npz" in status.last_refusal


def test_bundle_verbs(tmp_path: Path) -> None:
    program = "from edge_runtime.cli import bundle; bundle()"

    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run([sys.executable, "-c", program, *arguments], capture_output=True, text=True, timeout=60)

    folders = [edge_kit.make_bundle(tmp_path / f"b{seed}", seed=seed) for seed in range(2)]
    store = ["--store", str(tmp_path / "store"), "--json"]
    first, second = (json.loads(run("install", str(folder), *store).stdout)["current"] for folder in folders)
    assert json.loads(run("rollback", *store, "--reason", "too slow").stdout) == {"current": first, "blocked": second}
    shown = json.loads(run("show", *store).stdout)
    assert shown["current"] == first and shown["blocked"] == {second: "too slow"} and shown["problem"] == ""
    assert json.loads(run("verify-files", str(folders[0]), "--json").stdout)["bundle_id"] == first
    (folders[0] / "golden.npz").write_bytes(b"")
    assert "golden.npz" in run("verify-files", str(folders[0])).stderr


KCM = [sys.executable, "-c", "from kcm.app.cli import main; main()"]


def show(root: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*KCM, "bundle", "show", "--store", str(root), "--json"], capture_output=True, text=True, timeout=60)


def test_show_of_a_folder_that_is_no_store_is_an_error(tmp_path: Path) -> None:
    for root in (tmp_path / "nowhere", tmp_path):
        done = show(root)
        assert done.returncode == 9
        said = json.loads(done.stdout)
        assert "is no bundle store" in said["message"] and said["fix"] == f"kcm bundle install DIR --store {root}"
        assert not (tmp_path / "nowhere").exists()


def test_show_says_when_the_current_bundle_cannot_serve(tmp_path: Path) -> None:
    store = BundleStore(tmp_path / "store")
    bad = edge_kit.make_bundle(tmp_path / "bad", seed=9, golden_shift=1.0)
    with pytest.raises(Exception, match="golden input 0"):
        store.install(bad)
    said = json.loads(show(store.root).stdout)
    assert said["problem"] == "no bundle is installed" and said["last_refusal"].startswith("bad: ")
    first = store.install(edge_kit.make_bundle(tmp_path / "b0", seed=0)).current
    (store.current() / "golden.npz").write_bytes(b"rotten")
    assert "the current bundle can't be loaded, kcm edge can't start: " in json.loads(show(store.root).stdout)["problem"]
    second = store.install(edge_kit.make_bundle(tmp_path / "b1", seed=1)).current
    with pytest.raises(Exception, match="golden input 0"):
        store.install(bad)
    (store.current() / "golden.npz").write_bytes(b"rotten")
    said = json.loads(show(store.root).stdout)
    assert (said["current"], said["previous"]) == (second, first) and said["last_refusal"].startswith("bad: ")
    assert f"the current bundle can't be loaded, kcm edge starts with {first}: " in said["problem"] and "golden.npz" in said["problem"]
