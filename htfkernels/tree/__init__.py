"""Mode trees, and what is known of a model before its numbers."""

from htfkernels.tree.mode_tree import ModeTree, Node

__all__ = ["ModeTree", "Node"]
