"""train.py --preset."""

from helpers import ROOT, message_of

from olmoe_jax.config.load import parse_config


def test_preset():
    """It sets fields, and other flags override them."""
    command = ["--config", str(ROOT / "configs/densemixer_gsm.py")]
    assert parse_config(command).train.loss_normalization == "tokens"
    published = [*command, "--preset=published"]
    assert parse_config(published).train.loss_normalization == "microbatch"
    flags = [*published, "--config.train.loss_normalization=tokens"]
    assert parse_config(flags).train.loss_normalization == "tokens"
    assert "--preset=paper: there is published" in message_of(
        parse_config, [*command, "--preset=paper"]
    )
