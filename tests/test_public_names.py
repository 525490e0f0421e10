"""What `hsrpc` offers by name."""

from __future__ import annotations

import pytest

import hsrpc


@pytest.mark.parametrize("name", hsrpc.__all__)
def test_every_public_name_is_there(name: str):
    """Loaded on first use, from the module that defines it."""
    found = getattr(hsrpc, name)
    if isinstance(found, type):
        assert found.__name__ == name
        assert found.__module__ == hsrpc._HOMES[name]


def test_another_name_is_an_attribute_error():
    """With the name in it."""
    with pytest.raises(AttributeError, match="Nothing"):
        _ = hsrpc.Nothing
