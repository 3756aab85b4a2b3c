"""The table of methods: what a configuration may say of each. Needs no jax.

A method has two halves. Its row here is the declaration, which `--help`, the conflicts and the
experiments read. The class that `implementation` names is what the method does in a run. A new
method is a file in `olmoe_jax/methods/` and a row of this table; `register` adds the row of a
method that lives elsewhere.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

from olmoe_jax.errors import UserError

ADAPTERS = ("lora_rank", "lora_alpha", "lora_dropout", "lora_targets", "adapter_path")
ROUTER_GRADIENT = ("router_gradient_experts", "router_gradient_dtype")
ESFT = (
    *("experts_path", "esft_top_p", "esft_score_tokens", "esft_train_head", "esft_densemixer"),
    *ROUTER_GRADIENT,
)
ESFT_SWITCHES = dict.fromkeys(ROUTER_GRADIENT, "esft_densemixer")


@dataclass(frozen=True)
class MethodDeclaration:
    """The declaration of a method: what a configuration may say of it."""

    name: str  # the value of method.name
    help: str  # what trains and how the router learns, in a few words
    implementation: str  # "MODULE:CLASS", a subclass of `olmoe_jax.methods.Method`
    own_fields: tuple[str, ...] = ()  # of the section `method`, those that not every method reads
    # Field -> the field of the section that must be true for the first to be read.
    switches: Mapping[str, str] = field(default_factory=dict)

    @property
    def has_adapters(self) -> bool:
        """True if method.lora_rank turns full fine-tuning into LoRA."""
        return "lora_rank" in self.own_fields


# fmt: off
METHODS = {
    row.name: row
    for row in (
        MethodDeclaration(
            "frozen", "all weights but the router's",
            "olmoe_jax.methods.full:Frozen", ADAPTERS,
        ),
        MethodDeclaration(
            "conventional", "all weights; the router learns through each token's top-k experts",
            "olmoe_jax.methods.method:Method", ADAPTERS,
        ),
        MethodDeclaration(
            "densemixer", "all weights; the router learns through all experts",
            "olmoe_jax.methods.full:DenseMixer", ADAPTERS + ROUTER_GRADIENT,
        ),
        MethodDeclaration(
            "esft_gate", "the experts with the highest gate scores on the task",
            "olmoe_jax.methods.esft:EsftGate", ESFT, ESFT_SWITCHES,
        ),
        MethodDeclaration(
            "esft_token", "the experts that most of the task's tokens use",
            "olmoe_jax.methods.esft:EsftToken", ESFT, ESFT_SWITCHES,
        ),
    )
}
# fmt: on
"""Name -> declaration, in the order of the documentation."""


def register(declaration: MethodDeclaration) -> None:
    """Adds the row of a method whose implementation lives outside of this package.

    Raises:
      UserError: the table has another method of this name.
    """
    if METHODS.setdefault(declaration.name, declaration) != declaration:
        raise UserError(f"method {declaration.name} exists already; register another name")


def readers(name: str) -> list[str]:
    """Returns the methods that read a field of the section `method`; []: all do, or it is none."""
    return [method for method, row in METHODS.items() if name in row.own_fields]
