"""What happens to a graph, in order."""

from __future__ import annotations

from torch.export import ExportedProgram
from torch.fx import GraphModule

from xpu_lora_compile.errors import ContractError
from xpu_lora_compile.passes.decisions import Decision, record_decisions
from xpu_lora_compile.passes.editing import graphs_of
from xpu_lora_compile.passes.lower import lower
from xpu_lora_compile.passes.resolve_width import resolve_width

PIPELINE = (
    resolve_width,
    lower,
)


def rewrite(program: GraphModule | ExportedProgram) -> list[Decision]:
    """Run the passes over a graph and its subgraphs, in place; what the graph computes stays the same.

    Args:
        program: what Dynamo gives a backend, or what `torch.export.export` returns. An exported program is decided
            by constants alone, since nobody would check a guard when it runs.

    Returns:
        The decisions taken, in the order of the graph; none for a graph without shapes, which is left as it is.

    Raises:
        ContractError: something that holds no graph.
    """
    module = program.graph_module if isinstance(program, ExportedProgram) else program
    if not isinstance(module, GraphModule):
        raise ContractError(
            "rewrite", "a GraphModule or an ExportedProgram", type(module).__name__, "Compile or export the model."
        )
    with record_decisions() as decisions:
        for graph in graphs_of(module):
            for transform in PIPELINE:
                transform(graph)
            graph.lint()
    for child in module.modules():
        if isinstance(child, GraphModule):
            child.recompile()
    return decisions


__all__ = ["PIPELINE", "Decision", "record_decisions", "rewrite"]
