"""The model of lm-evaluation-harness: pyproject.toml's entry point in the group "lm_eval.models".

Needs lm_eval; docs/evaluation.md.
"""

import importlib
import sys

from olmoe_jax.root import ROOT

sys.path.insert(0, str(ROOT))
OlmoeLM = importlib.import_module("eval.harness.model").OlmoeLM
