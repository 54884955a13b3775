"""The context cache: blocks addressed by the hash of their prefix, the least recently used go
first.

A store is spread over nodes by consistent hashing, and every node keeps its own order of use.
Behind a node's memory may be a disk, which takes what memory evicts and gives it back on a hit.
"""

from collections import OrderedDict

from cmjax.serving.engine.inputs import CacheInputs


class Cache:
    """All stores; a store is one cache that some workers share."""

    def __init__(self, given: CacheInputs):
        nodes = len(given.memory)
        self.node = given.node.tolist()
        self.memory, self.disk = given.memory.tolist(), given.disk.tolist()
        self.held = [[OrderedDict() for _ in range(nodes)] for _ in range(given.stores)]
        self.behind = [[OrderedDict() for _ in range(nodes)] for _ in range(given.stores)]

    def peek(self, store: int, blocks: list[int]) -> int:
        """Leading blocks that are held."""
        held, behind = self.held[store], self.behind[store]
        for count, block in enumerate(blocks):
            node = self.node[block]
            if block not in held[node] and block not in behind[node]:
                return count
        return len(blocks)

    def fetch(self, store: int, blocks: list[int]) -> tuple[int, int]:
        """Leading blocks that are held, now the most recently used: all, and those from disk."""
        hits = self.peek(store, blocks)
        from_disk = 0
        for block in blocks[:hits]:
            from_disk += block not in self.held[store][self.node[block]]
        for block in blocks[:hits]:
            self.insert(store, block)
        return hits, from_disk

    def insert(self, store: int, block: int) -> None:
        """Hold a block as the most recently used of its node."""
        node = self.node[block]
        held, behind = self.held[store][node], self.behind[store][node]
        if self.memory[node] == 0:
            return
        if block in held:
            held.move_to_end(block)
            return
        behind.pop(block, None)
        if len(held) == self.memory[node]:
            evicted, _ = held.popitem(last=False)
            if self.disk[node]:
                if len(behind) == self.disk[node]:
                    behind.popitem(last=False)
                behind[evicted] = None
        held[block] = None
