// The context cache (cmjax/serving/engine/cache.py): least recently used, per store and node.
#pragma once
#include <algorithm>
#include <vector>

#include "serving.h"

namespace cmjax::serving {

class Cache {
 public:
  explicit Cache(const Inputs& in)
      : in_(in), lists_(2 * in.stores * in.nodes), links_(in.stores * in.blocks) {}

  // Leading blocks that are held.
  int64_t peek(int64_t store, const int32_t* blocks, int64_t count) const {
    const Link* links = links_.data() + store * in_.blocks;
    for (int64_t i = 0; i < count; ++i) {
      if (links[blocks[i]].where == kAbsent) return i;
    }
    return count;
  }

  // Leading blocks that are held, now the most recently used; `from_disk` counts those from there.
  int64_t fetch(int64_t store, const int32_t* blocks, int64_t count, int64_t* from_disk) {
    const int64_t hits = peek(store, blocks, count);
    const Link* links = links_.data() + store * in_.blocks;
    *from_disk = 0;
    for (int64_t i = 0; i < hits; ++i) *from_disk += links[blocks[i]].where == kDisk;
    for (int64_t i = 0; i < hits; ++i) insert(store, blocks[i]);
    return hits;
  }

  // Hold a block as the most recently used of its node.
  void insert(int64_t store, int32_t block) {
    const int32_t node = in_.node[block];
    if (in_.memory[node] == 0) return;
    Link& link = at(store, block);
    if (link.where == kMemory) {
      if (list(store, node, kMemory).newest == block) return;
      remove(store, node, block);
      append(store, node, block, kMemory);
      return;
    }
    if (link.where == kDisk) remove(store, node, block);
    if (list(store, node, kMemory).size == in_.memory[node]) {
      const int32_t evicted = list(store, node, kMemory).oldest;
      remove(store, node, evicted);
      if (in_.disk[node] > 0) {
        if (list(store, node, kDisk).size == in_.disk[node]) {
          remove(store, node, list(store, node, kDisk).oldest);
        }
        append(store, node, evicted, kDisk);
      }
    }
    append(store, node, block, kMemory);
  }

 private:
  enum Where : int32_t { kMemory, kDisk, kAbsent };
  struct List {
    int32_t oldest = -1, newest = -1;
    int64_t size = 0;
  };
  struct Link {
    int32_t older = -1, newer = -1, where = kAbsent;
  };

  Link& at(int64_t store, int32_t block) { return links_[store * in_.blocks + block]; }
  List& list(int64_t store, int32_t node, int32_t where) {
    return lists_[2 * (store * in_.nodes + node) + where];
  }

  void append(int64_t store, int32_t node, int32_t block, Where where) {
    List& to = list(store, node, where);
    Link& link = at(store, block);
    link = {to.newest, -1, where};
    if (to.newest >= 0) at(store, to.newest).newer = block;
    if (to.oldest < 0) to.oldest = block;
    to.newest = block;
    ++to.size;
  }

  void remove(int64_t store, int32_t node, int32_t block) {
    Link& link = at(store, block);
    List& from = list(store, node, link.where);
    if (link.older >= 0) at(store, link.older).newer = link.newer;
    if (link.newer >= 0) at(store, link.newer).older = link.older;
    if (from.oldest == block) from.oldest = link.newer;
    if (from.newest == block) from.newest = link.older;
    --from.size;
    link = Link();
  }

  const Inputs& in_;
  std::vector<List> lists_;
  std::vector<Link> links_;
};

}  // namespace cmjax::serving
