"""Why a download failed, in one line for models, tokenizers and data sets."""

import huggingface_hub
import pytest
from huggingface_hub import errors

from olmoe_jax import hub
from olmoe_jax.checkpoints import directory
from olmoe_jax.data import load_tokenizer
from olmoe_jax.data.reading import read_rows
from olmoe_jax.errors import UserError

RESPONSE = type("Response", (), {"headers": {}, "request": None, "status_code": 404})()


def failure(kind, message="many\nlines"):
    """What huggingface_hub raises: its own error, with the reason as the cause."""
    http = {"response": RESPONSE} if issubclass(kind, errors.HfHubHTTPError) else {}
    error = errors.LocalEntryNotFoundError("Got: an error. Check your internet connection.")
    error.__cause__ = kind(message, **http)
    return error


@pytest.mark.parametrize("opens", [directory.resolve, load_tokenizer, lambda n: [*read_rows(n)]])
@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        (errors.OfflineModeIsEnabled, "HF_HUB_OFFLINE is set"),
        (errors.GatedRepoError, "gives access on request"),
        (errors.RepositoryNotFoundError, "does not exist or is private"),
        (errors.RevisionNotFoundError, "has no such revision"),
        (errors.RemoteEntryNotFoundError, "has no such file"),
        (ConnectionError, r"cannot be reached \(many\); check the network"),
    ],
)
def test_the_reason_of_a_failed_download(opens, kind, reason, monkeypatch):
    def fail(*_, **__):
        raise failure(kind)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    monkeypatch.setattr(huggingface_hub.HfApi, "repo_info", fail)
    monkeypatch.setattr("datasets.load_dataset", fail)
    with pytest.raises(UserError, match=f"owner/name: no such path here, and .*: .*{reason}"):
        opens("owner/name")


def test_another_error_of_a_repository_that_is_there(monkeypatch):
    monkeypatch.setattr(huggingface_hub.HfApi, "repo_info", lambda *_, **__: None)
    message = r"owner/name:file: .*: column a changed; check"
    with pytest.raises(UserError, match=message), hub.downloading("owner/name:file", "dataset"):
        raise ValueError("column a changed\nand more")


@pytest.mark.parametrize("path", ["./nothing", "nothing", "a/b/c", "~/b", "/no/thing"])
def test_what_is_no_hub_id_is_a_directory(path):
    with pytest.raises(UserError, match=f"{path}: no such directory; write a directory or a hub"):
        directory.resolve(path)
