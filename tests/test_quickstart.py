"""The quickstart's end; its whole run is a stage of CI of its own."""

from types import SimpleNamespace

from olmoe_jax import quickstart


def test_a_run_that_was_stopped_is_not_asked(monkeypatch, capsys):
    config = SimpleNamespace(model=SimpleNamespace(config_path="inputs"))
    monkeypatch.setattr(quickstart, "validate", lambda _: config)
    monkeypatch.setattr(quickstart, "load_config", lambda _: None)
    stopped = SimpleNamespace(output_dir="run", finished=False)
    monkeypatch.setattr(quickstart.olmoe_jax, "train", lambda _: stopped, raising=False)
    quickstart.main([])
    assert capsys.readouterr().out == ""
