"""Reads index plans as a kernel does."""

from __future__ import annotations

import numpy
import torch

from htfkernels.schedule.index_plan import BILINEAR, FRAMED_ROOT, NO_OPERAND, WALK


def uniform(layout, batch):
    return torch.stack([torch.randint(d, (batch,)) for d in layout.mode_dims], dim=1)


class Check:
    """Reads a plan's table as a kernel does, and holds it against the rule, by numpy.unique."""

    def __init__(self, plan):
        self.plan, self.layout = plan, plan.layout
        self.steps = plan.layout.steps
        self.x = plan.indices.numpy().astype(numpy.int64)
        self.limit = len(self.x) // 2
        self.used = 0
        flat = plan.table.tolist()
        self.version, self.batch, framed, cuts, self.form, length, order, steps = flat[:8]
        assert (self.version, order, steps) == (1, self.layout.tree.order, len(self.steps))
        assert self.batch == len(self.x) == plan.batch == len(plan)
        assert plan.table.dtype == torch.int64 and plan.lists.dtype == torch.int32
        assert self.form == plan.form and length == plan.lists.numel()
        self.framed = [flat[8 + 10 * i : 18 + 10 * i] for i in range(framed)]
        self.cuts = [flat[8 + 10 * framed + 6 * i :][:6] for i in range(cuts)]
        assert len(flat) == 8 + 10 * framed + 6 * cuts
        assert [list(row) for row in plan.framed] == self.framed
        assert [list(row) for row in plan.cuts] == self.cuts
        self.ids, self.level, self.members = [], [], []  # of the framed rows

    def list(self, offset, count):
        assert offset >= 0 and offset + count <= self.plan.lists.numel()
        self.used += count
        return self.plan.lists[offset : offset + count].numpy()

    def operand(self, code):
        """Each sample's row, the number of rows, the level, the program steps that are in it."""
        if code >= 0:
            return self.ids[code], self.framed[code][3], self.level[code], self.members[code]
        step = self.steps[-(code + 1)]
        assert step.mode >= 0
        return self.x[:, step.mode], step.rows, 0, [-(code + 1)]

    def grouped(self, start, order, ids, rows):
        start, order = self.list(start, rows + 1), self.list(order, len(ids))
        assert start[0] == 0 and start[-1] == len(ids) and (numpy.diff(start) >= 0).all()
        assert (order == numpy.argsort(ids, kind="stable")).all()
        assert (numpy.diff(start) == numpy.bincount(ids, minlength=rows)).all()

    def run(self):
        for k, row in enumerate(self.framed):
            self.framed_row(k, *row)
        walked = self.rule()
        for operand, parent, at, start, order, rows in self.cuts:
            assert operand < len(self.framed)
            ids, count, _, _ = self.operand(operand)
            assert rows == count
            assert (self.list(at, self.batch) == ids).all()
            if self.form == WALK:
                assert start == order == -1
            else:
                self.grouped(start, order, ids, rows)
            assert parent == -1 if self.form == FRAMED_ROOT else parent in walked
        assert self.used == self.plan.lists.numel()
        root = len(self.steps) - 1
        if self.form == FRAMED_ROOT:
            assert len(self.cuts) == 1 and not walked
            assert self.framed[self.cuts[0][0]][0] == root
        bilinear = walked == {root} and len(self.cuts) == 2 and self.layout.out_features == 1
        assert (self.form == BILINEAR) == bilinear
        assert (self.form == FRAMED_ROOT) == (root not in walked)

    def framed_row(self, k, step, left, right, rows, left_ids, right_ids, *rest):
        left_start, right_start, right_order, level = rest
        assert left < k and right < k
        ids, count, below, members = self.operand(left)
        if right == NO_OPERAND:
            assert rows == count <= self.limit and [left_ids, right_ids, *rest[:3]] == [-1] * 5
        else:
            other, others, second, more = self.operand(right)
            pairs, inverse = numpy.unique(
                numpy.stack([ids, other], axis=1), axis=0, return_inverse=True
            )
            assert rows == len(pairs) <= self.limit
            assert (self.list(left_ids, rows) == pairs[:, 0]).all()
            assert (self.list(right_ids, rows) == pairs[:, 1]).all()
            starts = self.list(left_start, count + 1)
            assert (starts == numpy.searchsorted(pairs[:, 0], numpy.arange(count + 1))).all()
            self.grouped(right_start, right_order, pairs[:, 1], others)
            assert min(members) < min(more)
            ids, below, members = inverse.reshape(-1), max(below, second), members + more
        assert level == 1 + below
        parents = {self.steps[m].parent for m in members}
        assert len(parents) == 1
        if step >= 0:
            assert parents == {step}
            assert sorted(members) == self.children(step)
            members = [step]
        self.ids.append(ids)
        self.level.append(level)
        self.members.append(members)

    def children(self, step):
        return [s for s, other in enumerate(self.steps) if other.parent == step]

    def rule(self):
        """Which nodes have to be walked, with which operands; the plan's cuts are these."""
        walked, expected, ready = set(), [], {}  # ready: a step's code
        of_framed = {row[0]: k for k, row in enumerate(self.framed) if row[0] >= 0}
        parts = {(r[1], r[2]): k for k, r in enumerate(self.framed)}
        made = 0
        for s, step in enumerate(self.steps):
            if step.mode >= 0:
                ready[s] = -(s + 1)
                continue
            children = self.children(s)
            codes = [ready[c] for c in children if c in ready]
            whole = len(codes) == len(children)
            key = lambda c: min(self.operand(c)[3])  # noqa: E731
            if whole and len(codes) == 1 and self.operand(codes[0])[1] <= self.limit:
                ready[s] = of_framed[s]
                made += 1
                continue
            while len(codes) > 1 and self.limit:
                pair = sorted(codes, key=lambda c: (self.operand(c)[1], key(c)))[:2]
                left, right = sorted(pair, key=key)
                both = numpy.stack([self.operand(left)[0], self.operand(right)[0]], axis=1)
                if len(numpy.unique(both, axis=0)) > self.limit:
                    break
                k = parts[left, right]
                made += 1
                codes = [c for c in codes if c not in pair] + [k]
            if whole and len(codes) == 1 and len(children) > 1:
                ready[s] = of_framed[s]
                assert ready[s] == codes[0]
                continue
            walked.add(s)
            expected += [(c, s) for c in sorted(codes, key=key)]
        assert made == len(self.framed)
        if self.form != FRAMED_ROOT:
            assert [tuple(cut[:2]) for cut in self.cuts] == expected
        return walked
