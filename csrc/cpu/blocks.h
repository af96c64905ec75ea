// Blocks: the tree cut into connected pieces whose messages for a chunk of rows fit in cache, so
// that a backward pass finds what it has just computed, and streams each weight once per chunk.
#pragma once

#include <algorithm>
#include <vector>

#include "cpu/program.h"

namespace htf {

struct Block {
  int64_t root;                // its topmost step
  int64_t depth;               // number of blocks above it
  int64_t width;               // columns of the messages it keeps: all but its root's
  std::vector<int64_t> steps;  // ascending, children before parents, the root last
  std::vector<int64_t> below;  // the roots of the blocks under it, ascending
};

// Cuts greedily from the leaves: where a node's piece would pass the limit, its heaviest interior
// children become roots of blocks of their own. width[s]: columns of the message of step s.
inline std::vector<Block> make_blocks(const Program& p,
                                      const std::vector<std::vector<int64_t>>& children,
                                      const std::vector<int64_t>& width, int64_t limit) {
  std::vector<int64_t> open(p.steps, 0);
  std::vector<char> cut(p.steps, 0);
  for (int64_t s = 0; s < p.steps; ++s) {
    std::vector<int64_t> interior;
    for (const int64_t c : children[s]) {
      open[s] += open[c] + width[c];
      if (!p.is_leaf(c)) interior.push_back(c);
    }
    std::sort(interior.begin(), interior.end(),
              [&](int64_t a, int64_t b) { return open[a] + width[a] > open[b] + width[b]; });
    for (std::size_t i = 0; i < interior.size() && open[s] > limit; ++i) {
      open[s] -= open[interior[i]] + width[interior[i]];
      cut[interior[i]] = 1;
    }
  }
  cut[p.steps - 1] = 1;
  std::vector<int64_t> block_of(p.steps, -1);
  std::vector<Block> blocks;
  for (int64_t s = p.steps - 1; s >= 0; --s) {
    const int64_t above = p.step[s].parent < 0 ? -1 : block_of[p.step[s].parent];
    if (cut[s]) {
      block_of[s] = static_cast<int64_t>(blocks.size());
      if (above >= 0) blocks[above].below.push_back(s);
      blocks.push_back({s, above < 0 ? 0 : blocks[above].depth + 1, open[s], {}, {}});
    } else {
      block_of[s] = above;
    }
    blocks[block_of[s]].steps.push_back(s);
  }
  for (Block& b : blocks) {
    std::reverse(b.steps.begin(), b.steps.end());
    std::reverse(b.below.begin(), b.below.end());
  }
  std::stable_sort(blocks.begin(), blocks.end(),
                   [](const Block& a, const Block& b) { return a.depth < b.depth; });
  return blocks;
}

}  // namespace htf
