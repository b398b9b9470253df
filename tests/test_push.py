"""`--push-to-hub`, with a stand-in for the Hub's client whose calls are held to the real one's signatures."""

from __future__ import annotations

import inspect
import json
from fnmatch import fnmatch
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from helpers import make_model
from huggingface_hub import HfApi, constants
from huggingface_hub.errors import HfHubHTTPError

from minitron_cli.checkpoint import push
from minitron_cli.checkpoint.card import evaluated
from minitron_cli.config.prune import PruneConfig
from minitron_cli.errors import ConfigError, RunError
from minitron_cli.prune.stage import run_prune

TOKEN = "hf_secretsecretsecret"
NAME = "someone/half"


class Hub:
    """Keeps what it is given; `fails` is raised by the named calls."""

    def __init__(self) -> None:
        self.files: dict[str, bytes] = {}
        self.calls: list[tuple[str, dict[str, Any]]] = []
        self.fails: dict[str, Exception] = {}
        self.role = "write"

    def _called(self, name: str, *words: Any, **options: Any) -> None:
        inspect.signature(getattr(HfApi, name)).bind(None, *words, **options)
        self.calls.append((name, {**options, "words": words}))
        if name in self.fails:
            raise self.fails[name]

    def whoami(self) -> dict[str, Any]:
        self._called("whoami")
        return {"name": "someone", "auth": {"accessToken": {"role": self.role}}}

    def create_repo(self, *words: Any, **options: Any) -> None:
        self._called("create_repo", *words, **options)

    def upload_folder(self, **options: Any) -> None:
        self._called("upload_folder", **options)
        folder = Path(options["folder_path"])
        for path in (item for item in folder.rglob("*") if item.is_file()):
            name = path.relative_to(folder).as_posix()
            if not any(fnmatch(name, pattern) for pattern in options["ignore_patterns"]):
                self.files[name] = path.read_bytes()

    def upload_file(self, **options: Any) -> None:
        self._called("upload_file", **options)
        self.files[options["path_in_repo"]] = Path(options["path_or_fileobj"]).read_bytes()


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Hub:
    found = Hub()
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(push, "_api", lambda token: found if token == TOKEN else pytest.fail("another token"))
    return found


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("push") / "teacher")


def config(teacher: Path, out: Path, **changes: Any) -> PruneConfig:
    return PruneConfig(**{"checkpoint": str(teacher), "ffn": 20, "out": out, "push_to_hub": NAME, **changes})


def test_a_finished_checkpoint_is_uploaded(
    hub: Hub, teacher: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run_prune(config(teacher, tmp_path / "out"))
    assert [name for name, _ in hub.calls] == ["whoami", "create_repo", "upload_folder"]
    assert hub.calls[1][1] == {"words": (NAME,), "private": True, "repo_type": "model", "exist_ok": True}
    assert {"README.md", "config.json", "model.safetensors"} <= hub.files.keys()
    assert "minitron.json" not in hub.files  # it names paths of this machine
    text = b"".join(data for name, data in hub.files.items() if name != "model.safetensors").decode()
    assert "base_model" in text or "library_name: transformers" in text
    assert TOKEN not in text and TOKEN not in (tmp_path / "out" / "minitron.json").read_text()
    said = capsys.readouterr()
    assert f"Uploaded: https://huggingface.co/{NAME}" in said.err and TOKEN not in said.err + said.out
    assert "push-to-hub" not in hub.files["README.md"].decode()


def test_the_card_follows_the_evaluation(hub: Hub, teacher: Path, tmp_path: Path) -> None:
    run_prune(config(teacher, tmp_path / "out", hub_public=True))
    assert hub.calls[1][1]["private"] is False
    evaluated(tmp_path / "out", {"perplexity": 12.5, "tasks": {}})
    assert hub.calls[-1][0] == "upload_file" and b"12.5" in hub.files["README.md"]
    count = len(hub.calls)
    evaluated(tmp_path / "out", {"perplexity": 12.5, "tasks": {}})  # the same card is not sent again
    assert len(hub.calls) == count


def test_a_failed_upload_keeps_the_checkpoint_and_is_tried_again(hub: Hub, teacher: Path, tmp_path: Path) -> None:
    hub.fails["upload_folder"] = ConnectionError(f"header: Bearer {TOKEN}")
    with pytest.raises(
        RunError, match=r"is complete, but uploading it to someone/half failed \(ConnectionError\)"
    ) as caught:
        run_prune(config(teacher, tmp_path / "out"))
    assert TOKEN not in str(caught.value) and caught.value.exit_code == 1 and caught.value.__suppress_context__
    made = (tmp_path / "out" / "model.safetensors").stat().st_mtime_ns
    hub.fails.clear()
    run_prune(config(teacher, tmp_path / "out"))
    assert "model.safetensors" in hub.files and (tmp_path / "out" / "model.safetensors").stat().st_mtime_ns == made


def _refusal(status: int) -> HfHubHTTPError:
    response: Any = SimpleNamespace(status_code=status, headers={}, request=None, text="")
    return HfHubHTTPError("no", response=response)


@pytest.mark.parametrize(
    ("problem", "sentence"),
    [
        ("name", "write OWNER/NAME"),
        ("offline", "HF_HUB_OFFLINE is set"),
        ("token", "no access token was found; run `hf auth login`"),
        ("refused", "does not accept the access token"),
        ("broken", "answered with status 503"),
        ("network", r"did not answer \(OSError\)"),
        ("role", "may only read"),
    ],
)
def test_what_would_fail_is_said_before_any_work(
    hub: Hub, teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, problem: str, sentence: str
) -> None:
    if problem == "offline":
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    if problem == "token":
        monkeypatch.setattr(push, "_token", lambda: None)
    if problem in ("refused", "broken"):
        hub.fails["whoami"] = _refusal(401 if problem == "refused" else 503)
    if problem == "network":
        hub.fails["whoami"] = OSError("no route")
    hub.role = "read" if problem == "role" else "write"
    name = "half" if problem == "name" else NAME
    with pytest.raises(ConfigError, match=sentence) as caught:
        run_prune(config(teacher, tmp_path / "out", push_to_hub=name))
    assert "\n" not in str(caught.value) and TOKEN not in str(caught.value)
    assert list(tmp_path.iterdir()) == []
    assert [name for name, _ in hub.calls] in ([], ["whoami"])


def test_the_upload_is_not_part_of_the_key(hub: Hub, teacher: Path, tmp_path: Path) -> None:
    run_prune(config(teacher, tmp_path / "out", push_to_hub=None))
    assert hub.calls == []
    run_prune(config(teacher, tmp_path / "out"))  # up to date, and uploaded now
    assert json.loads(hub.files["config.json"])["intermediate_size"] == 20
    with pytest.raises(ConfigError, match="--hub-public is about an upload"):
        config(teacher, tmp_path / "x", push_to_hub=None, hub_public=True)
