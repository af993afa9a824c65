"""YAML files of users: plain values, and nothing that runs code, loops or grows without end."""

from typing import Any

import yaml

_MOST_BYTES = 4 << 20
_MOST_VALUES = 200_000


def load_yaml(text: str) -> Any:
    """The value of a YAML text; raises `ValueError` with one line where anything is wrong with it.

    No tags of Python, at most 4 Mi characters. Aliases (`*name`) are allowed, but what they expand
    to is counted before it is made, at most 200,000 values: ten lines of aliases can expand to a
    billion values, or to themselves.
    """
    if len(text) > _MOST_BYTES:
        raise ValueError(f"{len(text):,} characters are more than a configuration has")
    loader = None
    try:
        loader = yaml.SafeLoader(text)
        # Nodes only: no value is made before all of them are counted.
        node = loader.get_single_node()
        if node is None:
            return None
        if _count_values(node, {}) > _MOST_VALUES:
            raise ValueError(f"its aliases expand to more than {_MOST_VALUES:,} values")
        return loader.construct_document(node)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    except (yaml.YAMLError, ValueError, OverflowError, TypeError) as error:
        raise ValueError(" ".join(str(error).split()) or type(error).__name__) from None
    finally:
        if loader is not None:
            loader.dispose()


def _count_values(node: yaml.Node, known: dict[int, int | None]) -> int:
    """How many values the node and all below it expand to, aliases written out.

    Each node is visited once; one that contains itself is a ValueError.
    """
    if isinstance(node, yaml.ScalarNode):
        return 1
    if id(node) in known:
        count = known[id(node)]
        if count is None:
            raise ValueError("an alias refers to something that contains it")
        return count
    # Begun but not counted: to meet it again below means that it contains itself.
    known[id(node)] = None
    below = [part for pair in node.value for part in (pair if isinstance(pair, tuple) else (pair,))]
    total = 1 + sum(_count_values(part, known) for part in below)
    known[id(node)] = total
    return total
