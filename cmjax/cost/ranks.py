"""Which part of a machine a number of ranks occupies."""

from contextlib import suppress

from cmjax.hardware import Supernode
from cmjax.mesh import RankMesh


def mesh_for(ranks: int, machine: Supernode, tensor: int = 1) -> RankMesh:
    """The smallest block of whole nodes (or part of one) that holds `ranks` dies.

    Args:
      ranks: how many. tensor: of them, neighbours that form a tensor-parallel group.
    Raises: ValueError: more ranks than the machine has, not a whole number of NPUs or nodes, or
      tensor-parallel groups that do not divide a node.
    """
    dies, npus_per_node = machine.dies_per_npu, machine.npus_per_node
    if ranks > machine.ranks:
        raise ValueError(f"{ranks} ranks; {machine.name} has {machine.ranks}")
    npus, odd = divmod(ranks, dies)
    nodes = max(1, npus // npus_per_node)
    if ranks < 1 or odd or npus % nodes or npus // nodes > npus_per_node:
        per_node = npus_per_node * dies
        raise ValueError(
            f"{ranks} ranks on {machine.name}: use a multiple of {dies} up to {per_node}, "
            f"or a multiple of {per_node}"
        )
    return RankMesh(nodes, npus // nodes, dies, tensor)


def mesh_spread(ranks: int, machine: Supernode) -> RankMesh:
    """`ranks` dies over as few nodes as hold them with equally many on each.

    Raises: ValueError: no number of nodes does.
    """
    per_node = machine.npus_per_node * machine.dies_per_npu
    if ranks < 1 or ranks > machine.ranks:
        raise ValueError(f"{ranks} ranks; {machine.name} has {machine.ranks}")
    for nodes in range(-(-ranks // per_node), machine.nodes + 1):
        with suppress(ValueError):
            return mesh_over(nodes, ranks, machine)
    raise ValueError(
        f"{ranks} ranks do not spread evenly over the nodes of {machine.name} ({machine.nodes} "
        f"nodes of {per_node})"
    )


def mesh_over(nodes: int, ranks: int, machine: Supernode) -> RankMesh:
    """`ranks` dies spread evenly over `nodes` nodes.

    Raises: ValueError: they do not divide, or a node is too small.
    """
    per_node, odd = divmod(ranks, nodes)
    dies = machine.dies_per_npu if per_node % machine.dies_per_npu == 0 else 1
    if odd or nodes > machine.nodes or per_node // dies > machine.npus_per_node:
        raise ValueError(
            f"{ranks} ranks over {nodes} nodes: {machine.name} has {machine.nodes} nodes of "
            f"{machine.npus_per_node * machine.dies_per_npu} ranks"
        )
    return RankMesh(nodes, per_node // dies, dies)
