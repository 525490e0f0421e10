"""The accelerator: its memory, streams, copies and measured rates. The CPU stands in for one in tests."""
