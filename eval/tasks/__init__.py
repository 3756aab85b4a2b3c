"""The tasks by name."""

from collections.abc import Sequence

from eval.tasks.code import HumanEval, Mbpp
from eval.tasks.gsm import Gsm
from eval.tasks.intent import Intent
from eval.tasks.judged import Law, Summary, Translation
from eval.tasks.task import Task
from olmoe_jax.config.schema import nearest
from olmoe_jax.errors import UserError

TASKS: dict[str, Task] = {
    task.name: task
    for task in (Gsm(), Mbpp(), HumanEval(), Intent(), Law(), Summary(), Translation())
}

HARNESS = "lm_eval:"
"""What the names of lm-evaluation-harness' tasks begin with."""
HARNESS_DIRECTORY = "lm_eval_"
"""What the directories of their results begin with."""


def split_names(names: str) -> tuple[str, list[str]]:
    """A list of names without those of lm-evaluation-harness' tasks, and these, each once."""
    wanted = [name.strip() for name in names.split(",")]
    harness = [name.removeprefix(HARNESS) for name in wanted if name.startswith(HARNESS)]
    own = ",".join(name for name in wanted if not name.startswith(HARNESS))
    return own, list(dict.fromkeys(harness))


def tasks_of(names: str) -> Sequence[Task]:
    """The tasks of a comma-separated list, each once.

    Raises:
      UserError: there is no such task.
    """
    wanted = list(dict.fromkeys(name.strip() for name in names.split(",")))
    for name in wanted:
        if name not in TASKS:
            raise UserError(
                f"--tasks: there is no task {name!r}; did you mean {nearest(name, TASKS)}? "
                f"The tasks are {', '.join(TASKS)} and {HARNESS}NAME"
            )
    return [TASKS[name] for name in wanted]
