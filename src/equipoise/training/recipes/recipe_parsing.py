"""Parses YAML as plain values, without tags, duplicate keys or recursive aliases."""

from __future__ import annotations

from typing import Any

import yaml

from ...errors import ConfigError
from ...io.typed_values import is_plain, shorten_repr

BYTES, DEPTH, NODES = 1_000_000, 30, 20_000
"""Limits of a file: size, nesting depth and number of values."""


class PlainLoader(yaml.SafeLoader):
    """Safe YAML loader that leaves dates as strings."""


PlainLoader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in found if tag != "tag:yaml.org,2002:timestamp"]
    for first, found in yaml.SafeLoader.yaml_implicit_resolvers.items()
}


def parse(text: str, who: str) -> Any:
    """Parses a YAML document.

    Raises:
        ConfigError: invalid YAML, Python tags, duplicate keys, values other than numbers, strings, lists and mappings,
            or a document beyond the limits of this module.
    """
    if len(text) > BYTES:
        raise ConfigError(who, expected=f"a file of at most {BYTES:,} characters", got=f"{len(text):,}")
    try:
        _check_depth(text, who)
        node = yaml.compose(text, Loader=PlainLoader)
        if node is not None:
            _check_node(node, who, {}, set())
        loader = PlainLoader("")
        # Construct from the checked nodes rather than parsing again.
        content = None if node is None else loader.construct_document(node)
    except (yaml.YAMLError, ValueError, ArithmeticError) as error:
        if isinstance(error, ConfigError):
            raise
        raise ConfigError(who, expected="YAML", got=shorten_repr(" ".join(str(error).split()).rstrip("."))) from error
    if not is_plain(content):
        raise ConfigError(
            who, expected="finite numbers of at most 19 digits, texts, lists, and mappings with texts as keys",
            got=shorten_repr(_culprit(content)),
            fix="Quote values that are strings.",
        )  # fmt: skip
    return content


def _check_depth(text: str, who: str) -> None:
    # Events are generated without recursion, whatever the nesting depth.
    depth = 0
    for count, event in enumerate(yaml.parse(text, Loader=PlainLoader)):
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        if depth > DEPTH or count > NODES:
            raise ConfigError(
                who, expected=f"lists and mappings nested at most {DEPTH} deep, and at most {NODES:,} values",
                got="more",
            )  # fmt: skip


def _check_node(node: yaml.Node, who: str, sizes: dict[int, int], above: set[int]) -> int:
    """Returns the number of values of a node, with aliases expanded."""
    if id(node) in above:
        raise ConfigError(who, expected="aliases without recursion", got=f"an alias that contains itself{_line(node)}")
    if id(node) in sizes:
        return sizes[id(node)]
    size, parts = 1, []
    if isinstance(node, yaml.MappingNode):
        visited = set()
        for key, value in node.value:
            if isinstance(key, yaml.ScalarNode) and key.tag != "tag:yaml.org,2002:merge":
                if key.value in visited:
                    raise ConfigError(
                        who,
                        expected="each key once",
                        got=f"{shorten_repr(key.value)} twice{_line(key)}",
                        fix="Remove one.",
                    )
                visited.add(key.value)
            parts += [key, value]
    elif isinstance(node, yaml.SequenceNode):
        parts = node.value
    for part in parts:
        size += _check_node(part, who, sizes, above | {id(node)})
        if size > NODES:
            raise ConfigError(who, expected=f"at most {NODES:,} values, aliases written out", got="more")
    sizes[id(node)] = size
    return size


def _line(node: yaml.Node) -> str:
    return f" in line {node.start_mark.line + 1}" if node.start_mark else ""


def _culprit(content: Any) -> Any:
    """Returns the innermost value or key that is not plain."""
    if isinstance(content, dict):
        for key, value in content.items():
            if not (isinstance(key, str) and is_plain(key)):
                return key
            if not is_plain(value):
                return _culprit(value)
    if isinstance(content, list):
        return next((_culprit(part) for part in content if not is_plain(part)), content)
    return content
