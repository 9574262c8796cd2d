"""The texts in the source, as a page may quote them: what is filled in stands as three dots."""

import ast
import re

_FORMAT = re.compile(r"%[-+ #0]*[\d*]*(?:\.\d+)?[sdrgfe]|\{[a-z][a-z_.]*(?::[^{}]*)?\}")  # of a logger, of str.format


def templates(source):
    """Every text of a Python source; adjacent literals are one, and so are sums of literals."""
    return {_FORMAT.sub("...", text) for text in map(_text, ast.walk(ast.parse(source))) if text}


def _text(node):
    if isinstance(node, ast.Constant):
        return node.value if isinstance(node.value, str) else ""
    if isinstance(node, ast.JoinedStr):
        return "".join(_text(part) if isinstance(part, ast.Constant) else "..." for part in node.values)
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        parts = [_text(side) or "..." for side in (node.left, node.right)]
        return "".join(parts) if parts != ["...", "..."] else ""
    return ""
