"""The needs of a run: whether it fits and what it costs, before there are devices to run it on.

    python -m olmoe_jax.plan --config configs/densemixer_gsm.py --topology h100:8

compiles the configured training step for devices that need not exist and reports memory,
communication and a bound on the speed. From Python: `olmoe_jax.plan.planning.plan`. (This module
imports nothing: the command sets jax's environment before jax starts.)
"""
