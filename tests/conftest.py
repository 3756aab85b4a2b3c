"""Set-up of every test session: cheap compilation, and no silent skip in CI."""

import gc
import importlib.metadata
import importlib.util
import io
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import IO

import pytest

# Compiling takes most of the tests' time and their arrays are tiny: XLA compiles without its
# optimisations, and with its older emitters, in two fifths of the time. helpers.AS_USERS_COMPILE
# takes it back; two golden cases run so, as commands. libtpu, and jaxlibs after 0.10, have no
# older emitters, and end a process that asks for them.
os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
_CHEAP = "--xla_cpu_parallel_codegen_split_count=1"
_TPU = importlib.util.find_spec("libtpu") is not None
if importlib.metadata.version("jaxlib").startswith("0.10.") and not _TPU:
    _CHEAP += " --xla_cpu_use_fusion_emitters=false"
if _CHEAP not in (_flags := os.environ.get("XLA_FLAGS", "")):
    os.environ["XLA_FLAGS"] = f"{_flags} {_CHEAP}".strip()
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.1")
# Commands would restart for it, after half a second of imports.
os.environ.setdefault("GLIBC_TUNABLES", "glibc.malloc.hugetlb=1")
# Tracing makes many objects and no garbage: collecting it is a fifth of a traced program's time.
gc.set_threshold(100_000, 20, 20)

_LONGEST = (
    "test_mesh_training.py",
    "test_plan_programs.py",
    "test_processes.py",
    "test_reproduce.py",
    "test_training_slow.py",
    "test_training_resume.py",
    "test_training_decoding.py",
    "test_lora_training.py",
    "test_faults.py",
    "test_harness.py",
    "test_wheel.py",
    "test_slurm.py",
)
_OWN_CACHE = pytest.StashKey[str]()


def pytest_configure(config: pytest.Config) -> None:
    """Gives all processes of the session one cache of compiled programs; CI has one for all."""
    if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
        directory = tempfile.mkdtemp(prefix="olmoe_jax_compiled_")
        os.environ["JAX_COMPILATION_CACHE_DIR"] = config.stash[_OWN_CACHE] = directory
    _draw_once()


def _draw_once() -> None:
    """Lets a session draw each figure of runs once, for all that have its labels and size.

    A figure takes a quarter of a second, and hundreds of runs draw three of them.
    """
    from olmoe_jax import plots

    heat_maps, plot_losses = plots.heat_maps, plots.plot_losses
    drawn: dict[object, bytes] = {}

    def write(file: Path | IO[bytes], key: object, draw: Callable[[IO[bytes]], None]) -> None:
        if key not in drawn:
            draw(png := io.BytesIO())
            drawn[key] = png.getvalue()
        file.write_bytes(drawn[key]) if isinstance(file, Path) else file.write(drawn[key])

    def maps(values, file):
        key = tuple((title, map_.shape) for title, map_ in values.items())
        write(file, key, lambda png: heat_maps(values, png))

    def losses(lines, title, file):
        write(file, title, lambda png: plot_losses(lines, title, png))

    plots.heat_maps, plots.plot_losses = maps, losses


def pytest_unconfigure(config: pytest.Config) -> None:
    if directory := config.stash.get(_OWN_CACHE, None):
        shutil.rmtree(directory, ignore_errors=True)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The files that take longest first, so that no process is left alone with one at the end."""
    order = {name: number for number, name in enumerate(_LONGEST)}
    items.sort(key=lambda item: order.get(item.path.name, len(order)))


@pytest.hookimpl(trylast=True)
def pytest_sessionfinish(session: pytest.Session) -> None:
    """Fails a session of CI that skipped a test; the golden numbers alone may be missing."""
    reporter = session.config.pluginmanager.get_plugin("terminalreporter")
    if "CI" not in os.environ or reporter is None:
        return
    skipped = [str(report.longrepr) for report in reporter.stats.get("skipped", [])]
    unwanted = sorted({reason for reason in skipped if "OLMOE_JAX_SHARED" not in reason})
    if unwanted:
        reporter.write_line("")
        reporter.write_line("CI skips no test: " + "\n".join(unwanted), red=True)
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


EOS, PAD = "<|endoftext|>", "<|padding|>"


@pytest.fixture(scope="session", autouse=True)
def _data_cache(tmp_path_factory):
    """Keeps the tokens of the tests' data out of the user's cache, also in other processes."""
    os.environ["OLMOE_JAX_CACHE"] = str(tmp_path_factory.mktemp("data_cache"))


@pytest.fixture(scope="session")
def tokenizer_dir(tmp_path_factory):
    """A tokenizer whose tokens are the bytes of the text."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {symbol: index for index, symbol in enumerate([EOS, PAD, *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    directory = tmp_path_factory.mktemp("tokenizer")
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token=EOS, pad_token=PAD
    ).save_pretrained(directory)
    return directory


@pytest.fixture(scope="session")
def tokenizer(tokenizer_dir):
    from olmoe_jax.data import load_tokenizer

    return load_tokenizer(str(tokenizer_dir))


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory, tokenizer):
    """Returns a Hugging Face directory with a random OLMoE whose tokens are bytes."""
    from helpers import write_json
    from tiny import hf_config, tiny_config, write_hf_checkpoint

    path = tmp_path_factory.mktemp("model")
    config = tiny_config(vocab_size=len(tokenizer))
    write_hf_checkpoint(path, config)
    write_json(
        path / "config.json",
        hf_config(config, max_position_embeddings=1024, eos_token_id=tokenizer.eos_token_id),
    )
    tokenizer.save_pretrained(path)
    return path


@pytest.fixture(scope="session")
def shared():
    """The folder with the golden numbers and the real data, which the project ships without."""
    if "OLMOE_JAX_SHARED" not in os.environ:
        pytest.skip("OLMOE_JAX_SHARED is not set")
    return Path(os.environ["OLMOE_JAX_SHARED"])


@pytest.fixture
def at_step(monkeypatch):
    """Calls `action()` once, when this step is reported."""
    from olmoe_jax.training.reporting import Reporter

    def apply(number, action):
        original, done = Reporter.step, []

        def step(self, line, scalars):
            original(self, line, scalars)
            if line["step"] == number and not done:
                done.append(number)
                action()

        monkeypatch.setattr(Reporter, "step", step)

    return apply
