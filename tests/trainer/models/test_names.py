"""What is a path and what a hub's name, and which options of models contradict each other."""

import pytest
import transformers
from tdpo.models.loading import load_policy
from tdpo.models.names import check_exists, is_here, looks_like_path
from tdpo.options import ModelOptions


@pytest.mark.parametrize(
    "name", ["./x", "../x", ".", "/no/such", "~/x", "no/such/folder", "out/", "here/x", "here/x.v2"]
)
def test_paths(name, tmp_path, monkeypatch):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path)
    assert looks_like_path(name)


@pytest.mark.parametrize("name", ["gpt2", "owner/name", "owner/name-1.5", "here"])
def test_names_of_a_hub(name, tmp_path, monkeypatch):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path)
    assert not looks_like_path(name)
    assert is_here(name) == (name == "here")
    check_exists("model", name)


def test_a_path_is_never_asked_of_a_hub(tmp_path, monkeypatch):
    def fail(*_, **__):
        raise AssertionError("a hub was asked")

    monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", fail)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="the model no/such/folder does not exist"):
        load_policy(ModelOptions(model="no/such/folder"))
