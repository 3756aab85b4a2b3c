"""Tasks of lm-evaluation-harness with this project's model: --tasks lm_eval:NAME.

`answers` knows nothing of lm_eval; `tasks` and `language_model` need it installed.
"""
