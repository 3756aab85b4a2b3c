"""Run by test_fused_update.py on 8 virtual devices: the differences on each mesh, as JSON."""

import json

from training.two_ways import LORA, Case, TwoWays, largest_difference

from olmoe_jax.parallel import sharding

print(
    json.dumps(
        {
            str(axes): largest_difference(TwoWays(case, sharding.make_mesh(*axes)))
            for case, axes in ((Case(aux_loss=0.1), (2, 2, 2)), (Case(lora=LORA), (1, 8, 1)))
        }
    )
)
