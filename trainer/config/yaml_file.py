"""YAML that a person wrote, or somebody else: plain values, of which a few lines cannot spell billions."""

from __future__ import annotations

from typing import Any

import yaml

from storage.base.errors import StoreError
from storage.base.shown import shown

MAX_YAML_VALUES = 100_000


def parse_yaml(raw: bytes, where: str) -> Any:
    """What YAML says, in plain values. Raises StoreError in one line.

    Aliases are counted as what they stand for, before anything is built: a few lines of them could spell billions.
    """
    try:
        loader = yaml.SafeLoader(raw.decode("utf-8-sig"))
        try:
            node = loader.get_single_node()
            if node is not None and _n_values(node, {}) > MAX_YAML_VALUES:
                raise StoreError(f"{shown(where)} spells more than {MAX_YAML_VALUES:,} values; restore it")
            return None if node is None else loader.construct_document(node)
        finally:
            loader.dispose()
    except StoreError:
        raise
    except UnicodeDecodeError as error:
        raise StoreError(f"{shown(where)} is not YAML: {error.reason} at byte {error.start}, not UTF-8") from None
    except RecursionError:
        raise StoreError(f"{shown(where)} is not YAML that can be read: nested too deeply") from None
    except (yaml.YAMLError, ValueError, TypeError, OverflowError) as error:  # a date of month 13 is a ValueError
        raise StoreError(f"{shown(where)} is not YAML: {shown(' '.join(str(error).split()))[:200]}") from None


def _n_values(node: Any, known: dict[int, int]) -> int:
    """Values below a node, those behind aliases as often as they are named; a node that holds itself has too many."""
    if isinstance(node, yaml.ScalarNode):
        return 1
    if id(node) not in known:
        known[id(node)] = MAX_YAML_VALUES  # while it is counted
        inner = [part for pair in node.value for part in (pair if isinstance(pair, tuple) else (pair,))]
        known[id(node)] = 1 + sum(_n_values(part, known) for part in inner)
    return known[id(node)]
