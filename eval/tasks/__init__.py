"""The tasks by name."""

from collections.abc import Sequence

from eval.harness import NAME as HARNESS_MODEL
from eval.tasks.code import HumanEval, Mbpp
from eval.tasks.gsm import Gsm
from eval.tasks.intent import Intent
from eval.tasks.judged import Law, Summary, Translation
from eval.tasks.reference import REFERENCE
from eval.tasks.task import Task
from olmoe_jax.config.fields import nearest
from olmoe_jax.errors import UserError

TASKS: dict[str, Task] = {
    task.name: task
    for task in (Gsm(), Mbpp(), HumanEval(), Intent(), Law(), Summary(), Translation())
}


PROTOCOLS = {"ours": TASKS, "reference": REFERENCE}
"""{protocol: its tasks by name}."""


def tasks_of(names: str, protocol: str = "ours") -> Sequence[Task]:
    """Returns the tasks of a protocol in a comma-separated list, each once.

    Raises:
      UserError: there is no such task.
    """
    wanted = list(dict.fromkeys(name.strip() for name in names.split(",")))
    for name in wanted:
        if name.startswith("lm_eval:"):
            raise UserError(
                f"--tasks {name}: lm_eval's tasks have lm_eval's own command: python -m "
                f"eval.harness --model {HARNESS_MODEL} --model_args pretrained=DIR --tasks "
                f"{name.removeprefix('lm_eval:')} --log_samples --output_path DIR "
                "(docs/evaluation.md)"
            )
        if name not in TASKS:
            raise UserError(
                f"--tasks: there is no task {name!r}; did you mean {nearest(name, TASKS)}? "
                f"The tasks are {', '.join(TASKS)}"
            )
    return [PROTOCOLS[protocol][name] for name in wanted]
