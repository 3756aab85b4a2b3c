"""The directory that holds eval, convert and configs: the checkout, or a wheel's own copy."""

from pathlib import Path

_BUNDLED = Path(__file__).parent / "bundled"
ROOT = _BUNDLED if _BUNDLED.is_dir() else Path(__file__).parents[1]
